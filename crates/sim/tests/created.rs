//! New images are written through the same storage as everything else, so the power fails there too. Guards against a file that is neither what it
//! was nor the new image, and is taken for one (O30).

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::rc::Rc;

use urus_engine::create::{Found, New, create};
use urus_engine::planted::{Bug, plant};
use urus_format::Header;
use urus_format::create::{CreateOptions, NewImage, layout};
use urus_sim::checker::{self, GuestReader};
use urus_sim::contents::{Change, Contents};
use urus_sim::crash::{Class, CrashCursor, Limits};
use urus_sim::fault::{Action, Fault, Trigger};
use urus_sim::image;
use urus_sim::rng::Rng;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

/// Where a new image is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A file with an image in it.
    Old,
    /// A device with an image in it, and anything behind.
    Device,
    /// The same, with sectors of 4096 bytes.
    Sectors4096,
    /// A file that nobody can find.
    New,
}

const PLACES: [Place; 4] = [Place::Old, Place::Device, Place::Sectors4096, Place::New];

fn new_image(cluster_bits: u32) -> NewImage {
    let options = CreateOptions {
        cluster_bits,
        ..CreateOptions::new(3 << 20)
    };
    layout(&options).expect("valid")
}

fn file(place: Place) -> FileSpec {
    if place == Place::New {
        return FileSpec::new(Vec::new());
    }
    let mut plan = image::plan(128 << 10, 12, 3, 4);
    plan.fill = 128;
    let old = image::build(&plan, &mut Rng::new(3)).bytes;
    match place {
        Place::Old => FileSpec::new(old),
        _ => {
            let device = FileSpec::new(old).block_device(512 << 10, 9);
            if place == Place::Sectors4096 {
                device.direct(4096)
            } else {
                device
            }
        }
    }
}

/// Everything that a crash may leave is what was there, no image, or the new one, whole.
fn judge(place: Place, old: &[u8], new: &NewImage, found: &Contents) -> Result<bool, String> {
    let bytes = found.bytes();
    if bytes == old {
        return Ok(false);
    }
    if Header::parse(bytes, bytes.len() as u64).is_err() {
        return Ok(false);
    }
    let report = checker::check(bytes);
    if let Some(violation) = report.violations.first() {
        return Err(format!("{place:?}: {violation}"));
    }
    let reader = GuestReader::open(bytes, None).map_err(|error| format!("{error}"))?;
    if reader.size() != new.header.size || report.leak_count > 0 {
        return Err(format!("{place:?}: {} bytes, {report:?}", reader.size()));
    }
    let guest = reader
        .read(0, 3 << 20)
        .map_err(|error| format!("{error}"))?;
    if guest.iter().any(|byte| *byte != 0) {
        return Err(format!("{place:?}: it shows what was there before"));
    }
    Ok(true)
}

/// Creates, with this going wrong, and cuts the power at every point; how many states there were, and of them whole images.
fn cut(
    place: Place,
    seed: u64,
    cluster_bits: u32,
    fault: Option<Fault>,
) -> Result<[u64; 2], String> {
    let new = new_image(cluster_bits);
    let config = SimConfig::random(&mut Rng::new(seed));
    let world = SimWorld::new(seed, config, vec![file(place)]);
    let old = world.contents(IMAGE).bytes().to_vec();
    world.plan_faults(fault.into_iter().collect());
    let found = if place == Place::New {
        Found::Later
    } else {
        Found::Now
    };
    let done = create(
        world.handle(),
        IMAGE,
        "new".to_owned(),
        New::Qcow2(Rc::new(new.clone())),
        found,
    );
    if let Some(complaint) = world.complaints().first() {
        return Err(format!("{place:?}: the storage complains: {complaint}"));
    }
    if fault.is_none() {
        done.clone().map_err(|error| error.to_string())?;
    }
    world.settle();
    let log = world.log();
    let mut cursor = CrashCursor::new(&log);
    let (mut known, mut rng, mut counts) = (HashSet::new(), Rng::new(seed), [0, 0]);
    let mut wrong = None;
    loop {
        let more = cursor.advance(&log);
        if more && place == Place::New {
            // Nobody finds it before it is whole.
            continue;
        }
        let classify = |_, _: &Change| Class::Unknown;
        cursor.enumerate(
            &mut rng,
            &Limits::default(),
            &classify,
            (&mut known, u64::from(!more)),
            &mut |state| {
                counts[0] += 1;
                match judge(place, &old, &new, &state.files[0]) {
                    Ok(whole) => {
                        counts[1] += u64::from(whole);
                        if !more && done.is_ok() && !whole {
                            wrong = Some(format!("{place:?}: said to be whole, and is not"));
                        }
                    }
                    // Of one that failed and that nobody finds, nothing is said.
                    Err(_) if place == Place::New && done.is_err() => {}
                    Err(error) => wrong = Some(error),
                }
                match wrong {
                    Some(_) => ControlFlow::Break(()),
                    None => ControlFlow::Continue(()),
                }
            },
        );
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        if !more {
            return Ok(counts);
        }
    }
}

#[test]
fn a_crash_leaves_what_was_there_or_no_image_or_the_new_one() {
    for place in PLACES {
        let mut counts = [0, 0];
        for seed in 0..12 {
            for cluster_bits in [12, 16] {
                let more = cut(place, seed, cluster_bits, None).expect("sound");
                counts = [counts[0] + more[0], counts[1] + more[1]];
            }
        }
        assert!(counts[1] >= 24, "{place:?}: {counts:?}");
        assert!(
            place == Place::New || counts[0] > 500,
            "{place:?}: {counts:?}"
        );
    }
}

#[test]
fn an_error_leaves_no_image_that_is_none() {
    let mut failed = 0;
    for place in PLACES {
        for operation in 0..24 {
            for action in [Action::Eio, Action::Enospc, Action::ShortBySector] {
                let fault = Fault {
                    trigger: Trigger::Op(operation),
                    action,
                };
                let result = cut(place, operation, 12, Some(fault));
                failed += u64::from(result.is_ok());
                result.expect("sound");
            }
        }
    }
    assert_eq!(failed, 4 * 24 * 3);
}

/// The judge is judged.
#[test]
fn planted_bugs_are_found() {
    for bug in [Bug::EarlyNewHeader, Bug::KeepsOldHeader] {
        plant(bug);
        let found = (0..12).any(|seed| cut(Place::Device, seed, 12, None).is_err());
        plant(Bug::None);
        assert!(found, "{bug:?}");
    }
}
