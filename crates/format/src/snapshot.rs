//! The snapshot table (specification: "Snapshots").
//!
//! Entries have a fixed part, extra data, an ID and a name; each starts at a multiple of 8 bytes. The header
//! tells how many there are and not how long they are, so a reader asks [`table_bytes`] how far to read.

use crate::bytes::{be16, be32, be64};
use crate::header::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::{Error, Geometry, HostOffset};

/// Longest extra data of an entry, in bytes.
pub const MAX_EXTRA_BYTES: u32 = 1024;
/// Largest snapshot table, in bytes.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;

const FIXED_BYTES: usize = 40;
/// Extra data known here: VM state size, disk size, instruction count.
const KNOWN_EXTRA_BYTES: usize = 24;
/// Stored where a snapshot has no instruction count.
const NO_ICOUNT: u64 = u64::MAX;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique ID: a string, usually of digits. At most 65535 bytes.
    pub id: Vec<u8>,
    /// Name: at most 65535 bytes.
    pub name: Vec<u8>,
    /// Where the snapshot's L1 table lies. Not checked by parsing: see [`check_l1`](Self::check_l1).
    pub l1_table: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// When it was taken: seconds since 1970.
    pub date_seconds: u32,
    /// When it was taken: nanoseconds of the second.
    pub date_nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of the VM's state, stored past the end of the virtual disk. 0 for none.
    pub vm_state_bytes: u64,
    /// Virtual size in bytes when it was taken; `None` in old images: the size has never changed.
    pub disk_bytes: Option<u64>,
    /// Instructions executed by the guest when it was taken.
    pub icount: Option<u64>,
    /// Extra data behind the known fields, kept.
    pub unknown_extra: Vec<u8>,
}

impl Snapshot {
    /// The ID, made printable.
    #[must_use]
    pub fn id_text(&self) -> String {
        String::from_utf8_lossy(&self.id).into_owned()
    }

    /// The name, made printable.
    #[must_use]
    pub fn name_text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Checks that the L1 table is aligned, not larger than 32 MiB and not on the header. What uses the table
    /// asks before; what only lists snapshots need not.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check_l1(&self, geometry: &Geometry) -> Result<(), Error> {
        let bytes = u64::from(self.l1_entries) * 8;
        if bytes > MAX_L1_BYTES {
            let expected = format!("at most {} (32 MiB)", MAX_L1_BYTES / 8);
            return Err(Error::invalid(
                "l1_size of a snapshot",
                self.l1_entries,
                expected,
            ));
        }
        let highest = i64::MAX.unsigned_abs() - bytes;
        let on_header = self.l1_table.0 == 0 && bytes != 0;
        if geometry.in_cluster(self.l1_table.0) != 0 || self.l1_table.0 > highest || on_header {
            let expected = format!("a cluster behind the header, at most {highest}");
            return Err(Error::invalid(
                "l1_table_offset of a snapshot",
                self.l1_table.0,
                expected,
            ));
        }
        Ok(())
    }
}

/// What is known of a snapshot table's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableBytes {
    /// The table has exactly this length in bytes, and all of it was given.
    Exactly(u64),
    /// It has at least this length in bytes, more than was given. Read on (in steps that at least double what is there, lest
    /// a table of many small entries be scanned many times) and ask again.
    AtLeast(u64),
}

/// How long a table of `count` entries is, of which `prefix` is the start.
///
/// # Errors
/// [`Error::Invalid`] as soon as the prefix shows that the table is not legal: too many entries, too much extra
/// data, more than [`MAX_TABLE_BYTES`].
pub fn table_bytes(prefix: &[u8], count: u32) -> Result<TableBytes, Error> {
    check_count(count)?;
    let mut at = 0;
    for index in 0..count {
        let start = at_next(at);
        let after = u64::from(count - index - 1) * FIXED_BYTES as u64;
        let Some(fixed) = fixed_part(prefix, start) else {
            return at_least(start + FIXED_BYTES as u64 + after);
        };
        at = start + entry_bytes(fixed)?;
        if at > prefix.len() as u64 {
            return at_least(at + after);
        }
        check_length(at)?;
    }
    Ok(TableBytes::Exactly(at))
}

/// Parses a table of `count` entries. `bytes` may go on behind it.
///
/// # Errors
/// [`Error::Truncated`] where `bytes` ends inside the table, else as [`table_bytes`].
pub fn parse_table(bytes: &[u8], count: u32) -> Result<Vec<Snapshot>, Error> {
    check_count(count)?;
    let truncated = |need_bytes| Error::Truncated {
        structure: "the snapshot table",
        need_bytes,
        have_bytes: bytes.len() as u64,
    };
    let mut snapshots = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let start = at_next(at);
        let fixed =
            fixed_part(bytes, start).ok_or_else(|| truncated(start + FIXED_BYTES as u64))?;
        at = start + entry_bytes(fixed)?;
        check_length(at)?;
        let entry = slice(bytes, start, at).ok_or_else(|| truncated(at))?;
        snapshots.push(parse_entry(entry));
    }
    Ok(snapshots)
}

/// The table of these snapshots, as it stands on disk.
///
/// # Errors
/// [`Error::Invalid`] where a limit is passed: the number of snapshots, the table's length, the length of an
/// ID, a name or the extra data; or where there is extra data without a disk size.
pub fn encode_table(snapshots: &[Snapshot]) -> Result<Vec<u8>, Error> {
    let count = snapshots.len() as u64;
    match u32::try_from(count) {
        Ok(count) => check_count(count)?,
        Err(_) => {
            return Err(Error::invalid(
                "nb_snapshots",
                count,
                format!("at most {MAX_SNAPSHOTS}"),
            ));
        }
    }
    let mut out = Vec::new();
    for snapshot in snapshots {
        out.resize(out.len().next_multiple_of(8), 0);
        encode_entry(&mut out, snapshot)?;
        check_length(out.len() as u64)?;
    }
    Ok(out)
}

fn check_count(count: u32) -> Result<(), Error> {
    if count > MAX_SNAPSHOTS {
        return Err(Error::invalid(
            "nb_snapshots",
            count,
            format!("at most {MAX_SNAPSHOTS}"),
        ));
    }
    Ok(())
}

fn check_length(bytes: u64) -> Result<(), Error> {
    if bytes > MAX_TABLE_BYTES {
        let expected = format!("at most {MAX_TABLE_BYTES} (64 MiB)");
        return Err(Error::invalid(
            "length of the snapshot table",
            bytes,
            expected,
        ));
    }
    Ok(())
}

fn at_least(bytes: u64) -> Result<TableBytes, Error> {
    check_length(bytes)?;
    Ok(TableBytes::AtLeast(bytes))
}

/// Where the entry after one that ends at `end` starts.
fn at_next(end: u64) -> u64 {
    end.next_multiple_of(8)
}

fn slice(bytes: &[u8], start: u64, end: u64) -> Option<&[u8]> {
    bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

fn fixed_part(bytes: &[u8], start: u64) -> Option<&[u8]> {
    slice(bytes, start, start + FIXED_BYTES as u64)
}

/// Length of an entry without padding, by its fixed part.
fn entry_bytes(fixed: &[u8]) -> Result<u64, Error> {
    let extra_bytes = be32(fixed, 36);
    if extra_bytes > MAX_EXTRA_BYTES {
        return Err(Error::invalid(
            "extra_data_size of a snapshot",
            extra_bytes,
            format!("at most {MAX_EXTRA_BYTES}"),
        ));
    }
    let id_bytes = be16(fixed, 12);
    let name_bytes = be16(fixed, 14);
    Ok(FIXED_BYTES as u64 + u64::from(extra_bytes) + u64::from(id_bytes) + u64::from(name_bytes))
}

/// Decodes an entry whose slice has exactly [`entry_bytes`].
fn parse_entry(entry: &[u8]) -> Snapshot {
    let (extra, strings) = entry[FIXED_BYTES..].split_at(be32(entry, 36) as usize);
    let (id, name) = strings.split_at(usize::from(be16(entry, 12)));
    let known = |at: usize| (extra.len() >= at + 8).then(|| be64(extra, at));
    Snapshot {
        id: id.to_vec(),
        name: name.to_vec(),
        l1_table: HostOffset(be64(entry, 0)),
        l1_entries: be32(entry, 8),
        date_seconds: be32(entry, 16),
        date_nanoseconds: be32(entry, 20),
        vm_clock_nanoseconds: be64(entry, 24),
        vm_state_bytes: known(0).unwrap_or_else(|| be32(entry, 32).into()),
        disk_bytes: known(8),
        icount: known(16).filter(|&count| count != NO_ICOUNT),
        unknown_extra: extra.get(KNOWN_EXTRA_BYTES..).unwrap_or_default().to_vec(),
    }
}

fn encode_entry(out: &mut Vec<u8>, snapshot: &Snapshot) -> Result<(), Error> {
    let extra = encode_extra(snapshot)?;
    let extra_bytes = length::<u32>(&extra, "extra_data_size of a snapshot", MAX_EXTRA_BYTES)?;
    let longest = u16::MAX.into();
    out.extend_from_slice(&snapshot.l1_table.0.to_be_bytes());
    out.extend_from_slice(&snapshot.l1_entries.to_be_bytes());
    out.extend_from_slice(&length::<u16>(&snapshot.id, "id_str_size", longest)?.to_be_bytes());
    out.extend_from_slice(&length::<u16>(&snapshot.name, "name_size", longest)?.to_be_bytes());
    out.extend_from_slice(&snapshot.date_seconds.to_be_bytes());
    out.extend_from_slice(&snapshot.date_nanoseconds.to_be_bytes());
    out.extend_from_slice(&snapshot.vm_clock_nanoseconds.to_be_bytes());
    // Readers that know the extra data ignore this one.
    let vm_state_bytes = u32::try_from(snapshot.vm_state_bytes).unwrap_or(u32::MAX);
    out.extend_from_slice(&vm_state_bytes.to_be_bytes());
    out.extend_from_slice(&extra_bytes.to_be_bytes());
    out.extend_from_slice(&extra);
    out.extend_from_slice(&snapshot.id);
    out.extend_from_slice(&snapshot.name);
    Ok(())
}

/// All known fields where the disk size is known, as version 3 wants it; else the least that holds the values.
fn encode_extra(snapshot: &Snapshot) -> Result<Vec<u8>, Error> {
    let mut extra = Vec::new();
    if let Some(disk_bytes) = snapshot.disk_bytes {
        extra.extend_from_slice(&snapshot.vm_state_bytes.to_be_bytes());
        extra.extend_from_slice(&disk_bytes.to_be_bytes());
        extra.extend_from_slice(&snapshot.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        extra.extend_from_slice(&snapshot.unknown_extra);
    } else if snapshot.icount.is_some() || !snapshot.unknown_extra.is_empty() {
        let expected = "none in a snapshot without a disk size";
        return Err(Error::invalid(
            "extra data of a snapshot",
            snapshot.unknown_extra.len() as u64,
            expected,
        ));
    } else if snapshot.vm_state_bytes > u32::MAX.into() {
        extra.extend_from_slice(&snapshot.vm_state_bytes.to_be_bytes());
    }
    Ok(extra)
}

fn length<T: TryFrom<usize>>(bytes: &[u8], field: &'static str, longest: u32) -> Result<T, Error> {
    let fault = || Error::invalid(field, bytes.len() as u64, format!("at most {longest}"));
    if bytes.len() > longest as usize {
        return Err(fault());
    }
    T::try_from(bytes.len()).map_err(|_| fault())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        let texts = (
            prop::collection::vec(any::<u8>(), 0..20),
            prop::collection::vec(any::<u8>(), 0..300),
        );
        let sizes = (
            any::<u64>(),
            any::<u64>(),
            any::<Option<u64>>(),
            any::<u64>(),
        );
        let extra = prop::collection::vec(any::<u8>(), 0..40);
        (texts, any::<(u64, u32, u32, u32)>(), sizes, extra).prop_map(
            |((id, name), l1, sizes, extra)| Snapshot {
                id,
                name,
                l1_table: HostOffset(l1.0),
                l1_entries: l1.1,
                date_seconds: l1.2,
                date_nanoseconds: l1.3,
                vm_clock_nanoseconds: sizes.0,
                vm_state_bytes: sizes.1,
                disk_bytes: sizes.2,
                icount: sizes
                    .2
                    .and(Some(sizes.3))
                    .filter(|&count| count != NO_ICOUNT),
                unknown_extra: if sizes.2.is_some() { extra } else { Vec::new() },
            },
        )
    }

    proptest! {
        #[test]
        fn round_trip(snapshots in prop::collection::vec(any_snapshot(), 0..8), tail in 0usize..20) {
            let mut table = encode_table(&snapshots).unwrap();
            let count = u32::try_from(snapshots.len()).unwrap();
            let bytes = table.len() as u64;
            for cut in [0, table.len() / 2, table.len().saturating_sub(1)] {
                if cut == table.len() {
                    continue;
                }
                match table_bytes(&table[..cut], count).unwrap() {
                    TableBytes::AtLeast(more) => prop_assert!(more > cut as u64 && more <= bytes),
                    exactly @ TableBytes::Exactly(_) => prop_assert!(false, "{exactly:?} of {bytes}"),
                }
                let fault = parse_table(&table[..cut], count);
                prop_assert!(matches!(fault, Err(Error::Truncated { .. })), "{fault:?}");
            }
            table.resize(table.len() + tail, 0xff);
            prop_assert_eq!(table_bytes(&table, count).unwrap(), TableBytes::Exactly(bytes));
            prop_assert_eq!(parse_table(&table, count).unwrap(), snapshots);
        }

        /// Arbitrary bytes never panic, and what parses survives a round trip.
        #[test]
        fn hostile(bytes in prop::collection::vec(any::<u8>(), 0..400), small in any::<bool>(), count in 0u32..9) {
            let mut bytes = bytes;
            if small {
                // Makes the lengths plausible, so that entries parse.
                for (at, byte) in bytes.iter_mut().enumerate() {
                    if at % 4 != 3 || *byte > 64 {
                        *byte = 0;
                    }
                }
            }
            let length = table_bytes(&bytes, count);
            if let Ok(snapshots) = parse_table(&bytes, count) {
                prop_assert!(matches!(length, Ok(TableBytes::Exactly(_))));
                let table = encode_table(&snapshots).unwrap();
                prop_assert_eq!(parse_table(&table, count).unwrap(), snapshots);
            }
        }
    }

    #[test]
    fn limits() {
        let fault = |result: Result<Vec<Snapshot>, Error>| match result {
            Err(Error::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(fault(parse_table(&[], MAX_SNAPSHOTS + 1)), "nb_snapshots");
        let mut entry = [0; FIXED_BYTES];
        entry[36..40].copy_from_slice(&(MAX_EXTRA_BYTES + 1).to_be_bytes());
        assert_eq!(
            fault(parse_table(&entry, 1)),
            "extra_data_size of a snapshot"
        );
        // 65536 entries with the longest names pass 64 MiB: known long before they are read.
        let mut long = vec![0; 700 * 131_112];
        for entry in long.chunks_exact_mut(131_112) {
            entry[12..16].fill(0xff);
        }
        assert!(matches!(
            table_bytes(&long, 700),
            Err(Error::Invalid { .. })
        ));
        assert_eq!(
            fault(parse_table(&long, 700)),
            "length of the snapshot table"
        );
    }

    fn small(id: &[u8], name: &[u8], disk_bytes: Option<u64>) -> Snapshot {
        Snapshot {
            id: id.to_vec(),
            name: name.to_vec(),
            l1_table: HostOffset(0x1_0000),
            l1_entries: 1,
            date_seconds: 2,
            date_nanoseconds: 3,
            vm_clock_nanoseconds: 4,
            vm_state_bytes: 5,
            disk_bytes,
            icount: None,
            unknown_extra: Vec::new(),
        }
    }

    /// What is said of a table's length is all that can be known of it, and no more.
    #[test]
    fn how_far_to_read_is_exact() {
        let table = encode_table(&[
            small(b"1", b"one", None),
            small(b"2", b"", Some(9)),
            small(b"", b"three", None),
        ])
        .unwrap();
        // Lengths 44, 65 and 45; the entries start at 0, 48 and 120.
        assert_eq!(table.len(), 165);
        for cut in 0..=table.len() {
            let expected = match cut {
                0..40 => TableBytes::AtLeast(120),
                40..44 => TableBytes::AtLeast(44 + 80),
                44..88 => TableBytes::AtLeast(48 + 40 + 40),
                88..113 => TableBytes::AtLeast(48 + 65 + 40),
                113..160 => TableBytes::AtLeast(120 + 40),
                160..165 => TableBytes::AtLeast(165),
                _ => TableBytes::Exactly(165),
            };
            assert_eq!(table_bytes(&table[..cut], 3), Ok(expected), "{cut}");
            if cut < table.len() {
                let need_bytes = match cut {
                    0..40 => 40,
                    40..44 => 44,
                    44..88 => 88,
                    88..113 => 113,
                    113..160 => 160,
                    _ => 165,
                };
                let fault = Error::Truncated {
                    structure: "the snapshot table",
                    need_bytes,
                    have_bytes: cut as u64,
                };
                assert_eq!(parse_table(&table[..cut], 3), Err(fault));
            }
        }
        assert_eq!(table_bytes(&[], 0), Ok(TableBytes::Exactly(0)));
        let most = TableBytes::AtLeast(u64::from(MAX_SNAPSHOTS) * 40);
        assert_eq!(table_bytes(&[], MAX_SNAPSHOTS), Ok(most));
        assert!(table_bytes(&[], MAX_SNAPSHOTS + 1).is_err());
    }

    /// The field that a fault names, of the longest that is allowed and of one byte more.
    #[test]
    fn lengths_have_ends() {
        let fault = |snapshots: &[Snapshot]| match encode_table(snapshots) {
            Ok(table) => {
                let count = u32::try_from(snapshots.len()).unwrap();
                assert_eq!(parse_table(&table, count).as_deref(), Ok(snapshots));
                ""
            }
            Err(Error::Invalid { field, .. }) => field,
            Err(other) => panic!("{other:?}"),
        };
        for (bytes, id, name) in [(65_535, "", ""), (65_536, "id_str_size", "name_size")] {
            let text = vec![b'x'; bytes];
            assert_eq!(fault(&[small(&text, b"", None)]), id);
            assert_eq!(fault(&[small(b"", &text, None)]), name);
        }
        for (bytes, expected) in [(1000, ""), (1001, "extra_data_size of a snapshot")] {
            let mut snapshot = small(b"1", b"", Some(1));
            snapshot.unknown_extra = vec![7; bytes];
            assert_eq!(fault(&[snapshot]), expected);
        }
        // A table of 64 MiB: 511 entries of 131112 bytes, and the rest.
        let longest = small(&[b'i'; 65_535], &[b'n'; 65_535], None);
        let longest_bytes = 40 + 2 * 65_535;
        let padded = u64::next_multiple_of(longest_bytes, 8);
        let rest = usize::try_from(MAX_TABLE_BYTES - 511 * padded).unwrap() - 40;
        let id = vec![b'i'; rest.min(65_535)];
        for (more, expected) in [(0, ""), (1, "length of the snapshot table")] {
            let name = vec![b'n'; rest - id.len() + more];
            let mut snapshots = vec![longest.clone(); 511];
            snapshots.push(small(&id, &name, None));
            assert_eq!(fault(&snapshots), expected);
        }
        let many = vec![small(b"", b"", None); MAX_SNAPSHOTS as usize + 1];
        assert_eq!(fault(&many), "nb_snapshots");
        assert_eq!(fault(&many[1..]), "");
    }

    /// What an old image has no room for: it is written at its shortest, or refused.
    #[test]
    fn extra_data_is_written_where_it_is_needed() {
        let bytes = |change: fn(&mut Snapshot)| {
            let mut snapshot = small(b"", b"", None);
            change(&mut snapshot);
            encode_table(&[snapshot]).map(|table| table.len())
        };
        assert_eq!(bytes(|_| {}), Ok(40));
        let most: fn(&mut Snapshot) = |snapshot| snapshot.vm_state_bytes = u32::MAX.into();
        assert_eq!(bytes(most), Ok(40));
        assert_eq!(bytes(|snapshot| snapshot.vm_state_bytes = 1 << 32), Ok(48));
        assert_eq!(bytes(|snapshot| snapshot.disk_bytes = Some(1)), Ok(64));
        for change in [
            (|snapshot| snapshot.icount = Some(1)) as fn(&mut Snapshot),
            |snapshot| snapshot.unknown_extra = vec![1],
        ] {
            let fault = bytes(change).unwrap_err().to_string();
            assert!(fault.starts_with("extra data of a snapshot"), "{fault}");
        }
        let mut large = small(b"7", b"n\xff", None);
        large.vm_state_bytes = 1 << 32;
        let table = encode_table(std::slice::from_ref(&large)).unwrap();
        assert_eq!(parse_table(&table, 1).unwrap(), [large.clone()]);
        assert_eq!(
            (large.id_text(), large.name_text()),
            ("7".into(), "n\u{fffd}".into())
        );
    }

    #[test]
    fn l1_is_judged_on_demand() {
        let geometry = Geometry::new(16, 4, 8, 3);
        let mut table = vec![0; FIXED_BYTES];
        table[11] = 1;
        let mut snapshot = parse_table(&table, 1).unwrap().remove(0);
        assert!(snapshot.check_l1(&geometry).is_err());
        snapshot.l1_table = HostOffset(0x30000);
        assert_eq!(snapshot.check_l1(&geometry), Ok(()));
        snapshot.l1_table = HostOffset(0x30200);
        assert!(snapshot.check_l1(&geometry).is_err());
        snapshot.l1_table = HostOffset(0x30000);
        snapshot.l1_entries = u32::MAX;
        assert!(snapshot.check_l1(&geometry).is_err());
        // The largest table, from the first place where it may lie to the last; what is empty has no place.
        let cluster = geometry.cluster_bytes();
        let last = (i64::MAX.unsigned_abs() - MAX_L1_BYTES) / cluster * cluster;
        let (size, place) = ("l1_size of a snapshot", "l1_table_offset of a snapshot");
        for (entries, table, expected) in [
            (0, 0, ""),
            (1, 0, place),
            (1 << 22, cluster, ""),
            ((1 << 22) + 1, cluster, size),
            (1 << 22, last, ""),
            (1 << 22, last + cluster, place),
            (1, 1 << 63, place),
        ] {
            (snapshot.l1_entries, snapshot.l1_table) = (entries, HostOffset(table));
            let found = match snapshot.check_l1(&geometry) {
                Err(Error::Invalid { field, .. }) => field,
                _ => "",
            };
            assert_eq!(found, expected, "{entries} entries at {table:#x}");
        }
    }
}
