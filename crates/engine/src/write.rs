//! Writes that change the mapping: allocation and copy-on-write.

use urus_format::{ClusterIndex, GuestCluster, GuestOffset, HostOffset, L2Entry};

use crate::change::Outcome;
use crate::cluster_locks::ClusterGuard;
use crate::error::Result;
use crate::planted::{self, Bug};

use crate::chain::{LayerEntry, LayerKind};
use crate::seen::{Way, note};
use crate::shared::{Run, Shared};
use crate::storage::{Memory, OpKind, Storage};
use crate::to_usize;
use crate::wake::Window;
use crate::worker::Worker;

/// Bytes around the data of a partly written cluster.
enum Filler<M> {
    /// Nothing to write: the clusters read as zeroes already, and so must the bytes.
    None,
    /// Zeroes.
    Zero(u64),
    /// What the older place holds.
    Bytes(M),
}

/// Whether an entry's cluster may be written in place (refcount exactly one).
pub(crate) fn writable_in_place(copied: bool) -> bool {
    copied || planted::is(Bug::IgnoreSnapshots)
}

impl<S: Storage> Worker<S> {
    /// Writes a range, whatever its clusters are.
    pub(crate) async fn write_guest(&self, offset: u64, memory: S::Memory) -> Result<()> {
        self.shared.check_writable()?;
        match &self.image.layer.kind {
            LayerKind::Raw => {
                let lock_bits = self.shared.options.sizes.raw_lock_bits;
                self.write_locked_in_place(lock_bits, offset, offset, memory)
                    .await
            }
            LayerKind::Qcow2(_) => self.write_mapped(offset, memory).await,
        }
    }

    async fn write_mapped(&self, offset: u64, memory: S::Memory) -> Result<()> {
        let geometry = self.image.qcow2().geometry;
        let total = memory.len() as u64;
        let mut running = Window::new(self.shared.options.sizes.parts_at_once);
        let mut done = 0;
        let mut failed = None;
        while done < total {
            let at = offset + done;
            let in_cluster = (geometry.cluster_bytes() - geometry.in_cluster(at)).min(total - done);
            match self.layer_entry(&self.image.layer, at) {
                LayerEntry::Bad(error) => {
                    failed = Some(*error);
                    break;
                }
                LayerEntry::Miss(slice) => {
                    if let Err(error) = running.during(self.load(&self.image.layer, slice)).await {
                        failed = Some(error);
                        break;
                    }
                }
                LayerEntry::Entry(L2Entry::Data { host, copied }) if writable_in_place(copied) => {
                    let part = memory.slice(to_usize(done), to_usize(in_cluster));
                    let host = host.0 + geometry.in_cluster(at);
                    let bits = geometry.cluster_bits();
                    running
                        .start(self.write_locked_in_place(bits, at, host, part))
                        .await;
                    done += in_cluster;
                }
                LayerEntry::Entry(_) => {
                    let len = self.changing_bytes(at, total - done);
                    let part = memory.slice(to_usize(done), to_usize(len));
                    running.start(self.write_changing(at, part)).await;
                    done += len;
                }
            }
        }
        let result = running.end().await;
        failed.map_or(result, Err)
    }

    /// Bytes from `at` on whose clusters all look as if they had to change.
    fn changing_bytes(&self, at: u64, len: u64) -> u64 {
        let geometry = self.image.qcow2().geometry;
        let mut bytes = (geometry.cluster_bytes() - geometry.in_cluster(at)).min(len);
        let most = self.shared.options.sizes.write_step_clusters;
        let limit = len.min(most << geometry.cluster_bits());
        while bytes < limit {
            match self.layer_entry(&self.image.layer, at + bytes) {
                LayerEntry::Entry(L2Entry::Data { copied, .. }) if writable_in_place(copied) => {
                    break;
                }
                LayerEntry::Entry(_) => bytes += geometry.cluster_bytes().min(limit - bytes),
                LayerEntry::Miss(_) | LayerEntry::Bad(_) => break,
            }
        }
        note(Way::WriteStep, || bytes == limit && limit < len);
        bytes
    }

    /// Writes into clusters that are the image's own. Under O18 (a write was smaller than the file's alignment)
    /// every such write takes its range's lock, because a neighbour may be read, changed and written around it.
    async fn write_locked_in_place(
        &self,
        lock_bits: u32,
        at: u64,
        host: u64,
        memory: S::Memory,
    ) -> Result<()> {
        let _guard = if self
            .image
            .serialize_writes
            .load(crate::sync::Ordering::SeqCst)
            && !planted::is(Bug::NoBlockLocks)
        {
            Some(self.lock_range(lock_bits, at, memory.len() as u64).await)
        } else {
            None
        };
        self.files.write_data(self.image.file(), host, memory).await
    }

    /// Locks the ranges of 2 to the power of `lock_bits` bytes that bytes lie in.
    pub(crate) async fn lock_range(&self, lock_bits: u32, at: u64, len: u64) -> ClusterGuard {
        let (first, last) = (at >> lock_bits, (at + len - 1) >> lock_bits);
        let count = last - first + 1;
        self.image.locks.lock(GuestCluster(first), count).await
    }

    /// Writes a range whose clusters change, a group of like ones at a time.
    async fn write_changing(&self, offset: u64, memory: S::Memory) -> Result<()> {
        let geometry = self.image.qcow2().geometry;
        let total = memory.len() as u64;
        let first = geometry.guest_cluster(GuestOffset(offset));
        let last = geometry.guest_cluster(GuestOffset(offset + total - 1));
        // O14: from reading the old state to publishing the new.
        let _guard = self.image.locks.lock(first, last.0 - first.0 + 1).await;
        let mut done = 0;
        while done < total {
            let at = offset + done;
            let in_cluster = (geometry.cluster_bytes() - geometry.in_cluster(at)).min(total - done);
            let part = |bytes: u64| memory.slice(to_usize(done), to_usize(bytes));
            match self.loaded_entry(at).await? {
                L2Entry::Data { host, copied } if writable_in_place(copied) => {
                    self.files
                        .write_data(
                            self.image.file(),
                            host.0 + geometry.in_cluster(at),
                            part(in_cluster),
                        )
                        .await?;
                    done += in_cluster;
                }
                L2Entry::ZeroAllocated { host, copied: true } => {
                    self.write_preallocated(at, host, part(in_cluster)).await?;
                    done += in_cluster;
                }
                _ => done += self.write_fresh(at, part(total - done)).await?,
            }
        }
        Ok(())
    }

    /// The image's own entry of the cluster at `offset`, loaded if need be.
    pub(crate) async fn loaded_entry(&self, offset: u64) -> Result<L2Entry> {
        loop {
            match self.layer_entry(&self.image.layer, offset) {
                LayerEntry::Entry(entry) => return Ok(entry),
                LayerEntry::Miss(slice) => self.load(&self.image.layer, slice).await?,
                LayerEntry::Bad(error) => return Err(*error),
            }
        }
    }

    /// Writes into a preallocated zero cluster: whole, because what it holds is anybody's guess.
    async fn write_preallocated(&self, at: u64, host: HostOffset, memory: S::Memory) -> Result<()> {
        let geometry = self.image.qcow2().geometry;
        let within = geometry.in_cluster(at);
        let after = geometry.cluster_bytes() - within - memory.len() as u64;
        self.write_clusters(
            host.0 + within,
            Filler::Zero(within),
            memory,
            Filler::Zero(after),
        )
        .await?;
        let cluster = geometry.guest_cluster(GuestOffset(at));
        self.change(cluster, 1, None, &|_, _| {
            Outcome::Set(L2Entry::Data { host, copied: true })
        })
        .await
    }

    /// Gives clusters from `at` on new host clusters, as many as are adjacent there; returns the bytes written.
    async fn write_fresh(&self, at: u64, memory: S::Memory) -> Result<u64> {
        let geometry = self.image.qcow2().geometry;
        let want = self.fresh_clusters(at, memory.len() as u64).await?;
        let run = self.take_clusters(want).await?;
        note(Way::ShortRun, || run.count < want);
        note(Way::PartialCluster, || {
            at + memory.len() as u64 == self.shared.size()
                && geometry.in_cluster(self.shared.size()) != 0
        });
        let start = geometry.in_cluster(at);
        let bytes = ((run.count << geometry.cluster_bits()) - start).min(memory.len() as u64);
        let memory = memory.slice(0, to_usize(bytes));
        if let Err(error) = self.write_run(at, run, memory).await {
            // O11: never referenced by anything, so free at once.
            self.shared.give_back(Run { zero: false, ..run });
            if planted::is(Bug::DoubleGiveBack) {
                self.shared.give_back(Run { zero: false, ..run });
            }
            return Err(error);
        }
        let first = geometry.guest_cluster(GuestOffset(at));
        self.publish_run(first, run).await?;
        Ok(bytes)
    }

    /// How many clusters from `at` on need a new host cluster, without a gap.
    async fn fresh_clusters(&self, at: u64, len: u64) -> Result<u64> {
        let geometry = self.image.qcow2().geometry;
        let first = geometry.guest_cluster(GuestOffset(at)).0;
        let last = geometry.guest_cluster(GuestOffset(at + len - 1)).0;
        let mut count = 1;
        while first + count <= last {
            match self
                .loaded_entry(geometry.guest_offset(GuestCluster(first + count)).0)
                .await?
            {
                L2Entry::Data { copied, .. } if writable_in_place(copied) => break,
                L2Entry::ZeroAllocated { copied: true, .. } => break,
                _ => count += 1,
            }
        }
        Ok(count)
    }

    /// Writes data, and what has to stand around it, into new clusters.
    async fn write_run(&self, at: u64, run: Run, memory: S::Memory) -> Result<()> {
        let geometry = self.image.qcow2().geometry;
        let within = geometry.in_cluster(at);
        let end = at + memory.len() as u64;
        let after = (run.count << geometry.cluster_bits()) - within - memory.len() as u64;
        let around = if run.count == 1 && within > 0 && after > 0 {
            self.read_around(at, memory.len() as u64).await?
        } else {
            None
        };
        // What reads as zeroes in the file need not be zeroes of the data.
        let zero = run.zero && self.files.keeps_zeroes(self.image.file());
        let (head, tail) = match around {
            Some(around) => around,
            None => (
                self.filler(at - within, within, zero).await?,
                self.filler(end, after, zero).await?,
            ),
        };
        self.write_clusters(
            (run.first << geometry.cluster_bits()) + within,
            head,
            memory,
            tail,
        )
        .await
    }

    /// Both sides of `[at, at + len)` in its cluster, by one read of the whole; `None` where that gains nothing.
    async fn read_around(
        &self,
        at: u64,
        len: u64,
    ) -> Result<Option<(Filler<S::Memory>, Filler<S::Memory>)>> {
        let geometry = self.image.qcow2().geometry;
        let (within, bytes) = (geometry.in_cluster(at), geometry.cluster_bytes());
        let start = at - within;
        let after = bytes - within - len;
        if len > bytes / 2
            || self.reads_zero(start, within).await?
            || self.reads_zero(at + len, after).await?
        {
            return Ok(None);
        }
        let Ok(old) = self.files.allocate(bytes) else {
            // The two parts alone may be had.
            return Ok(None);
        };
        // What the guest writes over need not be readable.
        if self.read_guest(start, old.clone()).await.is_err() {
            return Ok(None);
        }
        Shared::count(&self.shared.stats.copied_bytes, within + after);
        let part = |start, len| Filler::Bytes(old.slice(to_usize(start), to_usize(len)));
        Ok(Some((part(0, within), part(within + len, after))))
    }

    /// What has to be written at `[offset, offset + len)` so that the new cluster shows what the old place did.
    async fn filler(&self, offset: u64, len: u64, already_zero: bool) -> Result<Filler<S::Memory>> {
        if len == 0 {
            return Ok(Filler::None);
        }
        if self.reads_zero(offset, len).await? {
            return Ok(if already_zero {
                Filler::None
            } else {
                Filler::Zero(len)
            });
        }
        let bytes = self.files.allocate(len)?;
        self.read_guest(offset, bytes.clone()).await?;
        Shared::count(&self.shared.stats.copied_bytes, len);
        Ok(Filler::Bytes(bytes))
    }

    /// Publishes new clusters, slice by slice. Those that could not be published are given back.
    async fn publish_run(&self, first: GuestCluster, run: Run) -> Result<()> {
        let image = self.image.qcow2();
        let mut done = 0;
        while done < run.count {
            let cluster = GuestCluster(first.0 + done);
            let in_slice =
                image.map.slice_entries() - (cluster.0 & (image.map.slice_entries() - 1));
            let part = Run {
                first: run.first + done,
                count: in_slice.min(run.count - done),
                ..run
            };
            let decide = |index: u64, _old: L2Entry| {
                let host = image.geometry.host_offset(ClusterIndex(part.first + index));
                Outcome::Set(L2Entry::Data { host, copied: true })
            };
            if let Err(error) = self.change(cluster, part.count, Some(part), &decide).await {
                // O11: the rest was never referenced.
                self.shared.give_back(Run {
                    first: part.first,
                    count: run.count - done,
                    zero: false,
                });
                return Err(error);
            }
            done += part.count;
            note(Way::PublishedAcrossSlices, || done < run.count);
        }
        Ok(())
    }

    /// One write of head, data (at `data_host`) and tail where they fit together; long zeroes apart, by ZeroRange.
    async fn write_clusters(
        &self,
        data_host: u64,
        head: Filler<S::Memory>,
        memory: S::Memory,
        tail: Filler<S::Memory>,
    ) -> Result<()> {
        let properties = self.files.properties(self.image.file());
        let align = u64::from(properties.alignment);
        let data_end = data_host + memory.len() as u64;
        let apart = |bytes: u64| {
            bytes >= self.shared.options.sizes.zero_range_from_bytes
                && properties.can_zero_range
                && self.files.keeps_zeroes(self.image.file())
                && data_host.is_multiple_of(align)
                && data_end.is_multiple_of(align)
        };
        let (head, tail) = if planted::is(Bug::NoClearing) {
            (Filler::None, Filler::None)
        } else {
            (head, tail)
        };
        let mut first = data_host;
        let mut parts = Vec::with_capacity(3);
        let mut zeroes = Vec::new();
        match head {
            Filler::None | Filler::Zero(0) => {}
            Filler::Zero(bytes) if apart(bytes) => zeroes.push((data_host - bytes, bytes)),
            Filler::Zero(bytes) => {
                first = data_host - bytes;
                parts.push(self.files.allocate(bytes)?);
            }
            Filler::Bytes(bytes) => {
                first = data_host - bytes.len() as u64;
                parts.push(bytes);
            }
        }
        parts.push(memory);
        match tail {
            Filler::None | Filler::Zero(0) => {}
            Filler::Zero(bytes) if apart(bytes) => zeroes.push((data_end, bytes)),
            Filler::Zero(bytes) => parts.push(self.files.allocate(bytes)?),
            Filler::Bytes(bytes) => parts.push(bytes),
        }
        let all = if parts.len() == 1 {
            parts.remove(0)
        } else {
            S::Memory::chain(parts)
        };
        // O11: nothing returns from here before all of it has ended, for the clusters are given back then.
        let mut running = Window::new(self.shared.options.sizes.parts_at_once);
        for (offset, bytes) in zeroes {
            running.start(self.zero_range(offset, bytes)).await;
        }
        running
            .start(self.files.write_data(self.image.file(), first, all))
            .await;
        running.end().await
    }

    async fn zero_range(&self, offset: u64, len: u64) -> Result<()> {
        note(Way::ZeroRange, || true);
        self.files
            .simple("zero range", self.image.file(), offset, len, || {
                OpKind::ZeroRange { offset, len }
            })
            .await
    }
}
