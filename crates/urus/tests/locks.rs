//! Image locks against the real qemu-io. Guards against two writers on one image, which destroy it.

mod common;

use common::{QemuIo, Scratch, make, open, qemu_can_write, refuse, text};
use urus::{Error, Format, OpenOptions, PauseOptions};

fn read_only() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read_only(true);
    options
}

#[test]
fn qemu_keeps_us_off() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    make(&image, "1M", &[]);
    let writer = QemuIo::open(&image, &[]);
    for options in [OpenOptions::new(), read_only()] {
        let error = refuse(&options, &image);
        assert!(matches!(error, Error::InUse { .. }), "{error:?}");
        assert!(error.to_string().contains("disk.qcow2"), "{error}");
    }
    // Who knows better can say so.
    drop(open(read_only().lock(false), &image));
    drop(writer);
    drop(open(&OpenOptions::new(), &image));
    let _reader = QemuIo::open(&image, &["-r"]);
    drop(open(&read_only(), &image));
    let error = refuse(&OpenOptions::new(), &image);
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
}

#[test]
fn we_keep_qemu_off() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    make(&image, "1M", &[]);
    let device = open(&OpenOptions::new(), &image);
    assert!(!qemu_can_write(&image));
    // Another device of the same process is somebody else too.
    assert!(matches!(
        refuse(&OpenOptions::new(), &image),
        Error::InUse { .. }
    ));
    // Clones and seats are handles: the lock goes with the last.
    let seat = device.queue().unwrap();
    drop(device);
    assert!(!qemu_can_write(&image));
    drop(seat);
    assert!(qemu_can_write(&image));
    let device = open(&OpenOptions::new(), &image);
    device.close().unwrap();
    assert!(
        qemu_can_write(&image),
        "close lets go at once, whoever still has a handle"
    );
    assert!(matches!(device.queue(), Err(Error::Closed)));
    assert!(matches!(device.flush(), Err(Error::Closed)));
}

#[test]
fn backing_files_are_locked_for_reading() {
    let scratch = Scratch::new();
    let base = scratch.path("base.qcow2");
    make(&base, "1M", &[]);
    for name in ["one.qcow2", "two.qcow2"] {
        make(
            &scratch.path(name),
            "1M",
            &["-b", text(&base), "-F", "qcow2"],
        );
    }
    let one = open(&OpenOptions::new(), &scratch.path("one.qcow2"));
    assert!(!qemu_can_write(&base));
    // Overlays share it.
    let two = open(&OpenOptions::new(), &scratch.path("two.qcow2"));
    drop(one);
    assert!(!qemu_can_write(&base));
    drop(two);
    let _writer = QemuIo::open(&base, &[]);
    let error = refuse(&OpenOptions::new(), &scratch.path("one.qcow2"));
    assert!(
        matches!(&error, Error::InUse { path, .. } if path.ends_with("base.qcow2")),
        "{error:?}"
    );
}

#[test]
fn pausing_can_hand_the_image_over() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    make(&image, "1M", &[]);
    let device = open(&OpenOptions::new(), &image);
    device.pause(PauseOptions::new()).unwrap();
    assert!(!qemu_can_write(&image));
    device
        .pause(PauseOptions::new().release_locks(true))
        .unwrap();
    let writer = QemuIo::open(&image, &[]);
    let error = device.resume().unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    drop(writer);
    device.resume().unwrap();
    device.resume().unwrap();
    assert!(!qemu_can_write(&image));
    device.close().unwrap();
}

#[test]
fn an_image_changed_beyond_recognition_stays_paused() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    make(&image, "1M", &[]);
    let device = open(&OpenOptions::new(), &image);
    device
        .pause(PauseOptions::new().release_locks(true))
        .unwrap();
    make(&image, "1M", &["-o", "cluster_size=4k"]);
    let error = device.resume().unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    assert!(qemu_can_write(&image), "the locks are let go again");
}

#[test]
fn raw_images_are_locked_too() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let mut options = OpenOptions::new();
    options.format(Format::Raw);
    let _device = open(&options, &image);
    assert!(matches!(refuse(&options, &image), Error::InUse { .. }));
}
