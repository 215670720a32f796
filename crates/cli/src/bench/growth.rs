//! How cost grows: operations and processor time against the number of queues, the depth of a chain, the size of the disk, the order of the
//! clusters in the file, the budget of the mapping cache and the size of clusters. All through the page cache, which holds everything.
//!
//! The points of a curve take turns in short slices, and each is told relative to the first point in the same round: what drifts on the
//! machine drifts for all of them.

mod chart;
mod curves;
mod images;
mod slice;

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::ProgressBar;
use serde::Serialize;

use super::progress::progress;
use super::report::load_average;
use super::spread::Spread;
use super::{Args, INTERRUPTED, check_names, slice_time};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;
use crate::size::human;
use curves::{Curve, Point};
use images::GrowthImages;
use slice::Slice;

/// A curve, measured.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    name: &'static str,
    /// What is done, and against what it is drawn.
    title: &'static str,
    axis: &'static str,
    points: Vec<Row>,
    load_average: Vec<f64>,
}

/// A point of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    at: String,
    /// Medians of the slices; those of other runs are not comparable.
    operations_per_second: f64,
    cpu_microseconds_per_operation: f64,
    /// Relative to the first point.
    ratio: Spread,
    cpu_ratio: Spread,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    suite: &'static str,
    version: &'static str,
    kernel: String,
    processors: usize,
    size: u64,
    depth: u32,
    rounds: u16,
    curves: Vec<Measured>,
}

pub(super) fn run(args: &Args, stop: &mut Stop) -> Outcome {
    let suite = &args.suite_args;
    check_names(
        &suite.only,
        &Curve::ALL.map(|curve| curve.name().to_owned()),
    )?;
    let size = suite.size(1 << 30);
    if !(1 << 24..=1 << 40).contains(&size) || !size.is_power_of_two() {
        return Err(Failure::usage(
            "--size: a power of two from 16 MiB to 1 TiB",
        ));
    }
    let images = GrowthImages::in_dir(&suite.dir, size)?;
    let chosen: Vec<Curve> = Curve::ALL
        .into_iter()
        .filter(|curve| suite.only.is_empty() || suite.only.iter().any(|name| name == curve.name()))
        .collect();
    let curves = u64::try_from(chosen.len()).expect("a few");
    let bar = progress(curves * u64::from(args.pairs));
    let mut report = Report {
        suite: "growth",
        version: env!("CARGO_PKG_VERSION"),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        size,
        depth: args.depth,
        rounds: args.pairs,
        curves: Vec::new(),
    };
    for curve in chosen {
        bar.set_message(curve.name());
        let points = curve.points(&images, args.depth)?;
        let Some(rounds) = measure(args, &points, stop, &bar)? else {
            bar.finish_and_clear();
            return Err(Failure::new("interrupted").with_code(INTERRUPTED));
        };
        report.curves.push(Measured::new(curve, &points, &rounds));
    }
    bar.finish_and_clear();
    if let Some(dir) = &suite.svg {
        for curve in &report.curves {
            chart::draw(dir, curve)?;
        }
    }
    if args.json {
        print_json(&report);
    } else {
        print(&report.text());
    }
    Ok(ExitCode::SUCCESS)
}

/// A slice of each point in each round; None when a signal came.
fn measure(
    args: &Args,
    points: &[Point<'_>],
    stop: &mut Stop,
    bar: &ProgressBar,
) -> Result<Option<Vec<Vec<Slice>>>, Failure> {
    let time = slice_time(args, 3.0);
    // One that does not count: caches, clocks.
    for point in points {
        point.warm()?;
        point.slice(0, time.min(Duration::from_millis(20)))?;
    }
    let mut rounds = Vec::new();
    for round in 0..args.pairs {
        let mut slices = vec![Slice::default(); points.len()];
        for turn in 0..points.len() {
            if stop.has_come() {
                return Ok(None);
            }
            // Who is first takes turns.
            let index = (turn + usize::from(round)) % points.len();
            slices[index] = points[index].slice(u64::from(round) + 1, time)?;
        }
        rounds.push(slices);
        bar.inc(1);
    }
    Ok(Some(rounds))
}

impl Measured {
    fn new(curve: Curve, points: &[Point<'_>], rounds: &[Vec<Slice>]) -> Self {
        let row = |(index, point): (usize, &Point<'_>)| {
            let median = |value: fn(&Slice) -> f64| {
                Spread::of(rounds.iter().map(|slices| value(&slices[index]))).median
            };
            let ratio = |value: fn(&Slice) -> f64| {
                Spread::of(
                    rounds
                        .iter()
                        .map(|slices| value(&slices[index]) / value(&slices[0])),
                )
            };
            Row {
                at: point.name.clone(),
                operations_per_second: median(Slice::rate),
                cpu_microseconds_per_operation: median(Slice::cpu_microseconds),
                ratio: ratio(Slice::rate),
                cpu_ratio: ratio(Slice::cpu_microseconds),
            }
        };
        Self {
            name: curve.name(),
            title: curve.title(),
            axis: curve.axis(),
            points: points.iter().enumerate().map(row).collect(),
            load_average: load_average(),
        }
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!(
            "urus {}, Linux {}, {} processors; disks of {}, {} requests in flight per queue, {} rounds\n\
             operations per second and CPU time per operation (medians), and both relative to the first point of the curve\n",
            self.version,
            self.kernel,
            self.processors,
            human(self.size),
            self.depth,
            self.rounds,
        );
        for curve in &self.curves {
            let load = curve.load_average.first().copied().unwrap_or_default();
            // Writing into a string does not fail.
            let _ = writeln!(
                text,
                "\n{}: {} (load {load:.2})\n{:<20}{:>12}{:>11}  {:<36}CPU, ratio",
                curve.name, curve.title, curve.axis, "ops/s", "CPU µs/op", "ratio (min, max; 95 %)"
            );
            for row in &curve.points {
                let ratio = &row.ratio;
                let spread = format!(
                    "{:.3} ({:.2}, {:.2}; {:.3} to {:.3})",
                    ratio.median, ratio.min, ratio.max, ratio.low, ratio.high
                );
                let _ = writeln!(
                    text,
                    "{:<20}{:>12.0}{:>11.2}  {spread:<36}{:.2}",
                    row.at,
                    row.operations_per_second,
                    row.cpu_microseconds_per_operation,
                    row.cpu_ratio.median
                );
            }
        }
        text
    }
}
