//! The tester is tested: bugs that are planted in the engine must all be found.

use urus_engine::planted::{Bug, plant};

use crate::config::{self, Config};
use crate::errors;
use crate::rng::mix;
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

/// One workload of a hunt: every third has errors.
fn workload(configs: &[Config], seed: u64, number: u64) -> (&Config, u64, Outcome) {
    let seed = mix(seed ^ mix(number));
    let config = &configs[crate::contents::index(seed % configs.len() as u64)];
    let effort = Effort {
        reopen: 12,
        ..Effort::QUICK
    };
    let outcome = if number % 3 == 2 {
        errors::run_random(config, seed, &effort)
    } else {
        runner::run(config, seed, &effort)
    };
    (config, seed, outcome)
}

/// Runs workloads with a bug planted until it shows, at most so many.
#[must_use]
pub fn hunt(bug: Bug, seed: u64, workloads: u64) -> Hunt {
    let configs = config::all();
    let mut hunt = Hunt {
        workloads: 0,
        states: 0,
        found: None,
    };
    plant(bug);
    for number in 0..workloads {
        let (config, seed, outcome) = workload(&configs, seed, number);
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
