//! The proofs: each part in small for CI, and for as long as told in `soak`.

use std::process::Command;

use crate::steps::Steps;

/// A part: a run of the simulator, or of the fuzz targets.
struct Part {
    name: &'static str,
    /// Its budget in CI.
    small: &'static [&'static str],
}

/// The part that is no simulation.
const FUZZ: &str = "fuzz";

const PARTS: &[Part] = &[
    Part {
        name: "cuts",
        small: &["--states", "1000000"],
    },
    Part {
        name: "sequences",
        small: &["--states", "1000000"],
    },
    Part {
        name: "errors",
        small: &["--states", "150000"],
    },
    Part {
        name: "model",
        small: &["--states", "40000"],
    },
    Part {
        name: "plants",
        small: &[],
    },
    Part {
        name: "trace",
        small: &[],
    },
    Part {
        name: FUZZ,
        small: &["--minutes", "0.8"],
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
    let seconds = (minutes * 60 / FUZZ_TARGETS.len() as u64).max(1);
    for target in FUZZ_TARGETS {
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

/// As crates/fuzz-targets names them.
const FUZZ_TARGETS: [&str; 9] = [
    "header",
    "tables",
    "compressed",
    "snapshots",
    "bitmaps",
    "check",
    "operate",
    "chain",
    "nbd",
];

/// Every part, as far as CI's time allows.
pub(crate) fn small(steps: &mut Steps) {
    for part in PARTS {
        if part.name == FUZZ {
            fuzz(steps, part.small);
        } else {
            simulate(steps, part.name, part.small);
        }
    }
}

/// The parts asked for, sharing the time.
pub(crate) fn soak(steps: &mut Steps, options: &SoakOptions) {
    let chosen: Vec<&Part> = PARTS
        .iter()
        .filter(|part| options.part.as_ref().is_none_or(|name| name == part.name))
        .collect();
    let share = (options.minutes / chosen.len() as u64).max(1);
    let (minutes, seed) = (share.to_string(), options.seed.to_string());
    for part in chosen {
        if part.name == FUZZ {
            // Half of its time without libFuzzer, half with it.
            let half = share.div_ceil(2);
            fuzz(steps, &["--minutes", &half.to_string(), "--seed", &seed]);
            libfuzzer(steps, half, &seed);
        } else {
            simulate(steps, part.name, &["--minutes", &minutes, "--seed", &seed]);
        }
    }
}
