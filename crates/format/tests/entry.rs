//! L1 and L2 entries: every bit pattern decodes to what it says or is refused, and nothing is lost on the way back.

use proptest::prelude::*;
use urus_format::{CompressedExtent, EntryError, Geometry, HostOffset, L1Entry, L2Entry, L2Raw};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

fn geometry() -> Geometry {
    Geometry::new(16, 4, 8, 3)
}

fn decode(entry: u64, geometry: &Geometry) -> Result<L2Entry, EntryError> {
    L2Entry::decode(
        L2Raw {
            entry,
            subclusters: 0,
        },
        geometry,
    )
}

#[test]
fn known_entries() {
    let host = HostOffset(0x5_0000);
    for (raw, entry) in [
        (0, Ok(L2Entry::Unallocated)),
        (1, Ok(L2Entry::Zero)),
        (
            0x5_0001,
            Ok(L2Entry::ZeroAllocated {
                host,
                copied: false,
            }),
        ),
        (COPIED | 0x5_0000, Ok(L2Entry::Data { host, copied: true })),
        (
            0x5_0000,
            Ok(L2Entry::Data {
                host,
                copied: false,
            }),
        ),
        // The refcount of nothing: QEMU calls such an image clean.
        (COPIED, Ok(L2Entry::Unallocated)),
        (COPIED | 1, Ok(L2Entry::Zero)),
        (0x5_0200, Err(EntryError::Unaligned(0x5_0200))),
        (0x5_0002, Err(EntryError::ReservedBits(0x5_0002))),
        (1 << 61, Err(EntryError::ReservedBits(1 << 61))),
    ] {
        assert_eq!(decode(raw, &geometry()), entry, "{raw:#x}");
    }
    // Version 2 does not define the flag. It can mean nothing else, and must not show the cluster.
    let version_2 = Geometry::new(16, 4, 8, 2);
    assert_eq!(decode(1, &version_2), Ok(L2Entry::Zero));
    let copied = false;
    assert_eq!(
        decode(0x5_0001, &version_2),
        Ok(L2Entry::ZeroAllocated { host, copied })
    );
}

#[test]
fn known_l1_entries() {
    let table = HostOffset(0x5_0000);
    let entry = |copied| Ok(Some(L1Entry { table, copied }));
    for (raw, expected) in [
        (0, Ok(None)),
        (0x5_0000, entry(false)),
        (COPIED | 0x5_0000, entry(true)),
        (COPIED, Ok(None)),
        (COPIED | 1, Err(EntryError::ReservedBits(COPIED | 1))),
        (0x5_0200, Err(EntryError::Unaligned(0x5_0200))),
        (0x5_0001, Err(EntryError::ReservedBits(0x5_0001))),
        (0x5_0100, Err(EntryError::ReservedBits(0x5_0100))),
        (1 << 62, Err(EntryError::ReservedBits(1 << 62))),
        (1 << 56, Err(EntryError::ReservedBits(1 << 56))),
    ] {
        assert_eq!(L1Entry::decode(raw, &geometry()), expected, "{raw:#x}");
    }
    let last = L1Entry {
        table: HostOffset(0x00ff_ffff_ffff_0000),
        copied: true,
    };
    assert_eq!(last.encode(), 0x80ff_ffff_ffff_0000);
    assert_eq!(L1Entry::decode(last.encode(), &geometry()), Ok(Some(last)));
}

#[test]
fn faults_show_the_entry() {
    for (fault, expected) in [
        (
            EntryError::ReservedBits(2),
            "reserved bits set in entry 0x0000000000000002",
        ),
        (
            EntryError::Unaligned(0x200),
            "offset of entry 0x0000000000000200 is not cluster-aligned",
        ),
    ] {
        assert_eq!(fault.to_string(), expected);
    }
}

/// The sector count is of *additional* sectors, counted from the one the offset lies in.
#[test]
fn compressed_extents() {
    // 64 KiB clusters: the offset has 54 bits.
    for (offset, bytes, additional, read_bytes) in [
        (0x5_0000, 512, 0, 512),
        (0x5_0000, 513, 1, 1024),
        (0x5_01ff, 1, 0, 1),
        (0x5_01ff, 2, 1, 513),
        (0x5_0010, 65536, 128, 512 - 16 + 128 * 512),
    ] {
        let extent = CompressedExtent {
            offset: HostOffset(offset),
            bytes,
        };
        let raw = L2Entry::Compressed(extent).encode(&geometry()).entry;
        assert_eq!(raw, COMPRESSED | additional << 54 | offset, "{extent:?}");
        let read = CompressedExtent {
            bytes: read_bytes,
            ..extent
        };
        assert_eq!(decode(raw, &geometry()), Ok(L2Entry::Compressed(read)));
    }
    let large = Geometry::new(21, 4, 8, 3);
    let fits = |offset, bytes| {
        CompressedExtent {
            offset: HostOffset(offset),
            bytes,
        }
        .is_encodable(&large)
    };
    assert!(fits((1 << 49) - 1, 2 << 20));
    assert!(!fits(1 << 49, 1) && !fits(0, 0) && !fits(0, (4 << 20) + 1) && !fits(1, 4 << 20));
}

proptest! {
    /// What decodes encodes to the same bits (but for COPIED where it says nothing: on a compressed cluster, and without an
    /// offset).
    #[test]
    fn any_bits(raw in any::<u64>(), sparse in any::<u64>(), bits in 9u32..=21, version in 2u32..=3) {
        let geometry = Geometry::new(bits, 4, 8, version);
        for raw in [raw, raw & sparse, raw & !((1 << bits) - 2) & !(0x3f << 56), raw | COMPRESSED] {
            if let Ok(Some(entry)) = L1Entry::decode(raw, &geometry) {
                prop_assert_eq!(entry.encode(), raw);
            }
            match decode(raw, &geometry) {
                Ok(entry @ L2Entry::Compressed(_)) => {
                    prop_assert_eq!(entry.encode(&geometry).entry, raw & !COPIED);
                }
                Ok(entry @ (L2Entry::Unallocated | L2Entry::Zero)) => {
                    prop_assert_eq!(entry.encode(&geometry).entry, raw & !COPIED);
                }
                Ok(entry) => prop_assert_eq!(entry.encode(&geometry).entry, raw),
                Err(_) => {}
            }
        }
    }
}
