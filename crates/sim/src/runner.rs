//! One workload: run it, look at the image, then cut the power again and again.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use urus_engine::storage::FileId;

use crate::checker::{self, GuestReader};
use crate::config::{Config, layers};
use crate::contents::{Change, index};
use crate::crash::{Class, CrashCursor, Limits};
use crate::machine::{Driving, Machine};
use crate::model::{Model, View};
use crate::rng::Rng;
use crate::workload::Workload;
use crate::world::SimWorld;

/// What one workload gave.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Cut points.
    pub cuts: u64,
    /// States judged.
    pub states: u64,
    /// Clusters leaked in the worst state.
    pub largest_leak: u64,
    /// Names the run.
    pub trace: u64,
    /// What is wrong, and where.
    pub violation: Option<String>,
}

/// How much of each.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Requests of the workload.
    pub requests: u64,
    /// Cut points, at most.
    pub cuts: u64,
    /// States at each.
    pub limits: Limits,
}

/// Runs one workload; a panic counts as a violation.
#[must_use]
pub fn run(config: &Config, seed: u64, effort: &Effort) -> Outcome {
    let mut outcome = Outcome::default();
    let result = catch_unwind(AssertUnwindSafe(|| {
        attempt(config, seed, effort, &mut outcome)
    }));
    outcome.violation = match result {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(panic) => Some(format!("panic: {}", panic_text(&*panic))),
    };
    outcome
}

/// What a panic said.
#[must_use]
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("of unknown kind")
}

fn attempt(
    config: &Config,
    seed: u64,
    effort: &Effort,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let fixture = config.fixture(&mut rng.fork(1));
    let behaviour = config.behaviour(&mut rng.fork(2));
    let bytes: Vec<&[u8]> = fixture
        .files
        .iter()
        .map(|file| &file.contents[..])
        .collect();
    let chain = layers(&bytes)?;
    let world = SimWorld::new(rng.next_u64(), behaviour, fixture.files.clone());
    let driving = Driving {
        queues: config.queues,
        depth: 1 + rng.index(8),
        spurious: rng.chance(64),
        errors: false,
    };
    let model = Model::new(fixture.initial.clone(), 1 << 32);
    let mut machine = Machine::open(&world, chain, config.options(), model, driving, rng.fork(3))?;
    let cluster_sectors = (1 << config.cluster_bits) / 512;
    let mut workload = Workload::new(rng.fork(4), config.sectors, cluster_sectors);
    let patience = [1, 8, 40][rng.index(3)];
    for _ in 0..effort.requests {
        let ask = workload.next_ask();
        machine.ask(ask)?;
        for _ in 0..rng.below(patience) {
            machine.step()?;
        }
    }
    machine.drain()?;
    outcome.trace = world.trace_hash();
    machine.close()?;
    outcome.trace = world.trace_hash();
    if let Some(complaint) = world.complaints().first() {
        return Err(format!("the storage complains: {complaint}"));
    }
    let view = machine.model.after_cut(world.now());
    let image = machine.image();
    let leak = judge(&[&image], &view).map_err(|error| format!("after closing: {error}"))?;
    if leak > 0 {
        return Err(format!("after closing: {leak} clusters have leaked"));
    }
    cut(&world, &machine.model, effort, &mut rng, outcome)
}

fn cut(
    world: &SimWorld,
    model: &Model,
    effort: &Effort,
    rng: &mut Rng,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let log = world.log();
    let events = log.events.len();
    let points: HashSet<usize> = (0..effort.cuts).map(|_| 1 + rng.index(events)).collect();
    let mut known = HashSet::new();
    let mut cursor = CrashCursor::new(&log);
    while cursor.advance(&log) {
        if !points.contains(&cursor.position()) {
            continue;
        }
        outcome.cuts += 1;
        let (now, _) = log.events[cursor.position() - 1];
        let view = model.after_cut(now);
        let all = world.contents(FileId(0));
        let owners = checker::check(all.bytes()).owners;
        let classify = |_: FileId, change: &Change| Class::from(owners.at(change.range().0));
        let mut violation = None;
        let position = cursor.position();
        let tally = cursor.enumerate(
            rng,
            &effort.limits,
            &classify,
            (&mut known, model.promises_at(now)),
            &mut |state| {
                let files: Vec<&[u8]> = state.files.iter().map(|file| file.bytes()).collect();
                match judge(&files, &view) {
                    Ok(leak) => {
                        outcome.largest_leak = outcome.largest_leak.max(leak);
                        ControlFlow::Continue(())
                    }
                    Err(error) => {
                        violation = Some(format!(
                            "cut at event {position} (moment {now}), {}: {error}",
                            state.choice.name
                        ));
                        ControlFlow::Break(())
                    }
                }
            },
        );
        outcome.states += tally.visited;
        if let Some(violation) = violation {
            return Err(violation);
        }
    }
    Ok(())
}

/// Judges files without the engine; how many clusters leaked.
fn judge(files: &[&[u8]], view: &View) -> Result<u64, String> {
    let report = checker::check(files[0]);
    if let Some(violation) = report.violations.first() {
        return Err(violation.to_string());
    }
    let reader = GuestReader::open(files[0], None).map_err(|error| error.to_string())?;
    let bytes = reader
        .read(0, index(reader.size()))
        .map_err(|error| error.to_string())?;
    view.check(0, &bytes)
        .map_err(|mismatch| mismatch.to_string())?;
    Ok(report.leak_count)
}
