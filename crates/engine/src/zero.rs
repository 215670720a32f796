//! Discard and write-zeroes.

use urus_format::{GuestCluster, GuestOffset, L2Entry};

use crate::chain::{LayerEntry, LayerKind};
use crate::change::Outcome;
use crate::errno::{EINVAL, EOPNOTSUPP};
use crate::error::{Error, Result};
use crate::planted::{self, Bug};
use crate::seen::{Way, note};
use crate::storage::{OpKind, Storage};
use crate::sync::Ordering;
use crate::worker::Worker;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clearing {
    /// The content does not matter any more.
    Discard,
    /// Must read as zeroes; clusters may be given back.
    Unmap,
    /// Must read as zeroes; what is allocated stays so.
    Keep,
}

impl<S: Storage> Worker<S> {
    pub(crate) async fn clear_guest(&self, offset: u64, len: u64, how: Clearing) -> Result<()> {
        self.shared.check_writable()?;
        let discard = self.shared.options.discard;
        if len == 0 || (how == Clearing::Discard && !discard) {
            return Ok(());
        }
        let how = if how == Clearing::Unmap && !discard {
            Clearing::Keep
        } else {
            how
        };
        match &self.image.layer.kind {
            LayerKind::Raw => self.clear_raw(offset, len, how).await,
            LayerKind::Qcow2(_) => self.clear_mapped(offset, len, how).await,
        }
    }

    async fn clear_raw(&self, offset: u64, len: u64, how: Clearing) -> Result<()> {
        let properties = self.files.properties(self.image.file());
        if how != Clearing::Keep && properties.can_punch {
            let punch = |offset, len| OpKind::Punch { offset, len };
            match self.clear_raw_by("punch", offset, len, punch).await {
                Err(error) if unsupported(&error) => {}
                result => return result,
            }
        }
        if how == Clearing::Discard {
            return Ok(());
        }
        if properties.can_zero_range {
            let zero = |offset, len| OpKind::ZeroRange { offset, len };
            match self.clear_raw_by("zero range", offset, len, zero).await {
                Err(error) if unsupported(&error) && !planted::is(Bug::ZeroTakenForDone) => {}
                Err(error) if unsupported(&error) => return Ok(()),
                result => return result,
            }
        }
        self.write_zeroes(offset, len).await
    }

    /// Clears a range by operations without data. O18: a smaller write that has read a block of it would bring back what it read. So where
    /// there are such writes this takes their locks, for a bounded number of ranges at a time.
    async fn clear_raw_by(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
        kind: impl Fn(u64, u64) -> OpKind<S::Memory>,
    ) -> Result<()> {
        let locked = self.image.serialize_writes.load(Ordering::SeqCst);
        let lock_bits = self.shared.options.sizes.raw_lock_bits;
        let most = self.shared.options.sizes.zero_step_clusters << lock_bits;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let step = if locked {
                (len - done).min(most)
            } else {
                len - done
            };
            let _guard = if locked && !planted::is(Bug::NoBlockLocks) {
                Some(self.lock_range(lock_bits, at, step).await)
            } else {
                None
            };
            self.files
                .simple(operation, self.image.file(), at, step, || kind(at, step))
                .await?;
            done += step;
        }
        Ok(())
    }

    /// Writes zeroes as data.
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let mut done = 0;
        let most = self.shared.options.sizes.zero_buffer_bytes;
        note(Way::ZeroBuffers, || len > most);
        while done < len {
            self.shared.check_not_cut_short()?;
            let step = (len - done).min(most);
            let zeroes = self.files.allocate(step)?;
            self.write_guest(offset + done, zeroes).await?;
            done += step;
        }
        Ok(())
    }

    async fn clear_mapped(&self, offset: u64, len: u64, how: Clearing) -> Result<()> {
        let geometry = self.image.qcow2().geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let end = offset + len;
        let first = offset.div_ceil(cluster_bytes);
        // The last cluster of the device may be partial: all of it is all there is.
        let last = if end == self.shared.size() {
            end.div_ceil(cluster_bytes)
        } else {
            end / cluster_bytes
        };
        note(Way::PartialClusterCleared, || {
            first < last && last * cluster_bytes > end
        });
        if first >= last {
            return if how == Clearing::Discard {
                Ok(())
            } else {
                self.clear_part(offset, len).await
            };
        }
        if how != Clearing::Discard {
            let head_end = first * cluster_bytes;
            self.clear_part(offset, head_end - offset).await?;
            let tail_start = last * cluster_bytes;
            self.clear_part(tail_start.min(end), end.saturating_sub(tail_start))
                .await?;
        }
        let backed = self.beneath().is_some();
        if !geometry.has_zero_flag() && (backed || how == Clearing::Keep) {
            // Version 2 cannot say "zero" over a backing file: a discard may as well not happen, zeroes are data.
            return match how {
                Clearing::Discard => Ok(()),
                Clearing::Unmap | Clearing::Keep => self.clear_as_data(first, last, end).await,
            };
        }
        self.clear_clusters(first, last, how, backed).await
    }

    /// Zeroes in part of a cluster: nothing to do where it reads so, else data.
    async fn clear_part(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 || self.reads_zero(offset, len).await? {
            return Ok(());
        }
        self.write_zeroes(offset, len).await
    }

    async fn clear_as_data(&self, first: u64, last: u64, end: u64) -> Result<()> {
        let cluster_bytes = self.image.qcow2().geometry.cluster_bytes();
        for cluster in first..last {
            let start = cluster * cluster_bytes;
            self.clear_part(start, cluster_bytes.min(end - start))
                .await?;
        }
        Ok(())
    }

    /// Whole clusters `[first, last)`.
    async fn clear_clusters(
        &self,
        first: u64,
        last: u64,
        how: Clearing,
        backed: bool,
    ) -> Result<()> {
        let image = self.image.qcow2();
        let geometry = &image.geometry;
        let mut next = first;
        while next < last {
            self.shared.check_not_cut_short()?;
            let l1_index = geometry.l1_index(GuestCluster(next));
            // Where nothing is allocated, and nothing shines through or need not be hidden, there is nothing to do.
            if image.map.l1(l1_index) == 0 && (!backed || how == Clearing::Discard) {
                next = (l1_index + 1) << geometry.l2_bits();
                continue;
            }
            let in_slice = image.map.slice_entries() - (next & (image.map.slice_entries() - 1));
            let most = self.shared.options.sizes.zero_step_clusters;
            let count = in_slice.min(last - next).min(most);
            note(Way::ZeroStep, || count == most && most < in_slice);
            self.clear_step(GuestCluster(next), count, how, backed)
                .await?;
            next += count;
        }
        Ok(())
    }

    /// Clusters of one slice: only those that change are locked and changed.
    async fn clear_step(
        &self,
        first: GuestCluster,
        count: u64,
        how: Clearing,
        backed: bool,
    ) -> Result<()> {
        let geometry = &self.image.qcow2().geometry;
        let decide = |old: L2Entry| cleared(old, how, backed, geometry.has_zero_flag());
        let mut index = 0;
        while index < count {
            let start = index;
            // The longest range of clusters that change.
            while index < count {
                let at = geometry.guest_offset(GuestCluster(first.0 + index));
                match self.layer_entry(&self.image.layer, at.0) {
                    LayerEntry::Entry(entry) if matches!(decide(entry), Outcome::Set(_)) => {
                        index += 1
                    }
                    LayerEntry::Entry(_) => break,
                    LayerEntry::Miss(slice) => self.load(&self.image.layer, slice).await?,
                    LayerEntry::Bad(error) => return Err(*error),
                }
            }
            if index > start {
                let from = GuestCluster(first.0 + start);
                let _guard = self.image.locks.lock(from, index - start).await;
                self.change(from, index - start, None, &|_, old| decide(old))
                    .await?;
            } else {
                index += 1;
            }
        }
        Ok(())
    }

    /// Makes clusters from `offset` to `end` that nothing shines through read as zeroes, past the current size (O20).
    pub(crate) async fn clear_unbacked(&self, offset: u64, end: u64) -> Result<()> {
        let cluster_bytes = self.image.qcow2().geometry.cluster_bytes();
        let (first, last) = (offset.div_ceil(cluster_bytes), end.div_ceil(cluster_bytes));
        self.clear_clusters(first, last, Clearing::Unmap, false)
            .await
    }

    /// Makes `[offset, end)` read as zeroes although it lies past the current size (O20).
    pub(crate) async fn clear_beyond_size(&self, offset: u64, end: u64) -> Result<()> {
        let len = end - offset;
        let geometry = self.image.qcow2().geometry;
        let within = geometry.in_cluster(offset);
        if within != 0 && !planted::is(Bug::PartialClusterTakenWhole) {
            let part = len.min(geometry.cluster_bytes() - within);
            let entry = self.loaded_entry(GuestOffset(offset).0).await?;
            if !matches!(
                entry,
                L2Entry::Unallocated | L2Entry::Zero | L2Entry::ZeroAllocated { .. }
            ) {
                self.write_guest(offset, self.files.allocate(part)?).await?;
            } else if matches!(entry, L2Entry::Unallocated) && self.beneath().is_some() {
                // The old last cluster shows the backing file up to the old end: it becomes data.
                self.write_guest(offset, self.files.allocate(part)?).await?;
            }
        }
        let first = offset.div_ceil(geometry.cluster_bytes());
        let last = end.div_ceil(geometry.cluster_bytes());
        if first < last {
            let backed = self.beneath().is_some();
            if geometry.has_zero_flag() || !backed {
                self.clear_clusters(first, last, Clearing::Unmap, backed)
                    .await?;
            } else {
                return Err(Error::Unsupported {
                    what: "a version 2 image cannot grow beneath a longer backing file: convert it to version 3 \
                           (qemu-img amend -o compat=1.1)"
                        .to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// The entry that clearing makes of an old one.
fn cleared(old: L2Entry, how: Clearing, backed: bool, zero_flag: bool) -> Outcome {
    let gone = if backed && zero_flag {
        L2Entry::Zero
    } else {
        L2Entry::Unallocated
    };
    match (how, old) {
        (_, L2Entry::Zero)
        | (Clearing::Discard, L2Entry::Unallocated)
        | (Clearing::Keep, L2Entry::ZeroAllocated { .. }) => Outcome::Keep,
        (_, L2Entry::Unallocated) if !backed => Outcome::Keep,
        (_, L2Entry::Unallocated) => Outcome::Set(L2Entry::Zero),
        (Clearing::Keep, L2Entry::Data { host, copied: true }) => {
            Outcome::Set(L2Entry::ZeroAllocated { host, copied: true })
        }
        (Clearing::Keep, _) => Outcome::Set(L2Entry::Zero),
        (Clearing::Discard | Clearing::Unmap, _) => Outcome::Set(gone),
    }
}

fn unsupported(error: &Error) -> bool {
    matches!(
        error,
        Error::Io {
            errno: EOPNOTSUPP | EINVAL,
            ..
        }
    )
}
