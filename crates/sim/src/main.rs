//! Runs the simulator and prints what it saw.
//!
//! `urus-sim [--part cuts|sequences|errors|model|plants|trace]... [--seed S] [--states N] [--minutes M] [--threads T]
//! [--config NAME|NUMBER] [--plant NAME] [--hunts N | --by-config] [--qemu N] [--cuts N] [--injections N] [--exact SEED [--inject K]]`
//!
//! One state in `--qemu` (1000) after a cut goes through qemu-img too; 0: none. Without `--part` it runs all parts, each with the budget of `--states`. It exits with 1 where something is wrong.

use std::process::ExitCode;
use std::time::Duration;

use urus_engine::planted::Bug;
use urus_engine::seen::Way;
use urus_sim::config::{self, Config};
use urus_sim::qemu;
use urus_sim::runner::{Effort, quiet_panics, run};
use urus_sim::sweep::{self, Budget, Part, Tally};

struct Arguments {
    parts: Vec<String>,
    seed: u64,
    states: u64,
    minutes: Option<f64>,
    threads: usize,
    config: Option<Config>,
    plant: Option<Bug>,
    hunts: u64,
    by_config: bool,
    qemu: u64,
    cuts: u64,
    injections: Option<usize>,
    exact: Option<u64>,
    inject: Option<usize>,
}

fn arguments() -> Result<Arguments, String> {
    let mut arguments = Arguments {
        parts: Vec::new(),
        seed: 1,
        states: 50_000,
        minutes: None,
        threads: std::thread::available_parallelism().map_or(2, usize::from),
        config: None,
        plant: None,
        hunts: 3,
        by_config: false,
        qemu: 1000,
        cuts: Effort::QUICK.cuts,
        injections: None,
        exact: None,
        inject: None,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        if name == "--by-config" {
            arguments.by_config = true;
            continue;
        }
        let value = given
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        let wrong = || format!("{name} {value}: not understood");
        match name.as_str() {
            "--part" => arguments.parts.push(value.clone()),
            "--seed" => arguments.seed = value.parse().map_err(|_| wrong())?,
            "--states" => arguments.states = value.replace('_', "").parse().map_err(|_| wrong())?,
            "--minutes" => arguments.minutes = Some(value.parse().map_err(|_| wrong())?),
            "--threads" => arguments.threads = value.parse().map_err(|_| wrong())?,
            "--qemu" => arguments.qemu = value.parse().map_err(|_| wrong())?,
            "--cuts" => arguments.cuts = value.parse().map_err(|_| wrong())?,
            "--injections" => arguments.injections = Some(value.parse().map_err(|_| wrong())?),
            "--hunts" => arguments.hunts = value.parse().map_err(|_| wrong())?,
            "--exact" => arguments.exact = Some(value.parse().map_err(|_| wrong())?),
            "--inject" => arguments.inject = Some(value.parse().map_err(|_| wrong())?),
            "--config" => arguments.config = Some(config::find(&value).ok_or_else(wrong)?),
            "--plant" => {
                let bug = Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == value);
                arguments.plant = Some(bug.ok_or_else(wrong)?);
            }
            _ => return Err(format!("{name}: not understood")),
        }
    }
    Ok(arguments)
}

const USAGE: &str = "\
urus-sim [--part cuts|sequences|errors|model|plants|trace]... [--seed S] [--states N | --minutes M] [--threads T]
         [--config NAME|NUMBER] [--plant NAME] [--hunts N | --by-config] [--qemu N] [--cuts N]
         [--injections N] [--exact SEED [--inject K]]

Without --part: all of them. A violation comes with the --exact (and --inject) that shows it again.
--qemu N: one in N states after a cut also goes through qemu-img; 0: none.
--cuts N: cut points of a workload (24); --injections N: so many of a workload's errors, by lot. Few of them show all configurations quickly.
--plant NAME: hunts one planted bug; --hunts: so often.
--by-config: hunts each planted bug in each configuration, up to --states in each, and says which configurations find it first.";

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("urus-sim: {error}");
            return ExitCode::from(2);
        }
    };
    if arguments.qemu > 0 && !qemu::is_installed() {
        eprintln!(
            "urus-sim: there is no qemu-img to ask about one state in {}: install qemu-utils, or say --qemu 0",
            arguments.qemu
        );
        return ExitCode::from(2);
    }
    quiet_panics();
    if let Some(seed) = arguments.exact {
        return again(&arguments, seed);
    }
    let wanted =
        |name: &str| arguments.parts.is_empty() || arguments.parts.iter().any(|part| part == name);
    let known = |part: &String| {
        ["plants", "trace"].contains(&part.as_str())
            || Part::ALL.iter().any(|known| known.name() == part)
    };
    if let Some(unknown) = arguments.parts.iter().find(|part| !known(part)) {
        eprintln!("urus-sim: --part {unknown}: there is none");
        return ExitCode::from(2);
    }
    let mut sound = true;
    println!("{}", Tally::head());
    for part in Part::ALL {
        if arguments.plant.is_none() && wanted(part.name()) {
            sound &= sweep_part(part, &arguments);
        }
    }
    if arguments.plant.is_none() && wanted("trace") {
        sound &= trace(&arguments);
    }
    if wanted("plants") || arguments.plant.is_some() {
        let bugs = arguments.plant.map_or(Bug::ALL.to_vec(), |bug| vec![bug]);
        if arguments.by_config {
            let budget = Budget {
                states: arguments.states,
                ..budget(&arguments)
            };
            sweep::hunt_by_config(&bugs, arguments.seed, &budget, &|line| println!("{line}"));
            return ExitCode::SUCCESS;
        }
        let (lines, all) = sweep::hunt_all(
            &bugs,
            arguments.seed,
            arguments.hunts,
            6000,
            arguments.threads,
        );
        lines.iter().for_each(|line| println!("{line}"));
        sound &= all;
    }
    if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn budget(arguments: &Arguments) -> Budget {
    Budget {
        states: arguments.minutes.map_or(arguments.states, |_| u64::MAX),
        time: arguments.minutes.map_or(Duration::MAX, |minutes| {
            Duration::from_secs_f64(minutes * 60.0)
        }),
        threads: arguments.threads,
        qemu: arguments.qemu,
        cuts: arguments.cuts,
        injections: arguments.injections,
    }
}

fn sweep_part(part: Part, arguments: &Arguments) -> bool {
    let budget = budget(arguments);
    let tally = sweep::run(part, arguments.seed, arguments.config.as_ref(), &budget);
    println!("{tally}");
    if !tally.census.is_empty() {
        println!("  {}", tally.census);
    }
    let missed: Vec<Way> = tally.ways.missed().collect();
    println!(
        "  {} of {} ways that only large images take; not taken: {missed:?}",
        Way::ALL.len() - missed.len(),
        Way::ALL.len()
    );
    for violation in &tally.violations {
        println!("  VIOLATION: {violation}");
    }
    tally.violations.is_empty()
}

/// One seed twice gives one trace, in every configuration.
fn trace(arguments: &Arguments) -> bool {
    let effort = Effort {
        cuts: 2,
        ..Effort::QUICK
    };
    let differs = |config: &Config| {
        run(config, arguments.seed, &effort).trace != run(config, arguments.seed, &effort).trace
    };
    let configs = config::all();
    let different: Vec<&str> = configs
        .iter()
        .filter(|c| differs(c))
        .map(|c| c.name)
        .collect();
    println!(
        "{:<28} {:>9} runs, twice each: {} differ {different:?}",
        "trace",
        configs.len(),
        different.len()
    );
    different.is_empty()
}

fn again(arguments: &Arguments, seed: u64) -> ExitCode {
    let name = arguments.parts.first().map_or("cuts", String::as_str);
    let part = Part::ALL.into_iter().find(|part| part.name() == name);
    let (Some(part), Some(config)) = (part, &arguments.config) else {
        eprintln!("urus-sim: --exact goes with --part and --config");
        return ExitCode::from(2);
    };
    if let Some(bug) = arguments.plant {
        urus_engine::planted::plant(bug);
    }
    let outcome = sweep::exact(part, config, seed, arguments.inject);
    match &outcome.violation {
        Some(violation) => {
            println!("{}: {violation}", config.name);
            ExitCode::FAILURE
        }
        None => {
            println!("{}: {} states, nothing wrong", config.name, outcome.states);
            ExitCode::SUCCESS
        }
    }
}
