//! Long lives of devices, without a power cut: what shows while a device runs needs many requests, and few looks at what a cut would leave.

use urus_sim::census::{Does, Place};
use urus_sim::config::{self, Behaviour, Config};
use urus_sim::crash::Class;
use urus_sim::errors::{Injection, measure};
use urus_sim::fault::Action;
use urus_sim::runner::{Effort, run, run_with};
use urus_sim::workload::Load;

fn live(config: &Config, seeds: std::ops::Range<u64>, requests: u64) {
    let effort = Effort {
        requests,
        cuts: 0,
        pauses: true,
        ..Effort::QUICK
    };
    for seed in seeds {
        let found = run(config, seed, &effort).violation;
        assert_eq!(found, None, "{}, seed {seed}", config.name);
    }
}

/// Guards against a host cluster that is somebody else's before the last request in flight through its old mapping has ended (O7): few clusters, which
/// change hands all the time, on a machine on which operations are overtaken by many others.
#[test]
fn clusters_that_change_hands_stay_whose_they_are() {
    for sectors in [12, 24, 40] {
        for queues in [2, 4] {
            let mut config = Config {
                load: Load::Churn,
                behaviour: Behaviour::Slow,
                queues,
                depth: 16,
                sectors,
                ..Config::small("change hands")
            };
            // What was freed is settled as soon as can be.
            config.sizes.pending_frees = 1;
            config.sizes.run_clusters = 1;
            live(&config, 0..80, 500);
        }
    }
}

/// A life of every kind.
#[test]
fn every_configuration_has_a_long_life() {
    for config in config::all() {
        live(&config, 0..2, 400);
    }
}

/// Guards against a table whose move has failed half way, by any of the operations that it takes, and which is then forgotten, or freed while the header
/// may name it (O8, O11, O15): each operation of a life fails in turn.
#[test]
fn tables_that_move_survive_an_error_at_every_operation() {
    for (name, requests) in [("refcount table grows", 160), ("grows", 80)] {
        let config = config::find(name).expect("there is one");
        let effort = Effort {
            requests,
            cuts: 0,
            ..Effort::ERRORS
        };
        for seed in 1..3 {
            let ops = run(&config, seed, &effort).ops;
            for operation in 0..ops {
                for injection in [
                    Injection::Once(operation, Action::Eio),
                    Injection::Row(operation, 4, Action::Eio),
                ] {
                    let found = run_with(&config, seed, &effort, Some(injection)).violation;
                    assert_eq!(found, None, "{name}, seed {seed}");
                }
            }
        }
    }
}

/// Guards against a header whose write has failed and that counts as restored before it is: what the new one names is given to others then, and
/// after a power cut the header may still name it (O11, O15). The writes of headers fail in turn, alone and with what would make them good.
#[test]
fn a_header_that_failed_names_nothing_that_is_given_away() {
    let effort = Effort {
        requests: 90,
        cuts: 120,
        ..Effort::ERRORS
    };
    let mut hit = 0;
    for name in ["grows", "refcount table grows", "grows, outlives"] {
        let config = config::find(name).expect("there is one");
        for seed in 1..7 {
            let measured = measure(&config, seed, &effort).expect("sound without errors");
            for op in measured.operations(Does::Write, Place::On(Class::Header)) {
                for injection in [
                    Injection::Once(op, Action::Eio),
                    Injection::Once(op, Action::ShortToZero),
                    Injection::Row(op, 2, Action::Eio),
                ] {
                    let outcome = run_with(&config, seed, &effort, Some(injection));
                    assert_eq!(outcome.violation, None, "{name}, seed {seed}");
                    hit += outcome.injected;
                }
            }
        }
    }
    assert!(hit > 20, "only {hit} headers failed");
}
