//! What the pairs say: medians of paired ratios, with their range.

use std::time::Duration;

use serde::Serialize;
use urus::Device;

use super::Args;
use super::latency::Percentiles;
use super::spread::Spread;
use crate::common::CacheArg;
use crate::size::human;

/// One slice, all threads together.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slice {
    pub(super) operations: u64,
    pub(super) iops: f64,
    pub(super) cpu: Duration,
    pub(super) latency: Percentiles,
}

impl Slice {
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    pub(super) fn cpu_microseconds(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.operations.max(1) as f64
    }
}

/// Two slices, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    pub(super) subject: Slice,
    pub(super) control: Slice,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Report {
    image: String,
    format: &'static str,
    driver: &'static str,
    cache: &'static str,
    mode: &'static str,
    block_size: u64,
    depth: u32,
    queues: u16,
    /// Bytes of the disk that took part.
    span: u64,
    /// Bytes of those that are stored as data; what is not stored is read without I/O.
    stored: u64,
    pairs: usize,
    iops: Sides,
    iops_ratio: Spread,
    cpu_microseconds_per_operation: Sides,
    cpu_ratio: Spread,
    latency_microseconds: Latencies,
    load_average: Vec<f64>,
}

/// Medians of the slices. Not comparable with other runs.
#[derive(Debug, Serialize)]
struct Sides {
    image: f64,
    raw: f64,
}

/// Medians of the slices' percentiles.
#[derive(Debug, Serialize)]
struct Latencies {
    image: Percentiles,
    raw: Percentiles,
}

impl Sides {
    fn of(pairs: &[Pair], value: impl Fn(&Slice) -> f64) -> Self {
        Self {
            image: Spread::of(pairs.iter().map(|pair| value(&pair.subject))).median,
            raw: Spread::of(pairs.iter().map(|pair| value(&pair.control))).median,
        }
    }
}

pub(super) fn ratios(pairs: &[Pair], value: impl Fn(&Slice) -> f64) -> Spread {
    Spread::of(
        pairs
            .iter()
            .map(|pair| value(&pair.subject) / value(&pair.control)),
    )
}

impl Report {
    pub(super) fn new(args: &Args, image: &Device, span: u64, stored: u64, pairs: &[Pair]) -> Self {
        Self {
            image: image.name().to_owned(),
            format: image.format().name(),
            driver: image.driver(),
            cache: args.cache.name(),
            mode: args.mode.name(),
            block_size: args.block_size.0,
            depth: args.depth,
            queues: args.queues,
            span,
            stored,
            pairs: pairs.len(),
            iops: Sides::of(pairs, |slice| slice.iops),
            iops_ratio: ratios(pairs, |slice| slice.iops),
            cpu_microseconds_per_operation: Sides::of(pairs, Slice::cpu_microseconds),
            cpu_ratio: ratios(pairs, Slice::cpu_microseconds),
            latency_microseconds: Latencies {
                image: Percentiles::median(pairs.iter().map(|pair| pair.subject.latency)),
                raw: Percentiles::median(pairs.iter().map(|pair| pair.control.latency)),
            },
            load_average: load_average(),
        }
    }

    pub(super) fn text(&self) -> String {
        let warm = if self.cache == CacheArg::Writeback.name() {
            "page cache, warm"
        } else {
            "O_DIRECT"
        };
        #[allow(clippy::cast_precision_loss, reason = "whole percents are shown")]
        let percent = self.stored as f64 * 100.0 / self.span as f64;
        let cpu = &self.cpu_microseconds_per_operation;
        let megabytes = |iops: f64| {
            #[allow(clippy::cast_precision_loss, reason = "at most 32 MiB")]
            let block = self.block_size as f64;
            iops * block / 1e6
        };
        let spread = |spread: &Spread| {
            format!(
                "{:.3}  (min {:.3}, max {:.3}; 95 % {:.3} to {:.3})",
                spread.median, spread.min, spread.max, spread.low, spread.high
            )
        };
        let load: Vec<String> = self
            .load_average
            .iter()
            .map(|load| format!("{load:.2}"))
            .collect();
        format!(
            "{}: {} of {}, {} queue(s) of {}, {}, {warm}; {} pairs\n\
             over {}, {percent:.0} % of it stored as data\n\
             {:<12}{:>12}{:>12}   image / raw (median of pairs)\n\
             {:<12}{:>12.0}{:>12.0}   {}\n\
             {:<12}{:>12.1}{:>12.1}\n\
             {:<12}{:>12.2}{:>12.2}   {}\n\
             latency µs (p50 / p99 / p99.9): image {}, raw {}\n\
             load average {}\n",
            self.image,
            self.mode,
            human(self.block_size),
            self.queues,
            self.depth,
            self.driver,
            self.pairs,
            human(self.span),
            "",
            "image",
            "raw",
            "IOPS",
            self.iops.image,
            self.iops.raw,
            spread(&self.iops_ratio),
            "MB/s",
            megabytes(self.iops.image),
            megabytes(self.iops.raw),
            "CPU µs/op",
            cpu.image,
            cpu.raw,
            spread(&self.cpu_ratio),
            self.latency_microseconds.image,
            self.latency_microseconds.raw,
            load.join(" ")
        )
    }
}

/// Of the last 1, 5 and 15 minutes.
pub(super) fn load_average() -> Vec<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .take(3)
        .filter_map(|number| number.parse().ok())
        .collect()
}
