//! Many workloads on all cores, and the table of what they gave. What is run, and in which order it counts, does not
//! depend on the number of threads.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use urus_engine::planted::Bug;
use urus_engine::seen::Ways;

use crate::callers::Failed;
use crate::census::Census;
use crate::config::{self, Config};
use crate::contents::index;
use crate::errors::{self, Injection};
use crate::flat;
use crate::plants;
use crate::rng::{Rng, TraceHash, mix};
use crate::runner::{self, Effort, Outcome};
use crate::sequences;

/// A part of the simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Seeded workloads, cut at random points.
    Cuts,
    /// All short sequences, cut at every point.
    Sequences,
    /// An error at every I/O.
    Errors,
    /// Against a flat array.
    Model,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cuts, Self::Sequences, Self::Errors, Self::Model];

    /// As the command line calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cuts => "cuts",
            Self::Sequences => "sequences",
            Self::Errors => "errors",
            Self::Model => "model",
        }
    }
}

/// When a sweep ends: at the first of these, rounded up to whole batches.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// States judged.
    pub states: u64,
    /// Time.
    pub time: Duration,
    /// Threads.
    pub threads: usize,
    /// One in so many states after a cut is also judged by QEMU; 0: none.
    pub qemu: u64,
    /// Cut points of each workload, at most: with few of them, many configurations cost few states.
    pub cuts: u64,
    /// Of the errors at every operation of a workload, so many by lot; none: all of them.
    pub injections: Option<usize>,
}

/// What a sweep gave.
#[derive(Clone, Debug)]
pub struct Tally {
    /// The part's name.
    pub name: String,
    /// Where it started.
    pub seed: u64,
    /// Workloads run.
    pub workloads: u64,
    /// Cut points.
    pub cuts: u64,
    /// States judged.
    pub states: u64,
    /// Of them, reopened for writing.
    pub reopened: u64,
    /// Of them, judged by QEMU too.
    pub qemu: u64,
    /// Errors that hit.
    pub injected: u64,
    /// What they hit, and what they did not.
    pub census: Census,
    /// Ways through the engine that only large images take.
    pub ways: Ways,
    /// The first violations, each with how to see it again.
    pub violations: Vec<String>,
    /// Clusters leaked in the worst state.
    pub largest_leak: u64,
    /// Names all runs.
    pub trace: TraceHash,
    /// How long it took.
    pub time: Duration,
}

impl Tally {
    fn new(name: &str, seed: u64) -> Self {
        Self {
            name: name.to_owned(),
            seed,
            workloads: 0,
            cuts: 0,
            states: 0,
            reopened: 0,
            qemu: 0,
            injected: 0,
            census: Census::default(),
            ways: Ways::default(),
            violations: Vec::new(),
            largest_leak: 0,
            trace: TraceHash::default(),
            time: Duration::ZERO,
        }
    }

    fn add(&mut self, outcome: Outcome) {
        self.workloads += outcome.workloads.max(1);
        self.cuts += outcome.cuts;
        self.states += outcome.states;
        self.reopened += outcome.reopened;
        self.qemu += outcome.qemu;
        self.injected += outcome.injected;
        self.census.add(outcome.census);
        self.ways.add(outcome.ways);
        self.largest_leak = self.largest_leak.max(outcome.largest_leak);
        self.trace.add(outcome.trace);
        self.violations.extend(outcome.violation);
    }

    /// The table's head.
    #[must_use]
    pub fn head() -> String {
        format!(
            "{:<28} {:>9} {:>9} {:>10} {:>8} {:>6} {:>8} {:>10} {:>5}  {:<16} {:>8} {:>6}",
            "part",
            "workloads",
            "cuts",
            "states",
            "reopened",
            "qemu",
            "errors",
            "violations",
            "leak",
            "trace",
            "states/s",
            "seed"
        )
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = u128::from(self.states) * 1000 / self.time.as_millis().max(1);
        write!(
            f,
            "{:<28} {:>9} {:>9} {:>10} {:>8} {:>6} {:>8} {:>10} {:>5}  {:016x} {rate:>8} {:>6}",
            self.name,
            self.workloads,
            self.cuts,
            self.states,
            self.reopened,
            self.qemu,
            self.injected,
            self.violations.len(),
            self.largest_leak,
            self.trace.value(),
            self.seed
        )
    }
}

/// So many violations are enough.
const MAX_VIOLATIONS: usize = 10;

/// Runs numbers from 0 on, on several threads, until the budget is used up or `last` is reached.
fn sweep(
    name: &str,
    seed: u64,
    budget: &Budget,
    (batch, last): (u64, u64),
    job: &(dyn Fn(u64) -> Outcome + Sync),
) -> Tally {
    let start = Instant::now();
    let mut tally = Tally::new(name, seed);
    let mut first = 0;
    while first < last
        && tally.states < budget.states
        && start.elapsed() < budget.time
        && tally.violations.len() < MAX_VIOLATIONS
    {
        let end = last.min(first + batch);
        let next = AtomicU64::new(first);
        let done: Mutex<Vec<(u64, Outcome)>> = Mutex::default();
        std::thread::scope(|scope| {
            for _ in 0..budget.threads {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= end {
                            return;
                        }
                        let outcome = job(number);
                        done.lock().expect("no job panics").push((number, outcome));
                    }
                });
            }
        });
        let mut done = done.into_inner().expect("no job panics");
        done.sort_unstable_by_key(|(number, _)| *number);
        done.into_iter().for_each(|(_, outcome)| tally.add(outcome));
        first = end;
    }
    tally.time = start.elapsed();
    tally
}

/// The workload's seed in a sweep.
fn seed_of(seed: u64, number: u64) -> u64 {
    mix(seed ^ mix(number))
}

fn again(outcome: &mut Outcome, part: &str, config: &Config, seed: u64, more: &str) {
    if let Some(violation) = &mut outcome.violation {
        *violation = format!(
            "{violation}\n    again: cargo run -p urus-sim -- --part {part} --config {:?} --exact {seed}{more}",
            config.name
        );
    }
}

/// Runs a part.
#[must_use]
pub fn run(part: Part, seed: u64, only: Option<&Config>, budget: &Budget) -> Tally {
    let of_part = || match part {
        Part::Cuts => config::mix(),
        _ => config::all(),
    };
    let configs = only.map_or_else(of_part, |config| vec![config.clone()]);
    let config = |number: u64| &configs[index(number % configs.len() as u64)];
    let failed = Failed::default();
    match part {
        Part::Cuts => sweep(
            "cuts",
            seed,
            budget,
            (cuts_at_once(budget), u64::MAX),
            &|number| {
                let (config, seed) = (config(number), seed_of(seed, number));
                let effort = Effort {
                    qemu: budget.qemu,
                    cuts: budget.cuts,
                    ..Effort::of_cuts(seed)
                };
                let mut outcome = runner::run(config, seed, &effort);
                again(&mut outcome, "cuts", config, seed, "");
                outcome
            },
        ),
        Part::Sequences => {
            let last = sequences::SEQUENCES * sequences::configs().len() as u64;
            sweep("sequences", seed, budget, (64, last), &|number| {
                sequences::run(seed, number)
            })
        }
        Part::Errors => sweep("errors", seed, budget, (4, u64::MAX), &|number| {
            // With few errors of each workload the run is short: those that are alike stand side by side, so it takes them far apart.
            let stride = budget
                .injections
                .map_or(1, |_| spread(configs.len() as u64));
            let (config, seed) = (config(number * stride), seed_of(seed, number));
            every_error(config, seed, budget, &failed)
        }),
        Part::Model => sweep(
            "model",
            seed,
            budget,
            (flat::GEOMETRIES, u64::MAX),
            &|number| {
                let mut outcome = flat::run(seed, number, 240);
                outcome.states = outcome.ops;
                if let Some(violation) = &mut outcome.violation {
                    *violation = format!("model run {number}: {violation}");
                }
                outcome
            },
        ),
    }
}

/// A step that comes to every one of so many, and soon to all sorts of them.
fn spread(count: u64) -> u64 {
    let divides = |divisor: u64| move |number: u64| number.is_multiple_of(divisor);
    let coprime = |step: &u64| !(2..=*step).any(|d| divides(d)(*step) && divides(d)(count));
    (count * 5 / 13..)
        .find(|step| *step > 0 && coprime(step))
        .unwrap_or(1)
}

/// Workloads between two looks at the budget: each gives some 52 states at each cut. At most a round of all configurations.
fn cuts_at_once(budget: &Budget) -> u64 {
    let round = config::mix().len() as u64;
    (budget.states / (52 * budget.cuts.max(1))).clamp(4, round)
}

/// One workload with every error at every operation, or with some of them.
fn every_error(config: &Config, seed: u64, budget: &Budget, failed: &Failed) -> Outcome {
    let effort = Effort {
        cuts: budget.cuts.min(Effort::ERRORS.cuts),
        ..Effort::ERRORS
    };
    let mut sum = Outcome::default();
    let measured = match errors::measure(config, seed, &effort) {
        Ok(measured) => measured,
        Err(violation) => {
            sum.violation = Some(violation);
            again(&mut sum, "errors", config, seed, "");
            return sum;
        }
    };
    let injections: Vec<(usize, Injection)> = match budget.injections {
        None => (0..).zip(measured.every()).collect(),
        Some(most) => measured.rare(most, &mut Rng::new(seed ^ 0x0066_6577), failed),
    };
    for (number, injection) in injections {
        let mut outcome = runner::run_with(config, seed, &effort, Some(injection));
        sum.workloads += 1;
        sum.cuts += outcome.cuts;
        sum.states += outcome.states + 1;
        sum.reopened += outcome.reopened;
        sum.injected += outcome.injected;
        sum.census.add(std::mem::take(&mut outcome.census));
        sum.ways.add(outcome.ways);
        sum.largest_leak = sum.largest_leak.max(outcome.largest_leak);
        sum.trace = mix(sum.trace ^ outcome.trace);
        if outcome.violation.is_some() {
            again(
                &mut outcome,
                "errors",
                config,
                seed,
                &format!(" --inject {number}"),
            );
            sum.violation = outcome.violation;
            return sum;
        }
    }
    sum
}

/// Runs one workload again, as a violation says.
#[must_use]
pub fn exact(part: Part, config: &Config, seed: u64, inject: Option<usize>) -> Outcome {
    match (part, inject) {
        (Part::Errors, Some(number)) => {
            let measured = errors::measure(config, seed, &Effort::ERRORS);
            let injection = measured
                .ok()
                .and_then(|measured| measured.every().get(number).copied());
            runner::run_with(config, seed, &Effort::ERRORS, injection)
        }
        (Part::Errors, None) => errors::run_random(config, seed, &Effort::ERRORS),
        _ => runner::run(config, seed, &Effort::of_cuts(seed)),
    }
}

/// What a configuration is good for.
#[derive(Clone, Copy, Debug, Default)]
struct Merit {
    bugs: u64,
    /// Bugs that at most two others found with fewer states.
    among_first: u64,
    states: u64,
}

/// Hunts each of the planted bugs in each configuration, up to so many states (at so many cuts of each workload), and tells lines of two
/// tables as they come: for each bug the configurations that found it first, and for each configuration what it is good for. Bugs that
/// the budget's time does not reach are left out.
pub fn hunt_by_config(bugs: &[Bug], seed: u64, budget: &Budget, tell: &dyn Fn(String)) {
    let start = Instant::now();
    let configs = config::all();
    let mut merits = vec![Merit::default(); configs.len()];
    tell(format!(
        "{:<26} {:>8}  first in (states)",
        "planted bug", "found in"
    ));
    for bug in bugs {
        if start.elapsed() >= budget.time {
            tell(format!("{:<26} not reached in time", format!("{bug:?}")));
            continue;
        }
        let found = found_in(&configs, *bug, seed, budget);
        let first: Vec<String> = found
            .iter()
            .take(4)
            .map(|(states, config)| format!("{} ({states})", configs[*config].name))
            .collect();
        tell(format!(
            "{:<26} {:>4}/{:<3}  {}",
            format!("{bug:?}"),
            found.len(),
            configs.len(),
            first.join("; ")
        ));
        for (place, (states, config)) in found.into_iter().enumerate() {
            let merit = &mut merits[config];
            merit.bugs += 1;
            merit.among_first += u64::from(place < 3);
            merit.states += states;
        }
    }
    tell(format!(
        "{:<50} {:>10} {:>11} {:>12}",
        "configuration", "bugs found", "among first", "mean states"
    ));
    for (config, merit) in configs.iter().zip(merits) {
        tell(format!(
            "{:<50} {:>10} {:>11} {:>12}",
            config.name,
            merit.bugs,
            merit.among_first,
            merit.states / merit.bugs.max(1),
        ));
    }
}

/// The configurations that find a bug, with the states that it took, fewest first.
fn found_in(configs: &[Config], bug: Bug, seed: u64, budget: &Budget) -> Vec<(u64, usize)> {
    let next = AtomicU64::new(0);
    let found: Mutex<Vec<(u64, usize)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..budget.threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(config) = configs.get(index(number)) else {
                        return;
                    };
                    let seed = seed_of(seed ^ bug as u64, number);
                    let hunt = plants::hunt_in(config, bug, seed, (budget.states, budget.cuts));
                    if hunt.found.is_some() {
                        let mut found = found.lock().expect("no hunt panics");
                        found.push((hunt.states, index(number)));
                    }
                }
            });
        }
    });
    let mut found = found.into_inner().expect("no hunt panics");
    found.sort_unstable();
    found
}

/// Hunts each of the planted bugs several times, and gives the table's lines; the last says how many were found.
#[must_use]
pub fn hunt_all(
    bugs: &[Bug],
    seed: u64,
    times: u64,
    workloads: u64,
    threads: usize,
) -> (Vec<String>, bool) {
    let hunts = bugs.len() as u64 * times;
    let next = AtomicU64::new(0);
    let done: Mutex<Vec<(u64, plants::Hunt)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= hunts {
                        return;
                    }
                    let bug = bugs[index(number / times)];
                    let hunt = plants::hunt(bug, seed_of(seed, number), workloads);
                    done.lock().expect("no hunt panics").push((number, hunt));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no hunt panics");
    done.sort_unstable_by_key(|(number, _)| *number);
    let mut lines = vec![format!(
        "{:<26} {:>7} {:>10} {:>10}  what was seen",
        "planted bug", "found", "median", "most"
    )];
    let mut all = true;
    for (bug, hunts) in bugs.iter().zip(done.chunks(index(times))) {
        let found = hunts
            .iter()
            .filter(|(_, hunt)| hunt.found.is_some())
            .count();
        let mut states: Vec<u64> = hunts.iter().map(|(_, hunt)| hunt.states).collect();
        states.sort_unstable();
        let seen = hunts
            .iter()
            .find_map(|(_, hunt)| hunt.found.as_ref())
            .map_or("nothing", |(_, _, violation)| violation.as_str());
        let seen = seen.split(" (Read").next().unwrap_or(seen);
        all &= found == hunts.len();
        lines.push(format!(
            "{:<26} {found:>3}/{:<3} {:>10} {:>10}  {:.90}",
            format!("{bug:?}"),
            hunts.len(),
            states[states.len() / 2],
            states.last().copied().unwrap_or(0),
            seen.rsplit(": ").next().unwrap_or(seen),
        ));
    }
    (lines, all)
}

#[cfg(test)]
mod tests {
    //! Guards against configurations that a short run never comes to.

    use super::*;

    #[test]
    fn a_spread_order_comes_to_all() {
        for count in 1..200 {
            let step = spread(count);
            let seen: std::collections::BTreeSet<u64> =
                (0..count).map(|number| number * step % count).collect();
            assert_eq!(seen.len() as u64, count, "{count}: {step}");
        }
    }
}
