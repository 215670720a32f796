//! Every limit of cluster 0 at its last good value and at its first bad one. Guards against a limit that is off by one, or that looks at
//! another field: only a foreign image, or a very large one, would show it.

use urus_format::create::{CreateOptions, layout};
use urus_format::header::{
    MAX_BITMAP_DIRECTORY_BYTES, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, default_feature_names,
};
use urus_format::names::NameFault;
use urus_format::{
    BackingName, BitmapsExtension, Compression, Error, FeatureKind, FeatureName, Header,
    HostOffset, autoclear, bitmap, compatible, incompatible,
};

const CLUSTER: u64 = 65_536;
/// The highest offset in a file.
const MOST: u64 = i64::MAX.unsigned_abs();

const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const LUKS: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

fn new_header(options: &CreateOptions) -> Header {
    layout(options).unwrap().header
}

fn header() -> Header {
    new_header(&CreateOptions::new(1 << 30))
}

fn backed(name: &[u8], format: Option<&str>) -> Header {
    Header {
        backing: Some(BackingName {
            name: name.to_vec(),
            format: format.map(str::to_owned),
        }),
        ..header()
    }
}

/// The field that keeps this header from being written. What is written is read back the same.
fn fault(header: &Header) -> Option<&'static str> {
    match header.encode() {
        Ok(cluster0) => {
            assert_eq!(Header::parse(&cluster0, u64::MAX).as_ref(), Ok(header));
            None
        }
        Err(Error::Invalid { field, .. } | Error::Name { field, .. }) => Some(field),
        Err(other) => panic!("{other:?}"),
    }
}

/// The same for headers that are changed in one way.
fn judge<T: Copy + std::fmt::Debug>(change: impl Fn(&mut Header, T), cases: &[(T, &str)]) {
    for &(value, expected) in cases {
        let mut header = header();
        change(&mut header, value);
        assert_eq!(fault(&header).unwrap_or(""), expected, "{value:?}");
    }
}

#[test]
fn constants_are_those_of_the_specification() {
    assert_eq!(MAX_L1_BYTES, 33_554_432);
    assert_eq!(MAX_REFCOUNT_TABLE_BYTES, 8_388_608);
    assert_eq!(MAX_BITMAP_DIRECTORY_BYTES, 67_107_840);
    assert_eq!(
        [
            incompatible::DIRTY,
            incompatible::CORRUPT,
            incompatible::DATA_FILE,
            incompatible::COMPRESSION,
            incompatible::EXTENDED_L2,
            incompatible::KNOWN,
        ],
        [1, 2, 4, 8, 16, 31]
    );
    assert_eq!(compatible::LAZY_REFCOUNTS, 1);
    assert_eq!(
        [
            autoclear::BITMAPS,
            autoclear::RAW_EXTERNAL,
            autoclear::KNOWN
        ],
        [1, 2, 3]
    );
    assert_eq!(
        [
            bitmap::flags::IN_USE,
            bitmap::flags::AUTO,
            bitmap::flags::EXTRA_DATA_COMPATIBLE,
            bitmap::flags::KNOWN,
        ],
        [1, 2, 4, 7]
    );
    assert_eq!(Compression::Deflate.to_string(), "zlib");
    assert_eq!(Compression::Zstd.to_string(), "zstd");
}

type Place = fn(&mut Header, HostOffset);

/// The largest table of each kind, from the first place where it may lie to the last.
#[test]
fn tables_end_before_the_end_of_all_files() {
    let tables: [(&str, u64, Place); 5] = [
        ("refcount_table_offset", 8 << 20, |header, place| {
            (header.refcount_table, header.refcount_table_clusters) = (place, 128);
        }),
        ("snapshots_offset", 65_536 * 40, |header, place| {
            (header.snapshot_table, header.snapshot_count) = (place, 65_536);
        }),
        ("l1_table_offset", 32 << 20, |header, place| {
            (header.l1_table, header.l1_entries) = (place, 1 << 22);
        }),
        ("bitmap_directory_offset", 65_535 * 1024, |header, place| {
            header.autoclear = autoclear::BITMAPS;
            header.bitmaps = Some(BitmapsExtension {
                count: 65_535,
                directory_bytes: 65_535 * 1024,
                directory: place,
            });
        }),
        // The only one that can end with the last byte.
        ("LUKS header offset", CLUSTER - 1, |header, place| {
            header.crypt_method = 2;
            header.luks = Some((place, CLUSTER - 1));
        }),
    ];
    for (field, bytes, put) in tables {
        let last = (MOST - bytes) / CLUSTER * CLUSTER;
        let cases = [
            (CLUSTER, ""),
            (last, ""),
            (last + CLUSTER, field),
            (CLUSTER + 512, field),
            (0, field),
        ];
        judge(|header, place| put(header, HostOffset(place)), &cases);
    }
    // What is empty has no place.
    let empty = Header {
        size: 0,
        l1_entries: 0,
        l1_table: HostOffset(0),
        refcount_table_clusters: 0,
        refcount_table: HostOffset(0),
        ..header()
    };
    assert_eq!(fault(&empty), None);
}

#[test]
fn counts_and_sizes_have_ends() {
    let put = |header: &mut Header, count| header.refcount_table_clusters = count;
    judge(put, &[(128, ""), (129, "refcount_table_clusters")]);
    let put = |header: &mut Header, count| {
        (header.snapshot_count, header.snapshot_table) = (count, HostOffset(CLUSTER));
    };
    judge(put, &[(1, ""), (65_536, ""), (65_537, "nb_snapshots")]);
    let put = |header: &mut Header, entries| header.l1_entries = entries;
    judge(
        put,
        &[
            (1, "l1_size"),
            (2, ""),
            (1 << 22, ""),
            ((1 << 22) + 1, "l1_size"),
        ],
    );
    // 4 Mi entries of 512 MiB each.
    let put = |header: &mut Header, (size, entries)| {
        (header.size, header.l1_entries) = (size, entries);
    };
    judge(
        put,
        &[
            ((1 << 51, 1 << 22), ""),
            ((1 << 51, (1 << 22) - 1), "l1_size"),
            (((1 << 51) + 1, 1 << 22), "size"),
            ((u64::MAX, 1 << 22), "size"),
        ],
    );
    let put = |header: &mut Header, bytes| {
        header.crypt_method = 2;
        header.luks = Some((HostOffset(0), bytes));
    };
    judge(
        put,
        &[
            (MOST, "LUKS header offset"),
            (MOST + 1, "LUKS header length"),
        ],
    );
}

#[test]
fn the_header_has_whole_words_and_room_for_what_it_holds() {
    let put = |header: &mut Header, bytes| header.header_bytes = bytes;
    let field = "header_length";
    judge(
        put,
        &[
            (96, field),
            (104, ""),
            (108, field),
            (112, ""),
            (65_544, field),
        ],
    );
    let small = CreateOptions {
        cluster_bits: 9,
        ..CreateOptions::new(512)
    };
    for (header_bytes, expected) in [(512, None), (520, Some(field))] {
        let header = Header {
            header_bytes,
            ..new_header(&small)
        };
        assert_eq!(fault(&header), expected, "{header_bytes}");
    }
    let old = new_header(&CreateOptions {
        version: 2,
        ..CreateOptions::new(1 << 30)
    });
    assert_eq!(fault(&old), None);
    let longer = Header {
        header_bytes: 80,
        ..old
    };
    assert_eq!(fault(&longer), Some(field));
    // The compression type and what comes after it lie behind byte 104.
    for (header_bytes, expected) in [(104, Some(field)), (112, None)] {
        let unknown = Header {
            header_bytes,
            unknown_header_bytes: vec![1],
            ..header()
        };
        assert_eq!(fault(&unknown), expected);
        let zstd = Header {
            header_bytes,
            incompatible: incompatible::COMPRESSION,
            compression: Compression::Zstd,
            ..header()
        };
        assert_eq!(fault(&zstd), expected);
    }
}

#[test]
fn features_go_with_the_rest() {
    let old = new_header(&CreateOptions {
        version: 2,
        ..CreateOptions::new(1 << 30)
    });
    for bits in 1..8 {
        let header = Header {
            incompatible: bits & 1,
            compatible: bits >> 1 & 1,
            autoclear: bits >> 2,
            ..old.clone()
        };
        assert_eq!(fault(&header), Some("feature bits"), "{bits:#b}");
    }
    for (cluster_bits, expected) in [(13, Some("cluster_bits")), (14, None)] {
        let header = Header {
            incompatible: incompatible::EXTENDED_L2,
            ..new_header(&CreateOptions {
                cluster_bits,
                ..CreateOptions::new(1 << 20)
            })
        };
        assert_eq!(fault(&header), expected);
    }
    for (compression, bit, expected) in [
        (Compression::Deflate, incompatible::COMPRESSION, "is 0"),
        (Compression::Zstd, 0, "is 1"),
    ] {
        let header = Header {
            compression,
            incompatible: bit,
            ..header()
        };
        assert_eq!(fault(&header), Some("compression_type"));
        let told = header.encode().unwrap_err().to_string();
        assert!(told.contains(expected), "{told}");
    }
    let marked = |header: &mut Header, bits| {
        header.autoclear = bits;
        header.bitmaps = Some(BitmapsExtension {
            count: 1,
            directory_bytes: 1,
            directory: HostOffset(CLUSTER),
        });
    };
    judge(
        marked,
        &[
            (autoclear::BITMAPS, ""),
            (!0, ""),
            (0, "autoclear_features"),
            (autoclear::RAW_EXTERNAL, "autoclear_features"),
        ],
    );
    let encrypted = |header: &mut Header, method| {
        header.crypt_method = method;
        header.luks = Some((HostOffset(CLUSTER), 1));
    };
    judge(
        encrypted,
        &[(2, ""), (0, "crypt_method"), (1, "crypt_method")],
    );
}

#[test]
fn names_have_a_length_and_no_nul() {
    for (bytes, valid) in [(0, false), (1, true), (1023, true), (1024, false)] {
        let name = vec![b'n'; bytes];
        let expected = (!valid).then_some("backing file name");
        assert_eq!(fault(&backed(&name, None)), expected, "{bytes}");
        let data = Header {
            data_file: Some(name),
            ..header()
        };
        let expected = (!valid).then_some("data file name");
        assert_eq!(fault(&data), expected, "{bytes}");
    }
    assert_eq!(fault(&backed(b"a\0", None)), Some("backing file name"));
    let length = Some("length of the backing format");
    for (format, expected) in [
        ("", length),
        ("x", None),
        ("123456789012345", None),
        ("1234567890123456", length),
        ("a\0", Some("backing format")),
    ] {
        assert_eq!(fault(&backed(b"base", Some(format))), expected, "{format}");
    }
    for (name, expected) in [
        (vec![b'n'; 46], None),
        (vec![b'n'; 47], Some("feature name")),
        (b"a\0".to_vec(), Some("feature name")),
    ] {
        let feature_names = vec![FeatureName {
            kind: FeatureKind::Compatible,
            bit: 3,
            name,
        }];
        let header = Header {
            feature_names,
            ..header()
        };
        assert_eq!(fault(&header), expected);
    }
    let kept = |header: &mut Header, kind| header.unknown_extensions.push((kind, Vec::new()));
    judge(kept, &[(1, ""), (0, "header extension type")]);
}

#[test]
fn messages_tell_the_limit() {
    let told = |change: fn(&mut Header)| {
        let mut header = header();
        change(&mut header);
        header.encode().unwrap_err().to_string()
    };
    for (change, expected) in [
        (
            (|header| header.refcount_table_clusters = 129) as fn(&mut Header),
            "refcount_table_clusters is 129 (0x81); expected at most 128 (8 MiB)",
        ),
        (
            |header| header.l1_entries = (1 << 22) + 1,
            "l1_size is 4194305 (0x400001); expected at most 4194304 (32 MiB)",
        ),
        (
            |header| header.l1_entries = 1,
            "l1_size is 1 (0x1); expected at least 2 to map the virtual size of 1073741824 bytes",
        ),
        (
            |header| header.size = (1 << 51) + 1,
            "size is 2251799813685249 (0x8000000000001); expected at most 2251799813685248 with this cluster size",
        ),
        (
            |header| header.l1_table = HostOffset(1),
            "l1_table_offset is 1 (0x1); expected a multiple of the cluster size 65536",
        ),
        (
            |header| header.l1_table = HostOffset(1 << 63),
            "l1_table_offset is 9223372036854775808 (0x8000000000000000); expected at most 9223372036854775791 for a table of 16 bytes",
        ),
        (
            |header| header.header_bytes = 96,
            "header_length is 96 (0x60); expected a multiple of 8, 104 to the cluster size 65536",
        ),
    ] {
        assert_eq!(told(change), expected);
    }
}

/// Values of the known extensions that parse.
fn known_extensions() -> [(u32, Vec<u8>); 5] {
    let mut bitmaps = [0; 24];
    (bitmaps[3], bitmaps[15], bitmaps[21]) = (1, 1, 1);
    let mut luks = [0; 16];
    (luks[5], luks[15]) = (1, 1);
    [
        (BACKING_FORMAT, b"raw".to_vec()),
        (FEATURE_NAMES, vec![1; 48]),
        (BITMAPS, bitmaps.into()),
        (LUKS, luks.into()),
        (DATA_FILE, b"data".to_vec()),
    ]
}

/// A header that is written with these extensions, whatever they are.
fn with_extensions(extensions: &[(u32, Vec<u8>)]) -> Header {
    Header {
        feature_names: Vec::new(),
        crypt_method: 2,
        autoclear: autoclear::BITMAPS,
        unknown_extensions: extensions.to_vec(),
        ..header()
    }
}

/// Readers differ in which of two they believe.
#[test]
fn no_known_extension_stands_there_twice() {
    let known = known_extensions();
    let all = with_extensions(&known).encode().unwrap();
    let all = Header::parse(&all, u64::MAX).unwrap();
    assert!(all.bitmaps.is_some() && all.luks.is_some() && all.data_file.is_some());
    assert_eq!(all.feature_names.len(), 1);
    // The format without a file is kept among the unknown.
    assert_eq!(all.unknown_extensions, known[..1]);
    for extension in known {
        let cluster0 = with_extensions(&[extension.clone(), extension.clone()]).encode();
        match Header::parse(&cluster0.unwrap(), u64::MAX) {
            Err(Error::Invalid { field, value, .. }) => {
                let expected = ("header extension type", u64::from(extension.0));
                assert_eq!((field, value), expected);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A kept extension gives way to the field of its type, and only to that.
#[test]
fn fields_replace_what_was_kept_of_their_type() {
    for (kind, value) in known_extensions() {
        let mut alone = backed(b"base", Some("qcow2"));
        alone.feature_names = Vec::new();
        if kind != BACKING_FORMAT {
            alone.backing = None;
        }
        match kind {
            BITMAPS => {
                alone.autoclear = autoclear::BITMAPS;
                alone.bitmaps = Some(BitmapsExtension {
                    count: 2,
                    directory_bytes: 64,
                    directory: HostOffset(CLUSTER),
                });
            }
            LUKS => {
                alone.crypt_method = 2;
                alone.luks = Some((HostOffset(CLUSTER), 9));
            }
            DATA_FILE => alone.data_file = Some(b"another".to_vec()),
            FEATURE_NAMES => alone.feature_names = default_feature_names(),
            _ => {}
        }
        let both = Header {
            unknown_extensions: vec![(kind, value), (7, b"kept".to_vec())],
            ..alone.clone()
        };
        let expected = Header {
            unknown_extensions: vec![(7, b"kept".to_vec())],
            ..alone
        };
        let parsed = Header::parse(&both.encode().unwrap(), u64::MAX);
        assert_eq!(parsed, Ok(expected), "{kind:#x}");
    }
}

/// A name may begin right behind the header, and an empty one at the end of the cluster.
#[test]
fn backing_names_begin_behind_the_header() {
    let named = |offset: u64, bytes: u32| {
        let mut cluster0 = header().encode().unwrap();
        cluster0[8..16].copy_from_slice(&offset.to_be_bytes());
        cluster0[16..20].copy_from_slice(&bytes.to_be_bytes());
        Header::parse(&cluster0, u64::MAX)
    };
    // The bytes there are those of the first extension.
    let first = named(112, 4).unwrap().backing.unwrap().name;
    assert_eq!(first, FEATURE_NAMES.to_be_bytes());
    assert_eq!(named(CLUSTER, 0).unwrap().backing, None);
    for (offset, bytes, expected) in [
        (
            111,
            1,
            "backing_file_offset is 111 (0x6f); expected 0, or 112 to 65536: in cluster 0, behind the header",
        ),
        (
            CLUSTER + 1,
            0,
            "backing_file_offset is 65537 (0x10001); expected 0, or 112 to 65536: in cluster 0, behind the header",
        ),
        (
            CLUSTER - 2,
            3,
            "backing_file_size is 3 (0x3); expected at most 2: the name must end in cluster 0",
        ),
    ] {
        assert_eq!(named(offset, bytes).unwrap_err().to_string(), expected);
    }
}

/// An unknown compression type is one thing where a bit announces it, another where none does.
#[test]
fn compression_types_are_announced() {
    for (bits, valid) in [
        (incompatible::COMPRESSION, true),
        (!incompatible::COMPRESSION, false),
    ] {
        let mut cluster0 = header().encode().unwrap();
        cluster0[72..80].copy_from_slice(&bits.to_be_bytes());
        cluster0[104] = 2;
        let parsed = Header::parse(&cluster0, u64::MAX);
        let unknown = matches!(parsed, Err(Error::Unsupported { .. }));
        assert_eq!(unknown, valid, "{parsed:?}");
    }
}

#[test]
fn faults_of_names_are_told() {
    let scheme = "nbd".to_owned();
    for (fault, expected) in [
        (NameFault::Empty, "the name is empty"),
        (
            NameFault::TooLong { bytes: 1024 },
            "the name has 1024 bytes; at most 1023 are allowed",
        ),
        (
            NameFault::Nul { at: 3 },
            "the name has a NUL byte at position 3",
        ),
        (NameFault::NotText, "the name is not UTF-8"),
        (NameFault::Json, "'json:'"),
        (NameFault::Descriptor, "'fd:'"),
        (NameFault::Scheme { scheme }, "'nbd:'"),
    ] {
        let told = fault.to_string();
        assert!(told.contains(expected), "{told}");
    }
}
