//! The bars P1 to P16: what urus is built to reach, as ratios to what the same machine does without it, in one run.
//!
//! * this file: the list, and what every test shares.
//! * [`report`]: what is printed.
//! * [`reads`], [`overwrites`], [`allocation`], [`compressed`], [`nbd`], [`opening`], [`lookups`], [`barriers`]: the tests.
//! * [`best_raw`]: finds the method that a raw file is best read or written by.
//!
//! Nothing is missing silently: a bar that cannot be measured here is printed with the reason.

mod allocation;
mod barriers;
mod best_raw;
mod compressed;
mod list;
mod lookups;
mod misses;
mod nbd;
mod opening;
mod overwrites;
mod qemu_reads;
mod reads;
mod report;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::ProgressBar;
use urus::{CacheMode, Device, Format, OpenOptions};

use super::client::Target;
use super::images::{Images, Missing};
use super::progress::progress;
use super::report::Pair;
use super::slices::Plan;
use super::{Args, INTERRUPTED, Mode, chart, control, interruption, measure, slice_time};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;
use list::{BARS, Bar};
use report::{Measured, Report, Row};

/// Bytes of the disks unless something else is said.
const SIZE: u64 = 4 << 30;
/// What is written over is smaller, so that the kernel does not throttle who dirties its pages.
const WRITTEN_SIZE: u64 = 1 << 30;
/// Time for all slices of a test unless something else is said.
const SECONDS: f64 = 6.0;

/// What a test has at hand.
struct Bench<'a> {
    args: &'a Args,
    stop: &'a mut Stop,
    images: Images,
    size: u64,
    /// Smaller images, for writes.
    written: Images,
    written_size: u64,
    /// What lies in the page cache, as far as it was brought there.
    pages: HashMap<PathBuf, Pages>,
    /// Measured once, for two bars each.
    nbd_reads: Option<Vec<Pair>>,
    nbd_copies: Option<Vec<Pair>>,
}

pub(super) fn run(args: &Args, stop: &mut Stop) -> Outcome {
    let suite = &args.suite_args;
    let bars = chosen(&suite.only)?;
    let size = suite.size(SIZE);
    if size < super::writes::STRIDE_BYTES * super::writes::FLUSH_EVERY {
        return Err(Failure::usage("--size: 16 MiB are the least"));
    }
    let written_size = size.min(WRITTEN_SIZE);
    let mut bench = Bench {
        args,
        stop,
        images: Images::in_dir(&suite.dir, size)?,
        size,
        written: Images::in_dir(&suite.dir, written_size)?,
        written_size,
        pages: HashMap::new(),
        nbd_reads: None,
        nbd_copies: None,
    };
    let bar = progress(u64::try_from(bars.len()).unwrap_or(u64::MAX));
    let mut report = Report::new(args, size);
    let ended = every(&mut bench, &bars, &bar, &mut report);
    bar.finish_and_clear();
    ended?;
    if let Some(dir) = &suite.svg {
        chart::draw(
            dir,
            "How many times what is asked for was reached (cut off at 4)",
            &report.bars(),
        )?;
    }
    if args.json {
        print_json(&report);
    } else {
        print(&report.text());
    }
    Ok(if report.rows.iter().any(Row::has_failed) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn every(
    bench: &mut Bench<'_>,
    bars: &[&'static Bar],
    progress: &ProgressBar,
    report: &mut Report,
) -> Result<(), Failure> {
    for bar in bars {
        progress.set_message(format!("{} {}", bar.id, bar.name));
        let row = match (bar.measure)(bench) {
            Ok(measured) => Row::measured(bar, measured),
            Err(Missing::Program(why)) => Row::left_out(bar, why),
            Err(Missing::Failed(failure)) if failure.has_code(INTERRUPTED) => return Err(failure),
            // The others are worth having.
            Err(Missing::Failed(failure)) => Row::failed(bar, failure.text()),
        };
        report.rows.push(row);
        progress.inc(1);
    }
    Ok(())
}

/// Those that were asked for, by number or name.
fn chosen(only: &[String]) -> Result<Vec<&'static Bar>, Failure> {
    let is_wanted = |bar: &Bar, wanted: &String| *wanted == bar.id || *wanted == bar.name;
    for wanted in only {
        if !BARS.iter().any(|bar| is_wanted(bar, wanted)) {
            let names: Vec<_> = BARS.iter().map(|bar| bar.name).collect();
            return Err(Failure::usage(format!(
                "--only {wanted}: no such bar; there are P1 to P16, and by name {}",
                names.join(", ")
            )));
        }
    }
    Ok(BARS
        .iter()
        .filter(|bar| only.is_empty() || only.iter().any(|wanted| is_wanted(bar, wanted)))
        .collect())
}

impl Bench<'_> {
    /// Slices of these requests over the first `span` bytes, on one queue.
    fn plan(&self, mode: Mode, block_bytes: u64, span: u64, depth: u32) -> Plan {
        Plan {
            block_bytes,
            span: span / block_bytes * block_bytes,
            depth,
            queues: 1,
            mode,
            slice: slice_time(self.args, SECONDS),
            cold: false,
            writer: false,
            // As the best raw method has it.
            registered: true,
        }
    }

    /// All pairs of a plan.
    fn pairs(&mut self, plan: Plan, targets: [Target<'_>; 2]) -> Result<Vec<Pair>, Missing> {
        let pairs = measure(plan, self.args.pairs, targets, self.stop, || ())?;
        Ok(pairs.ok_or_else(interruption)?)
    }

    fn check_stop(&mut self) -> Result<(), Failure> {
        if self.stop.has_come() {
            return Err(interruption());
        }
        Ok(())
    }

    /// Opens an image as every test does.
    fn open(
        &self,
        path: &Path,
        format: Format,
        cache: CacheMode,
        writes: bool,
    ) -> Result<Device, Failure> {
        let mut options = OpenOptions::new();
        options
            .format(format)
            .cache(cache)
            .io(self.args.io.into())
            .queue_depth(self.args.depth.max(32))
            .read_only(!writes);
        if let Some(size) = self.args.l2_cache_size {
            options.l2_cache_bytes(size.0);
        }
        Ok(options.open(path)?)
    }

    /// Brings the page cache into the state that a test wants, for all layers of the devices, and has them load their mappings. What a
    /// file's pages are like depends on how they got there, so all get there by the same reads.
    fn settle(&mut self, devices: &[&Device], pages: Pages, span: u64) -> Result<(), Failure> {
        let files = devices.iter().flat_map(|device| device.layers());
        let files: Vec<PathBuf> = files.map(|layer| layer.path.clone()).collect();
        let is_settled = files
            .iter()
            .all(|path| self.pages.get(path) == Some(&pages));
        if !is_settled || pages == Pages::None {
            for path in &files {
                if let Ok(file) = File::open(path) {
                    // What is dirty cannot be dropped. A disk that cannot be synced shows in the figures.
                    let _ = file.sync_all();
                    control::evict(&file);
                }
                self.pages.insert(path.clone(), pages);
            }
            match pages {
                Pages::None => {}
                Pages::Small => {
                    for path in &files {
                        control::read_in_small_pages(path)?;
                    }
                }
                Pages::Large => {
                    for device in devices {
                        control::warm(device, span)?;
                    }
                }
            }
        }
        for device in devices {
            control::map(device, span)?;
        }
        Ok(())
    }
}

/// What lies in the page cache of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    None,
    /// Everything, in pieces of 4 KiB, as random requests leave it.
    Small,
    /// Everything, in the pieces that long reads make. In these, ext4 looks at every block of a piece to write one.
    Large,
}

impl Pages {
    /// For reads.
    fn of(cache: CacheMode) -> Self {
        match cache {
            CacheMode::Writeback => Self::Large,
            _ => Self::None,
        }
    }
}

/// What a test compares by, in words.
fn cache_name(cache: CacheMode) -> &'static str {
    match cache {
        CacheMode::Writeback => "page cache",
        _ => "O_DIRECT",
    }
}

/// Pairs of devices or raw files: the ratio of their rates.
fn ratio_of(subject: impl Into<String>, control: impl Into<String>, pairs: &[Pair]) -> Measured {
    Measured::of_pairs(subject.into(), control.into(), pairs)
}
