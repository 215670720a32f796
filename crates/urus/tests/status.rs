//! What a block status says of a chain, from any offset: against what qemu-img maps.

mod common;

use common::{Scratch, make, open, qemu_img, text};
use urus::{Extent, IoDriver, OpenOptions};

const SIZE: u64 = 4 << 20;

fn write(path: &std::path::Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(text(path));
    let output = std::process::Command::new("qemu-io")
        .args(&args)
        .output()
        .expect("qemu-io is needed: install qemu-utils");
    assert!(output.status.success(), "{args:?}: {output:?}");
}

/// Entries of `qemu-img map`: start, length, depth, present, zero, data, compressed, offset.
fn map(path: &std::path::Path) -> Vec<Extent> {
    let all = qemu_img(&["map", "--output=json", "-f", "qcow2", text(path)]);
    let field = |entry: &str, name: &str| -> Option<String> {
        let (_, rest) = entry.split_once(&format!("\"{name}\": "))?;
        Some(rest.split([',', '}']).next()?.trim().to_owned())
    };
    let entries = all.lines().filter(|line| line.contains("\"start\""));
    let extent = |entry: &str| {
        let number = |name: &str| -> Option<u64> { field(entry, name)?.parse().ok() };
        let flag = |name: &str| field(entry, name).as_deref() == Some("true");
        Extent {
            start: number("start").expect("a start"),
            len: number("length").expect("a length"),
            depth: u32::try_from(number("depth").expect("a depth")).expect("small"),
            present: flag("present"),
            zero: flag("zero"),
            data: flag("data"),
            compressed: flag("compressed"),
            host: number("offset"),
        }
    };
    entries.map(extent).collect()
}

fn within(extents: &[Extent], start: u64, end: u64) -> Vec<Extent> {
    let cut = |extent: &Extent| {
        let (from, to) = (
            extent.start.max(start),
            (extent.start + extent.len).min(end),
        );
        (from < to).then(|| Extent {
            start: from,
            len: to - from,
            host: extent.host.map(|host| host + (from - extent.start)),
            ..*extent
        })
    };
    extents.iter().filter_map(cut).collect()
}

/// Guards zero, data, depth, compression and place of every extent, over a chain of four: a raw file with a hole, a short image with
/// compressed clusters, one with zero clusters, and the overlay; from offsets and for lengths that fit nothing.
#[test]
fn a_status_says_of_each_layer_what_qemu_maps() {
    for io in [IoDriver::IoUring, IoDriver::Blocking] {
        let scratch = Scratch::new();
        let raw = scratch.path("base.raw");
        let file = std::fs::File::create(&raw).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 300_000], 0).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 70_000], 1 << 20).unwrap();
        file.set_len(3 << 20).unwrap();
        let [one, two, top] = ["one", "two", "top"].map(|name| scratch.path(name));
        make(
            &one,
            "2M",
            &["-b", text(&raw), "-F", "raw", "-o", "cluster_size=4k"],
        );
        write(
            &one,
            &[
                "write -q -c -P 1 512k 64k",
                "write -q -P 1 640k 12k",
                "write -q -z 1M 8k",
            ],
        );
        make(
            &two,
            "4M",
            &["-b", text(&one), "-F", "qcow2", "-o", "cluster_size=64k"],
        );
        write(&two, &["write -q -z 256k 128k", "write -q -P 2 3M 64k"]);
        make(
            &top,
            "4M",
            &["-b", text(&two), "-F", "qcow2", "-o", "cluster_size=8k"],
        );
        write(
            &top,
            &[
                "write -q -P 3 520k 4k",
                "write -q -P 3 528k 8k",
                "write -q -z 3080k 16k",
            ],
        );
        let expected = map(&top);
        assert!(expected.len() > 12, "{expected:?}");
        let depths: std::collections::BTreeSet<u32> =
            expected.iter().map(|extent| extent.depth).collect();
        assert_eq!(depths.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
        let device = open(OpenOptions::new().read_only(true).io(io), &top);
        let mut blocking = device.blocking().unwrap();
        let mut ask = |start: u64, len: u64| {
            let found = blocking.block_status(start, len).unwrap();
            let expected = within(&expected, start, start + len);
            assert_eq!(found, expected, "{len} bytes at {start}");
        };
        ask(0, SIZE);
        for start in (0..SIZE).step_by(37_123) {
            ask(start, 1);
            ask(start, (SIZE - start).min(9000));
            ask(start, SIZE - start);
        }
        for edge in expected.iter().map(|extent| extent.start).skip(1) {
            ask(edge - 1, 1);
            ask(edge - 1, 2);
            ask(edge, 1);
        }
        drop(blocking);
        device.close().unwrap();
    }
}
