//! The bitmap directory (specification: "Bitmaps"), for showing what an image holds.

use crate::bytes::{be16, be32, be64};
use crate::header::MAX_BITMAPS;
use crate::names::MAX_NAME_BYTES;
use crate::{Error, Geometry, HostOffset};

/// Flags of a directory entry.
pub mod flags {
    /// Not saved properly: its content is unknown.
    pub const IN_USE: u32 = 1 << 0;
    /// Tracks writes from the moment the image is opened.
    pub const AUTO: u32 = 1 << 1;
    /// Who does not know the extra data may still use the bitmap.
    pub const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    /// All flags that the specification defines.
    pub const KNOWN: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// Smallest granularity: 512 bytes.
pub const MIN_GRANULARITY_BITS: u8 = 9;
/// Largest granularity: 2 GiB.
pub const MAX_GRANULARITY_BITS: u8 = 31;
/// Most entries of a bitmap table.
pub const MAX_TABLE_ENTRIES: u32 = 0x0800_0000;

const FIXED_BYTES: usize = 24;
const DIRTY_TRACKING: u8 = 1;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Name: 1 to 1023 bytes, unique in the image.
    pub name: Vec<u8>,
    /// log2 of the guest bytes that one bit stands for: 9 to 31.
    pub granularity_bits: u8,
    /// [`flags`].
    pub flags: u32,
    /// Where the bitmap table lies, cluster-aligned.
    pub table: HostOffset,
    /// Entries of the bitmap table.
    pub table_entries: u32,
    /// Extra data, uninterpreted.
    pub extra: Vec<u8>,
}

impl Bitmap {
    /// The name, made printable.
    #[must_use]
    pub fn name_text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }
}

/// Parses a directory of `count` entries that fills `bytes`.
///
/// # Errors
/// [`Error::Truncated`] where an entry passes the end, [`Error::Invalid`] where bytes are left over or a field
/// is out of its range.
pub fn parse_directory(
    bytes: &[u8],
    count: u32,
    geometry: &Geometry,
) -> Result<Vec<Bitmap>, Error> {
    if count > MAX_BITMAPS {
        return Err(Error::invalid(
            "nb_bitmaps",
            count,
            format!("at most {MAX_BITMAPS}"),
        ));
    }
    let mut bitmaps = Vec::new();
    let mut rest = bytes;
    for _ in 0..count {
        let (bitmap, entry_bytes) =
            parse_entry(rest, geometry).map_err(|fault| in_directory(fault, bytes, rest))?;
        bitmaps.push(bitmap);
        rest = &rest[entry_bytes..];
    }
    if !rest.is_empty() {
        let expected = format!(
            "{}, the length of {count} entries",
            bytes.len() - rest.len()
        );
        return Err(Error::invalid(
            "bitmap_directory_size",
            bytes.len() as u64,
            expected,
        ));
    }
    Ok(bitmaps)
}

/// Counts a truncation from the start of the directory instead of the entry.
fn in_directory(fault: Error, bytes: &[u8], rest: &[u8]) -> Error {
    match fault {
        Error::Truncated {
            structure,
            need_bytes,
            ..
        } => {
            let have_bytes = bytes.len() as u64;
            Error::Truncated {
                structure,
                need_bytes: need_bytes + have_bytes - rest.len() as u64,
                have_bytes,
            }
        }
        other => other,
    }
}

/// The entry at the start of `rest`, and its length with padding.
fn parse_entry(rest: &[u8], geometry: &Geometry) -> Result<(Bitmap, usize), Error> {
    let fixed = prefix(rest, FIXED_BYTES)?;
    let (name_bytes, extra_bytes) = (usize::from(be16(fixed, 18)), be32(fixed, 20) as usize);
    let length = FIXED_BYTES
        .checked_add(extra_bytes)
        .and_then(|sum| sum.checked_add(name_bytes));
    let length = length
        .and_then(|sum| sum.checked_next_multiple_of(8))
        .unwrap_or(usize::MAX);
    let entry = prefix(rest, length)?;
    let (extra, name) =
        entry[FIXED_BYTES..FIXED_BYTES + extra_bytes + name_bytes].split_at(extra_bytes);
    let bitmap = Bitmap {
        name: name.to_vec(),
        granularity_bits: fixed[17],
        flags: be32(fixed, 12),
        table: HostOffset(be64(fixed, 0)),
        table_entries: be32(fixed, 8),
        extra: extra.to_vec(),
    };
    check(&bitmap, fixed[16], geometry)?;
    Ok((bitmap, length))
}

fn prefix(rest: &[u8], bytes: usize) -> Result<&[u8], Error> {
    rest.get(..bytes).ok_or(Error::Truncated {
        structure: "the bitmap directory",
        need_bytes: bytes as u64,
        have_bytes: rest.len() as u64,
    })
}

fn check(bitmap: &Bitmap, kind: u8, geometry: &Geometry) -> Result<(), Error> {
    if kind != DIRTY_TRACKING {
        return Err(Error::invalid(
            "type of a bitmap",
            kind,
            "1 (dirty tracking)",
        ));
    }
    if bitmap.name.is_empty() || bitmap.name.len() > MAX_NAME_BYTES {
        let expected = format!("1 to {MAX_NAME_BYTES}");
        return Err(Error::invalid(
            "name_size of a bitmap",
            bitmap.name.len() as u64,
            expected,
        ));
    }
    if !(MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS).contains(&bitmap.granularity_bits) {
        let expected = format!("{MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}");
        return Err(Error::invalid(
            "granularity_bits of a bitmap",
            bitmap.granularity_bits,
            expected,
        ));
    }
    if bitmap.flags & !flags::KNOWN != 0 {
        return Err(Error::invalid(
            "flags of a bitmap",
            bitmap.flags,
            "bits 0 to 2 only",
        ));
    }
    if bitmap.table_entries == 0 || bitmap.table_entries > MAX_TABLE_ENTRIES {
        let expected = format!("1 to {MAX_TABLE_ENTRIES}");
        return Err(Error::invalid(
            "bitmap_table_size",
            bitmap.table_entries,
            expected,
        ));
    }
    let highest = i64::MAX.unsigned_abs() - u64::from(bitmap.table_entries) * 8;
    if bitmap.table.0 == 0 || geometry.in_cluster(bitmap.table.0) != 0 || bitmap.table.0 > highest {
        let expected = format!("a cluster behind the header, at most {highest}");
        return Err(Error::invalid(
            "bitmap_table_offset",
            bitmap.table.0,
            expected,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(name: &[u8], extra: &[u8]) -> Vec<u8> {
        let mut out = 0x5_0000u64.to_be_bytes().to_vec();
        out.extend_from_slice(&1u32.to_be_bytes());
        out.extend_from_slice(&flags::AUTO.to_be_bytes());
        out.extend_from_slice(&[DIRTY_TRACKING, 16]);
        out.extend_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        out.extend_from_slice(&u32::try_from(extra.len()).unwrap().to_be_bytes());
        out.extend_from_slice(extra);
        out.extend_from_slice(name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    fn geometry() -> Geometry {
        Geometry::new(16, 4, 8, 3)
    }

    #[test]
    fn entries_are_shown() {
        let directory = [entry(b"daily", b""), entry(b"x", b"abc")].concat();
        let bitmaps = parse_directory(&directory, 2, &geometry()).unwrap();
        assert_eq!(bitmaps[0].name_text(), "daily");
        assert_eq!(
            (bitmaps[0].granularity_bits, bitmaps[0].flags),
            (16, flags::AUTO)
        );
        assert_eq!(
            (bitmaps[1].table, bitmaps[1].table_entries),
            (HostOffset(0x50000), 1)
        );
        assert_eq!(bitmaps[1].extra, b"abc");
        assert!(parse_directory(&directory, 1, &geometry()).is_err());
        let have_bytes = directory.len() as u64;
        let fault = Error::Truncated {
            structure: "the bitmap directory",
            need_bytes: have_bytes + 24,
            have_bytes,
        };
        assert_eq!(parse_directory(&directory, 3, &geometry()), Err(fault));
        // Counted from the directory's start, not from the entry's.
        for (missing, need_bytes) in [(10, have_bytes - 8), (2, have_bytes)] {
            let have_bytes = have_bytes - missing;
            let fault = Error::Truncated {
                structure: "the bitmap directory",
                need_bytes,
                have_bytes,
            };
            let cut = &directory[..usize::try_from(have_bytes).unwrap()];
            assert_eq!(parse_directory(cut, 2, &geometry()), Err(fault));
        }
        let left_over = parse_directory(&directory, 1, &geometry()).unwrap_err();
        let expected = format!("{}, the length of 1 entries", entry(b"daily", b"").len());
        assert!(left_over.to_string().ends_with(&expected), "{left_over}");
    }

    #[test]
    fn every_field_is_judged() {
        // (byte, value, field)
        for (at, value, field) in [
            (7, 1, "bitmap_table_offset"),
            (0, 0x80, "bitmap_table_offset"),
            (11, 0, "bitmap_table_size"),
            (8, 9, "bitmap_table_size"),
            (15, 8, "flags of a bitmap"),
            (16, 0, "type of a bitmap"),
            (17, 8, "granularity_bits of a bitmap"),
            (17, 32, "granularity_bits of a bitmap"),
        ] {
            let mut directory = entry(b"daily", b"");
            directory[at] = value;
            match parse_directory(&directory, 1, &geometry()) {
                Err(Error::Invalid { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        // The shortest and the longest name, and what is beyond them.
        for (length, valid) in [(0, false), (1, true), (1023, true), (1024, false)] {
            let parsed = parse_directory(&entry(&vec![b'x'; length], b""), 1, &geometry());
            assert_eq!(parsed.is_ok(), valid, "a name of {length} bytes");
        }
        // The ends of the other ranges.
        for (at, value) in [(17, 9), (17, 31), (15, 7)] {
            let mut directory = entry(b"daily", b"");
            directory[at] = value;
            assert!(parse_directory(&directory, 1, &geometry()).is_ok());
        }
        for (entries, valid) in [(MAX_TABLE_ENTRIES, true), (MAX_TABLE_ENTRIES + 1, false)] {
            let mut directory = entry(b"daily", b"");
            directory[8..12].copy_from_slice(&entries.to_be_bytes());
            assert_eq!(parse_directory(&directory, 1, &geometry()).is_ok(), valid);
        }
        // The last place that the table's end leaves room for, and the cluster after it.
        let last = (i64::MAX.unsigned_abs() - 8) >> 16 << 16;
        for (offset, valid) in [(last, true), (last + 0x1_0000, false)] {
            let mut directory = entry(b"daily", b"");
            directory[..8].copy_from_slice(&offset.to_be_bytes());
            assert_eq!(parse_directory(&directory, 1, &geometry()).is_ok(), valid);
        }
        // The same of the largest table.
        let last = (i64::MAX.unsigned_abs() - u64::from(MAX_TABLE_ENTRIES) * 8) >> 16 << 16;
        for (offset, valid) in [(last, true), (last + 0x1_0000, false)] {
            let mut directory = entry(b"daily", b"");
            directory[..8].copy_from_slice(&offset.to_be_bytes());
            directory[8..12].copy_from_slice(&MAX_TABLE_ENTRIES.to_be_bytes());
            assert_eq!(parse_directory(&directory, 1, &geometry()).is_ok(), valid);
        }
        let most = parse_directory(&[], MAX_BITMAPS, &geometry());
        assert!(matches!(most, Err(Error::Truncated { .. })));
        let too_many = parse_directory(&[], MAX_BITMAPS + 1, &geometry());
        assert!(matches!(
            too_many,
            Err(Error::Invalid {
                field: "nb_bitmaps",
                ..
            })
        ));
    }

    proptest! {
        #[test]
        fn hostile(change in prop::collection::vec((0usize..96, any::<u8>()), 0..6), cut in 0usize..=96, count in 0u32..5) {
            let mut directory = [entry(b"daily", b""), entry(b"weekly", b""), entry(b"y", b"")].concat();
            for (at, value) in change {
                directory[at] = value;
            }
            let _ = parse_directory(&directory[..cut], count, &geometry());
        }
    }
}
