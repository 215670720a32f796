//! Writes that change the mapping, against QEMU's: the same 4 KiB writes to new clusters with a flush every so often, on fresh images in
//! turn, by this engine in-process and by `qemu-img bench`.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use urus::{Buffer, CacheMode, Device, OpenOptions, Queue, Request};

use super::images::{Images, Kind, Missing};
use super::latency::Percentiles;
use super::report::{Pair, Slice, load_average, ratios};
use super::slices::{Side, cpu_time};
use super::spread::{self, Spread};
use super::suite_report::LeftOut;
use super::{Args, check_names, interruption, qemu};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;

/// Each write goes into a cluster of its own.
pub(super) const STRIDE_BYTES: u64 = 64 << 10;
pub(super) const WRITE_BYTES: usize = 4 << 10;
/// Everything in flight is waited for, and flushed, after so many writes.
pub(super) const FLUSH_EVERY: u64 = 256;
/// Writes of one run, at most.
const WRITES_MAX: u64 = 20_000;
/// Times QEMU's rate that are to be reached (P7 and P8).
pub(super) const BAR: f64 = 2.0;

/// One test: on an empty image or an overlay, through the page cache or past it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Test {
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

    pub(super) const fn of(backing: Option<Kind>, cache: CacheMode) -> Self {
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
    let size = suite.size(1 << 30);
    let writes = (size / STRIDE_BYTES).min(WRITES_MAX);
    if writes < FLUSH_EVERY {
        return Err(Failure::usage(format!(
            "--size: {} MiB are the least",
            (FLUSH_EVERY * STRIDE_BYTES) >> 20
        )));
    }
    if suite.svg.is_some() {
        return Err(Failure::usage("--svg: there are no charts of these tests"));
    }
    let images = Images::in_dir(&suite.dir, size)?;
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
            Ok(None) => return Err(interruption()),
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

/// Urus' writes and QEMU's; None when a signal came.
pub(super) fn pairs(
    args: &Args,
    test: Test,
    images: &Images,
    writes: u64,
    stop: &mut Stop,
) -> Result<Option<Vec<Pair>>, Missing> {
    let urus = || {
        Ok(by_urus(
            args,
            test.cache,
            &images.fresh(test.backing)?,
            writes,
            1,
        )?)
    };
    let qemu = || by_qemu(args, test, &images.fresh(test.backing)?, writes);
    in_turn(args.pairs, stop, urus, qemu)
}

/// Pairs of whole runs; None when a signal came.
pub(super) fn in_turn(
    pairs: u16,
    stop: &mut Stop,
    mut subject: impl FnMut() -> Result<Slice, Missing>,
    mut control: impl FnMut() -> Result<Slice, Missing>,
) -> Result<Option<Vec<Pair>>, Missing> {
    let mut done = Vec::new();
    for number in 1..=pairs {
        if stop.has_come() {
            return Ok(None);
        }
        done.push(match Side::first(number) {
            Side::Subject => {
                let subject = subject()?;
                Pair {
                    subject,
                    control: control()?,
                }
            }
            Side::Control => {
                let control = control()?;
                Pair {
                    subject: subject()?,
                    control,
                }
            }
        });
    }
    Ok(Some(done))
}

/// The writes by this engine, on so many queues, each with a part of the disk.
pub(super) fn by_urus(
    args: &Args,
    cache: CacheMode,
    path: &Path,
    writes: u64,
    queues: u64,
) -> Result<Slice, Failure> {
    let mut options = OpenOptions::new();
    let depth = args.depth.saturating_add(1).min(urus::MAX_QUEUE_DEPTH);
    options.io(args.io.into()).cache(cache).queue_depth(depth);
    let device = options.open(path)?;
    let cpu = cpu_time();
    let part = writes / queues;
    let times = thread::scope(|scope| {
        let threads: Vec<_> = (0..queues)
            .map(|queue| {
                let device = &device;
                scope.spawn(move || one_queue(device, args.depth, queue * part..(queue + 1) * part))
            })
            .collect();
        let ended = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        ended.collect::<Result<Vec<_>, _>>()
    })?;
    let cpu = cpu_time().saturating_sub(cpu);
    device.close()?;
    let longest = times.into_iter().max().unwrap_or_default();
    Ok(slice(part * queues, longest, cpu))
}

/// All writes of one queue, and how long they took.
fn one_queue(device: &Device, depth: u32, numbers: Range<u64>) -> Result<Duration, Failure> {
    let mut queue = device.queue()?.activate()?;
    let mut buffers: Vec<Buffer> = (0..depth)
        .map(|_| {
            let mut buffer = Buffer::new(WRITE_BYTES);
            buffer.as_mut_slice().fill(b'w');
            buffer
        })
        .collect();
    let begin = Instant::now();
    let mut sent = numbers.start;
    while sent < numbers.end {
        let end = numbers.end.min(sent + FLUSH_EVERY);
        burst(&mut queue, &mut buffers, sent..end)?;
        sent = end;
        submit(&mut queue, Request::flush(sent));
        reap(&mut queue, &mut buffers)?;
    }
    Ok(begin.elapsed())
}

pub(super) fn slice(operations: u64, time: Duration, cpu: Duration) -> Slice {
    #[allow(clippy::cast_precision_loss, reason = "at most WRITES_MAX")]
    let count = operations as f64;
    Slice {
        operations,
        iops: count / time.as_secs_f64().max(1e-9),
        cpu,
        // Not measured: a run is as long as its slowest flushes.
        latency: Percentiles::default(),
    }
}

/// Writes, as many at once as there are buffers, until all are done.
fn burst(queue: &mut Queue, buffers: &mut Vec<Buffer>, numbers: Range<u64>) -> Result<(), Failure> {
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

fn by_qemu(args: &Args, test: Test, path: &Path, writes: u64) -> Result<Slice, Missing> {
    let cache = match test.cache {
        CacheMode::Writeback => "writeback",
        _ => "none",
    };
    let arguments = format!(
        "-w -f qcow2 -i io_uring -t {cache} -d {} -s {WRITE_BYTES} -S {STRIDE_BYTES} --flush-interval={FLUSH_EVERY}",
        args.depth
    );
    let mut arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
    arguments.push(path.to_string_lossy().into_owned());
    qemu::bench(&arguments, writes)
}

impl Row {
    fn new(test: Test, pairs: &[Pair]) -> Self {
        let ratio = ratios(pairs, |slice| slice.iops);
        Self {
            name: test.name(),
            urus_per_second: Spread::of(pairs.iter().map(|pair| pair.subject.iops)).median,
            qemu_per_second: Spread::of(pairs.iter().map(|pair| pair.control.iops)).median,
            bar: BAR,
            verdict: spread::at_least(BAR, &ratio),
            ratio,
            load_average: load_average(),
        }
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
