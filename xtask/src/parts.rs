//! The proofs: each part in small for CI, and for as long as told in `soak`.

use crate::steps::Steps;

/// A part: a run of the simulator.
struct Part {
    name: &'static str,
    /// Its budget in CI.
    small: &'static [&'static str],
}

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

/// Every part, as far as CI's time allows.
pub(crate) fn small(steps: &mut Steps) {
    for part in PARTS {
        simulate(steps, part.name, part.small);
    }
}

/// The parts asked for, sharing the time.
pub(crate) fn soak(steps: &mut Steps, options: &SoakOptions) {
    let chosen: Vec<&Part> = PARTS
        .iter()
        .filter(|part| options.part.as_ref().is_none_or(|name| name == part.name))
        .collect();
    let minutes = (options.minutes / chosen.len() as u64).max(1).to_string();
    let seed = options.seed.to_string();
    for part in chosen {
        simulate(steps, part.name, &["--minutes", &minutes, "--seed", &seed]);
    }
}
