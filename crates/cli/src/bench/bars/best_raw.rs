//! The best that can be done with a raw file: what a control is, where "the same driver" would hide the driver's own cost.

use std::path::Path;

use urus::CacheMode;
use urus_ring::{RawFile, RawMethod};

use super::super::client::{RawTarget, Target};
use super::super::slices::{Plan, Slices};
use super::Bench;
use crate::failure::Failure;

/// Slices of each method, in turn.
const ROUNDS: u64 = 5;

/// The method that had the fastest slice for this plan, each a third as long as the plan's. Whatever disturbs makes slices slower, never
/// faster, so the fastest tells more than the median of a few.
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
    let mut fastest = vec![0.0_f64; targets.len()];
    Slices::with(plan, &targets, |slices| {
        for round in 0..ROUNDS {
            for (index, fastest) in fastest.iter_mut().enumerate() {
                bench.check_stop()?;
                *fastest = fastest.max(slices.slice(index, round, usize::MAX)?.iops);
            }
        }
        Ok(())
    })?;
    candidates
        .into_iter()
        .zip(&fastest)
        .max_by(|one, other| one.1.total_cmp(other.1))
        .map(|(best, _)| best)
        .ok_or_else(|| Failure::new(format!("{} cannot be opened", path.display())))
}

/// Whether the kernel lets us: memory may not be registered everywhere, nor rings made.
fn can_be_used(target: &RawTarget, plan: Plan) -> bool {
    target
        .open(plan.mode.writes())
        .is_ok_and(|file| RawFile::open(file, target.method, plan.depth, plan.block_len()).is_ok())
}
