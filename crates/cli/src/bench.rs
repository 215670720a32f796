//! `urus bench`: the image against a raw file of the same content, through the same driver, in alternating slices of one run.
//!
//! Only ratios are worth anything: absolute figures drift by tens of percent on one machine, and both sides of a pair drift together.

mod control;
mod report;
mod slices;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use urus::{Device, OpenOptions};

use crate::common::{BackingArgs, CacheArg, FormatArg, IoArg};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;
use crate::size::Size;
use report::{Pair, Report};
use slices::{Side, Slices};

/// Measure an image against a raw file
///
/// Copies the virtual disk into a raw file without a name beside the image (fully allocated, gone at the end, even if urus is killed),
/// reads everything once so that both are warm, and then runs the same requests in turn on one and on the other, in-process and
/// through the same driver. Prints the median of the paired ratios, their range and the 95 % interval of that median, and CPU time
/// per operation. The load average tells whether the machine was quiet.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image
    pub(crate) image: PathBuf,

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

    /// Time for all slices together
    #[arg(long, value_name = "N", default_value_t = 15.0, value_parser = seconds)]
    seconds: f64,

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
    if args.mode.writes() && !args.overwrite {
        return Err(Failure::usage(format!(
            "--mode {} writes over the image's content; say --overwrite if it may be destroyed",
            args.mode.name()
        )));
    }
    let mut stop = Stop::watch()
        .map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;
    let image = open_image(&args)?;
    let span = span(&args, &image)?;
    if !args.json {
        print(&format!(
            "{}: copying {} into a raw file beside it, and reading both…\n",
            args.image.display(),
            crate::size::human(span)
        ));
    }
    let Some((raw, data_bytes)) = control::raw_copy(&args, &image, span, &mut stop)? else {
        return interrupted(&image);
    };
    let Some(pairs) = measure(&args, &image, &raw, span, &mut stop)? else {
        return interrupted(&image);
    };
    let report = Report::new(&args, &image, span, data_bytes, &pairs);
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
    Err(Failure::new("interrupted").with_code(INTERRUPTED))
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

fn open_image(args: &Args) -> Result<Device, Failure> {
    let mut options = options(args);
    options
        .format(args.format.into())
        .read_only(!args.mode.writes());
    if let Some(Size(bytes)) = args.l2_cache_size {
        options.l2_cache_bytes(bytes);
    }
    args.backing.apply(&mut options);
    Ok(options.open(&args.image)?)
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

/// Runs all pairs; None when a signal came.
fn measure(
    args: &Args,
    image: &Device,
    raw: &Device,
    span: u64,
    stop: &mut Stop,
) -> Result<Option<Vec<Pair>>, Failure> {
    let slice = Duration::from_secs_f64(args.seconds / f64::from(args.pairs) / 2.0);
    let plan = slices::Plan {
        block_bytes: args.block_size.0,
        span,
        depth: args.depth,
        queues: args.queues,
        mode: args.mode,
        slice,
    };
    Slices::with(plan, image, raw, |slices| {
        // One that does not count: rings, threads, processor clocks.
        slices.pair(0, Side::Raw)?;
        let mut pairs = Vec::new();
        for number in 1..=args.pairs {
            if stop.has_come() {
                return Ok(None);
            }
            // Who is first takes turns, so that what drifts does not favour one.
            let first = if number % 2 == 0 {
                Side::Raw
            } else {
                Side::Image
            };
            pairs.push(slices.pair(number.into(), first)?);
        }
        Ok(Some(pairs))
    })
}
