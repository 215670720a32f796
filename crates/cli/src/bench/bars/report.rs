//! What the suite of bars says: a table with a row for each, or the same as JSON.

use std::fmt::Write;

use serde::Serialize;

use super::super::Args;
use super::super::latency::Percentiles;
use super::super::report::{Pair, Slice, load_average, ratios};
use super::super::spread::{self, Spread};
use super::list::Bar;
use crate::size::human;

/// What has to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Asked {
    AtLeast(f64),
    AtMost(f64),
    /// Told beside the others.
    Nothing,
}

impl Asked {
    fn verdict(self, value: &Spread) -> &'static str {
        match self {
            Self::AtLeast(bar) => spread::at_least(bar, value),
            Self::AtMost(bar) => spread::at_most(bar, value),
            Self::Nothing => "told",
        }
    }

    /// How many times what is asked for is reached; none where nothing is, or where the value is no size.
    fn reached(self, value: &Spread) -> Option<Spread> {
        /// More is drawn as much.
        const MOST: f64 = 4.0;
        let times = |value: f64| match self {
            Self::AtLeast(bar) => (value / bar).min(MOST),
            Self::AtMost(bar) => (bar / value).min(MOST),
            Self::Nothing => f64::NAN,
        };
        if self == Self::Nothing || value.min <= 0.0 {
            return None;
        }
        let (one, other) = (times(value.low), times(value.high));
        let (end, other_end) = (times(value.min), times(value.max));
        Some(Spread {
            median: times(value.median),
            min: end.min(other_end),
            max: end.max(other_end),
            low: one.min(other),
            high: one.max(other),
        })
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bar) => format!("≥ {bar}"),
            Self::AtMost(bar) => format!("≤ {bar}"),
            Self::Nothing => String::new(),
        }
    }
}

/// Of both.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Sides<T> {
    pub(super) subject: T,
    pub(super) control: T,
}

/// What a test has found.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Measured {
    pub(super) subject: String,
    pub(super) control: String,
    /// Of `value`.
    pub(super) unit: &'static str,
    pub(super) value: Spread,
    /// Medians of the slices. Not comparable with other runs.
    pub(super) operations_per_second: Option<Sides<f64>>,
    pub(super) cpu_microseconds_per_operation: Option<Sides<f64>>,
    pub(super) cpu_ratio: Option<Spread>,
    /// Medians of the slices' percentiles; not of programs that tell none.
    pub(super) latency_microseconds: Sides<Option<Percentiles>>,
}

impl Measured {
    /// The ratio of two rates.
    pub(super) fn of_pairs(subject: String, control: String, pairs: &[Pair]) -> Self {
        let value = ratios(pairs, |slice| slice.iops);
        Self {
            value,
            unit: "ratio",
            ..Self::with_figures(subject, control, pairs, value)
        }
    }

    /// Something else, beside the rates.
    pub(super) fn with_figures(
        subject: String,
        control: String,
        pairs: &[Pair],
        value: Spread,
    ) -> Self {
        let medians = |of: fn(&Slice) -> f64| Sides {
            subject: Spread::of(pairs.iter().map(|pair| of(&pair.subject))).median,
            control: Spread::of(pairs.iter().map(|pair| of(&pair.control))).median,
        };
        let cpu = medians(Slice::cpu_microseconds);
        let is_known = cpu.subject > 0.0 && cpu.control > 0.0;
        let latency = |of: fn(&Pair) -> Percentiles| {
            let median = Percentiles::median(pairs.iter().map(of));
            (median.p50 > 0.0).then_some(median)
        };
        Self {
            subject,
            control,
            unit: "",
            value,
            operations_per_second: Some(medians(|slice| slice.iops)),
            cpu_microseconds_per_operation: is_known.then_some(cpu),
            cpu_ratio: is_known.then(|| ratios(pairs, Slice::cpu_microseconds)),
            latency_microseconds: Sides {
                subject: latency(|pair| pair.subject.latency),
                control: latency(|pair| pair.control.latency),
            },
        }
    }

    /// Values without operations.
    pub(super) fn of_values(
        subject: &str,
        control: String,
        unit: &'static str,
        value: Spread,
    ) -> Self {
        Self {
            subject: subject.to_owned(),
            control,
            unit,
            value,
            operations_per_second: None,
            cpu_microseconds_per_operation: None,
            cpu_ratio: None,
            latency_microseconds: Sides {
                subject: None,
                control: None,
            },
        }
    }
}

const FAILED: &str = "failed";

/// One bar.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Row {
    bar: &'static str,
    name: &'static str,
    what: &'static str,
    asked: Asked,
    /// `met`, `missed`, `not shown` (the interval lies on both sides), `told`, `left out` or `failed`.
    verdict: &'static str,
    measured: Option<Measured>,
    /// Why it was not measured.
    why: Option<String>,
    load_average: Vec<f64>,
}

impl Row {
    pub(super) fn measured(bar: &Bar, measured: Measured) -> Self {
        let verdict = bar.asked.verdict(&measured.value);
        Self {
            measured: Some(measured),
            ..Self::with_verdict(bar, verdict)
        }
    }

    /// It takes a program that is not there, or something else measures it.
    pub(super) fn left_out(bar: &Bar, why: String) -> Self {
        Self {
            why: Some(why),
            ..Self::with_verdict(bar, "left out")
        }
    }

    pub(super) fn failed(bar: &Bar, why: &str) -> Self {
        Self {
            why: Some(why.trim().replace('\n', "; ")),
            ..Self::with_verdict(bar, FAILED)
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.verdict == FAILED
    }

    fn with_verdict(bar: &Bar, verdict: &'static str) -> Self {
        Self {
            bar: bar.id,
            name: bar.name,
            what: bar.what,
            asked: bar.asked,
            verdict,
            measured: None,
            why: None,
            load_average: load_average(),
        }
    }

    fn write(&self, text: &mut String) {
        let head = format!(
            "{:<4}{:<33}{:<8}{:<11}",
            self.bar,
            self.name,
            self.asked.text(),
            self.verdict
        );
        let Some(measured) = &self.measured else {
            let why = self.why.as_deref().unwrap_or_default();
            // Writing into a string does not fail.
            let _ = writeln!(text, "{head}{why}");
            return;
        };
        let value = &measured.value;
        let spread = format!(
            "{:.3} ({:.2}, {:.2}; {:.3} to {:.3})",
            value.median, value.min, value.max, value.low, value.high
        );
        let both = |sides: &Option<Sides<f64>>, digits: usize| {
            sides.as_ref().map_or_else(String::new, |sides| {
                format!("{:.digits$} / {:.digits$}", sides.subject, sides.control)
            })
        };
        let latency = |percentiles: Option<Percentiles>| {
            percentiles.map_or_else(
                || "-".to_owned(),
                |latency| format!("{:.0} / {:.0}", latency.p50, latency.p99),
            )
        };
        let latencies = &measured.latency_microseconds;
        let latencies = match (latencies.subject, latencies.control) {
            (None, None) => String::new(),
            (subject, control) => format!("{}; {}", latency(subject), latency(control)),
        };
        let _ = writeln!(
            text,
            "{head}{spread:<41} {:<21} {:<17} {latencies:<25}{:>6.2}  {}",
            both(&measured.operations_per_second, 0),
            both(&measured.cpu_microseconds_per_operation, 2),
            self.load_average.first().copied().unwrap_or_default(),
            measured.control,
        );
    }
}

/// All of them.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Report {
    suite: &'static str,
    version: &'static str,
    kernel: String,
    processors: usize,
    size: u64,
    pairs: u16,
    pub(super) rows: Vec<Row>,
}

impl Report {
    pub(super) fn new(args: &Args, size: u64) -> Self {
        let kernel = rustix::system::uname();
        Self {
            suite: "bars",
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel.release().to_string_lossy().into_owned(),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            size,
            pairs: args.pairs,
            rows: Vec::new(),
        }
    }

    /// For the chart: each measured value over what is asked, so that all have one scale. From 1 on a bar is met.
    pub(super) fn bars(&self) -> Vec<(String, Spread)> {
        self.rows
            .iter()
            .filter_map(|row| {
                let reached = row.asked.reached(&row.measured.as_ref()?.value)?;
                Some((format!("{} {}", row.bar, row.name), reached))
            })
            .collect()
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "urus {}, Linux {}, {} processors; images of {}, {} pairs of slices\n\
             A bar is missed only where the whole 95 % interval of the median lies beyond it.\n\
             {:<4}{:<33}{:<8}{:<11}{:<41} {:<21} {:<17} {:<25}{:>6}  against\n",
            self.version,
            self.kernel,
            self.processors,
            human(self.size),
            self.pairs,
            "bar",
            "test",
            "asked",
            "",
            "median (min, max; 95 %)",
            "per second",
            "CPU µs/op",
            "latency µs, p50 / p99",
            "load",
        );
        for row in &self.rows {
            row.write(&mut text);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    //! Guards the chart's scale: more is better for all that is drawn.
    use super::*;

    #[test]
    fn what_is_reached_is_more_where_less_is_asked_for() {
        let value = Spread::of([2.0, 4.0, 5.0].into_iter());
        let reached = |asked: Asked| asked.reached(&value).expect("drawn");
        let at_least = reached(Asked::AtLeast(2.0));
        assert_eq!(
            (at_least.low, at_least.median, at_least.high),
            (1.0, 2.0, 2.5)
        );
        let at_most = reached(Asked::AtMost(2.0));
        assert_eq!((at_most.low, at_most.median, at_most.high), (0.4, 0.5, 1.0));
        assert_eq!(reached(Asked::AtLeast(0.1)).median, 4.0, "cut off");
        assert!(Asked::Nothing.reached(&value).is_none());
        let unclear = Spread::of([-2.0, 4.0].into_iter());
        assert!(Asked::AtMost(2.0).reached(&unclear).is_none());
    }
}
