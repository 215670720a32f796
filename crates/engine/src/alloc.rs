//! Allocation of host clusters. Owned by the maintenance executor; queues reserve runs by mail.
//!
//! A cluster is *free* (refcount 0), *reserved* (handed to a queue: nothing on disk or in the refcounts says so yet) or
//! *referenced*. Free space is found by a scan of the refcounts with a cursor; the file grows only when a step of
//! the scan finds nothing.

use std::cell::{Cell, RefCell};

use urus_format::Geometry;

use crate::chain::{Owner, Owners};
use crate::error::{Error, Result};
use crate::limits;
use crate::ranges::RangeSet;
use crate::refcounts::Refcounts;
use crate::seen::{Way, note};
use crate::shared::{Run, Shared};
use crate::storage::{OpKind, Storage};
use crate::worker::Worker;

/// Where a refcount table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TablePlace {
    pub(crate) offset: u64,
    pub(crate) clusters: u64,
}

/// Refcount blocks that are missing, one after the other from cluster `start` on, and behind them the new place of the refcount table, where
/// it has to move.
#[derive(Clone, Copy)]
struct Addition {
    start: u64,
    blocks: u64,
    table: u64,
}

/// The allocator's state.
pub(crate) struct Allocator {
    pub(crate) refcounts: Refcounts,
    reserved: RefCell<RangeSet>,
    /// Reserved runs that came back unused.
    recycled: RefCell<Vec<Run>>,
    /// Free clusters known to read as zeroes: punched, and not handed out since.
    zero: RefCell<RangeSet>,
    /// Every cluster from here on lies past the end of the file and was never handed out.
    virgin: Cell<u64>,
    cursor: Cell<u64>,
    /// Clusters from here on are found by extension.
    end: Cell<u64>,
    /// The file is as long as this, or no longer growth is tried below it.
    grown: Cell<u64>,
    /// The file's length when it was opened.
    opened_bytes: u64,
    /// Refcount blocks that have their room on the disk.
    roomy: RefCell<RangeSet>,
    /// Where the refcount table lies on disk.
    place: Cell<TablePlace>,
    /// Where it is to move, as no commit has begun yet.
    next_place: Cell<Option<TablePlace>>,
    /// Clusters of its newest place, on disk or not.
    table_clusters: Cell<u64>,
    /// Places that a header write ever named, or might have (O15): free after the next durable header.
    superseded: RefCell<Vec<TablePlace>>,
    regular: bool,
    /// The file has room for clusters below this one. A block device ends; it may become longer.
    limit: Cell<u64>,
}

impl Allocator {
    pub(crate) fn new(
        refcounts: Refcounts,
        place: TablePlace,
        file_bytes: u64,
        regular: bool,
    ) -> Self {
        let bits = refcounts.geometry.cluster_bits();
        let file_end = file_bytes.div_ceil(1 << bits);
        // Entries hold host offsets below 2^56.
        let limit = if regular {
            1 << (56 - bits)
        } else {
            file_bytes >> bits
        };
        let end = file_end.min(refcounts.covered_end()).min(limit);
        Self {
            refcounts,
            reserved: RefCell::default(),
            recycled: RefCell::default(),
            zero: RefCell::default(),
            virgin: Cell::new(if regular { file_end } else { u64::MAX }),
            cursor: Cell::new(0),
            end: Cell::new(end),
            grown: Cell::new(file_end),
            opened_bytes: file_bytes,
            roomy: RefCell::default(),
            place: Cell::new(place),
            next_place: Cell::new(None),
            table_clusters: Cell::new(place.clusters),
            superseded: RefCell::default(),
            regular,
            limit: Cell::new(limit),
        }
    }

    /// Where the refcount table lies on disk.
    pub(crate) fn place(&self) -> TablePlace {
        self.place.get()
    }

    /// A commit begins to move the table, if it is to move.
    pub(crate) fn begin_move(&self) -> Option<TablePlace> {
        self.next_place.take()
    }

    /// The move may have reached the disk or not: the place is neither free nor in use.
    pub(crate) fn move_failed(&self, place: TablePlace) {
        if self.next_place.get().is_none() {
            self.next_place.set(Some(place));
        } else {
            self.superseded.borrow_mut().push(place);
        }
    }

    /// The header names the new place durably: those before it, which come back, are free (O8).
    pub(crate) fn moved(&self, place: TablePlace) -> Vec<TablePlace> {
        let old = self.place.replace(place);
        self.superseded.borrow_mut().push(old);
        std::mem::take(&mut *self.superseded.borrow_mut())
    }

    /// A run that was never referenced comes back. What it holds is unknown: a write of it may have failed.
    pub(crate) fn give_back(&self, run: Run) {
        self.recycled.borrow_mut().push(Run { zero: false, ..run });
    }

    /// Reserved clusters got their first reference.
    pub(crate) async fn reference<S: Storage>(
        &self,
        worker: &Worker<S>,
        cluster: u64,
    ) -> Result<()> {
        let refcount = self.refcounts.load(worker, cluster).await?;
        self.refcounts.set(cluster, refcount + 1);
        self.reserved.borrow_mut().remove(cluster, 1);
        Ok(())
    }

    /// Free clusters whose last reference is gone durably (O4), that nothing in flight uses (O7), and that
    /// were punched (O5) or not.
    pub(crate) fn released(&self, first: u64, count: u64, punched: bool) {
        if punched && self.regular {
            self.zero.borrow_mut().insert(first, count);
        }
        self.cursor.set(self.cursor.get().min(first));
    }

    /// Reserves up to `count` adjacent clusters, one at least.
    pub(crate) async fn reserve<S: Storage>(&self, worker: &Worker<S>, count: u64) -> Result<Run> {
        if let Some(run) = self.take_recycled(count) {
            return Ok(run);
        }
        if let Some(run) = self.scan(worker, count).await? {
            return Ok(run);
        }
        let run = self.extend(worker, count).await?;
        self.grow_ahead(worker).await;
        Ok(run)
    }

    fn take_recycled(&self, count: u64) -> Option<Run> {
        let mut recycled = self.recycled.borrow_mut();
        let run = recycled.last_mut()?;
        let taken = Run {
            count: count.min(run.count),
            ..*run
        };
        run.first += taken.count;
        run.count -= taken.count;
        if run.count == 0 {
            recycled.pop();
        }
        Some(taken)
    }

    /// One bounded step of the search for free clusters.
    async fn scan<S: Storage>(&self, worker: &Worker<S>, count: u64) -> Result<Option<Run>> {
        let mut slices = 0;
        let most = worker.shared.options.sizes.scan_slices;
        while self.cursor.get() < self.end.get() && slices < most {
            let start = self.cursor.get();
            let block = self.refcounts.block_of(start);
            if self.refcounts.block_offset(block) == 0 {
                // Nothing covers it; it stays a hole until a repair.
                self.cursor
                    .set((block + 1) << self.refcounts.geometry.refcount_block_bits());
                continue;
            }
            slices += u64::from(self.refcounts.get(start).is_none());
            self.refcounts.load(worker, start).await?;
            self.room_to_count(worker, block).await?;
            // Another reservation may have gone on meanwhile; or the slice is gone again, and says of nothing that it is free.
            if self.cursor.get() != start || self.refcounts.get(start).is_none() {
                continue;
            }
            let slice_end = self.refcounts.slice_end(start).min(self.end.get());
            let owners = &worker.image.qcow2().meta.lock().owners;
            let Some(first) = (start..slice_end).find(|cluster| self.is_free(owners, *cluster))
            else {
                self.cursor.set(slice_end);
                continue;
            };
            let zero = self.is_zero(first);
            let last = (first..slice_end.min(first + count))
                .take_while(|cluster| {
                    self.is_free(owners, *cluster) && self.is_zero(*cluster) == zero
                })
                .count() as u64;
            self.cursor.set(first + last);
            return Ok(Some(self.hand_out(first, last, zero)));
        }
        note(Way::SearchEnded, || self.cursor.get() < self.end.get());
        Ok(None)
    }

    /// Free, as far as the cached refcounts say. Metadata never is, whatever a damaged image counts for it.
    fn is_free(&self, owners: &Owners, cluster: u64) -> bool {
        cluster != 0
            && self.refcounts.get(cluster) == Some(0)
            && !self.reserved.borrow().contains(cluster)
            && !owners.contains_key(&cluster)
    }

    fn is_zero(&self, cluster: u64) -> bool {
        cluster >= self.virgin.get() || self.zero.borrow().contains(cluster)
    }

    fn hand_out(&self, first: u64, count: u64, zero: bool) -> Run {
        self.reserved.borrow_mut().insert(first, count);
        self.zero.borrow_mut().remove(first, count);
        if self.regular {
            self.virgin.set(self.virgin.get().max(first + count));
        }
        Run { first, count, zero }
    }

    /// Takes clusters past everything in use, up to the end of a refcount block.
    async fn extend<S: Storage>(&self, worker: &Worker<S>, count: u64) -> Result<Run> {
        loop {
            let first = self.end.get();
            if first >= self.limit.get() && !self.has_become_longer(worker) {
                return Err(self.out_of_space(&worker.shared, first));
            }
            let block = self.refcounts.block_of(first);
            if self.refcounts.block_offset(block) == 0 {
                self.add_block(worker, block).await?;
                continue;
            }
            self.refcounts.load(worker, first).await?;
            self.room_to_count(worker, block).await?;
            if self.end.get() != first || self.refcounts.get(first).is_none() {
                continue;
            }
            let owners = &worker.image.qcow2().meta.lock().owners;
            if !self.is_free(owners, first) {
                self.end.set(first + 1);
                continue;
            }
            let zero = first >= self.virgin.get();
            let slice_end = self.refcounts.slice_end(first).min(self.limit.get());
            let taken = (first..slice_end.min(first + count))
                .take_while(|cluster| {
                    self.is_free(owners, *cluster) && (*cluster >= self.virgin.get()) == zero
                })
                .count() as u64;
            self.end.set(first + taken);
            return Ok(self.hand_out(first, taken, zero));
        }
    }

    fn out_of_space(&self, shared: &Shared, cluster: u64) -> Error {
        Error::OutOfSpace {
            operation: "allocate a cluster",
            file: shared.image_name().to_owned(),
            offset: cluster << self.refcounts.geometry.cluster_bits(),
        }
    }

    /// Whether the block device has room past the end that was known.
    fn has_become_longer<S: Storage>(&self, worker: &Worker<S>) -> bool {
        if self.regular {
            return false;
        }
        let bits = self.refcounts.geometry.cluster_bits();
        let len = worker
            .reactor()
            .with_storage(|storage| storage.file_len(worker.image.file()));
        // A device that has shrunk fails where it is used.
        let limit = len.map_or(0, |len| len >> bits);
        let longer = limit > self.limit.get();
        if longer {
            self.limit.set(limit);
        }
        longer
    }

    /// Takes room for a refcount block, which may be a hole: what it counts from now on is written by a commit.
    async fn room_to_count<S: Storage>(&self, worker: &Worker<S>, block: u64) -> Result<()> {
        if self.roomy.borrow().contains(block) {
            return Ok(());
        }
        let offset = self.refcounts.block_offset(block);
        let bytes = self.refcounts.geometry.cluster_bytes();
        worker.take_room(offset, bytes).await?;
        self.roomy.borrow_mut().insert(block, 1);
        Ok(())
    }

    /// Lengthens the file ahead of the clusters taken at its end, in steps. Writes past the end of a file wait for one another
    /// (those with O_DIRECT for their whole time), and each would change the file's length. What is added reads as zeroes, as what lies
    /// past the end does, so it may be there after a power cut or not. A file system that cannot do it, or is full, goes without.
    async fn grow_ahead<S: Storage>(&self, worker: &Worker<S>) {
        let bits = self.refcounts.geometry.cluster_bits();
        let end = self.end.get();
        if !self.regular || end <= self.grown.get() {
            return;
        }
        let sizes = &worker.shared.options.sizes;
        let step = ((end << bits) / limits::GROW_PART)
            .clamp(sizes.grow_bytes_min, sizes.grow_bytes_max)
            .div_ceil(1 << bits);
        // Before it has grown: a failure counts until this much is used up, too.
        self.grown.set(end + step);
        let result = worker.allocate(end << bits, step << bits).await;
        if let Err(error) = result {
            tracing::debug!(image = worker.shared.image_name(), %error, "the file is not lengthened ahead");
        }
    }

    /// Gives back what [`grow_ahead`](Self::grow_ahead) added and nobody took. Nothing is in flight, and everything is
    /// committed: so nothing refers to what goes.
    pub(crate) async fn give_slack_back<S: Storage>(&self, worker: &Worker<S>) {
        if self.grown.get() <= self.end.get() {
            return;
        }
        let bits = self.refcounts.geometry.cluster_bits();
        let mut used = self.end.get();
        {
            // Runs that nothing was written into; whoever still has one finds zeroes there, as before.
            let owners = &worker.image.qcow2().meta.lock().owners;
            let unused =
                |cluster| self.refcounts.get(cluster) == Some(0) && !owners.contains_key(&cluster);
            while used > 0 && unused(used - 1) {
                used -= 1;
            }
        }
        // What was there when the file was opened is not ours to cut, used or not.
        let used = (used << bits).max(self.opened_bytes);
        let len = worker
            .reactor()
            .with_storage(|storage| storage.file_len(worker.image.file()));
        self.grown.set(self.end.get());
        if !len.is_ok_and(|len| len > used) {
            return;
        }
        let result = worker
            .files
            .simple("shorten", worker.image.file(), used, 0, || OpKind::SetLen {
                len: used,
            })
            .await;
        if let Err(error) = result {
            tracing::debug!(image = worker.shared.image_name(), %error, "the file stays longer than it need be");
        }
    }

    /// Takes exactly `count` adjacent clusters. In a file they lie past everything in use; a block device, which mostly
    /// is covered by refcounts to its end, is searched for them first.
    pub(crate) async fn take_contiguous<S: Storage>(
        &self,
        worker: &Worker<S>,
        count: u64,
    ) -> Result<u64> {
        if !self.regular
            && let Some(first) = self.find_contiguous(worker, count).await?
        {
            return Ok(first);
        }
        self.extend_contiguous(worker, count).await
    }

    /// Looks for adjacent free clusters among all those that refcount blocks cover. What is found of a run is reserved at
    /// once, and let go where the run ends too early.
    async fn find_contiguous<S: Storage>(
        &self,
        worker: &Worker<S>,
        count: u64,
    ) -> Result<Option<u64>> {
        let mut next = 0;
        let mut run = (0, 0);
        let result = loop {
            if run.1 == count {
                return Ok(Some(run.0));
            }
            let end = self.end.get();
            if next >= end {
                break Ok(None);
            }
            let block = self.refcounts.block_of(next);
            if self.refcounts.block_offset(block) == 0 {
                next = (block + 1) << self.refcounts.geometry.refcount_block_bits();
                self.unreserve(std::mem::take(&mut run));
                continue;
            }
            if let Err(error) = self.refcounts.load(worker, next).await {
                break Err(error);
            }
            if let Err(error) = self.room_to_count(worker, block).await {
                break Err(error);
            }
            if self.refcounts.get(next).is_none() {
                // Gone again meanwhile: it says of nothing that it is free.
                continue;
            }
            let owners = &worker.image.qcow2().meta.lock().owners;
            let slice_end = self.refcounts.slice_end(next).min(end);
            while next < slice_end && run.1 < count {
                if self.is_free(owners, next) {
                    if run.1 == 0 {
                        run.0 = next;
                    }
                    self.hand_out(next, 1, false);
                    run.1 += 1;
                } else {
                    self.unreserve(std::mem::take(&mut run));
                }
                next += 1;
            }
        };
        self.unreserve(run);
        result
    }

    /// Lets go of clusters that were reserved, and that nobody wrote to.
    fn unreserve(&self, (first, count): (u64, u64)) {
        if count > 0 {
            self.reserved.borrow_mut().remove(first, count);
            self.cursor.set(self.cursor.get().min(first));
        }
    }

    async fn extend_contiguous<S: Storage>(&self, worker: &Worker<S>, count: u64) -> Result<u64> {
        let mut run: Option<(u64, u64)> = None;
        let mut restarts = 0;
        loop {
            // Each new refcount block takes a cluster for itself: a run longer than what one covers never comes.
            if restarts > limits::RUN_RESTARTS {
                return Err(Error::Unsupported {
                    what: format!(
                        "{} cannot grow so far: its L1 table would need {count} adjacent clusters; use larger clusters",
                        worker.shared.image_name()
                    ),
                });
            }
            let give_back = |first, count| {
                self.give_back(Run {
                    first,
                    count,
                    zero: false,
                });
            };
            let part = match self.extend(worker, count - run.map_or(0, |(_, n)| n)).await {
                Ok(part) => part,
                Err(error) => {
                    if let Some((first, n)) = run {
                        give_back(first, n);
                    }
                    return Err(error);
                }
            };
            run = match run {
                Some((first, n)) if first + n == part.first => Some((first, n + part.count)),
                other => {
                    if let Some((first, n)) = other {
                        restarts += 1;
                        give_back(first, n);
                    }
                    Some((part.first, part.count))
                }
            };
            let (first, n) = run.expect("set above");
            if n == count {
                return Ok(first);
            }
        }
    }

    /// Adds the refcount block that is missing at the end. Nothing is added where another reservation has gone on meanwhile: the caller
    /// looks again.
    async fn add_block<S: Storage>(&self, worker: &Worker<S>, block: u64) -> Result<()> {
        let plan = self.plan_block(&worker.shared, block)?;
        let bits = self.refcounts.geometry.cluster_bits();
        let clusters = plan.blocks + plan.table;
        worker
            .take_room(plan.start << bits, clusters << bits)
            .await?;
        // A table that is to move, or just moves, has its room.
        let place = self.place.get();
        if plan.table == 0 && self.table_clusters.get() == place.clusters {
            worker.take_room(place.offset + block * 8, 8).await?;
        }
        if self.end.get() == plan.start && self.refcounts.block_offset(block) == 0 {
            self.place_block(&worker.shared, block, plan);
        }
        Ok(())
    }

    /// What to add so that there is this block: it lies at the first cluster it covers that is free, so it counts itself (O8). Where the
    /// table has no room for its entry, a new, larger one follows, and the blocks that cover that.
    fn plan_block(&self, shared: &Shared, block: u64) -> Result<Addition> {
        let geometry = self.refcounts.geometry;
        let start = self.end.get();
        let entries = self.table_clusters.get() << geometry.cluster_bits() >> 3;
        let (blocks, table) = if block < entries {
            (1, 0)
        } else {
            let wanted = self.refcounts.table_entries() * 3 / 2;
            new_table(&geometry, start, block, wanted)
        };
        if start + blocks + table > self.limit.get() && !self.regular {
            return Err(self.out_of_space(shared, start));
        }
        if table > 0
            && (table << geometry.cluster_bits() > limits::REFCOUNT_TABLE_BYTES
                || start + blocks + table > self.limit.get())
        {
            return Err(Error::Unsupported {
                what: format!(
                    "{} cannot grow: its refcount table would pass {} MiB; use larger clusters",
                    shared.image_name(),
                    limits::REFCOUNT_TABLE_BYTES >> 20
                ),
            });
        }
        // No refcount block covers these, so nothing should be there.
        let owners = &shared.image.qcow2().meta.lock().owners;
        let owned = (start..start + blocks + table)
            .find_map(|cluster| Some((cluster, owners.get(&cluster)?)));
        if let Some((cluster, owner)) = owned {
            return Err(Error::Corrupt {
                file: shared.image_name().to_owned(),
                what: format!("no refcount block covers {}", owner.describe()),
                place: format!("host cluster {cluster}"),
            });
        }
        Ok(Addition {
            start,
            blocks,
            table,
        })
    }

    /// Adds what was planned.
    fn place_block(&self, shared: &Shared, block: u64, plan: Addition) {
        let Addition {
            start,
            blocks,
            table,
        } = plan;
        let bits = self.refcounts.geometry.cluster_bits();
        for index in 0..blocks {
            self.refcounts
                .add_block(block + index, (start + index) << bits);
        }
        for index in 0..blocks {
            self.claim(shared, start + index, Owner::RefcountBlock);
        }
        for index in 0..table {
            self.claim(shared, start + blocks + index, Owner::RefcountTable);
        }
        self.end.set(start + blocks + table);
        self.roomy.borrow_mut().insert(block, blocks);
        if table == 0 {
            return;
        }
        if let Some(abandoned) = self.next_place.get() {
            // Chosen before, and no header write ever named it.
            self.superseded.borrow_mut().push(abandoned);
        }
        self.next_place.set(Some(TablePlace {
            offset: (start + blocks) << bits,
            clusters: table,
        }));
        self.table_clusters.set(table);
    }

    /// Takes a cluster of the end for metadata, with refcount 1.
    fn claim(&self, shared: &Shared, cluster: u64, owner: Owner) {
        if self
            .refcounts
            .block_offset(self.refcounts.block_of(cluster))
            != 0
        {
            self.refcounts.set(cluster, 1);
        }
        if self.regular {
            self.virgin.set(self.virgin.get().max(cluster + 1));
        }
        shared
            .image
            .qcow2()
            .meta
            .lock()
            .owners
            .insert(cluster, owner);
        Shared::count(&shared.stats.allocated_clusters, 1);
    }
}

/// Refcount blocks, from `block` on, that cover themselves and a table behind them, all from cluster `start` of that block on; and
/// clusters of that table, which has room for `wanted` entries and for those blocks.
fn new_table(geometry: &Geometry, start: u64, block: u64, wanted: u64) -> (u64, u64) {
    // Grows to a fixpoint.
    let (mut blocks, mut table) = (1, 1);
    loop {
        let last_block = (start + blocks + table - 1) >> geometry.refcount_block_bits();
        let need_blocks = last_block + 1 - block;
        let need_table = geometry.clusters_for(wanted.max(block + blocks) * 8);
        if need_table <= table && need_blocks <= blocks {
            return (blocks, table);
        }
        table = table.max(need_table);
        blocks = blocks.max(need_blocks);
    }
}

#[cfg(test)]
mod tests {
    //! Guards against clusters that are two things at once, and against a refcount table whose blocks do not count what they have to.

    use super::*;
    use crate::chain::{Layer, LayerId, LayerKind, Meta, Qcow2Layer};
    use crate::map::Map;
    use crate::open::share;
    use crate::shared::Options;
    use crate::storage::FileId;
    use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
    use crate::to_usize;

    const BITS: u32 = 9;

    /// 64-bit refcounts in clusters of 512 bytes: a block has those of 64 clusters. Two blocks, in clusters 2 and 3.
    fn allocator(file_bytes: u64, regular: bool) -> Allocator {
        let geometry = Geometry::new(BITS, 6, 8, 3);
        let refcounts = Refcounts::new(geometry, Vec::new(), 8, limits::REFCOUNT_SLICE_BYTES);
        refcounts.add_block(0, 2 << BITS);
        refcounts.add_block(1, 3 << BITS);
        Allocator::new(refcounts, place(1), file_bytes, regular)
    }

    fn place(cluster: u64) -> TablePlace {
        TablePlace {
            offset: cluster << BITS,
            clusters: 1,
        }
    }

    fn parts(run: Run) -> (u64, u64, bool) {
        (run.first, run.count, run.zero)
    }

    #[test]
    fn what_comes_back_unused_is_handed_out_piece_by_piece() {
        let allocator = allocator(10 << BITS, true);
        assert!(allocator.take_recycled(1).is_none());
        let run = allocator.hand_out(20, 5, true);
        assert_eq!(parts(run), (20, 5, true));
        allocator.give_back(run);
        let taken: Vec<_> = [2, 1, 9, 1]
            .into_iter()
            .map_while(|count| allocator.take_recycled(count))
            .map(parts)
            .collect();
        // A write of it may have failed halfway: it is not taken for zero.
        assert_eq!(taken, [(20, 2, false), (22, 1, false), (23, 2, false)]);
    }

    #[test]
    fn only_what_nothing_is_known_of_is_free() {
        let allocator = allocator(10 << BITS, true);
        let mut owners = Owners::default();
        owners.insert(5, Owner::L2Table);
        allocator.refcounts.set(6, 1);
        allocator.hand_out(7, 2, false);
        let free = |owners: &Owners| -> Vec<u64> {
            (0..11)
                .filter(|cluster| allocator.is_free(owners, *cluster))
                .collect()
        };
        // The header's cluster never is.
        assert_eq!(free(&owners), [1, 2, 3, 4, 9, 10]);
        owners.remove(&5);
        allocator.refcounts.set(6, 0);
        assert_eq!(free(&owners), [1, 2, 3, 4, 5, 6, 9, 10]);
    }

    /// Zero is what was punched or lies past the end of the file, until it is handed out.
    #[test]
    fn what_is_known_to_be_zero() {
        let zero = |allocator: &Allocator| -> Vec<u64> {
            (0..14)
                .filter(|cluster| allocator.is_zero(*cluster))
                .collect()
        };
        let file = allocator((10 << BITS) - 1, true);
        assert_eq!(zero(&file), [10, 11, 12, 13]);
        file.released(3, 2, true);
        file.released(6, 1, false);
        assert_eq!(zero(&file), [3, 4, 10, 11, 12, 13]);
        file.hand_out(4, 1, true);
        file.hand_out(10, 2, true);
        assert_eq!(zero(&file), [3, 12, 13]);
        // A device that punches holes keeps what was there, or not.
        let device = allocator(10 << BITS, false);
        device.released(3, 2, true);
        assert!(zero(&device).is_empty());
        device.hand_out(4, 1, false);
        assert!(zero(&device).is_empty());
    }

    #[test]
    fn the_file_has_an_end() {
        let file = allocator(10 << BITS, true);
        assert_eq!((file.end.get(), file.limit.get()), (10, 1 << 47));
        // What no block covers is found by extension.
        assert_eq!(allocator(200 << BITS, true).end.get(), 128);
        let device = allocator((200 << BITS) + 511, false);
        assert_eq!((device.end.get(), device.limit.get()), (128, 200));
        // A device's last cluster may not be whole: it is none.
        let device = self::allocator((100 << BITS) + 511, false);
        assert_eq!((device.end.get(), device.limit.get()), (100, 100));
    }

    /// A move that failed is tried again, at the place chosen since where there is one.
    #[test]
    fn a_table_that_moves_keeps_its_places_apart() {
        let allocator = allocator(10 << BITS, true);
        assert_eq!(allocator.place(), place(1));
        assert_eq!(allocator.begin_move(), None);
        allocator.move_failed(place(5));
        assert!(allocator.superseded.borrow().is_empty());
        assert_eq!(allocator.begin_move(), Some(place(5)));
        assert_eq!(allocator.begin_move(), None);
        allocator.next_place.set(Some(place(7)));
        allocator.move_failed(place(5));
        assert_eq!(allocator.begin_move(), Some(place(7)));
        assert_eq!(*allocator.superseded.borrow(), [place(5)]);
    }

    fn allocated(shared: &Shared) -> u64 {
        shared.stats.allocated_clusters.load(Ordering::SeqCst)
    }

    fn shared() -> Arc<Shared> {
        let geometry = Geometry::new(BITS, 6, 8, 3);
        let layer = Layer {
            id: LayerId(0),
            file: FileId(0),
            name: "disk".into(),
            size: AtomicU64::new(0),
            kind: LayerKind::Qcow2(Qcow2Layer {
                geometry,
                compression: urus_format::Compression::Deflate,
                map: Map::new(geometry, (1, 1), 1, &limits::Sizes::default()),
                meta: Mutex::new(Meta::default()),
            }),
        };
        share(layer, Vec::new(), Options::default())
    }

    /// An image whose blocks fill its table to the last entry: what is next, is in a block that no table names.
    fn full(blocks: u64, limit: u64) -> Allocator {
        let geometry = Geometry::new(BITS, 6, 8, 3);
        let table = vec![2 << BITS; to_usize(blocks)];
        let refcounts = Refcounts::new(geometry, table, 8, limits::REFCOUNT_SLICE_BYTES);
        let place = TablePlace {
            offset: 1 << BITS,
            clusters: blocks / 64,
        };
        let allocator = Allocator::new(refcounts, place, (blocks * 64) << BITS, true);
        allocator.limit.set(limit);
        allocator
    }

    fn add_block(allocator: &Allocator, shared: &Shared, block: u64) -> Result<()> {
        let plan = allocator.plan_block(shared, block)?;
        allocator.place_block(shared, block, plan);
        Ok(())
    }

    /// Where a table of many clusters needs several blocks to be counted, each of them lies in its place and counts what it has to.
    #[test]
    fn a_table_of_many_clusters_moves_with_its_blocks() {
        let start = 4096 * 64;
        // 6144 entries in 96 clusters, and two blocks.
        let end = start + 98;
        let (allocator, shared) = (full(4096, end), shared());
        add_block(&allocator, &shared, 4096).unwrap();
        let refcounts = &allocator.refcounts;
        assert_eq!(refcounts.new_blocks(), [4096, 4097]);
        assert_eq!(refcounts.block_offset(4096), start << BITS);
        assert_eq!(refcounts.block_offset(4097), (start + 1) << BITS);
        let owners = shared.image.qcow2().meta.lock().owners.clone();
        for cluster in start - 2..end + 30 {
            let expected = match cluster.checked_sub(start) {
                Some(0 | 1) => Some(Owner::RefcountBlock),
                Some(2..98) => Some(Owner::RefcountTable),
                _ => None,
            };
            assert_eq!(owners.get(&cluster).copied(), expected, "{cluster}");
            if cluster >= start {
                let counted = u64::from(expected.is_some());
                assert_eq!(refcounts.get(cluster), Some(counted), "{cluster}");
            }
        }
        assert_eq!(owners.len(), 98);
        assert_eq!(allocated(&shared), 98);
        assert_eq!(allocator.end.get(), end);
        let moved = TablePlace {
            offset: (start + 2) << BITS,
            clusters: 96,
        };
        assert_eq!(allocator.next_place.get(), Some(moved));
        assert!(allocator.superseded.borrow().is_empty());
        // What is written there now is not taken for zero, once it is free again.
        let zero = [start, end - 1, end].map(|cluster| allocator.is_zero(cluster));
        assert_eq!(zero, [false, false, true]);
        // Now there is room for an entry more; the block counts itself.
        allocator.end.set(4098 * 64);
        add_block(&allocator, &shared, 4098).unwrap();
        assert_eq!(refcounts.block_offset(4098), (4098 * 64) << BITS);
        assert_eq!(refcounts.get(4098 * 64), Some(1));
        assert_eq!(allocator.end.get(), 4098 * 64 + 1);
        assert_eq!(allocator.next_place.get(), Some(moved));
        // A place that was chosen and never used is not forgotten: it is counted.
        allocator.limit.set(u64::MAX);
        allocator.end.set(6144 * 64);
        add_block(&allocator, &shared, 6144).unwrap();
        assert_eq!(*allocator.superseded.borrow(), [moved]);
    }

    #[test]
    fn a_table_that_has_no_place_does_not_move() {
        let start = 4096 * 64;
        let unchanged = |allocator: &Allocator, shared: &Shared| {
            assert!(allocator.refcounts.new_blocks().is_empty());
            assert_eq!(allocator.next_place.get(), None);
            assert_eq!(allocated(shared), 0);
        };
        // A cluster too few; an owner in its way, first or last.
        for (limit, owned) in [
            (start + 97, None),
            (start + 98, Some(start)),
            (start + 98, Some(start + 97)),
        ] {
            let (allocator, shared) = (full(4096, limit), shared());
            if let Some(owned) = owned {
                let owners = &mut shared.image.qcow2().meta.lock().owners;
                owners.insert(owned, Owner::L2Table);
            }
            let told = add_block(&allocator, &shared, 4096)
                .unwrap_err()
                .to_string();
            let expected = if owned.is_some() {
                "no refcount block covers an L2 table"
            } else {
                "disk cannot grow: its refcount table would pass 8 MiB"
            };
            assert!(told.contains(expected), "{told}");
            unchanged(&allocator, &shared);
        }
        let (allocator, shared) = (full(4096, start + 98), shared());
        let owners = [start - 1, start + 98].map(|cluster| (cluster, Owner::L2Table));
        shared.image.qcow2().meta.lock().owners.extend(owners);
        assert!(add_block(&allocator, &shared, 4096).is_ok());
        // 8 MiB have 1 Mi entries, half of them to spare.
        for (blocks, fits) in [(699_051, true), (699_052, false)] {
            let (mut allocator, shared) = (full(blocks, u64::MAX), self::shared());
            allocator.table_clusters = Cell::new(1);
            assert_eq!(add_block(&allocator, &shared, blocks).is_ok(), fits);
            if fits {
                assert_eq!(allocator.table_clusters.get(), 16_384);
            } else {
                unchanged(&allocator, &shared);
            }
        }
    }

    #[test]
    fn a_new_table_counts_itself_and_takes_no_more() {
        for (bits, order) in [(9, 0), (9, 4), (9, 6), (12, 6), (16, 4), (21, 6)] {
            let geometry = Geometry::new(bits, order, 8, 3);
            let per_block = 1 << geometry.refcount_block_bits();
            let per_cluster = geometry.cluster_bytes() / 8;
            for (block, more) in [(1, 0), (64, 0), (64, 32), (500, 250), (4096, 9000)] {
                for at in [0, 1, per_block / 2, per_block - 2, per_block - 1] {
                    let (start, wanted) = (block * per_block + at, block + 1 + more);
                    let (blocks, table) = new_table(&geometry, start, block, wanted);
                    let told = format!("{bits} {order}: {start} {wanted}: {blocks} {table}");
                    let covered = |blocks: u64, table: u64| {
                        start + blocks + table <= (block + blocks) * per_block
                    };
                    let entries = wanted.max(block + blocks);
                    assert!(covered(blocks, table), "{told}");
                    assert!(table * per_cluster >= entries, "{told}");
                    // One less of either would not do.
                    assert!(blocks == 1 || !covered(blocks - 1, table), "{told}");
                    assert!((table - 1) * per_cluster < entries, "{told}");
                }
            }
        }
    }
}
