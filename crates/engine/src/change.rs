//! Publishing new L2 entries: the one place where the live mapping changes.
//!
//! A change becomes visible to readers at once and reaches the disk with the next commit. Everything that the
//! commit must know (first references, removed references, dirty slices) is recorded under the same lock, so
//! that a seal takes all of a change or nothing of it.

use urus_format::{GuestCluster, L1Entry, L2Entry, L2Raw};

use crate::chain::{Meta, NewTable, Owner, Qcow2Layer, Removed};
use crate::error::{Error, Result};
use crate::map::Lookup;
use crate::planted::{self, Bug};
use crate::seen::{Way, note};
use crate::shared::{Run, Shared};
use crate::storage::Storage;
use crate::to_usize;
use crate::worker::Worker;

/// What a change made of one cluster's entry.
pub(crate) enum Outcome {
    /// As it was.
    Keep,
    /// The new entry.
    Set(L2Entry),
}

impl<S: Storage> Worker<S> {
    /// Changes the entries of `count` guest clusters, all in one slice, whose locks the caller holds (O14).
    /// `decide` is asked for each with its old entry. Host clusters that get their first reference by it are in `used`.
    pub(crate) async fn change(
        &self,
        first: GuestCluster,
        count: u64,
        used: Option<Run>,
        decide: &dyn Fn(u64, L2Entry) -> Outcome,
    ) -> Result<()> {
        let mut table_cluster: Option<Run> = None;
        let result = self
            .change_with(first, count, used, decide, &mut table_cluster)
            .await;
        if let Some(unused) = table_cluster {
            self.put_back(unused);
        }
        result
    }

    async fn change_with(
        &self,
        first: GuestCluster,
        count: u64,
        used: Option<Run>,
        decide: &dyn Fn(u64, L2Entry) -> Outcome,
        table_cluster: &mut Option<Run>,
    ) -> Result<()> {
        let image = self.image.qcow2();
        let slice = image.map.slice_of(first);
        let table = image.map.table_of(slice);
        debug_assert_eq!(slice, image.map.slice_of(GuestCluster(first.0 + count - 1)));
        loop {
            self.shared.check_writable()?;
            let entry = self.image.layer.l1_entry(table)?;
            if entry.is_none_or(|entry| !entry.copied) && table_cluster.is_none() {
                let cluster = self.take_clusters(1).await?;
                *table_cluster = Some(cluster);
                let bits = image.geometry.cluster_bits();
                self.take_room(cluster.first << bits, 1 << bits).await?;
                continue;
            }
            let mut missing_frame = false;
            {
                let mut meta = self.image.qcow2().meta.lock();
                if self
                    .image
                    .layer
                    .l1_entry(table)?
                    .is_none_or(|entry| !entry.copied)
                {
                    let Some(cluster) = table_cluster.take() else {
                        continue;
                    };
                    self.install_table(&mut meta, table, cluster);
                }
                if let Some(frame) = self.frame_for(&mut meta, slice, &mut missing_frame) {
                    self.apply(&mut meta, frame, first, count, used, decide)?;
                    self.ask_for_commit(&meta);
                    return Ok(());
                }
            }
            if missing_frame {
                note(Way::NoFrame, || true);
                self.shared
                    .request_flush()
                    .receive()
                    .await
                    .unwrap_or(Err(Error::Closed))?;
            } else {
                self.load(&self.image.layer, slice).await?;
            }
        }
    }

    /// The frame of a slice that is to change, where it can be had without reading.
    fn frame_for(
        &self,
        meta: &mut Meta,
        slice: crate::map::SliceId,
        missing_frame: &mut bool,
    ) -> Option<u32> {
        let map = &self.image.qcow2().map;
        if !meta.frames.may_dirty(slice)
            || meta.pending_changes() >= self.shared.options.sizes.pending_changes
        {
            *missing_frame = true;
            return None;
        }
        if let Some(frame) = map.frame_of(slice) {
            return Some(frame);
        }
        let new = meta.new_tables.get(&map.table_of(slice))?;
        if new.copy_from.is_some() {
            return None;
        }
        // A table without a predecessor: the slice is all zeroes, and nothing of it is on disk yet.
        let zeroes = vec![0; to_usize(map.slice_bytes() / 8)];
        let frame = meta.frames.install(map, slice, &zeroes).ok();
        *missing_frame = frame.is_none();
        frame
    }

    /// Gives an L1 entry a table of its own: new, or in place of one that a snapshot shares.
    fn install_table(&self, meta: &mut Meta, table: u64, cluster: Run) {
        let image = self.image.qcow2();
        let old = self.image.layer.l1_entry(table).ok().flatten();
        let host = image
            .geometry
            .host_offset(urus_format::ClusterIndex(cluster.first));
        image.map.set_l1(
            table,
            L1Entry {
                table: host,
                copied: true,
            }
            .encode(),
        );
        meta.owners.insert(cluster.first, Owner::L2Table);
        meta.new_tables.insert(
            table,
            NewTable {
                copy_from: old.map(|entry| entry.table.0),
            },
        );
        meta.dirty_l1.insert(table);
        if !planted::is(Bug::UncountedTable) {
            meta.used.push((cluster.first, 1));
        }
        Shared::count(&self.shared.stats.allocated_clusters, 1);
        if let Some(old) = old {
            let first = image.geometry.host_cluster(old.table).0;
            if planted::is(Bug::EarlyTableRelease) {
                self.shared.give_back(Run {
                    first,
                    count: 1,
                    zero: false,
                });
            }
            meta.owners.remove(&first);
            let mark = self.shared.pins.mark();
            meta.removed.push(Removed {
                first,
                count: 1,
                mark,
            });
        }
    }

    fn apply(
        &self,
        meta: &mut Meta,
        frame: u32,
        first: GuestCluster,
        count: u64,
        used: Option<Run>,
        decide: &dyn Fn(u64, L2Entry) -> Outcome,
    ) -> Result<()> {
        let image = self.image.qcow2();
        // Everything is judged before anything is stored: a change happens whole or not at all.
        let mut changes = Vec::new();
        for index in 0..count {
            let cluster = GuestCluster(first.0 + index);
            let Lookup::Entry(raw) = image.map.lookup(cluster) else {
                unreachable!("the slice is in a frame, and frames change hands under this lock")
            };
            let old = L2Entry::decode(raw, &image.geometry).map_err(|entry| Error::BadEntry {
                file: self.shared.image_name().to_owned(),
                table: "L2 entry of guest cluster",
                index: cluster.0,
                entry,
            })?;
            if let Outcome::Set(new) = decide(index, old) {
                changes.push((cluster, old, new));
            }
        }
        let mut removed = Vec::new();
        for (cluster, old, new) in &changes {
            let raw: L2Raw = new.encode(&image.geometry);
            image.map.store(frame, *cluster, raw);
            removed.extend(references_lost(*old, *new, image));
        }
        let dirty = !changes.is_empty();
        if dirty {
            meta.frames.mark_dirty(image.map.slice_of(first), frame);
        }
        if let Some(run) = used {
            meta.used.push((run.first, run.count));
            Shared::count(&self.shared.stats.allocated_clusters, run.count);
        }
        if !removed.is_empty() {
            // O7: taken after the entries were stored, so that whoever begins after the mark sees them.
            let mark = self.shared.pins.mark();
            for (first, count) in removed {
                if planted::is(Bug::EarlyReuse) {
                    self.shared.give_back(Run {
                        first,
                        count,
                        zero: false,
                    });
                }
                Removed { first, count, mark }.add_to(&mut meta.removed);
            }
        }
        Ok(())
    }

    fn ask_for_commit(&self, meta: &Meta) {
        let sizes = &self.shared.options.sizes;
        let many_dirty = meta.frames.wants_commit();
        let many_freed = meta.removed.len() >= sizes.pending_frees;
        let many_changes = meta.pending_changes() >= sizes.pending_changes / 4;
        note(Way::ManyDirty, || many_dirty);
        note(Way::ManyFreed, || many_freed);
        note(Way::ManyChanges, || many_changes);
        if many_dirty || many_freed || many_changes {
            self.shared.request_commit();
        }
    }
}

/// Host clusters that lose a reference when `new` takes the place of `old`: (first, count).
fn references_lost(old: L2Entry, new: L2Entry, image: &Qcow2Layer) -> Option<(u64, u64)> {
    let host_of = |entry| match entry {
        L2Entry::Data { host, .. } | L2Entry::ZeroAllocated { host, .. } => Some(host),
        _ => None,
    };
    match old {
        L2Entry::Unallocated | L2Entry::Zero => None,
        L2Entry::Data { host, .. } | L2Entry::ZeroAllocated { host, .. } => {
            (host_of(new) != Some(host)).then(|| (image.geometry.host_cluster(host).0, 1))
        }
        L2Entry::Compressed(extent) => {
            let first = extent.offset.0 >> image.geometry.cluster_bits();
            let last = (extent.offset.0 + extent.bytes - 1) >> image.geometry.cluster_bits();
            Some((first, last - first + 1))
        }
    }
}
