//! Power cuts and errors inside a repair: at every point, with any part of what was not yet durable, the image is no worse
//! than it was, and a second repair makes it whole.
//!
//! A cut keeps everything up to the last barrier, and any sectors of the writes after it. A repair writes nothing more after a
//! write or a barrier that failed, so what an error leaves is what a cut at that place leaves.

use std::collections::BTreeSet;

use super::memory::{Event, Failure, Memory, write};
use super::qemu::{Directory, img, io};
use super::{Image, LIMITS, check, ready, try_check_within};
use crate::check::entries::{COPIED, OFFSET_MASK};
use crate::check::walk::walk;
use crate::check::{Repair, Severity};

/// Numbers by chance, the same in each run (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// What is wrong with an image.
#[derive(Debug, PartialEq, Eq)]
struct Faults {
    /// Clusters whose refcount is lower than their references (O1).
    low: BTreeSet<u64>,
    /// Entries that are COPIED though the refcount is not 1 (O10).
    copied: BTreeSet<String>,
    /// All others that are not merely COPIED flags that are clear.
    others: u64,
}

fn faults(image: &Image) -> Faults {
    let memory = Memory::new(&image.bytes);
    let walked = ready(walk(&memory, &memory.header(), LIMITS)).expect("memory never fails");
    assert_eq!(
        walked.report.check_errors, 0,
        "{:#?}",
        walked.report.messages
    );
    let geometry = walked.geometry;
    let mut low = BTreeSet::new();
    for (cluster, references) in walked.counts.iter_from(0) {
        let index = cluster >> geometry.refcount_block_bits();
        let block = walked.refcounts.find(index).filter(|block| block.readable);
        let refcount = block.map_or(0, |block| {
            let within = cluster % (1 << geometry.refcount_block_bits());
            let start = crate::to_usize(block.offset);
            urus_format::refcount::get(&image.bytes[start..], within, geometry.refcount_order())
        });
        if refcount < references {
            low.insert(cluster);
        }
    }
    let texts = walked
        .report
        .messages
        .iter()
        .filter(|one| one.severity == Severity::Corruption);
    let copied: BTreeSet<String> = texts
        .filter(|finding| finding.text.contains(": COPIED, but"))
        .map(|finding| finding.text.clone())
        .collect();
    assert!(
        walked.report.messages.len() < 500,
        "no finding was left out"
    );
    let others = walked.report.corruptions - walked.copied_findings - low.len() as u64;
    Faults {
        low,
        copied,
        others,
    }
}

/// Guest data and mapping, COPIED flags aside: what no repair may change.
fn essence(image: &Image) -> Vec<(u64, u64, Vec<u8>)> {
    let header = image.header();
    let cluster = header.geometry().cluster_bytes();
    let step = header.geometry().l2_entry_bytes();
    let mut found = Vec::new();
    for l1_index in 0..u64::from(header.l1_entries) {
        let l2 = image.l2(l1_index);
        if l2 == 0 || l2 + cluster > image.bytes.len() as u64 {
            continue;
        }
        for at in (l2..l2 + cluster).step_by(crate::to_usize(step)) {
            let entry = image.word(at) & !COPIED;
            if entry != 0 {
                let host = crate::to_usize(entry & OFFSET_MASK).min(image.bytes.len());
                let end = (host + crate::to_usize(cluster)).min(image.bytes.len());
                found.push((at, entry, image.bytes[host..end].to_vec()));
            }
        }
    }
    found
}

/// Applies some of the sectors of some writes.
fn cut(start: &Image, pending: &[(u64, Vec<u8>)], keep: impl Fn(usize, usize) -> bool) -> Image {
    let mut bytes = start.bytes.clone();
    for (number, (offset, data)) in pending.iter().enumerate() {
        for (sector, data) in data.chunks(512).enumerate() {
            if keep(number, sector) {
                write(&mut bytes, offset + sector as u64 * 512, data);
            }
        }
    }
    Image { bytes }
}

/// All states that a cut may leave, or where those are too many some of them.
fn states(start: &Image, pending: &[(u64, Vec<u8>)], dice: &mut Dice) -> Vec<Image> {
    let sectors: usize = pending.iter().map(|(_, data)| data.len() / 512).sum();
    let mut states = Vec::new();
    if sectors <= 7 {
        let places: Vec<(usize, usize)> = pending
            .iter()
            .enumerate()
            .flat_map(|(number, (_, data))| (0..data.len() / 512).map(move |at| (number, at)))
            .collect();
        for mask in 0..1u32 << sectors {
            states.push(cut(start, pending, |number, sector| {
                let place = places.iter().position(|place| *place == (number, sector));
                place.is_some_and(|place| mask >> place & 1 != 0)
            }));
        }
        return states;
    }
    for limit in 0..=pending.len().min(12) {
        states.push(cut(start, pending, |number, _| number < limit));
        states.push(cut(start, pending, |number, _| number >= limit));
        states.push(cut(start, pending, |number, _| number == limit));
        states.push(cut(start, pending, |number, _| number != limit));
    }
    for _ in 0..24 {
        let odds = 1 + dice.below(9);
        let chosen: Vec<Vec<bool>> = pending
            .iter()
            .map(|(_, data)| {
                (0..data.len() / 512)
                    .map(|_| dice.below(10) < odds)
                    .collect()
            })
            .collect();
        states.push(cut(start, pending, |number, sector| chosen[number][sector]));
    }
    states
}

/// Repairs, cuts the repair everywhere, and repairs what the cuts leave.
fn assert_cuts_are_harmless(
    directory: &Directory,
    image: &Image,
    repair: Repair,
    what: &str,
) -> usize {
    let whole = Memory::new(&image.bytes);
    let finished = check(&whole, repair);
    let before = faults(image);
    let guest = essence(image);
    let mut dice = Dice(1);
    let mut durable = image.clone();
    let mut pending: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut tried = 0;
    for event in whole.log.borrow().iter() {
        match event {
            Event::Write(offset, data) => {
                pending.push((*offset, data.clone()));
                continue;
            }
            Event::Barrier => {}
        }
        for state in states(&durable, &pending, &mut dice) {
            tried += 1;
            let after = faults(&state);
            assert!(
                after.low.is_subset(&before.low),
                "{what}: {after:?} {before:?}"
            );
            assert!(
                after.copied.is_subset(&before.copied),
                "{what}: {after:?} {before:?}"
            );
            assert!(
                after.others <= before.others,
                "{what}: {after:?} {before:?}"
            );
            let again = Memory::new(&state.bytes);
            let report = check(&again, repair);
            assert_eq!(
                report.is_sound(),
                finished.is_sound(),
                "{what}: {:#?}",
                report.messages
            );
            assert_eq!(
                report.is_clean(),
                finished.is_clean(),
                "{what}: {:#?}",
                report.messages
            );
            assert_eq!(
                essence(&again.image()),
                guest,
                "{what}: what the guest sees"
            );
            if tried % 16 == 0 && finished.is_clean() {
                directory.assert_clean(&again.image(), what);
            }
        }
        durable = cut(&durable, &pending, |_, _| true);
        pending.clear();
    }
    assert!(
        pending.is_empty(),
        "{what}: nothing is left without a barrier"
    );
    assert_eq!(durable.bytes, whole.image().bytes);
    tried
}

/// Repairs with every operation failing in turn, once and for good: the failure is told, nothing is written after a write or a
/// barrier that failed, and a second repair ends where one without errors does.
fn assert_errors_are_harmless(image: &Image, repair: Repair, what: &str) -> usize {
    let whole = Memory::new(&image.bytes);
    let finished = check(&whole, repair);
    let before = faults(image);
    let guest = essence(image);
    let operations = whole.operations.get();
    let ways = [(false, false), (false, true), (true, false)];
    for (at, (for_good, half)) in (0..operations).flat_map(|at| ways.map(|way| (at, way))) {
        let failure = Failure { at, for_good, half };
        let memory = Memory::new(&image.bytes);
        memory.failure.set(Some(failure));
        let told = match try_check_within(&memory, repair, LIMITS) {
            Ok(report) => report.check_errors > 0,
            Err(_) => true,
        };
        assert!(told, "{what}: {failure:?} was not told");
        if let Some(failed) = memory.failed.get() {
            let after = &memory.log.borrow()[failed + 1..];
            assert!(after.is_empty(), "{what}: {failure:?}, and then {after:?}");
        }
        let left = memory.image();
        let after = faults(&left);
        assert!(
            after.low.is_subset(&before.low)
                && after.copied.is_subset(&before.copied)
                && after.others <= before.others,
            "{what}: {failure:?}: {after:?} {before:?}"
        );
        assert_eq!(essence(&left), guest, "{what}: {failure:?}");
        let report = check(&Memory::new(&left.bytes), repair);
        assert_eq!(
            (report.is_sound(), report.is_clean()),
            (finished.is_sound(), finished.is_clean()),
            "{what}: {failure:?}: {:#?}",
            report.messages
        );
    }
    operations * ways.len()
}

#[test]
fn power_cuts_and_errors_in_a_repair() {
    let directory = Directory::new();
    let (mut tried, mut errors) = (0, 0);
    for options in [
        "cluster_size=512,refcount_bits=64",
        "cluster_size=512",
        "cluster_size=1k,refcount_bits=1",
        "cluster_size=2k,refcount_bits=64",
        "cluster_size=512,refcount_bits=8",
    ] {
        let size = if options.contains("2k") { 4 } else { 1 };
        let mut image = directory.make(
            options,
            "1M",
            &[
                format!("write -P 1 0 {}k", 60 * size),
                format!("write -P 2 {}k 20k", 140 * size),
                "write 300k 3k".into(),
            ],
        );
        if !options.contains("bits=1") {
            image = directory.with(&image, |path| {
                img(path, &["snapshot", "-c", "one"], &[]);
                io(path, &["write -P 3 8k 4k", "write -P 4 60k 2k"]);
            });
        }
        let cluster = image.header().geometry().cluster_bytes();
        let table = image.header().refcount_table.0;
        let (l1, l2) = (image.l1(), image.l2(0));
        let data = image.word(l2 + 6 * 8) & OFFSET_MASK;

        let mut lagging = image.with_refcount(data / cluster, 0);
        for step in 0..40 {
            lagging.set_refcount(data / cluster + step * 3, 0);
        }
        lagging.set_refcount(l2 / cluster, 0);
        lagging.poke(72, 1);

        let mut mixed = image.clone();
        let most = image.header().geometry().refcount_max().min(3);
        for step in 0..24 {
            let refcount = [0, most, 0, 1, most, 0][crate::to_usize(step % 6)];
            mixed.set_refcount(data / cluster + step * 13 % 110, refcount);
            let at = image.l2(step / 8 % 2) + step * 8;
            mixed.poke(at, image.word(at) ^ COPIED);
        }
        mixed.poke(l1, image.word(l1) ^ COPIED);
        mixed.poke(72, 3);

        let mut without = image.clone();
        without.bytes[48..60].fill(0);

        // Only then the old refcount table's refcount is in a block that stays.
        let mut second = image.clone();
        if second.word(table + 8) != 0 {
            second.poke(table + 8, 0);
        }

        // Both COPIED, and the refcount still 1.
        let own: Vec<u64> = (l2..l2 + cluster)
            .step_by(8)
            .filter(|at| image.word(*at) & COPIED != 0)
            .collect();
        let twice = image.poked(own[0], image.word(own[1]));

        for (name, damaged, repair) in [
            ("refcounts that lag", &lagging, Repair::All),
            ("refcounts and flags", &mixed, Repair::All),
            ("leaks alone", &mixed, Repair::Leaks),
            ("a block is missing", &image.poked(table, 0), Repair::All),
            ("the second block is missing", &second, Repair::All),
            ("one cluster twice", &twice, Repair::All),
            (
                "a bad entry",
                &image.poked(table, image.block(0) | 2),
                Repair::All,
            ),
            (
                "data on a block",
                &image.poked(l2 + 6 * 8, image.block(0) | COPIED),
                Repair::All,
            ),
            ("no table", &without, Repair::All),
            (
                "the table is the L1 table",
                &image.poked(48, l1),
                Repair::All,
            ),
            (
                "an entry past the end",
                &mixed.poked(l2 + 8 * 8, 1 << 40),
                Repair::All,
            ),
        ] {
            let what = format!("{options}: {name}");
            tried += assert_cuts_are_harmless(&directory, damaged, repair, &what);
            errors += assert_errors_are_harmless(damaged, repair, &what);
        }
    }
    assert!(tried > 600, "{tried} states");
    assert!(errors > 600, "{errors} errors");
}
