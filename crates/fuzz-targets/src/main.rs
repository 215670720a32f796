//! Runs the targets without libFuzzer and prints what it saw.
//!
//! `urus-fuzz [--target NAME|all] [--seed S] [--inputs N | --minutes M | --replay true] [--corpus DIR] [--input FILE]`
//!
//! Each target first gets its corpus, then inputs made from the seed; `--replay` stops after the corpus, `--input` runs
//! one file. Each target runs in a process of its own, where memory and time of every input are limited. It exits with 1
//! where something is wrong.
#![forbid(unsafe_code)]

mod worker;

use std::alloc::System;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use cap::Cap;
use urus_fuzz_targets::{TARGETS, Target, find};

/// Counts what is allocated, and gives no more than is allowed.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

struct Arguments {
    targets: Vec<Target>,
    seed: u64,
    inputs: u64,
    minutes: Option<f64>,
    corpus: PathBuf,
    input: Option<PathBuf>,
    /// This is the process of one target.
    worker: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut arguments = Arguments {
        targets: TARGETS.to_vec(),
        seed: 1,
        inputs: 2_000,
        minutes: None,
        corpus: PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus")),
        input: None,
        worker: false,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        let wrong = || format!("{name} {value}: not understood");
        match name.as_str() {
            "--target" if value == "all" => {}
            "--target" => {
                let target = find(&value).ok_or_else(|| format!("no target is called {value}"))?;
                arguments.targets = vec![target];
            }
            "--seed" => arguments.seed = value.parse().map_err(|_| wrong())?,
            "--inputs" => arguments.inputs = value.replace('_', "").parse().map_err(|_| wrong())?,
            "--minutes" => arguments.minutes = Some(value.parse().map_err(|_| wrong())?),
            "--replay" => arguments.inputs = 0,
            "--corpus" => arguments.corpus = value.into(),
            "--input" => arguments.input = Some(value.into()),
            "--worker" => arguments.worker = true,
            _ => return Err(format!("{name}: not understood")),
        }
    }
    Ok(arguments)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("urus-fuzz: {error}");
            return ExitCode::from(2);
        }
    };
    if arguments.worker {
        return worker::run(&arguments);
    }
    println!("{}", worker::Tally::head());
    let mut sound = true;
    for target in &arguments.targets {
        sound &= in_a_process(&arguments, target);
    }
    if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs one target; whatever becomes of its process, this one can tell.
fn in_a_process(arguments: &Arguments, target: &Target) -> bool {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            eprintln!("urus-fuzz: this program's own path: {error}");
            return false;
        }
    };
    let mut command = Command::new(program);
    command
        .args(["--worker", "true", "--target", target.name])
        .args(["--seed", &arguments.seed.to_string()])
        .args(["--inputs", &arguments.inputs.to_string()])
        .arg("--corpus")
        .arg(&arguments.corpus);
    if let Some(minutes) = arguments.minutes {
        // They share the time.
        let all: u32 = arguments.targets.iter().map(|target| target.share).sum();
        let own = minutes * f64::from(target.share) / f64::from(all);
        command.args(["--minutes", &own.to_string()]);
    }
    if let Some(input) = &arguments.input {
        command.arg("--input").arg(input);
    }
    let status = match command.status() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("urus-fuzz: {}: {error}", target.name);
            return false;
        }
    };
    if status.success() {
        return true;
    }
    if status.code() != Some(1) {
        println!(
            "fuzz {}: the process ended with {status}; the input is in {}",
            target.name,
            worker::last_input(target.name).display()
        );
    }
    false
}
