//! Reads the refcount structures, and sets the refcounts against the references.

use std::collections::BTreeSet;

use urus_format::{Header, refcount};

use super::CheckIo;
use super::counts::{CHUNK_CLUSTERS, ClusterSet, MAP_ENTRY_BYTES};
use super::walk::{Role, Walked};

/// Bits of a refcount table entry that must be 0.
const RESERVED: u64 = 511;

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// Its place in the table: it has the refcounts of the clusters from `index << refcount_block_bits` on.
    pub(super) index: u64,
    /// Where the block lies.
    pub(super) offset: u64,
    /// The refcounts in it count (also where it is to be replaced).
    pub(super) readable: bool,
    /// It cannot stay.
    pub(super) bad: bool,
    /// It is among the references.
    pub(super) counted: bool,
}

/// The refcount table.
#[derive(Default)]
pub(super) struct RefcountTable {
    /// The entries that are not 0, by index.
    pub(super) blocks: Vec<Block>,
    /// The table is among the references.
    pub(super) counted: bool,
}

impl RefcountTable {
    /// Whether the table and all of its blocks are among the references.
    pub(super) fn is_counted(&self) -> bool {
        self.counted && self.blocks.iter().all(|block| block.counted)
    }

    /// The entry for the clusters of the block with this index.
    pub(super) fn find(&self, index: u64) -> Option<&Block> {
        let at = self
            .blocks
            .binary_search_by_key(&index, |block| block.index)
            .ok()?;
        Some(&self.blocks[at])
    }
}

impl Walked {
    /// Reads the table, and which clusters have refcount 1.
    pub(super) async fn read_refcounts<I: CheckIo>(&mut self, io: &I, header: &Header) {
        let bytes = u64::from(header.refcount_table_clusters) << self.geometry.cluster_bits();
        let mut blocks = Vec::new();
        let what = "the refcount table";
        self.each_entry(
            io,
            header.refcount_table.0,
            bytes / 8,
            what,
            |_, index, entry| {
                blocks.push((index, entry));
            },
        )
        .await;
        let mut seen = BTreeSet::new();
        for (index, entry) in blocks {
            let block = self.judge(index, entry, &mut seen);
            self.refcounts.blocks.push(block);
            self.counts.charge(MAP_ENTRY_BYTES);
        }
        self.read_singles(io).await;
    }

    fn judge(&mut self, index: u64, entry: u64, seen: &mut BTreeSet<u64>) -> Block {
        let offset = entry & !RESERVED;
        let mut fault = |text: &str| {
            self.report.corruption(1, || {
                format!("refcount table, entry {index}: {text} ({entry:#018x})")
            });
        };
        let mut bad = true;
        let mut readable = false;
        if entry & RESERVED != 0 {
            fault("reserved bits are set");
        } else if self.geometry.in_cluster(offset) != 0 {
            fault("the offset is not cluster-aligned");
        } else if offset >= self.file_len {
            fault("the block lies past the end of the file");
        } else {
            bad = false;
        }
        if self.geometry.in_cluster(offset) == 0 && offset < self.file_len {
            // A block that is listed twice has the refcounts of its first place. Claiming it finds the rest.
            readable = offset != 0
                && seen.insert(offset)
                && self.charge(offset, self.geometry.cluster_bytes(), || {
                    "the refcount blocks".into()
                });
        }
        Block {
            index,
            offset,
            readable,
            bad,
            counted: false,
        }
    }

    /// Finds out which clusters have refcount 1 on disk.
    pub(super) async fn read_singles<I: CheckIo>(&mut self, io: &I) {
        self.singles = ClusterSet::default();
        let order = self.geometry.refcount_order();
        for at in 0..self.refcounts.blocks.len() {
            let block = self.refcounts.blocks[at];
            let Some(bytes) = self.read_block(io, block).await else {
                continue;
            };
            let first = block.index << self.geometry.refcount_block_bits();
            // Counters of 64 clusters take 8 bytes for each bit that one has.
            for (group, counters) in (0u64..).zip(bytes.chunks_exact(8 << order)) {
                if counters.iter().all(|byte| *byte == 0) {
                    continue;
                }
                let members = (0..64).fold(0, |members, index| {
                    members | u64::from(refcount::get(counters, index, order) == 1) << index
                });
                self.singles.insert(first + group * 64, members);
            }
        }
    }

    pub(super) async fn read_block<I: CheckIo>(&mut self, io: &I, block: Block) -> Option<Vec<u8>> {
        if !block.readable {
            return None;
        }
        let what = format!("refcount block {}", block.index);
        self.read(io, block.offset, self.geometry.cluster_bytes(), &what)
            .await
    }

    /// Counts the references to the refcount structures, after all others: a block that something else uses
    /// too, the table included, cannot stay where it is.
    pub(super) fn claim_refcounts(&mut self, header: &Header) {
        let cluster_bytes = self.geometry.cluster_bytes();
        let table_bytes = u64::from(header.refcount_table_clusters) * cluster_bytes;
        // A table past the end of the file loses refcounts, which can be made anew, and no references.
        let lost = self.lost;
        self.refcounts.counted =
            self.claim(Role::RefcountTable, header.refcount_table.0, table_bytes, 1);
        self.lost = lost;
        for at in 0..self.refcounts.blocks.len() {
            let block = self.refcounts.blocks[at];
            if !block.bad && !self.counts.is_full() {
                let counted = self.claim(Role::RefcountBlock, block.offset, cluster_bytes, 1);
                self.refcounts.blocks[at].counted = counted;
                self.check_block_alone(block);
            }
        }
        for at in 0..self.refcounts.blocks.len() {
            let block = self.refcounts.blocks[at];
            let cluster = block.offset >> self.geometry.cluster_bits();
            self.refcounts.blocks[at].bad |= self.counts.get(cluster) != 1;
        }
    }

    fn check_block_alone(&mut self, block: Block) {
        let cluster = block.offset >> self.geometry.cluster_bits();
        let references = self.counts.get(cluster);
        if references != 1 && !self.counts.is_full() {
            let what = self.describe(cluster);
            self.report.corruption(1, || {
                format!("refcount block {} is cluster {cluster}, which has {references} references: {what}", block.index)
            });
            if let Some(owned) = self.roles.get_mut(&cluster) {
                owned.reported = true;
            }
        }
    }

    /// Sets refcounts against references.
    pub(super) async fn compare<I: CheckIo>(&mut self, io: &I) {
        // References may pass the end of the file by less than a cluster.
        let end = self
            .file_clusters()
            .max(self.counts.last().map_or(0, |last| last + 1));
        let mut last_used = None;
        let block_bits = self.geometry.refcount_block_bits();
        let mut references = vec![0; CHUNK_CLUSTERS.min(1 << block_bits)];
        for at in 0..self.refcounts.blocks.len() {
            let block = self.refcounts.blocks[at];
            let Some(bytes) = self.read_block(io, block).await else {
                continue;
            };
            let first = block.index << block_bits;
            let piece_bytes = bytes.len() / ((1 << block_bits) / references.len());
            for (piece, bytes) in (0u64..).zip(bytes.chunks_exact(piece_bytes)) {
                let first = first + piece * references.len() as u64;
                if !self.counts.fill(first, &mut references) && bytes.iter().all(|byte| *byte == 0)
                {
                    continue;
                }
                for (index, references) in (0u64..).zip(&references) {
                    let refcount = refcount::get(bytes, index, self.geometry.refcount_order());
                    let cluster = first + index;
                    if (refcount != 0 || *references != 0) && cluster < end {
                        last_used = last_used.max(Some(cluster));
                    }
                    self.compare_cluster(cluster, refcount, *references, cluster >= end);
                }
            }
        }
        last_used = last_used.max(self.counts.last());
        self.report.image_end_offset =
            last_used.map_or(0, |cluster| (cluster + 1) << self.geometry.cluster_bits());
        self.compare_without_block();
    }

    /// The clusters of which no block has the refcount.
    fn compare_without_block(&mut self) {
        let block_bits = self.geometry.refcount_block_bits();
        let mut next = 0;
        loop {
            let mut known = (u64::MAX, false);
            let without: Vec<(u64, u64)> = self
                .counts
                .iter_from(next)
                .filter(|(cluster, _)| {
                    let index = cluster >> block_bits;
                    if known.0 != index {
                        let block = self.refcounts.find(index);
                        known = (index, block.is_some_and(|block| block.readable));
                    }
                    !known.1
                })
                .take(CHUNK_CLUSTERS)
                .collect();
            let Some((last, _)) = without.last() else {
                return;
            };
            next = last + 1;
            for (cluster, references) in without {
                self.compare_cluster(cluster, 0, references, false);
            }
        }
    }

    fn compare_cluster(&mut self, cluster: u64, refcount: u64, references: u64, past_end: bool) {
        // More than fit are counted by themselves.
        let fitting = references.min(self.geometry.refcount_max());
        if refcount == fitting {
            return;
        }
        let what = || self.describe(cluster);
        if refcount > fitting {
            let where_ = if past_end {
                ", past the end of the file"
            } else {
                ""
            };
            let what = if references == 0 {
                String::new()
            } else {
                format!(" ({})", what())
            };
            self.report.leak(past_end, || {
                format!(
                    "cluster {cluster}{where_}: refcount {refcount}, but {}{what}",
                    counted(references)
                )
            });
            return;
        }
        let what = what();
        self.report.corruption(1, || {
            format!(
                "cluster {cluster}: refcount {refcount}, but {} ({what})",
                counted(references)
            )
        });
        self.too_low += 1;
        if let Some(owned) = self.roles.get_mut(&cluster) {
            owned.reported = true;
        }
    }

    /// The refcount that a cluster must have.
    pub(super) fn right_refcount(&self, cluster: u64) -> u64 {
        self.counts.get(cluster).min(self.geometry.refcount_max())
    }
}

fn counted(references: u64) -> String {
    match references {
        0 => "no reference".into(),
        1 => "1 reference".into(),
        _ => format!("{references} references"),
    }
}
