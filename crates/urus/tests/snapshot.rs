//! Temporary overlays. Guards the image against writes that nobody was to keep, and the directory against what they leave.

mod common;

use std::fs;

use common::{Scratch, make, open, overlay, refuse};
use urus::{Error, Format, OpenOptions};

fn written(options: &OpenOptions, image: &std::path::Path) -> Vec<u8> {
    let device = open(options, image);
    let mut io = device.blocking().unwrap();
    io.write_at(&[0x5a; 4096], 8192).unwrap();
    io.flush().unwrap();
    let mut read = vec![0; 16384];
    io.read_at(&mut read, 0).unwrap();
    drop(io);
    device.close().unwrap();
    read
}

#[test]
fn writes_are_seen_and_never_reach_the_image() {
    let scratch = Scratch::new();
    let dir = scratch.dir("temporary");
    let base = scratch.path("base.raw");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    make(&scratch.path("alone.qcow2"), "1M", &[]);
    overlay(&scratch.path("top.qcow2"), "base.raw", Some("raw"));
    for (name, format, fill) in [
        ("base.raw", Format::Raw, 7),
        ("alone.qcow2", Format::Qcow2, 0),
        ("top.qcow2", Format::Qcow2, 7),
    ] {
        let image = scratch.path(name);
        let before = (fs::read(&image).unwrap(), fs::read(&base).unwrap());
        let mut options = OpenOptions::new();
        options.format(format).snapshot(&dir);
        let read = written(&options, &image);
        let mut expected = vec![fill; 16384];
        expected[8192..12288].fill(0x5a);
        assert!(read == expected, "{name}");
        assert!(
            before == (fs::read(&image).unwrap(), fs::read(&base).unwrap()),
            "{name}"
        );
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "{name}");
    }
}

#[test]
fn the_image_is_shared_with_readers_and_kept_from_writers() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    make(&image, "1M", &[]);
    let mut options = OpenOptions::new();
    options.snapshot(scratch.dir("temporary"));
    let one = open(&options, &image);
    let two = open(&options, &image);
    assert!(!one.read_only() && one.layers().len() == 2);
    let error = refuse(&OpenOptions::new(), &image);
    assert!(
        matches!(
            error,
            Error::InUse {
                by_writer: false,
                ..
            }
        ),
        "{error:?}"
    );
    drop((one, two));
    let _writer = open(&OpenOptions::new(), &image);
    let error = refuse(&options, &image);
    assert!(
        matches!(
            error,
            Error::InUse {
                by_writer: true,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn what_cannot_be_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    make(&image, "1M", &[]);
    let mut options = OpenOptions::new();
    options.snapshot(scratch.path("missing"));
    let error = refuse(&options, &image);
    assert!(error.to_string().contains("missing"), "{error}");
    options.snapshot(scratch.dir("temporary")).read_only(true);
    let error = refuse(&options, &image);
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
}
