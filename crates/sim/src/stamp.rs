//! What the simulated guest writes: each sector says whose it is and which version.

use crate::contents::SECTOR_BYTES;
use crate::rng::mix;

/// What a guest sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Content {
    /// Zeroes.
    Zero,
    /// The stamp of its own address, with this version.
    Version(u64),
    /// The same up to this byte, and zeroes behind it: a file ended in the sector. (The byte is behind the last one that is not zero.)
    Cut(u64, u16),
    /// Anything else: another sector's stamp, a mix of two versions, or no stamp.
    Foreign,
}

impl Content {
    /// Whether the sector is zero from this byte of it on.
    #[must_use]
    pub fn is_zero_from(self, byte: u64) -> bool {
        match self {
            Self::Zero => true,
            Self::Cut(_, end) => u64::from(end) <= byte,
            Self::Version(_) | Self::Foreign => false,
        }
    }
}

/// The pattern repeats within the sector, so that it compresses; each piece has its number, so that a shift within
/// the sector shows.
const PIECE: usize = 32;

fn check(lba: u64, version: u64) -> u64 {
    mix(lba ^ mix(version ^ 0x7572_7573_5374_616d))
}

/// Writes the stamp of a sector.
pub fn stamp(sector: &mut [u8], lba: u64, version: u64) {
    assert_eq!(sector.len(), SECTOR_BYTES, "stamps fill whole sectors");
    let check = check(lba, version);
    for (number, piece) in (0u64..).zip(sector.chunks_exact_mut(PIECE)) {
        for (word, value) in piece.chunks_exact_mut(8).zip([lba, version, check, number]) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Bytes of `count` sectors from `lba` on, all of one version.
#[must_use]
pub fn stamped(lba: u64, count: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; crate::contents::index(count) * SECTOR_BYTES];
    for (lba, sector) in (lba..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
        stamp(sector, lba, version);
    }
    bytes
}

/// What a sector read at `lba` holds.
#[must_use]
pub fn content(sector: &[u8], lba: u64) -> Content {
    // By far the most common, and a plain comparison of memory.
    if sector == [0; SECTOR_BYTES] {
        return Content::Zero;
    }
    match foreign_stamp(sector) {
        Some((found, version)) if found == lba => Content::Version(version),
        Some(_) => Content::Foreign,
        None => cut_stamp(sector, lba),
    }
}

/// Writes what is left of a sector's stamp in a file that ends at this byte of it.
pub fn stamp_until(sector: &mut [u8], lba: u64, version: u64, end: usize) {
    stamp(sector, lba, version);
    sector[end..].fill(0);
}

/// What a sector holds that has no whole stamp.
fn cut_stamp(sector: &[u8], lba: u64) -> Content {
    let end = sector
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    if sector.len() != SECTOR_BYTES || end <= 16 {
        return Content::Foreign;
    }
    let version = u64::from_le_bytes(sector[8..16].try_into().expect("8 bytes"));
    let mut expected = [0; SECTOR_BYTES];
    stamp_until(&mut expected, lba, version, end);
    match u16::try_from(end) {
        Ok(end) if sector == expected => Content::Cut(version, end),
        _ => Content::Foreign,
    }
}

/// Address and version of a whole stamp, wherever it was found (to say whose data showed up).
#[must_use]
pub fn foreign_stamp(sector: &[u8]) -> Option<(u64, u64)> {
    if sector.len() != SECTOR_BYTES {
        return None;
    }
    let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("8 bytes"));
    let (lba, version) = (word(0), word(8));
    if word(16) != check(lba, version) {
        return None;
    }
    let whole = (0u64..)
        .zip(sector.chunks_exact(PIECE))
        .all(|(number, piece)| {
            piece[..PIECE - 8] == sector[..PIECE - 8] && piece[PIECE - 8..] == number.to_le_bytes()
        });
    whole.then_some((lba, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_that_a_file_ends_in_is_told_from_any_other() {
        for end in [24, 100, 488, 504] {
            let mut sector = [0; SECTOR_BYTES];
            stamp_until(&mut sector, 7, 0x0102_0304_0506_0708, end);
            let found = content(&sector, 7);
            assert!(
                matches!(found, Content::Cut(0x0102_0304_0506_0708, at) if usize::from(at) <= end),
                "{end}: {found:?}"
            );
            assert_eq!(content(&sector, 8), Content::Foreign);
            // Cut elsewhere, it is something else.
            let mut shorter = sector;
            let last = sector.iter().rposition(|byte| *byte != 0).unwrap();
            shorter[last] = 0;
            assert_ne!(content(&shorter, 7), found);
            sector[last] ^= 0x80;
            assert_eq!(content(&sector, 7), Content::Foreign);
        }
    }

    #[test]
    fn a_stamp_is_known_only_in_its_place() {
        let bytes = stamped(5, 2, 9);
        assert_eq!(content(&bytes[..512], 5), Content::Version(9));
        assert_eq!(content(&bytes[512..], 6), Content::Version(9));
        assert_eq!(content(&bytes[512..], 5), Content::Foreign);
        assert_eq!(foreign_stamp(&bytes[512..]), Some((6, 9)));
        assert_eq!(content(&[0; 512], 5), Content::Zero);
        // A mix of two versions, one flipped bit, a shift within the sector.
        let mut mixed = stamped(5, 1, 8);
        mixed[256..].copy_from_slice(&bytes[256..512]);
        assert_eq!(content(&mixed, 5), Content::Foreign);
        for at in 0..512 {
            let mut flipped = bytes[..512].to_vec();
            flipped[at] ^= 1;
            assert_eq!(content(&flipped, 5), Content::Foreign, "byte {at}");
        }
        let shifted = [&bytes[32..512], &bytes[..32]].concat();
        assert_eq!(content(&shifted, 5), Content::Foreign);
    }
}
