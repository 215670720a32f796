//! Errors that the simulator found the engine wrong about: each as a test by its name.

use urus_engine::planted::{Bug, plant};
use urus_sim::census::{Does, Place};
use urus_sim::config::{self, Backing, Config, FIRST_VERSION};
use urus_sim::crash::Class;
use urus_sim::errors::{Injection, measure};
use urus_sim::fault::{Action, Fault, Trigger};
use urus_sim::judge::Scene;
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::runner::{Effort, run_with};
use urus_sim::workload::Ask;

/// A read that the storage cuts short inside a sector goes on at a whole sector: the two halves of a sector never come
/// from two moments.
#[test]
fn a_short_read_never_tears_a_sector() {
    let effort = Effort {
        requests: 40,
        cuts: 0,
        ..Effort::ERRORS
    };
    let configs =
        ["no discard", "deep", "slow"].map(|name| config::find(name).expect("there is one"));
    let mut hit = 0;
    for (config, seed) in configs
        .iter()
        .flat_map(|config| (0..3).map(move |seed| (config, seed)))
    {
        let measured = measure(config, seed, &effort).expect("sound without errors");
        for op in 0..measured.ops {
            let injection = Injection::Once(op, Action::ShortByHalf);
            let outcome = run_with(config, seed, &effort, Some(injection));
            assert_eq!(outcome.violation, None, "{}, seed {seed}", config.name);
            hit += outcome.injected;
        }
    }
    assert!(hit > 100, "only {hit} operations were cut short");
}

/// O15: a commit that failed after its barrier 1 may have made a new L2 table reachable, so the next one changes it
/// behind its own barrier 1, as any other table.
#[test]
fn a_table_that_may_be_in_use_is_not_rewritten_as_new() {
    let effort = Effort {
        cuts: 40,
        ..Effort::ERRORS
    };
    let config = config::find("half full").expect("there is one");
    let sweep = |seed: u64| {
        let (mut states, mut violation) = (0, None);
        for first in 0..24 {
            for of in [7, 13, 24] {
                let injection = Injection::Every(first, of, Action::Eio);
                let outcome = run_with(&config, seed, &effort, Some(injection));
                states += outcome.states;
                violation = violation.or(outcome.violation);
            }
        }
        (states, violation)
    };
    plant(Bug::RewrittenTable);
    let telling: Vec<u64> = (0..12).filter(|seed| sweep(*seed).1.is_some()).collect();
    plant(Bug::None);
    assert!(
        !telling.is_empty(),
        "no seed tells the rule from its absence"
    );
    for seed in telling {
        let (states, violation) = sweep(seed);
        assert_eq!(violation, None, "seed {seed}");
        assert!(states > 1000, "only {states} states");
    }
}

/// The simulator's own mistake: a write that is cut short and takes effect in two parts is shorter from the first part on, so a cut
/// between the two keeps sectors of the shorter one.
#[test]
fn the_power_fails_between_the_parts_of_a_short_write() {
    let config = config::find("chain, grows").expect("there is one");
    let effort = Effort {
        pauses: false,
        ..Effort::ERRORS
    };
    let injection = Injection::Once(61, Action::ShortBySector);
    let seed = 12_773_366_489_153_039_575;
    let outcome = run_with(&config, seed, &effort, Some(injection));
    assert_eq!(outcome.violation, None);
    assert_eq!(outcome.injected, 1);
}

/// Copying on write reads a cluster whole where it can. What the guest is about to write over need not be readable, so where that fails the
/// parts around it are read alone, and the write succeeds.
#[test]
fn a_write_replaces_what_cannot_be_read() {
    let config = Config {
        backing: Backing::Raw(100),
        cluster_bits: 12,
        sectors: 512,
        ..Config::small("over a raw file")
    };
    let (mut hit, mut hidden) = (0, 0);
    for seed in 0..8 {
        let mut rng = Rng::new(seed);
        let scene = Scene::new(&config, &mut rng);
        let files = scene.files();
        let model = Model::new(scene.fixture.initial.clone(), FIRST_VERSION);
        let guest = scene
            .judge(files, &model.after_cut(0))
            .expect("sound")
            .guest;
        let mut driving = scene.driving(&mut rng);
        driving.errors = true;
        let opened = scene.machine(files, &guest, &model, driving, Vec::new(), &mut rng);
        let mut machine = opened.expect("it opens");
        for lba in (2..config.sectors).step_by(8) {
            // The first operation on a cluster is the reading of what stands around.
            let failing = Fault {
                trigger: Trigger::Op(machine.world.op_count()),
                action: Action::Eio,
            };
            machine.world.plan_faults(vec![failing]);
            let (injected, failed) = (machine.world.injected(), machine.failed);
            let ask = Ask::Write {
                lba,
                count: 2,
                fua: false,
            };
            machine.ask(ask).expect("taken");
            machine.drain().expect("sound");
            hit += machine.world.injected() - injected;
            hidden += u64::from(machine.failed == failed);
        }
        machine.world.plan_faults(Vec::new());
        machine.read_all().expect("sound");
    }
    assert_eq!((hit, hidden), (512, 512));
}

/// A cluster whose refcount could not be read when its last reference was gone is settled later: it does not stay behind, counted,
/// with nobody to refer to it.
#[test]
fn an_unread_refcount_block_leaks_nothing() {
    let effort = Effort {
        cuts: 0,
        ..Effort::ERRORS
    };
    // The first of each is where it was seen.
    let configs = [
        ("grows, tiny cache, 64-bit refcounts", 12642993124628724927),
        ("outlives, tiny cache, snapshot", 7339233378029052465),
    ];
    let mut hit = 0;
    for (name, seed) in configs
        .into_iter()
        .flat_map(|(name, seen)| [seen, 0, 1, 2, 3, 4].map(|seed| (name, seed)))
    {
        let config = config::find(name).expect("there is one");
        let measured = measure(&config, seed, &effort).expect("sound without errors");
        for op in measured.operations(Does::Read, Place::On(Class::RefcountBlock)) {
            let injection = Injection::Once(op, Action::Eio);
            let outcome = run_with(&config, seed, &effort, Some(injection));
            assert_eq!(outcome.violation, None, "{name}, seed {seed}");
            hit += outcome.injected;
        }
    }
    assert!(hit > 40, "only {hit} reads failed");
}

/// O11: a header that can be neither changed nor restored may be the old one or the new one, so the device takes no more writes, though no
/// sync has failed. The simulator called that a poisoning without a cause.
#[test]
fn a_header_that_is_lost_poisons() {
    let config = config::find("grows, tiny cache, 64-bit refcounts").expect("there is one");
    let effort = Effort::ERRORS;
    let injection = Injection::From(37, Action::Eio);
    let outcome = run_with(&config, 627_405_149_472_732_430, &effort, Some(injection));
    assert_eq!(outcome.violation, None);
    assert!(outcome.injected > 1);
    // And wherever a header is written while disks grow, with errors in a row from there on.
    let mut rows = 0;
    for name in ["grows", "grows, version 2", "refcount table grows"] {
        let config = config::find(name).expect("there is one");
        for seed in 0..4 {
            let measured = measure(&config, seed, &effort).expect("sound without errors");
            for op in measured.operations(Does::Write, Place::On(Class::Header)) {
                for count in [1, 2, 3, 8] {
                    let injection = Injection::Row(op, count, Action::Eio);
                    let outcome = run_with(&config, seed, &effort, Some(injection));
                    assert_eq!(outcome.violation, None, "{name}, seed {seed}");
                    rows += outcome.injected;
                }
            }
        }
    }
    assert!(rows > 50, "only {rows} operations failed");
}

/// O11: a sync that fails while the metadata is read again after a pause (a repair, an autoclear bit) poisons, as any other does: a second
/// attempt would find in the page cache what the disk does not have.
#[test]
fn a_sync_that_fails_after_a_pause_poisons() {
    let config = config::find("swapped, miscounted").expect("there is one");
    let seen = 11_279_818_088_504_776_260;
    let mut hit = 0;
    for seed in [seen, 1, 2, 3] {
        let measured = measure(&config, seed, &Effort::ERRORS).expect("sound without errors");
        for sync in 0..measured.syncs {
            let injection = Injection::Sync(sync, Action::Eio);
            let outcome = run_with(&config, seed, &Effort::ERRORS, Some(injection));
            assert_eq!(outcome.violation, None, "seed {seed}");
            hit += outcome.injected;
        }
    }
    assert!(hit > 40, "only {hit} syncs failed");
}

/// What the file system cannot do is done in another way, or not at all, and never taken for done; a sync that it cannot do has failed.
#[test]
fn what_is_not_supported_is_not_taken_for_done() {
    let mut hit = 0;
    for name in ["churn", "full", "raw", "asked, raw", "compressed", "grows"] {
        let config = config::find(name).expect("there is one");
        for seed in 0..2 {
            let measured = measure(&config, seed, &Effort::ERRORS).expect("sound without errors");
            for injection in measured.every() {
                let unsupported = matches!(
                    injection,
                    Injection::Once(_, Action::Eopnotsupp) | Injection::From(_, Action::Eopnotsupp)
                );
                if unsupported {
                    let outcome = run_with(&config, seed, &Effort::ERRORS, Some(injection));
                    assert_eq!(outcome.violation, None, "{name}, seed {seed}");
                    hit += outcome.injected;
                }
            }
        }
    }
    assert!(hit > 200, "only {hit} operations were refused");
}
