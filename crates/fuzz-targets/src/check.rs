//! The engine's check and repair, on damaged images.

use urus_engine::check::{CheckReport, Repair};
use urus_engine::check_image;
use urus_format::Header;
use urus_sim::checker::{Owner, Report, Table, Violation};
use urus_sim::rng::Rng;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

use crate::Verdict;
use crate::input::Input;
use crate::mutate::mutated;
use crate::operate::say;
use crate::require;
use crate::view::{View, look};

/// What a repair may need beyond the file.
const ROOM: u64 = 32 << 20;

/// Checks and repairs an image: it is never made worse, what the guest reads stays, and a second repair finds nothing
/// left to do.
///
/// # Errors
/// What is wrong.
pub fn check(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let shape = input.u8();
    let repair = [Repair::None, Repair::Leaks, Repair::All, Repair::All][usize::from(shape & 3)];
    let seed = u64::from(input.u8());
    let (bytes, behind) = if shape & 0xfc == 0xfc {
        (input.rest().to_vec(), None)
    } else {
        let image = mutated(&mut input);
        (image.bytes, image.base.behind.clone())
    };
    let Ok(header) = Header::parse(&bytes, bytes.len() as u64) else {
        return Ok(());
    };
    let before = look(&bytes, behind.as_deref());
    let (after, report) = run(&bytes, &header, repair, seed)?;
    if say() {
        eprintln!(
            "{repair:?}: {header:?}\nbefore {:?}\n{report:?}",
            before.report
        );
    }
    let Some(report) = report else {
        require!(after == bytes, "a check that failed has changed the image");
        return Ok(());
    };
    if repair == Repair::None || report.check_errors > 0 {
        require!(
            after == bytes,
            "the image was changed, with {repair:?} and {} check errors",
            report.check_errors
        );
    }
    let now = look(&after, behind.as_deref());
    judge(&before, &now, repair, &report)?;
    if repair != Repair::None {
        let again = Header::parse(&after, after.len() as u64)
            .map_err(|error| format!("after a repair the header does not parse: {error}"))?;
        let (twice, report) = run(&after, &again, repair, seed)?;
        if say() {
            let differ = after.iter().zip(&twice).position(|(a, b)| a != b);
            eprintln!("again: {report:?}\nfirst difference: {differ:?}");
        }
        require!(
            twice == after,
            "a second {repair:?} changes the image again"
        );
    }
    Ok(())
}

/// The image afterwards, and the report; none where the check refused.
fn run(
    bytes: &[u8],
    header: &Header,
    repair: Repair,
    seed: u64,
) -> Result<(Vec<u8>, Option<CheckReport>), String> {
    let mut file = FileSpec::new(bytes.to_vec());
    file.capacity = bytes.len() as u64 + ROOM;
    let config = SimConfig::random(&mut Rng::new(seed));
    let world = SimWorld::new(seed, config, vec![file]);
    let report = check_image(
        world.handle(),
        IMAGE,
        "image".to_owned(),
        header.clone(),
        repair,
    )
    .ok();
    world.settle();
    if let Some(complaint) = world.complaints().first() {
        return Err(format!("the storage complains: {complaint}"));
    }
    let after = world.contents(IMAGE).bytes().to_vec();
    Ok((after, report))
}

fn judge(before: &View, now: &View, repair: Repair, report: &CheckReport) -> Verdict {
    let (old, new) = (&before.report, &now.report);
    if before.is_sound() {
        require!(
            now.is_sound(),
            "the image was sound, and is not after {repair:?}: {:?}",
            new.violations
        );
        require!(
            report.is_sound() || report.corruptions == report.copied_clear_at_one,
            "check finds fault with a sound image: {:?}",
            report.messages
        );
    }
    // What the checker could not read hides all that a repair brings to light.
    let all_kept =
        !old.violations.iter().any(hides) && old.violation_count == old.violations.len() as u64;
    if all_kept {
        let added = new.violations.iter().find(|now| !was_there(old, now));
        require!(
            added.is_none(),
            "{repair:?} has added {added:?} to {:?}",
            old.violations
        );
    }
    // No repair writes where a guest's data lies; but its header must change, and what a misplaced table leads to is not known.
    let apart = old.violation_count == old.violations.len() as u64
        && old.violations.iter().all(|violation| match violation {
            Violation::RefcountTooLow { .. }
            | Violation::Copied { .. }
            | Violation::BadEntry { .. }
            | Violation::Undecodable { .. } => true,
            Violation::Overlap { owners, .. } => !owners.contains(&Owner::Header),
            _ => false,
        });
    if apart {
        let same = |old: &Option<Vec<u8>>, new: &Option<Vec<u8>>| old.is_none() || old == new;
        require!(
            same(&before.guest, &now.guest),
            "what the guest reads has changed in the repair"
        );
        for (number, (old, new)) in before.snapshots.iter().zip(&now.snapshots).enumerate() {
            require!(
                same(old, new),
                "snapshot {number} has changed in the repair"
            );
        }
    }
    let serious = serious(new);
    if report.is_sound() {
        require!(
            serious.is_empty(),
            "check calls it sound, and it is not: {serious:?}"
        );
    }
    if report.is_clean() && repair == Repair::All && new.is_sound() {
        require!(
            new.is_clean(),
            "check calls it clean, and it is not: leaks {:?}, {} COPIED flags",
            new.leaks,
            new.copied_clear
        );
    }
    Ok(())
}

/// Whether something found after a repair was wrong at that place before.
fn was_there(old: &Report, now: &Violation) -> bool {
    let same = |before: &Violation| match (before, now) {
        (
            Violation::RefcountTooLow { cluster: a, .. },
            Violation::RefcountTooLow { cluster: b, .. },
        )
        | (Violation::Overlap { cluster: a, .. }, Violation::Overlap { cluster: b, .. })
        | (Violation::Copied { cluster: a, .. }, Violation::Copied { cluster: b, .. }) => a == b,
        // A table that something else uses too is not written, so its flags stay when the refcount becomes right: what they let a
        // guest overwrite is what they did before, and the cluster is no longer handed out.
        (Violation::RefcountTooLow { cluster: a, .. }, Violation::Copied { cluster: b, .. }) => {
            a == b && old.violations.iter().any(is_overlap)
        }
        // Broken entries stay, and may be broken in more ways than before.
        (Violation::BadEntry { owner: a, .. }, Violation::BadEntry { owner: b, .. })
        | (Violation::BadEntry { owner: a, .. }, Violation::Copied { owner: b, .. })
        | (Violation::BadTable { owner: a, .. }, Violation::BadTable { owner: b, .. }) => a == b,
        _ => before == now,
    };
    if let Violation::RefcountTooLow { owners, .. } = now {
        // Where only broken entries lead no cluster is known, so none is counted.
        let is_broken = |owner| old.violations.iter().any(|before| is_broken(before, owner));
        if owners.iter().all(is_broken) {
            return true;
        }
    }
    old.violations.iter().any(same)
}

fn is_broken(violation: &Violation, by: &Owner) -> bool {
    match violation {
        Violation::BadEntry { owner, .. } | Violation::BadTable { owner, .. } => owner == by,
        _ => false,
    }
}

fn is_overlap(violation: &Violation) -> bool {
    matches!(violation, Violation::Overlap { .. })
}

/// Whether the checker did not go on from there, for all that lies behind.
fn is_unread(violation: &Violation) -> bool {
    matches!(
        violation,
        Violation::Refused(_) | Violation::BadTable { .. } | Violation::Header(_)
    )
}

/// Whether something may lie behind it that the checker sees once the file is longer, or the table is read.
fn hides(violation: &Violation) -> bool {
    let cut_off = |why: &str| why.contains("the end of the file");
    is_unread(violation) || matches!(violation, Violation::Snapshot { why, .. } if cut_off(why))
}

/// Violations that no check may pass over. The simulator's checker is stricter: no writer shows one
/// host cluster at two places of the guest, nor an L2 table at different places of the active table
/// and a snapshot's, yet the format allows both (whoever writes there copies first); nor does any
/// writer set flags in L2 entries where they say nothing, which harm nobody; and it does not read
/// tables that the end of the file cuts off, while urus, as QEMU does, takes the rest for zeroes.
fn serious(report: &Report) -> Vec<&Violation> {
    if report.violations.iter().any(is_unread) {
        return Vec::new();
    }
    let shared = |violation: &&Violation| {
        let Violation::Overlap { owners, .. } = violation else {
            return false;
        };
        let active = |owner: &&Owner| matches!(owner, Owner::L2(Table::Active, _));
        let only_tables = owners.iter().all(|owner| matches!(owner, Owner::L2(..)));
        owners.iter().all(|owner| !owner.is_metadata())
            || only_tables && owners.iter().filter(active).count() < 2
    };
    let idle_flags = |violation: &&Violation| {
        let Violation::BadEntry { owner, why, .. } = violation else {
            return false;
        };
        let flags = ["flags without an offset", "the zero flag in version 2"];
        matches!(owner, Owner::Data(..)) && flags.contains(why)
    };
    report
        .violations
        .iter()
        .filter(|violation| !shared(violation) && !idle_flags(violation))
        .collect()
}
