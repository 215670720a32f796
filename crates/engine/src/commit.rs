//! The one place that owns the order in which metadata reaches the disk (docs/ordering.md, "One flush").
//!
//! Seal: take everything that changed, frozen, under the `meta` lock. Then
//!
//! 0. new refcount blocks, barrier (O8); where the refcount table moves: the new table with them, then the
//!    header's one sector, barrier;
//! 1. refcounts, refcount-table entries, whole new L2 tables, barrier 1 (O1, O2, O3);
//! 2. frozen L2 slices and L1 sectors, barrier 2;
//! 3. acknowledge; what was removed goes to the settler (O4 holds from here on).
//!
//! A phase with nothing to write has no barrier of its own. A commit that fails leaves everything dirty for the next one;
//! a failed barrier poisons the device (O11).

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;

use crate::error::{Error, Result};
use crate::maintenance::Device;
use crate::map::SliceId;
use crate::planted::{self, Bug};
use crate::refcounts::FrozenSlice;
use crate::shared::{NewTable, Owner, Removed, Shared};
use crate::storage::{IMAGE, Storage};
use crate::sync::Ordering;
use crate::to_usize;
use crate::wake::{Parts, join_all};

/// Everything that one commit writes of the mapping, as it was at one moment.
struct Sealed {
    frames: BTreeMap<SliceId, u32>,
    /// Bytes of the frozen slices.
    slices: BTreeMap<SliceId, Vec<u8>>,
    new_tables: Vec<(u64, NewTable, u64)>,
    l1_indexes: BTreeSet<u64>,
    /// Sectors of the L1 table: (host offset, bytes).
    l1_sectors: Vec<(u64, Vec<u8>)>,
    used: Vec<(u64, u64)>,
    removed: Vec<Removed>,
}

impl Sealed {
    fn writes_pointers(&self) -> bool {
        !self.slices.is_empty() || !self.l1_sectors.is_empty()
    }
}

type Writes<'a> = Parts<'a, Error>;

impl<S: Storage> Device<S> {
    /// Makes everything durable whose completion was seen before the call. One at a time (O13).
    pub(crate) async fn commit(&self) -> Result<()> {
        self.shared().check_writable()?;
        if self.is_raw() {
            return self.data_barrier().await;
        }
        Shared::count(&self.shared().stats.commits, 1);
        let sealed = self.seal();
        let result = self.write_sealed(&sealed).await;
        self.unseal(sealed, result.is_ok());
        result
    }

    /// A barrier of which a failure poisons the device (O11, O17).
    pub(crate) async fn data_barrier(&self) -> Result<()> {
        let result = self.worker.barrier().await;
        if let Err(error) = &result
            && !planted::is(Bug::NoPoison)
        {
            self.shared().poisoned.store(true, Ordering::SeqCst);
            tracing::error!(
                image = self.shared().image_name(),
                "a sync failed: no more writes are taken"
            );
            if planted::is(Bug::SilentSyncFailure) {
                return Ok(());
            }
            // Not "free space and retry", whatever failed it: nothing that is tried again can succeed.
            return Err(Error::SyncFailed {
                file: self.shared().image_name().to_owned(),
                errno: match error {
                    Error::Io { errno, .. } => *errno,
                    other => other.errno(),
                },
            });
        }
        result
    }

    fn seal(&self) -> Sealed {
        let image = self.worker.image();
        let mut meta = self.shared().meta.lock();
        let frames = meta.frames[0].seal();
        let slices = frames
            .iter()
            .map(|(slice, frame)| (*slice, image.map.frame_bytes(*frame)))
            .collect();
        let table_at = |l1_index: u64| {
            self.shared()
                .l1_entry(0, l1_index)
                .ok()
                .flatten()
                .map_or(0, |entry| entry.table.0)
        };
        let new_tables = meta
            .new_tables
            .iter()
            .map(|(l1_index, new)| (*l1_index, *new, table_at(*l1_index)))
            .collect();
        let l1_indexes = std::mem::take(&mut meta.dirty_l1);
        let l1_sectors = self.freeze_l1(&l1_indexes);
        Sealed {
            frames,
            slices,
            new_tables,
            l1_indexes,
            l1_sectors,
            used: std::mem::take(&mut meta.used),
            removed: std::mem::take(&mut meta.removed),
        }
    }

    /// The sectors (or larger blocks, where the file wants them) of the L1 table that hold changed entries.
    fn freeze_l1(&self, changed: &BTreeSet<u64>) -> Vec<(u64, Vec<u8>)> {
        let image = self.worker.image();
        let (table, entries) =
            self.with_header(|header| (header.l1_table.0, u64::from(header.l1_entries)));
        let per_sector = self.sector_bytes() / 8;
        let sectors: BTreeSet<u64> = changed.iter().map(|index| index / per_sector).collect();
        sectors
            .into_iter()
            .map(|sector| {
                let first = sector * per_sector;
                let mut bytes = Vec::with_capacity(to_usize(per_sector * 8));
                for index in first..first + per_sector {
                    let entry = if index < entries {
                        image.map.l1(index)
                    } else {
                        0
                    };
                    bytes.extend_from_slice(&entry.to_be_bytes());
                }
                (table + first * 8, bytes)
            })
            .collect()
    }

    async fn write_sealed(&self, sealed: &Sealed) -> Result<()> {
        let image = self.image();
        self.reference_used(sealed).await?;
        if planted::is(Bug::EarlyPunch) {
            self.punch_early(&sealed.removed).await;
        }
        if planted::is(Bug::EarlyDecrement) {
            self.decrement_early(&sealed.removed).await?;
        }
        let blocks = image.allocator.refcounts.freeze(true);
        let result = self.write_new_blocks(&blocks).await;
        if result.is_err() {
            image.allocator.refcounts.thaw(&blocks);
            image.allocator.refcounts.commit_ended();
            return result;
        }
        let slices = image.allocator.refcounts.freeze(false);
        let result = self.write_counts_and_pointers(sealed, &slices).await;
        if result.is_err() {
            image.allocator.refcounts.thaw(&slices);
        }
        image.allocator.refcounts.commit_ended();
        result
    }

    /// Clusters that got their first reference since the last seal count from here on. What could not be counted
    /// (its refcount block does not read) is kept for the next commit.
    async fn reference_used(&self, sealed: &Sealed) -> Result<()> {
        let image = self.image();
        image
            .uncounted
            .borrow_mut()
            .extend(sealed.used.iter().copied());
        loop {
            let Some((first, count)) = image.uncounted.borrow().last().copied() else {
                return Ok(());
            };
            image.allocator.reference(&self.worker, first).await?;
            let mut uncounted = image.uncounted.borrow_mut();
            let last = uncounted.last_mut().expect("only this task takes from it");
            *last = (first + 1, count - 1);
            if count == 1 {
                uncounted.pop();
            }
        }
    }

    /// Phase 0 (O8).
    async fn write_new_blocks(&self, frozen: &[FrozenSlice]) -> Result<()> {
        let image = self.image();
        let refcounts = &image.allocator.refcounts;
        let blocks = refcounts.new_blocks();
        let next_place = image.allocator.begin_move();
        if blocks.is_empty() && next_place.is_none() {
            return Ok(());
        }
        let table = next_place.map(|place| (place, refcounts.table_bytes(place.clusters)));
        let result = async {
            let mut writes: Writes<'_> = Vec::new();
            for slice in frozen {
                writes.push(self.write_metadata(slice.offset, &slice.bytes, Owner::RefcountBlock));
            }
            if let Some((place, bytes)) = &table {
                writes.push(self.write_metadata(place.offset, bytes, Owner::RefcountTable));
            }
            join_all(writes).await?;
            if planted::is(Bug::EarlyRefcountBlock) && next_place.is_none()
                || planted::is(Bug::EarlyHeader) && next_place.is_some()
            {
                return Ok(());
            }
            self.data_barrier().await
        }
        .await;
        if let Err(error) = result {
            // No header write has named the place yet.
            if let Some(place) = next_place {
                image.allocator.move_failed(place);
            }
            return Err(error);
        }
        refcounts.blocks_written(&blocks);
        if let Some(place) = next_place {
            let switched = self
                .switch_header(|header| {
                    header.refcount_table = urus_format::HostOffset(place.offset);
                    header.refcount_table_clusters =
                        u32::try_from(place.clusters).expect("at most 8 MiB");
                })
                .await;
            if let Err(error) = switched {
                image.allocator.move_failed(place);
                return Err(error);
            }
            refcounts.entries_written(&blocks);
            for place in image.allocator.moved(place) {
                self.metadata_removed(
                    place.offset >> refcounts.geometry.cluster_bits(),
                    place.clusters,
                );
            }
        }
        Ok(())
    }

    /// Phases 1 and 2.
    async fn write_counts_and_pointers(
        &self,
        sealed: &Sealed,
        refcounts: &[FrozenSlice],
    ) -> Result<()> {
        let tables = self.compose_tables(sealed).await?;
        let late = planted::is(Bug::RefcountsAfterPointers);
        let entries = if late {
            Vec::new()
        } else {
            self.write_refcounts(refcounts).await?
        };
        let mut writes: Writes<'_> = Vec::new();
        for (offset, bytes) in &tables {
            writes.push(self.write_metadata(*offset, bytes, Owner::L2Table));
        }
        if planted::is(Bug::EarlyL1Entry) {
            writes.extend(
                sealed
                    .l1_sectors
                    .iter()
                    .map(|(o, bytes)| self.write_metadata(*o, bytes, Owner::L1Table)),
            );
        }
        join_all(writes).await?;
        // Barrier 1: the data that the entries will show, refcounts, whole tables. Without pointers to write it is
        // the flush itself.
        let idle = refcounts.is_empty() && !sealed.writes_pointers();
        if !(sealed.writes_pointers() && planted::is(Bug::NoBarrierBeforePointers)
            || idle && planted::is(Bug::NoIdleBarrier))
        {
            self.data_barrier().await?;
        }
        self.refcount_entries_durable(&entries);
        self.tables_durable(sealed);
        if sealed.writes_pointers() {
            self.write_pointers(sealed).await?;
            if !planted::is(Bug::EarlyAcknowledge) {
                self.data_barrier().await?;
            }
        }
        if late {
            let entries = self.write_refcounts(refcounts).await?;
            self.data_barrier().await?;
            self.refcount_entries_durable(&entries);
        }
        Ok(())
    }

    /// The new tables are whole on disk. Should what follows fail, their L1 entries may be there too (O15): so the next
    /// commit treats them as tables in use, and changes them behind its barrier 1 only.
    fn tables_durable(&self, sealed: &Sealed) {
        if planted::is(Bug::RewrittenTable) {
            return;
        }
        let mut meta = self.shared().meta.lock();
        for (l1_index, _, _) in &sealed.new_tables {
            meta.new_tables.remove(l1_index);
        }
    }

    fn refcount_entries_durable(&self, entries: &[u64]) {
        let image = self.image();
        image.allocator.refcounts.entries_written(entries);
    }

    /// Writes refcounts, and the table entries of blocks that are durable; returns those entries.
    async fn write_refcounts(&self, frozen: &[FrozenSlice]) -> Result<Vec<u64>> {
        let image = self.image();
        let refcounts = &image.allocator.refcounts;
        let mut writes: Writes<'_> = Vec::new();
        for slice in frozen {
            writes.push(self.write_metadata(slice.offset, &slice.bytes, Owner::RefcountBlock));
        }
        let place = image.allocator.place();
        let room = (place.clusters << refcounts.geometry.cluster_bits()) / 8;
        let new = refcounts.new_blocks();
        let mut entries = refcounts.dirty_entries();
        // O8: a block added since the seal waits for the next commit.
        entries.retain(|entry| *entry < room && !new.contains(entry));
        let per_sector = self.sector_bytes() / 8;
        let sectors: BTreeSet<u64> = entries.iter().map(|entry| entry / per_sector).collect();
        for sector in sectors {
            let mut bytes = Vec::with_capacity(to_usize(per_sector * 8));
            for entry in sector * per_sector..(sector + 1) * per_sector {
                let offset = if new.contains(&entry) {
                    0
                } else {
                    refcounts.block_offset(entry)
                };
                bytes.extend_from_slice(&offset.to_be_bytes());
            }
            let offset = place.offset + sector * per_sector * 8;
            writes.push(Box::pin(async move {
                self.write_metadata(offset, &bytes, Owner::RefcountTable)
                    .await
            }));
        }
        join_all(writes).await?;
        Ok(entries)
    }

    /// The whole content of each new L2 table: what it was copied from, overlaid with the frozen slices (O3).
    async fn compose_tables(&self, sealed: &Sealed) -> Result<Vec<(u64, Vec<u8>)>> {
        let image = self.worker.image();
        let slices_per_table = image.map.slices_per_table();
        let mut tables = Vec::with_capacity(sealed.new_tables.len());
        for (l1_index, new, offset) in &sealed.new_tables {
            let table_bytes = image.geometry.cluster_bytes();
            let mut bytes = match new.copy_from {
                Some(source) => self.worker.read_bytes(IMAGE, source, table_bytes).await?,
                None => vec![0; to_usize(table_bytes)],
            };
            let first = SliceId(l1_index * slices_per_table);
            let last = SliceId((l1_index + 1) * slices_per_table);
            for (slice, part) in sealed.slices.range(first..last) {
                let at = to_usize(image.map.offset_in_table(*slice));
                bytes[at..at + part.len()].copy_from_slice(part);
            }
            tables.push((*offset, bytes));
        }
        Ok(tables)
    }

    /// Phase 2: frozen bytes, never live memory.
    async fn write_pointers(&self, sealed: &Sealed) -> Result<()> {
        let image = self.worker.image();
        let new: BTreeSet<u64> = sealed
            .new_tables
            .iter()
            .map(|(l1_index, _, _)| *l1_index)
            .collect();
        // Neighbouring slices of one table become one write.
        let mut joined: Vec<(u64, Vec<u8>)> = Vec::new();
        for (slice, frozen) in &sealed.slices {
            let table = image.map.table_of(*slice);
            if new.contains(&table) {
                continue;
            }
            let entry = self
                .shared()
                .l1_entry(0, table)?
                .ok_or_else(|| self.lost_table(table))?;
            let offset = entry.table.0 + image.map.offset_in_table(*slice);
            let live =
                planted::is(Bug::LiveEntries).then(|| image.map.frame_bytes(sealed.frames[slice]));
            let bytes = live.as_ref().unwrap_or(frozen);
            match joined.last_mut() {
                Some((start, run)) if *start + run.len() as u64 == offset => {
                    run.extend_from_slice(bytes)
                }
                _ => joined.push((offset, bytes.clone())),
            }
        }
        let mut writes: Writes<'_> = Vec::new();
        for (offset, bytes) in &joined {
            writes.push(self.write_metadata(*offset, bytes, Owner::L2Table));
        }
        for (offset, bytes) in &sealed.l1_sectors {
            writes.push(self.write_metadata(*offset, bytes, Owner::L1Table));
        }
        join_all(writes).await
    }

    fn lost_table(&self, table: u64) -> Error {
        Error::Corrupt {
            file: self.shared().image_name().to_owned(),
            what: "a changed L2 table has no L1 entry".to_owned(),
            place: format!("L1 entry {table}"),
        }
    }

    /// Writes metadata, after the overlap check: every cluster that it touches must be known to hold what is
    /// written.
    pub(crate) fn write_metadata<'a>(
        &'a self,
        offset: u64,
        bytes: &'a [u8],
        owner: Owner,
    ) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>> {
        Box::pin(async move {
            let bits = self.worker.image().geometry.cluster_bits();
            {
                let meta = self.shared().meta.lock();
                for cluster in offset >> bits..=(offset + bytes.len() as u64 - 1) >> bits {
                    let found = meta.owners.get(&cluster).copied();
                    if found != Some(owner) {
                        return Err(Error::Corrupt {
                            file: self.shared().image_name().to_owned(),
                            what: format!(
                                "{} would be written where {} lies",
                                owner.describe(),
                                found.map_or("no metadata", Owner::describe)
                            ),
                            place: format!("host offset {offset:#x}"),
                        });
                    }
                }
            }
            self.worker.write_bytes(IMAGE, offset, bytes).await
        })
    }

    fn unseal(&self, sealed: Sealed, durable: bool) {
        let waiting = {
            let mut meta = self.shared().meta.lock();
            meta.frames[0].unseal(&sealed.frames, durable);
            if durable {
                for (l1_index, _, _) in &sealed.new_tables {
                    meta.new_tables.remove(l1_index);
                }
            } else {
                meta.dirty_l1.extend(sealed.l1_indexes.iter().copied());
                // O15: what was removed stays removed, and unsettled, until a commit that covers it is durable.
                if !planted::is(Bug::SettleAfterFailure) {
                    let newer = std::mem::replace(&mut meta.removed, sealed.removed.clone());
                    meta.removed.extend(newer);
                }
            }
            meta.frames[0].waiting_for_frame.take()
        };
        for waker in waiting {
            waker.wake();
        }
        if durable || planted::is(Bug::SettleAfterFailure) {
            self.settle_later(sealed.removed);
        }
    }
}
