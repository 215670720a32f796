//! Judges the entries of L1 and L2 tables.

use super::counts::MAP_ENTRY_BYTES;
use super::walk::{L1Owner, L1Use, L2Use, Role, Walked, words};

/// Refcount exactly one (bit 63).
pub(super) const COPIED: u64 = 1 << 63;
/// A compressed cluster (bit 62 of an L2 entry).
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Reads as zeroes (bit 0 of a standard L2 entry).
pub(super) const ZERO: u64 = 1;
/// The host offset: bits 9 to 55.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Where an L2 entry stands.
struct Place<'a> {
    table: u64,
    index: u64,
    l2: &'a L2Use,
    /// Guest offset of the cluster.
    guest: u64,
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            table,
            index,
            guest,
            ..
        } = self;
        write!(
            f,
            "L2 table at {table:#x}, entry {index} (guest offset {guest:#x}"
        )?;
        match self.l2.first.0 {
            L1Owner::Active => f.write_str(")"),
            L1Owner::Snapshot(number) => write!(f, " of snapshot number {number})"),
        }
    }
}

/// An L2 entry.
#[derive(Clone, Copy)]
struct Words {
    entry: u64,
    /// Subclusters allocated (low half) and zero (high half); 0 in standard entries.
    bitmap: u64,
}

impl Walked {
    pub(super) fn l1_entry(&mut self, l1: &L1Use, index: u64, entry: u64) {
        let times = l1.references;
        let place = || match l1.owner {
            L1Owner::Active => format!("active L1 table, entry {index}"),
            L1Owner::Snapshot(number) => {
                format!("L1 table of snapshot number {number}, entry {index}")
            }
        };
        if entry & L1_RESERVED != 0 {
            self.report.corruption(times, || {
                format!("{}: reserved bits are set in {entry:#018x}", place())
            });
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            if entry & COPIED != 0 {
                self.report
                    .corruption(times, || format!("{}: COPIED without an offset", place()));
            }
            return;
        }
        let bytes = self.geometry.cluster_bytes();
        let followed = self.refer(offset, bytes, times, || {
            format!("the L2 table of {}", place())
        });
        if l1.owner == L1Owner::Active {
            self.check_copied(offset, entry, 1, place);
        }
        if self.geometry.in_cluster(offset) != 0 {
            self.lose(times, || {
                format!("{}: the offset {offset:#x} is not cluster-aligned", place())
            });
        } else if followed {
            self.own(Role::L2, offset, bytes, times);
            let active = u64::from(l1.owner == L1Owner::Active);
            let found = L2Use {
                references: 0,
                active: 0,
                first: (l1.owner, index),
            };
            let l2 = self.l2.entry(offset).or_insert_with(|| {
                self.counts.charge(MAP_ENTRY_BYTES);
                found
            });
            l2.references += times;
            l2.active += active;
        }
    }

    /// O10: COPIED where the refcount is 1, and nowhere else.
    fn check_copied(&mut self, offset: u64, entry: u64, times: u64, place: impl Fn() -> String) {
        let cluster = offset >> self.geometry.cluster_bits();
        let copied = entry & COPIED != 0;
        let single = self.singles.contains(cluster);
        if copied == single {
            return;
        }
        self.copied_findings += times;
        if copied {
            let text = || {
                format!(
                    "{}: COPIED, but the refcount of cluster {cluster} is not 1",
                    place()
                )
            };
            self.report.corruption(times, text);
        } else {
            self.report.copied_clear_at_one += times;
            let text = || {
                format!(
                    "{}: not COPIED, but the refcount of cluster {cluster} is 1",
                    place()
                )
            };
            self.report.corruption(times, text);
        }
    }

    pub(super) fn l2_table(&mut self, offset: u64, l2: &L2Use, table: &[u8]) {
        let extended = self.geometry.l2_entry_bytes() == 16;
        let mut entries = words(table);
        // Where the data of the next allocated cluster would have to lie to follow the last one's.
        let mut next_host = None;
        for index in 0..self.geometry.l2_entries() {
            let entry = entries.next().unwrap_or(0);
            let bitmap = if extended {
                entries.next().unwrap_or(0)
            } else {
                0
            };
            if entry == 0 && bitmap == 0 {
                continue;
            }
            if self.counts.is_full() {
                return;
            }
            let l1_index = l2.first.1;
            let guest =
                ((l1_index << self.geometry.l2_bits()) + index) << self.geometry.cluster_bits();
            let place = Place {
                table: offset,
                index,
                l2,
                guest,
            };
            let words = Words { entry, bitmap };
            if entry & COMPRESSED != 0 {
                self.compressed(&place, words);
            } else {
                self.standard(&place, words, &mut next_host);
            }
        }
    }

    fn compressed(&mut self, place: &Place<'_>, Words { entry, bitmap }: Words) {
        let times = place.l2.references;
        let mut fault = |text: &str| self.report.corruption(times, || format!("{place}: {text}"));
        if entry & COPIED != 0 {
            fault("COPIED on a compressed cluster");
        }
        if bitmap != 0 {
            fault("subclusters in a compressed cluster");
        }
        if self.data_file {
            fault("a compressed cluster in an image with a data file");
        }
        self.report.allocated_clusters += place.l2.active;
        self.report.compressed_clusters += place.l2.active;
        // Each is read by itself, so none follows its neighbour.
        self.report.fragmented_clusters += place.l2.active;
        let offset_bits = 62 - (self.geometry.cluster_bits() - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & !(COPIED | COMPRESSED)) >> offset_bits;
        let bytes = (more_sectors + 1) * 512 - offset % 512;
        self.refer(offset, bytes, times, || {
            format!("the compressed data of {place}")
        });
    }

    fn standard(&mut self, place: &Place<'_>, words: Words, next_host: &mut Option<u64>) {
        let Words { entry, bitmap } = words;
        let times = place.l2.references;
        let active = place.l2.active;
        let offset = entry & OFFSET_MASK;
        let copied = entry & COPIED != 0;
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        let mut fault = |text: &str| {
            self.report
                .corruption(times, || format!("{place}: {text} ({entry:#018x})"));
        };
        if entry & L2_RESERVED != 0 {
            fault("reserved bits are set");
        }
        if allocated & zero != 0 {
            fault("a subcluster both allocated and zero");
        }
        if entry & ZERO != 0 && !self.geometry.has_zero_flag() {
            self.undefined_zeroes += times;
        }
        let plain_zero = entry & ZERO != 0 && offset == 0;
        if offset == 0 && !(self.data_file && copied) {
            if allocated != 0 {
                fault("subclusters allocated without an offset");
            }
            // COPIED says nothing here, and harms nobody: the cluster is not allocated.
            return;
        }
        if plain_zero {
            return;
        }

        self.report.allocated_clusters += active;
        if next_host.is_some_and(|next| next != offset) {
            self.report.fragmented_clusters += active;
        }
        *next_host = Some(offset + self.geometry.cluster_bytes());
        if self.geometry.in_cluster(offset) != 0 {
            self.lose(times, || {
                format!("{place}: the offset {offset:#x} is not cluster-aligned")
            });
        }
        if self.data_file {
            // It has no refcounts: each of its clusters belongs to one guest cluster, always.
            if !copied && active != 0 {
                self.copied_findings += active;
                self.report.corruption(active, || {
                    format!("{place}: not COPIED, in an image with a data file")
                });
            }
            return;
        }
        let bytes = self.geometry.cluster_bytes();
        self.refer(offset, bytes, times, || format!("the data of {place}"));
        if active != 0 {
            self.check_copied(offset, entry, active, || place.to_string());
        }
    }
}
