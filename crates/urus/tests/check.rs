//! Checking and repairing through the facade, beside qemu-img. Guards the counts that scripts act on, and
//! images in use, which a repair would destroy.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{QemuIo, Scratch, make, text};
use serde_json::Value;
use urus::{Error, OpenOptions, Repair, check};

/// Where the refcount block lies in an image as qemu-img makes it, with clusters of 64 KiB.
const REFCOUNT_BLOCK: usize = 2 << 16;

fn set_refcount(path: &Path, cluster: usize, count: u16) {
    let mut bytes = fs::read(path).unwrap();
    bytes.resize(bytes.len().max((cluster + 1) << 16), 0);
    bytes[REFCOUNT_BLOCK + 2 * cluster..][..2].copy_from_slice(&count.to_be_bytes());
    fs::write(path, bytes).unwrap();
}

/// What qemu-img finds: corruptions and leaks.
fn theirs(path: &Path) -> (u64, u64) {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", text(path)])
        .output()
        .unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let count = |name: &str| found[name].as_u64().unwrap_or(0);
    (count("corruptions"), count("leaks"))
}

/// An image with one cluster of data, which is the sixth of the file.
fn with_data(path: &Path) {
    make(path, "1M", &[]);
    let device = OpenOptions::new().open(path).unwrap();
    device.blocking().unwrap().write_at(&[1; 65536], 0).unwrap();
    device.close().unwrap();
}

#[test]
fn what_qemu_img_finds_is_found_and_repaired() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    // (cluster, refcount): a leak at the end of the file, data given to nobody.
    for (cluster, count) in [(20, 1), (5, 0)] {
        with_data(&path);
        assert_eq!(theirs(&path), (0, 0));
        let report = check(&path, Repair::None).unwrap();
        assert!(report.is_clean(), "{report:?}");
        set_refcount(&path, cluster, count);
        let before = fs::read(&path).unwrap();
        let report = check(&path, Repair::None).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            theirs(&path),
            "{report:?}"
        );
        assert_ne!((report.corruptions, report.leaks), (0, 0));
        assert!(
            fs::read(&path).unwrap() == before,
            "without a repair nothing is written"
        );
        check(&path, Repair::All).unwrap();
        assert_eq!(theirs(&path), (0, 0));
        let mut bytes = [0; 65536];
        OpenOptions::new()
            .open(&path)
            .unwrap()
            .blocking()
            .unwrap()
            .read_at(&mut bytes, 0)
            .unwrap();
        assert_eq!(bytes, [1; 65536]);
    }
}

#[test]
fn an_image_in_use_is_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    with_data(&path);
    set_refcount(&path, 20, 1);
    for args in [&["-r"][..], &[]] {
        let _user = QemuIo::open(&path, args);
        let error = check(&path, Repair::Leaks).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error:?}");
        assert_eq!(
            check(&path, Repair::None).is_ok(),
            !args.is_empty(),
            "readers do not disturb a check"
        );
    }
}

#[test]
fn only_qcow2_can_be_checked() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.raw");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let error = check(&path, Repair::None).unwrap_err();
    assert!(matches!(error, Error::NotQcow2 { .. }), "{error:?}");
}
