//! `urus bench`: the image against a raw file of the same content, through the same driver, in alternating slices of one run; or a suite of
//! such pairs over images that the bench makes.
//!
//! Only ratios are worth anything: absolute figures drift by tens of percent on one machine, and both sides of a pair drift together.

mod bars;
mod chart;
mod client;
mod control;
mod growth;
mod images;
mod latency;
mod memory;
mod places;
mod progress;
mod proposal;
mod qemu;
mod raw_writes;
mod report;
mod slices;
mod spread;
mod suite_report;
mod wide;
mod writes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use urus::{Device, OpenOptions};

use crate::common::{BackingArgs, CacheArg, FormatArg, IoArg};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;
use crate::size::Size;
use client::Target;
use report::{Pair, Report};
use slices::{Side, Slices};

/// Measure an image against a raw file
///
/// Copies the virtual disk into a raw file without a name beside the image (fully allocated, gone at the end, even if urus is killed),
/// reads everything once so that both are warm, and then runs the same requests in turn on one and on the other, in-process and
/// through the same driver. Prints the median of the paired ratios, their range and the 95 % interval of that median, and CPU time
/// per operation. The load average tells whether the machine was quiet.
///
/// --suite measures images that it makes itself, with content, and keeps for the next time.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image
    #[arg(required_unless_present_any = ["suite", "clean"])]
    pub(crate) image: Option<PathBuf>,

    /// Run a suite of measurements instead of measuring an image
    #[arg(long, conflicts_with_all = ["image", "mode", "block_size", "queues", "span", "cache", "io", "overwrite"])]
    suite: Option<Suite>,

    #[command(flatten)]
    suite_args: SuiteArgs,

    /// Format of the image
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2")]
    format: FormatArg,

    /// Bytes per request
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "4k",
        allow_negative_numbers = true
    )]
    block_size: Size,

    /// Requests in flight per queue
    #[arg(long, value_name = "N", default_value_t = 32,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(urus::MAX_QUEUE_DEPTH)))]
    depth: u32,

    /// Queues, each on a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,

    /// Register the requests' memory with the rings, as the suite `bars` does
    #[arg(long)]
    registered: bool,

    /// Time for all slices together; of each test of a suite [default: 15; 3 for the proposal, 6 for the bars]
    #[arg(long, value_name = "N", value_parser = seconds)]
    seconds: Option<f64>,

    /// Pairs of slices; fewer than 15 say little
    #[arg(long, value_name = "N", default_value_t = 15,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    pairs: u16,

    /// What to do
    #[arg(long, default_value = "randread")]
    mode: Mode,

    /// Write over the image's content: needed for the modes that write, which destroy it
    #[arg(long)]
    overwrite: bool,

    /// Only the first SIZE bytes of the virtual disk
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    span: Option<Size>,

    /// What lies between the files and the disk
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    cache: CacheArg,

    /// What does the I/O
    #[arg(long, value_name = "DRIVER", default_value = "auto")]
    io: IoArg,

    /// Memory for cached L2 tables
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    l2_cache_size: Option<Size>,

    #[command(flatten)]
    backing: BackingArgs,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What the suites take.
#[derive(Debug, clap::Args)]
pub(crate) struct SuiteArgs {
    /// Where the suite's images are made and kept; what lies there already is left alone
    #[arg(long, value_name = "DIR", default_value = "urus-bench-images")]
    dir: PathBuf,

    /// Bytes of the suite's virtual disks [default: 1G, and 4G for the bars]
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    size: Option<Size>,

    /// Only these tests of the suite, by name; of the bars also by number (P3)
    #[arg(long, value_name = "TEST", value_delimiter = ',', requires = "suite")]
    only: Vec<String>,

    /// Draw charts into DIR
    #[arg(long, value_name = "DIR", requires = "suite")]
    svg: Option<PathBuf>,

    /// Remove the images that suites made in --dir; with --suite, at its end
    #[arg(long, conflicts_with = "image")]
    clean: bool,
}

impl SuiteArgs {
    fn size(&self, default: u64) -> u64 {
        self.size.map_or(default, |size| size.0)
    }
}

/// Named sets of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Five kinds of image, three ways of reading, one and four queues: io_uring against plain system calls
    Proposal,
    /// Writes to new clusters and copy-on-write, through the page cache and past it: urus against qemu-img bench
    Writes,
    /// The bars P1 to P16 that urus is built to: against raw files and against QEMU's programs, where they are installed
    Bars,
    /// Cost against queues, layers, size of the disk, fragmentation, cache budget and cluster size: a curve each
    Growth,
    /// Resident memory under load, of large images and over time: within the budgets, or the command fails
    Memory,
}

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Reads at random places
    Randread,
    /// Writes at random places
    Randwrite,
    /// Reads one after the other
    Read,
    /// Writes one after the other
    Write,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    fn writes(self) -> bool {
        matches!(self, Self::Randwrite | Self::Write)
    }

    fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite)
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.01..=86400.0).contains(seconds))
        .ok_or_else(|| format!("'{text}' is no number of seconds from 0.01 to 86400"))
}

pub(crate) fn run(args: Args) -> Outcome {
    let mut stop = Stop::watch()
        .map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;
    let suite = args.suite.map(|suite| match suite {
        Suite::Proposal => proposal::run(&args, &mut stop),
        Suite::Writes => writes::run(&args, &mut stop),
        Suite::Bars => bars::run(&args, &mut stop),
        Suite::Growth => growth::run(&args, &mut stop),
        Suite::Memory => memory::run(&args, &mut stop),
    });
    let outcome = match (suite, &args.image) {
        (Some(outcome), _) => outcome,
        (None, Some(image)) => one_image(&args, image, &mut stop),
        (None, None) => Ok(ExitCode::SUCCESS),
    }?;
    if args.suite_args.clean {
        images::clean(&args.suite_args.dir)?;
    }
    Ok(outcome)
}

/// Refuses names of tests that a suite does not have.
fn check_names(only: &[String], names: &[String]) -> Result<(), Failure> {
    match only.iter().find(|name| !names.contains(name)) {
        None => Ok(()),
        Some(unknown) => Err(Failure::usage(format!(
            "--only {unknown}: no such test; there are {}",
            names.join(", ")
        ))),
    }
}

/// The image against a raw copy of it.
fn one_image(args: &Args, path: &Path, stop: &mut Stop) -> Outcome {
    if args.mode.writes() && !args.overwrite {
        return Err(Failure::usage(format!(
            "--mode {} writes over the image's content; say --overwrite if it may be destroyed",
            args.mode.name()
        )));
    }
    let image = open_image(args, path)?;
    let span = span(args, &image)?;
    if !args.json {
        print(&format!(
            "{}: copying {} into a raw file beside it, and reading both…\n",
            path.display(),
            crate::size::human(span)
        ));
    }
    let Some((raw, data_bytes)) = control::raw_copy(args, path, &image, span, stop)? else {
        return interrupted(&image);
    };
    let plan = slices::Plan {
        block_bytes: args.block_size.0,
        span,
        depth: args.depth,
        queues: args.queues,
        mode: args.mode,
        slice: slice_time(args, 15.0),
        cold: false,
        writer: false,
        registered: args.registered,
    };
    let targets = [Target::Device(&image), Target::Device(&raw)];
    let Some(pairs) = measure(plan, args.pairs, targets, stop, || ())? else {
        return interrupted(&image);
    };
    let report = Report::new(args, &image, span, data_bytes, &pairs);
    if args.json {
        print_json(&report);
    } else {
        print(&report.text());
    }
    image.close()?;
    raw.close()?;
    Ok(ExitCode::SUCCESS)
}

/// As a shell reports SIGINT.
const INTERRUPTED: u8 = 130;

fn interrupted(image: &Device) -> Outcome {
    image.close()?;
    Err(interruption())
}

/// What a signal makes of a run.
fn interruption() -> Failure {
    Failure::new("interrupted").with_code(INTERRUPTED)
}

/// What both sides have in common.
fn options(args: &Args) -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .cache(args.cache.into())
        .io(args.io.into())
        .queue_depth(args.depth);
    options
}

fn open_image(args: &Args, path: &Path) -> Result<Device, Failure> {
    let mut options = options(args);
    options
        .format(args.format.into())
        .read_only(!args.mode.writes());
    if let Some(Size(bytes)) = args.l2_cache_size {
        options.l2_cache_bytes(bytes);
    }
    args.backing.apply(&mut options);
    Ok(options.open(path)?)
}

/// How much of the disk takes part: whole blocks, one at least for each queue.
fn span(args: &Args, image: &Device) -> Result<u64, Failure> {
    let block = args.block_size.0;
    let wanted = args.span.map_or(u64::MAX, |span| span.0).min(image.size());
    let blocks = wanted.checked_div(block).unwrap_or(0);
    if blocks < u64::from(args.queues) || block > slices::MAX_BLOCK_BYTES {
        return Err(Failure::usage(format!(
            "{wanted} bytes cannot be measured in blocks of {block} on {} queues: blocks have 1 to {} bytes, and each \
             queue needs one",
            args.queues,
            slices::MAX_BLOCK_BYTES
        )));
    }
    Ok(blocks * block)
}

/// The time of each slice.
fn slice_time(args: &Args, default: f64) -> Duration {
    let seconds = args.seconds.unwrap_or(default);
    Duration::from_secs_f64(seconds / f64::from(args.pairs) / 2.0)
}

/// Runs all pairs, with a call of `step` after each; None when a signal came.
fn measure(
    plan: slices::Plan,
    count: u16,
    targets: [Target<'_>; 2],
    stop: &mut Stop,
    step: impl Fn(),
) -> Result<Option<Vec<Pair>>, Failure> {
    Slices::with(plan, &targets, |slices| {
        // One that does not count: rings, threads, processor clocks.
        slices.pair(0, Side::Control)?;
        let mut pairs = Vec::new();
        for number in 1..=count {
            if stop.has_come() {
                return Ok(None);
            }
            pairs.push(slices.pair(number.into(), Side::first(number))?);
            step();
        }
        Ok(Some(pairs))
    })
}
