//! Images on block devices, which have an end, and may get another one while they are served. Guards against an end that is taken
//! once and for all, and against room on a device that is not found.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use urus_tests::mounted::Loop;
use urus_tests::program::Finished;
use urus_tests::served::Serve;
use urus_tests::{Driver, MIB, Scratch, Served, program, qemu, urus};

/// A loop device over a file of so many bytes.
fn device(scratch: &Scratch, bytes: u64) -> (PathBuf, Loop) {
    let file = scratch.file("device");
    set_length(&file, bytes);
    let attached = Loop::attach(&file);
    (file, attached)
}

fn set_length(file: &Path, bytes: u64) {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(file)
        .expect("the device's file");
    file.set_len(bytes).expect("its length");
}

/// What an administrator does to a volume that is in use.
fn enlarge(file: &Path, device: &Loop, bytes: u64) {
    set_length(file, bytes);
    program("losetup").arg("-c").arg(device.device()).ok();
}

fn serve(device: &Loop, driver: Driver, control: &Path, arguments: &str) -> Served {
    Serve::new(Path::new(device.device()), driver)
        .with(arguments)
        .arg("--control")
        .arg(format!("unix:{}", control.display()))
        .start()
}

fn resize(control: &Path, size: &str) -> Finished {
    urus().words("ctl resize").arg(control).arg(size).run()
}

fn write(served: &Served, commands: &[&str]) -> Finished {
    qemu::io("raw", &served.uri(), commands)
}

/// A device that was full has room again once it has become longer, without a pause.
#[test]
fn a_device_that_becomes_longer_has_room_again() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (file, attached) = device(&scratch, 8 * MIB);
        qemu::img("create -q -f qcow2")
            .arg(attached.device())
            .arg("64M")
            .ok();
        let control = scratch.file("ctl");
        let served = serve(&attached, driver, &control, "");
        let full = qemu::io_program("raw", &served.uri(), &["write -P 1 0 16M"]).run();
        assert!(full.everything().contains("No space left"), "{full}");
        enlarge(&file, &attached, 40 * MIB);
        write(
            &served,
            &["write -q -P 2 0 24M", "flush", "read -q -P 2 0 24M"],
        );
        served.stop();
        qemu::assert_clean(Path::new(attached.device()));
        attached.detach();
    }
}

/// A larger L1 table needs adjacent clusters; refcounts cover such a device to its end.
#[test]
fn a_disk_grows_on_a_device_that_has_room() {
    let scratch = Scratch::new();
    let (_, attached) = device(&scratch, 64 * MIB);
    let create = qemu::img("create -q -f qcow2").arg(attached.device());
    create.arg("1G").ok();
    let control = scratch.file("ctl");
    let served = serve(&attached, Driver::alternating(0), &control, "");
    write(&served, &["write -q -P 3 0 4M", "flush"]);
    // From an L1 table of one cluster to one of several.
    for size in ["2G", "8T"] {
        let _ = resize(&control, size).expect_code(0);
    }
    write(
        &served,
        &[
            "write -q -P 4 7T 1M",
            "flush",
            "read -q -P 3 0 4M",
            "read -q -P 4 7T 1M",
        ],
    );
    served.stop();
    qemu::assert_clean(Path::new(attached.device()));
    attached.detach();
}

/// A raw disk has the size of its device: it follows it, and takes no other.
#[test]
fn a_raw_disk_follows_its_device() {
    let scratch = Scratch::new();
    let (file, attached) = device(&scratch, 8 * MIB);
    let control = scratch.file("ctl");
    let served = serve(&attached, Driver::alternating(1), &control, "--format raw");
    let refused = resize(&control, "16M").expect_code(1);
    assert!(
        refused
            .everything()
            .contains("is a block device of 8388608 bytes"),
        "{refused}"
    );
    enlarge(&file, &attached, 16 * MIB);
    let _ = resize(&control, "16M").expect_code(0);
    write(
        &served,
        &["write -q -P 5 15M 1M", "flush", "read -q -P 5 15M 1M"],
    );
    served.stop();
    attached.detach();
}
