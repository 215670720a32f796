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

use urus_format::{HeaderChange, HostOffset};

use crate::chain::{NewTable, Owner, Removed};
use crate::error::{Error, Result};
use crate::maintenance::Device;
use crate::map::SliceId;
use crate::planted::{self, Bug};
use crate::refcounts::FrozenSlice;
use crate::seen::{Way, note};
use crate::shared::Shared;
use crate::storage::Storage;
use crate::sync::Ordering;
use crate::to_usize;
use crate::wake::Window;

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
            self.worker.image.poisoned.store(true, Ordering::SeqCst);
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
        let image = self.worker.image.qcow2();
        let mut meta = self.worker.image.qcow2().meta.lock();
        let frames = meta.frames.seal();
        let slices = frames
            .iter()
            .map(|(slice, frame)| (*slice, image.map.frame_bytes(*frame)))
            .collect();
        let table_at = |l1_index: u64| {
            self.worker
                .image
                .layer
                .l1_entry(l1_index)
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
        let image = self.worker.image.qcow2();
        let (table, entries) =
            self.with_header(|header| (header.l1_table.0, u64::from(header.l1_entries)));
        let per_sector = self.table_unit_bytes() / 8;
        let sectors: BTreeSet<u64> = changed.iter().map(|index| index / per_sector).collect();
        note(Way::LaterL1Sector, || sectors.last() > Some(&0));
        note(Way::L1Sectors, || sectors.len() > 1);
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
                if planted::is(Bug::SecondL1SectorMisplaced) {
                    return (table, bytes);
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
            let mut writes = self.writes(refcounts.slice_bytes());
            for slice in frozen {
                writes
                    .start(self.write_metadata(slice.offset, &slice.bytes, Owner::RefcountBlock))
                    .await;
            }
            if let Some((place, bytes)) = &table {
                writes
                    .start(self.write_metadata(place.offset, bytes, Owner::RefcountTable))
                    .await;
            }
            writes.end().await?;
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
            let clusters = u32::try_from(place.clusters).expect("at most 8 MiB");
            let table = HeaderChange::RefcountTable(HostOffset(place.offset), clusters);
            let switched = self.switch_header(&[table]).await;
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
        let late = planted::is(Bug::RefcountsAfterPointers);
        let entries = if late {
            Vec::new()
        } else {
            self.write_refcounts(refcounts).await?
        };
        let mut writes = self.writes(self.worker.image.qcow2().geometry.cluster_bytes());
        for (l1_index, new, offset) in &sealed.new_tables {
            writes
                .start(self.write_new_table(sealed, *l1_index, *new, *offset))
                .await;
        }
        if planted::is(Bug::EarlyL1Entry) {
            for (offset, bytes) in &sealed.l1_sectors {
                writes
                    .start(self.write_metadata(*offset, bytes, Owner::L1Table))
                    .await;
            }
        }
        writes.end().await?;
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
        let mut meta = self.worker.image.qcow2().meta.lock();
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
        let mut writes = self.writes(refcounts.slice_bytes());
        for slice in frozen {
            writes
                .start(self.write_metadata(slice.offset, &slice.bytes, Owner::RefcountBlock))
                .await;
        }
        let place = image.allocator.place();
        let room = (place.clusters << refcounts.geometry.cluster_bits()) / 8;
        let new = refcounts.new_blocks();
        let mut entries = refcounts.dirty_entries();
        // O8: a block added since the seal waits for the next commit.
        entries.retain(|entry| *entry < room && !new.contains(entry));
        let per_sector = self.table_unit_bytes() / 8;
        let sectors: BTreeSet<u64> = entries.iter().map(|entry| entry / per_sector).collect();
        note(Way::LaterTableSector, || sectors.last() > Some(&0));
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
            writes
                .start(self.write_owned(offset, bytes, Owner::RefcountTable))
                .await;
        }
        writes.end().await?;
        Ok(entries)
    }

    /// Writes a new L2 table whole: what it was copied from, overlaid with the frozen slices (O3).
    async fn write_new_table(
        &self,
        sealed: &Sealed,
        l1_index: u64,
        new: NewTable,
        offset: u64,
    ) -> Result<()> {
        let image = self.worker.image.qcow2();
        let slices_per_table = image.map.slices_per_table();
        let table_bytes = image.geometry.cluster_bytes();
        let mut bytes = match new.copy_from {
            Some(source) => {
                self.worker
                    .files
                    .read_bytes(self.worker.image.file(), source, table_bytes)
                    .await?
            }
            None => vec![0; to_usize(table_bytes)],
        };
        let first = SliceId(l1_index * slices_per_table);
        let last = SliceId((l1_index + 1) * slices_per_table);
        for (slice, part) in sealed.slices.range(first..last) {
            let at = to_usize(image.map.offset_in_table(*slice));
            note(Way::LaterSliceOfNewTable, || {
                image.map.is_later_slice(*slice)
            });
            bytes[at..at + part.len()].copy_from_slice(part);
        }
        self.write_metadata(offset, &bytes, Owner::L2Table).await
    }

    /// Phase 2: frozen bytes, never live memory.
    async fn write_pointers(&self, sealed: &Sealed) -> Result<()> {
        let image = self.worker.image.qcow2();
        let new: BTreeSet<u64> = sealed
            .new_tables
            .iter()
            .map(|(l1_index, _, _)| *l1_index)
            .collect();
        let most_joined = image
            .geometry
            .cluster_bytes()
            .max(self.shared().options.sizes.joined_bytes);
        let mut writes = self.writes(most_joined);
        let mut failed = None;
        // Neighbouring slices become one write.
        let mut joined: Option<(u64, Vec<u8>)> = None;
        for (slice, frozen) in &sealed.slices {
            let table = image.map.table_of(*slice);
            if new.contains(&table) {
                continue;
            }
            let entry = match self.worker.image.layer.l1_entry(table) {
                Ok(Some(entry)) => entry,
                Ok(None) => {
                    failed = Some(self.lost_table(table));
                    break;
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            let mut offset = entry.table.0 + image.map.offset_in_table(*slice);
            if planted::is(Bug::ThirdSliceMisplaced) && image.map.is_later_slice(*slice) {
                offset -= image.map.slice_bytes();
            }
            let live =
                planted::is(Bug::LiveEntries).then(|| image.map.frame_bytes(sealed.frames[slice]));
            let bytes = live.as_ref().unwrap_or(frozen);
            note(Way::LaterSliceWritten, || image.map.is_later_slice(*slice));
            note(Way::GapInTable, || {
                let end = joined
                    .as_ref()
                    .map_or(0, |(start, run)| *start + run.len() as u64);
                end > entry.table.0 && end < offset
            });
            match &mut joined {
                Some((start, run))
                    if *start + run.len() as u64 == offset
                        && run.len() as u64 + bytes.len() as u64 <= most_joined =>
                {
                    note(Way::SlicesJoined, || offset > entry.table.0);
                    run.extend_from_slice(bytes);
                }
                other => {
                    if let Some((start, run)) = other.replace((offset, bytes.clone())) {
                        writes
                            .start(self.write_owned(start, run, Owner::L2Table))
                            .await;
                    }
                }
            }
        }
        if let Some((start, run)) = joined {
            writes
                .start(self.write_owned(start, run, Owner::L2Table))
                .await;
        }
        for (offset, bytes) in &sealed.l1_sectors {
            writes
                .start(self.write_metadata(*offset, bytes, Owner::L1Table))
                .await;
        }
        let result = writes.end().await;
        failed.map_or(result, Err)
    }

    /// Room for writes of at most so many bytes each, side by side.
    fn writes<'a>(&self, each: u64) -> Window<'a, Error> {
        let sizes = &self.shared().options.sizes;
        Window::new(to_usize(sizes.commit_window_bytes / each).min(sizes.parts_at_once))
    }

    async fn write_owned(&self, offset: u64, bytes: Vec<u8>, owner: Owner) -> Result<()> {
        self.write_metadata(offset, &bytes, owner).await
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
    pub(crate) async fn write_metadata(
        &self,
        offset: u64,
        bytes: &[u8],
        owner: Owner,
    ) -> Result<()> {
        let bits = self.worker.image.qcow2().geometry.cluster_bits();
        {
            let meta = self.worker.image.qcow2().meta.lock();
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
        self.worker
            .files
            .write_bytes(self.worker.image.file(), offset, bytes)
            .await
    }

    fn unseal(&self, sealed: Sealed, durable: bool) {
        {
            let mut meta = self.worker.image.qcow2().meta.lock();
            meta.frames.unseal(&sealed.frames, durable);
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
        }
        if durable || planted::is(Bug::SettleAfterFailure) {
            self.settle_later(sealed.removed);
        }
    }
}
