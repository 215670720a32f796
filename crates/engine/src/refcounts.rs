//! Refcounts of the image: the table in memory, the blocks cached by slice. Owned by the maintenance executor.
//!
//! O1: what stands here is, for each host cluster, the references after the next commit plus the removals that are not durable
//! yet. So whatever is written from here, whenever, is never below the references on disk.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use urus_format::{Geometry, refcount};

use crate::error::{Error, Result};
use crate::planted::{self, Bug};
use crate::seen::{Way, note};
use crate::storage::Storage;
use crate::to_usize;
use crate::worker::Worker;

const BLOCK_OFFSET_MASK: u64 = !0x1ff;

struct Slice {
    bytes: Vec<u8>,
    dirty: bool,
    last_used: u64,
}

/// Bytes of refcounts, frozen for a commit.
pub(crate) struct FrozenSlice {
    pub(crate) id: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

/// The refcount table and the cached parts of its blocks.
pub(crate) struct Refcounts {
    pub(crate) geometry: Geometry,
    /// Host offsets of the blocks; 0 where there is none.
    table: RefCell<Vec<u64>>,
    /// Entries of the table that the disk does not have.
    dirty_entries: RefCell<BTreeSet<u64>>,
    /// Blocks that are not on disk at all.
    new_blocks: RefCell<BTreeSet<u64>>,
    slices: RefCell<BTreeMap<u64, Slice>>,
    /// Slices kept though they are clean.
    most_slices: usize,
    slice_bytes: u64,
    loads: Cell<u32>,
    /// A commit holds frozen slices: nothing is dropped from the cache until its writes were seen.
    committing: Cell<bool>,
    clock: Cell<u64>,
}

impl Refcounts {
    /// `slice_bytes`: a power of two; no more than a cluster counts.
    pub(crate) fn new(
        geometry: Geometry,
        table: Vec<u64>,
        most_slices: usize,
        slice_bytes: u64,
    ) -> Self {
        Self {
            slice_bytes: slice_bytes.min(geometry.cluster_bytes()),
            geometry,
            table: RefCell::new(table),
            dirty_entries: RefCell::default(),
            new_blocks: RefCell::default(),
            slices: RefCell::default(),
            most_slices,
            loads: Cell::new(0),
            committing: Cell::new(false),
            clock: Cell::new(0),
        }
    }

    pub(crate) fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// log2 of the refcounts in a slice.
    fn slice_bits(&self) -> u32 {
        (self.slice_bytes() * 8).trailing_zeros() - self.geometry.refcount_order()
    }

    /// The slice that holds a cluster's refcount.
    pub(crate) fn slice_of(&self, cluster: u64) -> u64 {
        cluster >> self.slice_bits()
    }

    /// First cluster after those of the slice that holds `cluster`.
    pub(crate) fn slice_end(&self, cluster: u64) -> u64 {
        (self.slice_of(cluster) + 1) << self.slice_bits()
    }

    pub(crate) fn block_of(&self, cluster: u64) -> u64 {
        cluster >> self.geometry.refcount_block_bits()
    }

    fn slices_per_block_bits(&self) -> u32 {
        self.geometry.refcount_block_bits() - self.slice_bits()
    }

    /// Host offset of a block; 0 where there is none.
    pub(crate) fn block_offset(&self, block: u64) -> u64 {
        self.table
            .borrow()
            .get(to_usize(block))
            .copied()
            .unwrap_or(0)
            & BLOCK_OFFSET_MASK
    }

    /// First cluster past everything that an existing block covers.
    pub(crate) fn covered_end(&self) -> u64 {
        let table = self.table.borrow();
        let last = table
            .iter()
            .rposition(|entry| *entry != 0)
            .map_or(0, |last| last as u64 + 1);
        last << self.geometry.refcount_block_bits()
    }

    pub(crate) fn table_entries(&self) -> u64 {
        self.table.borrow().len() as u64
    }

    /// The table as it belongs on disk, as long as `clusters` clusters.
    pub(crate) fn table_bytes(&self, clusters: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(to_usize(clusters << self.geometry.cluster_bits()));
        for entry in self.table.borrow().iter() {
            bytes.extend_from_slice(&entry.to_be_bytes());
        }
        bytes.resize(to_usize(clusters << self.geometry.cluster_bits()), 0);
        bytes
    }

    /// Dirty entries of the table, in order.
    pub(crate) fn dirty_entries(&self) -> Vec<u64> {
        self.dirty_entries.borrow().iter().copied().collect()
    }

    /// The entries' write is durable.
    pub(crate) fn entries_written(&self, entries: &[u64]) {
        let mut dirty = self.dirty_entries.borrow_mut();
        for entry in entries {
            dirty.remove(entry);
        }
    }

    pub(crate) fn new_blocks(&self) -> Vec<u64> {
        self.new_blocks.borrow().iter().copied().collect()
    }

    /// The blocks' write is durable: only their entries are missing.
    pub(crate) fn blocks_written(&self, blocks: &[u64]) {
        let mut new = self.new_blocks.borrow_mut();
        for block in blocks {
            new.remove(block);
        }
    }

    /// Adds an empty block at a host offset; its refcounts are all 0 until they are set.
    pub(crate) fn add_block(&self, block: u64, offset: u64) {
        let mut table = self.table.borrow_mut();
        if table.len() <= to_usize(block) {
            table.resize(to_usize(block) + 1, 0);
        }
        table[to_usize(block)] = offset;
        drop(table);
        self.new_blocks.borrow_mut().insert(block);
        self.dirty_entries.borrow_mut().insert(block);
        let bits = self.slices_per_block_bits();
        let mut slices = self.slices.borrow_mut();
        for id in block << bits..(block + 1) << bits {
            let bytes = vec![0; to_usize(self.slice_bytes())];
            slices.insert(
                id,
                Slice {
                    bytes,
                    dirty: true,
                    last_used: self.tick(),
                },
            );
        }
    }

    fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    /// A cluster's refcount; `None` where it is not cached.
    pub(crate) fn get(&self, cluster: u64) -> Option<u64> {
        if self.block_offset(self.block_of(cluster)) == 0 {
            return Some(0);
        }
        let now = self.tick();
        let mut slices = self.slices.borrow_mut();
        let slice = slices.get_mut(&self.slice_of(cluster))?;
        slice.last_used = now;
        let index = cluster & ((1 << self.slice_bits()) - 1);
        Some(refcount::get(
            &slice.bytes,
            index,
            self.geometry.refcount_order(),
        ))
    }

    /// Sets a cached refcount.
    pub(crate) fn set(&self, cluster: u64, value: u64) {
        let mut slices = self.slices.borrow_mut();
        let slice = slices
            .get_mut(&self.slice_of(cluster))
            .expect("the slice was loaded by the caller");
        let index = cluster & ((1 << self.slice_bits()) - 1);
        refcount::set(
            &mut slice.bytes,
            index,
            self.geometry.refcount_order(),
            value,
        );
        slice.dirty = true;
    }

    /// A cluster's refcount, read if need be.
    pub(crate) async fn load<S: Storage>(&self, worker: &Worker<S>, cluster: u64) -> Result<u64> {
        loop {
            if let Some(value) = self.get(cluster) {
                return Ok(value);
            }
            let id = self.slice_of(cluster);
            let block = self.block_offset(self.block_of(cluster));
            if self.geometry.in_cluster(block) != 0 {
                return Err(Error::Corrupt {
                    file: worker.shared.image_name().to_owned(),
                    what: format!("refcount block offset {block:#x} is not cluster-aligned"),
                    place: format!("refcount table entry {}", self.block_of(cluster)),
                });
            }
            let in_block = id & ((1 << self.slices_per_block_bits()) - 1);
            // While a read is under way nothing is dropped from the cache: so what it brings is not older than
            // what a dropped slice was.
            self.loads.set(self.loads.get() + 1);
            let bytes = worker
                .files
                .read_bytes(
                    worker.image.file(),
                    block + in_block * self.slice_bytes(),
                    self.slice_bytes(),
                )
                .await;
            self.loads.set(self.loads.get() - 1);
            note(Way::CountsReadInCommit, || self.committing.get());
            note(Way::CountsReadAtOnce, || self.loads.get() > 0);
            let kept = bytes.map(|bytes| {
                note(Way::LaterCountsRead, || in_block >= 2);
                note(Way::CountsReadBesideDirty, || self.is_beside_dirty(id));
                let last_used = self.tick();
                self.slices.borrow_mut().entry(id).or_insert(Slice {
                    bytes,
                    dirty: false,
                    last_used,
                });
            });
            self.evict(Some(id));
            kept?;
        }
    }

    /// Whether another slice of the same block has changed.
    fn is_beside_dirty(&self, id: u64) -> bool {
        let first = id >> self.slices_per_block_bits() << self.slices_per_block_bits();
        let slices = self.slices.borrow();
        slices
            .range(first..first + (1 << self.slices_per_block_bits()))
            .any(|(other, slice)| *other != id && slice.dirty)
    }

    /// Brings the cache back to its bound, and some slices below it, so that not every load has to search. What has changed stays; so does
    /// `keep`, which somebody waits for. A commit cleans any number of slices at once, so it ends with this, too.
    fn evict(&self, keep: Option<u64>) {
        let len = self.slices.borrow().len();
        if len <= self.most_slices || self.loads.get() > 0 || self.committing.get() {
            return;
        }
        let mut clean: Vec<(u64, u64)> = self
            .slices
            .borrow()
            .iter()
            .filter(|(id, slice)| !slice.dirty && Some(**id) != keep)
            .map(|(id, slice)| (slice.last_used, *id))
            .collect();
        clean.sort_unstable();
        let surplus = len - self.most_slices + self.most_slices / 4;
        note(Way::CountsShrunk, || {
            clean.len() >= surplus && surplus > self.most_slices / 4 + 2
        });
        for (_, id) in clean.into_iter().take(surplus) {
            note(Way::CountsDroppedBesideDirty, || self.is_beside_dirty(id));
            self.slices.borrow_mut().remove(&id);
        }
    }

    /// What is cached: slices, those of them that are dirty, and the bound for the rest.
    pub(crate) fn cached(&self) -> (usize, usize, usize) {
        let slices = self.slices.borrow();
        let dirty = slices.values().filter(|slice| slice.dirty).count();
        (slices.len(), dirty, self.most_slices)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty_entries.borrow().is_empty()
            || !self.new_blocks.borrow().is_empty()
            || self.slices.borrow().values().any(|slice| slice.dirty)
    }

    /// Freezes the dirty slices of new blocks, or of the others.
    pub(crate) fn freeze(&self, of_new_blocks: bool) -> Vec<FrozenSlice> {
        self.committing.set(true);
        let bits = self.slices_per_block_bits();
        let new_blocks = self.new_blocks.borrow();
        let mut frozen = Vec::new();
        for (id, slice) in self.slices.borrow_mut().iter_mut() {
            let block = id >> bits;
            if !slice.dirty || new_blocks.contains(&block) != of_new_blocks {
                continue;
            }
            slice.dirty = false;
            let mut in_block = id & ((1 << bits) - 1);
            if planted::is(Bug::WrongCountsSlice) && in_block == 2 {
                in_block = 0;
            }
            note(Way::LaterCountsWritten, || in_block >= 2);
            frozen.push(FrozenSlice {
                id: *id,
                offset: self.block_offset(block) + in_block * self.slice_bytes(),
                bytes: slice.bytes.clone(),
            });
        }
        frozen
    }

    /// The commit is over, one way or the other.
    pub(crate) fn commit_ended(&self) {
        self.committing.set(false);
        if !planted::is(Bug::CountsNeverShrink) {
            self.evict(None);
        }
    }

    /// A frozen slice did not become durable.
    pub(crate) fn thaw(&self, frozen: &[FrozenSlice]) {
        let mut slices = self.slices.borrow_mut();
        for part in frozen {
            slices
                .get_mut(&part.id)
                .expect("frozen slices of a failed commit stay cached")
                .dirty = true;
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards against a cache of refcounts that forgets what is not on disk, or finds a refcount in another's place.

    use super::*;
    use crate::limits::REFCOUNT_SLICE_BYTES;

    const CLUSTER_BITS: u32 = 9;

    /// Refcounts of 16 bits: a block of 512 bytes has those of 256 clusters, and is one slice.
    fn refcounts(most_slices: usize) -> Refcounts {
        Refcounts::new(
            Geometry::new(CLUSTER_BITS, 4, 8, 3),
            Vec::new(),
            most_slices,
            REFCOUNT_SLICE_BYTES,
        )
    }

    fn cached(refcounts: &Refcounts) -> Vec<u64> {
        refcounts.slices.borrow().keys().copied().collect()
    }

    #[test]
    fn every_width_finds_its_refcounts_again() {
        let widths = [(9, 0), (9, 6), (12, 4), (16, 0), (16, 4), (21, 6)];
        let all = [64, 128, REFCOUNT_SLICE_BYTES].map(|bytes| widths.map(|width| (width, bytes)));
        for ((cluster_bits, order), slice_bytes) in all.into_iter().flatten() {
            let geometry = Geometry::new(cluster_bits, order, 8, 3);
            let refcounts = Refcounts::new(geometry, Vec::new(), 8, slice_bytes);
            let per_block = 1 << geometry.refcount_block_bits();
            let block = |index: u64| (index + 5) << cluster_bits;
            for index in 0..3 {
                refcounts.add_block(index, block(index));
            }
            assert_eq!(refcounts.covered_end(), 3 * per_block);
            // Around the borders of slices and blocks.
            let slice = refcounts.slice_end(0);
            let borders = [0, slice, per_block, 2 * per_block, 3 * per_block - 1];
            let clusters: BTreeSet<u64> = borders
                .into_iter()
                .flat_map(|at| at.saturating_sub(1)..=(at + 1).min(3 * per_block - 1))
                .collect();
            let value = |cluster: u64| (cluster ^ cluster >> 3) & 1;
            for cluster in &clusters {
                refcounts.set(*cluster, value(*cluster));
            }
            for cluster in &clusters {
                assert_eq!(refcounts.get(*cluster), Some(value(*cluster)));
                let end = refcounts.slice_end(*cluster);
                assert!(end > *cluster && end - *cluster <= slice && end.is_multiple_of(slice));
            }
            // And where they lie in the blocks, by the format's own reading.
            let mut image = vec![0; to_usize(block(3))];
            for part in refcounts.freeze(true) {
                let at = to_usize(part.offset);
                image[at..at + part.bytes.len()].copy_from_slice(&part.bytes);
            }
            for cluster in clusters {
                let at = to_usize(block(cluster / per_block));
                let in_block = cluster % per_block;
                assert_eq!(refcount::get(&image[at..], in_block, order), value(cluster));
            }
            assert_eq!(
                refcounts.get(3 * per_block),
                Some(0),
                "no block, no reference"
            );
        }
    }

    /// What is dirty, asked for, or under way stays; of the rest those go that were not used for longest.
    #[test]
    fn only_what_is_on_disk_is_dropped() {
        let refcounts = refcounts(8);
        for index in 0..12 {
            refcounts.add_block(index, (index + 1) << CLUSTER_BITS);
        }
        refcounts.evict(None);
        assert_eq!(cached(&refcounts).len(), 12, "all of them are dirty");
        let frozen = refcounts.freeze(true);
        assert_eq!(frozen.len(), 12);
        refcounts.evict(None);
        assert_eq!(cached(&refcounts).len(), 12, "a commit is under way");
        refcounts.loads.set(1);
        refcounts.commit_ended();
        assert_eq!(cached(&refcounts).len(), 12, "a read is under way");
        refcounts.loads.set(0);
        // 1 is used again, 2 changed, 3 is what somebody waits for.
        assert_eq!(refcounts.get(256), Some(0));
        refcounts.set(2 * 256, 7);
        refcounts.evict(Some(3));
        assert_eq!(cached(&refcounts), [1, 2, 3, 9, 10, 11]);
        assert_eq!(refcounts.get(0), None, "it has to be read");
        refcounts.evict(None);
        assert_eq!(cached(&refcounts).len(), 6, "few enough");
        assert_eq!(refcounts.get(2 * 256), Some(7));
    }

    /// However far a cache has grown while everything in it was dirty, the end of the commit brings it back to its bound, also where nothing
    /// is ever read (a disk that is written from its start to its end).
    #[test]
    fn a_cache_that_has_grown_comes_back_to_its_bound() {
        for most in [1, 2, 8, 100] {
            let refcounts = refcounts(most);
            for index in 0..1000 {
                refcounts.add_block(index, (index + 1) << CLUSTER_BITS);
            }
            let blocks = refcounts.freeze(true);
            assert_eq!(blocks.len(), 1000);
            // One changes behind the commit's back, and one commit has failed.
            refcounts.set(700 * 256, 1);
            refcounts.thaw(&blocks[..1]);
            refcounts.commit_ended();
            let (len, dirty, bound) = refcounts.cached();
            assert_eq!((dirty, bound), (2, most));
            assert!(len <= most.max(2), "{len} slices, and {most} may stay");
            assert_eq!(refcounts.get(700 * 256), Some(1));
        }
    }

    /// New blocks and the rest are written apart (O8), and what a commit could not write is dirty again.
    #[test]
    fn a_commit_takes_new_blocks_first() {
        let refcounts = refcounts(8);
        assert!(!refcounts.is_dirty());
        refcounts.add_block(0, 512);
        refcounts.add_block(2, 1024);
        assert_eq!(refcounts.table_entries(), 3);
        assert_eq!(refcounts.new_blocks(), [0, 2]);
        assert!(refcounts.freeze(false).is_empty());
        let frozen = refcounts.freeze(true);
        assert_eq!(
            frozen.iter().map(|part| part.offset).collect::<Vec<_>>(),
            [512, 1024]
        );
        refcounts.thaw(&frozen);
        assert_eq!(refcounts.freeze(true).len(), 2);
        refcounts.blocks_written(&[0, 2]);
        assert!(refcounts.new_blocks().is_empty() && refcounts.is_dirty());
        assert_eq!(refcounts.dirty_entries(), [0, 2]);
        refcounts.entries_written(&[0]);
        assert_eq!(refcounts.dirty_entries(), [2]);
        refcounts.entries_written(&[2]);
        assert!(!refcounts.is_dirty());
        refcounts.set(0, 1);
        assert!(refcounts.is_dirty());
        assert!(refcounts.freeze(true).is_empty());
        assert_eq!(refcounts.freeze(false).len(), 1);
        assert!(!refcounts.is_dirty());
        let mut table = vec![0; 1024];
        table[6] = 2;
        table[22] = 4;
        assert_eq!(refcounts.table_bytes(2), table);
    }
}
