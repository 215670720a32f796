//! Medians with their intervals, and what they say about a bar. `crates/bench-compare` judges by this file too.

use serde::Serialize;

/// A median with what surrounds it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    /// The 95 % interval of the median, from order statistics; the whole range for fewer than six values.
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Spread {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_unstable_by(f64::total_cmp);
        let count = values.len();
        let (min, max) = (values[0], values[count - 1]);
        let middle = count / 2;
        let median = if count % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        let rank = interval_rank(count);
        Self {
            median,
            min,
            max,
            low: values[rank],
            high: values[count - 1 - rank],
        }
    }
}

/// How many of `count` sorted values can be left away at each end so that the median of what they come from still lies between the
/// others with 95 % certainty: each value lies below it with the chance of one half.
fn interval_rank(count: usize) -> usize {
    #[allow(clippy::cast_precision_loss, reason = "at most a thousand")]
    let choose_factor = |k: usize| (count - k) as f64 / (k + 1) as f64;
    let mut chance = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut below = chance;
    let mut rank = 0;
    while below <= 0.025 {
        chance *= choose_factor(rank);
        below += chance;
        rank += 1;
    }
    // `rank` values at most lie below it with a chance of more than 2.5 %.
    rank.saturating_sub(1)
}

/// Whether a bar of at least `bar` is reached: missed only where the whole interval of the median lies below it.
pub(super) fn at_least(bar: f64, measured: &Spread) -> &'static str {
    if measured.median >= bar {
        "met"
    } else if measured.high < bar {
        "missed"
    } else {
        "not shown"
    }
}

/// The same for one of at most `bar`.
pub(super) fn at_most(bar: f64, measured: &Spread) -> &'static str {
    if measured.median <= bar {
        "met"
    } else if measured.low > bar {
        "missed"
    } else {
        "not shown"
    }
}

#[cfg(test)]
mod tests {
    //! Guards the statistics that decide whether a bar is met.
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_tables() {
        // From tables of the sign test: ranks from 1.
        for (count, rank) in [
            (5, 1),
            (6, 1),
            (8, 1),
            (9, 2),
            (15, 4),
            (20, 6),
            (30, 10),
            (50, 18),
        ] {
            assert_eq!(interval_rank(count) + 1, rank, "{count} values");
        }
        assert_eq!(interval_rank(1), 0);
    }

    #[test]
    fn medians_lie_in_the_middle() {
        let odd = Spread::of([3.0, 1.0, 2.0].into_iter());
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        let even = Spread::of([4.0, 1.0, 2.0, 3.0].into_iter());
        assert_eq!((even.median, even.low, even.high), (2.5, 1.0, 4.0));
    }

    #[test]
    fn a_bar_is_missed_only_by_the_whole_interval() {
        let of = |values: &[f64]| at_least(2.0, &Spread::of(values.iter().copied()));
        assert_eq!(of(&[2.0; 15]), "met");
        assert_eq!(of(&[1.9; 15]), "missed");
        assert_eq!(of(&[1.0, 1.5, 1.9, 2.5]), "not shown");
        let of = |values: &[f64]| at_most(2.0, &Spread::of(values.iter().copied()));
        assert_eq!(of(&[2.0; 15]), "met");
        assert_eq!(of(&[2.1; 15]), "missed");
        assert_eq!(of(&[1.0, 2.1, 2.2, 2.5]), "not shown");
    }
}
