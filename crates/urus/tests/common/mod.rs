//! Helpers of the facade's tests: scratch directories, the real qemu-img and qemu-io.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use urus::{Device, Error, OpenOptions};

/// A directory that goes with the test.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(&path).expect("a directory");
        path
    }
}

/// Runs `qemu-img`, which must succeed; returns what it says.
pub(crate) fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img is needed: install qemu-utils");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// Makes a qcow2 image of `size` bytes with further arguments, such as `-b base -F raw`.
pub(crate) fn make(path: &Path, size: &str, args: &[&str]) {
    let mut all = vec!["create", "-q", "-f", "qcow2"];
    all.extend(args);
    all.extend([text(path), size]);
    qemu_img(&all);
}

/// Makes a qcow2 overlay whose backing file is recorded as given, without looking at it.
pub(crate) fn overlay(path: &Path, backing: &str, format: Option<&str>) {
    let mut all = vec!["create", "-q", "-f", "qcow2", "-u", "-b", backing];
    // qemu-img insists on a format; it is taken out of the header afterwards.
    all.extend(["-F", format.unwrap_or("raw"), text(path), "1M"]);
    qemu_img(&all);
    if format.is_none() {
        forget_backing_format(path);
    }
}

/// Turns the backing format's header extension into one of unknown type.
fn forget_backing_format(path: &Path) {
    let mut bytes = std::fs::read(path).expect("the image");
    let at = bytes
        .windows(4)
        .position(|window| window == [0xe2, 0x79, 0x2a, 0xca])
        .expect("the backing format's extension");
    bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    std::fs::write(path, bytes).expect("the image");
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a name in UTF-8")
}

/// A `qemu-io` that holds an image open.
pub(crate) struct QemuIo {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl QemuIo {
    /// Opens the image with further arguments, such as `-r`, and waits until it is open.
    pub(crate) fn open(path: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .args(["-f", "qcow2", text(path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is needed: install qemu-utils");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut this = Self { child, output };
        this.command("length", |line| line.contains("iB"));
        this
    }

    /// Sends a command and reads until a line of the answer is the one waited for.
    pub(crate) fn command(&mut self, command: &str, mut is_last: impl FnMut(&str) -> bool) {
        let input = self.child.stdin.as_mut().expect("piped");
        writeln!(input, "{command}").expect("qemu-io listens");
        let mut line = String::new();
        loop {
            line.clear();
            let bytes = self.output.read_line(&mut line).expect("text");
            assert!(
                bytes > 0,
                "qemu-io has ended before it answered {command:?}"
            );
            if is_last(&line) {
                return;
            }
        }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        if let Some(mut input) = self.child.stdin.take() {
            let _ = writeln!(input, "quit");
        }
        let _ = self.child.wait();
    }
}

/// Whether `qemu-io` can open the image for writing right now.
pub(crate) fn qemu_can_write(path: &Path) -> bool {
    Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "length", text(path)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("qemu-io is needed: install qemu-utils")
        .success()
}

/// Opens an image, which must fail.
pub(crate) fn refuse(options: &OpenOptions, path: &Path) -> Error {
    match options.open(path) {
        Ok(device) => panic!("{device:?} should not have been opened"),
        Err(error) => error,
    }
}

/// Opens an image.
pub(crate) fn open(options: &OpenOptions, path: &Path) -> Device {
    options.open(path).unwrap_or_else(|error| panic!("{error}"))
}
