//! Changing fields of a header on disk (O28). Guards against touching any other byte: another program may have laid
//! the rest out as it liked.

use proptest::prelude::*;
use urus_format::create::{CreateOptions, layout};
use urus_format::{BackingName, Error, FaultKind, Header, HeaderChange, HostOffset};

const SECTOR: usize = HeaderChange::SECTOR_BYTES;
const FILE_BYTES: u64 = 1 << 30;

fn image(version: u32) -> Header {
    let options = CreateOptions {
        version,
        backing: Some(BackingName {
            name: b"base".to_vec(),
            format: Some("raw".to_owned()),
        }),
        ..CreateOptions::new(1 << 30)
    };
    layout(&options).unwrap().header
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// A header as another program may write it: an unknown extension first, no end marker, and the name behind a gap
/// of bytes that mean nothing.
fn foreign(version: u32) -> Vec<u8> {
    let mut bytes = image(version).encode().unwrap();
    let start = if version == 2 { 72 } else { 112 };
    bytes[start..].fill(0);
    bytes[start..start + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    bytes[start + 7] = 5;
    bytes[start + 8..start + 13].copy_from_slice(b"other");
    bytes[start + 16..start + 20].copy_from_slice(&0xe279_2acau32.to_be_bytes());
    bytes[start + 23] = 3;
    bytes[start + 24..start + 27].copy_from_slice(b"raw");
    put64(&mut bytes, 8, start as u64 + 32);
    bytes[start + 32..start + 36].copy_from_slice(b"base");
    bytes[start + 36..SECTOR].fill(0x77);
    bytes
}

fn differing(a: &[u8], b: &[u8]) -> Vec<usize> {
    (0..a.len()).filter(|at| a[*at] != b[*at]).collect()
}

/// Each field in its place, big-endian, in both versions, and nothing else.
#[test]
fn a_change_touches_its_field_and_nothing_else() {
    let place = HostOffset(0x0102_0304_0506_0000);
    for version in [2, 3] {
        let before = foreign(version);
        let header = Header::parse(&before, FILE_BYTES).unwrap();
        for (change, range, expected) in [
            (
                HeaderChange::Size(0x0000_0000_3100_0000),
                24..32,
                &[0, 0, 0, 0, 0x31, 0, 0, 0][..],
            ),
            (
                HeaderChange::L1Table(place, 0x0002_0305),
                36..48,
                &[0, 2, 3, 5, 1, 2, 3, 4, 5, 6, 0, 0],
            ),
            (
                HeaderChange::RefcountTable(place, 3),
                48..60,
                &[1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 3],
            ),
            (
                HeaderChange::Incompatible(0x0100_0000_0000_0001),
                72..80,
                &[1, 0, 0, 0, 0, 0, 0, 1],
            ),
            (
                HeaderChange::Autoclear(0x0100_0000_0000_0002),
                88..96,
                &[1, 0, 0, 0, 0, 0, 0, 2],
            ),
        ] {
            let mut sector = before[..SECTOR].to_vec();
            let result = header.patch(&[change], &mut sector);
            if version == 2 && range.start >= 72 {
                // An extension lies there.
                let told = result.unwrap_err().to_string();
                assert!(told.contains("feature bits"), "{told}");
                assert_eq!(sector, before[..SECTOR]);
                continue;
            }
            let patched = result.unwrap();
            assert_eq!(&sector[range.clone()], expected, "{change:?}");
            let places = differing(&sector, &before[..SECTOR]);
            assert!(places.iter().all(|at| range.contains(at)), "{places:?}");
            let whole = [&sector[..], &before[SECTOR..]].concat();
            let (parsed, faults) = Header::parse_leniently(&whole, FILE_BYTES).unwrap();
            assert_eq!(parsed, patched, "{change:?}");
            assert!(faults.iter().all(|fault| fault.kind == FaultKind::Missing));
        }
    }
}

/// Two programs with one image open for writing: the later one must not put its old picture over the new one.
#[test]
fn what_another_program_changed_is_not_overwritten() {
    let before = foreign(3);
    let header = Header::parse(&before, FILE_BYTES).unwrap();
    let sizes = [HeaderChange::Size(1 << 29)];
    for (at, field) in [(31, "size"), (24, "size"), (0, "version"), (7, "version")] {
        let mut sector = before[..SECTOR].to_vec();
        sector[at] ^= 1;
        let there = sector.clone();
        let fault = header.patch(&sizes, &mut sector).unwrap_err();
        assert_eq!(fault, Error::HeaderChanged { field });
        assert!(fault.to_string().contains("another program"), "{fault}");
        assert_eq!(sector, there);
    }
    // A field that is not to change is the other program's matter.
    let mut sector = before[..SECTOR].to_vec();
    sector[60] ^= 1;
    header.patch(&sizes, &mut sector).unwrap();
}

/// What breaks a limit of the format does not reach the bytes.
#[test]
fn limits_hold_for_changes() {
    let before = foreign(3);
    let header = Header::parse(&before, FILE_BYTES).unwrap();
    for changes in [
        [HeaderChange::Size(1 << 50)],
        [HeaderChange::L1Table(HostOffset(0x5_0000), 1)],
        [HeaderChange::L1Table(HostOffset(0x5_0001), 2)],
        [HeaderChange::RefcountTable(HostOffset(0x5_0000), 1 << 20)],
        [HeaderChange::RefcountTable(HostOffset(0), 1)],
    ] {
        let mut sector = before[..SECTOR].to_vec();
        let result = header.patch(&changes, &mut sector);
        assert!(matches!(result, Err(Error::Invalid { .. })), "{result:?}");
        assert_eq!(sector, before[..SECTOR]);
    }
    let result = header.patch(&[HeaderChange::Size(0)], &mut [0; 511]);
    assert!(matches!(result, Err(Error::Truncated { .. })));
}

proptest! {
    /// All changes at once, over any bytes that the rest of the sector may hold.
    #[test]
    fn all_other_bytes_stay(
        size in 0u64..1 << 39,
        places in any::<(u16, u16)>(),
        bits in any::<(u64, u64)>(),
        noise in prop::collection::vec(any::<u8>(), SECTOR * 8 - 112),
    ) {
        let header = image(3);
        let mut sector = header.encode().unwrap()[..112].to_vec();
        sector.extend_from_slice(&noise);
        let before = sector.clone();
        let place = |number: u16| HostOffset((u64::from(number) + 1) << 16);
        let changes = [
            HeaderChange::Size(size),
            HeaderChange::L1Table(place(places.0), 1 << 11),
            HeaderChange::RefcountTable(place(places.1), 2),
            HeaderChange::Incompatible(bits.0),
            HeaderChange::Autoclear(bits.1),
        ];
        header.patch(&changes, &mut sector).unwrap();
        let fields = [24..32, 36..48, 48..60, 72..80, 88..96];
        for at in differing(&before, &sector) {
            prop_assert!(fields.iter().any(|field| field.contains(&at)), "byte {at}");
        }
    }
}
