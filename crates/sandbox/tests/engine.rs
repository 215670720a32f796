//! Guards against a sandbox that forbids what an open image needs: everything that a device can do, by both drivers, after the calls were
//! restricted. What a server does at its start only is done before.

mod common;

use std::path::Path;

use common::in_a_process;
use urus::{CreateOptions, Format, IoDriver, OpenOptions, PauseOptions};
use urus_sandbox::{FileAccess, restrict_calls};

const MIB: u64 = 1 << 20;

fn works(directory: &Path, driver: IoDriver) {
    let path = directory.join("disk");
    let mut create = CreateOptions::new();
    create.format(Format::Qcow2).size(8 * MIB);
    urus::create(&path, &create).unwrap();
    let prepared = OpenOptions::new().io(driver).prepare(&path).unwrap();
    FileAccess::none().restrict().unwrap();
    let device = prepared.start().unwrap();
    let mut io = device.blocking().unwrap();
    restrict_calls().unwrap();

    let data = vec![7; 300_000];
    io.write_at(&data, 1000).unwrap();
    device.flush().unwrap();
    device.resize(16 * MIB).unwrap();
    io.write_at(&data, 12 * MIB).unwrap();
    io.discard(0, MIB).unwrap();
    io.write_zeroes(2 * MIB, MIB, true).unwrap();
    // Locks are let go of and taken again, and the header is read again.
    device
        .pause(PauseOptions::new().release_locks(true))
        .unwrap();
    device.resume().unwrap();
    let mut back = vec![0; data.len()];
    io.read_at(&mut back, 12 * MIB).unwrap();
    assert_eq!(back, data);
    io.flush().unwrap();
    drop(io);
    device.close().unwrap();
}

#[test]
fn all_of_a_device_works_with_io_uring() {
    in_a_process("all_of_a_device_works_with_io_uring", |directory| {
        works(directory, IoDriver::IoUring);
    });
}

#[test]
fn all_of_a_device_works_with_blocking_calls() {
    in_a_process("all_of_a_device_works_with_blocking_calls", |directory| {
        works(directory, IoDriver::Blocking);
    });
}
