//! A file's bytes, with a hash that costs only what changes, and a journal to undo changes. A clone costs nothing until one of the two changes.

use std::rc::Rc;

use crate::rng::mix;

/// What a disk writes whole or not at all, in bytes.
pub const SECTOR: u64 = 512;
/// The same, for lengths in memory.
pub const SECTOR_BYTES: usize = 512;

/// A change to a file, as a storage operation asks for it.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes at an offset; extends a regular file.
    Write {
        /// Byte offset.
        offset: u64,
        /// The bytes.
        data: Rc<[u8]>,
    },
    /// Zeroes.
    Zero {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether a regular file may become longer.
        extends: bool,
    },
    /// Space reserved: at most the length changes.
    Allocate {
        /// Where it ends: the file's least length afterwards.
        end: u64,
    },
    /// A new length.
    SetLen(u64),
}

/// How much of a [`Change`] reached the disk.
#[derive(Clone, Debug)]
pub enum Keep {
    /// All.
    All,
    /// Nothing.
    Nothing,
    /// Some sectors.
    Sectors {
        /// For each sector that the change touches, in order, whether it did.
        mask: Rc<[bool]>,
        /// Whether the file grew to the end of the whole change, though its last sectors may be lost.
        grown: bool,
    },
}

impl Change {
    /// The first byte that it may change, and the first after it that it cannot.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, data } => (*offset, offset + data.len() as u64),
            Self::Zero { offset, len, .. } => (*offset, offset + len),
            Self::Allocate { end } => (*end, *end),
            Self::SetLen(_) => (0, u64::MAX),
        }
    }

    /// Number of 512-byte sectors that it touches; 0 where it only changes the length.
    #[must_use]
    pub fn sectors(&self) -> usize {
        match self {
            Self::Write { .. } | Self::Zero { .. } => {
                let (start, end) = self.range();
                if start == end {
                    0
                } else {
                    index((end - 1) / SECTOR - start / SECTOR + 1)
                }
            }
            Self::Allocate { .. } | Self::SetLen(_) => 0,
        }
    }

    /// Where a regular file ends at least, afterwards. An empty write changes nothing.
    #[must_use]
    pub fn grows_to(&self) -> Option<u64> {
        match self {
            Self::Write { .. } | Self::Zero { extends: true, .. } => {
                Some(self.range().1).filter(|_| self.sectors() > 0)
            }
            Self::Zero { .. } => None,
            Self::Allocate { end } | Self::SetLen(end) => Some(*end),
        }
    }

    /// Whether the result depends on which of the two comes first.
    #[must_use]
    pub fn conflicts(&self, other: &Self) -> bool {
        let ((a_start, a_end), (b_start, b_end)) = (self.range(), other.range());
        matches!(self, Self::SetLen(_))
            || matches!(other, Self::SetLen(_))
            || (a_start < b_end && b_start < a_end)
    }
}

/// Offsets in simulated files fit memory.
#[allow(clippy::cast_possible_truncation)]
pub(crate) fn index(value: u64) -> usize {
    debug_assert!(usize::try_from(value).is_ok());
    value as usize
}

/// How to take back one step.
#[derive(Clone, Debug)]
enum Undo {
    Bytes {
        at: usize,
        old: Vec<u8>,
        /// Of the sectors that it touched.
        hashes: Vec<u64>,
    },
    Len(usize),
}

/// A file's bytes.
#[derive(Clone, Debug)]
pub struct Contents {
    bytes: Rc<Vec<u8>>,
    /// Of each sector; 0 for zeroes.
    hashes: Rc<Vec<u64>>,
    /// A block device: its length never changes, and what would pass its end is cut.
    fixed: bool,
    /// Their sum.
    sum: u64,
    journal: Option<Vec<Undo>>,
}

/// Hash of a sector in its place; 0 for zeroes, so that growing a file costs nothing.
fn sector_hash(number: usize, sector: &[u8]) -> u64 {
    if sector.len() < SECTOR_BYTES {
        // The last one of the file: as if it were filled up with zeroes.
        let mut whole = [0; SECTOR_BYTES];
        whole[..sector.len()].copy_from_slice(sector);
        return sector_hash(number, &whole);
    }
    let mut lanes = [0u64; 4];
    let mut any = 0;
    for block in sector.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            any |= word;
            *lane = (*lane ^ word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(27);
        }
    }
    if any == 0 {
        return 0;
    }
    lanes
        .iter()
        .fold(mix(number as u64), |hash, lane| mix(hash ^ lane))
}

impl Contents {
    /// A regular file with these bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::with(bytes, false)
    }

    /// A block device with these bytes.
    #[must_use]
    pub fn fixed(bytes: Vec<u8>) -> Self {
        Self::with(bytes, true)
    }

    fn with(bytes: Vec<u8>, fixed: bool) -> Self {
        let sectors = bytes.chunks(SECTOR_BYTES).enumerate();
        let hashes: Vec<u64> = sectors
            .map(|(number, sector)| sector_hash(number, sector))
            .collect();
        let sum = hashes
            .iter()
            .fold(0, |sum: u64, hash| sum.wrapping_add(*hash));
        Self {
            bytes: Rc::new(bytes),
            hashes: Rc::new(hashes),
            fixed,
            sum,
            journal: None,
        }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether the length cannot change.
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// Hash of bytes and length.
    #[must_use]
    pub fn hash(&self) -> u64 {
        mix(self.sum ^ mix(self.len()))
    }

    /// Applies what was kept of a change.
    pub fn apply(&mut self, change: &Change, keep: &Keep) {
        let (mask, grown) = match keep {
            Keep::Nothing => return,
            Keep::All => (None, true),
            Keep::Sectors { mask, grown } => (Some(mask), *grown),
        };
        if let Change::SetLen(len) = change {
            if grown {
                self.set_len(*len);
            }
            return;
        }
        if let Some(end) = change.grows_to().filter(|end| grown && *end > self.len()) {
            self.set_len(end);
        }
        let Some(mask) = mask else {
            let (start, end) = change.range();
            self.apply_range(change, start, end);
            return;
        };
        assert_eq!(
            mask.len(),
            change.sectors(),
            "a mask has one flag for each sector"
        );
        let (start, end) = change.range();
        let first = start / SECTOR;
        let mut run = 0;
        while run < mask.len() {
            let kept = mask[run];
            let next = mask[run..]
                .iter()
                .position(|other| *other != kept)
                .map_or(mask.len(), |n| run + n);
            if kept {
                let from = ((first + run as u64) * SECTOR).max(start);
                let to = ((first + next as u64) * SECTOR).min(end);
                self.apply_range(change, from, to);
            }
            run = next;
        }
    }

    fn apply_range(&mut self, change: &Change, from: u64, to: u64) {
        match change {
            Change::Write { offset, data } => {
                if to > self.len() {
                    self.set_len(to);
                }
                let to = to.min(self.len());
                if from < to {
                    let data = &data[index(from - offset)..index(to - offset)];
                    self.replace(index(from), data.len(), |bytes| bytes.copy_from_slice(data));
                }
            }
            Change::Zero { extends, .. } => {
                if *extends && to > self.len() {
                    self.set_len(to);
                }
                let to = to.min(self.len());
                if from < to {
                    self.replace(index(from), index(to - from), |bytes| bytes.fill(0));
                }
            }
            Change::Allocate { .. } | Change::SetLen(_) => {}
        }
    }

    /// Changes the length (of a regular file).
    pub fn set_len(&mut self, len: u64) {
        if self.fixed {
            return;
        }
        let (old, new) = (self.bytes.len(), index(len));
        if new < old {
            // Zeroed first, so that the hash loses what is cut.
            self.replace(new, old - new, |bytes| bytes.fill(0));
        }
        if let Some(journal) = &mut self.journal {
            journal.push(Undo::Len(old));
        }
        self.resize(new);
    }

    /// Makes a block device longer. What is added reads as anything but zeroes.
    pub fn lengthen(&mut self, len: u64) {
        assert!(self.fixed && len >= self.len(), "a device, and longer");
        let old = self.bytes.len();
        self.resize(index(len));
        self.replace(old, index(len) - old, |bytes| bytes.fill(0xa5));
    }

    /// What is cut off is zero already, as what is added.
    fn resize(&mut self, len: usize) {
        Rc::make_mut(&mut self.bytes).resize(len, 0);
        Rc::make_mut(&mut self.hashes).resize(len.div_ceil(SECTOR_BYTES), 0);
    }

    fn replace(&mut self, at: usize, len: usize, f: impl FnOnce(&mut [u8])) {
        let sectors = at / SECTOR_BYTES..(at + len).div_ceil(SECTOR_BYTES);
        let bytes = Rc::make_mut(&mut self.bytes);
        let hashes = &mut Rc::make_mut(&mut self.hashes)[sectors.clone()];
        if let Some(journal) = &mut self.journal {
            journal.push(Undo::Bytes {
                at,
                old: bytes[at..at + len].to_vec(),
                hashes: hashes.to_vec(),
            });
        }
        f(&mut bytes[at..at + len]);
        let end = bytes.len().min(sectors.end * SECTOR_BYTES);
        let changed = bytes[sectors.start * SECTOR_BYTES..end].chunks(SECTOR_BYTES);
        for ((number, sector), hash) in sectors.zip(changed).zip(hashes) {
            let old = std::mem::replace(hash, sector_hash(number, sector));
            self.sum = self.sum.wrapping_sub(old).wrapping_add(*hash);
        }
    }

    /// From here on, changes can be taken back.
    pub fn start_journal(&mut self) {
        self.journal = Some(Vec::new());
    }

    /// Takes back everything since [`start_journal`](Self::start_journal).
    pub fn undo(&mut self) {
        for undo in self.journal.take().into_iter().flatten().rev() {
            match undo {
                Undo::Bytes { at, old, hashes } => {
                    Rc::make_mut(&mut self.bytes)[at..at + old.len()].copy_from_slice(&old);
                    let place = &mut Rc::make_mut(&mut self.hashes)[at / SECTOR_BYTES..];
                    for (hash, old) in place.iter_mut().zip(hashes) {
                        let new = std::mem::replace(hash, old);
                        self.sum = self.sum.wrapping_sub(new).wrapping_add(old);
                    }
                }
                // What a shorter file lost was zeroed before, and is written back by the step before this one.
                Undo::Len(len) => self.resize(len),
            }
        }
    }
}

impl AsRef<[u8]> for Contents {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn write(offset: u64, len: usize, byte: u8) -> Change {
        Change::Write {
            offset,
            data: vec![byte; len].into(),
        }
    }

    fn random_change(rng: &mut Rng) -> Change {
        let (offset, len) = (rng.below(5000), rng.below(3000));
        match rng.below(6) {
            0 => Change::SetLen(rng.below(9000)),
            1 => Change::Allocate { end: offset + len },
            2 => Change::Zero {
                offset,
                len,
                extends: rng.chance(128),
            },
            #[allow(clippy::cast_possible_truncation)]
            _ => write(offset, index(len), rng.next_u64() as u8),
        }
    }

    fn random_keep(rng: &mut Rng, change: &Change) -> Keep {
        if rng.chance(100) {
            return Keep::All;
        }
        let mask = (0..change.sectors()).map(|_| rng.chance(128)).collect();
        Keep::Sectors {
            mask,
            grown: rng.chance(128),
        }
    }

    /// The running hash is the hash of the bytes, and undoing gives back bytes and hash.
    #[test]
    fn hash_and_journal_agree_with_the_bytes() {
        let mut rng = Rng::new(1);
        for fixed in [false, true] {
            let mut contents = Contents::with(vec![7; 6000], fixed);
            for _ in 0..2000 {
                let before = contents.clone();
                contents.start_journal();
                for _ in 0..rng.below(5) {
                    let change = random_change(&mut rng);
                    contents.apply(&change, &random_keep(&mut rng, &change));
                    let fresh = Contents::with(contents.bytes.to_vec(), fixed);
                    assert_eq!(contents.hashes, fresh.hashes);
                    assert_eq!(contents.hash(), fresh.hash());
                    assert!(!fixed || contents.len() == 6000);
                }
                if rng.chance(128) {
                    contents.undo();
                    assert_eq!(contents.bytes, before.bytes);
                    assert_eq!(contents.hash(), before.hash());
                } else {
                    contents.journal = None;
                }
            }
        }
    }

    #[test]
    fn a_torn_write_keeps_its_sectors_and_no_more() {
        let mut contents = Contents::new(vec![1; 1024]);
        // Touches sectors 0 (its second half), 1, 2 and 3 (its first half).
        let change = write(256, 1536, 2);
        let keep = Keep::Sectors {
            mask: [true, false, true, false].into(),
            grown: false,
        };
        contents.apply(&change, &keep);
        let expected: Vec<u8> = [vec![1; 256], vec![2; 256], vec![1; 512], vec![2; 512]].concat();
        assert_eq!(contents.bytes(), expected);
        let grown = Keep::Sectors {
            mask: [false; 4].into(),
            grown: true,
        };
        contents.apply(&change, &grown);
        assert_eq!(contents.len(), 1792);
        assert!(contents.bytes()[1536..].iter().all(|byte| *byte == 0));
    }
}
