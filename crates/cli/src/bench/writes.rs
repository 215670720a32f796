//! Writes that change the mapping, against QEMU's: the same 4 KiB writes to new clusters with a flush every so often, on fresh images in
//! turn, by this engine in-process and by `qemu-img bench`.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use serde::Serialize;
use urus::{Buffer, CacheMode, OpenOptions, Queue, Request};

use super::images::{Images, Kind, Missing};
use super::report::{Spread, load_average};
use super::suite_report::LeftOut;
use super::{Args, INTERRUPTED, check_names};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;

/// Each write goes into a cluster of its own.
const STRIDE_BYTES: u64 = 64 << 10;
const WRITE_BYTES: usize = 4 << 10;
/// Everything in flight is waited for, and flushed, after so many writes.
const FLUSH_EVERY: u64 = 256;
/// Writes of one run, at most.
const WRITES_MAX: u64 = 20_000;
/// Times QEMU's rate that are to be reached (P7 and P8).
const BAR: f64 = 2.0;

/// One test: on an empty image or an overlay, through the page cache or past it.
#[derive(Clone, Copy, Debug)]
struct Test {
    backing: Option<Kind>,
    cache: CacheMode,
}

impl Test {
    const ALL: [Self; 4] = [
        Self::of(None, CacheMode::Writeback),
        Self::of(None, CacheMode::None),
        Self::of(Some(Kind::Qcow2), CacheMode::Writeback),
        Self::of(Some(Kind::Qcow2), CacheMode::None),
    ];

    const fn of(backing: Option<Kind>, cache: CacheMode) -> Self {
        Self { backing, cache }
    }

    fn name(self) -> &'static str {
        match (self.backing, self.cache) {
            (None, CacheMode::Writeback) => "allocate",
            (None, _) => "allocate_direct",
            (Some(_), CacheMode::Writeback) => "copy_on_write",
            (Some(_), _) => "copy_on_write_direct",
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    name: &'static str,
    /// Medians of the runs. Not comparable with other runs of the suite.
    urus_per_second: f64,
    qemu_per_second: f64,
    ratio: Spread,
    bar: f64,
    verdict: &'static str,
    load_average: Vec<f64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    suite: &'static str,
    version: &'static str,
    writes: u64,
    depth: u32,
    pairs: u16,
    rows: Vec<Row>,
    left_out: Vec<LeftOut>,
}

pub(super) fn run(args: &Args, stop: &mut Stop) -> Outcome {
    let suite = &args.suite_args;
    let tests = chosen(&suite.only)?;
    let writes = (suite.size.0 / STRIDE_BYTES).min(WRITES_MAX);
    if writes < FLUSH_EVERY {
        return Err(Failure::usage(format!(
            "--size: {} MiB are the least",
            (FLUSH_EVERY * STRIDE_BYTES) >> 20
        )));
    }
    if suite.svg.is_some() {
        return Err(Failure::usage("--svg: there are no charts of these tests"));
    }
    let images = Images::in_dir(&suite.dir, suite.size.0)?;
    let mut report = Report {
        suite: "writes",
        version: env!("CARGO_PKG_VERSION"),
        writes,
        depth: args.depth,
        pairs: args.pairs,
        rows: Vec::new(),
        left_out: Vec::new(),
    };
    for test in tests {
        match pairs(args, test, &images, writes, stop) {
            Ok(Some(pairs)) => report.rows.push(Row::new(test, &pairs)),
            Ok(None) => return Err(Failure::new("interrupted").with_code(INTERRUPTED)),
            Err(Missing::Failed(failure)) => return Err(failure),
            Err(Missing::Program(why)) => report.left_out.push(LeftOut {
                name: test.name().to_owned(),
                why,
            }),
        }
    }
    if args.json {
        print_json(&report);
    } else {
        print(&report.text());
    }
    Ok(ExitCode::SUCCESS)
}

fn chosen(only: &[String]) -> Result<Vec<Test>, Failure> {
    check_names(only, &Test::ALL.map(|test| test.name().to_owned()))?;
    let wanted = |test: &Test| only.is_empty() || only.iter().any(|name| name == test.name());
    Ok(Test::ALL.into_iter().filter(wanted).collect())
}

/// Writes per second, urus' and QEMU's; None when a signal came.
fn pairs(
    args: &Args,
    test: Test,
    images: &Images,
    writes: u64,
    stop: &mut Stop,
) -> Result<Option<Vec<(f64, f64)>>, Missing> {
    let mut pairs = Vec::new();
    for number in 0..args.pairs {
        if stop.has_come() {
            return Ok(None);
        }
        let urus = |images: &Images| {
            let path = images.fresh(test.backing)?;
            Ok::<_, Missing>(by_urus(args, test, &path, writes)?)
        };
        let qemu = |images: &Images| by_qemu(args, test, &images.fresh(test.backing)?, writes);
        // Who is first takes turns, so that what drifts does not favour one.
        pairs.push(if number % 2 == 0 {
            let first = urus(images)?;
            (first, qemu(images)?)
        } else {
            let first = qemu(images)?;
            (urus(images)?, first)
        });
    }
    Ok(Some(pairs))
}

fn by_urus(args: &Args, test: Test, path: &Path, writes: u64) -> Result<f64, Failure> {
    let mut options = OpenOptions::new();
    let depth = args.depth.saturating_add(1).min(urus::MAX_QUEUE_DEPTH);
    options
        .io(args.io.into())
        .cache(test.cache)
        .queue_depth(depth);
    let device = options.open(path)?;
    let mut queue = device.queue()?.activate()?;
    let mut buffers: Vec<Buffer> = (0..args.depth)
        .map(|_| {
            let mut buffer = Buffer::new(WRITE_BYTES);
            buffer.as_mut_slice().fill(b'w');
            buffer
        })
        .collect();
    let begin = Instant::now();
    let mut sent = 0;
    while sent < writes {
        let end = writes.min(sent + FLUSH_EVERY);
        burst(&mut queue, &mut buffers, sent..end)?;
        sent = end;
        submit(&mut queue, Request::flush(sent));
        reap(&mut queue, &mut buffers)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    drop(queue);
    device.close()?;
    Ok(rate(writes, seconds))
}

/// Writes, as many at once as there are buffers, until all are done.
fn burst(
    queue: &mut Queue,
    buffers: &mut Vec<Buffer>,
    numbers: std::ops::Range<u64>,
) -> Result<(), Failure> {
    for number in numbers {
        let buffer = loop {
            match buffers.pop() {
                Some(buffer) => break buffer,
                None => {
                    queue.wait(None);
                    take(queue, buffers)?;
                }
            }
        };
        submit(queue, Request::write(number, number * STRIDE_BYTES, buffer));
    }
    reap(queue, buffers)
}

fn submit(queue: &mut Queue, request: Request) {
    queue
        .submit(request)
        .expect("the queue is deeper than there are buffers");
}

/// Waits for all that is in flight.
fn reap(queue: &mut Queue, buffers: &mut Vec<Buffer>) -> Result<(), Failure> {
    while queue.in_flight() > 0 {
        queue.wait(None);
        take(queue, buffers)?;
    }
    Ok(())
}

fn take(queue: &mut Queue, buffers: &mut Vec<Buffer>) -> Result<(), Failure> {
    while let Some(completion) = queue.completion() {
        completion.result?;
        buffers.extend(completion.buffer);
    }
    Ok(())
}

fn by_qemu(args: &Args, test: Test, path: &Path, writes: u64) -> Result<f64, Missing> {
    let cache = match test.cache {
        CacheMode::Writeback => "writeback",
        _ => "none",
    };
    let output = Command::new("qemu-img")
        .args(["bench", "-w", "-f", "qcow2", "-i", "io_uring", "-t", cache])
        .args(["-c", &writes.to_string(), "-d", &args.depth.to_string()])
        .args([
            "-s",
            &WRITE_BYTES.to_string(),
            "-S",
            &STRIDE_BYTES.to_string(),
        ])
        .arg(format!("--flush-interval={FLUSH_EVERY}"))
        .arg(path)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Missing::Program(format!("qemu-img cannot be run: {error}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let seconds = seconds(&text).filter(|_| output.status.success());
    let seconds = seconds.ok_or_else(|| {
        let errors = String::from_utf8_lossy(&output.stderr);
        Failure::new(format!("qemu-img bench: {text}{}", errors.trim()))
    })?;
    Ok(rate(writes, seconds))
}

/// From "Run completed in 0.512 seconds."
fn seconds(text: &str) -> Option<f64> {
    let (_, rest) = text.split_once("Run completed in ")?;
    rest.split_whitespace()
        .next()?
        .parse()
        .ok()
        .filter(|seconds| *seconds > 0.0)
}

#[allow(clippy::cast_precision_loss, reason = "at most WRITES_MAX")]
fn rate(writes: u64, seconds: f64) -> f64 {
    writes as f64 / seconds.max(1e-9)
}

impl Row {
    fn new(test: Test, pairs: &[(f64, f64)]) -> Self {
        let ratio = Spread::of(pairs.iter().map(|(urus, qemu)| urus / qemu));
        Self {
            name: test.name(),
            urus_per_second: Spread::of(pairs.iter().map(|(urus, _)| *urus)).median,
            qemu_per_second: Spread::of(pairs.iter().map(|(_, qemu)| *qemu)).median,
            bar: BAR,
            verdict: verdict(&ratio),
            ratio,
            load_average: load_average(),
        }
    }
}

/// Missed only where the whole interval of the median lies below the bar.
fn verdict(ratio: &Spread) -> &'static str {
    if ratio.median >= BAR {
        "met"
    } else if ratio.high < BAR {
        "missed"
    } else {
        "not shown"
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!(
            "urus {}: {} writes of 4 KiB, one to a cluster of 64 KiB, {} in flight, a flush every {FLUSH_EVERY}; {} pairs\n\
             urus / qemu-img bench: medians of paired ratios, and medians of both\n\
             {:<24}{:>10}{:>10}  {:<40}{:>6}  {:<10}{:>6}\n",
            self.version,
            self.writes,
            self.depth,
            self.pairs,
            "test",
            "urus/s",
            "QEMU/s",
            "ratio (min, max; 95 %)",
            "bar",
            "",
            "load"
        );
        for row in &self.rows {
            let ratio = &row.ratio;
            let spread = format!(
                "{:.2} ({:.2}, {:.2}; {:.2} to {:.2})",
                ratio.median, ratio.min, ratio.max, ratio.low, ratio.high
            );
            let load = row.load_average.first().copied().unwrap_or_default();
            // Writing into a string does not fail.
            let _ = writeln!(
                text,
                "{:<24}{:>10.0}{:>10.0}  {spread:<40}{:>6.1}  {:<10}{load:>6.2}",
                row.name, row.urus_per_second, row.qemu_per_second, row.bar, row.verdict
            );
        }
        for left_out in &self.left_out {
            let _ = writeln!(text, "{:<24}left out: {}", left_out.name, left_out.why);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    //! Guards what decides whether a bar is met.
    use super::*;

    #[test]
    fn times_are_read_from_what_qemu_says() {
        let text = "Sending 9 write requests\nRun completed in 0.512 seconds.\n";
        assert_eq!(seconds(text), Some(0.512));
        assert_eq!(seconds("Run completed in a while"), None);
        assert_eq!(seconds("Run completed in 0.000 seconds."), None);
    }

    #[test]
    fn a_bar_is_missed_only_by_the_whole_interval() {
        let of = |values: &[f64]| verdict(&Spread::of(values.iter().copied()));
        assert_eq!(of(&[2.0; 15]), "met");
        assert_eq!(of(&[1.9; 15]), "missed");
        assert_eq!(of(&[1.0, 1.5, 1.9, 2.5]), "not shown");
    }
}
