//! Images made by QEMU's tools, and QEMU's verdict on images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use super::{Image, check};
use crate::check::tests::memory::Memory;
use crate::check::{CheckReport, Repair};

/// What a check counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub(super) corruptions: u64,
    pub(super) leaks: u64,
    pub(super) check_errors: u64,
    pub(super) image_end_offset: u64,
    pub(super) total_clusters: u64,
    pub(super) allocated_clusters: u64,
    pub(super) fragmented_clusters: u64,
    pub(super) compressed_clusters: u64,
}

impl From<&CheckReport> for Numbers {
    fn from(report: &CheckReport) -> Self {
        Self {
            corruptions: report.corruptions,
            leaks: report.leaks,
            check_errors: report.check_errors,
            image_end_offset: report.image_end_offset,
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
        }
    }
}

/// QEMU's verdict.
#[derive(Clone, Debug)]
pub(super) struct Verdict {
    pub(super) numbers: Numbers,
    pub(super) corruptions_fixed: u64,
    pub(super) leaks_fixed: u64,
    pub(super) code: i32,
    pub(super) said: String,
}

/// A directory for one test's images.
pub(super) struct Directory(TempDir);

impl Directory {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A new image. `options` is what `-o` takes; `commands` are those of qemu-io.
    pub(super) fn make<C: AsRef<str>>(&self, options: &str, size: &str, commands: &[C]) -> Image {
        let path = self.path("new.qcow2");
        create(&path, options, size);
        io(&path, commands);
        Image {
            bytes: fs::read(path).expect("an image"),
        }
    }

    /// Has a tool work on an image.
    pub(super) fn with(&self, image: &Image, work: impl FnOnce(&Path)) -> Image {
        let path = self.path("work.qcow2");
        fs::write(&path, &image.bytes).expect("room for an image");
        work(&path);
        Image {
            bytes: fs::read(path).expect("an image"),
        }
    }

    /// `qemu-img check` of an image; with `repair` (`leaks`, `all`) the image is repaired in place.
    pub(super) fn qemu_check(&self, image: &mut Image, repair: Option<&str>) -> Verdict {
        let path = self.path("checked.qcow2");
        fs::write(&path, &image.bytes).expect("room for an image");
        let mut command = Command::new("qemu-img");
        command.args(["check", "-f", "qcow2", "--output=json"]);
        if let Some(repair) = repair {
            command.args(["-r", repair]);
        }
        let output = command
            .arg(&path)
            .output()
            .expect("these tests need `qemu-img` on the PATH");
        image.bytes = fs::read(&path).expect("an image");
        verdict(&output)
    }

    /// Both checks give the same numbers; returns ours.
    pub(super) fn assert_same(&self, image: &Image, what: &str) -> CheckReport {
        let report = check(&Memory::new(&image.bytes), Repair::None);
        let verdict = self.qemu_check(&mut image.clone(), None);
        assert_eq!(
            Numbers::from(&report),
            verdict.numbers,
            "{what}\nurus: {:#?}\nqemu: {}",
            &report.messages[..report.messages.len().min(10)],
            verdict.said
        );
        report
    }

    /// QEMU finds nothing at all.
    pub(super) fn assert_clean(&self, image: &Image, what: &str) {
        let verdict = self.qemu_check(&mut image.clone(), None);
        assert_eq!(verdict.code, 0, "{what}: {}", verdict.said);
        let header = image.header();
        assert_eq!(
            header.incompatible & 3,
            0,
            "{what}: neither dirty nor corrupt"
        );
    }
}

pub(super) fn create(path: &Path, options: &str, size: &str) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    succeed(command.arg(path).arg(size));
}

/// qemu-io's commands on an image.
pub(super) fn io<C: AsRef<str>>(path: &Path, commands: &[C]) {
    if commands.is_empty() {
        return;
    }
    let mut command = Command::new("qemu-io");
    command.args(["-d", "unmap", "-f", "qcow2"]);
    for one in commands {
        command.args(["-c", one.as_ref()]);
    }
    let said = succeed(command.arg(path));
    assert!(!said.contains("failed"), "{command:?}: {said}");
}

/// qemu-img with a subcommand.
pub(super) fn img(path: &Path, arguments: &[&str], last: &[&str]) {
    succeed(
        Command::new("qemu-img")
            .args(arguments)
            .arg(path)
            .args(last),
    );
}

fn succeed(command: &mut Command) -> String {
    let output = command
        .output()
        .expect("these tests need QEMU's tools on the PATH");
    let said = said(&output);
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    );
    said.lines().take(30).collect::<Vec<_>>().join("\n")
}

fn verdict(output: &Output) -> Verdict {
    let json = String::from_utf8_lossy(&output.stdout);
    let field = |name: &str| -> u64 {
        let key = format!("\"{name}\":");
        let Some((_, rest)) = json.split_once(&key) else {
            return 0;
        };
        let digits: String = rest
            .trim_start()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().expect("a number")
    };
    Verdict {
        numbers: Numbers {
            corruptions: field("corruptions"),
            leaks: field("leaks"),
            check_errors: field("check-errors"),
            image_end_offset: field("image-end-offset"),
            total_clusters: field("total-clusters"),
            allocated_clusters: field("allocated-clusters"),
            fragmented_clusters: field("fragmented-clusters"),
            compressed_clusters: field("compressed-clusters"),
        },
        corruptions_fixed: field("corruptions-fixed"),
        leaks_fixed: field("leaks-fixed"),
        code: output.status.code().unwrap_or(-1),
        said: said(output),
    }
}
