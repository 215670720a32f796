//! New images as qemu-img sees them. Guards the layout that other tools poke at, and files that must not be
//! overwritten.

mod common;

use std::fs;

use common::{Scratch, make, qemu_img, text};
use serde_json::Value;
use urus::{Compression, CreateOptions, Error, Format, InfoOptions, create, info};

type Change = fn(&mut CreateOptions) -> &mut CreateOptions;

#[test]
fn the_same_bytes_as_qemu_img() {
    let scratch = Scratch::new();
    let ours = scratch.path("ours.qcow2");
    let theirs = scratch.path("theirs.qcow2");
    let cases: [(&str, Change); 8] = [
        ("cluster_size=65536", |options| options),
        ("compat=0.10", |options| options.version(2)),
        ("cluster_size=512", |options| options.cluster_bytes(512)),
        ("cluster_size=2M", |options| options.cluster_bytes(2 << 20)),
        ("refcount_bits=1", |options| options.refcount_bits(1)),
        ("refcount_bits=64", |options| options.refcount_bits(64)),
        ("lazy_refcounts=on", |options| options.lazy_refcounts(true)),
        ("compression_type=zstd", |options| {
            options.compression(Compression::Zstd)
        }),
    ];
    for (option, change) in cases {
        let mut options = CreateOptions::new();
        create(&ours, change(options.size(64 << 20)).overwrite(true)).unwrap();
        make(&theirs, "64M", &["-o", option]);
        assert!(
            fs::read(&ours).unwrap() == fs::read(&theirs).unwrap(),
            "{option}"
        );
        qemu_img(&["check", "-q", text(&ours)]);
    }
}

#[test]
fn what_exists_is_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    fs::write(&path, b"precious").unwrap();
    let error = create(&path, CreateOptions::new().size(1 << 20)).unwrap_err();
    assert_eq!(error.errno(), 17, "{error:?}");
    // Nor is it touched by a call that fails later, or was wrong from the start.
    let mut wrong = CreateOptions::new();
    wrong.size(1 << 20).overwrite(true).cluster_bytes(1000);
    create(&path, &wrong).unwrap_err();
    let mut wrong = CreateOptions::new();
    wrong
        .size(1 << 20)
        .overwrite(true)
        .version(2)
        .lazy_refcounts(true);
    create(&path, &wrong).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    // And no file is left behind.
    let new = scratch.path("new.qcow2");
    let mut wrong = CreateOptions::new();
    create(&new, wrong.backing("missing.qcow2", Format::Qcow2)).unwrap_err();
    create(&new, CreateOptions::new().size(u64::MAX)).unwrap_err();
    create(&new, &CreateOptions::new()).unwrap_err();
    assert!(!new.exists());
}

#[test]
fn an_empty_file_may_be_replaced_alone() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    let mut options = CreateOptions::new();
    options.size(1 << 20).replace_empty();
    fs::write(&path, b"precious").unwrap();
    let error = create(&path, &options).unwrap_err();
    assert_eq!(error.errno(), 17, "{error:?}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::write(&path, b"").unwrap();
    // Somebody who has it open keeps it.
    let held = urus::OpenOptions::new()
        .format(Format::Raw)
        .open(&path)
        .unwrap();
    let error = create(&path, &options).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    held.close().unwrap();
    create(&path, &options).unwrap();
    qemu_img(&["check", "-q", text(&path)]);
    // A link that leads to nothing leads to the new image.
    let link = scratch.path("link.qcow2");
    std::os::unix::fs::symlink("elsewhere.qcow2", &link).unwrap();
    create(&link, CreateOptions::new().size(1 << 20)).unwrap();
    qemu_img(&["check", "-q", text(&scratch.path("elsewhere.qcow2"))]);
}

#[test]
fn an_image_in_use_is_not_overwritten() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, CreateOptions::new().size(1 << 20)).unwrap();
    let _device = urus::OpenOptions::new().open(&path).unwrap();
    let error = create(&path, CreateOptions::new().size(2 << 20).overwrite(true)).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    let shown = info(&path, InfoOptions::new().lock(false)).unwrap();
    assert_eq!(shown.virtual_size, 1 << 20);
}

#[test]
fn backing_files() {
    let scratch = Scratch::new();
    scratch.dir("sub");
    let base = scratch.path("base.qcow2");
    make(&base, "3M", &[]);
    fs::write(scratch.path("sub/base.raw"), vec![0; 5 << 20]).unwrap();
    let path = scratch.path("sub/overlay.qcow2");
    // The size is the backing file's unless given; relative names start where the new image lies.
    create(
        &path,
        CreateOptions::new().backing("../base.qcow2", Format::Qcow2),
    )
    .unwrap();
    let shown: Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json", text(&path)])).unwrap();
    assert_eq!(shown["virtual-size"], 3 << 20);
    assert_eq!(shown["backing-filename"], "../base.qcow2");
    assert_eq!(shown["backing-filename-format"], "qcow2");
    let mut options = CreateOptions::new();
    options.overwrite(true).backing("base.raw", Format::Raw);
    create(&path, &options).unwrap();
    assert_eq!(
        info(&path, &InfoOptions::new()).unwrap().virtual_size,
        5 << 20
    );
    create(&path, options.size(1 << 20)).unwrap();
    assert_eq!(
        info(&path, &InfoOptions::new()).unwrap().virtual_size,
        1 << 20
    );
    // The stated format is checked.
    let error = create(&path, options.backing("base.raw", Format::Qcow2)).unwrap_err();
    assert!(matches!(error, Error::NotQcow2 { .. }), "{error:?}");
    // Unseen, and what could not be opened again.
    create(
        &path,
        options
            .backing("nowhere.raw", Format::Raw)
            .open_backing(false),
    )
    .unwrap();
    let error = create(&path, options.backing("nbd://x", Format::Raw)).unwrap_err();
    assert!(matches!(error, Error::BackingName { .. }), "{error:?}");
}

#[test]
fn raw() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.raw");
    create(&path, CreateOptions::new().format(Format::Raw).size(1000)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 1024);
    fs::write(&path, vec![1; 4096]).unwrap();
    create(
        &path,
        CreateOptions::new()
            .format(Format::Raw)
            .size(2048)
            .overwrite(true),
    )
    .unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![0; 2048]);
    let mut options = CreateOptions::new();
    options
        .format(Format::Raw)
        .overwrite(true)
        .backing("x", Format::Raw)
        .open_backing(false);
    assert!(matches!(
        create(&path, options.size(512)),
        Err(Error::Invalid { .. })
    ));
}
