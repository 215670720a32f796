//! The mapping of one layer: L1 in memory, L2 cached by slice, looked up without a lock.
//!
//! Roles: a *directory* says for each L2 table where it lies and which of its slices sit in which frame; the
//! *frames* are a pool of atomic words that never moves or shrinks while the layer is open. A look-up reads the frame's version,
//! its owner and the entry, and then the version again: where it changed, it starts over. So readers write nothing
//! and wait for nobody, and no memory has to be reclaimed. All changes happen under the device's `meta` lock.

use urus_format::{Geometry, GuestCluster, L2Raw};

use crate::limits::Sizes;
use crate::seen::{Way, note};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, OnceLock, Ordering, fence, spin_loop};
use crate::to_usize;

/// Tables per chunk of the rest of it.
const CHUNK: usize = if cfg!(feature = "loom") { 2 } else { 2048 };
/// How often a look-up that meets a changing frame starts over before it counts as a miss.
const LOOKUP_TRIES: u32 = if cfg!(feature = "loom") { 2 } else { 64 };
/// Frames per chunk of the pool.
const FRAME_CHUNK: usize = if cfg!(feature = "loom") { 2 } else { 64 };

/// A slice of the layer's L2 tables: `l1_index * slices_per_table + slice`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SliceId(pub(crate) u64);

/// What a look-up found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// No L2 table covers the cluster.
    NoTable,
    /// The entry, as on disk.
    Entry(L2Raw),
    /// The slice is not cached.
    Miss(SliceId),
}

struct TableSlot {
    /// The L1 entry as it would stand on disk, in host byte order.
    l1: AtomicU64,
    /// Frame number + 1 of each slice; 0 where it is not cached.
    frames: OnceLock<Box<[AtomicU32]>>,
}

/// Made when the first of its tables is set.
type Chunk = OnceLock<Box<[TableSlot]>>;

impl TableSlot {
    fn lot(count: usize) -> Box<[Self]> {
        (0..count)
            .map(|_| Self {
                l1: AtomicU64::new(0),
                frames: OnceLock::new(),
            })
            .collect()
    }
}

struct Frame {
    /// Odd while the frame changes hands.
    version: AtomicU64,
    /// Slice id + 1; 0 when free.
    owner: AtomicU64,
    /// Looked up since the clock hand passed.
    used: AtomicBool,
    words: Box<[AtomicU64]>,
}

/// L1 and the cached parts of L2.
pub(crate) struct Map {
    geometry: Geometry,
    slice_bits: u32,
    /// log2 of the slices of a table.
    table_bits: u32,
    /// The directory: the first tables, as many as the image had when it was opened…
    near: Box<[TableSlot]>,
    /// …and those of a large image, or one that has grown, by chunks.
    far: OnceLock<Box<[Chunk]>>,
    max_tables: usize,
    frames: Box<[OnceLock<Box<[Frame]>>]>,
}

impl Map {
    /// A map of `tables` L1 entries that may become `max_tables`, and at most `max_frames` cached slices.
    pub(crate) fn new(
        geometry: Geometry,
        (tables, max_tables): (u64, u64),
        max_frames: usize,
        sizes: &Sizes,
    ) -> Self {
        let slice_bytes = sizes.slice_bytes.min(geometry.cluster_bytes());
        let slice_bits = (slice_bytes / geometry.l2_entry_bytes()).trailing_zeros();
        let lots = |n: usize, per: usize| n.div_ceil(per).max(1);
        Self {
            geometry,
            slice_bits,
            table_bits: geometry.l2_bits() - slice_bits,
            near: TableSlot::lot(to_usize(tables).min(sizes.near_tables)),
            far: OnceLock::new(),
            max_tables: to_usize(max_tables),
            frames: (0..lots(max_frames, FRAME_CHUNK))
                .map(|_| OnceLock::new())
                .collect(),
        }
    }

    /// Entries of a slice.
    pub(crate) fn slice_entries(&self) -> u64 {
        1 << self.slice_bits
    }

    /// Bytes of a slice.
    pub(crate) fn slice_bytes(&self) -> u64 {
        self.slice_entries() * self.geometry.l2_entry_bytes()
    }

    pub(crate) fn slices_per_table(&self) -> u64 {
        1 << self.table_bits
    }

    pub(crate) fn max_tables(&self) -> u64 {
        self.max_tables as u64
    }

    pub(crate) fn slice_of(&self, cluster: GuestCluster) -> SliceId {
        SliceId(cluster.0 >> self.slice_bits)
    }

    pub(crate) fn table_of(&self, slice: SliceId) -> u64 {
        slice.0 >> self.table_bits
    }

    /// Bytes from the start of the slice's table to the slice.
    pub(crate) fn offset_in_table(&self, slice: SliceId) -> u64 {
        self.slice_in_table(slice) as u64 * self.slice_bytes()
    }

    /// Neither the first nor the second of its table.
    pub(crate) fn is_later_slice(&self, slice: SliceId) -> bool {
        self.slice_in_table(slice) >= 2
    }

    #[inline]
    fn slice_in_table(&self, slice: SliceId) -> usize {
        to_usize(slice.0 & (self.slices_per_table() - 1))
    }

    #[inline]
    fn slot(&self, l1_index: u64) -> Option<&TableSlot> {
        let index = to_usize(l1_index);
        self.near.get(index).or_else(|| self.far_slot(index))
    }

    fn far_slot(&self, index: usize) -> Option<&TableSlot> {
        let index = index - self.near.len();
        let chunk = self.far.get()?.get(index / CHUNK)?;
        chunk.get().map(|chunk| &chunk[index % CHUNK])
    }

    fn slot_or_new(&self, l1_index: u64) -> &TableSlot {
        let index = to_usize(l1_index);
        if let Some(slot) = self.near.get(index) {
            return slot;
        }
        note(Way::FarTable, || true);
        let index = index - self.near.len();
        let far = self.far.get_or_init(|| {
            let chunks = (self.max_tables - self.near.len()).div_ceil(CHUNK);
            (0..chunks).map(|_| OnceLock::new()).collect()
        });
        let chunk = far[index / CHUNK].get_or_init(|| TableSlot::lot(CHUNK));
        &chunk[index % CHUNK]
    }

    /// The L1 entry, raw.
    pub(crate) fn l1(&self, l1_index: u64) -> u64 {
        self.slot(l1_index)
            .map_or(0, |slot| slot.l1.load(Ordering::Acquire))
    }

    /// Sets the L1 entry. Under the `meta` lock, or before the layer is shared.
    pub(crate) fn set_l1(&self, l1_index: u64, raw: u64) {
        self.slot_or_new(l1_index).l1.store(raw, Ordering::Release);
    }

    #[inline]
    fn frame(&self, number: u32) -> &Frame {
        let index = number as usize;
        let chunk = &self.frames[index / FRAME_CHUNK];
        let chunk = match chunk.get() {
            Some(chunk) => chunk,
            None => self.make_frames(chunk),
        };
        &chunk[index % FRAME_CHUNK]
    }

    #[cold]
    fn make_frames<'a>(&self, chunk: &'a OnceLock<Box<[Frame]>>) -> &'a [Frame] {
        chunk.get_or_init(|| {
            let words = to_usize(self.slice_bytes() / 8);
            (0..FRAME_CHUNK)
                .map(|_| Frame {
                    version: AtomicU64::new(0),
                    owner: AtomicU64::new(0),
                    used: AtomicBool::new(false),
                    words: (0..words).map(|_| AtomicU64::new(0)).collect(),
                })
                .collect()
        })
    }

    /// Finds the entry of a guest cluster. Lock-free; a few nanoseconds on a hit.
    // Twice in the way of a read, for the top of a chain and for what lies below; a call costs as much as a tenth of it.
    #[inline(always)]
    pub(crate) fn lookup(&self, cluster: GuestCluster) -> Lookup {
        let slice = self.slice_of(cluster);
        let Some(slot) = self.slot(self.table_of(slice)) else {
            return Lookup::NoTable;
        };
        if slot.l1.load(Ordering::Acquire) == 0 {
            return Lookup::NoTable;
        }
        let Some(frames) = slot.frames.get() else {
            return Lookup::Miss(slice);
        };
        let place = &frames[self.slice_in_table(slice)];
        match self.try_lookup(place, cluster) {
            Some(found) => found,
            None => self.lookup_again(place, cluster),
        }
    }

    /// Looks into the frame that a directory's place names; `None` where it is just changing.
    #[inline]
    fn try_lookup(&self, place: &AtomicU32, cluster: GuestCluster) -> Option<Lookup> {
        let slice = self.slice_of(cluster);
        let number = place.load(Ordering::Acquire);
        let Some(frame) = number.checked_sub(1).map(|number| self.frame(number)) else {
            return Some(Lookup::Miss(slice));
        };
        let version = frame.version.load(Ordering::Acquire);
        if version & 1 != 0 || frame.owner.load(Ordering::Acquire) != slice.0 + 1 {
            // The frame changes hands, or has done so since the directory was read.
            return None;
        }
        let index = to_usize(cluster.0 & (self.slice_entries() - 1));
        let raw = if self.geometry.l2_entry_bytes() == 8 {
            L2Raw {
                entry: frame.words[index].load(Ordering::Acquire),
                subclusters: 0,
            }
        } else {
            L2Raw {
                entry: frame.words[index * 2].load(Ordering::Acquire),
                subclusters: frame.words[index * 2 + 1].load(Ordering::Acquire),
            }
        };
        fence(Ordering::Acquire);
        if frame.version.load(Ordering::Relaxed) != version {
            return None;
        }
        // Stored only when clear: a hit writes no shared line.
        if !frame.used.load(Ordering::Relaxed) {
            frame.used.store(true, Ordering::Relaxed);
        }
        Some(Lookup::Entry(raw))
    }

    #[cold]
    fn lookup_again(&self, place: &AtomicU32, cluster: GuestCluster) -> Lookup {
        for _ in 1..LOOKUP_TRIES {
            spin_loop();
            if let Some(found) = self.try_lookup(place, cluster) {
                return found;
            }
        }
        // Whoever changes the frame was interrupted in the middle: the slow way waits for the lock instead.
        Lookup::Miss(self.slice_of(cluster))
    }

    /// The frame that holds a slice. Under the `meta` lock.
    pub(crate) fn frame_of(&self, slice: SliceId) -> Option<u32> {
        let frames = self.slot(self.table_of(slice))?.frames.get()?;
        let number = frames[self.slice_in_table(slice)].load(Ordering::Acquire);
        number.checked_sub(1)
    }

    /// Puts a slice into a frame that [`release`](Self::release) has emptied. Under the `meta` lock.
    pub(crate) fn install(&self, frame_number: u32, slice: SliceId, words: &[u64]) {
        note(Way::SecondFrameChunk, || {
            frame_number as usize >= FRAME_CHUNK
        });
        let frame = self.frame(frame_number);
        debug_assert_eq!(words.len(), frame.words.len());
        let version = frame.version.load(Ordering::Relaxed);
        frame.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, value) in frame.words.iter().zip(words) {
            word.store(*value, Ordering::Relaxed);
        }
        frame.owner.store(slice.0 + 1, Ordering::Relaxed);
        frame.used.store(true, Ordering::Relaxed);
        frame.version.store(version + 2, Ordering::Release);
        let slot = self.slot_or_new(self.table_of(slice));
        let frames = slot.frames.get_or_init(|| {
            (0..self.slices_per_table())
                .map(|_| AtomicU32::new(0))
                .collect()
        });
        frames[self.slice_in_table(slice)].store(frame_number + 1, Ordering::Release);
    }

    /// Takes a frame away from the slice that it holds. Under the `meta` lock.
    pub(crate) fn release(&self, frame_number: u32) {
        let frame = self.frame(frame_number);
        let Some(slice) = self.owner_of(frame_number) else {
            return;
        };
        if let Some(frames) = self
            .slot(self.table_of(slice))
            .and_then(|slot| slot.frames.get())
        {
            frames[self.slice_in_table(slice)].store(0, Ordering::Release);
        }
        let version = frame.version.load(Ordering::Relaxed);
        frame.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        frame.owner.store(0, Ordering::Relaxed);
        frame.version.store(version + 2, Ordering::Release);
    }

    /// The slice that a frame holds. Under the `meta` lock.
    pub(crate) fn owner_of(&self, frame_number: u32) -> Option<SliceId> {
        let owner = self.frame(frame_number).owner.load(Ordering::Relaxed);
        owner.checked_sub(1).map(SliceId)
    }

    /// Whether the frame was looked up since this was last asked.
    pub(crate) fn take_used(&self, frame_number: u32) -> bool {
        self.frame(frame_number).used.swap(false, Ordering::Relaxed)
    }

    /// Sets an entry in a cached slice. Under the `meta` lock.
    pub(crate) fn store(&self, frame_number: u32, cluster: GuestCluster, raw: L2Raw) {
        let frame = self.frame(frame_number);
        let index = to_usize(cluster.0 & (self.slice_entries() - 1));
        if self.geometry.l2_entry_bytes() == 8 {
            frame.words[index].store(raw.entry, Ordering::SeqCst);
        } else {
            // Two words change together: readers of the old version start over.
            let version = frame.version.load(Ordering::Relaxed);
            frame.version.store(version + 1, Ordering::Relaxed);
            fence(Ordering::Release);
            frame.words[index * 2].store(raw.entry, Ordering::Relaxed);
            frame.words[index * 2 + 1].store(raw.subclusters, Ordering::Relaxed);
            frame.version.store(version + 2, Ordering::SeqCst);
        }
    }

    /// The bytes of a cached slice as they belong on disk. Under the `meta` lock.
    pub(crate) fn frame_bytes(&self, frame_number: u32) -> Vec<u8> {
        let frame = self.frame(frame_number);
        let mut bytes = Vec::with_capacity(frame.words.len() * 8);
        for word in &frame.words {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_be_bytes());
        }
        bytes
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    /// Tables on both sides of the directory's seam, and of that between two chunks.
    #[test]
    fn a_table_is_found_wherever_the_directory_has_it() {
        const NEAR: usize = 1 << 10;
        let sizes = Sizes {
            near_tables: NEAR,
            ..Sizes::default()
        };
        let most = (NEAR + 3 * CHUNK) as u64;
        for tables in [0, 1, 3, NEAR as u64, most] {
            let map = Map::new(Geometry::new(9, 4, 8, 3), (tables, most), 1, &sizes);
            let near = tables.min(NEAR as u64);
            let places = [0, 2, near.saturating_sub(1), near, near + 1]
                .into_iter()
                .chain([near + CHUNK as u64 - 1, near + CHUNK as u64, most - 1]);
            let places: std::collections::BTreeSet<u64> = places.collect();
            assert_eq!(map.max_tables(), most);
            for place in &places {
                assert_eq!(map.l1(*place), 0, "{place} of {tables}");
            }
            for place in &places {
                map.set_l1(*place, place << 9 | 1);
            }
            for place in places.iter().copied().chain([most, u64::MAX >> 9]) {
                let expected = if places.contains(&place) {
                    place << 9 | 1
                } else {
                    0
                };
                assert_eq!(map.l1(place), expected, "{place} of {tables}");
            }
        }
    }
}
