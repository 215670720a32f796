//! The proofs on the real daemon and real files: kill -9, QEMU beside it, full disks, disks with large sectors.
//!
//! `urus-proofs [--part kill|qemu|space|blocks]... [--seed S] [--rounds N] [--minutes M] [--io io_uring|blocking]
//! [--plan NAME]`
//!
//! Prints a line for each part, and exits with 1 where something is wrong. The seed decides the images, the requests and
//! the moments in requests answered; threads and the disk decide the rest, so a violation shows again within some rounds,
//! not at once. The image it was seen on is kept.

mod against_qemu;
mod campaign;
mod kill;
mod space;
mod tally;

use std::process::ExitCode;
use std::time::Duration;

use urus_sim::runner::panic_text;
use urus_tests::Driver;

use tally::{Budget, Tally};

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Arguments {
    parts: Vec<String>,
    pub(crate) seed: u64,
    rounds: Option<u64>,
    pub(crate) minutes: Option<f64>,
    /// Only this driver, else both in turn.
    driver: Option<Driver>,
    /// Only the image of this name.
    pub(crate) plan: Option<String>,
}

impl Arguments {
    pub(crate) fn budget(&self, rounds: u64) -> Budget {
        let time = |minutes: f64| Duration::from_secs_f64(minutes * 60.0);
        Budget {
            rounds: match (self.rounds, self.minutes) {
                (Some(rounds), _) => rounds,
                (None, Some(_)) => u64::MAX,
                (None, None) => rounds,
            },
            time: self.minutes.map_or(Duration::MAX, time),
        }
    }

    /// The drivers take turns.
    pub(crate) fn driver(&self, turn: u64) -> Driver {
        self.driver
            .unwrap_or(Driver::ALL[usize::from(!turn.is_multiple_of(2))])
    }
}

type Part = fn(&Arguments) -> Tally;
const PARTS: [(&str, Part); 4] = [
    ("kill", kill::on_files),
    ("qemu", against_qemu::run),
    ("space", space::run),
    ("blocks", kill::on_large_sectors),
];

fn arguments() -> Result<Arguments, String> {
    let mut arguments = Arguments {
        parts: Vec::new(),
        seed: 1,
        rounds: None,
        minutes: None,
        driver: None,
        plan: None,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        let wrong = || format!("{name} {value}: not understood");
        match name.as_str() {
            "--part" if PARTS.iter().any(|(known, _)| *known == value) => {
                arguments.parts.push(value)
            }
            "--seed" => arguments.seed = value.parse().map_err(|_| wrong())?,
            "--rounds" => arguments.rounds = Some(value.parse().map_err(|_| wrong())?),
            "--minutes" => arguments.minutes = Some(value.parse().map_err(|_| wrong())?),
            "--plan" => arguments.plan = Some(value),
            "--io" => {
                let driver = Driver::ALL
                    .into_iter()
                    .find(|driver| driver.name() == value);
                arguments.driver = Some(driver.ok_or_else(wrong)?);
            }
            _ => return Err(wrong()),
        }
    }
    Ok(arguments)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("urus-proofs: {error}");
            return ExitCode::from(2);
        }
    };
    // What a helper finds wrong comes as a panic, becomes a violation, and is printed with the others.
    std::panic::set_hook(Box::new(|_| {}));
    let mut sound = true;
    for (name, part) in PARTS {
        if !arguments.parts.is_empty() && !arguments.parts.iter().any(|part| part == name) {
            continue;
        }
        let tally = match std::panic::catch_unwind(|| part(&arguments)) {
            Ok(tally) => tally,
            Err(panic) => {
                // Its surroundings are not as it needs them.
                eprintln!("urus-proofs: {name}: {}", panic_text(&*panic));
                return ExitCode::from(2);
            }
        };
        println!("{tally}");
        for violation in &tally.violations {
            println!("  VIOLATION: {violation}");
        }
        sound &= tally.violations.is_empty();
    }
    if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
