//! The examples do what they say.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Scratch, make, qemu_img, text};

/// Runs an example: as it was built together with this test, where it was (to build it alone is to build all that it needs anew,
/// with other features).
fn example(name: &str, args: &[&Path]) {
    let this = std::env::current_exe().expect("this program");
    let built = this
        .ancestors()
        .nth(2)
        .expect("deps")
        .join("examples")
        .join(name);
    let mut command = if is_as_new(&built, &this) {
        Command::new(built)
    } else {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "run",
            "--quiet",
            "--package",
            "urus",
            "--example",
            name,
            "--",
        ]);
        cargo
    };
    let status = command.args(args).status().expect("it runs");
    assert!(status.success(), "{name}: {status}");
}

/// Whether a program was built no more than an hour before another, or after it.
fn is_as_new(program: &Path, other: &Path) -> bool {
    let built = |path: &Path| std::fs::metadata(path).and_then(|found| found.modified());
    match (built(program), built(other)) {
        (Ok(program), Ok(other)) => program + std::time::Duration::from_secs(3600) >= other,
        _ => false,
    }
}

#[test]
fn copy() {
    let scratch = Scratch::new();
    let source = scratch.path("source.raw");
    let mut bytes = vec![0; 9 << 20];
    bytes[5 << 20..6 << 20].fill(7);
    bytes[123] = 1;
    std::fs::write(&source, &bytes).unwrap();
    let image = scratch.path("disk.qcow2");
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        text(&source),
        text(&image),
    ]);
    let target = scratch.path("target.raw");
    example("copy", &[&image, &target]);
    assert!(std::fs::read(target).unwrap() == bytes);
}

#[test]
fn epoll_loop() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    make(&image, "64M", &[]);
    example("epoll_loop", &[&image]);
    qemu_img(&["check", "-q", text(&image)]);
    let map = qemu_img(&["map", "--output=json", text(&image)]);
    assert!(map.contains("\"data\": true"), "{map}");
}
