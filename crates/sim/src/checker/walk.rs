//! Follows every table, gathers all references, and compares them with the refcounts.

use std::collections::{BTreeMap, BTreeSet};

use super::layout::{
    COMPRESSED, COPIED, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, L1, Layout, OFFSET_MASK, index,
    u16_at, u32_at,
};
use super::{Leak, MAX_LEAKS, Owner, Owners, Reference, Report, Table, Violation};

/// Checks an image.
#[must_use]
pub fn check(image: &[u8]) -> Report {
    let mut report = Report::default();
    let layout = match Layout::parse(image) {
        Ok(layout) => layout,
        Err(violation) => {
            report.add(violation);
            return report;
        }
    };
    report.dirty = layout.incompatible & INCOMPATIBLE_DIRTY != 0;
    report.corrupt = layout.incompatible & INCOMPATIBLE_CORRUPT != 0;
    if layout.crypt != 0 {
        report.add(Violation::Refused("encryption".to_owned()));
        return report;
    }
    let mut walk = Walk {
        layout,
        report,
        references: Vec::new(),
        refcounts: Vec::new(),
    };
    walk.refer(Owner::Header, 0, walk.layout.cluster());
    walk.refcount_table();
    walk.mappings();
    walk.bitmaps();
    walk.compare();
    walk.report
}

struct Walk<'a> {
    layout: Layout<'a>,
    report: Report,
    references: Vec<Reference>,
    /// Cluster and refcount, where that is not 0, by cluster.
    refcounts: Vec<(u64, u64)>,
}

/// How an L2 table is reached.
struct Route {
    table: Table,
    l1_index: u64,
}

impl Walk<'_> {
    /// `owner` refers to every cluster that `[offset, offset + len)` touches.
    fn refer(&mut self, owner: Owner, offset: u64, len: u64) {
        self.refer_weighted(owner, offset, len, 1);
    }

    fn refer_weighted(&mut self, owner: Owner, offset: u64, len: u64, weight: u64) {
        if len == 0 {
            return;
        }
        let bits = self.layout.cluster_bits;
        let last = offset.saturating_add(len - 1) >> bits;
        for cluster in offset >> bits..=last {
            self.references.push(Reference {
                cluster,
                owner,
                weight,
            });
        }
    }

    /// Whether `[offset, offset + len)` can be a table; otherwise says what is wrong.
    fn table_fits(&mut self, owner: Owner, offset: u64, len: u64) -> bool {
        let why = if !offset.is_multiple_of(self.layout.cluster()) {
            "misaligned"
        } else if offset >= self.layout.file_len() {
            "past the end of the file"
        } else if offset.saturating_add(len) > self.layout.file_len() {
            "cut off by the end of the file"
        } else {
            return true;
        };
        self.report.add(Violation::BadTable { owner, offset, why });
        false
    }

    fn refcount_table(&mut self) {
        let cluster = self.layout.cluster();
        let offset = self.layout.refcount_table_offset;
        let bytes = self.layout.refcount_table_clusters * cluster;
        self.refer(Owner::RefcountTable, offset, bytes);
        self.table_fits(Owner::RefcountTable, offset, bytes);
        let entries_per_block = (cluster * 8) >> self.layout.refcount_order;
        let mut seen = BTreeSet::new();
        let readable = bytes.min(self.layout.file_len().saturating_sub(offset));
        for number in 0..readable / 8 {
            let entry = self.layout.u64_at(offset + number * 8);
            if entry == 0 {
                continue;
            }
            let owner = Owner::RefcountBlock(number);
            if !entry.is_multiple_of(512) {
                self.report.add(Violation::BadEntry {
                    owner,
                    entry,
                    why: "reserved bits",
                });
            }
            let block = entry & !511;
            self.refer(owner, block, cluster);
            // A block that is listed twice is an overlap, which `compare` sees; reading it twice would let a
            // hostile table cost more than the file is long.
            if self.table_fits(owner, block, cluster) && seen.insert(block) {
                self.refcount_block(block, number * entries_per_block);
            }
        }
    }

    fn refcount_block(&mut self, offset: u64, first_cluster: u64) {
        let bytes = &self.layout.image[index(offset)..index(offset + self.layout.cluster())];
        let order = self.layout.refcount_order;
        for (word_index, word) in (0u64..).zip(bytes.chunks_exact(8)) {
            if word == [0; 8] {
                continue;
            }
            let per_word = 64 >> order;
            for i in 0..per_word {
                let refcount = if order < 3 {
                    // Entries smaller than a byte: the first one is in the least significant bits.
                    let bit = i << order;
                    u64::from(word[bit / 8] >> (bit % 8)) & ((1 << (1 << order)) - 1)
                } else {
                    let width = 1 << (order - 3);
                    word[i * width..(i + 1) * width]
                        .iter()
                        .fold(0, |value, byte| value << 8 | u64::from(*byte))
                };
                if refcount != 0 {
                    let cluster = first_cluster + word_index * per_word as u64 + i as u64;
                    self.refcounts.push((cluster, refcount));
                }
            }
        }
    }

    fn refcount(&self, cluster: u64) -> u64 {
        self.refcounts
            .binary_search_by_key(&cluster, |found| found.0)
            .map_or(0, |at| self.refcounts[at].1)
    }

    /// The active table and those of the snapshots.
    fn mappings(&mut self) {
        let mut tables = vec![self.layout.active_l1()];
        if self.layout.snapshot_count != 0 {
            match self.layout.snapshots() {
                Err(violation) => self.report.add(violation),
                Ok((snapshots, bytes)) => {
                    self.refer(Owner::SnapshotTable, self.layout.snapshots_offset, bytes);
                    for (number, snapshot) in (0..).zip(snapshots) {
                        let table = Table::Snapshot(number);
                        tables.push(L1 {
                            table,
                            offset: snapshot.l1_offset,
                            entries: snapshot.l1_entries,
                        });
                    }
                }
            }
        }
        // L2 tables by offset. Those that snapshots share are reached from several L1 tables.
        let mut routes: BTreeMap<u64, Vec<Route>> = BTreeMap::new();
        let mut budget = self.layout.file_len();
        for l1 in tables {
            let bytes = l1.entries * 8;
            if bytes == 0 || !self.table_fits(Owner::L1(l1.table), l1.offset, bytes) {
                continue;
            }
            if bytes > budget {
                self.report
                    .add(Violation::Refused("L1 tables that overlap".to_owned()));
                break;
            }
            budget -= bytes;
            self.refer(Owner::L1(l1.table), l1.offset, bytes);
            self.l1_table(l1, &mut routes);
        }
        for (offset, routes) in routes {
            self.l2_table(offset, &routes);
        }
    }

    fn l1_table(&mut self, l1: L1, routes: &mut BTreeMap<u64, Vec<Route>>) {
        for l1_index in 0..l1.entries {
            let entry = self.layout.u64_at(l1.offset + l1_index * 8);
            if entry == 0 {
                continue;
            }
            let owner = Owner::L2(l1.table, l1_index);
            if entry & !(OFFSET_MASK | COPIED) != 0 {
                self.report.add(Violation::BadEntry {
                    owner,
                    entry,
                    why: "reserved bits",
                });
            }
            let offset = entry & OFFSET_MASK;
            if offset == 0 {
                self.report.add(Violation::BadEntry {
                    owner,
                    entry,
                    why: "flags without an offset",
                });
                continue;
            }
            self.refer(owner, offset, self.layout.cluster());
            if l1.table == Table::Active {
                self.copied(owner, entry, offset);
            }
            if self.table_fits(owner, offset, self.layout.cluster()) {
                let routes = routes.entry(offset).or_default();
                if routes.last().is_some_and(|route| route.table == l1.table) {
                    // Twice in one L1 table: `compare` sees two owners.
                    continue;
                }
                routes.push(Route {
                    table: l1.table,
                    l1_index,
                });
            }
        }
    }

    /// COPIED in an active entry means refcount 1 (O10).
    fn copied(&mut self, owner: Owner, entry: u64, offset: u64) {
        let cluster = offset >> self.layout.cluster_bits;
        let refcount = self.refcount(cluster);
        if entry & COPIED != 0 && refcount != 1 {
            self.report.add(Violation::Copied {
                owner,
                cluster,
                refcount,
            });
        } else if entry & COPIED == 0 && refcount == 1 {
            self.report.copied_clear += 1;
        }
    }

    fn l2_table(&mut self, offset: u64, routes: &[Route]) {
        let entry_bytes = self.layout.l2_entry_bytes();
        let weight = routes.len() as u64;
        let route = &routes[0];
        // The active table comes first, so it names the owner wherever it takes part.
        let active = route.table == Table::Active;
        for i in 0..self.layout.l2_entries() {
            let entry = self.layout.u64_at(offset + i * entry_bytes);
            let bitmap = if entry_bytes == 16 {
                self.layout.u64_at(offset + i * 16 + 8)
            } else {
                0
            };
            if entry == 0 && bitmap == 0 {
                continue;
            }
            let guest = route.l1_index * self.layout.l2_entries() + i;
            if entry & COMPRESSED != 0 {
                self.compressed(
                    Owner::Compressed(route.table, guest),
                    entry,
                    bitmap,
                    weight,
                    active,
                );
            } else {
                self.data(
                    Owner::Data(route.table, guest),
                    entry,
                    bitmap,
                    weight,
                    active,
                );
            }
        }
    }

    fn compressed(&mut self, owner: Owner, entry: u64, bitmap: u64, weight: u64, active: bool) {
        let (start, len) = self.layout.compressed_range(entry);
        let why = if entry & COPIED != 0 {
            Some("compressed and COPIED")
        } else if bitmap != 0 {
            Some("compressed with subclusters")
        } else if self.layout.data_file() {
            Some("compressed with a data file")
        } else if start >= self.layout.file_len() {
            Some("compressed data past the end of the file")
        } else {
            None
        };
        if let Some(why) = why {
            self.report.add(Violation::BadEntry { owner, entry, why });
        }
        self.report.compressed_clusters += u64::from(active);
        self.refer_weighted(owner, start, len, weight);
    }

    fn data(&mut self, owner: Owner, entry: u64, bitmap: u64, weight: u64, active: bool) {
        let offset = entry & OFFSET_MASK;
        let zero_flag = self.layout.version == 3 && !self.layout.extended_l2();
        let allowed = OFFSET_MASK | COPIED | u64::from(zero_flag);
        let external = self.layout.data_file();
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        let why =
            if entry & !(allowed | 1) != 0 || entry & !allowed != 0 && self.layout.version == 3 {
                Some("reserved bits")
            } else if entry & !allowed != 0 {
                Some("the zero flag in version 2")
            } else if !offset.is_multiple_of(self.layout.cluster()) {
                Some("misaligned")
            } else if !external && offset >= self.layout.file_len() {
                Some("data past the end of the file")
            } else if allocated & zero != 0 {
                Some("subclusters both allocated and zero")
            } else if offset == 0 && !external && (entry & COPIED != 0 || allocated != 0) {
                Some("flags without an offset")
            } else {
                None
            };
        if let Some(why) = why {
            self.report.add(Violation::BadEntry { owner, entry, why });
        }
        if external || offset == 0 {
            return;
        }
        self.report.data_clusters += u64::from(active);
        self.refer_weighted(owner, offset, self.layout.cluster(), weight);
        if active {
            self.copied(owner, entry, offset);
        }
    }

    fn bitmaps(&mut self) {
        let Some((count, offset, bytes)) = self.layout.bitmaps else {
            return;
        };
        if !self.table_fits(Owner::BitmapDirectory, offset, bytes) {
            return;
        }
        self.refer(Owner::BitmapDirectory, offset, bytes);
        let end = offset + bytes;
        let mut at = offset;
        let mut budget = self.layout.file_len();
        for number in 0..count {
            if at + 24 > end {
                self.report.add(Violation::Bitmaps(format!(
                    "entry {number} is past the directory's end"
                )));
                return;
            }
            let image = self.layout.image;
            let table = self.layout.u64_at(at);
            let table_bytes = u64::from(u32_at(image, at + 8)) * 8;
            let owner = Owner::BitmapTable(number);
            let name = u64::from(u16_at(image, at + 18));
            let extra = u64::from(u32_at(image, at + 20));
            // Type 1, no unknown flags; granularity, name and table as QEMU takes them.
            let [kind, granularity] = u16_at(image, at + 16).to_be_bytes();
            if kind != 1
                || u32_at(image, at + 12) >> 3 != 0
                || !(9..=31).contains(&granularity)
                || !(1..=1023).contains(&name)
                || table_bytes == 0
                || table == 0
            {
                self.report.add(Violation::Bitmaps(format!(
                    "a field of entry {number} is out of its range"
                )));
            }
            if table_bytes != 0 && self.table_fits(owner, table, table_bytes) {
                if table_bytes > budget {
                    self.report
                        .add(Violation::Refused("bitmap tables that overlap".to_owned()));
                    return;
                }
                budget -= table_bytes;
                self.refer(owner, table, table_bytes);
                self.bitmap_table(number, table, table_bytes);
            }
            at = (at + 24 + extra + name).next_multiple_of(8);
        }
        if at != end {
            self.report.add(Violation::Bitmaps(format!(
                "the directory has {bytes} bytes, its entries {}",
                at - offset
            )));
        }
    }

    fn bitmap_table(&mut self, number: u32, table: u64, bytes: u64) {
        for i in 0..bytes / 8 {
            let entry = self.layout.u64_at(table + i * 8);
            let data = entry & OFFSET_MASK;
            // Without an offset bit 0 says what all of its bits are.
            let allowed = if data == 0 { 1 } else { OFFSET_MASK };
            if entry & !allowed != 0
                || !data.is_multiple_of(self.layout.cluster())
                || data >= self.layout.file_len()
            {
                self.report.add(Violation::Bitmaps(format!(
                    "bitmap {number}, table entry {i}: {entry:#018x}"
                )));
            }
            if data != 0 {
                self.refer(Owner::Bitmap(number), data, self.layout.cluster());
            }
        }
    }

    /// Sorts the references by cluster and sets them against the refcounts.
    fn compare(&mut self) {
        let mut references = std::mem::take(&mut self.references);
        // Stable, so that the order of owners is that of the walk.
        references.sort_by_key(|reference| reference.cluster);
        let refcounts = std::mem::take(&mut self.refcounts);
        let mut counted = refcounts.iter().copied().peekable();
        for group in references.chunk_by(|a, b| a.cluster == b.cluster) {
            let cluster = group[0].cluster;
            while let Some((leaked, refcount)) = counted.next_if(|found| found.0 < cluster) {
                self.leak(Leak {
                    cluster: leaked,
                    refcount,
                    references: 0,
                });
            }
            let refcount = counted
                .next_if(|found| found.0 == cluster)
                .map_or(0, |found| found.1);
            self.compare_cluster(cluster, refcount, group);
        }
        for (cluster, refcount) in counted {
            self.leak(Leak {
                cluster,
                refcount,
                references: 0,
            });
        }
        self.report.owners = Owners {
            cluster_bits: self.layout.cluster_bits,
            references,
        };
    }

    fn compare_cluster(&mut self, cluster: u64, refcount: u64, group: &[Reference]) {
        let references = group
            .iter()
            .fold(0u64, |sum, reference| sum.saturating_add(reference.weight));
        let owners = || {
            group
                .iter()
                .map(|reference| reference.owner)
                .take(8)
                .collect()
        };
        if refcount < references {
            self.report.add(Violation::RefcountTooLow {
                cluster,
                refcount,
                references,
                owners: owners(),
            });
        } else if refcount > references {
            self.leak(Leak {
                cluster,
                refcount,
                references,
            });
        }
        if group[1..]
            .iter()
            .any(|other| !may_share(group[0].owner, other.owner))
        {
            self.report.add(Violation::Overlap {
                cluster,
                owners: owners(),
            });
        }
    }

    fn leak(&mut self, leak: Leak) {
        self.report.leak_count += 1;
        if self.report.leaks.len() < MAX_LEAKS {
            self.report.leaks.push(leak);
        }
    }
}

/// Whether two owners of one cluster can be right, given high enough refcounts.
fn may_share(a: Owner, b: Owner) -> bool {
    match (a, b) {
        // Compressed clusters share host clusters freely.
        (Owner::Compressed(..), Owner::Compressed(..)) => true,
        // Snapshots share L2 tables and data, at the same guest position. No writer of QCOW2 shows one host
        // cluster at two guest positions.
        (Owner::Data(_, a), Owner::Data(_, b)) => a == b,
        (Owner::L2(table_a, a), Owner::L2(table_b, b)) => table_a != table_b && a == b,
        _ => false,
    }
}
