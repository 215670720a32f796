//! What a program that changes an image must leave of its header as it was (O28).

use super::Violation;
use super::layout::{u32_at, u64_at};

/// Fields that may change: first byte, and the one behind the last.
const SIZE: (usize, usize) = (24, 32);
const L1: (usize, usize) = (36, 48);
const REFCOUNT_TABLE: (usize, usize) = (48, 60);
const INCOMPATIBLE: (usize, usize) = (72, 80);
const AUTOCLEAR: (usize, usize) = (88, 96);
/// Dirty and corrupt.
const MAY_CHANGE: u64 = 3;
/// Those that every writer knows.
const KNOWN_AUTOCLEAR: u64 = 3;

/// Compares cluster 0 of an image with what it was before: every byte but the virtual size, the places of the L1 and
/// the refcount table, the dirty and the corrupt bit, and autoclear bits that were cleared.
///
/// # Errors
/// The first byte that has changed, or what has become of the bits.
pub fn header_kept(before: &[u8], after: &[u8]) -> Result<(), Violation> {
    let changed = |why: String| Err(Violation::Header(why));
    let cluster = 1usize << u32_at(before, 20).min(21);
    let (Some(old), Some(new)) = (before.get(..cluster), after.get(..cluster)) else {
        return changed("cluster 0 is cut off".to_owned());
    };
    if old == new {
        return Ok(());
    }
    let v3 = u32_at(before, 4) == 3;
    let fields = [SIZE, L1, REFCOUNT_TABLE, INCOMPATIBLE, AUTOCLEAR];
    // Version 2 ends before the feature bits: its extensions may lie there.
    let fields = &fields[..if v3 { 5 } else { 3 }];
    for (at, (was, is)) in old.iter().zip(new).enumerate() {
        let may = fields.iter().any(|(from, to)| (*from..*to).contains(&at));
        if was != is && !may {
            return changed(format!(
                "byte {at} has become {is:#04x}, and nobody was to change it from {was:#04x}"
            ));
        }
    }
    if v3 {
        let flipped = u64_at(before, 72) ^ u64_at(after, 72);
        if flipped & !MAY_CHANGE != 0 {
            return changed(format!("incompatible bits {flipped:#x} have changed"));
        }
        let (was, is) = (u64_at(before, 88), u64_at(after, 88));
        if is & !was != 0 || (was & !is) & KNOWN_AUTOCLEAR != 0 {
            return changed(format!("autoclear bits {was:#x} have become {is:#x}"));
        }
    }
    Ok(())
}
