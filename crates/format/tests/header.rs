//! The header codec on good, bad and arbitrary cluster 0s. Guards against accepting what a limit forbids, against
//! losing what is not understood, and against panics.

use proptest::prelude::*;
use urus_format::create::{CreateOptions, layout};
use urus_format::header::{HEADER_BYTES_V3_MIN, MAX_L1_BYTES};
use urus_format::names::NameFault;
use urus_format::{
    BackingName, BitmapsExtension, Compression, Error, FeatureKind, FeatureName, Header,
    HostOffset, autoclear, incompatible,
};

const FILE_BYTES: u64 = 1 << 20;

fn header() -> Header {
    layout(&CreateOptions::new(1 << 30)).unwrap().header
}

fn parse(cluster0: &[u8]) -> Result<Header, Error> {
    Header::parse(cluster0, FILE_BYTES)
}

/// The field that a fault names.
fn field(result: Result<Header, Error>) -> &'static str {
    match result {
        Err(Error::Invalid { field, .. } | Error::Name { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

/// A new image's cluster 0, changed.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Result<Header, Error> {
    let mut cluster0 = header().encode().unwrap();
    change(&mut cluster0);
    parse(&cluster0)
}

fn put32(cluster0: &mut [u8], at: usize, value: u32) {
    cluster0[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(cluster0: &mut [u8], at: usize, value: u64) {
    cluster0[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// An extension's bytes, padded.
fn extension(kind: u32, value: &[u8]) -> Vec<u8> {
    let length = u32::try_from(value.len()).unwrap();
    let mut out = [&kind.to_be_bytes()[..], &length.to_be_bytes(), value].concat();
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// A cluster 0 with these extensions instead of the feature-name table.
fn with_extensions(change: impl FnOnce(&mut Header), extensions: &[Vec<u8>]) -> Vec<u8> {
    let mut header = Header {
        feature_names: Vec::new(),
        ..header()
    };
    change(&mut header);
    let mut cluster0 = header.encode().unwrap();
    let area = extensions.concat();
    cluster0[112..112 + area.len()].copy_from_slice(&area);
    cluster0
}

#[test]
fn fields_out_of_range_are_named() {
    let l1_most = u32::try_from(MAX_L1_BYTES / 8).unwrap();
    for (at, value, expected) in [
        (4, 1, "version"),
        (4, 4, "version"),
        (20, 8, "cluster_bits"),
        (20, 22, "cluster_bits"),
        (24, 1, "l1_size"),
        (24, 1 << 20, "size"),
        (36, 1, "l1_size"),
        (36, l1_most + 1, "l1_size"),
        (44, 0x30200, "l1_table_offset"),
        (40, 0x8000_0000, "l1_table_offset"),
        (44, 0, "l1_table_offset"),
        (52, 0x10001, "refcount_table_offset"),
        (48, 0xffff_ffff, "refcount_table_offset"),
        (52, 0, "refcount_table_offset"),
        (56, 129, "refcount_table_clusters"),
        (60, 65537, "nb_snapshots"),
        (60, 1, "snapshots_offset"),
        (68, 512, "snapshots_offset"),
        (96, 7, "refcount_order"),
        (100, 96, "header_length"),
        (100, 108, "header_length"),
        (100, 65544, "header_length"),
        (100, u32::MAX, "header_length"),
        (104, 1 << 24, "compression_type"),
        (12, 8, "backing_file_offset"),
        (12, 65537, "backing_file_offset"),
        (8, 1, "backing_file_offset"),
        (116, 65536, "header extension length"),
        (116, u32::MAX, "header extension length"),
    ] {
        assert_eq!(
            field(changed(|cluster0| put32(cluster0, at, value))),
            expected,
            "{value:#x} at {at}"
        );
    }
}

#[test]
fn every_message_says_what_and_what_was_expected() {
    let fault = changed(|cluster0| put32(cluster0, 20, 22)).unwrap_err();
    assert_eq!(
        fault.to_string(),
        "cluster_bits is 22 (0x16); expected 9 to 21"
    );
    let fault = Header::parse(&header().encode().unwrap(), 0x20000).unwrap_err();
    assert_eq!(
        fault.to_string(),
        "the L1 table is cut off: it needs 196609 bytes and there are 131072"
    );
}

#[test]
fn files_that_are_no_image_or_end_early() {
    let cluster0 = header().encode().unwrap();
    for bytes in [&b""[..], b"QFI", b"\x7fELF", &[0; 512], b"conectix"] {
        assert_eq!(parse(bytes), Err(Error::NotQcow2));
    }
    for length in [4, 71, 72, 103, 104, 65535] {
        let cut = Header::parse(&cluster0[..length], length as u64);
        assert!(
            matches!(cut, Err(Error::Truncated { .. })),
            "{length}: {cut:?}"
        );
    }
    // The table starts must exist; their tails may be missing.
    for (file_bytes, structure) in [(0x10000, "the refcount table"), (0x30000, "the L1 table")] {
        match Header::parse(&cluster0, file_bytes) {
            Err(Error::Truncated {
                structure: found, ..
            }) => assert_eq!(found, structure),
            other => panic!("{other:?}"),
        }
    }
    assert!(Header::parse(&cluster0, 0x30001).is_ok());
    let mut longer = cluster0;
    longer.resize(2 << 20, 0xff);
    assert!(parse(&longer).is_ok());
}

#[test]
fn sizes_need_not_be_aligned() {
    let parsed = changed(|cluster0| put64(cluster0, 24, (1 << 30) - 511)).unwrap();
    assert_eq!(parsed.size, (1 << 30) - 511);
}

#[test]
fn compression_type_and_its_bit_go_together() {
    let bit = |cluster0: &mut Vec<u8>| put64(cluster0, 72, incompatible::COMPRESSION);
    assert_eq!(field(changed(bit)), "compression_type");
    assert_eq!(
        field(changed(|cluster0| cluster0[104] = 1)),
        "compression_type"
    );
    let parsed = changed(|cluster0| {
        bit(cluster0);
        cluster0[104] = 1;
    });
    assert_eq!(parsed.unwrap().compression, Compression::Zstd);
    let unknown = changed(|cluster0| {
        bit(cluster0);
        cluster0[104] = 2;
    });
    assert_eq!(
        unknown,
        Err(Error::Unsupported {
            feature: "compression type 2".into()
        })
    );
}

#[test]
fn extended_l2_needs_clusters_of_16_kib() {
    let mut small = layout(&CreateOptions {
        cluster_bits: 13,
        ..CreateOptions::new(1 << 20)
    })
    .unwrap()
    .header;
    small.incompatible = incompatible::EXTENDED_L2;
    assert!(matches!(
        small.encode(),
        Err(Error::Invalid {
            field: "cluster_bits",
            ..
        })
    ));
    // Its tables map half as much.
    let parsed = Header {
        incompatible: incompatible::EXTENDED_L2,
        l1_entries: 4,
        ..header()
    };
    assert_eq!(parse(&parsed.encode().unwrap()), Ok(parsed.clone()));
    assert!(
        Header {
            l1_entries: 3,
            ..parsed
        }
        .encode()
        .is_err()
    );
}

#[test]
fn unsupported_features_are_shown_and_refused_by_name() {
    let refused = |header: &Header, write: bool| match header.check_supported(write) {
        Ok(()) => String::new(),
        Err(Error::Unsupported { feature }) => feature,
        Err(other) => panic!("{other:?}"),
    };
    let base = header();
    let bitmaps = BitmapsExtension {
        count: 1,
        directory_bytes: 32,
        directory: HostOffset(0x50000),
    };
    for (header, reading, writing) in [
        (base.clone(), "", ""),
        (
            Header {
                incompatible: incompatible::DIRTY,
                ..base.clone()
            },
            "",
            "",
        ),
        (
            Header {
                incompatible: incompatible::CORRUPT,
                ..base.clone()
            },
            "",
            "marked corrupt",
        ),
        (
            Header {
                bitmaps: Some(bitmaps),
                autoclear: autoclear::BITMAPS,
                ..base.clone()
            },
            "",
            "persistent bitmaps",
        ),
        (
            Header {
                crypt_method: 1,
                ..base.clone()
            },
            "AES",
            "AES",
        ),
        (
            Header {
                crypt_method: 2,
                luks: Some((HostOffset(0x50000), 8)),
                ..base.clone()
            },
            "LUKS",
            "LUKS",
        ),
        (
            Header {
                crypt_method: 3,
                ..base.clone()
            },
            "method 3",
            "method 3",
        ),
        (
            Header {
                incompatible: incompatible::DATA_FILE,
                ..base.clone()
            },
            "data file",
            "data file",
        ),
        (
            Header {
                data_file: Some(b"x".to_vec()),
                ..base.clone()
            },
            "data file",
            "data file",
        ),
        (
            Header {
                incompatible: 16,
                l1_entries: 4,
                ..base.clone()
            },
            "extended L2",
            "extended L2",
        ),
        (
            Header {
                incompatible: 1 << 63,
                ..base.clone()
            },
            "incompatible bit 63",
            "incompatible bit 63",
        ),
    ] {
        let parsed = parse(&header.encode().unwrap()).unwrap();
        assert_eq!(parsed, header);
        for (write, expected) in [(false, reading), (true, writing)] {
            let feature = refused(&parsed, write);
            assert_eq!(feature.is_empty(), expected.is_empty(), "{feature}");
            assert!(
                feature.contains(expected),
                "{feature} instead of {expected}"
            );
        }
    }
    let name = FeatureName {
        kind: FeatureKind::Incompatible,
        bit: 5,
        name: b"time \x1btravel".to_vec(),
    };
    let named = Header {
        incompatible: 1 << 5 | 1 << 6,
        feature_names: vec![name],
        ..base.clone()
    };
    let both = "'time \\u{1b}travel' (incompatible bit 5), an unknown feature (incompatible bit 6)";
    let told = refused(&named, false);
    assert!(told.starts_with(both) && told.contains("convert"), "{told}");
    // For a repair such an image parses.
    let broken = Header {
        refcount_table_clusters: 0,
        ..base
    };
    assert!(
        parse(&broken.encode().unwrap())
            .unwrap()
            .check_supported(false)
            .is_err()
    );
}

#[test]
fn what_is_not_understood_is_kept() {
    let header = Header {
        header_bytes: 128,
        unknown_header_bytes: vec![0, 0, 7, 0, 0, 0, 0, 1, 2, 3],
        unknown_extensions: vec![
            (0x1234_5678, b"abc".to_vec()),
            (0x1234_5678, vec![]),
            (9, vec![1; 8]),
        ],
        compatible: 0xf0,
        autoclear: 0xf0,
        incompatible: 0xf00,
        backing: Some(BackingName {
            name: b"../base".to_vec(),
            format: None,
        }),
        ..header()
    };
    let cluster0 = header.encode().unwrap();
    assert_eq!(parse(&cluster0).unwrap(), header);
    let unaware = Header {
        header_bytes: HEADER_BYTES_V3_MIN,
        unknown_header_bytes: vec![],
        ..header
    };
    assert_eq!(parse(&unaware.encode().unwrap()).unwrap(), unaware);
    let zstd = Header {
        compression: Compression::Zstd,
        incompatible: incompatible::COMPRESSION,
        ..unaware
    };
    assert!(zstd.encode().is_err());
}

#[test]
fn extensions_are_judged() {
    let nothing = |_: &mut Header| {};
    let marked = |header: &mut Header| header.autoclear = autoclear::BITMAPS;
    let luks = |header: &mut Header| header.crypt_method = 2;
    let fault = |change: fn(&mut Header), extensions: &[Vec<u8>]| {
        field(parse(&with_extensions(change, extensions)))
    };

    let format = |value: &[u8]| extension(0xe279_2aca, value);
    assert_eq!(
        fault(nothing, &[format(&[b'x'; 16])]),
        "length of the backing format"
    );
    assert_eq!(fault(nothing, &[format(b"ra\0w")]), "backing format");
    assert_eq!(fault(nothing, &[format(b"\xff")]), "backing format");
    assert_eq!(
        fault(nothing, &[format(b"raw"), format(b"qcow2")]),
        "header extension type"
    );
    assert_eq!(
        fault(nothing, &[extension(0x4441_5441, b"a\0b")]),
        "data file name"
    );
    assert_eq!(
        fault(nothing, &[extension(0x4441_5441, b"")]),
        "data file name"
    );
    assert_eq!(
        fault(nothing, &[extension(0x0537_be77, &[0; 16])]),
        "crypt_method"
    );
    assert_eq!(
        fault(luks, &[extension(0x0537_be77, &[0; 15])]),
        "length of the LUKS extension"
    );
    assert_eq!(
        fault(luks, &[extension(0x0537_be77, &[0xff; 16])]),
        "LUKS header length"
    );

    let bitmaps = |count: u32, reserved: u32, bytes: u64, offset: u64| {
        let value = [
            &count.to_be_bytes()[..],
            &reserved.to_be_bytes(),
            &bytes.to_be_bytes(),
            &offset.to_be_bytes(),
        ];
        extension(0x2385_2875, &value.concat())
    };
    assert_eq!(
        fault(marked, &[extension(0x2385_2875, &[0; 23])]),
        "length of the bitmaps extension"
    );
    assert_eq!(fault(marked, &[bitmaps(0, 0, 8, 0x50000)]), "nb_bitmaps");
    assert_eq!(
        fault(marked, &[bitmaps(65536, 0, 8, 0x50000)]),
        "nb_bitmaps"
    );
    assert_eq!(
        fault(marked, &[bitmaps(1, 1, 8, 0x50000)]),
        "reserved field of the bitmaps extension"
    );
    assert_eq!(
        fault(marked, &[bitmaps(1, 0, 65 << 20, 0x50000)]),
        "bitmap_directory_size"
    );
    assert_eq!(
        fault(marked, &[bitmaps(1, 0, 8, 0x50008)]),
        "bitmap_directory_offset"
    );
    let good = parse(&with_extensions(marked, &[bitmaps(1, 0, 8, 0x50000)])).unwrap();
    assert_eq!(good.bitmaps.unwrap().directory, HostOffset(0x50000));
    // The ends of the ranges are inside.
    let most = 65_535 * 1024;
    for (count, bytes, valid) in [
        (65_535, most, true),
        (1, 1, true),
        (1, most + 1, false),
        (1, 0, false),
    ] {
        let parsed = parse(&with_extensions(
            marked,
            &[bitmaps(count, 0, bytes, 0x50000)],
        ));
        assert_eq!(parsed.is_ok(), valid, "{count} bitmaps, {bytes} bytes");
    }
    assert!(parse(&with_extensions(nothing, &[format(&[b'x'; 15])])).is_ok());
    // What is wrong is told by its place.
    let endless = [7u32.to_be_bytes(), u32::MAX.to_be_bytes()].concat();
    let told = parse(&with_extensions(nothing, &[format(b"raw"), endless])).unwrap_err();
    let place = format!("the extension at byte {}", good.header_bytes + 16);
    assert!(told.to_string().contains(&place), "{told}");
    // Nobody vouches for it: kept and not believed.
    let stale = parse(&with_extensions(nothing, &[bitmaps(0, 1, 9, 1)])).unwrap();
    assert_eq!((stale.bitmaps, stale.unknown_extensions.len()), (None, 1));
    assert_eq!(stale.check_supported(true), Ok(()));
    assert_eq!(parse(&stale.encode().unwrap()).unwrap(), stale);
}

/// A format without a backing file is no backing file, but survives.
#[test]
fn a_lonely_backing_format_is_kept() {
    let mut lonely = parse(&with_extensions(|_| {}, &[extension(0xe279_2aca, b"raw")])).unwrap();
    assert_eq!(lonely.backing, None);
    assert_eq!(parse(&lonely.encode().unwrap()).unwrap(), lonely);
    let backing = Some(BackingName {
        name: b"base".to_vec(),
        format: Some("qcow2".into()),
    });
    lonely.backing.clone_from(&backing);
    assert_eq!(parse(&lonely.encode().unwrap()).unwrap().backing, backing);
}

#[test]
fn backing_names_lie_inside_cluster_0() {
    let named = |offset: u64, bytes: u32| {
        parse(&{
            let mut cluster0 = with_extensions(|_| {}, &[]);
            put64(&mut cluster0, 8, offset);
            put32(&mut cluster0, 16, bytes);
            let start = usize::try_from(offset).unwrap();
            cluster0[start..].fill(b'n');
            cluster0
        })
    };
    assert_eq!(named(120, 5).unwrap().backing.unwrap().name, b"nnnnn");
    assert_eq!(
        named(65536 - 7, 7).unwrap().backing.unwrap().name,
        b"nnnnnnn"
    );
    assert_eq!(named(65536 - 7, 0).unwrap().backing, None);
    assert_eq!(named(120, 1023).unwrap().backing.unwrap().name.len(), 1023);
    assert_eq!(field(named(65536 - 7, 8)), "backing_file_size");
    assert_eq!(field(named(120, 1024)), "backing file name");
    // An extension may not run into the name.
    assert_eq!(field(named(116, 4)), "header extension offset");
    let nul = changed(|cluster0| {
        put64(cluster0, 8, 1000);
        put32(cluster0, 16, 3);
    });
    assert_eq!(
        nul,
        Err(Error::Name {
            field: "backing file name",
            fault: NameFault::Nul { at: 0 }
        })
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let backing = Some(BackingName {
        name: vec![b'x'; 400],
        format: Some("raw".into()),
    });
    let options = CreateOptions {
        cluster_bits: 9,
        backing,
        ..CreateOptions::new(1 << 20)
    };
    assert_eq!(
        layout(&options),
        Err(Error::NoSpace {
            need_bytes: 536,
            cluster_bytes: 512
        })
    );
    // To the last byte: 112 of header, 16 of format, 8 of end marker.
    let backing = Some(BackingName {
        name: vec![b'x'; 376],
        format: Some("raw".into()),
    });
    let image = layout(&CreateOptions {
        backing,
        ..options.clone()
    })
    .unwrap();
    assert_eq!(
        Header::parse(&image.writes[2].1, image.file_bytes).unwrap(),
        image.header
    );
    // Extensions that end with the cluster need no end marker.
    let full = Header {
        backing: None,
        unknown_extensions: vec![(7, vec![1; 392])],
        ..image.header
    };
    assert_eq!(
        Header::parse(&full.encode().unwrap(), image.file_bytes).unwrap(),
        full
    );
}

#[test]
fn options_are_judged() {
    let fault = |options: CreateOptions| match layout(&options) {
        Err(Error::Invalid { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let base = CreateOptions::new(1 << 30);
    assert_eq!(
        fault(CreateOptions {
            version: 4,
            ..base.clone()
        }),
        "version"
    );
    assert_eq!(
        fault(CreateOptions {
            cluster_bits: 22,
            ..base.clone()
        }),
        "cluster_bits"
    );
    assert_eq!(
        fault(CreateOptions {
            refcount_order: 7,
            ..base.clone()
        }),
        "refcount_order"
    );
    assert_eq!(
        fault(CreateOptions {
            refcount_order: 3,
            version: 2,
            ..base.clone()
        }),
        "refcount_order"
    );
    assert_eq!(
        fault(CreateOptions {
            lazy_refcounts: true,
            version: 2,
            ..base.clone()
        }),
        "version"
    );
    assert_eq!(
        fault(CreateOptions {
            compression: Compression::Zstd,
            version: 2,
            ..base.clone()
        }),
        "version"
    );
    assert_eq!(
        fault(CreateOptions {
            size: u64::MAX,
            ..base
        }),
        "size"
    );
}

fn any_header() -> impl Strategy<Value = Header> {
    let name = || prop::collection::vec(1u8.., 1..40);
    let backing = prop::option::of((name(), prop::option::of("[a-z0-9]{1,15}")))
        .prop_map(|backing| backing.map(|(name, format)| BackingName { name, format }));
    let names = prop::collection::vec(
        (any::<(u8, u8)>(), prop::collection::vec(1u8.., 0..=46)),
        0..4,
    );
    let extensions =
        prop::collection::vec((1u32..99, prop::collection::vec(any::<u8>(), 0..30)), 0..4);
    let tail = prop::collection::vec(any::<u8>(), 0..22).prop_map(|mut tail| {
        tail.push(1);
        tail
    });
    let options = (13u32..=21, 0u32..=6, any::<[bool; 5]>(), 0u64..1 << 40);
    (
        options,
        backing,
        prop::option::of(name()),
        names,
        extensions,
        tail,
        any::<[u64; 3]>(),
    )
        .prop_map(
            |(
                (cluster_bits, refcount_order, choices, size),
                backing,
                data_file,
                names,
                extensions,
                tail,
                bits,
            )| {
                let compression = if choices[0] {
                    Compression::Zstd
                } else {
                    Compression::Deflate
                };
                let options = CreateOptions {
                    cluster_bits,
                    refcount_order,
                    compression,
                    ..CreateOptions::new(size)
                };
                let base = layout(&options).unwrap().header;
                let offset = HostOffset(7 << cluster_bits);
                let bitmaps = BitmapsExtension {
                    count: 3,
                    directory_bytes: 96,
                    directory: offset,
                };
                Header {
                    header_bytes: if choices[1] { 128 } else { 112 },
                    unknown_header_bytes: if choices[1] { tail } else { Vec::new() },
                    crypt_method: if choices[2] { 2 } else { 0 },
                    luks: choices[2].then_some((offset, 4096)),
                    bitmaps: choices[3].then_some(bitmaps),
                    autoclear: (bits[0] & !autoclear::BITMAPS) | u64::from(choices[3]),
                    compatible: bits[1],
                    incompatible: base.incompatible | (bits[2] & !incompatible::KNOWN),
                    backing,
                    data_file,
                    feature_names: names
                        .into_iter()
                        .map(|((kind, bit), name)| {
                            let kind = match kind {
                                0 => FeatureKind::Incompatible,
                                1 => FeatureKind::Compatible,
                                2 => FeatureKind::Autoclear,
                                other => FeatureKind::Other(other),
                            };
                            FeatureName { kind, bit, name }
                        })
                        .collect(),
                    unknown_extensions: extensions,
                    ..base
                }
            },
        )
}

proptest! {
    #[test]
    fn round_trip(header in any_header()) {
        let cluster0 = header.encode().unwrap();
        prop_assert_eq!(cluster0.len() as u64, header.geometry().cluster_bytes());
        let parsed = Header::parse(&cluster0, 1 << 50).unwrap();
        prop_assert_eq!(parsed, header);
    }

    /// Damaged headers never panic, and one that is accepted survives a rewrite unchanged in meaning.
    #[test]
    fn hostile(
        header in any_header(),
        changes in prop::collection::vec((0usize..512, any::<u8>()), 0..8),
        file_bytes in any::<u64>(),
        cut in 0usize..10_000,
    ) {
        let mut cluster0 = header.encode().unwrap();
        for (at, value) in changes {
            cluster0[at] = value;
        }
        let _ = Header::parse(&cluster0[..cut.min(cluster0.len())], file_bytes);
        if let Ok(parsed) = Header::parse(&cluster0, file_bytes) {
            let _ = (parsed.check_supported(true), parsed.geometry());
            match parsed.encode() {
                Ok(again) => prop_assert_eq!(Header::parse(&again, file_bytes).unwrap(), parsed),
                Err(Error::NoSpace { .. }) => {}
                Err(other) => prop_assert!(false, "{other:?}"),
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), cluster_bits in 8u8..12) {
        if bytes.len() >= 24 {
            bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            bytes[20..24].copy_from_slice(&[0, 0, 0, cluster_bits]);
        }
        let _ = parse(&bytes);
    }
}
