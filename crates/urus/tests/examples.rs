//! The examples do what they say.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Scratch, make, qemu_img, text};

fn example(name: &str, args: &[&Path]) {
    let status = Command::new(env!("CARGO"))
        .args([
            "run",
            "--quiet",
            "--package",
            "urus",
            "--example",
            name,
            "--",
        ])
        .args(args)
        .status()
        .expect("cargo runs");
    assert!(status.success(), "{name}: {status}");
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
