//! The naive checker against images that real qemu-img and qemu-io made, and against corruptions poked into
//! them. Guards against a judge that is blind (a corruption it does not see) or that cries wolf (a good image it
//! refuses). Skipped where qemu-img is not installed.

// Test code on 64-bit hosts: offsets are small, and patterns are cut to bytes on purpose.
#![allow(clippy::cast_possible_truncation)]

use std::path::{Path, PathBuf};
use std::process::Command;

use urus_sim::checker::{GuestReader, Owner, Table, Violation, check};

const MIB: usize = 1 << 20;

struct Qemu {
    dir: tempfile::TempDir,
}

impl Qemu {
    fn new() -> Option<Self> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("skipped: no qemu-img");
            return None;
        }
        Some(Self {
            dir: tempfile::tempdir().unwrap(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn img(&self, args: &[&str]) {
        let done = Command::new("qemu-img")
            .args(args)
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "qemu-img {args:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    fn io(&self, image: &str, commands: &[&str]) {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]).current_dir(self.dir.path());
        for line in commands {
            command.args(["-c", line]);
        }
        let done = command.arg(image).output().unwrap();
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(
            done.status.success() && !text.contains("failed"),
            "qemu-io {commands:?}: {text}"
        );
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// The guest's content, as qemu-img reads it.
    fn raw(&self, name: &str, options: &[&str]) -> Vec<u8> {
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        args.extend_from_slice(options);
        args.extend_from_slice(&[name, "raw.out"]);
        self.img(&args);
        self.bytes("raw.out")
    }
}

fn assert_clean(image: &[u8], what: &str) {
    let report = check(image);
    assert!(
        report.is_clean(),
        "{what}: {:?}, leaks {:?}, COPIED clear {}",
        report.violations,
        report.leaks,
        report.copied_clear
    );
}

fn assert_reads(image: &[u8], raw: &[u8], what: &str) {
    let reader = GuestReader::open(image, None).unwrap();
    assert_eq!(reader.size(), raw.len() as u64, "{what}");
    assert!(
        reader.read(0, raw.len()).unwrap() == raw,
        "{what}: the guest's content differs"
    );
    // Ranges that begin and end inside clusters.
    for (start, len) in [(1, 1023), (65_535, 2), (100_000, 300_001)] {
        assert!(
            reader.read(start as u64, len).unwrap() == raw[start..start + len],
            "{what} at {start}"
        );
    }
}

#[test]
fn every_cluster_size_and_refcount_width() {
    let Some(qemu) = Qemu::new() else { return };
    for cluster_bits in 9..=21 {
        for refcount_order in 0..=6 {
            let what = format!("cluster_bits {cluster_bits}, refcount_order {refcount_order}");
            let options = format!(
                "cluster_size={},refcount_bits={}",
                1 << cluster_bits,
                1 << refcount_order
            );
            qemu.img(&[
                "create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "4M",
            ]);
            assert_clean(&qemu.bytes("a.qcow2"), &what);
            let writes = [
                "write -P 1 0 300k",
                "write -P 2 1M 5k",
                "write -z 256k 64k",
                "discard 0 64k",
                "write -P 3 3M 512",
            ];
            qemu.io("a.qcow2", &writes);
            let image = qemu.bytes("a.qcow2");
            assert_clean(&image, &what);
            assert_reads(&image, &qemu.raw("a.qcow2", &[]), &what);
            if refcount_order > 0 {
                // Snapshots share tables and data; the copy-on-write after them splits them again.
                qemu.img(&["snapshot", "-c", "one", "a.qcow2"]);
                qemu.io("a.qcow2", &["write -P 4 0 70k", "write -P 5 2M 9k"]);
                assert_clean(&qemu.bytes("a.qcow2"), &what);
            }
        }
    }
}

#[test]
fn version_2() {
    let Some(qemu) = Qemu::new() else { return };
    for cluster_size in [512, 4096, 65536] {
        let options = format!("compat=0.10,cluster_size={cluster_size}");
        qemu.img(&[
            "create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "4M",
        ]);
        qemu.io(
            "a.qcow2",
            &["write -P 1 0 300k", "write -P 2 1M 5k", "discard 64k 64k"],
        );
        qemu.img(&["snapshot", "-c", "one", "a.qcow2"]);
        qemu.io("a.qcow2", &["write -P 3 0 70k"]);
        let image = qemu.bytes("a.qcow2");
        assert_clean(&image, &options);
        assert_reads(&image, &qemu.raw("a.qcow2", &[]), &options);
    }
}

/// A raw file with content that compresses to many different lengths.
fn compressible(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    (0..len)
        .map(|i| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let noisy = (i / 700) % 7 < (i / 30_000) % 5;
            if noisy {
                (state >> 56) as u8
            } else {
                (i / 512) as u8
            }
        })
        .collect()
}

#[test]
fn compressed_clusters() {
    let Some(qemu) = Qemu::new() else { return };
    let raw = compressible(2 * MIB);
    std::fs::write(qemu.path("in.raw"), &raw).unwrap();
    for kind in ["zlib", "zstd"] {
        for cluster_bits in 9..=21 {
            let options = format!("cluster_size={},compression_type={kind}", 1 << cluster_bits);
            qemu.img(&[
                "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", &options, "in.raw", "c.qcow2",
            ]);
            let image = qemu.bytes("c.qcow2");
            assert_clean(&image, &options);
            assert!(check(&image).compressed_clusters > 0, "{options}");
            assert_reads(&image, &raw, &options);
            // Overwriting lowers the refcounts of shared and straddled host clusters.
            qemu.img(&["snapshot", "-c", "one", "c.qcow2"]);
            qemu.io("c.qcow2", &["write -P 9 100k 70k", "discard 512k 256k"]);
            let image = qemu.bytes("c.qcow2");
            assert_clean(&image, &options);
            assert_reads(&image, &qemu.raw("c.qcow2", &[]), &options);
        }
    }
}

#[test]
fn snapshots_read_their_own_content() {
    let Some(qemu) = Qemu::new() else { return };
    qemu.img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "a.qcow2",
        "3M",
    ]);
    qemu.io("a.qcow2", &["write -P 1 0 1M"]);
    qemu.img(&["snapshot", "-c", "one", "a.qcow2"]);
    qemu.io("a.qcow2", &["write -P 2 500k 1M"]);
    qemu.img(&["snapshot", "-c", "two", "a.qcow2"]);
    qemu.io("a.qcow2", &["write -P 3 700k 10k", "discard 0 100k"]);
    let check_all = |what: &str| {
        let image = qemu.bytes("a.qcow2");
        assert_clean(&image, what);
        let reader = GuestReader::open(&image, None).unwrap();
        for number in 0..reader.snapshot_count() {
            let name = if reader.snapshot_count() == 2 && number == 0 {
                "one"
            } else {
                "two"
            };
            let raw = qemu.raw("a.qcow2", &["-l", name]);
            let snapshot = reader.clone().snapshot(number).unwrap();
            assert!(
                snapshot.read(0, raw.len()).unwrap() == raw,
                "{what}: snapshot {name}"
            );
        }
        assert!(reader.clone().snapshot(reader.snapshot_count()).is_err());
    };
    check_all("two snapshots");
    qemu.img(&["snapshot", "-a", "one", "a.qcow2"]);
    check_all("applied");
    qemu.img(&["snapshot", "-d", "one", "a.qcow2"]);
    check_all("deleted");
}

#[test]
fn backing_extended_l2_bitmaps_and_data_file() {
    let Some(qemu) = Qemu::new() else { return };
    let raw = compressible(2 * MIB);
    std::fs::write(qemu.path("in.raw"), &raw).unwrap();
    let backing = |offset: u64, len: usize| {
        let start = (offset as usize).min(raw.len());
        raw[start..(start + len).min(raw.len())].to_vec()
    };
    for options in [
        "cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=2M",
    ] {
        qemu.img(&[
            "create", "-q", "-f", "qcow2", "-b", "in.raw", "-F", "raw", "-o", options, "b.qcow2",
            "3M",
        ]);
        qemu.io(
            "b.qcow2",
            &[
                "write -P 7 30000 5000",
                "write -z 200k 50k",
                "discard 300k 100k",
                "write -P 6 2M 700k",
            ],
        );
        let image = qemu.bytes("b.qcow2");
        assert_clean(&image, options);
        assert!(
            GuestReader::open(&image, None).is_err(),
            "a backing file is named"
        );
        let reader = GuestReader::open(&image, Some(&backing)).unwrap();
        assert!(
            reader.read(0, 3 * MIB).unwrap() == qemu.raw("b.qcow2", &[]),
            "{options}"
        );
    }

    qemu.img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "m.qcow2",
        "2M",
    ]);
    qemu.img(&["bitmap", "--add", "-g", "512", "m.qcow2", "first"]);
    qemu.img(&["bitmap", "--add", "m.qcow2", "second"]);
    qemu.io("m.qcow2", &["write -P 1 0 1M"]);
    assert_clean(&qemu.bytes("m.qcow2"), "bitmaps");

    qemu.img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d.raw",
        "e.qcow2",
        "2M",
    ]);
    qemu.io("e.qcow2", &["write -P 1 0 100k", "write -P 2 1M 4k"]);
    let (image, data) = (qemu.bytes("e.qcow2"), qemu.bytes("d.raw"));
    assert_clean(&image, "data file");
    let reader = GuestReader::open(&image, None)
        .unwrap()
        .with_data_file(&data);
    assert!(reader.read(0, 2 * MIB).unwrap() == qemu.raw("e.qcow2", &[]));
}

/// A small image in which every kind of thing is present, and where to poke it.
struct Victim {
    image: Vec<u8>,
    l1: usize,
    l2: usize,
    refcount_table: usize,
    refcount_block: usize,
    snapshots: usize,
    cluster: usize,
}

fn u64_at(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

impl Victim {
    fn new(path: &Path) -> Self {
        let image = std::fs::read(path).unwrap();
        let at = |at| u64_at(&image, at) as usize;
        let mask = |entry: usize| entry & 0x00ff_ffff_ffff_fe00;
        let (l1, refcount_table, snapshots) = (at(40), at(48), at(64));
        let victim = Self {
            l2: mask(at(l1)),
            refcount_block: at(refcount_table),
            l1,
            refcount_table,
            snapshots,
            cluster: 1 << u32::from_be_bytes(image[20..24].try_into().unwrap()),
            image: image.clone(),
        };
        assert_clean(&victim.image, "before");
        victim
    }

    fn poked(&self, at: usize, value: u64) -> Vec<u8> {
        let mut image = self.image.clone();
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
        image
    }

    fn with_refcount(&self, host: u64, refcount: u16) -> Vec<u8> {
        let mut image = self.image.clone();
        let at = self.refcount_block + host as usize / self.cluster * 2;
        image[at..at + 2].copy_from_slice(&refcount.to_be_bytes());
        image
    }
}

#[track_caller]
fn finds(image: &[u8], expected: impl Fn(&Violation) -> bool) {
    let report = check(image);
    assert!(
        report.violations.iter().any(expected),
        "{:?}",
        report.violations
    );
}

#[test]
fn corruptions_are_found() {
    let Some(qemu) = Qemu::new() else { return };
    qemu.img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "a.qcow2",
        "4M",
    ]);
    qemu.io("a.qcow2", &["write -P 1 0 64k"]);
    let v = Victim::new(&qemu.path("a.qcow2"));
    let first = u64_at(&v.image, v.l2);
    let second = u64_at(&v.image, v.l2 + 8);
    let host = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    let data0 = Owner::Data(Table::Active, 0);
    let l2 = Owner::L2(Table::Active, 0);

    finds(
        &v.with_refcount(host(first), 0),
        |v| matches!(v, Violation::RefcountTooLow { refcount: 0, references: 1, owners, .. } if owners == &[data0]),
    );
    finds(
        &v.with_refcount(v.l2 as u64, 0),
        |v| matches!(v, Violation::RefcountTooLow { owners, .. } if owners == &[l2]),
    );
    for table in [0, v.l1, v.refcount_table, v.refcount_block] {
        finds(&v.with_refcount(table as u64, 0), |v| {
            matches!(v, Violation::RefcountTooLow { .. })
        });
    }
    // COPIED at refcount 2, and a leak of one.
    let shared = v.with_refcount(host(first), 2);
    finds(
        &shared,
        |v| matches!(v, Violation::Copied { owner, refcount: 2, .. } if *owner == data0),
    );
    assert_eq!(check(&shared).leak_count, 1);
    finds(
        &v.with_refcount(v.l2 as u64, 3),
        |v| matches!(v, Violation::Copied { owner, .. } if *owner == l2),
    );
    // COPIED clear at refcount 1 is only counted.
    let report = check(&v.poked(v.l2, host(first)));
    assert!(report.is_sound() && report.copied_clear == 1 && report.leak_count == 0);
    // A lost pointer is a leak and nothing worse.
    let report = check(&v.poked(v.l2, 0));
    assert!(
        report.is_sound() && report.leak_count == 1,
        "{:?}",
        report.violations
    );
    let report = check(&v.poked(v.l1, 0));
    assert!(
        report.is_sound() && report.leak_count == 17,
        "{:?}",
        report.violations
    );

    // Two guest clusters in one host cluster: found by the refcount and, where that was raised, as an overlap.
    finds(&v.poked(v.l2, second), |v| {
        matches!(v, Violation::RefcountTooLow { references: 2, .. })
    });
    finds(&v.poked(v.l2, second), |v| {
        matches!(v, Violation::Overlap { .. })
    });
    // Guest data on top of metadata.
    for table in [0, v.l1, v.l2, v.refcount_table, v.refcount_block] {
        let entry = table as u64 | 1 << 63;
        if table != 0 {
            finds(
                &v.poked(v.l2, entry),
                |v| matches!(v, Violation::Overlap { owners, .. } if owners.contains(&data0)),
            );
        } else {
            finds(&v.poked(v.l2, entry), |v| {
                matches!(v, Violation::BadEntry { .. })
            });
        }
    }
    // One L2 table for two parts of the disk.
    finds(&v.poked(v.l1 + 8, u64_at(&v.image, v.l1)), |v| {
        matches!(v, Violation::Overlap { .. })
    });
    // One refcount block twice.
    let twice = v.poked(v.refcount_table + 8, v.refcount_block as u64);
    finds(&twice, |v| matches!(v, Violation::Overlap { .. }));

    let eof = v.image.len().next_multiple_of(v.cluster) as u64;
    let bad_table = |owner: Owner| move |v: &Violation| matches!(v, Violation::BadTable { owner: o, .. } if *o == owner);
    finds(&v.poked(v.l1, eof | 1 << 63), bad_table(l2));
    finds(&v.poked(v.l1, 512 | 1 << 63), bad_table(l2));
    finds(
        &v.poked(v.refcount_table, eof),
        bad_table(Owner::RefcountBlock(0)),
    );
    finds(
        &v.poked(v.refcount_table, 512),
        bad_table(Owner::RefcountBlock(0)),
    );
    finds(&v.image[..v.l2 + 512], bad_table(l2));
    let bad_entry = |v: &Violation| matches!(v, Violation::BadEntry { .. });
    finds(&v.poked(v.l1, u64_at(&v.image, v.l1) | 1), bad_entry);
    finds(&v.poked(v.l2, first | 1 << 60), bad_entry);
    finds(&v.poked(v.l2, first | 2), bad_entry);
    finds(&v.poked(v.l2, first + 512), bad_entry);
    finds(&v.poked(v.l2, first | 1 << 62), bad_entry);
    finds(
        &v.poked(v.refcount_table, v.refcount_block as u64 | 8),
        bad_entry,
    );
    let header = |v: &Violation| matches!(v, Violation::Header(_));
    finds(&v.poked(0, 0), header);
    finds(&v.poked(24, 1 << 40), header);
    finds(&v.poked(40, 512), header);
    finds(&v.poked(48, 512), header);
    finds(&v.poked(72, 1 << 30), header);
    finds(&[], header);
    // Data past the end of the file reads as zeroes; QEMU calls it corrupt, however right its refcount is.
    let mut far = v.poked(v.l2, eof | 1 << 63);
    let at = v.refcount_block + eof as usize / v.cluster * 2;
    far[at + 1] = 1;
    finds(&far, bad_entry);
    assert_eq!(check(&far).violation_count, 1);
    assert!(
        GuestReader::open(&far, None)
            .unwrap()
            .read(0, 4096)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
    // The dirty bit is reported and tolerated.
    let dirty = v.poked(72, 1);
    assert!(check(&dirty).is_clean() && check(&dirty).dirty);
}

/// Bitmaps count where the header vouches for them, and then each of their fields is judged.
#[test]
fn corruptions_of_bitmaps_are_found() {
    let Some(qemu) = Qemu::new() else { return };
    qemu.img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "b.qcow2",
        "4M",
    ]);
    qemu.img(&["bitmap", "--add", "-g", "512", "b.qcow2", "fine"]);
    qemu.io("b.qcow2", &["write -P 1 0 64k"]);
    let v = Victim::new(&qemu.path("b.qcow2"));
    let extension = (104..v.cluster)
        .step_by(8)
        .find(|at| u64_at(&v.image, *at) == 0x2385_2875 << 32 | 24)
        .expect("a bitmaps extension");
    let directory = u64_at(&v.image, extension + 24) as usize;
    let table = u64_at(&v.image, directory) as usize;
    let bitmaps = |v: &Violation| matches!(v, Violation::Bitmaps(_));
    for (at, value) in [
        // Flags, type, granularity, length of the name.
        (15, 8),
        (16, 2),
        (17, 8),
        (17, 32),
        (19, 0),
        (18, 4),
        // No table.
        (11, 0),
    ] {
        let mut image = v.image.clone();
        image[directory + at] = value;
        finds(&image, bitmaps);
    }
    let data = u64_at(&v.image, table);
    let eof = v.image.len().next_multiple_of(v.cluster) as u64;
    for entry in [data | 1, data | 1 << 60, data + 512, eof] {
        finds(&v.poked(table, entry), bitmaps);
    }
    // All ones, without a cluster.
    let report = check(&v.poked(table, 1));
    assert!(report.is_sound() && report.leak_count == 1);
    // Whoever does not know bitmaps has written since: the extension means nothing.
    let report = check(&v.poked(88, 0));
    assert!(report.is_sound(), "{:?}", report.violations);
    assert!(report.leak_count >= 3);
}

#[test]
fn corruptions_with_snapshots_and_compression_are_found() {
    let Some(qemu) = Qemu::new() else { return };
    std::fs::write(qemu.path("in.raw"), compressible(64 << 10)).unwrap();
    qemu.img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        "-o",
        "cluster_size=4k",
        "in.raw",
        "c.qcow2",
    ]);
    let v = Victim::new(&qemu.path("c.qcow2"));
    let entry = u64_at(&v.image, v.l2);
    let host = entry & ((1 << 58) - 1);
    let shared = v.image[v.refcount_block + host as usize / v.cluster * 2 + 1];
    assert!(
        shared > 1,
        "several compressed clusters in one host cluster"
    );
    finds(&v.with_refcount(host, u16::from(shared) - 1), |v| {
        matches!(v, Violation::RefcountTooLow { .. })
    });
    assert_eq!(
        check(&v.with_refcount(host, u16::from(shared) + 1)).leak_count,
        1
    );
    finds(&v.poked(v.l2, entry | 1 << 63), |v| {
        matches!(v, Violation::BadEntry { .. })
    });
    // The compressed data ends too early, or is no data at all.
    let mut image = v.image.clone();
    image[host as usize..host as usize + 64].fill(0xff);
    assert!(matches!(
        GuestReader::open(&image, None).unwrap().read(0, 1),
        Err(Violation::Undecodable { .. })
    ));

    qemu.img(&["snapshot", "-c", "one", "c.qcow2"]);
    qemu.io("c.qcow2", &["write -P 1 8k 4k"]);
    let v = Victim::new(&qemu.path("c.qcow2"));
    let snapshot_l1 = u64_at(&v.image, v.snapshots);
    finds(
        &v.with_refcount(snapshot_l1, 0),
        |v| matches!(v, Violation::RefcountTooLow { owners, .. } if owners == &[Owner::L1(Table::Snapshot(0))]),
    );
    finds(
        &v.with_refcount(v.snapshots as u64, 0),
        |v| matches!(v, Violation::RefcountTooLow { owners, .. } if owners == &[Owner::SnapshotTable]),
    );
    // The snapshot's L1 table in place of the active one, and past the end.
    finds(&v.poked(v.snapshots, v.l1 as u64), |v| {
        matches!(v, Violation::Overlap { .. })
    });
    finds(&v.poked(v.snapshots, 1 << 40), |v| {
        matches!(v, Violation::BadTable { .. })
    });
    // A reference that only the snapshot holds counts as well.
    finds(&v.poked(v.snapshots + 36, 1 << 60), |v| {
        matches!(v, Violation::Snapshot { .. })
    });
}

/// No bytes make the checker or the reader panic or run away.
#[test]
fn garbage_is_survived() {
    let Some(qemu) = Qemu::new() else { return };
    std::fs::write(qemu.path("in.raw"), compressible(256 << 10)).unwrap();
    let mut state = 7u64;
    let mut random = move |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    for options in [
        "cluster_size=512",
        "cluster_size=4k,compression_type=zstd",
        "extended_l2=on,cluster_size=16k",
    ] {
        qemu.img(&[
            "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", options, "in.raw", "g.qcow2",
        ]);
        qemu.img(&["snapshot", "-c", "one", "g.qcow2"]);
        qemu.img(&["bitmap", "--add", "g.qcow2", "first"]);
        qemu.io("g.qcow2", &["write -P 1 0 64k"]);
        let good = qemu.bytes("g.qcow2");
        let tables: Vec<usize> = [40, 48, 64]
            .iter()
            .map(|at| u64_at(&good, *at) as usize)
            .collect();
        for _ in 0..3000 {
            let mut image = good.clone();
            for _ in 0..=random(4) {
                let at = match random(4) {
                    0 => random(128),
                    1 => tables[random(3)] + random(64),
                    2 => tables[random(3)] / 512 * 512 + random(4096),
                    _ => random(image.len()),
                };
                let at = at.min(image.len() - 8);
                match random(3) {
                    0 => image[at] = random(256) as u8,
                    1 => image[at..at + 8].fill(0xff),
                    _ => image[at] ^= 1 << random(8),
                }
            }
            if random(8) == 0 {
                image.truncate(random(good.len()));
            }
            let report = check(&image);
            drop(report);
            if let Ok(reader) = GuestReader::open(&image, Some(&|_, len| vec![1; len])) {
                for _ in 0..4 {
                    let _ = reader.read(random(300 << 10) as u64, 5000);
                }
                let _ = reader.snapshot(0).map(|snapshot| snapshot.read(0, 5000));
            }
        }
    }
}
