//! The process of one target: it feeds the inputs, watches over memory and time, and counts.

use std::fmt;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use urus_fuzz_targets::{MOST_MEMORY, MOST_TIME, Target, Verdict, bases, havoc, nbd, virtqueue};
use urus_sim::runner::panic_text;

use crate::{ALLOCATOR, Arguments};

/// So many violations are enough.
const MOST_VIOLATIONS: usize = 10;
/// An input that takes so much processor time, or so much time at all, is not waited for any longer.
const PATIENCE_CPU: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(120);

/// What a run gave.
pub(crate) struct Tally {
    name: &'static str,
    seed: u64,
    inputs: u64,
    violations: u64,
    slowest: Duration,
    memory: usize,
    time: Duration,
}

impl Tally {
    /// The table's head.
    pub(crate) fn head() -> String {
        format!(
            "{:<28} {:>9} {:>10} {:>10} {:>11} {:>9} {:>6}",
            "part", "inputs", "violations", "slowest/ms", "largest/MiB", "inputs/s", "seed"
        )
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = u128::from(self.inputs) * 1000 / self.time.as_millis().max(1);
        write!(
            f,
            "{:<28} {:>9} {:>10} {:>10.1} {:>11.1} {rate:>9} {:>6}",
            format!("fuzz {}", self.name),
            self.inputs,
            self.violations,
            self.slowest.as_secs_f64() * 1000.0,
            mebibytes(self.memory),
            self.seed
        )
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The first panic since it was last looked for, of any thread: some are caught, or end a thread that nobody joins.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

fn notice_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map_or(String::new(), |place| format!(" ({place})"));
        let text = format!("panic: {}{place}", panic_text(panic.payload()));
        PANIC
            .lock()
            .expect("nothing panics here")
            .get_or_insert(text);
    }));
}

/// Processor time of this process: a loaded machine does not count.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(now).expect("time since the process began")
}

/// Runs one target.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let target = arguments.targets[0];
    let mut run = match Run::new(target, arguments) {
        Ok(run) => run,
        Err(error) => {
            eprintln!("urus-fuzz: {}: {error}", target.name);
            return ExitCode::from(2);
        }
    };
    run.all(arguments);
    println!("{}", run.tally);
    let _ = fs::remove_file(last_input(target.name));
    if run.tally.violations == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

struct Run {
    target: Target,
    corpus: Vec<Vec<u8>>,
    tally: Tally,
    last: fs::File,
    /// Allocated before the first input.
    baseline: usize,
}

/// Where inputs lie that somebody will want to see.
fn scratch() -> PathBuf {
    std::env::temp_dir().join("urus-fuzz")
}

/// Where the input under way lies, for the case that the process dies of it.
pub(crate) fn last_input(target: &str) -> PathBuf {
    scratch().join(format!("{target}.last"))
}

fn corpus(directory: &Path) -> io::Result<Vec<Vec<u8>>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let mut names: Vec<PathBuf> = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    names.sort();
    names.iter().map(fs::read).collect()
}

impl Run {
    fn new(target: Target, arguments: &Arguments) -> Result<Self, String> {
        let text = |error: io::Error| error.to_string();
        let corpus = match &arguments.input {
            Some(file) => vec![fs::read(file).map_err(text)?],
            None => corpus(&arguments.corpus.join(target.name)).map_err(text)?,
        };
        let selftest = target.name.starts_with("selftest");
        if corpus.is_empty() && !selftest {
            return Err(format!("no corpus in {}", arguments.corpus.display()));
        }
        fs::create_dir_all(scratch()).map_err(text)?;
        let last = fs::File::create(last_input(target.name)).map_err(text)?;
        notice_panics();
        bases::prepare();
        if target.name == "nbd" {
            nbd::prepare()?;
        }
        if target.name == "virtqueue" {
            virtqueue::prepare()?;
        }
        watch(target.name);
        let baseline = ALLOCATOR.allocated();
        if baseline == 0 {
            return Err("the allocator does not count".to_owned());
        }
        Ok(Self {
            target,
            corpus,
            tally: Tally {
                name: target.name,
                seed: arguments.seed,
                inputs: 0,
                violations: 0,
                slowest: Duration::ZERO,
                memory: 0,
                time: Duration::ZERO,
            },
            last,
            baseline,
        })
    }

    fn all(&mut self, arguments: &Arguments) {
        let start = Instant::now();
        let end = arguments
            .minutes
            .map(|minutes| start + Duration::from_secs_f64(minutes * 60.0));
        let corpus = std::mem::take(&mut self.corpus);
        for input in &corpus {
            self.one(input);
        }
        let more = if arguments.input.is_some() {
            0
        } else {
            arguments.inputs
        };
        let mut number = 0;
        loop {
            let over = match end {
                Some(end) if arguments.input.is_none() => Instant::now() >= end,
                _ => number >= more,
            };
            if over || self.tally.violations >= MOST_VIOLATIONS as u64 {
                break;
            }
            let input = havoc::generate(arguments.seed, number, &corpus, self.target.most_bytes);
            self.one(&input);
            number += 1;
        }
        self.tally.time = start.elapsed();
        self.tally.memory = ALLOCATOR.max_allocated().saturating_sub(self.baseline);
    }

    fn one(&mut self, input: &[u8]) {
        self.tally.inputs += 1;
        self.remember(input);
        let (mut verdict, mut time) = self.measured(input);
        if verdict.is_ok() && time > MOST_TIME {
            // Once more: something else on the machine may have been in its way.
            let (again, second) = self.measured(input);
            verdict = again;
            time = time.min(second);
        }
        self.tally.slowest = self.tally.slowest.max(time);
        if verdict.is_ok() && time > MOST_TIME {
            verdict = Err(format!("it takes {} ms", time.as_millis()));
        }
        if let Err(violation) = verdict {
            self.tally.violations += 1;
            let name = format!("{}-{:016x}", self.target.name, hash(input));
            let path = scratch().join(name);
            let kept = fs::write(&path, input);
            println!("  VIOLATION: {}: {violation}", self.target.name);
            match kept {
                Ok(()) => println!(
                    "    again: cargo run -p urus-fuzz-targets -- --target {} --input {}",
                    self.target.name,
                    path.display()
                ),
                Err(error) => println!("    the input was not kept: {error}"),
            }
        }
    }

    fn measured(&self, input: &[u8]) -> (Verdict, Duration) {
        let start = cpu_time();
        begin(start);
        let _ = ALLOCATOR.set_limit(ALLOCATOR.allocated() + MOST_MEMORY);
        let result = catch_unwind(AssertUnwindSafe(|| (self.target.run)(input)));
        let _ = ALLOCATOR.set_limit(usize::MAX);
        UNDER_WAY.store(false, Ordering::SeqCst);
        let time = cpu_time().saturating_sub(start);
        let panic = PANIC.lock().expect("nothing panics here").take();
        let verdict = match (panic, result) {
            (Some(panic), _) => Err(panic),
            (None, Err(panic)) => Err(format!("panic: {}", panic_text(&*panic))),
            (None, Ok(verdict)) => verdict,
        };
        (verdict, time)
    }

    /// Puts the input where it is found if the process dies.
    fn remember(&mut self, input: &[u8]) {
        use std::os::unix::fs::FileExt;
        let kept = self
            .last
            .set_len(input.len() as u64)
            .and_then(|()| self.last.write_all_at(input, 0));
        if let Err(error) = kept {
            eprintln!("urus-fuzz: the input under way is not kept: {error}");
        }
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hash = urus_sim::rng::TraceHash::default();
    hash.add_bytes(bytes);
    hash.value()
}

static UNDER_WAY: AtomicBool = AtomicBool::new(false);
static NUMBER: AtomicU64 = AtomicU64::new(0);
/// Processor time, in nanoseconds, when the input under way began.
static BEGAN: AtomicU64 = AtomicU64::new(0);

fn begin(cpu: Duration) {
    BEGAN.store(nanoseconds(cpu), Ordering::SeqCst);
    NUMBER.fetch_add(1, Ordering::SeqCst);
    UNDER_WAY.store(true, Ordering::SeqCst);
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Ends the process when an input never ends.
fn watch(target: &'static str) {
    std::thread::spawn(move || {
        let mut seen = (0, Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let number = NUMBER.load(Ordering::SeqCst);
            if seen.0 != number || !UNDER_WAY.load(Ordering::SeqCst) {
                seen = (number, Instant::now());
                continue;
            }
            let cpu = nanoseconds(cpu_time()).saturating_sub(BEGAN.load(Ordering::SeqCst));
            if cpu > nanoseconds(PATIENCE_CPU) || seen.1.elapsed() > PATIENCE {
                println!("  VIOLATION: {target}: input {number} does not end");
                std::process::exit(3);
            }
        }
    });
}
