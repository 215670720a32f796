//! Developer commands: `cargo xtask test|ci|instructions|soak|tidy`. One command is CI; the README's test command is part of it.

mod branches;
mod instructions;
mod judges;
mod leftovers;
mod licences;
mod mutants;
mod packages;
mod parts;
mod service;
mod spdx;
mod steps;
mod survivors;
mod tidy;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use steps::{Outcome, Steps};

const USAGE: &str = "\
cargo xtask test                    installs what the tests need (as root), runs every test
cargo xtask ci                      format, clippy, tests, documentation, licences, simulation: what CI runs
cargo xtask tidy                    the tree's own rules
cargo xtask instructions [--write]  counts the instructions of a hit (callgrind), and compares them with what they were
cargo xtask soak [--minutes N] [--part NAME] [--seed S]
                                    the proofs of docs/RELIABILITY.md, for as long as told";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut steps = Steps::new(workspace_root());
    match words.as_slice() {
        ["test"] => test(&mut steps),
        ["ci"] => ci(&mut steps),
        ["tidy"] => steps.check("tidy", tidy::check),
        ["instructions"] => instructions::run(&mut steps, false),
        ["instructions", "--write"] => instructions::run(&mut steps, true),
        ["soak", options @ ..] => match parts::SoakOptions::parse(options) {
            Ok(options) => parts::soak(&mut steps, &options),
            Err(message) => {
                eprintln!("xtask: {message}\n\n{USAGE}");
                return ExitCode::from(2);
            }
        },
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    match steps.finish() {
        Outcome::Passed => ExitCode::SUCCESS,
        Outcome::Failed => ExitCode::FAILURE,
    }
}

fn workspace_root() -> PathBuf {
    // This crate lies one level below the root.
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}

/// The README's test command.
fn test(steps: &mut Steps) {
    steps.check("packages", packages::install);
    if steps.failed() {
        return;
    }
    steps.cargo(
        "build the program",
        &["build", "--locked", "-p", "urus-cli"],
    );
    if steps.failed() {
        return;
    }
    let program = steps.target_directory().join("debug").join("urus");
    let scratch = steps.target_directory().join("urus-scratch");
    steps.check("room for the tests", |_| leftovers::make_room(&scratch));
    if steps.failed() {
        return;
    }
    let nextest = Command::new("cargo")
        .args(["nextest", "--version"])
        .output()
        .is_ok_and(|found| found.status.success());
    let mut run = steps.cargo_command(if nextest {
        &["nextest", "run", "--locked", "--workspace"]
    } else {
        &[
            "test",
            "--locked",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "--examples",
        ]
    });
    run.env("URUS_BIN", program);
    steps.run("tests", run);
    leftovers::clean(&scratch);
    steps.cargo(
        "documentation tests",
        &["test", "--locked", "--workspace", "--doc", "--quiet"],
    );
}

/// What CI runs.
fn ci(steps: &mut Steps) {
    steps.cargo("format", &["fmt", "--all", "--check"]);
    steps.check("tidy", tidy::check);
    steps.check("licences", licences::check);
    steps.cargo(
        "clippy",
        &[
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
    );
    test(steps);
    instructions::run(steps, false);
    parts::small(steps);
    let mut documentation =
        steps.cargo_command(&["doc", "--locked", "--workspace", "--no-deps", "--quiet"]);
    documentation.env("RUSTDOCFLAGS", "-D warnings");
    steps.run("documentation", documentation);
}
