//! Sound images of every kind that QEMU makes: nothing is found in them, and the same numbers.

use super::qemu::{Directory, img, io};
use super::{Image, check};
use crate::check::tests::memory::Memory;
use crate::check::{CheckReport, Repair};

/// Fragments, zeroes, discards, compressed data: each somewhere.
pub(super) fn work(cluster_bytes: u64) -> Vec<String> {
    let step = cluster_bytes.max(64 << 10);
    let mut commands: Vec<String> = [
        "write -P 1 0 300k",
        "write -P 2 2M 64k",
        "write -P 3 1M 256k",
        "write -z 64k 128k",
        "discard 1088k 64k",
        "write -P 6 11M 5k",
    ]
    .map(str::to_owned)
    .into();
    commands.push(format!("write -c -P 4 4M {step}"));
    commands.push(format!("write -c -P 5 6M {step}"));
    commands.push(format!("write -c -P 5 8M {step}"));
    commands
}

fn assert_sound(directory: &Directory, image: &Image, what: &str) -> CheckReport {
    let report = directory.assert_same(image, what);
    assert!(report.is_clean(), "{what}: {:#?}", report.messages);
    assert!(report.messages.is_empty());
    // Where nothing is wrong a repair writes nothing.
    for repair in [Repair::Leaks, Repair::All] {
        let memory = Memory::new(&image.bytes);
        assert_eq!(check(&memory, repair), report);
        assert!(memory.log.borrow().is_empty(), "{what}");
    }
    report
}

/// Cluster sizes and refcount widths decide where everything lies.
#[test]
fn every_cluster_size_and_refcount_width() {
    let directory = Directory::new();
    for (turn, bits) in (9..=21).enumerate() {
        for (other, refcount_bits) in [1, 2, 4, 8, 16, 32, 64].into_iter().enumerate() {
            // Some of all pairs, each size and each width several times.
            if (turn + other) % 4 != 0 {
                continue;
            }
            let options = format!("cluster_size={},refcount_bits={refcount_bits}", 1 << bits);
            let mut work = work(1 << bits);
            // Compressed clusters share host clusters: more references than a snapshot could double.
            work.retain(|command| {
                refcount_bits == 1 || refcount_bits > 8 || !command.contains("-c")
            });
            let mut image = directory.make(&options, "12M", &work);
            if refcount_bits > 1 {
                image = directory.with(&image, |path| {
                    img(path, &["snapshot", "-c", "one"], &[]);
                    io(
                        path,
                        &["write -P 9 0 100k", "discard 2M 64k", "write -P 8 5M 64k"],
                    );
                });
            }
            let report = assert_sound(&directory, &image, &options);
            assert!(report.allocated_clusters > 0);
        }
    }
}

#[test]
fn versions_sizes_and_compression() {
    let directory = Directory::new();
    for (options, size) in [
        ("compat=0.10", "12M"),
        ("compression_type=zstd", "12M"),
        ("extended_l2=on,cluster_size=128k", "12M"),
        ("extended_l2=on,cluster_size=16k", "12M"),
        ("lazy_refcounts=on", "12M"),
        ("preallocation=metadata", "12345k"),
        ("preallocation=full,cluster_size=4k", "12M"),
        ("cluster_size=512", "12000k"),
        ("cluster_size=2M,refcount_bits=1", "1T"),
        ("", "1P"),
    ] {
        let mut work = work(if options.contains("2M") {
            2 << 20
        } else {
            128 << 10
        });
        // No zero flag in version 2.
        work.retain(|command| !options.contains("compat") || !command.contains("-z"));
        // QEMU compresses only into what is not allocated.
        work.retain(|command| !options.contains("prealloc") || !command.contains("-c"));
        let image = directory.make(options, size, &work);
        assert_sound(&directory, &image, options);
    }
    for size in ["0", "512", "1537"] {
        let image = directory.make::<&str>("", size, &[]);
        assert_sound(&directory, &image, size);
    }
}

/// Snapshots of a changed and resized disk, with a saved machine state past the disk's end where a table for it is.
#[test]
fn snapshots() {
    let directory = Directory::new();
    for options in [
        "",
        "cluster_size=512",
        "compat=0.10",
        "cluster_size=4k,refcount_bits=64",
    ] {
        let mut image = directory.make(options, "4M", &["write -P 1 0 1M", "write -c -P 7 2M 64k"]);
        image = directory.with(&image, |path| {
            for (turn, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
                img(path, &["snapshot", "-c", name], &[]);
                let write = format!("write -P {turn} {}k 130k", turn * 100);
                let compressed = format!("write -c -P 9 {}k 64k", 3072 + 64 * turn);
                io(path, &[write, compressed]);
            }
            img(path, &["snapshot", "-d", "b"], &[]);
            if !options.contains("compat") {
                img(path, &["resize", "-q"], &["6M"]);
            }
            img(path, &["snapshot", "-c", "e"], &[]);
            img(path, &["snapshot", "-a", "c"], &[]);
        });
        assert_sound(&directory, &image, options);
    }
}

#[test]
fn bitmaps() {
    let directory = Directory::new();
    for options in ["", "cluster_size=512", "cluster_size=4k"] {
        let mut image = directory.make(options, "12M", &["write -P 1 0 1M"]);
        image = directory.with(&image, |path| {
            img(path, &["bitmap", "--add", "-g", "512"], &["fine"]);
            img(path, &["bitmap", "--add", "-g", "1M"], &["coarse"]);
            io(path, &["write -P 3 0 3M", "write -P 3 5M 64k"]);
            img(path, &["bitmap", "--disable"], &["coarse"]);
        });
        assert_sound(&directory, &image, options);

        // Nobody vouches for them any more: their clusters are leaks, and QEMU drops them.
        let mut stale = image.clone();
        stale.poke(88, 0);
        let report = directory.assert_same(&stale, "stale bitmaps");
        assert!(report.leaks > 0 && report.is_sound());
    }
}

/// What urus does not open is checked all the same.
#[test]
fn a_data_file() {
    let directory = Directory::new();
    let data = directory.path("data.raw");
    let options = format!("data_file={}", data.display());
    let image = directory.make(&options, "12M", &["write -P 1 0 300k", "write -z 1M 1M"]);
    assert_sound(&directory, &image, "a data file");
}
