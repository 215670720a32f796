//! QEMU's tools as the second opinion.

use crate::program::{Finished, Program, program};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// qemu-img with a subcommand and more, written as one line.
#[must_use]
pub fn img(line: &str) -> Program {
    program("qemu-img")
        .words(line)
        .limit(Duration::from_secs(240))
}

/// A new qcow2 image. `options` is what `-o` takes, or empty.
pub fn create(image: &Path, options: &str, size_bytes: u64) {
    let command = img("create -q -f qcow2");
    let command = if options.is_empty() {
        command
    } else {
        command.arg("-o").arg(options)
    };
    command.arg(image).arg(size_bytes.to_string()).ok();
}

/// A new qcow2 image over `backing`, a name that is relative to the directory of `image`.
pub fn create_overlay(image: &Path, options: &str, backing: &str, backing_format: &str) {
    let command = img("create -q -f qcow2 -F")
        .arg(backing_format)
        .arg("-b")
        .arg(backing);
    let command = if options.is_empty() {
        command
    } else {
        command.arg("-o").arg(options)
    };
    command.arg(image).ok();
}

/// qemu-io on `target`: the commands in order, each of which must succeed.
///
/// # Panics
/// When one does not.
pub fn io<C: AsRef<str>>(format: &str, target: &str, commands: &[C]) -> Finished {
    let finished = io_program(format, target, commands).ok();
    let said = finished.everything();
    assert!(!said.contains("failed"), "{finished}");
    finished
}

/// The same, not yet run.
#[must_use]
pub fn io_program<C: AsRef<str>>(format: &str, target: &str, commands: &[C]) -> Program {
    // -d unmap: else qemu-io swallows discards.
    let program = program("qemu-io").words("-d unmap -f").arg(format);
    commands
        .iter()
        .fold(program, |program, command| {
            program.arg("-c").arg(command.as_ref())
        })
        .arg(target)
}

/// qemu-io on an image file.
pub fn io_file<C: AsRef<str>>(image: &Path, commands: &[C]) -> Finished {
    io("qcow2", &image.display().to_string(), commands)
}

/// `qemu-img check` must find nothing at all: neither errors nor leaks.
pub fn assert_clean(image: &Path) {
    img("check -f qcow2").arg(image).ok();
}

/// `qemu-img check` must find no errors. Leaks are allowed: after a kill they cost space, not data.
///
/// # Panics
/// When it finds errors.
pub fn assert_no_errors(image: &Path) {
    let finished = img("check -f qcow2").arg(image).run();
    assert!(matches!(finished.status.code(), Some(0 | 3)), "{finished}");
}

/// `qemu-img info` as JSON.
#[must_use]
pub fn info(image: &Path) -> Value {
    img("info --output=json -f qcow2").arg(image).ok().json()
}

/// `qemu-img map` as JSON.
#[must_use]
pub fn map(image: &Path) -> Value {
    img("map --output=json -f qcow2").arg(image).ok().json()
}

/// Reads `image` with QEMU into the raw file `raw`.
pub fn convert_to_raw(image: &Path, raw: &Path) {
    img("convert -f qcow2 -O raw").arg(image).arg(raw).ok();
}

/// `image`, read by QEMU, must hold exactly what the raw file `raw` holds.
///
/// # Panics
/// When it does not, or when the sizes differ.
pub fn assert_reads_as(image: &Path, raw: &Path) {
    let size = std::fs::metadata(raw).expect("a raw copy").len();
    assert_eq!(
        info(image)["virtual-size"],
        size,
        "size of {} and its copy",
        image.display()
    );
    // Not strict mode: that would also ask for equal holes.
    img("compare -f qcow2 -F raw").arg(image).arg(raw).ok();
}
