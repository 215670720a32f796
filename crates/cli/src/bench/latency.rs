//! How long requests take: from the submission to when the caller sees that it is done.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::spread::Spread;

/// Longer is counted as this long.
const LONGEST_NANOSECONDS: u64 = 60_000_000_000;

/// A histogram of nanoseconds to two digits that never allocates once it is there.
pub(super) fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NANOSECONDS, 2).expect("bounds that make sense")
}

pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(LONGEST_NANOSECONDS)
}

/// In microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p99: f64,
    #[serde(rename = "p99.9")]
    pub(super) p999: f64,
}

impl Percentiles {
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "two digits are kept")]
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
        }
    }

    /// The median of each.
    pub(super) fn median(all: impl Iterator<Item = Self> + Clone) -> Self {
        let of = |value: fn(Self) -> f64| Spread::of(all.clone().map(value)).median;
        Self {
            p50: of(|percentiles| percentiles.p50),
            p99: of(|percentiles| percentiles.p99),
            p999: of(|percentiles| percentiles.p999),
        }
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} / {:.0} / {:.0}", self.p50, self.p99, self.p999)
    }
}

#[cfg(test)]
mod tests {
    //! Guards the latencies that are printed: right to two digits, and never more than the histogram holds.
    use super::*;

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let mut histogram = empty();
        for microsecond in 1..=1000 {
            histogram.saturating_record(microsecond * 1000);
        }
        let got = Percentiles::of(&histogram);
        for (got, expected) in [(got.p50, 500.0), (got.p99, 990.0), (got.p999, 999.0)] {
            assert!((got / expected - 1.0).abs() < 0.01, "{got} for {expected}");
        }
        histogram.saturating_record(u64::MAX);
        assert_eq!(histogram.len(), 1001);
    }
}
