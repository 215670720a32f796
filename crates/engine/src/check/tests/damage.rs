//! Damaged images: each damage is found, counted as QEMU counts it, and repaired where it can be.

use urus_format::incompatible;

use super::images::work;
use super::qemu::{Directory, Numbers, img, io};
use super::{Image, LIMITS, check, ready, try_check_within};
use crate::check::entries::{COMPRESSED, COPIED};
use crate::check::tests::memory::Memory;
use crate::check::{CheckIo, CheckReport, Finding, Limits, Repair};

/// An image with a bit of everything, and its cluster size.
fn base(directory: &Directory, options: &str, cluster_bytes: u64) -> Image {
    directory.make(options, "12M", &work(cluster_bytes))
}

fn repair(image: &Image, repair: Repair) -> (CheckReport, Image) {
    let memory = Memory::new(&image.bytes);
    let report = check(&memory, repair);
    (report, memory.image())
}

/// After a repair of everything nothing is wrong: we say so, QEMU says so, and a second repair writes nothing.
fn assert_repairs(directory: &Directory, image: &Image, what: &str) -> (CheckReport, Image) {
    let (report, repaired) = repair(image, Repair::All);
    assert!(report.is_clean(), "{what}: {:#?}", report.messages);
    assert!(
        report.messages.iter().all(|finding| finding.repaired),
        "{what}: {:#?}",
        report.messages
    );
    directory.assert_clean(&repaired, what);
    directory.assert_same(&repaired, what);
    let again = Memory::new(&repaired.bytes);
    assert!(
        check(&again, Repair::All).is_clean() && again.log.borrow().is_empty(),
        "{what}"
    );
    (report, repaired)
}

/// As [`assert_repairs`], and QEMU's own repair counts the same.
fn assert_repairs_as_qemu(directory: &Directory, image: &Image, what: &str) -> Image {
    let (report, repaired) = assert_repairs(directory, image, what);
    let theirs = directory.qemu_check(&mut image.clone(), Some("all"));
    assert_eq!(
        (report.corruptions_fixed, report.leaks_fixed),
        (theirs.corruptions_fixed, theirs.leaks_fixed),
        "{what}\nurus: {:#?}\nqemu: {}",
        report.messages,
        theirs.said
    );
    repaired
}

/// Everything a guest can read is as it was.
fn assert_same_content(directory: &Directory, a: &Image, b: &Image) {
    let original = directory.path("original.qcow2");
    std::fs::write(&original, &a.bytes).unwrap();
    directory.with(b, |path| {
        img(
            path,
            &[
                "compare",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                original.to_str().unwrap(),
            ],
            &[],
        );
    });
}

const BASES: &[(&str, u64)] = &[
    ("", 64 << 10),
    ("cluster_size=512,refcount_bits=64", 512),
    ("cluster_size=4k,refcount_bits=8", 4 << 10),
    ("cluster_size=1k,refcount_bits=32", 1 << 10),
    ("cluster_size=128k,extended_l2=on", 128 << 10),
];

#[test]
fn refcounts_too_low_or_too_high() {
    let directory = Directory::new();
    for (options, cluster_bytes) in BASES {
        let image = base(&directory, options, *cluster_bytes);
        let clusters = image.bytes.len() as u64 / cluster_bytes;
        let l2 = image.l2(0) / cluster_bytes;
        for (what, cluster, refcount) in [
            ("the header's refcount is 0", 0, 0),
            ("the refcount table's refcount is 0", 1, 0),
            (
                "the first block's refcount is 0",
                image.block(0) / cluster_bytes,
                0,
            ),
            ("an L2 table's refcount is 0", l2, 0),
            ("an L2 table's refcount is 2", l2, 2),
            ("a data cluster's refcount is 0", l2 + 1, 0),
            ("a data cluster's refcount is 3", l2 + 1, 3),
            ("the last cluster's refcount is 0", clusters - 1, 0),
            ("the last cluster's refcount is high", clusters - 1, 200),
        ] {
            let what = format!("{options}: {what}");
            let damaged = image.with_refcount(cluster, refcount);
            if damaged.refcount(cluster) == image.refcount(cluster) {
                continue;
            }
            let report = directory.assert_same(&damaged, &what);
            assert!(report.corruptions + report.leaks > 0, "{what}");
            let repaired = assert_repairs_as_qemu(&directory, &damaged, &what);
            assert_eq!(
                repaired.bytes, image.bytes,
                "{what}: back to what it was, in place"
            );
        }
    }
}

/// Leaks are repaired without the rest, and whatever is corrupt stays as it is.
#[test]
fn leaks_alone() {
    let directory = Directory::new();
    let image = base(&directory, "", 64 << 10);
    let (leak, low) = (image.l2(0) / 65536 + 2, image.l2(0) / 65536 + 3);
    let leaky = image.with_refcount(leak, 5);
    let (report, repaired) = repair(&leaky, Repair::Leaks);
    assert!(report.is_clean() && report.leaks_fixed == 1, "{report:#?}");
    assert_eq!(repaired.bytes, image.bytes);
    let theirs = directory.qemu_check(&mut leaky.clone(), Some("leaks"));
    assert_eq!(theirs.leaks_fixed, 1);

    let both = leaky.with_refcount(low, 0);
    let (report, repaired) = repair(&both, Repair::Leaks);
    assert_eq!(
        (report.leaks, report.leaks_fixed, report.corruptions_fixed),
        (0, 1, 0)
    );
    assert!(report.corruptions > 0);
    assert_eq!(repaired.bytes, image.with_refcount(low, 0).bytes);
    // COPIED at a refcount that falls to 1 becomes right by itself; a clear flag is not set.
    let clear = leaky.poked(image.l2(0) + 8, image.word(image.l2(0) + 8) & !COPIED);
    let (report, _) = repair(&clear, Repair::Leaks);
    assert_eq!(
        (report.leaks, report.corruptions, report.copied_clear_at_one),
        (0, 1, 1)
    );
}

/// Refcounts past the file's end, which an allocation leaves that a power cut ended.
#[test]
fn leaks_past_the_end_of_the_file() {
    let directory = Directory::new();
    let image = base(&directory, "", 64 << 10);
    let end = (image.bytes.len() as u64).div_ceil(65536);
    let damaged = image.with_refcount(end, 1).with_refcount(end + 300, 7);
    let report = directory.assert_same(&damaged, "QEMU does not look there");
    assert_eq!((report.leaks, report.leaks_past_end), (0, 2));
    assert!(report.is_sound() && !report.is_clean());
    for how in [Repair::Leaks, Repair::All] {
        let (report, repaired) = repair(&damaged, how);
        assert!(report.is_clean());
        assert_eq!(repaired.bytes, image.bytes);
    }
}

#[test]
fn copied_flags() {
    let directory = Directory::new();
    for (options, cluster_bytes) in BASES {
        let image = base(&directory, options, *cluster_bytes);
        let (l1, l2) = (image.l1(), image.l2(0));
        for (what, at) in [("L1", l1), ("L2", l2)] {
            let what = format!("{options}: COPIED is clear in an entry of {what}");
            let damaged = image.poked(at, image.word(at) ^ COPIED);
            let report = directory.assert_same(&damaged, &what);
            assert_eq!(
                (report.corruptions, report.copied_clear_at_one),
                (1, 1),
                "{what}"
            );
            let repaired = assert_repairs_as_qemu(&directory, &damaged, &what);
            assert_eq!(repaired.bytes, image.bytes);
        }

        let shared = directory.with(&image, |path| {
            img(path, &["snapshot", "-c", "one"], &[]);
            io(path, &["write 1M 1k"]);
        });
        let l1 = shared.l1();
        let data = shared.l2(0);
        for (what, at) in [("L1", l1), ("L2", data)] {
            let what =
                format!("{options}: COPIED is set in an entry of {what} whose refcount is 2");
            // With small clusters 1 MiB has an L2 table of its own, and the first one is shared.
            if shared.word(at) & COPIED != 0 {
                continue;
            }
            let damaged = shared.poked(at, shared.word(at) | COPIED);
            let report = directory.assert_same(&damaged, &what);
            assert_eq!(
                (report.corruptions, report.copied_clear_at_one),
                (1, 0),
                "{what}"
            );
            let repaired = assert_repairs_as_qemu(&directory, &damaged, &what);
            assert_eq!(repaired.bytes, shared.bytes);
        }
    }
}

/// The refcount structures themselves: they move, and QEMU is content with them.
#[test]
fn refcount_structures() {
    let directory = Directory::new();
    for (options, cluster_bytes) in BASES {
        let image = base(&directory, options, *cluster_bytes);
        let table = image.header().refcount_table.0;
        let blocks = (0..).take_while(|index| image.block(*index) != 0).count() as u64;
        let last = blocks - 1;
        let l1 = image.l1();
        // QEMU gives other numbers or fails where `same` is false.
        for (what, index, entry, same) in [
            ("no block", 0, 0, true),
            ("no last block", last, 0, true),
            ("reserved bits", 0, image.block(0) | 2, true),
            (
                "unaligned",
                0,
                image.block(0) | 0x200,
                cluster_bytes == &512,
            ),
            ("past the end", 0, 1 << 40, true),
            ("absurd", last, 0xffff_ffff_ffff_fe00, false),
            ("twice the same", blocks, image.block(0), true),
            ("the table as a block", last, table, true),
            ("the L1 table as a block", last, l1, true),
            (
                "a data cluster as a block",
                last,
                image.l2(0) + cluster_bytes,
                true,
            ),
        ] {
            let what = format!("{options}: refcount table: {what}");
            let damaged = image.poked(table + index * 8, entry);
            let report = check(&Memory::new(&damaged.bytes), Repair::None);
            assert!(report.corruptions > 0, "{what}");
            if same {
                directory.assert_same(&damaged, &what);
            }
            let (_, repaired) = assert_repairs(&directory, &damaged, &what);
            assert_same_content(&directory, &image, &repaired);
        }
    }
}

/// An image whose header names no refcount table at all is repaired too.
#[test]
fn without_a_refcount_table() {
    let directory = Directory::new();
    let image = base(&directory, "cluster_size=4k", 4 << 10);
    let mut damaged = image.clone();
    damaged.bytes[48..60].fill(0);
    let (_, repaired) = assert_repairs(&directory, &damaged, "no refcount table");
    assert_same_content(&directory, &image, &repaired);
    // One that lies on other metadata.
    let mut damaged = image.clone();
    let l1 = image.l1();
    damaged.poke(48, l1);
    let (_, repaired) = assert_repairs(&directory, &damaged, "the L1 table as refcount table");
    assert_same_content(&directory, &image, &repaired);
}

/// Entries that are wrong beyond repair: they stay, and with them the bits that say so.
#[test]
fn entries_that_cannot_be_repaired() {
    let directory = Directory::new();
    for (options, cluster_bytes) in BASES {
        let image = base(&directory, options, *cluster_bytes);
        let (l1, l2) = (image.l1(), image.l2(0));
        let (l1_entry, entry) = (image.word(l1), image.word(l2));
        let past = 1 << 40;
        // QEMU reads an L2 table that is not aligned, and finds whatever is there; it does not count a
        // compressed cluster with subclusters.
        for (what, at, value, same) in [
            ("L2: past the end", l2, past | COPIED, true),
            ("L2: past the end, not COPIED", l2, past, true),
            ("L2: unaligned", l2, entry | 0x200, *cluster_bytes != 512),
            ("L2: reserved low bits", l2, entry | 4, true),
            ("L2: reserved high bits", l2, entry | 1 << 60, true),
            (
                "L2: compressed past the end",
                l2,
                COMPRESSED | past | 3,
                !options.contains("extended"),
            ),
            ("L1: past the end", l1, past | COPIED, true),
            ("L1: unaligned", l1, l1_entry | 0x200, false),
            ("L1: reserved bits", l1, l1_entry | 1, true),
        ] {
            let what = format!("{options}: {what}");
            let mut damaged = image.poked(at, value);
            if damaged.word(at) == image.word(at) || (value & 0x200 != 0 && *cluster_bytes == 512) {
                continue;
            }
            damaged.poke(
                72,
                damaged.word(72) | incompatible::DIRTY | incompatible::CORRUPT,
            );
            let report = check(&Memory::new(&damaged.bytes), Repair::None);
            assert!(report.corruptions > 0, "{what}");
            if same {
                directory.assert_same(&damaged, &what);
            }
            let (report, repaired) = repair(&damaged, Repair::All);
            assert!(report.corruptions > 0, "{what}");
            let bits = repaired.header().incompatible;
            assert_eq!(bits & 3, 3, "{what}: the bits stay");
            // Nothing was freed that may be what is lost.
            for cluster in 0..image.bytes.len() as u64 / cluster_bytes {
                assert!(
                    repaired.refcount(cluster) >= damaged.refcount(cluster),
                    "{what}: {cluster}"
                );
            }
            // A second repair changes nothing.
            let (_, again) = repair(&repaired, Repair::All);
            assert_eq!(again.bytes, repaired.bytes, "{what}");
        }
    }
}

/// Flags that say nothing, or that the version does not define. Of L2 entries QEMU calls them clean, and so do we: what
/// else the image holds must not be lost for them.
#[test]
fn flags_without_a_meaning() {
    let directory = Directory::new();
    let image = base(&directory, "", 64 << 10);
    let (l1, l2) = (image.l1(), image.l2(0));
    // 10 MiB is not allocated.
    let at = l2 + 160 * 8;
    assert_eq!(image.word(at), 0);
    let damaged = image.poked(at, COPIED);
    let report = directory.assert_same(&damaged, "COPIED without an offset");
    assert!(report.is_clean(), "{:?}", report.messages);
    let (_, repaired) = repair(&damaged, Repair::All);
    assert_eq!(repaired.bytes, damaged.bytes);

    // An L1 entry of flags alone: QEMU takes the header for the L2 table, and finds it damaged.
    let larger = directory.make("", "1G", &["write 600M 64k"]);
    let l1_entry = larger.l1();
    assert_eq!(larger.word(l1_entry), 0);
    let report = check(
        &Memory::new(&larger.poked(l1_entry, COPIED).bytes),
        Repair::None,
    );
    assert_eq!(report.corruptions, 1, "{:?}", report.messages);
    let (report, repaired) = repair(&larger.poked(l1_entry, COPIED), Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    assert_eq!(repaired.bytes, larger.bytes);

    // What follows the last entry in its sector is not the table's: a repair leaves it (O28).
    let behind = l1 + 8;
    let shared = image.poked(behind, COPIED | 0x5_0000);
    let broken = shared.poked(l2, shared.word(l2) & !COPIED);
    let (report, repaired) = repair(&broken, Repair::All);
    assert_eq!(report.corruptions_fixed, 1, "{:?}", report.messages);
    assert_eq!(repaired.bytes, shared.bytes);

    // A compressed cluster is never COPIED. 8 MiB is compressed.
    let at = l2 + 128 * 8;
    assert_ne!(image.word(at) & COMPRESSED, 0);
    let damaged = image.poked(at, image.word(at) | COPIED);
    let report = directory.assert_same(&damaged, "COPIED and compressed");
    assert_eq!(report.corruptions, 1);
    let (_, repaired) = assert_repairs(&directory, &damaged, "COPIED and compressed");
    assert_eq!(repaired.bytes, image.bytes);
}

/// The zero flag in version 2: QEMU's check calls it clean, before and after a repair.
#[test]
fn zero_flags_in_version_2() {
    let directory = Directory::new();
    let commands = ["write -P 1 0 64k", "write -P 2 64k 64k"];
    let image = directory.make("compat=0.10", "1M", &commands);
    let l2 = image.l2(0);
    let entry = image.word(l2 + 8);
    for (what, value, leaks) in [
        ("with a cluster", entry | 1, 0),
        ("with a cluster, not COPIED", (entry | 1) & !COPIED, 0),
        ("alone", 1, 1),
        ("COPIED", COPIED | 1, 1),
    ] {
        let damaged = image.poked(l2 + 8, value);
        let report = directory.assert_same(&damaged, what);
        assert_eq!(report.leaks, leaks, "{what}");
        let noted = |report: &CheckReport| {
            let told = |finding: &&Finding| finding.text.contains("zero flag");
            report.messages.iter().filter(told).count()
        };
        assert_eq!(noted(&report), 1, "{what}: {:?}", report.messages);
        let (report, repaired) = repair(&damaged, Repair::All);
        assert!(report.is_clean(), "{what}: {:?}", report.messages);
        assert_eq!(noted(&report), 1, "{what}: {:?}", report.messages);
        let (_, again) = repair(&repaired, Repair::All);
        assert_eq!(again.bytes, repaired.bytes, "{what}");
    }
}

/// A cluster with two uses, of which one is metadata. QEMU is content once the refcount is 2; we are not.
#[test]
fn overlaps() {
    let directory = Directory::new();
    for (options, cluster_bytes) in BASES {
        let image = base(&directory, options, *cluster_bytes);
        let (table, l1, l2) = (image.header().refcount_table.0, image.l1(), image.l2(0));
        for (what, host, stays) in [
            ("the refcount table", table, false),
            ("a refcount block", image.block(0), false),
            ("the L1 table", l1, true),
            ("an L2 table", l2, true),
        ] {
            let what = format!("{options}: data on {what}");
            let damaged = image.poked(l2, host | COPIED);
            directory.assert_same(&damaged, &what);
            let (report, repaired) = repair(&damaged, Repair::All);
            if host == l2 {
                // A table that may be data is not written to, so one of its flags stays wrong too.
                assert_eq!(
                    (report.corruptions, report.check_errors),
                    (2, 0),
                    "{what}: {report:#?}"
                );
                assert_eq!(
                    repaired.word(l1) & COPIED,
                    0,
                    "{what}: it is copied before it is written"
                );
                assert_eq!(repaired.word(l2), damaged.word(l2), "{what}");
                continue;
            }
            if stays {
                assert_eq!(
                    (report.corruptions, report.check_errors),
                    (1, 0),
                    "{what}: {report:#?}"
                );
                assert_eq!(repaired.refcount(host / cluster_bytes), 2, "{what}");
                assert_eq!(
                    repaired.word(l2) & COPIED,
                    0,
                    "{what}: it is copied before it is written"
                );
            } else {
                // What overlapped was moved away.
                assert!(report.is_clean(), "{what}: {report:#?}");
                assert_ne!(repaired.word(l2) & COPIED, 0, "{what}");
            }
            let verdict = directory.qemu_check(&mut repaired.clone(), None);
            assert_eq!(verdict.code, 0, "{what}: {}", verdict.said);
        }
    }
}

/// More references than a refcount can hold.
#[test]
fn refcounts_that_overflow() {
    let directory = Directory::new();
    let image = directory.make("refcount_bits=1", "12M", &["write 0 192k"]);
    let l2 = image.l2(0);
    let damaged = image.poked(l2 + 8, image.word(l2));
    directory.assert_same(&damaged, "two references, one bit");
    let (report, repaired) = repair(&damaged, Repair::All);
    assert!(report.corruptions > 0);
    assert_eq!(repaired.word(l2) & COPIED, 0);
    assert_eq!(repaired.word(l2 + 8) & COPIED, 0);
}

/// The image's end is missing, as after a copy that was cut off.
#[test]
fn cut_off_images() {
    let directory = Directory::new();
    for (options, cluster_bytes) in BASES {
        let image = base(&directory, options, *cluster_bytes);
        let len = image.bytes.len();
        for keep in [len - 512, len - len / 16, len / 2, len / 4] {
            let mut damaged = image.clone();
            damaged.bytes.truncate(keep.next_multiple_of(512));
            let what = format!("{options}: {keep} of {len} bytes");
            if urus_format::Header::parse(&damaged.bytes, damaged.bytes.len() as u64).is_err() {
                continue;
            }
            directory.assert_same(&damaged, &what);
            let (report, repaired) = repair(&damaged, Repair::All);
            assert!(report.check_errors == 0, "{what}: {report:#?}");
            directory.assert_same(&repaired, &what);
        }
    }
}

#[test]
fn snapshots_and_bitmaps() {
    let directory = Directory::new();
    let mut image = directory.make("cluster_size=4k", "4M", &["write 0 1M"]);
    image = directory.with(&image, |path| {
        img(path, &["bitmap", "--add", "-g", "512"], &["b"]);
        io(path, &["write -P 1 0 2M"]);
        img(path, &["snapshot", "-c", "one"], &[]);
        img(path, &["snapshot", "-c", "two"], &[]);
    });
    let table = image.header().snapshot_table.0;
    let directory_at = image.header().bitmaps.unwrap().directory.0;
    let bitmap_table = image.word(directory_at);
    for (what, at, value) in [
        ("a snapshot's L1 table past the end", table, 1 << 40),
        (
            "a snapshot's L1 table unaligned",
            table,
            image.word(table) + 512,
        ),
        ("a snapshot's L1 table on the active one", table, image.l1()),
        ("a bitmap's table past the end", directory_at, 1 << 40),
        ("a bitmap past the end", bitmap_table, 1 << 40),
        ("a bitmap on the header's neighbour", bitmap_table, 4096),
    ] {
        let damaged = image.poked(at, value);
        let report = directory.assert_same(&damaged, what);
        assert!(report.corruptions > 0, "{what}");
        let (report, _) = repair(&damaged, Repair::All);
        // QEMU calls two uses of one cluster right once the refcount is 2.
        assert!(
            report.corruptions > 0 || what.contains("neighbour"),
            "{what}: {report:#?}"
        );
    }
    // The snapshot's L2 tables hold references too.
    let l1 = image.word(table);
    let l2 = image.word(l1) & super::super::entries::OFFSET_MASK;
    let damaged = image.with_refcount(l2 / 4096, 1);
    directory.assert_same(&damaged, "a shared L2 table with refcount 1");
    // QEMU 10.0.2 repairs an image with snapshots and bitmaps by forgetting the snapshots.
    let (_, repaired) = assert_repairs(&directory, &damaged, "a shared L2 table with refcount 1");
    assert_eq!(repaired.bytes, image.bytes);
}

/// Sectors that cannot be read: the check says so, and nothing is repaired by guesswork.
#[test]
fn unreadable_tables() {
    let directory = Directory::new();
    let image = base(&directory, "", 64 << 10);
    let image = image.with_refcount(image.l2(0) / 65536 + 1, 0);
    for at in [
        image.l1(),
        image.l2(0),
        image.block(0),
        image.header().refcount_table.0,
    ] {
        let memory = Memory::new(&image.bytes);
        memory.unreadable.set(Some(at));
        let report = check(&memory, Repair::All);
        assert!(report.check_errors > 0);
        assert!(memory.log.borrow().is_empty(), "nothing is written");
    }
}

/// Every write and barrier of a repair fails once: the error comes back, and the bits stay.
#[test]
fn failing_writes() {
    let directory = Directory::new();
    let image = base(&directory, "cluster_size=512,refcount_bits=64", 512);
    let mut image = image.poked(image.header().refcount_table.0, 0);
    image.poke(72, incompatible::DIRTY);
    let whole = Memory::new(&image.bytes);
    assert!(check(&whole, Repair::All).is_clean());
    let events = whole.log.borrow().len();
    assert!(events > 6);
    for failing in 0..events {
        let memory = Memory::new(&image.bytes);
        memory.failing.set(Some(failing));
        assert!(try_check_within(&memory, Repair::All, LIMITS).is_err());
        assert_eq!(
            memory.log.borrow().len(),
            failing + 1,
            "nothing is written after a failure"
        );
        let bits = memory.header().incompatible;
        // The last event is the barrier after the bit was cleared.
        assert_eq!(bits & 1, u64::from(failing + 1 < events));
        // Whatever was left behind can be repaired.
        memory.failing.set(None);
        assert!(check(&memory, Repair::All).is_clean());
    }
}

/// Features that nobody knows are refused; autoclear bits that nobody knows are cleared before the first change.
#[test]
fn feature_bits() {
    let directory = Directory::new();
    let image = base(&directory, "", 64 << 10);
    let unknown = image.poked(72, 1 << 40);
    assert!(try_check_within(&Memory::new(&unknown.bytes), Repair::None, LIMITS).is_err());

    let marked = image.poked(88, 1 << 40);
    let (report, same) = repair(&marked, Repair::All);
    assert!(
        report.is_clean() && same.bytes == marked.bytes,
        "nothing to change"
    );
    let (report, repaired) = repair(&marked.with_refcount(0, 0), Repair::All);
    assert!(report.is_clean());
    assert_eq!(repaired.header().autoclear, 0);

    let corrupt = image.poked(72, incompatible::CORRUPT);
    assert_eq!(repair(&corrupt, Repair::None).1.bytes, corrupt.bytes);
    for how in [Repair::Leaks, Repair::All] {
        assert_eq!(repair(&corrupt, how).1.bytes, image.bytes);
    }
}

/// Where memory or time for a check runs out, it says so and repairs nothing.
#[test]
fn limits() {
    let directory = Directory::new();
    let image = base(&directory, "cluster_size=512", 512).with_refcount(9, 0);
    for limits in [
        Limits {
            memory_bytes: 1000,
            ..LIMITS
        },
        Limits {
            tables_bytes: 4000,
            ..LIMITS
        },
    ] {
        let memory = Memory::new(&image.bytes);
        let report = try_check_within(&memory, Repair::All, limits).unwrap();
        assert_eq!(report.check_errors, 1, "{report:#?}");
        assert!(memory.log.borrow().is_empty());
    }
    let numbers = Numbers::from(&check(&Memory::new(&image.bytes), Repair::None));
    assert_eq!(numbers.check_errors, 0);
    assert_eq!(
        ready(Memory::new(&image.bytes).read(0, 4)).unwrap(),
        b"QFI\xfb"
    );
}
