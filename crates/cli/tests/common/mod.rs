//! Runs programs in a directory of their own. A program that is missing is a failure, never a skip.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A directory for one test, gone at its end.
pub(crate) struct Scratch {
    dir: tempfile::TempDir,
}

/// What a program did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("urus-cli-")
            .tempdir()
            .expect("a directory");
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, program: impl AsRef<Path>, line: &str) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .current_dir(self.dir.path())
            .env("LC_ALL", "C.UTF-8")
            .args(words(line));
        command
    }

    pub(crate) fn run(&self, program: impl AsRef<Path>, line: &str) -> Ran {
        let program = program.as_ref();
        let Output {
            status,
            stdout,
            stderr,
        } = self
            .command(program, line)
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let ran = Ran {
            code: status.code(),
            stdout: String::from_utf8(stdout).expect("text"),
            stderr: String::from_utf8(stderr).expect("text"),
        };
        assert!(!ran.stderr.contains("panicked"), "{line}: {ran:?}");
        ran
    }

    pub(crate) fn urus(&self, line: &str) -> Ran {
        self.run(urus(), line)
    }

    pub(crate) fn qemu_img(&self, line: &str) -> Ran {
        self.run("qemu-img", line)
    }

    /// Runs a shell line that must succeed.
    pub(crate) fn sh(&self, line: &str) {
        let output = Command::new("sh")
            .current_dir(self.dir.path())
            .args(["-e", "-c", line])
            .output()
            .expect("a shell");
        assert!(output.status.success(), "{line}: {output:?}");
    }

    /// Changes bytes of a file.
    pub(crate) fn poke(&self, name: &str, offset: usize, bytes: &[u8]) {
        let path = self.path(name);
        let mut content = fs::read(&path).expect("a file");
        content[offset..offset + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, content).expect("writing");
    }
}

pub(crate) fn urus() -> &'static str {
    env!("CARGO_BIN_EXE_urus")
}

/// Splits at spaces; 'single quotes' keep them.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in line.split('\'').enumerate() {
        if index % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}

/// `urus serve` that has said that it is ready.
pub(crate) struct Server(pub(crate) Child);

impl Server {
    pub(crate) fn start(scratch: &Scratch, line: &str) -> Self {
        let mut child = scratch
            .command(urus(), &format!("-v serve {line}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("urus");
        let mut lines = BufReader::new(child.stdout.as_mut().expect("piped")).lines();
        assert!(lines.any(|line| line.expect("text").contains("Ctrl-C")));
        Self(child)
    }

    /// SIGTERM; it must end well. Its log.
    pub(crate) fn end(mut self) -> String {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("a living server");
        let status = self.0.wait().expect("waiting");
        let mut log = String::new();
        let stderr = self.0.stderr.as_mut().expect("piped");
        stderr.read_to_string(&mut log).expect("text");
        assert_eq!(status.code(), Some(0), "{log}");
        log
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
