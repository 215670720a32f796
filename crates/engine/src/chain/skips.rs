//! For long chains: which layer of the backing files is the first that has something for a part of the disk.
//!
//! Backing files are opened read-only and do not change while the device is open, so what was once found stays true, and a walk can
//! begin there. Nothing else is remembered: the layer itself is looked at each time. The table is bounded, and an entry makes room
//! for a younger one of the same place; each is one word, so that a reader sees all of it or none.

use crate::chain::Layer;
use crate::seen::{Way, note};
use crate::sync::{Arc, AtomicU64, OnceLock, Ordering};
use crate::to_usize;

/// Entries made at a time.
const CHUNK: usize = 4096;
/// Bits of an entry that hold the layer; above them are those of the part's number that its place does not tell, plus 1.
const LAYER_BITS: u32 = 16;

/// What was found, for all queues.
pub(crate) struct Skips {
    /// log2 of a part: the smallest cluster of all backing files, so that no layer has something for half of one.
    unit_bits: u32,
    /// log2 of the places: a part's is the low bits of its number.
    place_bits: u32,
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl Skips {
    /// For a chain; none where there is nothing to skip. The layers below the top have the numbers from 0 on.
    pub(crate) fn of(top: &Layer, backing: &[Arc<Layer>], most: u64) -> Option<Self> {
        if backing.len() < 2 || backing.len() >= 1 << LAYER_BITS {
            return None;
        }
        let backing = backing.iter().filter_map(|layer| layer.qcow2());
        let unit_bits = backing.map(|layer| layer.geometry.cluster_bits()).min();
        unit_bits.map(|bits| Self::new(bits, top.size(), most))
    }

    /// At most `most` entries, a power of two.
    fn new(unit_bits: u32, size: u64, most: u64) -> Self {
        let units = size.max(1).div_ceil(1 << unit_bits);
        let entries = to_usize(units.min(most));
        let chunks = entries.div_ceil(CHUNK).next_power_of_two();
        Self {
            unit_bits,
            place_bits: (chunks * CHUNK).min(to_usize(most)).trailing_zeros(),
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
        }
    }

    /// First byte after the part that holds `offset`.
    pub(crate) fn end_of(&self, offset: u64) -> u64 {
        ((offset >> self.unit_bits) + 1) << self.unit_bits
    }

    fn place(&self, offset: u64) -> (usize, u64) {
        let (unit, bits) = (offset >> self.unit_bits, self.place_bits);
        (to_usize(unit & ((1 << bits) - 1)), (unit >> bits) + 1)
    }

    /// The first layer below the top, from 0 on, that is not known to have nothing for this part.
    pub(crate) fn first(&self, offset: u64) -> usize {
        let (place, tag) = self.place(offset);
        let Some(chunk) = self.chunks[place / CHUNK].get() else {
            return 0;
        };
        let word = chunk[place % CHUNK].load(Ordering::Relaxed);
        if word >> LAYER_BITS == tag {
            to_usize(word & ((1 << LAYER_BITS) - 1))
        } else {
            0
        }
    }

    /// All layers below the top, up to this one, have nothing for any byte of this part, and none of them ends before the part does.
    pub(crate) fn learn(&self, offset: u64, layer: usize) {
        let (place, tag) = self.place(offset);
        let chunk = self.chunks[place / CHUNK]
            .get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        note(Way::SkipReplaced, || {
            let old = chunk[place % CHUNK].load(Ordering::Relaxed);
            old != 0 && old >> LAYER_BITS != tag
        });
        chunk[place % CHUNK].store(tag << LAYER_BITS | layer as u64, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::limits;

    /// What is remembered is of that part alone, also where two parts share a place.
    #[test]
    fn an_entry_is_believed_for_its_own_part_only() {
        for most in [limits::SKIPS_MAX, 4] {
            believed_for_its_own_part(most);
        }
    }

    fn believed_for_its_own_part(most: u64) {
        let skips = Skips::new(16, 1 << 50, most);
        let around = most << 16;
        let parts = [0, 1 << 16, 4095 << 16, 4096 << 16, around - 1];
        let places: BTreeSet<_> = parts.map(|at| at >> 16 & (most - 1)).into();
        if places.len() < parts.len() {
            // Only the youngest of a place is remembered.
            for at in parts {
                skips.learn(at, 7);
                assert_eq!(skips.first(at), 7);
                assert_eq!(skips.first(at ^ 1 << 40), 0);
            }
            return;
        }
        for at in parts {
            assert_eq!(skips.first(at), 0);
            skips.learn(at, 7);
            assert_eq!(skips.first(at), 7);
            // The same place, another part.
            assert_eq!(skips.first(at + around), 0);
            assert_eq!(skips.first(at + 5 * around), 0);
        }
        skips.learn((1 << 16) + around, 3);
        assert_eq!(skips.first((1 << 16) + around), 3);
        assert_eq!(skips.first(1 << 16), 0);
        assert_eq!(skips.first((1 << 16) - 1), 7);
        assert_eq!(skips.first((2 << 16) - 1), 0);
        // The last byte that any disk can have.
        let last = i64::MAX as u64;
        skips.learn(last, 65535);
        assert_eq!(skips.first(last), 65535);
    }

    #[test]
    fn parts_end_where_the_next_begins() {
        let skips = Skips::new(9, 1 << 20, limits::SKIPS_MAX);
        assert_eq!(skips.end_of(0), 512);
        assert_eq!(skips.end_of(511), 512);
        assert_eq!(skips.end_of(512), 1024);
    }

    /// A small disk needs no more than one chunk, and a large one no more than the bound.
    #[test]
    fn the_table_is_bounded() {
        let chunks = |bits, size| Skips::new(bits, size, limits::SKIPS_MAX).chunks.len();
        assert_eq!(chunks(16, 0), 1);
        assert_eq!(chunks(16, 1 << 30), 4);
        assert_eq!(chunks(9, 1 << 62) * CHUNK, to_usize(limits::SKIPS_MAX));
    }
}
