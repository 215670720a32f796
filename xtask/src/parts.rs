//! The proofs: each part in small for CI, and for as long as told in `soak`.

use crate::leftovers;
use crate::packages;
use crate::steps::Steps;

/// Who runs a part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Runner {
    /// The simulator.
    Simulator,
    /// `urus-proofs`, with the real program, real files and, for some, loop devices and mounts.
    Proofs,
}

/// A part of the proofs.
struct Part {
    name: &'static str,
    runner: Runner,
    /// Its budget in CI.
    small: &'static [&'static str],
}

const PARTS: &[Part] = &[
    Part {
        name: "cuts",
        runner: Runner::Simulator,
        small: &["--states", "1000000"],
    },
    Part {
        name: "sequences",
        runner: Runner::Simulator,
        small: &["--states", "1000000"],
    },
    Part {
        name: "errors",
        runner: Runner::Simulator,
        small: &["--states", "150000"],
    },
    Part {
        name: "model",
        runner: Runner::Simulator,
        small: &["--states", "40000"],
    },
    Part {
        name: "plants",
        runner: Runner::Simulator,
        small: &[],
    },
    Part {
        name: "trace",
        runner: Runner::Simulator,
        small: &[],
    },
    Part {
        name: "kill",
        runner: Runner::Proofs,
        small: &["--rounds", "60"],
    },
    Part {
        name: "qemu",
        runner: Runner::Proofs,
        small: &["--rounds", "100"],
    },
    Part {
        name: "space",
        runner: Runner::Proofs,
        small: &["--rounds", "18"],
    },
    Part {
        name: "blocks",
        runner: Runner::Proofs,
        small: &["--rounds", "27"],
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

fn run(steps: &mut Steps, part: &Part, arguments: &[&str]) {
    match part.runner {
        Runner::Simulator => simulate(steps, part.name, arguments),
        Runner::Proofs => prove(steps, part.name, arguments),
    }
}

/// Every part, as far as CI's time allows. The program is built and the packages are there: the tests ran before.
pub(crate) fn small(steps: &mut Steps) {
    for part in PARTS {
        run(steps, part, part.small);
    }
}

/// The parts asked for, sharing the time.
pub(crate) fn soak(steps: &mut Steps, options: &SoakOptions) {
    let chosen: Vec<&Part> = PARTS
        .iter()
        .filter(|part| options.part.as_ref().is_none_or(|name| name == part.name))
        .collect();
    if chosen.iter().any(|part| part.runner == Runner::Proofs) {
        steps.check("packages", packages::install);
        steps.cargo(
            "build the program",
            &["build", "--locked", "-p", "urus-cli"],
        );
        if steps.failed() {
            return;
        }
    }
    let minutes = (options.minutes / chosen.len() as u64).max(1).to_string();
    let seed = options.seed.to_string();
    for part in chosen {
        run(steps, part, &["--minutes", &minutes, "--seed", &seed]);
    }
}
