//! The tests are tested: one thing at a time is changed in the code that must not be wrong, and the tests that are to notice run.
//!
//! `cargo-mutants` says what can be changed; what runs is chosen here, because its own run has no budget of time and only
//! knows `cargo test`. The changes are made in a copy of the tree, never in the tree itself. A mutant is shown the judges in turn, the
//! quickest first, until one notices. docs/mutants.md holds the survivors that were looked at, each with a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::judges::{self, Judge, Run};
use crate::steps::{Steps, output};
use crate::survivors::{self, Survivor};

/// What is mutated: the format, and all that decides what a commit writes and which clusters it hands out.
const FILES: [&str; 8] = [
    "crates/format/src/**",
    "crates/engine/src/commit.rs",
    "crates/engine/src/settle.rs",
    "crates/engine/src/alloc.rs",
    "crates/engine/src/refcounts.rs",
    "crates/engine/src/change.rs",
    "crates/engine/src/cluster_locks.rs",
    "crates/engine/src/frames.rs",
];

/// Of a hundred mutants that compile, so many must be noticed.
const LEAST_CAUGHT_PERCENT: u64 = 90;
/// Address space of a judge: a mutant may allocate without end.
const MOST_MEMORY: &str = "--as=4294967296";
const SIGKILL: i32 = 9;
const SIGXCPU: i32 = 24;
/// A build that takes longer has hung.
const BUILD_SECONDS: u64 = 900;

/// A change that can be made.
struct Mutant {
    /// File, line, column and what is changed, as cargo-mutants says it.
    name: String,
    file: String,
    start: (usize, usize),
    end: (usize, usize),
    replacement: String,
}

impl Mutant {
    fn read(value: &Value) -> Option<Self> {
        let text = |name: &str| value[name].as_str().map(str::to_owned);
        let place = |name: &str| {
            let at = &value["span"][name];
            let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
            Some((number(&at["line"])?, number(&at["column"])?))
        };
        Some(Self {
            name: text("name")?,
            file: text("file")?,
            start: place("start")?,
            end: place("end")?,
            replacement: text("replacement")?,
        })
    }

    /// The file's text with the change in it.
    fn applied(&self, source: &str) -> Option<String> {
        let (start, end) = (position(source, self.start)?, position(source, self.end)?);
        Some([source.get(..start)?, &self.replacement, source.get(end..)?].concat())
    }

    /// As docs/mutants.md names it.
    fn survivor(&self, source: &str) -> Survivor {
        let line = source.lines().nth(self.start.0 - 1).unwrap_or("");
        Survivor {
            file: self.file.clone(),
            change: self
                .name
                .split_once(": ")
                .map_or(self.name.as_str(), |(_, change)| change)
                .to_owned(),
            line: line.trim().to_owned(),
        }
    }
}

/// The byte at a line and a column, both from 1; columns are characters.
fn position(source: &str, (line, column): (usize, usize)) -> Option<usize> {
    let mut lines = source.split_inclusive('\n');
    let before: usize = lines
        .by_ref()
        .take(line.checked_sub(1)?)
        .map(str::len)
        .sum();
    let line = lines.next()?;
    let mut places = line.char_indices().map(|(at, _)| at).chain([line.len()]);
    Some(before + places.nth(column.checked_sub(1)?)?)
}

/// What became of a mutant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Caught(&'static str),
    TimedOut(&'static str),
    Survived,
    Unviable,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caught(judge) => write!(f, "caught by {judge}"),
            Self::TimedOut(judge) => write!(f, "timed out in {judge}"),
            Self::Survived => f.write_str("SURVIVED"),
            Self::Unviable => f.write_str("unviable"),
        }
    }
}

/// How a command of a judge ended.
#[derive(PartialEq, Eq)]
enum Ended {
    Well,
    Badly,
    Late,
}

/// Where the mutants are made and judged.
struct Laboratory {
    tree: PathBuf,
    build: PathBuf,
}

impl Laboratory {
    /// A copy of what Git knows and does not ignore, as it is now.
    fn copy(root: &Path, directory: &Path) -> Result<Self, String> {
        let laboratory = Self {
            tree: directory.join("tree"),
            build: directory.join("build"),
        };
        let told = |path: &Path, error| format!("{}: {error}", path.display());
        if laboratory.tree.exists() {
            fs::remove_dir_all(&laboratory.tree).map_err(|error| told(&laboratory.tree, error))?;
        }
        let listing = output(
            Command::new("git")
                .args(["ls-files", "-z", "--cached", "--others"])
                .arg("--exclude-standard")
                .current_dir(root),
        )?;
        for name in listing.split('\0').filter(|name| !name.is_empty()) {
            let (from, to) = (root.join(name), laboratory.tree.join(name));
            if !from.is_file() {
                continue;
            }
            let parent = to.parent().expect("it lies below the tree");
            fs::create_dir_all(parent).map_err(|error| told(parent, error))?;
            fs::copy(&from, &to).map_err(|error| told(&from, error))?;
        }
        Ok(laboratory)
    }

    fn source(&self, mutant: &Mutant) -> Result<String, String> {
        fs::read_to_string(self.tree.join(&mutant.file))
            .map_err(|error| format!("{}: {error}", mutant.file))
    }

    fn cargo(
        &self,
        arguments: &[&str],
        more: &[&str],
        (processor, seconds): (u64, u64),
    ) -> Result<Ended, String> {
        let (command, options) = arguments.split_first().expect("a cargo command");
        let mut run = Command::new("timeout");
        run.args(["--kill-after=5", &seconds.to_string()])
            .args(["prlimit", MOST_MEMORY, &format!("--cpu={processor}")])
            .args(["cargo", command])
            .args(["--locked", "--quiet", "--profile", "mutants"])
            .args(options)
            .args(more);
        self.ended(run)
    }

    /// Runs a command in the tree; `timeout` ends it together with all that it has started.
    fn ended(&self, mut command: Command) -> Result<Ended, String> {
        let status = command
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.build)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(|error| format!("{command:?} did not start: {error}"))?;
        Ok(match (status.code(), status.signal()) {
            (Some(0), _) => Ended::Well,
            // Ended by `timeout`, by it with force, or for its processor time.
            (Some(124), _) | (_, Some(SIGKILL | SIGXCPU)) => Ended::Late,
            _ => Ended::Badly,
        })
    }

    fn build(&self, judge: &Judge) -> Result<bool, String> {
        let more: &[&str] = match judge.run {
            Run::Simulator(_) => &[],
            Run::Tests(_) => &["--no-run"],
        };
        Ok(self.cargo(judge.build, more, (BUILD_SECONDS, BUILD_SECONDS))? == Ended::Well)
    }

    /// It was built before.
    fn judge(&self, judge: &Judge, seconds: u64) -> Result<Ended, String> {
        match judge.run {
            Run::Tests(told) => {
                let more = [&["--"], told].concat();
                self.cargo(judge.build, &more, (judge.seconds, seconds))
            }
            Run::Simulator(arguments) => {
                let mut run = Command::new("timeout");
                run.args(["--kill-after=5", &seconds.to_string()])
                    .args(["prlimit", MOST_MEMORY])
                    .arg(format!("--cpu={}", judge.seconds))
                    .arg(self.build.join("mutants").join("urus-sim"))
                    .args(arguments);
                self.ended(run)
            }
        }
    }

    /// Seconds that each judge may take: all of them pass where nothing is changed, and how long they take is measured. Plenty, since
    /// others use the machine too; what loops is ended by its processor time.
    fn limits(&self, stopped: &AtomicBool) -> Result<Vec<(&'static str, u64)>, String> {
        let mut limits = Vec::new();
        for judge in judges::all() {
            if stopped.load(Ordering::Relaxed) {
                return Err("stopped before anything was tried".into());
            }
            if !self.build(judge)? {
                return Err(format!("{}: it does not build unchanged", judge.name));
            }
            let start = Instant::now();
            if self.judge(judge, BUILD_SECONDS)? != Ended::Well {
                return Err(format!("{}: it fails unchanged", judge.name));
            }
            let took = start.elapsed();
            println!("{:<12} {:>6.1} s unchanged", judge.name, took.as_secs_f64());
            limits.push((judge.name, took.as_secs() * 8 + 60));
        }
        Ok(limits)
    }

    /// Makes one change, shows it to the judges, and takes it back.
    fn fate(&self, mutant: &Mutant, limits: &[(&'static str, u64)]) -> Result<Fate, String> {
        let path = self.tree.join(&mutant.file);
        let told = |error| format!("{}: {error}", path.display());
        let source = fs::read_to_string(&path).map_err(told)?;
        let changed = mutant
            .applied(&source)
            .ok_or_else(|| format!("{}: there is no such place", mutant.name))?;
        fs::write(&path, changed).map_err(told)?;
        let fate = self.shown(&judges::of(&mutant.file), limits);
        fs::write(&path, source).map_err(told)?;
        fate
    }

    fn shown(&self, judges: &[&'static Judge], limits: &[(&str, u64)]) -> Result<Fate, String> {
        let mut built = None;
        for judge in judges {
            if built != Some(judge.build) && !self.build(judge)? {
                return Ok(Fate::Unviable);
            }
            built = Some(judge.build);
            let limit = limits.iter().find(|(name, _)| *name == judge.name);
            match self.judge(judge, limit.map_or(BUILD_SECONDS, |(_, seconds)| *seconds))? {
                Ended::Well => {}
                Ended::Badly => return Ok(Fate::Caught(judge.name)),
                Ended::Late => return Ok(Fate::TimedOut(judge.name)),
            }
        }
        Ok(Fate::Survived)
    }
}

/// All that can be changed.
fn list(root: &Path) -> Result<Vec<Mutant>, String> {
    let mut command = Command::new("cargo");
    command
        .args(["mutants", "--list", "--json"])
        .args(["-p", "urus-format", "-p", "urus-engine"])
        // Tests that are there on some condition more.
        .args(["--exclude-re", "tests::"])
        .args(FILES.iter().flat_map(|file| ["--file", file]))
        .current_dir(root);
    let text = output(&mut command)?;
    let all: Vec<Value> =
        serde_json::from_str(&text).map_err(|error| format!("cargo mutants --list: {error}"))?;
    let mutants: Option<Vec<Mutant>> = all.iter().map(Mutant::read).collect();
    mutants
        .filter(|mutants| !mutants.is_empty())
        .ok_or_else(|| "cargo mutants --list says nothing that is understood".into())
}

/// In an order that the seed decides, so that any beginning of it is a fair sample.
fn shuffle(mutants: &mut [Mutant], seed: u64) {
    let mut state = seed;
    for last in (1..mutants.len()).rev() {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let at = (mixed ^ mixed >> 31) % (last as u64 + 1);
        mutants.swap(last, usize::try_from(at).expect("below a length"));
    }
}

/// What was seen.
#[derive(Default)]
struct Tally {
    of: usize,
    tried: u64,
    caught: u64,
    timed_out: u64,
    unviable: u64,
    survivors: Vec<(String, Survivor)>,
}

impl Tally {
    fn add(&mut self, fate: Fate) {
        self.tried += 1;
        match fate {
            Fate::Caught(_) => self.caught += 1,
            Fate::TimedOut(_) => self.timed_out += 1,
            Fate::Unviable => self.unviable += 1,
            Fate::Survived => {}
        }
    }

    fn row(&self, listed: &BTreeSet<Survivor>, time: Duration, seed: u64) -> String {
        let known = self.survivors.iter().filter(|(_, s)| listed.contains(s));
        let viable = self.tried - self.unviable;
        let share = (self.caught + self.timed_out) as f64 * 100.0 / viable.max(1) as f64;
        format!(
            "{:<10} {:>6} {:>6} {:>7} {:>9} {:>9} {:>9} {:>7} {share:>7.1} {:>8.0} {seed:>6}",
            "mutants",
            self.of,
            self.tried,
            self.caught,
            self.timed_out,
            self.unviable,
            self.survivors.len(),
            known.count(),
            time.as_secs_f64(),
        )
    }

    fn head() -> String {
        format!(
            "{:<10} {:>6} {:>6} {:>7} {:>9} {:>9} {:>9} {:>7} {:>7} {:>8} {:>6}",
            "part",
            "of",
            "tried",
            "caught",
            "timed out",
            "unviable",
            "survived",
            "listed",
            "share/%",
            "seconds",
            "seed"
        )
    }

    fn is_enough(&self) -> bool {
        let noticed = self.caught + self.timed_out;
        noticed > 0 && noticed * 100 >= (self.tried - self.unviable) * LEAST_CAUGHT_PERCENT
    }
}

fn install() -> Result<(), String> {
    let there = Command::new("cargo")
        .args(["mutants", "--version"])
        .output()
        .is_ok_and(|found| found.status.success());
    if there {
        return Ok(());
    }
    let status = Command::new("cargo")
        .args(["install", "--locked", "cargo-mutants@27"])
        .status()
        .map_err(|error| format!("cargo install did not start: {error}"))?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| "cargo-mutants is needed and could not be installed".into())
}

/// Tries mutants for so many minutes, in an order that the seed decides.
pub(crate) fn run(steps: &mut Steps, minutes: u64, seed: u64) {
    let directory = steps.target_directory().join("mutants");
    steps.check("mutants", |root| {
        let directory = root.join(directory);
        let tally = hunt(root, &directory, Duration::from_secs(minutes * 60), seed)?;
        if tally.is_enough() {
            Ok(())
        } else {
            Err(format!(
                "fewer than {LEAST_CAUGHT_PERCENT} % of the mutants were noticed"
            ))
        }
    });
}

/// Set once somebody asks this to stop: the table is printed first, as soon as the judge at work has ended.
fn stop_flag() -> Result<Arc<AtomicBool>, String> {
    let stopped = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stopped))
            .map_err(|error| format!("signal {signal} cannot be heard: {error}"))?;
    }
    Ok(stopped)
}

fn hunt(root: &Path, directory: &Path, budget: Duration, seed: u64) -> Result<Tally, String> {
    install()?;
    let mut mutants = list(root)?;
    shuffle(&mut mutants, seed);
    let listed: BTreeSet<Survivor> = survivors::listed(root)?.into_iter().collect();
    let laboratory = Laboratory::copy(root, directory)?;
    let mut places: BTreeMap<Survivor, u32> = BTreeMap::new();
    for mutant in &mutants {
        *places
            .entry(mutant.survivor(&laboratory.source(mutant)?))
            .or_default() += 1;
    }
    let stopped = stop_flag()?;
    let limits = laboratory.limits(&stopped)?;
    let path = directory.join(format!("seed-{seed}.txt"));
    let told = |error| format!("{}: {error}", path.display());
    let mut record = fs::File::create(&path).map_err(told)?;
    let mut tally = Tally {
        of: mutants.len(),
        ..Tally::default()
    };
    let start = Instant::now();
    for mutant in &mutants {
        if start.elapsed() >= budget || stopped.load(Ordering::Relaxed) {
            break;
        }
        let before = start.elapsed();
        let survivor = mutant.survivor(&laboratory.source(mutant)?);
        let known = listed.contains(&survivor);
        // One on the page would take the time of all judges, and is no news: it counts against the tests unseen. Where its line has the
        // same change twice, the page does not tell which of them it means.
        let fate = if known && places.get(&survivor) == Some(&1) {
            Fate::Survived
        } else {
            laboratory.fate(mutant, &limits)?
        };
        if stopped.load(Ordering::Relaxed) {
            // Whoever stopped this may have ended the judge too.
            break;
        }
        let took = (start.elapsed() - before).as_secs_f64();
        tally.add(fate);
        writeln!(record, "{fate} after {took:.1} s: {}", mutant.name).map_err(told)?;
        if fate == Fate::Survived {
            let word = if known { "listed" } else { "NOT LISTED" };
            println!("{word}: {}\n    {}", mutant.name, survivor.line);
            tally.survivors.push((mutant.name.clone(), survivor));
        }
    }
    println!("{}", Tally::head());
    println!("{}", tally.row(&listed, start.elapsed(), seed));
    println!("each of them: {}", path.display());
    Ok(tally)
}

#[cfg(test)]
mod tests {
    //! Guards against mutants that are none: a change that lands elsewhere, or nowhere, would be taken for a survivor.

    use super::*;

    #[test]
    fn a_change_lands_where_it_is_said_to() {
        let source = "fn a() {\n    let é = 1 + 2;\n}\n";
        let mut mutant = Mutant {
            name: "a.rs:2:15: replace + with - in a".into(),
            file: "a.rs".into(),
            start: (2, 15),
            end: (2, 16),
            replacement: "-".into(),
        };
        let changed = mutant.applied(source).unwrap();
        assert_eq!(changed, "fn a() {\n    let é = 1 - 2;\n}\n");
        let survivor = mutant.survivor(source);
        assert_eq!(survivor.change, "replace + with - in a");
        assert_eq!(survivor.line, "let é = 1 + 2;");
        mutant.end = (9, 1);
        assert_eq!(mutant.applied(source), None);
    }

    #[test]
    fn the_share_counts_what_compiles() {
        let mut tally = Tally::default();
        assert!(!tally.is_enough(), "nothing was tried");
        for _ in 0..9 {
            tally.add(Fate::Caught("model"));
        }
        tally.add(Fate::Survived);
        tally.add(Fate::Unviable);
        assert!(tally.is_enough());
        tally.add(Fate::Survived);
        assert!(!tally.is_enough());
    }
}
