//! Resident memory under load: within the budgets for large images, and no more of it the longer a device is open.
//!
//! Each test is a process of its own, whose memory before it opened anything is what it is measured from: what another test, or the making
//! of an image, has left in the allocator would else hide what a device takes.

mod mixture;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use urus::OpenOptions;

use super::images::{Images, Missing, run_qemu_img};
use super::report::load_average;
use super::{Args, INTERRUPTED, check_names, wide};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;
use crate::size::human;
use mixture::Mixture;

/// What a queue may take besides the budget of the mapping cache.
const QUEUE_BYTES: u64 = 32 << 20;
const QUEUES: u16 = 2;
/// How much may be taken more at the end than after the warm-up. Memory that nobody holds any more comes back to the system late, so
/// the figure moves by some MiB.
const GROWTH_BYTES: u64 = 8 << 20;
const DEFAULT_SECONDS: f64 = 30.0;
/// Between two looks at the memory.
const SAMPLE: Duration = Duration::from_millis(100);
/// The mapping cache's budget where none is given.
const CACHE_BYTES: u64 = 64 << 20;

/// One test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    /// An image of 1024 times --size with all the metadata that it can have.
    Mapped,
    /// An image of 16384 times --size with every L2 table and every slice of its map.
    Huge,
    /// An image of 1024 times --size, for as long as told.
    Uptime,
}

impl Test {
    const ALL: [Self; 3] = [Self::Mapped, Self::Huge, Self::Uptime];

    fn name(self) -> &'static str {
        match self {
            Self::Mapped => "mapped",
            Self::Huge => "huge",
            Self::Uptime => "uptime",
        }
    }

    fn size(self, unit: u64) -> u64 {
        match self {
            Self::Mapped | Self::Uptime => unit << 10,
            Self::Huge => unit << 14,
        }
    }

    fn file_name(self, unit: u64) -> String {
        format!("{}-{}.qcow2", self.name(), self.size(unit))
    }

    /// The image, which is made unless it is there. (QEMU's programs alone make some of it.)
    fn image(self, images: &Images, unit: u64) -> Result<PathBuf, Missing> {
        let (name, size) = (self.file_name(unit), self.size(unit));
        if self != Self::Mapped {
            return wide::alone(images, &name, size);
        }
        images.made(&name, wide::metadata_bytes(size), |path| {
            let mut command = Command::new("qemu-img");
            command
                .args(["create", "-q", "-f", "qcow2"])
                .args(["-o", "preallocation=metadata"])
                .arg(path)
                .arg(size.to_string());
            run_qemu_img(&mut command, path)
        })
    }
}

/// The unit of the tests' sizes, where none is given.
const UNIT: u64 = 1 << 30;

/// What a test found. In MiB, as far as it is memory.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    name: String,
    size: u64,
    queues: u16,
    seconds: f64,
    requests: u64,
    /// How often a queue was dropped and another one made.
    queues_made: u64,
    /// More than before the device was opened: as soon as it was open; at most under load; at most allowed.
    opened: f64,
    most: f64,
    bound: f64,
    /// How much more in the last third of the time than in the second (medians), and how much more it may be.
    growth: f64,
    growth_bound: f64,
    holds: bool,
    load_average: Vec<f64>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    suite: String,
    version: String,
    rows: Vec<Row>,
    left_out: Vec<LeftOut>,
}

/// A test that could not be run.
#[derive(Debug, Deserialize, Serialize)]
struct LeftOut {
    name: String,
    why: String,
}

pub(super) fn run(args: &Args, stop: &mut Stop) -> Outcome {
    let suite = &args.suite_args;
    check_names(&suite.only, &Test::ALL.map(|test| test.name().to_owned()))?;
    let unit = suite.size(UNIT);
    if !(1 << 20..=1 << 40).contains(&unit) {
        return Err(Failure::usage("--size: at least 1 MiB, at most 1 TiB"));
    }
    if suite.svg.is_some() {
        return Err(Failure::usage("--svg: there are no charts of these tests"));
    }
    let chosen: Vec<Test> = Test::ALL
        .into_iter()
        .filter(|test| suite.only.is_empty() || suite.only.iter().any(|name| name == test.name()))
        .collect();
    let images = Images::in_dir(&suite.dir, unit)?;
    let mut report = Report {
        suite: "memory".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        rows: Vec::new(),
        left_out: Vec::new(),
    };
    for test in &chosen {
        let was_there = suite.dir.join(test.file_name(unit)).exists();
        match test.image(&images, unit) {
            Ok(path) if was_there && chosen.len() == 1 => {
                report.rows.push(here(args, *test, &path, stop)?);
            }
            Ok(_) => report.rows.extend(elsewhere(args, *test)?),
            Err(Missing::Failed(failure)) => return Err(failure),
            Err(Missing::Program(why)) => report.left_out.push(LeftOut {
                name: test.name().to_owned(),
                why,
            }),
        }
        if stop.has_come() {
            return Err(Failure::new("interrupted").with_code(INTERRUPTED));
        }
    }
    if args.json {
        print_json(&report);
    } else {
        print(&report.text());
    }
    let broken: Vec<&str> = report
        .rows
        .iter()
        .filter(|row| !row.holds)
        .map(|row| row.name.as_str())
        .collect();
    if broken.is_empty() {
        Ok(ExitCode::SUCCESS)
    } else {
        Err(Failure::new(format!(
            "more memory is taken than may be: {}",
            broken.join(", ")
        )))
    }
}

/// The test in a process of its own.
fn elsewhere(args: &Args, test: Test) -> Result<Vec<Row>, Failure> {
    let suite = &args.suite_args;
    let failed = |why: String| Failure::new(format!("the test {}: {why}", test.name()));
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command
        .args([
            "bench",
            "--suite",
            "memory",
            "--json",
            "--only",
            test.name(),
        ])
        .arg("--dir")
        .arg(&suite.dir)
        .args(["--size", &suite.size(UNIT).to_string()])
        .args(["--depth", &args.depth.to_string()])
        .args(["--seconds", &seconds(args).to_string()])
        .stdin(Stdio::null());
    if let Some(size) = args.l2_cache_size {
        command.args(["--l2-cache-size", &size.0.to_string()]);
    }
    let output = command
        .output()
        .map_err(|error| failed(error.to_string()))?;
    // A test whose bound does not hold ends with 1, and with its report.
    let report: Report = serde_json::from_slice(&output.stdout).map_err(|_| {
        let text = String::from_utf8_lossy(&output.stderr);
        failed(format!("ended with {}: {}", output.status, text.trim()))
    })?;
    Ok(report.rows)
}

fn seconds(args: &Args) -> f64 {
    args.seconds.unwrap_or(DEFAULT_SECONDS)
}

/// The test in this process, which has done nothing else.
fn here(args: &Args, test: Test, path: &Path, stop: &mut Stop) -> Result<Row, Failure> {
    let before = resident_bytes()?;
    let budget = args.l2_cache_size.map_or(CACHE_BYTES, |size| size.0);
    let device = OpenOptions::new()
        .queue_depth(args.depth)
        .l2_cache_bytes(budget)
        .open(path)?;
    let opened = resident_bytes()?;
    let time = Duration::from_secs_f64(seconds(args));
    let mut samples = Vec::new();
    let mixture = Mixture::new(&device, args.depth);
    let done = mixture.run(QUEUES, || {
        let begin = Instant::now();
        while begin.elapsed() < time && !stop.has_come() {
            std::thread::sleep(SAMPLE.min(time / 30));
            samples.push(resident_bytes()?);
        }
        Ok(())
    })?;
    device.close()?;
    let more = |bytes: u64| mebibytes(bytes.saturating_sub(before));
    let most = samples.iter().copied().max().unwrap_or(opened);
    let bound = mebibytes(budget + u64::from(QUEUES) * QUEUE_BYTES);
    let growth = growth(&samples);
    let row = Row {
        name: test.name().to_owned(),
        size: test.size(args.suite_args.size(UNIT)),
        queues: QUEUES,
        seconds: seconds(args),
        requests: done.requests,
        queues_made: done.queues_made,
        opened: more(opened),
        most: more(most),
        bound,
        growth,
        growth_bound: mebibytes(GROWTH_BYTES),
        holds: more(most) <= bound && (test != Test::Uptime || growth <= mebibytes(GROWTH_BYTES)),
        load_average: load_average(),
    };
    Ok(row)
}

/// Bytes of this process that are in memory.
fn resident_bytes() -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(|error| Failure::new(format!("cannot read /proc/self/status: {error}")))?;
    resident(&status).ok_or_else(|| Failure::new("/proc/self/status does not tell VmRSS"))
}

fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

/// How many MiB more the last third of the samples shows than the second, by their medians. The first is the warm-up.
fn growth(samples: &[u64]) -> f64 {
    let third = samples.len() / 3;
    let median = |part: &[u64]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part.get(part.len() / 2)
            .map_or(0.0, |bytes| mebibytes(*bytes))
    };
    median(&samples[2 * third..]) - median(&samples[third..2 * third])
}

#[allow(clippy::cast_precision_loss, reason = "tenths of a MiB are shown")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!(
            "urus {}: resident memory in MiB, more than before the image was opened, under reads, writes, discards and flushes\n\
             {:<10}{:>10}{:>8}{:>10}{:>13}{:>9}{:>9}{:>9}{:>9}{:>9}  {:<8}{:>6}\n",
            self.version,
            "test",
            "disk",
            "queues",
            "seconds",
            "requests",
            "opened",
            "most",
            "bound",
            "growth",
            "bound",
            "",
            "load"
        );
        for row in &self.rows {
            let load = row.load_average.first().copied().unwrap_or_default();
            let holds = if row.holds { "holds" } else { "BROKEN" };
            // Writing into a string does not fail.
            let _ = writeln!(
                text,
                "{:<10}{:>10}{:>8}{:>10.0}{:>13}{:>9.1}{:>9.1}{:>9.1}{:>9.1}{:>9.1}  {holds:<8}{load:>6.2}",
                row.name,
                human(row.size),
                row.queues,
                row.seconds,
                row.requests,
                row.opened,
                row.most,
                row.bound,
                row.growth,
                row.growth_bound,
            );
        }
        for left_out in &self.left_out {
            let _ = writeln!(text, "{:<10}left out: {}", left_out.name, left_out.why);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    //! Guards the judge: what it takes for memory, and for growth.
    use super::*;

    #[test]
    fn resident_memory_is_what_the_kernel_says() {
        assert_eq!(resident("Name:\turus\nVmRSS:\t  2048 kB\n"), Some(2 << 20));
        assert_eq!(resident("Name:\turus\n"), None);
        assert!(resident_bytes().expect("Linux") > 1 << 20);
    }

    #[test]
    fn growth_is_that_after_the_warm_up() {
        let mib = |values: &[u64]| values.iter().map(|value| value << 20).collect::<Vec<_>>();
        assert!(growth(&mib(&[1, 50, 90, 90, 90, 90, 90, 90, 90])).abs() < 0.01);
        let leak: Vec<u64> = mib(&(0..90).collect::<Vec<_>>());
        assert!((growth(&leak) - 30.0).abs() < 1.5, "{}", growth(&leak));
    }
}
