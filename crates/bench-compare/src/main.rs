//! urus beside imago and qcow2-rs: the same requests on the same images, in alternating slices of one run (bars P3 and P6).
//!
//! * [`contender`]: a thread with an image open in one of the three, waiting for orders.
//! * [`urus_queue`], [`imago_image`], [`qcow2_rs_device`]: the three.
//! * [`images`]: what they read and write.
//!
//! Places, medians and verdicts are those of `urus bench`: its files are compiled in here.

mod contender;
mod images;
mod imago_image;
#[path = "../../cli/src/bench/places.rs"]
mod places;
mod qcow2_rs_device;
#[path = "../../cli/src/bench/spread.rs"]
mod spread;
mod urus_queue;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde::Serialize;

use contender::{Contender, Plan, Slice};
use spread::Spread;

/// Measure urus beside imago and qcow2-rs
///
/// Each row is the median of paired ratios, urus over the peer, with its range and the 95 % interval of that median. A bar is missed
/// only where the whole interval lies beyond it.
#[derive(Debug, Parser)]
struct Args {
    /// Where the images are made and kept
    #[arg(long, value_name = "DIR", default_value = "urus-compare-images")]
    dir: PathBuf,

    /// MiB of the image that is read
    #[arg(long, value_name = "MIB", default_value_t = 4096,
          value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    size: u64,

    /// Time for all slices of a row
    #[arg(long, value_name = "N", default_value_t = 6.0)]
    seconds: f64,

    /// Pairs of slices; fewer than 15 say little
    #[arg(long, value_name = "N", default_value_t = 15,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    pairs: u16,

    /// Only these rows, by name or by the number of their bar (P3)
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    only: Vec<String>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Remove the images at the end
    #[arg(long)]
    clean: bool,
}

/// Who urus is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Imago,
    Qcow2Rs,
}

impl Peer {
    /// With the version that was compiled in.
    fn name(self) -> String {
        let name = match self {
            Self::Imago => "imago",
            Self::Qcow2Rs => "qcow2-rs",
        };
        format!("{name} {}", locked_version(name).unwrap_or("?"))
    }

    fn start(self, plan: &Plan) -> Result<Contender, String> {
        match self {
            Self::Imago => Contender::start(plan, imago_image::serve),
            Self::Qcow2Rs => Contender::start(plan, qcow2_rs_device::serve),
        }
    }
}

/// From the lock file.
fn locked_version(name: &str) -> Option<&'static str> {
    const LOCK: &str = include_str!("../Cargo.lock");
    let (_, package) = LOCK.split_once(&format!("name = \"{name}\"\nversion = \""))?;
    package.split('"').next()
}

/// What a row measures.
#[derive(Clone, Copy, Debug)]
struct Test {
    bar: &'static str,
    name: &'static str,
    peer: Peer,
    writes: bool,
    direct: bool,
    depth: usize,
    /// How often the peer's rate is asked for; none where it is only told.
    asked: Option<f64>,
}

macro_rules! tests {
    ($($bar:ident $name:ident $peer:ident $what:ident $cache:ident $depth:literal $asked:expr;)*) => {
        [$(Test {
            bar: stringify!($bar),
            name: stringify!($name),
            peer: Peer::$peer,
            writes: $what == WRITES,
            direct: $cache == DIRECT,
            depth: $depth,
            asked: $asked,
        }),*]
    };
}

const READS: u8 = 0;
const WRITES: u8 = 1;
const BUFFERED: u8 = 0;
const DIRECT: u8 = 1;

const TESTS: [Test; 10] = tests! {
    P3 warm_random_read_imago_depth_1 Imago READS BUFFERED 1 Some(1.1);
    P3 warm_random_read_imago Imago READS BUFFERED 32 Some(1.1);
    P3 warm_random_read_qcow2_rs_depth_1 Qcow2Rs READS BUFFERED 1 Some(1.1);
    P3 warm_random_read_qcow2_rs Qcow2Rs READS BUFFERED 32 Some(1.1);
    P1 direct_random_read_imago Imago READS DIRECT 32 None;
    P1 direct_random_read_qcow2_rs Qcow2Rs READS DIRECT 32 None;
    P6 buffered_overwrite_imago Imago WRITES BUFFERED 32 Some(1.1);
    P6 buffered_overwrite_qcow2_rs Qcow2Rs WRITES BUFFERED 32 Some(1.1);
    P6 direct_overwrite_imago Imago WRITES DIRECT 32 None;
    P6 direct_overwrite_qcow2_rs Qcow2Rs WRITES DIRECT 32 Some(0.97);
};

/// Of both.
#[derive(Debug, Serialize)]
struct Sides {
    urus: f64,
    peer: f64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    bar: &'static str,
    name: &'static str,
    peer: String,
    asked: Option<f64>,
    verdict: &'static str,
    ratio: Spread,
    /// Medians of the slices. Not comparable with other runs.
    operations_per_second: Sides,
    cpu_microseconds_per_operation: Sides,
    cpu_ratio: Spread,
    /// Of the last minute.
    load_average: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("urus-bench-compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), String> {
    let wanted = |test: &Test, name: &String| *name == test.name || *name == test.bar;
    for name in &args.only {
        if !TESTS.iter().any(|test| wanted(test, name)) {
            let names: Vec<_> = TESTS.iter().map(|test| test.name).collect();
            return Err(format!("--only {name}: there are {}", names.join(", ")));
        }
    }
    let mut rows = Vec::new();
    for test in &TESTS {
        if args.only.is_empty() || args.only.iter().any(|name| wanted(test, name)) {
            eprintln!("{} {}…", test.bar, test.name);
            rows.push(row(args, test)?);
        }
    }
    if args.json {
        let json = serde_json::to_string_pretty(&rows).map_err(|error| error.to_string())?;
        println!("{json}");
    } else {
        print_table(&rows);
    }
    if args.clean {
        images::clean(&args.dir)?;
    }
    Ok(())
}

fn row(args: &Args, test: &Test) -> Result<Row, String> {
    let image = images::get(&args.dir, args.size << 20, test.writes)?;
    let plan = Plan {
        path: image.path,
        span: image.size,
        block_bytes: 4096,
        depth: test.depth,
        writes: test.writes,
        direct: test.direct,
        slice: Duration::from_secs_f64(args.seconds / f64::from(args.pairs) / 2.0),
    };
    images::settle(&plan)?;
    let urus = Contender::start(&plan, urus_queue::serve)?;
    let peer = test.peer.start(&plan)?;
    // One that does not count: caches, rings, processor clocks.
    urus.slice(0)?;
    peer.slice(0)?;
    let mut pairs = Vec::new();
    for number in 1..=u64::from(args.pairs) {
        // Who is first takes turns, so that what drifts does not favour one.
        pairs.push(if number % 2 == 0 {
            let theirs = peer.slice(number)?;
            (urus.slice(number)?, theirs)
        } else {
            let ours = urus.slice(number)?;
            (ours, peer.slice(number)?)
        });
    }
    urus.end()?;
    peer.end()?;
    Ok(summary(test, &pairs))
}

fn summary(test: &Test, pairs: &[(Slice, Slice)]) -> Row {
    let ratios =
        |of: fn(&Slice) -> f64| Spread::of(pairs.iter().map(|(urus, peer)| of(urus) / of(peer)));
    let medians = |of: fn(&Slice) -> f64| Sides {
        urus: Spread::of(pairs.iter().map(|(urus, _)| of(urus))).median,
        peer: Spread::of(pairs.iter().map(|(_, peer)| of(peer))).median,
    };
    let (ratio, cpu_ratio) = (ratios(Slice::per_second), ratios(Slice::cpu_microseconds));
    let verdict = match test.asked {
        // "With less CPU per operation".
        Some(bar) if test.direct => match (
            spread::at_least(bar, &ratio),
            spread::at_most(1.0, &cpu_ratio),
        ) {
            ("met", cpu) => cpu,
            (rate, _) => rate,
        },
        Some(bar) => spread::at_least(bar, &ratio),
        None => "told",
    };
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().and_then(|load| load.parse().ok());
    Row {
        bar: test.bar,
        name: test.name,
        peer: test.peer.name(),
        asked: test.asked,
        verdict,
        ratio,
        operations_per_second: medians(Slice::per_second),
        cpu_microseconds_per_operation: medians(Slice::cpu_microseconds),
        cpu_ratio,
        load_average: load.unwrap_or_default(),
    }
}

fn print_table(rows: &[Row]) {
    println!(
        "{:<4}{:<36}{:<8}{:<11}{:<42}{:<22}{:<16}{:>6}  against",
        "bar", "test", "asked", "", "ratio (min, max; 95 %)", "per second", "CPU µs/op", "load"
    );
    for row in rows {
        let ratio = &row.ratio;
        let asked = row.asked.map_or_else(String::new, |bar| format!("≥ {bar}"));
        let spread = format!(
            "{:.3} ({:.2}, {:.2}; {:.3} to {:.3})",
            ratio.median, ratio.min, ratio.max, ratio.low, ratio.high
        );
        let (rate, cpu) = (
            &row.operations_per_second,
            &row.cpu_microseconds_per_operation,
        );
        let rate = format!("{:.0} / {:.0}", rate.urus, rate.peer);
        let cpu = format!("{:.2} / {:.2}", cpu.urus, cpu.peer);
        println!(
            "{:<4}{:<36}{asked:<8}{:<11}{spread:<42}{rate:<22}{cpu:<16}{:>6.2}  {}",
            row.bar, row.name, row.verdict, row.load_average, row.peer
        );
    }
}

#[cfg(test)]
mod tests {
    //! Guards the names by which results are compared, and the versions that they are about.
    use super::*;

    #[test]
    fn rows_have_names_of_their_own_and_peers_a_version() {
        let mut names: Vec<_> = TESTS.iter().map(|test| test.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), TESTS.len());
        for peer in [Peer::Imago, Peer::Qcow2Rs] {
            assert!(!peer.name().contains('?'), "{}", peer.name());
        }
    }
}
