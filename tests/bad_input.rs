//! Images that are damaged or made to do damage. Guards against believing what the disk says.
//!
//! Each is refused, or its bad part is: within seconds, within bounded memory, with an exit code other than 0 and a
//! message that names the file and the field or table. Nothing changes on disk. A panic or a death by signal fails the
//! test, even though the exit code would do.
//!
//! What surrounds an image (backing files, sockets, locks) is in bad_surroundings.rs.

use std::path::{Path, PathBuf};
use urus_tests::header::{self, patch, set_bits, set_u32, set_u64};
use urus_tests::served::Serve;
use urus_tests::{Driver, GIB, KIB, MIB, Scratch, content, qemu, urus_within};

/// What an image may make the program allocate.
const MEMORY: u64 = 256 * MIB;

/// A healthy image of 16 MiB with something in it, version 3 as QEMU makes it.
fn healthy(scratch: &Scratch) -> PathBuf {
    let image = scratch.file("image.qcow2");
    let _ = std::fs::remove_file(&image);
    qemu::create(&image, "", 16 * MIB);
    qemu::io_file(
        &image,
        &["write -q -P 0x11 0 1M", "write -q -P 0x22 8M 64k"],
    );
    image
}

/// Serving (both drivers, for writing and for reading) and checking must refuse `image`, name it and say one of
/// `words`.
fn assert_refused(what: &str, image: &Path, words: &[&str]) {
    let before = content::bytes(image);
    let name = image.file_name().expect("a name").to_string_lossy();
    for (driver, arguments) in [
        (Driver::IoUring, ""),
        (Driver::Blocking, ""),
        (Driver::IoUring, "--read-only"),
    ] {
        let refused = Serve::new(image, driver)
            .with(arguments)
            .within(MEMORY)
            .refused();
        println!("{what}: {}", refused.stderr.trim());
        let _ = refused.says_one_of(&[&name]).says_one_of(words);
    }
    let _ = urus_within(MEMORY)
        .words("map -f qcow2")
        .arg(image)
        .run()
        .expect_refusal();
    assert!(
        before == content::bytes(image),
        "{what}: the image was changed"
    );
}

/// Turns a healthy image into another one.
type Damage = fn(&Path);

struct Case {
    what: &'static str,
    damage: Damage,
    words: &'static [&'static str],
}

const fn case(what: &'static str, damage: Damage, words: &'static [&'static str]) -> Case {
    Case {
        what,
        damage,
        words,
    }
}

fn each(cases: &[Case]) {
    let scratch = Scratch::new();
    for case in cases {
        let image = healthy(&scratch);
        (case.damage)(&image);
        assert_refused(case.what, &image, case.words);
    }
}

#[test]
fn wild_header_fields() {
    each(&[
        case(
            "no magic",
            |image| patch(image, 0, b"QFI\xfa"),
            &["magic", "not a qcow2"],
        ),
        case(
            "version 1",
            |image| set_u32(image, header::VERSION, 1),
            &["version"],
        ),
        case(
            "version 4",
            |image| set_u32(image, header::VERSION, 4),
            &["version"],
        ),
        case(
            "clusters of 256 bytes",
            |image| set_u32(image, header::CLUSTER_BITS, 8),
            &["cluster"],
        ),
        case(
            "clusters of 4 MiB",
            |image| set_u32(image, header::CLUSTER_BITS, 22),
            &["cluster"],
        ),
        case(
            "cluster_bits of all ones",
            |image| set_u32(image, header::CLUSTER_BITS, u32::MAX),
            &["cluster"],
        ),
        case(
            "size of all ones",
            |image| set_u64(image, header::SIZE, u64::MAX),
            &["size", "l1"],
        ),
        case(
            "size beyond L1",
            |image| set_u64(image, header::SIZE, 1 << 40),
            &["l1", "size"],
        ),
        case(
            "encryption method 7",
            |image| set_u32(image, header::CRYPT_METHOD, 7),
            &["crypt"],
        ),
        case(
            "header of 96 bytes",
            |image| set_u32(image, header::HEADER_LENGTH, 96),
            &["header"],
        ),
        case(
            "header of 107 bytes",
            |image| set_u32(image, header::HEADER_LENGTH, 107),
            &["header"],
        ),
        case(
            "header longer than a cluster",
            |image| set_u32(image, header::HEADER_LENGTH, 1 << 20),
            &["header"],
        ),
        case(
            "refcounts of 128 bits",
            |image| set_u32(image, header::REFCOUNT_ORDER, 7),
            &["refcount"],
        ),
        case(
            "refcount_order of all ones",
            |image| set_u32(image, header::REFCOUNT_ORDER, u32::MAX),
            &["refcount"],
        ),
        case(
            "compression type without its bit",
            |image| patch(image, header::COMPRESSION_TYPE, &[1]),
            &["compression"],
        ),
        case(
            "compression bit without a type",
            |image| set_bits(image, header::INCOMPATIBLE, 8),
            &["compression"],
        ),
        case(
            "unknown compression type",
            |image| {
                set_bits(image, header::INCOMPATIBLE, 8);
                patch(image, header::COMPRESSION_TYPE, &[77]);
            },
            &["compression"],
        ),
    ]);
}

#[test]
fn wild_table_positions() {
    each(&[
        case(
            "L1 not aligned",
            |image| set_u64(image, header::L1_TABLE_OFFSET, 0x3_0200),
            &["l1"],
        ),
        case(
            "L1 at the header",
            |image| set_u64(image, header::L1_TABLE_OFFSET, 0),
            &["l1"],
        ),
        case(
            "L1 at the end of the world",
            |image| set_u64(image, header::L1_TABLE_OFFSET, !0xffff),
            &["l1"],
        ),
        case(
            "L1 past the end of the file",
            |image| set_u64(image, header::L1_TABLE_OFFSET, GIB),
            &["l1"],
        ),
        case(
            "L1 of 4 GiB entries",
            |image| set_u32(image, header::L1_SIZE, u32::MAX),
            &["l1"],
        ),
        case(
            "L1 of no entries",
            |image| set_u32(image, header::L1_SIZE, 0),
            &["l1"],
        ),
        case(
            "refcount table not aligned",
            |image| set_u64(image, header::REFCOUNT_TABLE_OFFSET, 513),
            &["refcount"],
        ),
        case(
            "refcount table at the header",
            |image| set_u64(image, header::REFCOUNT_TABLE_OFFSET, 0),
            &["refcount"],
        ),
        case(
            "refcount table past the end of the file",
            |image| set_u64(image, header::REFCOUNT_TABLE_OFFSET, GIB),
            &["refcount"],
        ),
        case(
            "refcount table of no clusters",
            |image| set_u32(image, header::REFCOUNT_TABLE_CLUSTERS, 0),
            &["refcount"],
        ),
        case(
            "refcount table of 2^32 clusters",
            |image| set_u32(image, header::REFCOUNT_TABLE_CLUSTERS, u32::MAX),
            &["refcount"],
        ),
        case(
            "70000 snapshots",
            |image| set_u32(image, header::NB_SNAPSHOTS, 70_000),
            &["snapshot"],
        ),
        case(
            "snapshot table past the end of the file",
            |image| {
                set_u32(image, header::NB_SNAPSHOTS, 1);
                set_u64(image, header::SNAPSHOTS_OFFSET, GIB);
            },
            &["snapshot"],
        ),
        case(
            "backing name outside the first cluster",
            |image| {
                set_u64(image, header::BACKING_FILE_OFFSET, 1 << 20);
                set_u32(image, header::BACKING_FILE_SIZE, 8);
            },
            &["backing"],
        ),
        case(
            "backing name of 60000 bytes",
            |image| {
                set_u64(image, header::BACKING_FILE_OFFSET, 1024);
                set_u32(image, header::BACKING_FILE_SIZE, 60_000);
            },
            &["backing"],
        ),
        case(
            "extension longer than the cluster",
            |image| {
                patch(
                    image,
                    112,
                    &[0xe2, 0x79, 0x2a, 0xca, 0x7f, 0xff, 0xff, 0xff],
                )
            },
            &["extension"],
        ),
    ]);
}

/// Cut off at every interesting place, from nothing at all to the middle of the L1 table.
#[test]
fn truncated_images() {
    let scratch = Scratch::new();
    for length in [
        0,
        3,
        4,
        71,
        72,
        103,
        104,
        111,
        112,
        4096,
        64 * KIB,
        128 * KIB,
        192 * KIB,
    ] {
        let image = healthy(&scratch);
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .expect("opening");
        file.set_len(length).expect("truncating");
        assert_refused(
            &format!("cut at {length}"),
            &image,
            &[
                "truncated",
                "short",
                "end of",
                "past",
                "beyond",
                "too small",
                "bytes",
            ],
        );
    }
}

/// What is not supported yet is refused by name, not misread; so is what nobody knows.
#[test]
fn unsupported_features_are_named() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    let fresh = |options: &str| {
        let _ = std::fs::remove_file(&image);
        qemu::create(&image, options, 16 * MIB);
    };
    fresh("extended_l2=on");
    assert_refused("extended L2", &image, &["extended l2"]);
    fresh(&format!("data_file={}", scratch.file("data").display()));
    assert_refused("external data file", &image, &["data file"]);
    fresh("");
    set_bits(&image, header::INCOMPATIBLE, 1 << 20);
    assert_refused("unknown feature", &image, &["bit 20", "feature"]);
    // The image may say itself what the bit means: an entry of its feature name table.
    let table = content::bytes(&image)
        .windows(4)
        .position(|word| word == [0x68, 0x03, 0xf8, 0x57]);
    let entry = u64::try_from(table.expect("a feature name table")).expect("an offset") + 8;
    patch(&image, entry, &[0, 20]);
    patch(&image, entry + 2, b"frobnication\0");
    assert_refused("unknown feature with a name", &image, &["frobnication"]);
}

/// A corrupt image is for reading only, until it has been repaired.
#[test]
fn corrupt_bit() {
    let scratch = Scratch::new();
    let image = healthy(&scratch);
    set_bits(&image, header::INCOMPATIBLE, header::CORRUPT);
    let before = content::bytes(&image);
    for driver in Driver::ALL {
        let _ = Serve::new(&image, driver)
            .refused()
            .says_one_of(&["corrupt"]);
        let served = Serve::new(&image, driver).with("--read-only").start();
        served.qemu_io_read_only(&["read -P 0x11 0 1M", "read -P 0x22 8M 64k"]);
        served.stop();
    }
    assert!(before == content::bytes(&image), "the image was changed");
}

/// Tables that point at tables. A write that followed them would overwrite what holds the image together, so it must
/// fail, at the latest when it comes; the metadata stays as it was, but for the corrupt bit. `urus check` reports it.
#[test]
fn self_referencing_tables() {
    let cases: [(&str, Damage); 11] = [
        ("L1 entry to the L1 table", |image| {
            point(image, l1(image), l1(image))
        }),
        ("L1 entry to the refcount table", |image| {
            point(image, l1(image), refcount_table(image))
        }),
        ("L1 entry to a refcount block", |image| {
            point(image, l1(image), refcount_block(image))
        }),
        ("L1 entry not aligned", |image| {
            point(image, l1(image), header::first_l2(image) + 512)
        }),
        ("L1 entry past the end of the file", |image| {
            point(image, l1(image), GIB)
        }),
        ("L2 entry to the L1 table", |image| {
            point(image, header::first_l2(image), l1(image))
        }),
        ("L2 entry to its own table", |image| {
            point(image, header::first_l2(image), header::first_l2(image))
        }),
        ("L2 entry to the refcount table", |image| {
            point(image, header::first_l2(image), refcount_table(image))
        }),
        ("L2 entry to a refcount block", |image| {
            point(image, header::first_l2(image), refcount_block(image))
        }),
        ("L2 entry not aligned", |image| {
            point(
                image,
                header::first_l2(image),
                header::first_data(image) + 512,
            )
        }),
        ("L1 table on the refcount table", |image| {
            set_u64(image, header::L1_TABLE_OFFSET, refcount_table(image));
        }),
    ];
    let scratch = Scratch::new();
    let mut faults = Vec::new();
    for (what, damage) in cases {
        for driver in Driver::ALL {
            let image = healthy(&scratch);
            damage(&image);
            let found = faults_with_damaged_tables(&image, driver);
            faults.extend(
                found
                    .iter()
                    .map(|fault| format!("{what}, {driver:?}: {fault}")),
            );
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What is wrong with how urus treats an image whose table entry for the first guest cluster is bad.
fn faults_with_damaged_tables(image: &Path, driver: Driver) -> Vec<String> {
    const WORDS: [&str; 5] = ["l1", "l2", "refcount", "overlap", "corrupt"];
    let mut faults = Vec::new();
    let before = content::bytes(image);
    let check = urus_within(MEMORY).words("check -f qcow2").arg(image).run();
    if !matches!(check.status.code(), Some(1 | 2)) {
        faults.push(format!("the check finds nothing: {check}"));
    }
    match Serve::new(image, driver).within(MEMORY).start_or_refused() {
        Err(refused) => {
            let _ = refused.says_one_of(&["image.qcow2"]).says_one_of(&WORDS);
        }
        Ok(served) => {
            let commands = ["write -P 0x33 0 64k", "flush"];
            let write = qemu::io_program("raw", &served.uri(), &commands).run();
            let said = write.everything();
            if !said.contains("error") && !said.contains("failed") {
                faults.push(format!("a write into it succeeded: {write}"));
            }
            let _ = qemu::io_program("raw", &served.uri(), &["read 0 64k", "read 8M 64k"]).run();
            let log = served.stop_complaining();
            let complaint = |line: &str| {
                let line = line.to_lowercase();
                line.contains("image.qcow2") && WORDS.iter().any(|word| line.contains(word))
            };
            if !log.lines().any(complaint) {
                faults.push(format!("no log line names the image and the table: {log}"));
            }
        }
    }
    // The header, the refcount structures, L1 and the first L2 table. The corrupt bit may have been set.
    let mut after = content::bytes(image);
    let incompatible = usize::try_from(header::INCOMPATIBLE).expect("an offset") + 7;
    after[incompatible] &= !u8::try_from(header::CORRUPT).expect("a low bit");
    let changed = before
        .iter()
        .zip(&after)
        .take(5 << 16)
        .position(|(before, after)| before != after);
    faults.extend(changed.map(|at| format!("metadata changed, at byte {at}")));
    faults
}

/// Makes the table entry at `entry` point to `target` as if that were its own.
fn point(image: &Path, entry: u64, target: u64) {
    set_u64(image, entry, target | header::COPIED);
}

fn l1(image: &Path) -> u64 {
    header::u64_at(image, header::L1_TABLE_OFFSET)
}

fn refcount_table(image: &Path) -> u64 {
    header::u64_at(image, header::REFCOUNT_TABLE_OFFSET)
}

fn refcount_block(image: &Path) -> u64 {
    header::u64_at(image, refcount_table(image))
}

/// Compressed data that is no compressed data: the read fails, the server lives, the neighbour is intact.
#[test]
fn damaged_compressed_cluster() {
    let scratch = Scratch::new();
    for compression in ["zlib", "zstd"] {
        for driver in Driver::ALL {
            let (raw, image) = (scratch.file("raw"), scratch.file("image.qcow2"));
            let expected = content::compressible(3, 4 << 16);
            std::fs::write(&raw, &expected).expect("writing");
            let convert = qemu::img("convert -c -f raw -O qcow2 -o")
                .arg(format!("compression_type={compression}"));
            convert.arg(&raw).arg(&image).ok();
            // Bits 0 to 53 of the descriptor, with 64 KiB clusters: where the compressed bytes begin.
            let start = header::u64_at(&image, header::first_l2(&image)) & ((1 << 54) - 1);
            patch(&image, start, &content::noise(4, 2000));
            let served = Serve::new(&image, driver).within(MEMORY).start();
            served.nbdsh(
                "try: h.pread(512, 0)
except nbd.Error: pass
else: raise Exception('damaged data was read without an error')
try: h.pwrite(b'x' * 512, 0)
except nbd.Error: pass
else: raise Exception('half of a damaged cluster was overwritten without an error')
h.pread(65536, 65536)",
            );
            let copy =
                served.nbdsh("import sys; sys.stdout.write(h.pread(65536 * 3, 65536).hex())");
            let hex: String = expected[65536..]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert!(
                copy.stdout == hex,
                "{compression}, {driver:?}: the neighbours of the damaged cluster"
            );
            let _ = served.stop_complaining();
        }
    }
}
