//! Plans new refcount structures, where the old ones cannot be mended in place: a block is missing or cannot
//! stay, or the table is too short or cannot stay.
//!
//! Always a whole new table, because one header write then switches from the old structures to the new (O8),
//! whatever was wrong with the old ones. Blocks that are good are kept: the new table has them too.

use std::collections::{BTreeMap, BTreeSet};

use urus_format::header::MAX_REFCOUNT_TABLE_BYTES;
use urus_format::{Header, refcount};

use super::refcounts::Block;
use super::walk::{Role, Walked};
use crate::to_usize;

/// Where new refcount structures go: a run of clusters that nothing refers to.
pub(super) struct Relocation {
    /// First cluster of the new table.
    pub(super) table: u64,
    pub(super) table_clusters: u64,
    /// Clusters of the new blocks, by index in the table.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// Clusters of the blocks that stay, by index in the table.
    kept: BTreeMap<u64, u64>,
    /// Indexes of the blocks that cannot stay.
    dropped: BTreeSet<u64>,
}

impl Relocation {
    /// The plan, where one is needed. From then on the counts are those after the switch. An error says why
    /// it cannot be done.
    pub(super) fn plan(walked: &mut Walked, header: &Header) -> Result<Option<Self>, String> {
        let table = table_range(walked, header);
        let table_bad = !walked.refcounts.counted
            || table.is_empty()
            || table.clone().any(|cluster| walked.overlaps(cluster));
        let bad_blocks = walked.refcounts.blocks.iter().any(|block| block.bad);
        if !table_bad && !bad_blocks && Self::missing(walked).is_empty() {
            return Ok(None);
        }

        // The old structures go.
        if walked.refcounts.counted {
            table.for_each(|cluster| walked.counts.remove_one(cluster));
        }
        let bits = walked.geometry.cluster_bits();
        for at in 0..walked.refcounts.blocks.len() {
            let block = walked.refcounts.blocks[at];
            if block.bad && block.counted {
                walked.counts.remove_one(block.offset >> bits);
            }
        }
        let (dropped, kept): (Vec<&Block>, Vec<&Block>) =
            walked.refcounts.blocks.iter().partition(|block| block.bad);
        let mut relocation = Self {
            table: first_free(walked),
            table_clusters: 1,
            blocks: Self::missing(walked)
                .into_iter()
                .map(|index| (index, 0))
                .collect(),
            kept: kept
                .iter()
                .map(|block| (block.index, block.offset >> bits))
                .collect(),
            dropped: dropped.iter().map(|block| block.index).collect(),
        };
        relocation.settle(walked)?;
        let end = relocation.table + relocation.table_clusters + relocation.blocks.len() as u64;
        if end << bits > walked.beyond {
            return Err(format!(
                "new refcount structures would lie at {:#x}, where something that is lost is said to be",
                walked.beyond
            ));
        }
        relocation.adopt(walked);
        Ok(Some(relocation))
    }

    /// Indexes of the blocks that referred clusters need and that are not there, or cannot stay.
    fn missing(walked: &Walked) -> Vec<u64> {
        let mut missing = Vec::new();
        let mut next = 0;
        let block_bits = walked.geometry.refcount_block_bits();
        while let Some((cluster, _)) = walked.counts.iter_from(next).next() {
            let index = cluster >> block_bits;
            if walked.refcounts.find(index).is_none_or(|block| block.bad) {
                missing.push(index);
            }
            next = (index + 1) << block_bits;
        }
        missing
    }

    /// New structures need refcounts themselves, perhaps in blocks that are new too: grows the plan until
    /// everything in it has one. Each round adds blocks that cover more than they take, so it ends.
    fn settle(&mut self, walked: &Walked) -> Result<(), String> {
        let geometry = &walked.geometry;
        loop {
            let total = self.table_clusters + self.blocks.len() as u64;
            let homes = self.table >> geometry.refcount_block_bits()
                ..=(self.table + total - 1) >> geometry.refcount_block_bits();
            for index in homes {
                if !self.kept.contains_key(&index) {
                    self.blocks.insert(index, 0);
                }
            }
            let last = self.kept.last_key_value().max(self.blocks.last_key_value());
            let table_bytes = last.map_or(1, |(index, _)| index + 1) * 8;
            if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
                return Err(format!(
                    "a refcount table of {table_bytes} bytes would be needed, and it may have {MAX_REFCOUNT_TABLE_BYTES}"
                ));
            }
            self.table_clusters = geometry.clusters_for(table_bytes);
            let bytes = (self.table_clusters + self.blocks.len() as u64) << geometry.cluster_bits();
            let most = walked.limits.relocation_bytes;
            if bytes > most {
                return Err(format!(
                    "{bytes} bytes of new refcount structures, and at most {most} are made"
                ));
            }
            if self.table_clusters + self.blocks.len() as u64 == total {
                break;
            }
        }
        let first = self.table + self.table_clusters;
        for (cluster, place) in (first..).zip(self.blocks.values_mut()) {
            *place = cluster;
        }
        Ok(())
    }

    /// Counts the new structures, and has the new blocks take the place of those dropped.
    fn adopt(&self, walked: &mut Walked) {
        let geometry = walked.geometry;
        let table = (self.table..self.table + self.table_clusters)
            .map(|cluster| (Role::RefcountTable, cluster));
        let blocks = self
            .blocks
            .values()
            .map(|cluster| (Role::RefcountBlock, *cluster));
        for (role, cluster) in table.chain(blocks) {
            walked.counts.add(cluster, 1);
            walked.own(role, cluster << geometry.cluster_bits(), 1, 1);
        }
        walked.refcounts.counted = true;
        let blocks = &mut walked.refcounts.blocks;
        blocks.retain(|block| !block.bad);
        blocks.extend(self.blocks.iter().map(|(index, cluster)| Block {
            index: *index,
            offset: cluster << geometry.cluster_bits(),
            readable: true,
            bad: false,
            counted: true,
        }));
        blocks.sort_unstable_by_key(|block| block.index);
    }

    /// Where to write what: offsets, and indexes of blocks (`None` for the table). Nothing refers to any of
    /// them yet.
    pub(super) fn places(&self, walked: &Walked) -> Vec<(u64, Option<u64>)> {
        let bits = walked.geometry.cluster_bits();
        let blocks = self
            .blocks
            .iter()
            .map(|(index, cluster)| (cluster << bits, Some(*index)));
        std::iter::once((self.table << bits, None))
            .chain(blocks)
            .collect()
    }

    /// The new table, or the new block with this index.
    pub(super) fn encode(&self, walked: &Walked, block: Option<u64>) -> Vec<u8> {
        match block {
            None => self.encode_table(walked),
            Some(index) => self.encode_block(walked, index),
        }
    }

    fn encode_table(&self, walked: &Walked) -> Vec<u8> {
        let bits = walked.geometry.cluster_bits();
        let mut table = vec![0; to_usize(self.table_clusters << bits)];
        for (index, cluster) in self.kept.iter().chain(&self.blocks) {
            let at = to_usize(index * 8);
            table[at..at + 8].copy_from_slice(&(cluster << bits).to_be_bytes());
        }
        table
    }

    /// Refcounts of the clusters of one block, as they must be.
    fn encode_block(&self, walked: &Walked, index: u64) -> Vec<u8> {
        let geometry = &walked.geometry;
        let order = geometry.refcount_order();
        let mut block = vec![0; to_usize(geometry.cluster_bytes())];
        let first = index << geometry.refcount_block_bits();
        let end = (index + 1) << geometry.refcount_block_bits();
        if walked.lost && self.dropped.contains(&index) {
            // The old block may have had refcounts of clusters that can no longer be found: none is free.
            for cluster in first..end.min(walked.file_clusters()) {
                refcount::set(&mut block, cluster - first, order, 1);
            }
        }
        for (cluster, _) in walked
            .counts
            .iter_from(first)
            .take_while(|(cluster, _)| *cluster < end)
        {
            refcount::set(
                &mut block,
                cluster - first,
                order,
                walked.right_refcount(cluster),
            );
        }
        block
    }
}

fn table_range(walked: &Walked, header: &Header) -> std::ops::Range<u64> {
    let first = header.refcount_table.0 >> walked.geometry.cluster_bits();
    first..first + u64::from(header.refcount_table_clusters)
}

/// The first cluster of those at the end that nothing refers to.
fn first_free(walked: &Walked) -> u64 {
    let after_last = walked.counts.last().map_or(0, |last| last + 1);
    // What is lost may lie anywhere in the file.
    if walked.lost {
        after_last.max(walked.file_clusters())
    } else {
        after_last
    }
}
