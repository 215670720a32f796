//! An error at every I/O: a workload is run again and again, each time with something going wrong at another operation.

use crate::config::Config;
use crate::fault::{ACTIONS, Action, Fault, Trigger};
use crate::rng::Rng;
use crate::runner::{Effort, Outcome, run_with};

/// How the errors come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// At one operation.
    Once(u64, Action),
    /// At one operation and all later ones, until the fault is lifted.
    From(u64, Action),
    /// At one operation in so many, from the first number on.
    Every(u64, u64, Action),
    /// At one fdatasync.
    Sync(u64, Action),
}

impl Injection {
    /// As the world takes it.
    #[must_use]
    pub fn fault(self) -> Fault {
        let (trigger, action) = match self {
            Self::Once(op, action) => (Trigger::Op(op), action),
            Self::From(op, action) => (Trigger::Ops(op, u64::MAX), action),
            Self::Every(first, of, action) => (Trigger::Every(first, of), action),
            Self::Sync(sync, action) => (Trigger::Sync(sync), action),
        };
        Fault { trigger, action }
    }

    /// Drawn by lot, for a workload of so many operations and fdatasyncs.
    #[must_use]
    pub fn random(rng: &mut Rng, ops: u64, syncs: u64) -> Self {
        let action = ACTIONS[rng.index(ACTIONS.len())];
        match rng.index(8) {
            0 => Self::From(rng.below(ops + 1), Action::Enospc),
            1 | 2 => Self::Sync(rng.below(syncs + 1), Action::Eio),
            _ => Self::Once(rng.below(ops + 1), action),
        }
    }

    /// Every operation with every action, every operation with ENOSPC from there on, errors again and again, every
    /// fdatasync failing.
    #[must_use]
    pub fn every(ops: u64, syncs: u64) -> Vec<Self> {
        let mut all = Vec::new();
        for op in 0..ops {
            all.extend(ACTIONS.map(|action| Self::Once(op, action)));
            all.push(Self::From(op, Action::Enospc));
        }
        for action in [Action::Eio, Action::Enospc] {
            let often = |of: u64| (0..of.min(ops)).map(move |first| Self::Every(first, of, action));
            all.extend([5, 11, 23].into_iter().flat_map(often));
        }
        all.extend((0..syncs).map(|sync| Self::Sync(sync, Action::Eio)));
        all
    }
}

/// Storage operations and fdatasyncs of a workload without errors.
///
/// # Errors
/// What is wrong even without errors.
pub fn measure(config: &Config, seed: u64, effort: &Effort) -> Result<(u64, u64), String> {
    let outcome = run_with(config, seed, effort, None);
    outcome
        .violation
        .map_or(Ok((outcome.ops, outcome.syncs)), Err)
}

/// Runs a workload with errors drawn by lot.
#[must_use]
pub fn run_random(config: &Config, seed: u64, effort: &Effort) -> Outcome {
    let mut rng = Rng::new(seed ^ 0x6572_726f_7273);
    // Workloads have some 2 to 6 operations for each request.
    let injection = Injection::random(&mut rng, effort.requests * 4, effort.requests / 4);
    run_with(config, seed, effort, Some(injection))
}
