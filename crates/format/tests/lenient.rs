//! Headers that can be shown and not used: what is wrong is told, and the rest is there. Guards `info`, which must
//! answer for every image that it can understand, and the strictness of everything else.

use urus_format::create::{CreateOptions, layout};
use urus_format::{BackingName, BitmapsExtension, Error, FaultKind, Header, HostOffset, autoclear};

const FILE_BYTES: u64 = 1 << 20;

fn image() -> Header {
    let options = CreateOptions {
        backing: Some(BackingName {
            name: b"base.img".to_vec(),
            format: Some("raw".to_owned()),
        }),
        ..CreateOptions::new(1 << 30)
    };
    layout(&options).unwrap().header
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Both ways of parsing: the faults that the lenient one tells, of which the strict one gives the first.
fn parse(cluster0: &[u8]) -> (Header, Vec<FaultKind>) {
    let (header, faults) = Header::parse_leniently(cluster0, FILE_BYTES).unwrap();
    let strict = Header::parse(cluster0, FILE_BYTES);
    match faults.first() {
        None => assert_eq!(strict.as_ref(), Ok(&header)),
        Some(fault) => assert_eq!(strict.as_ref(), Err(&fault.error)),
    }
    (header, faults.iter().map(|fault| fault.kind).collect())
}

/// QEMU of 2009 wrote `qcow2` and three NULs. They end the name; what follows them makes it another name.
#[test]
fn a_backing_format_is_padded_with_nuls() {
    for version in [2u32, 3] {
        let start = if version == 2 { 72 } else { 112 };
        for (stored, format, kinds) in [
            (&b"qcow2\0\0\0"[..], Some("qcow2"), &[][..]),
            (b"raw\0", Some("raw"), &[]),
            (b"qcow2\0\0\0\0\0\0\0\0\0\0\0\0\0\0", Some("qcow2"), &[]),
            (b"\0\0\0\0", None, &[]),
            (b"", None, &[]),
            (b"raw\0qcow2", Some("raw\0qcow2"), &[FaultKind::Name]),
            (b"\0raw", Some("\0raw"), &[FaultKind::Name]),
            (b"\xffraw", Some("\u{fffd}raw"), &[FaultKind::Name]),
            (
                b"0123456789abcdef",
                Some("0123456789abcdef"),
                &[FaultKind::Name],
            ),
        ] {
            let header = Header {
                feature_names: Vec::new(),
                backing: None,
                ..layout(&CreateOptions {
                    version,
                    ..CreateOptions::new(1 << 30)
                })
                .unwrap()
                .header
            };
            let mut bytes = header.encode().unwrap();
            put(&mut bytes, start, &0xe279_2acau32.to_be_bytes());
            bytes[start + 7] = u8::try_from(stored.len()).unwrap();
            put(&mut bytes, start + 8, stored);
            put(&mut bytes, 8, &200u64.to_be_bytes());
            put(&mut bytes, 16, &4u32.to_be_bytes());
            put(&mut bytes, 200, b"base");
            let (parsed, told) = parse(&bytes);
            let backing = parsed.backing.unwrap();
            assert_eq!(backing.name, b"base");
            assert_eq!(backing.format.as_deref(), format, "{stored:?}");
            assert_eq!(told, kinds, "{stored:?}");
        }
    }
}

/// Names that nobody opens are shown.
#[test]
fn names_with_nuls_are_told() {
    let mut bytes = image().encode().unwrap();
    let at = usize::try_from(u64::from_be_bytes(bytes[8..16].try_into().unwrap())).unwrap();
    bytes[at + 4] = 0;
    let (header, kinds) = parse(&bytes);
    assert_eq!(header.backing.unwrap().name, b"base\0img");
    assert_eq!(kinds, [FaultKind::Name]);
}

/// Tables that are gone, or cannot be: sizes, names and formats are known all the same.
#[test]
fn damaged_tables_are_told() {
    let whole = image().encode().unwrap();
    for (at, value, kinds) in [
        // A refcount table, and an L1 table, past the end of the file.
        (48, &FILE_BYTES.to_be_bytes()[..], &[FaultKind::Missing][..]),
        (40, &(FILE_BYTES * 8).to_be_bytes(), &[FaultKind::Missing]),
        // Unaligned, on the header, past what a file can have; too large; too many.
        (48, &0x10001u64.to_be_bytes(), &[FaultKind::Table]),
        (48, &[0; 8], &[FaultKind::Table]),
        (
            40,
            &0xffff_ffff_ffff_0000u64.to_be_bytes(),
            &[FaultKind::Table, FaultKind::Missing],
        ),
        (56, &u32::MAX.to_be_bytes(), &[FaultKind::Table]),
        (36, &u32::MAX.to_be_bytes(), &[FaultKind::Table]),
        (36, &1u32.to_be_bytes(), &[FaultKind::Table]),
        (60, &u32::MAX.to_be_bytes(), &[FaultKind::Table]),
        (24, &u64::MAX.to_be_bytes(), &[FaultKind::Table]),
    ] {
        let mut bytes = whole.clone();
        put(&mut bytes, at, value);
        let (header, told) = parse(&bytes);
        assert_eq!(told, kinds, "{at} {value:x?}");
        assert_eq!(header.backing, image().backing);
        assert_eq!(header.geometry(), image().geometry());
    }
}

/// What of bitmaps makes no sense is not there to be read.
#[test]
fn broken_bitmaps_are_told_and_left_out() {
    let bitmaps = BitmapsExtension {
        count: 1,
        directory_bytes: 64,
        directory: HostOffset(0x5_0000),
    };
    let header = Header {
        bitmaps: Some(bitmaps),
        autoclear: autoclear::BITMAPS,
        feature_names: Vec::new(),
        backing: None,
        ..image()
    };
    let whole = header.encode().unwrap();
    assert_eq!(parse(&whole), (header, Vec::new()));
    for (at, value) in [(123, 0u8), (124, 1), (128, 0xff), (143, 1), (119, 32)] {
        let mut bytes = whole.clone();
        bytes[at] = value;
        let (header, kinds) = parse(&bytes);
        assert_eq!(
            (header.bitmaps, kinds),
            (None, vec![FaultKind::Table]),
            "{at}"
        );
    }
}

/// Without these nothing can be shown.
#[test]
fn unreadable_headers_are_refused() {
    let whole = image().encode().unwrap();
    for (at, value) in [
        (0, 0),
        (7, 4),
        (23, 8),
        (23, 22),
        (99, 7),
        (103, 1),
        (12, 1),
        (117, 0xff),
    ] {
        let mut bytes = whole.clone();
        bytes[at] = value;
        let refused = Header::parse_leniently(&bytes, FILE_BYTES);
        assert!(refused.is_err(), "{at}: {refused:?}");
    }
    let cut = Header::parse_leniently(&whole[..0x8000], 0x8000);
    assert!(matches!(cut, Err(Error::Truncated { .. })), "{cut:?}");
}

/// The disk has whole sectors: as QEMU rounds.
#[test]
fn a_disk_has_whole_sectors() {
    for (size, bytes) in [
        (0, 0),
        (511, 0),
        (1000, 512),
        (1024, 1024),
        (1 << 30, 1 << 30),
    ] {
        assert_eq!(Header { size, ..image() }.disk_bytes(), bytes);
    }
}
