//! Images that lie: no panic, and no more work or memory than the file's own size calls for.

use proptest::prelude::*;

use urus_format::Header;
use urus_format::create::{CreateOptions, layout};

use super::memory::{Memory, write};
use super::{Image, LIMITS, check, ready, try_check_within};
use crate::check::entries::{COMPRESSED, COPIED};
use crate::check::walk::walk;
use crate::check::{CheckReport, Limits, Repair};

/// A small image with a few clusters of everything, made by hand: no need of other tools here.
fn small(cluster_bits: u32, refcount_order: u32) -> Image {
    let options = CreateOptions {
        cluster_bits,
        refcount_order,
        // What two L2 tables map.
        ..CreateOptions::new(1 << (2 * cluster_bits - 2))
    };
    let new = layout(&options).expect("a layout");
    let mut bytes = vec![0; crate::to_usize(new.file_bytes)];
    for (offset, data) in &new.writes {
        write(&mut bytes, *offset, data);
    }
    let cluster = 1u64 << cluster_bits;
    bytes.resize(bytes.len().next_multiple_of(crate::to_usize(cluster)), 0);
    let mut image = Image { bytes };
    let l1 = image.l1();
    let first = image.bytes.len() as u64;
    // A snapshot table, a snapshot's L1 table, two L2 tables, data.
    image.bytes.resize(crate::to_usize(first + 12 * cluster), 0);
    let (snapshots, snapshot_l1, l2) = (first, first + cluster, first + 2 * cluster);
    image.bytes[60..64].copy_from_slice(&1u32.to_be_bytes());
    image.poke(64, snapshots);
    image.poke(snapshots, snapshot_l1);
    image.poke(snapshots + 8, 1 << 32 | 1 << 16 | 1);
    image.poke(snapshots + 32, 16);
    image.poke(snapshots + 48, 1 << (2 * cluster_bits - 2));
    image.poke(snapshot_l1, l2);
    image.poke(l1, l2);
    image.poke(l1 + 8, (l2 + cluster) | COPIED);
    for index in 0..3 {
        image.poke(l2 + index * 8, l2 + (2 + index) * cluster);
        image.poke(
            l2 + cluster + index * 8,
            (l2 + (5 + index) * cluster) | COPIED,
        );
    }
    image.poke(l2 + 5 * 8, COMPRESSED | (l2 + 8 * cluster + 77));
    let memory = Memory::new(&image.bytes);
    assert!(check(&memory, Repair::All).is_clean());
    memory.image()
}

/// Reads at most what a check of such a file may read, repairs at will, and is done when it is done.
fn assert_bounded(image: &Image, len: u64) {
    if Header::parse(&image.bytes, len).is_err() {
        return;
    }
    let memory = Memory::new(&image.bytes);
    memory.len.set(len);
    let lost = ready(walk(&memory, &memory.header(), LIMITS)).is_ok_and(|walked| walked.lost);
    for repair in [Repair::None, Repair::Leaks, Repair::All] {
        let memory = Memory::new(&image.bytes);
        memory.len.set(len);
        let mut read = 0;
        let Ok(report) = try_check_within(&memory, repair, LIMITS) else {
            continue;
        };
        if repair == Repair::None {
            // Tables once, refcount blocks twice, and a little for each.
            read = memory.read.get();
            assert!(read <= 4 * len + (80 << 20), "{read} bytes read of {len}");
            assert!(memory.log.borrow().is_empty());
        }
        assert!(memory.read.get() <= 8 * len + 8 * read + (400 << 20));
        let grown = memory.bytes.borrow().len() as u64;
        assert!(
            grown <= len + (len / 8) + (16 << 20),
            "{len} grew to {grown}"
        );
        if repair == Repair::None || report.check_errors > 0 {
            continue;
        }
        // A repair leaves nothing that it could have repaired. (Where an entry led past the end of the file it
        // may lead into it once that has grown.)
        let rounds = if lost { 4 } else { 1 };
        let mut last = report;
        for _ in 0..rounds {
            let before = memory.log.borrow().len();
            let again = check(&memory, repair);
            let same = memory.log.borrow().len() == before;
            assert!(same || lost, "{repair:?} {last:#?} {again:#?}");
            if same {
                let counts = |report: &CheckReport| {
                    (report.corruptions, report.leaks, report.leaks_past_end)
                };
                assert_eq!(counts(&again), counts(&last), "{repair:?} {last:#?}");
                break;
            }
            last = again;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Any bytes of the metadata, changed.
    #[test]
    fn random_bytes(
        cluster_bits in prop_oneof![Just(9u32), Just(12), Just(16)],
        refcount_order in 0u32..=6,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        header in prop::collection::vec((0usize..112, any::<u8>()), 0..3),
    ) {
        // A bit is too little for a snapshot.
        let image = small(cluster_bits, refcount_order.max(1));
        let mut damaged = image.clone();
        let metadata: Vec<usize> = (0..image.bytes.len())
            .step_by(8)
            .filter(|at| image.bytes[*at..*at + 8] != [0; 8])
            .collect();
        for (at, value) in changes {
            damaged.bytes[metadata[at.index(metadata.len())] + usize::from(value % 8)] ^= value;
        }
        for (at, value) in header {
            damaged.bytes[at] = value;
        }
        assert_bounded(&damaged, damaged.bytes.len() as u64);
    }

    /// Entries that lead somewhere into the file, where what they find is not what they want.
    #[test]
    fn random_pointers(
        cluster_bits in prop_oneof![Just(9u32), Just(12)],
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0u64..30, any::<bool>(), any::<bool>()), 1..8),
    ) {
        let image = small(cluster_bits, 4);
        let mut damaged = image.clone();
        let words: Vec<u64> = (40..image.bytes.len() as u64)
            .step_by(8)
            .filter(|at| image.word(*at) != 0)
            .collect();
        for (at, cluster, copied, compressed) in changes {
            let flags = if copied { COPIED } else { 0 } | if compressed { COMPRESSED } else { 0 };
            damaged.poke(words[at.index(words.len())], cluster << cluster_bits | flags);
        }
        assert_bounded(&damaged, damaged.bytes.len() as u64);
    }
}

/// Tables that refer to themselves and to one another.
#[test]
fn tables_in_circles() {
    for cluster_bits in [9, 12, 16] {
        let image = small(cluster_bits, 4);
        let (l1, l2, block) = (image.l1(), image.l2(1), image.block(0));
        let table = image.header().refcount_table.0;
        for (at, host) in [
            (l1, l1),
            (l1 + 8, l1),
            (l2, l2),
            (l2, l1),
            (table, table),
            (table + 8, table),
            (table, l1),
            (table, 0),
            (l2, block),
        ] {
            assert_bounded(&image.poked(at, host), image.bytes.len() as u64);
            assert_bounded(&image.poked(at, host | COPIED), image.bytes.len() as u64);
        }
        // All entries of a table lead to one place.
        for (table, host) in [(l1, l2), (l2, l2), (table, block), (table, table), (l2, 0)] {
            let mut damaged = image.clone();
            for index in 0..(1 << cluster_bits) / 8 {
                damaged.poke(table + index * 8, host);
            }
            assert_bounded(&damaged, damaged.bytes.len() as u64);
        }
    }
}

/// An image of which a few kilobytes are there, with the snapshots as told: L1 table and entries of each.
fn with_snapshots(count: u32, l1: impl Fn(u32) -> (u64, u32), l1_bytes: usize) -> Image {
    let mut image = small(12, 4);
    let table = image.bytes.len() as u64;
    for number in 0..count {
        let (offset, entries) = l1(number);
        image.bytes.extend_from_slice(&offset.to_be_bytes());
        image.bytes.extend_from_slice(&entries.to_be_bytes());
        image.bytes.extend_from_slice(&[0; 24]);
        image.bytes.extend_from_slice(&16u32.to_be_bytes());
        image.bytes.extend_from_slice(&[0; 16]);
    }
    image
        .bytes
        .resize(image.bytes.len().next_multiple_of(4096) + l1_bytes, 0);
    image.bytes[60..64].copy_from_slice(&count.to_be_bytes());
    image.poke(64, table);
    image
}

/// 65536 snapshots, each with the same large L1 table, or nearly the same.
#[test]
fn snapshots_that_share() {
    let l1_bytes = 1 << 20;
    let start = with_snapshots(65536, |_| (0, 0), 0).bytes.len() as u64;
    let l2 = small(12, 4).l2(0);
    let fill = |mut image: Image| {
        for at in (start..start + l1_bytes).step_by(8) {
            image.poke(at, l2);
        }
        image
    };
    let entries = 1 << 17;
    let same = fill(with_snapshots(65536, |_| (start, entries), 1 << 20));
    let memory = Memory::new(&same.bytes);
    let report = check(&memory, Repair::None);
    assert!(report.corruptions > 0 && report.check_errors == 0);
    assert!(memory.read.get() < 20 << 20, "{} bytes", memory.read.get());

    let lengths = fill(with_snapshots(
        65536,
        |number| (start, entries - number),
        1 << 20,
    ));
    let shifted = |number| (start + u64::from(number % 256) * 4096, 1 + number);
    for image in [lengths, fill(with_snapshots(65536, shifted, 1 << 20))] {
        let memory = Memory::new(&image.bytes);
        let report = check(&memory, Repair::All);
        assert_eq!(report.check_errors, 1, "{:?}", report.messages.last());
        assert!(memory.log.borrow().is_empty(), "nothing is repaired");
        assert!(memory.read.get() < 200 << 20, "{} bytes", memory.read.get());
    }
}

/// A file of 8 EiB that is nearly all hole, whose tables lead all over it.
#[test]
fn sparse_files() {
    let image = small(12, 4);
    let mut damaged = image.clone();
    let l2 = image.l2(1);
    for index in 0..512u64 {
        damaged.poke(l2 + index * 8, (index << 44) | 4096);
        damaged.poke(
            image.header().refcount_table.0 + index * 8,
            (index << 40) + 4096,
        );
    }
    let limits = Limits {
        memory_bytes: 64 << 10,
        ..LIMITS
    };
    for (limits, errors) in [(LIMITS, 0), (limits, 1)] {
        let memory = Memory::new(&damaged.bytes);
        memory.len.set(i64::MAX.unsigned_abs());
        let report = try_check_within(&memory, Repair::None, limits).unwrap();
        assert_eq!(report.check_errors, errors);
        assert!(memory.read.get() < 16 << 20);
    }
    // Each cluster would need a refcount block of its own.
    let mut damaged = image.clone();
    for index in 0..512u64 {
        damaged.poke(l2 + index * 8, (index << 28) | 4096);
    }
    let memory = Memory::new(&damaged.bytes);
    memory.len.set(1 << 40);
    let limits = Limits {
        relocation_bytes: 1 << 20,
        ..LIMITS
    };
    let report = try_check_within(&memory, Repair::All, limits).unwrap();
    assert!(
        memory.log.borrow().is_empty(),
        "{:?}",
        report.messages.last()
    );
    let last = report.messages.last().unwrap();
    assert!(last.text.contains("new refcount structures"), "{last}");
}

/// Found by fuzzing. New refcount structures never go where a broken entry says that something lies: it would be taken
/// for that from then on, and each repair would find one more thing to repair.
#[test]
fn a_repair_stays_clear_of_what_is_lost() {
    let mut image = small(9, 4);
    let len = image.bytes.len() as u64;
    let l2 = image.l2(1);
    image.poke(l2 + 9 * 8, (len + 512) | COPIED);
    // The refcount table has to move.
    image.poke(48, image.l1());
    let memory = Memory::new(&image.bytes);
    let report = check(&memory, Repair::All);
    assert!(!report.is_sound());
    assert_eq!(memory.image().bytes, image.bytes);
    let told = |finding: &crate::check::Finding| finding.text.contains("nothing was repaired");
    assert!(report.messages.iter().any(told), "{report:?}");
}

/// Found by fuzzing. A refcount table that passes the end of the file cannot be counted; its clusters are no leaks.
#[test]
fn leaks_of_a_table_that_is_cut_off_are_not_freed() {
    let mut image = small(9, 4);
    let clusters = u32::try_from(image.bytes.len() / 512).expect("small") + 8;
    image.bytes[56..60].copy_from_slice(&clusters.to_be_bytes());
    let table = image.word(48) / 512;
    assert_eq!(image.refcount(table), 1);
    let memory = Memory::new(&image.bytes);
    check(&memory, Repair::Leaks);
    assert_eq!(memory.image().refcount(table), 1);
}

/// Found by fuzzing. Once new structures have taken the place of such a table, what else leaked is freed at once.
#[test]
fn leaks_go_together_with_a_table_that_is_cut_off() {
    let mut image = small(9, 4);
    let clusters = u32::try_from(image.bytes.len() / 512).expect("small") + 8;
    image.bytes[56..60].copy_from_slice(&clusters.to_be_bytes());
    let memory = Memory::new(&image.bytes);
    let report = check(&memory, Repair::All);
    assert!(report.is_clean(), "{report:?}");
    let repaired = memory.image().bytes;
    check(&memory, Repair::All);
    assert_eq!(memory.image().bytes, repaired);
}

/// Found by fuzzing. So are those of a refcount block whose entry is broken: whoever ignores the broken bits still counts in it.
#[test]
fn a_refcount_block_behind_a_broken_entry_is_no_leak() {
    let mut image = small(9, 4);
    let block = image.bytes.len() as u64;
    image.bytes.resize(image.bytes.len() + 512, 0);
    image.set_refcount(block / 512, 1);
    let table = image.word(48);
    image.poke(table + 8, block | 1);
    let memory = Memory::new(&image.bytes);
    let report = check(&memory, Repair::Leaks);
    assert_eq!(memory.image().bytes, image.bytes, "{report:?}");
    let told = |finding: &crate::check::Finding| finding.text.contains("no cluster is freed");
    assert!(report.messages.iter().any(told), "{report:?}");
    // With a new table nothing leads there any more.
    let report = check(&memory, Repair::All);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(memory.image().refcount(block / 512), 0);
}

/// Found by fuzzing. What a repair does not mend is not called repaired because the file became longer.
#[test]
fn what_is_left_is_not_called_repaired() {
    let mut image = small(9, 4);
    let l2 = image.l2(1);
    image.poke(l2 + 9 * 8, 1 << 40 | COPIED);
    image.poke(48, image.l1());
    let memory = Memory::new(&image.bytes);
    let report = check(&memory, Repair::All);
    assert!(memory.image().bytes.len() > image.bytes.len(), "it moved");
    let beyond: Vec<_> = report
        .messages
        .iter()
        .filter(|finding| finding.text.starts_with("the data of L2 table"))
        .collect();
    assert_eq!(beyond.len(), 1, "{report:?}");
    assert!(!beyond[0].repaired);
}

/// Found by fuzzing. The engine refuses to write such an image, so a check must not call it sound.
#[test]
fn an_l2_table_used_twice_by_the_active_table() {
    let mut image = small(9, 4);
    let l1 = image.l1();
    let shared = image.l2(1) & !COPIED;
    image.poke(l1, shared);
    image.poke(l1 + 8, shared);
    let memory = Memory::new(&image.bytes);
    let report = check(&memory, Repair::All);
    assert!(report.corruptions >= 1 && !report.is_sound(), "{report:?}");
}

/// Found by fuzzing. An L2 table that is data too, by an entry of its own: what is written into such a table could be a guest's.
/// So its flags stay, while the refcount rises that kept the cluster from nobody.
#[test]
fn a_table_that_is_data_too_is_counted_and_not_written() {
    let mut image = small(9, 4);
    let table = image.l2(1);
    let cluster = table / 512;
    image.poke(table + 9 * 8, table | COPIED);
    let at = crate::to_usize(table);
    let before = image.bytes[at..at + 512].to_vec();
    assert_eq!(image.refcount(cluster), 1);
    let memory = Memory::new(&image.bytes);
    let report = check(&memory, Repair::All);
    assert!(!report.is_sound(), "{report:?}");
    let repaired = memory.image();
    assert_eq!(repaired.bytes[at..at + 512], before);
    assert_eq!(repaired.refcount(cluster), 2);
    // The table of L1 entries is nobody else's: that flag follows.
    assert_eq!(repaired.word(repaired.l1() + 8) & COPIED, 0);
}
