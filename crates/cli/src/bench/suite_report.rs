//! What a suite says: a table with a row for each test, or the same as JSON.

use std::fmt::Write;

use serde::Serialize;

use super::Args;
use super::latency::Percentiles;
use super::report::{Pair, Slice, load_average, ratios};
use super::spread::Spread;
use crate::size::human;

/// All tests of a suite.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct SuiteReport {
    suite: &'static str,
    version: &'static str,
    kernel: String,
    processors: usize,
    size: u64,
    depth: u32,
    pairs: u16,
    pub(super) rows: Vec<Row>,
    pub(super) left_out: Vec<LeftOut>,
}

/// One test.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Row {
    name: String,
    iops: Drivers<f64>,
    iops_ratio: Spread,
    cpu_microseconds_per_operation: Drivers<f64>,
    cpu_ratio: Spread,
    latency_microseconds: Drivers<Percentiles>,
    load_average: Vec<f64>,
}

/// A test that could not be run.
#[derive(Debug, Serialize)]
pub(super) struct LeftOut {
    pub(super) name: String,
    pub(super) why: String,
}

/// Medians of the slices. Not comparable with other runs.
#[derive(Debug, Serialize)]
struct Drivers<T> {
    io_uring: T,
    blocking: T,
}

impl Drivers<f64> {
    fn medians(pairs: &[Pair], value: impl Fn(&Slice) -> f64) -> Self {
        Self {
            io_uring: Spread::of(pairs.iter().map(|pair| value(&pair.subject))).median,
            blocking: Spread::of(pairs.iter().map(|pair| value(&pair.control))).median,
        }
    }
}

impl Row {
    pub(super) fn new(name: String, pairs: &[Pair]) -> Self {
        Self {
            name,
            iops: Drivers::medians(pairs, |slice| slice.iops),
            iops_ratio: ratios(pairs, |slice| slice.iops),
            cpu_microseconds_per_operation: Drivers::medians(pairs, Slice::cpu_microseconds),
            cpu_ratio: ratios(pairs, Slice::cpu_microseconds),
            latency_microseconds: Drivers {
                io_uring: Percentiles::median(pairs.iter().map(|pair| pair.subject.latency)),
                blocking: Percentiles::median(pairs.iter().map(|pair| pair.control.latency)),
            },
            load_average: load_average(),
        }
    }
}

impl SuiteReport {
    pub(super) fn new(args: &Args, size: u64) -> Self {
        let kernel = rustix::system::uname();
        Self {
            suite: "proposal",
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel.release().to_string_lossy().into_owned(),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            size,
            depth: args.depth,
            pairs: args.pairs,
            rows: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// For the chart.
    pub(super) fn bars(&self) -> Vec<(String, Spread)> {
        let bar = |row: &Row| (row.name.clone(), row.iops_ratio);
        self.rows.iter().map(bar).collect()
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "urus {}, Linux {}, {} processors; images of {}, {} requests in flight per queue, {} pairs of slices\n\
             io_uring / plain system calls: medians of paired ratios, and medians of both\n\
             {:<32}{:>10}{:>10}  {:<36}{:>15}  {:<34}{:>6}\n",
            self.version,
            self.kernel,
            self.processors,
            human(self.size),
            self.depth,
            self.pairs,
            "test",
            "io_uring/s",
            "blocking/s",
            "ratio (min, max; 95 %)",
            "CPU µs/op",
            "latency µs, p50 / p99 / p99.9",
            "load",
        );
        for row in &self.rows {
            row.write(&mut text);
        }
        for left_out in &self.left_out {
            let _ = writeln!(text, "{:<32}left out: {}", left_out.name, left_out.why);
        }
        text
    }
}

impl Row {
    fn write(&self, text: &mut String) {
        let ratio = &self.iops_ratio;
        let spread = format!(
            "{:.3} ({:.2}, {:.2}; {:.3} to {:.3})",
            ratio.median, ratio.min, ratio.max, ratio.low, ratio.high
        );
        let cpu = &self.cpu_microseconds_per_operation;
        let cpu = format!("{:.2} / {:.2}", cpu.io_uring, cpu.blocking);
        let latency = &self.latency_microseconds;
        let latency = format!("{}; {}", latency.io_uring, latency.blocking);
        let load = self.load_average.first().copied().unwrap_or_default();
        // Writing into a string does not fail.
        let _ = writeln!(
            text,
            "{:<32}{:>10.0}{:>10.0}  {spread:<36}{cpu:>15}  {latency:<34}{load:>6.2}",
            self.name, self.iops.io_uring, self.iops.blocking
        );
    }
}
