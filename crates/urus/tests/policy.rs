//! Which backing files are opened. Guards against images that make the host open files which they have no
//! business with (CVE-2024-4467, CVE-2026-27211), and against chains without an end.

mod common;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::{Scratch, make, open, overlay, refuse, text};
use urus::{BackingPolicy, Error, Format, OpenOptions};

fn raw_file(path: &Path) {
    fs::write(path, vec![7; 1 << 20]).unwrap();
}

fn options(policy: BackingPolicy) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read_only(true).backing(policy);
    options
}

fn beneath() -> OpenOptions {
    options(BackingPolicy::Beneath)
}

fn layers(options: &OpenOptions, path: &Path) -> Vec<(String, Format)> {
    let device = open(options, path);
    let layer = |layer: &urus::Layer| {
        (
            layer.path.file_name().unwrap().to_str().unwrap().to_owned(),
            layer.format,
        )
    };
    device.layers().iter().map(layer).collect()
}

#[test]
fn beside_and_beneath_is_allowed() {
    let scratch = Scratch::new();
    scratch.dir("sub/deep");
    raw_file(&scratch.path("sub/deep/base.raw"));
    // A relative name is relative to the image that holds it, not to the one on top.
    overlay(
        &scratch.path("sub/middle.qcow2"),
        "deep/base.raw",
        Some("raw"),
    );
    overlay(
        &scratch.path("top.qcow2"),
        "sub/middle.qcow2",
        Some("qcow2"),
    );
    let expected = [
        ("top.qcow2", Format::Qcow2),
        ("middle.qcow2", Format::Qcow2),
        ("base.raw", Format::Raw),
    ];
    let expected = expected.map(|(name, format)| (name.to_owned(), format));
    assert_eq!(layers(&beneath(), &scratch.path("top.qcow2")), expected);
    // The same by an absolute name, and through a link in the same directory.
    overlay(
        &scratch.path("absolute.qcow2"),
        text(&scratch.path("sub/middle.qcow2")),
        Some("qcow2"),
    );
    assert_eq!(
        layers(&beneath(), &scratch.path("absolute.qcow2"))[1..],
        expected[1..]
    );
    symlink("sub/deep/base.raw", scratch.path("link.raw")).unwrap();
    overlay(&scratch.path("linked.qcow2"), "link.raw", Some("raw"));
    assert_eq!(
        layers(&beneath(), &scratch.path("linked.qcow2"))[1].0,
        "link.raw"
    );
}

#[test]
fn outside_is_refused() {
    let scratch = Scratch::new();
    scratch.dir("vm");
    raw_file(&scratch.path("base.raw"));
    symlink("../base.raw", scratch.path("vm/escape.raw")).unwrap();
    symlink(
        scratch.path("base.raw"),
        scratch.path("vm/absolute-escape.raw"),
    )
    .unwrap();
    symlink("..", scratch.path("vm/up")).unwrap();
    let absolute = scratch.path("base.raw");
    let names = [
        "../base.raw",
        text(&absolute),
        "escape.raw",
        "absolute-escape.raw",
        "up/base.raw",
        "x/../../base.raw",
    ];
    for name in names {
        let image = scratch.path("vm/top.qcow2");
        scratch.dir("vm/x");
        overlay(&image, name, Some("raw"));
        let error = refuse(&beneath(), &image);
        assert!(
            matches!(error, Error::BackingOutside { .. }),
            "{name}: {error:?}"
        );
        let message = error.to_string();
        assert!(message.contains(name), "{message}");
        assert!(!message.contains("BackingPolicy"), "{message}");
        let Error::BackingOutside { needed, .. } = error else {
            unreachable!("it was one just now")
        };
        // An absolute link is followed in no directory; anything else in the one that the message names.
        let Some(dir) = needed else {
            assert_eq!(name, "absolute-escape.raw");
            assert!(message.contains("qemu-img rebase -u"), "{message}");
            continue;
        };
        assert_ne!(name, "absolute-escape.raw");
        let advice = format!("--backing-dir {}", dir.display());
        assert!(message.ends_with(&advice), "{message}");
        assert_eq!(layers(&options(BackingPolicy::Dir(dir)), &image).len(), 2);
    }
    // The image itself lies outside of the allowed directory, and so does its neighbour.
    raw_file(&scratch.path("vm/base.raw"));
    overlay(&scratch.path("vm/top.qcow2"), "base.raw", Some("raw"));
    let error = refuse(
        &options(BackingPolicy::Dir(scratch.dir("other"))),
        &scratch.path("vm/top.qcow2"),
    );
    assert!(matches!(error, Error::BackingOutside { .. }), "{error:?}");
}

#[test]
fn a_wider_directory_allows_more() {
    let scratch = Scratch::new();
    scratch.dir("vm");
    scratch.dir("bases");
    raw_file(&scratch.path("bases/base.raw"));
    let image = scratch.path("vm/top.qcow2");
    let absolute = scratch.path("bases/base.raw");
    for name in ["../bases/base.raw", text(&absolute)] {
        overlay(&image, name, Some("raw"));
        for dir in [scratch.path(""), scratch.path("bases")] {
            let options = options(BackingPolicy::Dir(dir.clone()));
            assert_eq!(
                layers(&options, &image)[1].0,
                "base.raw",
                "{name} beneath {}",
                dir.display()
            );
        }
    }
    // A link out of the wider directory is still refused.
    symlink("/etc/hostname", scratch.path("bases/link.raw")).unwrap();
    overlay(&image, "../bases/link.raw", Some("raw"));
    let error = refuse(&options(BackingPolicy::Dir(scratch.path(""))), &image);
    assert!(matches!(error, Error::BackingOutside { .. }), "{error:?}");
}

#[test]
fn forbidden_means_none() {
    let scratch = Scratch::new();
    raw_file(&scratch.path("base.raw"));
    overlay(&scratch.path("top.qcow2"), "base.raw", Some("raw"));
    let error = refuse(&options(BackingPolicy::Forbid), &scratch.path("top.qcow2"));
    assert!(
        matches!(&error, Error::BackingForbidden { backing, .. } if backing == "base.raw"),
        "{error:?}"
    );
    make(&scratch.path("alone.qcow2"), "1M", &[]);
    assert_eq!(
        layers(
            &options(BackingPolicy::Forbid),
            &scratch.path("alone.qcow2")
        )
        .len(),
        1
    );
}

#[test]
fn a_format_is_never_guessed() {
    let scratch = Scratch::new();
    let image = scratch.path("top.qcow2");
    // A guest wrote a qcow2 header onto its raw disk, naming a file of the host.
    overlay(&scratch.path("base"), "/etc/passwd", Some("raw"));
    overlay(&image, "base", None);
    let error = refuse(&beneath(), &image);
    assert!(
        matches!(error, Error::BackingFormatMissing { .. }),
        "{error:?}"
    );
    let mut stated = beneath();
    stated.backing_format(Format::Raw);
    assert_eq!(layers(&stated, &image)[1].1, Format::Raw);
    // A recorded format wins over the stated one.
    overlay(&image, "base", Some("qcow2"));
    let error = refuse(&stated, &image);
    assert!(matches!(error, Error::BackingOutside { .. }), "{error:?}");
    overlay(&image, "base", Some("vmdk"));
    let error = refuse(&beneath(), &image);
    assert!(
        matches!(&error, Error::BackingFormatUnsupported { format, .. } if format == "vmdk"),
        "{error:?}"
    );
    // The image itself: qcow2 unless stated otherwise.
    raw_file(&scratch.path("disk.raw"));
    let error = refuse(&beneath(), &scratch.path("disk.raw"));
    assert!(matches!(error, Error::NotQcow2 { .. }), "{error:?}");
}

#[test]
fn names_that_are_no_files_are_refused() {
    let scratch = Scratch::new();
    for name in [
        "json:{\"driver\":\"file\"}",
        "nbd://localhost/x",
        "fd:3",
        "https://example.invalid/base",
    ] {
        let image = scratch.path("top.qcow2");
        overlay(&image, name, Some("raw"));
        let error = refuse(&beneath(), &image);
        assert!(
            matches!(&error, Error::BackingName { backing, .. } if backing == name),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn loops_and_endless_chains_are_refused() {
    let scratch = Scratch::new();
    overlay(&scratch.path("self.qcow2"), "self.qcow2", Some("qcow2"));
    overlay(&scratch.path("a.qcow2"), "b.qcow2", Some("qcow2"));
    overlay(&scratch.path("b.qcow2"), "./a.qcow2", Some("qcow2"));
    fs::hard_link(scratch.path("self.qcow2"), scratch.path("other-name.qcow2")).unwrap();
    for name in ["self.qcow2", "a.qcow2", "other-name.qcow2"] {
        for read_only in [true, false] {
            let mut options = beneath();
            options.read_only(read_only);
            let error = refuse(&options, &scratch.path(name));
            assert!(
                matches!(error, Error::BackingLoop { .. }),
                "{name}: {error:?}"
            );
        }
    }
    raw_file(&scratch.path("0"));
    overlay(&scratch.path("1"), "0", Some("raw"));
    for layer in 2..=64 {
        overlay(
            &scratch.path(&layer.to_string()),
            &(layer - 1).to_string(),
            Some("qcow2"),
        );
    }
    assert_eq!(layers(&beneath(), &scratch.path("63")).len(), 64);
    let error = refuse(&beneath(), &scratch.path("64"));
    assert!(
        matches!(error, Error::ChainTooDeep { limit: 64, .. }),
        "{error:?}"
    );
}

#[test]
fn what_is_not_there_or_no_file_is_named() {
    let scratch = Scratch::new();
    scratch.dir("directory");
    let image = scratch.path("top.qcow2");
    let fifo = scratch.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    for name in ["missing.raw", "directory", "fifo"] {
        overlay(&image, name, Some("raw"));
        let error = refuse(&beneath(), &image);
        assert!(
            matches!(error, Error::BackingOpen { .. }),
            "{name}: {error:?}"
        );
        assert!(
            error.to_string().contains(name) && error.to_string().contains("top.qcow2"),
            "{error}"
        );
    }
    let error = refuse(&beneath(), &scratch.path("missing.qcow2"));
    assert!(
        matches!(
            error,
            Error::Io {
                operation: "open",
                ..
            }
        ) && error.errno() == 2,
        "{error:?}"
    );
    assert!(matches!(refuse(&beneath(), &fifo), Error::Io { .. }));
}

#[test]
fn descriptors_replace_names() {
    let scratch = Scratch::new();
    raw_file(&scratch.path("base.raw"));
    overlay(
        &scratch.path("middle.qcow2"),
        "/nowhere/base.raw",
        Some("raw"),
    );
    overlay(
        &scratch.path("top.qcow2"),
        "/nowhere/middle.qcow2",
        Some("qcow2"),
    );
    let fd = |name: &str| OwnedFd::from(fs::File::open(scratch.path(name)).unwrap());
    let open = |backing: &[&str]| {
        options(BackingPolicy::Forbid).open_fds(
            fd("top.qcow2"),
            backing.iter().map(|name| fd(name)).collect(),
        )
    };
    let device = open(&["middle.qcow2", "base.raw"]).unwrap();
    assert_eq!(device.layers().len(), 3);
    assert!(device.name().ends_with("top.qcow2"), "{}", device.name());
    drop(device);
    let error = open(&["middle.qcow2"]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::BackingCount {
                given: 1,
                needed: 2,
                at_least: true,
                ..
            }
        ),
        "{error:?}"
    );
    let error = open(&["middle.qcow2", "base.raw", "base.raw"]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::BackingCount {
                given: 3,
                needed: 2,
                at_least: false,
                ..
            }
        ),
        "{error:?}"
    );
    let error = open(&["top.qcow2", "base.raw"]).unwrap_err();
    assert!(matches!(error, Error::BackingLoop { .. }), "{error:?}");
    // Read-write needs a descriptor that can write.
    let error = OpenOptions::new()
        .open_fds(fd("middle.qcow2"), vec![fd("base.raw")])
        .unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
}
