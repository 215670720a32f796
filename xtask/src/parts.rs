//! The proofs: each part in small for CI, and for as long as told in `soak`.
//!
//! Most are runs of the simulator, of `urus-proofs` with the real program or of the fuzz targets; the interleavings and schedules are tests that
//! need the engine built on other atomics, and memory is a suite of the program's own bench.

use std::path::Path;
use std::process::Command;

use crate::branches;
use crate::leftovers;
use crate::mutants;
use crate::packages;
use crate::service;
use crate::steps::Steps;

/// A part.
struct Part {
    name: &'static str,
    means: Means,
}

enum Means {
    /// A run of the simulator, with its budget in CI.
    Simulator(&'static [&'static str]),
    /// `urus-proofs`, with the real program, real files and, for some, loop devices and mounts; its budget in CI.
    Proofs(&'static [&'static str]),
    /// The fuzz targets, with their budget in CI.
    Fuzz(&'static [&'static str]),
    /// The error branches that injected errors reach: in soak only, it builds the simulator anew.
    Branches,
    /// Mutants of the code that must not be wrong: in soak only, a build for each takes too long for CI.
    Mutants,
    /// The units of `dist/` under systemd in a container: in soak only, not every machine of CI can boot one.
    Service,
    /// A suite of `urus bench` that fails where a bound does not hold, with its size and seconds in CI.
    Bench(&'static [&'static str]),
    /// A test of its own: cargo's arguments, the variable that says how much, how much in CI, and in soak.
    Test {
        arguments: &'static [&'static str],
        variable: &'static str,
        small: &'static str,
        long: &'static str,
    },
}

const PARTS: &[Part] = &[
    Part {
        name: "cuts",
        means: Means::Simulator(&["--states", "950000"]),
    },
    Part {
        name: "sequences",
        means: Means::Simulator(&["--states", "500000"]),
    },
    Part {
        name: "errors",
        means: Means::Simulator(&["--states", "200000", "--injections", "40"]),
    },
    Part {
        name: "model",
        means: Means::Simulator(&["--states", "40000"]),
    },
    Part {
        name: "plants",
        means: Means::Simulator(&["--hunts", "1"]),
    },
    Part {
        name: "trace",
        means: Means::Simulator(&[]),
    },
    Part {
        name: "kill",
        means: Means::Proofs(&["--rounds", "60"]),
    },
    Part {
        name: "qemu",
        means: Means::Proofs(&["--rounds", "100"]),
    },
    Part {
        name: "space",
        means: Means::Proofs(&["--rounds", "18"]),
    },
    Part {
        name: "blocks",
        means: Means::Proofs(&["--rounds", "27"]),
    },
    Part {
        name: "memory",
        means: Means::Bench(&["--size", "64M", "--seconds", "10"]),
    },
    Part {
        name: "fuzz",
        means: Means::Fuzz(&["--minutes", "0.8"]),
    },
    Part {
        name: "interleavings",
        means: Means::Test {
            arguments: &[
                "test",
                "--locked",
                "-p",
                "urus-engine",
                "--features",
                "loom",
                "--lib",
                "interleavings",
            ],
            variable: "LOOM_MAX_PREEMPTIONS",
            small: "3",
            long: "5",
        },
    },
    Part {
        name: "schedules",
        means: Means::Test {
            arguments: &[
                "test",
                "--locked",
                "-p",
                "urus-sim",
                "--features",
                "shuttle",
                "--test",
                "shuttle",
            ],
            variable: "URUS_SCHEDULES",
            small: "1000",
            long: "200000",
        },
    },
    Part {
        name: "branches",
        means: Means::Branches,
    },
    Part {
        name: "mutants",
        means: Means::Mutants,
    },
    Part {
        name: "service",
        means: Means::Service,
    },
];

/// What `cargo xtask soak` was told.
pub(crate) struct SoakOptions {
    minutes: u64,
    part: Option<String>,
    seed: u64,
}

impl SoakOptions {
    pub(crate) fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            minutes: 60,
            part: None,
            seed: 1,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let value = words
                .next()
                .ok_or_else(|| format!("{word} needs a value"))?;
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| format!("{word} {value}: not a number"))
            };
            match *word {
                "--minutes" => options.minutes = number()?,
                "--seed" => options.seed = number()?,
                "--part" if PARTS.iter().any(|part| part.name == *value) => {
                    options.part = Some((*value).to_owned())
                }
                "--part" => {
                    let names: Vec<_> = PARTS.iter().map(|part| part.name).collect();
                    return Err(format!(
                        "no part is called {value}: there are {}",
                        names.join(", ")
                    ));
                }
                _ => return Err(format!("{word} is unknown")),
            }
        }
        Ok(options)
    }
}

fn simulate(steps: &mut Steps, name: &str, arguments: &[&str]) {
    let mut all = vec![
        "run", "--locked", "--quiet", "-p", "urus-sim", "--bin", "urus-sim", "--", "--part", name,
    ];
    all.extend(arguments);
    steps.cargo(&format!("simulate {name}"), &all);
}

fn prove(steps: &mut Steps, name: &str, arguments: &[&str]) {
    let mut all = vec![
        "run",
        "--locked",
        "--quiet",
        "-p",
        "urus-tests",
        "--bin",
        "urus-proofs",
        "--",
        "--part",
        name,
    ];
    all.extend(arguments);
    let program = steps.target_directory().join("debug").join("urus");
    let mut command = steps.cargo_command(&all);
    command.env("URUS_BIN", program);
    steps.run(&format!("prove {name}"), command);
    // Mounts and loop devices of a run that was cut short.
    leftovers::clean(&steps.target_directory().join("urus-scratch"));
}

/// A suite of the program that was built. Its images go away: they change under the load.
fn bench(steps: &mut Steps, suite: &str, arguments: &[&str]) {
    let target = steps.target_directory();
    let images = target.join("urus-scratch").join(format!("bench-{suite}"));
    let mut command = Command::new(target.join("debug").join("urus"));
    command
        .args(["bench", "--suite", suite, "--clean", "--dir"])
        .arg(images)
        .args(arguments);
    steps.run(&format!("bench {suite}"), command);
}

/// The targets of crates/fuzz-targets, without libFuzzer.
fn fuzz(steps: &mut Steps, arguments: &[&str]) {
    let mut all = vec![
        "run",
        "--locked",
        "--quiet",
        "-p",
        "urus-fuzz-targets",
        "--bin",
        "urus-fuzz",
        "--",
    ];
    all.extend(arguments);
    steps.cargo("fuzz", &all);
}

/// The same targets under libFuzzer, which sees what each input reaches, where cargo-fuzz is installed.
fn libfuzzer(steps: &mut Steps, minutes: u64, seed: &str) {
    let installed = Command::new("cargo")
        .args(["fuzz", "--version"])
        .output()
        .is_ok_and(|found| found.status.success());
    if !installed {
        steps.note("libfuzzer", "not run: cargo-fuzz is not installed");
        return;
    }
    let targets = match fuzz_targets(&crate::workspace_root()) {
        Ok(targets) => targets,
        Err(error) => return steps.check("libfuzzer", |_| Err(error)),
    };
    let seconds = (minutes * 60 / targets.len().max(1) as u64).max(1);
    for target in &targets {
        // What is found lies in fuzz/artifacts. New entries go into a corpus that Git does not know.
        let corpus = steps.target_directory().join("urus-fuzz").join(target);
        if let Err(error) = std::fs::create_dir_all(&corpus) {
            steps.check("libfuzzer", |_| {
                Err(format!("{}: {error}", corpus.display()))
            });
            return;
        }
        let mut run = steps.cargo_command(&["fuzz", "run", "--sanitizer", "none", target]);
        run.arg(&corpus)
            .arg(format!("fuzz/corpus/{target}"))
            .arg("--")
            .args(["-rss_limit_mb=1024", "-malloc_limit_mb=256", "-timeout=10"])
            .arg("-max_len=1024")
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-seed={seed}"))
            // The instrumentation needs no nightly compiler, only its permission.
            .env("RUSTC_BOOTSTRAP", "1");
        steps.run(&format!("libfuzzer {target}"), run);
    }
}

/// The targets that cargo-fuzz has, by their files.
fn fuzz_targets(root: &Path) -> Result<Vec<String>, String> {
    let directory = root.join("fuzz/fuzz_targets");
    let told = |error| format!("{}: {error}", directory.display());
    let mut targets = Vec::new();
    for entry in std::fs::read_dir(&directory).map_err(told)? {
        let path = entry.map_err(told)?.path();
        targets.extend(
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned()),
        );
    }
    targets.sort();
    Ok(targets)
}

impl Part {
    /// Runs it in small, or (in soak) for so many minutes from a seed.
    fn run(&self, steps: &mut Steps, long: Option<(u64, u64)>) {
        let told = long.map(|(minutes, seed)| (minutes.to_string(), seed.to_string()));
        let budget: Option<[&str; 4]> = told
            .as_ref()
            .map(|(minutes, seed)| ["--minutes", minutes, "--seed", seed]);
        let or = |small: &&'static [&'static str]| -> Vec<&str> {
            budget.map_or_else(|| small.to_vec(), |budget| budget.to_vec())
        };
        match &self.means {
            Means::Simulator(small) => simulate(steps, self.name, &or(small)),
            Means::Proofs(small) => prove(steps, self.name, &or(small)),
            Means::Bench(small) => match long {
                None => bench(steps, self.name, small),
                Some((minutes, _)) => {
                    // The bounds are met or not within a minute; what grows takes its time.
                    bench(
                        steps,
                        self.name,
                        &["--only", "mapped,huge", "--seconds", "60"],
                    );
                    let seconds = (minutes * 60).to_string();
                    bench(
                        steps,
                        self.name,
                        &["--only", "uptime", "--seconds", &seconds],
                    );
                }
            },
            Means::Fuzz(small) => match long {
                None => fuzz(steps, small),
                Some((minutes, seed)) => {
                    // Half of its time without libFuzzer, half with it.
                    let (half, seed) = (minutes.div_ceil(2), seed.to_string());
                    fuzz(steps, &["--minutes", &half.to_string(), "--seed", &seed]);
                    libfuzzer(steps, half, &seed);
                }
            },
            Means::Branches => {
                if let Some((minutes, seed)) = long {
                    branches::run(steps, minutes, seed);
                }
            }
            Means::Mutants => {
                if let Some((minutes, seed)) = long {
                    mutants::run(steps, minutes, seed);
                }
            }
            Means::Service => {
                if long.is_some() {
                    service::run(steps);
                }
            }
            Means::Test {
                arguments,
                variable,
                small,
                long: more,
            } => {
                let mut command = steps.cargo_command(arguments);
                command.env(variable, if budget.is_some() { more } else { small });
                steps.run(self.name, command);
            }
        }
    }
}

/// Every part, as far as CI's time allows. The program is built and the packages are there: the tests ran before.
pub(crate) fn small(steps: &mut Steps) {
    for part in PARTS {
        part.run(steps, None);
    }
}

/// The parts asked for, sharing the time. (The tests take what they take.)
pub(crate) fn soak(steps: &mut Steps, options: &SoakOptions) {
    let chosen: Vec<&Part> = PARTS
        .iter()
        .filter(|part| options.part.as_ref().is_none_or(|name| name == part.name))
        .collect();
    if chosen.iter().any(|part| {
        matches!(
            part.means,
            Means::Proofs(_) | Means::Bench(_) | Means::Service
        )
    }) {
        steps.check("packages", packages::install);
        steps.cargo(
            "build the program",
            &["build", "--locked", "-p", "urus-cli"],
        );
        if steps.failed() {
            return;
        }
    }
    let minutes = (options.minutes / chosen.len() as u64).max(1);
    for part in chosen {
        part.run(steps, Some((minutes, options.seed)));
    }
}
