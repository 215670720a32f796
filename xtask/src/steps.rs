//! Running steps one after the other, and the table at the end.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How it all ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    Failed,
}

struct Step {
    name: String,
    time: Duration,
    passed: bool,
    /// Why it was not done at all.
    note: Option<&'static str>,
}

/// The steps of one command.
pub(crate) struct Steps {
    root: PathBuf,
    done: Vec<Step>,
}

impl Steps {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            done: Vec::new(),
        }
    }

    /// The directory that cargo builds into.
    pub(crate) fn target_directory(&self) -> PathBuf {
        match std::env::var_os("CARGO_TARGET_DIR") {
            Some(directory) => self.root.join(directory),
            None => self.root.join("target"),
        }
    }

    pub(crate) fn cargo_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(arguments).current_dir(&self.root);
        command
    }

    pub(crate) fn cargo(&mut self, name: &str, arguments: &[&str]) {
        let command = self.cargo_command(arguments);
        self.run(name, command);
    }

    pub(crate) fn run(&mut self, name: &str, mut command: Command) {
        self.step(name, |_| match command.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{command:?} ended with {status}")),
            Err(error) => Err(format!("{command:?} did not start: {error}")),
        });
    }

    /// A step of our own.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce(&Path) -> Result<(), String>) {
        self.step(name, check);
    }

    fn step(&mut self, name: &str, work: impl FnOnce(&Path) -> Result<(), String>) {
        println!("== {name}");
        let start = Instant::now();
        let result = work(&self.root);
        if let Err(message) = &result {
            eprintln!("xtask: {name}: {message}");
        }
        self.done.push(Step {
            name: name.to_owned(),
            time: start.elapsed(),
            passed: result.is_ok(),
            note: None,
        });
    }

    /// Something that cannot be done on this machine: the table says so.
    pub(crate) fn note(&mut self, name: &str, note: &'static str) {
        self.done.push(Step {
            name: name.to_owned(),
            time: Duration::ZERO,
            passed: true,
            note: Some(note),
        });
    }

    pub(crate) fn failed(&self) -> bool {
        self.done.iter().any(|step| !step.passed)
    }

    /// Prints the table.
    pub(crate) fn finish(self) -> Outcome {
        println!("\n{:<28} {:>8}  result", "step", "seconds");
        for step in &self.done {
            let result = step
                .note
                .unwrap_or(if step.passed { "ok" } else { "FAILED" });
            println!(
                "{:<28} {:>8.1}  {result}",
                step.name,
                step.time.as_secs_f64()
            );
        }
        if self.failed() {
            Outcome::Failed
        } else {
            Outcome::Passed
        }
    }
}

/// What a command prints, where it succeeds.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?} did not start: {error}"))?;
    if !output.status.success() {
        let fault = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} ended with {}: {fault}", output.status));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{command:?}: {error}"))
}
