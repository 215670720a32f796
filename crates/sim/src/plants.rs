//! The tester is tested: bugs that are planted in the engine must all be found.

use urus_engine::planted::{Bug, plant};

use crate::census::{Does, Place};
use crate::config::{self, Config};
use crate::contents::index;
use crate::crash::Class;
use crate::errors::{self, Injection};
use crate::fault::Action;
use crate::rng::{Rng, mix};
use crate::runner::{self, Effort, Outcome};

/// How the search for one planted bug ended.
#[derive(Clone, Debug)]
pub struct Hunt {
    /// Workloads run.
    pub workloads: u64,
    /// States judged until it was found, or all.
    pub states: u64,
    /// Configuration, seed and what was found.
    pub found: Option<(&'static str, u64, String)>,
}

/// Configurations in which the rule that a bug breaks matters most: half of the workloads are there.
fn homes(bug: Bug) -> &'static [&'static str] {
    match bug {
        Bug::EarlyRefcountBlock => &[
            "64-bit refcounts",
            "refcount table grows",
            "table grows, two queues",
        ],
        Bug::NoInFlightPins => &["churn"],
        Bug::IgnoreSnapshots => &["snapshot", "snapshot, three queues"],
        Bug::NoClearing => &["half full", "1K"],
        Bug::RewrittenTable => &["half full"],
        Bug::LatePunch => &["churn", "compressed", "full"],
        Bug::EarlyTableRelease => &["snapshot", "snapshot, three queues"],
        Bug::NoBlockLocks => &["direct I/O, 4096", "direct I/O, 512"],
        Bug::StaleLoad | Bug::EvictTooEarly => &["tiny cache, scattered"],
        Bug::EarlyHeader => &["refcount table grows", "table grows, two queues"],
        Bug::EarlyL1Entry => &["tiny cache", "tiny cache, snapshot"],
        Bug::OutlivedByNothing => &["outlives", "outlives, backed, slow"],
        Bug::GrowthShowsBacking => &["grows over a longer backing file"],
        Bug::EarlyL1Table => &["grows", "grows, outlives"],
        Bug::SkipsShortLayer => &["chain, short middle, tiny cache", "chain, grows"],
        Bug::StatusHidesBacking | Bug::StatusBelowTheEnd => {
            &["asked, short raw backing", "asked, chain"]
        }
        Bug::KeepsDecoded => &["swapped, compressed, 4K"],
        Bug::KeepsReserved => &["swapped", "swapped, tiny cache, grows"],
        Bug::PunchTakenForDone => &["nothing supported", "sometimes supported, churn"],
        Bug::ZeroTakenForDone => &["raw, nothing supported"],
        Bug::ThirdSliceMisplaced => &["slices", "slices, tiny cache, scattered"],
        Bug::SecondL1SectorMisplaced => &["small units of L1", "two sectors of L1"],
        Bug::WrongCountsSlice => &["refcount blocks larger than their cache", "slices"],
        Bug::CountsNeverShrink => &["slices, grows"],
        Bug::OddEndCutOff => &["ends in a cluster, odd raw backing"],
        Bug::PartialClusterTakenWhole => &["grows, snapshot, backed, 1K"],
        Bug::EarlyPunch => &["compressed", "zstd", "4-bit, compressed"],
        Bug::WholeHeader | Bug::RestoredAnew => &[
            "foreign, name further back, grows",
            "foreign, unknown extension, left open, grows",
            "foreign, refcount table grows",
        ],
        Bug::StaleHeader => &["grows", "foreign, name further back, grows"],
        Bug::FeatureBitsAnyVersion => &["foreign, no end marker, version 2, grows"],
        Bug::OwnSnapshotTable => &["foreign, snapshot"],
        Bug::TrustsThePageCache => &["killed", "killed, churn, slow, 64 sectors"],
        Bug::ZeroesPastCipher => &["ciphered", "ciphered, small steps, churn, grows"],
        _ => &[],
    }
}

/// Of three workloads, so many have errors.
fn with_errors(bug: Bug) -> u64 {
    match bug {
        Bug::DoubleGiveBack
        | Bug::NoPoison
        | Bug::SilentSyncFailure
        | Bug::SettleAfterFailure
        | Bug::EndsWithFirstError
        | Bug::ForgetsLaterSteps
        | Bug::RestoredAnew => 3,
        _ => 1,
    }
}

/// A workload with errors.
fn with_errors_in(bug: Bug, config: &Config, rng: &mut Rng, seed: u64) -> Outcome {
    if bug == Bug::ForgetsLaterSteps {
        // Shows where a refcount cannot be read.
        let measured = errors::measure(config, seed, &Effort::ERRORS);
        let reads = measured
            .iter()
            .flat_map(|measured| measured.operations(Does::Read, Place::On(Class::RefcountBlock)));
        let reads: Vec<u64> = reads.collect();
        if !reads.is_empty() {
            let injection = Injection::Once(reads[rng.index(reads.len())], Action::Eio);
            return runner::run_with(config, seed, &Effort::ERRORS, Some(injection));
        }
    }
    if bug != Bug::RewrittenTable {
        return errors::run_random(config, seed, &Effort::ERRORS);
    }
    // Shows between a commit that failed and the next one.
    let effort = Effort {
        cuts: 120,
        ..Effort::ERRORS
    };
    let injection = Injection::Every(rng.below(16), 5 + rng.below(16), Action::Eio);
    runner::run_with(config, seed, &effort, Some(injection))
}

fn workload(configs: &[Config], bug: Bug, seed: u64, number: u64) -> (&Config, u64, Outcome) {
    let seed = mix(seed ^ mix(number));
    let mut rng = Rng::new(seed);
    let homes = homes(bug);
    let config = if !homes.is_empty() && rng.chance(128) {
        let home = homes[rng.index(homes.len())];
        configs
            .iter()
            .find(|config| config.name == home)
            .expect("homes exist")
    } else {
        &configs[index(rng.below(configs.len() as u64))]
    };
    let outcome = if bug == Bug::RewrittenTable || number % 3 < with_errors(bug) {
        with_errors_in(bug, config, &mut rng, seed)
    } else {
        // What shows while the device runs needs few cuts.
        let running = [Bug::NoInFlightPins, Bug::StaleLoad, Bug::EvictTooEarly];
        let effort = if running.contains(&bug) {
            Effort {
                requests: 600,
                ..Effort::ERRORS
            }
        } else {
            Effort {
                reopen: 12,
                ..Effort::QUICK
            }
        };
        runner::run(config, seed, &effort)
    };
    (config, seed, outcome)
}

/// Whether a bug shows only where something has failed.
fn needs_errors(bug: Bug) -> bool {
    with_errors(bug) == 3 || bug == Bug::RewrittenTable
}

/// Runs workloads of one configuration with a bug planted, as the parts `cuts` or (where the bug needs that) `errors` do, until it shows or so
/// many states were judged, at so many cuts of each workload.
#[must_use]
pub fn hunt_in(config: &Config, bug: Bug, seed: u64, (states, cuts): (u64, u64)) -> Hunt {
    let effort = Effort {
        cuts,
        ..Effort::QUICK
    };
    let mut hunt = Hunt {
        workloads: 0,
        states: 0,
        found: None,
    };
    plant(bug);
    while hunt.states < states && hunt.found.is_none() {
        let seed = mix(seed ^ mix(hunt.workloads));
        let outcome = if needs_errors(bug) {
            let mut rng = Rng::new(seed);
            with_errors_in(bug, config, &mut rng, seed)
        } else {
            runner::run(config, seed, &effort)
        };
        hunt.workloads += 1;
        hunt.states += outcome.states + 1;
        hunt.found = outcome.violation.map(|found| (config.name, seed, found));
    }
    plant(Bug::None);
    hunt
}

/// Runs workloads with a bug planted until it shows, at most so many.
#[must_use]
pub fn hunt(bug: Bug, seed: u64, workloads: u64) -> Hunt {
    let configs = config::mix();
    let mut hunt = Hunt {
        workloads: 0,
        states: 0,
        found: None,
    };
    plant(bug);
    for number in 0..workloads {
        let (config, seed, outcome) = workload(&configs, bug, seed, number);
        hunt.workloads += 1;
        hunt.states += outcome.states + 1;
        if let Some(violation) = outcome.violation {
            hunt.found = Some((config.name, seed, violation));
            break;
        }
    }
    plant(Bug::None);
    hunt
}
