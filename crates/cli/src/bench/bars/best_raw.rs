//! The best that can be done with a raw file: what a control is, where "the same driver" would hide the driver's own cost.

use std::path::Path;

use urus::CacheMode;
use urus_ring::{RawFile, RawMethod};

use super::super::client::{RawTarget, Target};
use super::super::slices::{Plan, Slices};
use super::super::spread::Spread;
use super::Bench;
use crate::failure::Failure;

/// Slices of each method, in turn.
const ROUNDS: u64 = 5;

/// The method with the highest median rate for this plan, found in slices of a third of the plan's.
pub(super) fn choose(
    bench: &mut Bench<'_>,
    path: &Path,
    cache: CacheMode,
    plan: Plan,
) -> Result<RawTarget, Failure> {
    let direct = cache != CacheMode::Writeback;
    let candidates: Vec<RawTarget> = RawMethod::ALL
        .into_iter()
        .map(|method| RawTarget {
            path: path.to_owned(),
            method,
            direct,
        })
        .filter(|target| can_be_used(target, plan))
        .collect();
    let plan = Plan {
        slice: plan.slice / 3,
        ..plan
    };
    let targets: Vec<_> = candidates.iter().map(Target::Raw).collect();
    let mut rates = vec![Vec::new(); targets.len()];
    Slices::with(plan, &targets, |slices| {
        for round in 0..ROUNDS {
            for (index, rates) in rates.iter_mut().enumerate() {
                bench.check_stop()?;
                rates.push(slices.slice(index, round, usize::MAX)?.iops);
            }
        }
        Ok(())
    })?;
    let median = |rates: &Vec<f64>| Spread::of(rates.iter().copied()).median;
    candidates
        .into_iter()
        .zip(&rates)
        .max_by(|one, other| median(one.1).total_cmp(&median(other.1)))
        .map(|(best, _)| best)
        .ok_or_else(|| Failure::new(format!("{} cannot be opened", path.display())))
}

/// Whether the kernel lets us: memory may not be registered everywhere, nor rings made.
fn can_be_used(target: &RawTarget, plan: Plan) -> bool {
    target
        .open(plan.mode.writes())
        .is_ok_and(|file| RawFile::open(file, target.method, plan.depth, plan.block_len()).is_ok())
}
