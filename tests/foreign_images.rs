//! Images as other programs write, or leave, them. Guards against taking what urus would write for what is there
//! (O28), against one image having two sizes, and against refusing to say anything of an image that is damaged
//! somewhere else.

use std::path::Path;
use urus_tests::nbd::Client;
use urus_tests::served::Serve;
use urus_tests::{Driver, KIB, MIB, Scratch, Served, content, header, qemu, urus};

const CLUSTER: usize = 4096;

/// An extension of the header, padded.
fn extension(kind: u32, value: &[u8]) -> Vec<u8> {
    let len = u32::try_from(value.len()).expect("short");
    let mut out = [&kind.to_be_bytes()[..], &len.to_be_bytes(), value].concat();
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// Lays the rest of the image's cluster 0 out anew: these extensions, a gap, this name, and bytes that mean nothing up
/// to the cluster's end. Returns cluster 0.
fn lay_out(image: &Path, extensions: &[u8], gap: usize, name: &[u8]) -> Vec<u8> {
    let start = if header::u32_at(image, header::VERSION) == 2 {
        72
    } else {
        112
    };
    let mut bytes = content::bytes(image);
    bytes.truncate(start);
    bytes.extend_from_slice(extensions);
    bytes.resize(bytes.len() + gap, 0x77);
    let at = bytes.len() as u64;
    bytes.extend_from_slice(name);
    bytes.resize(CLUSTER, 0x55);
    bytes[8..16].copy_from_slice(&at.to_be_bytes());
    bytes[16..20].copy_from_slice(&u32::try_from(name.len()).expect("short").to_be_bytes());
    header::patch(image, 0, &bytes);
    bytes
}

const BACKING_FORMAT: u32 = 0xe279_2aca;

/// An overlay of 1 MiB, whose backing file holds 0xb3 everywhere.
fn overlay(scratch: &Scratch, version: u32) -> std::path::PathBuf {
    let image = scratch.file("image.qcow2");
    std::fs::write(scratch.file("base"), vec![0xb3; 1 << 20]).expect("writing");
    let compat = if version == 2 { "0.10" } else { "1.1" };
    let options = format!("compat={compat},cluster_size={CLUSTER}");
    qemu::create_overlay(&image, &options, "base", "raw");
    image
}

/// Grows a served image; whether that was done, and what was said.
fn grow(image: &Path, options: &str, size: &str) -> (bool, String) {
    let sockets = tempfile::tempdir().expect("a directory");
    let control = format!("unix:{}", sockets.path().join("c").display());
    let serve = Serve::new(image, Driver::alternating(0)).with(options);
    let served = serve.arg("--control").arg(&control).start();
    let finished = urus().words("ctl resize").arg(&control).arg(size).run();
    let log = served.stop_complaining();
    let said = format!("{}{log}", finished.everything());
    (finished.status.success(), said)
}

/// Headers that no writer of today lays out so. Growing moves the L1 table and the size, and nothing else: QEMU then
/// reads the backing file's bytes as before, and zeroes behind them.
#[test]
fn growing_leaves_a_foreign_header_as_it_is() {
    let format = extension(BACKING_FORMAT, b"raw");
    let padded = extension(BACKING_FORMAT, b"raw\0\0\0\0\0");
    let unknown = extension(0x1234_5678, b"hello there");
    let end = extension(0, b"");
    let long_name = [&b"./".repeat(300)[..], b"base"].concat();
    for version in [2, 3] {
        for (what, extensions, gap, name, options) in [
            (
                "further back",
                [&format[..], &end].concat(),
                8,
                &b"base"[..],
                "",
            ),
            ("no end marker", format.clone(), 0, b"base", ""),
            (
                "padded format",
                [&padded[..], &end].concat(),
                0,
                b"base",
                "",
            ),
            (
                "unknown first",
                [&unknown[..], &format, &end].concat(),
                0,
                b"base",
                "",
            ),
            (
                "long name",
                Vec::new(),
                0,
                &long_name,
                "--backing-format raw",
            ),
        ] {
            let scratch = Scratch::new();
            let image = overlay(&scratch, version);
            let before = lay_out(&image, &extensions, gap, name);
            let (done, said) = grow(&image, options, "8G");
            assert!(done, "{what}, version {version}: {said}");
            let after = content::bytes(&image);
            let changed: Vec<usize> = (0..CLUSTER)
                .filter(|at| before[*at] != after[*at])
                .collect();
            // The size, and the number of L1 entries and their place.
            let may = |at: &usize| (24..32).contains(at) || (36..48).contains(at);
            assert!(
                !changed.is_empty() && changed.iter().all(may),
                "{what}, version {version}: {changed:?}"
            );
            qemu::io_file(&image, &["read -P 0xb3 0 1M", "read -P 0 1M 1M"]);
            qemu::assert_clean(&image);
            let info = urus().words("info --output=json").arg(&image).ok().json();
            assert_eq!(info["virtual-size"], 8u64 << 30, "{what}");
            assert_eq!(
                info["backing-filename"],
                String::from_utf8_lossy(name).as_ref()
            );
        }
    }
}

/// An unknown autoclear bit is cleared at opening: that bit, and nothing beside it.
#[test]
fn clearing_an_autoclear_bit_leaves_the_rest() {
    let scratch = Scratch::new();
    let image = overlay(&scratch, 3);
    let extensions = [
        extension(0x1234_5678, b"hello there"),
        extension(BACKING_FORMAT, b"raw"),
        extension(0, b""),
    ];
    lay_out(&image, &extensions.concat(), 24, b"base");
    header::set_bits(&image, header::AUTOCLEAR, 1 << 40);
    let before = content::bytes(&image);
    Served::start(&image, Driver::alternating(1)).stop();
    assert_eq!(header::u64_at(&image, header::AUTOCLEAR), 0);
    header::set_bits(&image, header::AUTOCLEAR, 1 << 40);
    assert_eq!(content::bytes(&image)[..CLUSTER], before[..CLUSTER]);
}

/// Eight snapshots whose entries have 16 bytes of extra data fill one cluster; the next one holds an L2 table. Entries
/// written here would have 24 bytes, and not fit.
#[test]
fn a_snapshot_table_is_as_long_as_it_is() {
    let scratch = Scratch::new();
    let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
    qemu::create(&image, "cluster_size=512", MIB);
    qemu::io_file(&image, &["write -q -P 0x11 0 32k"]);
    for number in 1..=8 {
        // 40 + 24 + 1 + 7 = 72 bytes each.
        let name = format!("snap{number:03}");
        qemu::img("snapshot -c").arg(name).arg(&image).ok();
    }
    let table = header::u64_at(&image, header::SNAPSHOTS_OFFSET);
    let at = usize::try_from(table).expect("small");
    let old = content::bytes(&image)[at..at + 8 * 72].to_vec();
    let mut new = Vec::new();
    for entry in old.chunks_exact(72) {
        let mut entry = entry.to_vec();
        assert_eq!(entry[36..40], 24u32.to_be_bytes(), "as QEMU writes it");
        entry[39] = 16;
        entry.drain(56..64);
        new.extend_from_slice(&entry);
    }
    assert_eq!(new.len(), 512);
    header::patch(&image, table, &new);
    // The second cluster of the table is free now. QEMU's check finds it, and it is the first free one by the time that
    // QEMU needs an L2 table.
    qemu::io_file(&image, &["write -q -P 0x22 512k 512"]);
    qemu::img("check -q -r leaks -f qcow2").arg(&image).run();
    qemu::io_file(&image, &["write -q -P 0x33 768k 512"]);
    qemu::assert_clean(&image);
    let next = table + 512;
    let l1 = header::u64_at(&image, header::L1_TABLE_OFFSET);
    let entries = u64::from(header::u32_at(&image, header::L1_SIZE));
    let tables = (0..entries).map(|index| header::u64_at(&image, l1 + index * 8) & !header::COPIED);
    assert!(
        tables.clone().any(|table| table == next),
        "QEMU reuses the cluster: {next:#x} of {:x?}",
        tables.collect::<Vec<_>>()
    );

    urus().arg("check").arg(&image).ok();
    let served = Served::start(&image, Driver::alternating(0));
    served.qemu_io(&["read -P 0x22 512k 512", "write -q -P 0x44 4k 1k"]);
    served.stop();
    qemu::assert_clean(&image);
    qemu::img("convert -f qcow2 -O raw -l snap008")
        .arg(&image)
        .arg(&raw)
        .ok();
    assert!(
        content::bytes(&raw)[..32 << 10]
            .iter()
            .all(|&byte| byte == 0x11)
    );
}

/// Snapshots of version 2 do not say how large the disk was, so it must not change. QEMU refuses too.
#[test]
fn version_2_with_snapshots_does_not_grow() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "compat=0.10", MIB);
    qemu::img("snapshot -c then").arg(&image).ok();
    let before = content::bytes(&image);
    let (done, said) = grow(&image, "", "2M");
    assert!(!done, "{said}");
    for word in ["version 2", "snapshots", "delete", "amend"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(content::bytes(&image), before);
    qemu::img("resize -q -f qcow2")
        .arg(&image)
        .arg("2M")
        .run()
        .expect_code(1);
    qemu::img("snapshot -a then").arg(&image).ok();
}

/// Version 3 knows the size; entries that lack it are taken for as large as the disk is.
#[test]
fn snapshots_without_a_size_keep_the_disk_from_growing() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", MIB);
    qemu::img("snapshot -c then").arg(&image).ok();
    assert!(grow(&image, "", "2M").0);
    // Without its extra data, as before version 3: what was there becomes its ID and name.
    let table = header::u64_at(&image, header::SNAPSHOTS_OFFSET);
    header::patch(&image, table + 36, &[0; 4]);
    let (done, said) = grow(&image, "", "3M");
    assert!(!done && said.contains("size of the disk"), "{said}");
}

/// What is refused can be looked at: a name with a NUL, and a format that is none.
#[test]
fn what_policy_refuses_is_shown() {
    let end = extension(0, b"");
    for (format, name, shown) in [
        (&b"raw"[..], &b"ba\0se"[..], "ba\\0se"),
        (b"raw\0qcow2", b"base", "raw\\0qcow2"),
        (b"\xffraw", b"base", "base"),
        (
            b"a-very-long-format-name",
            b"base",
            "a-very-long-format-name",
        ),
    ] {
        let scratch = Scratch::new();
        let image = overlay(&scratch, 3);
        let extensions = [extension(BACKING_FORMAT, format), end.clone()].concat();
        lay_out(&image, &extensions, 0, name);
        let before = content::bytes(&image);
        let info = urus().arg("info").arg(&image).ok();
        assert!(info.everything().contains(shown), "{info}");
        assert!(info.everything().contains("warning"), "{info}");
        let json = urus().words("info --output=json").arg(&image).ok();
        assert!(json.everything().contains("virtual-size"), "{json}");
        urus().arg("check").arg(&image).ok();
        Serve::new(&image, Driver::alternating(0)).refused();
        assert_eq!(content::bytes(&image), before);
    }
}

/// A zstd frame as `zstd --long=27` makes them on a pipe: its window is larger than any cluster. QEMU reads it.
#[test]
fn zstd_windows_of_128_mib_are_read() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "compression_type=zstd", MIB);
    qemu::io_file(&image, &["write -q -c -P 0x11 0 64k"]);
    let entry = header::u64_at(&image, header::first_l2(&image));
    assert_ne!(entry & 1 << 62, 0, "a compressed cluster: {entry:#x}");
    let stream = entry & ((1 << 54) - 1);
    // No size, a window of 2^27, one block that repeats a byte 65536 times.
    let block = (1u32 | 1 << 1 | 65536 << 3).to_le_bytes();
    let frame = [
        &[0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3],
        &block[..3],
        &[0x5a],
    ]
    .concat();
    header::patch(&image, stream, &frame);
    qemu::io_file(&image, &["read -P 0x5a 0 64k"]);
    for driver in Driver::ALL {
        let served = Served::start(&image, driver);
        served.qemu_io(&["read -P 0x5a 0 64k", "read -P 0 64k 64k"]);
        served.stop();
    }
}

/// 1000 bytes: QEMU rounds a qcow2 image down to whole sectors, and a raw file up. One size for all commands.
#[test]
fn an_odd_size_is_one_size_everywhere() {
    for (format, expected) in [("qcow2", 512u64), ("raw", 1024)] {
        let scratch = Scratch::new();
        let (image, top) = (scratch.file("image"), scratch.file("top.qcow2"));
        if format == "qcow2" {
            qemu::create(&image, "", MIB);
            header::set_u64(&image, header::SIZE, 1000);
        } else {
            std::fs::write(&image, vec![0x5a; 1000]).expect("writing");
        }
        let size = |program: urus_tests::program::Program| {
            let finished = program.words("info --output=json -f").arg(format);
            finished.arg(&image).ok().json()["virtual-size"].clone()
        };
        assert_eq!(size(urus_tests::program("qemu-img")), expected, "{format}");
        assert_eq!(size(urus()), expected, "{format}");
        let map = |program: urus_tests::program::Program| {
            let finished = program.words("map --output=json -f").arg(format);
            finished.arg(&image).ok().json()
        };
        assert_eq!(map(urus()), map(urus_tests::program("qemu-img")));
        urus()
            .words("create -q -f qcow2 -b image -F")
            .arg(format)
            .arg(&top)
            .ok();
        assert_eq!(qemu::info(&top)["virtual-size"], expected, "{format}");
        for driver in Driver::ALL {
            let serve = Serve::new(&image, driver)
                .with("--read-only --format")
                .arg(format);
            let served = serve.start();
            let mut client = Client::connect(&served.socket()).expect("a connection");
            assert_eq!(client.size(), expected, "{format}");
            let read = client.read_all().expect("it reads");
            assert_eq!(read.len() as u64, expected);
            if format == "raw" {
                assert!(read[..1000].iter().all(|&byte| byte == 0x5a));
                assert!(read[1000..].iter().all(|&byte| byte == 0));
            }
            drop(client);
            served.stop();
        }
        // What is rounded away stays out of sight when the disk grows.
        let (done, said) = grow(&image, &format!("--format {format}"), "2000");
        assert!(done, "{format}: {said}");
        assert_eq!(size(urus()), 2048, "{format}");
        assert_eq!(size(urus_tests::program("qemu-img")), 2048, "{format}");
    }
}

/// Damage that is not the header's: sizes and names are shown, and what is wrong. A refcount table that is cut off is made
/// anew by a repair.
#[test]
fn info_answers_for_damaged_images() {
    let far = 1u64 << 40;
    for (what, at, value, repaired) in [
        (
            "the refcount table is cut off",
            header::REFCOUNT_TABLE_OFFSET,
            far,
            true,
        ),
        (
            "refcount_table_offset",
            header::REFCOUNT_TABLE_OFFSET,
            4097,
            false,
        ),
        (
            "the L1 table is cut off",
            header::L1_TABLE_OFFSET,
            far,
            false,
        ),
        ("l1_table_offset", header::L1_TABLE_OFFSET, 1, false),
        ("snapshot table", header::SNAPSHOTS_OFFSET, far, false),
    ] {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "", MIB);
        qemu::io_file(&image, &["write -q -P 0x11 0 256k"]);
        qemu::img("snapshot -c then").arg(&image).ok();
        header::set_u64(&image, at, value);
        let before = content::bytes(&image);
        let info = urus().arg("info").arg(&image).ok();
        for word in [what, "virtual size: 1 MiB", "cluster_size: 65536"] {
            assert!(info.everything().contains(word), "{word}: {info}");
        }
        let json = urus().words("info --output=json").arg(&image).ok();
        assert!(
            json.everything().contains("\"virtual-size\": 1048576"),
            "{json}"
        );
        assert_eq!(content::bytes(&image), before, "{what}: nothing is changed");
        if repaired {
            urus().words("check -r all").arg(&image).ok();
            qemu::assert_clean(&image);
            qemu::io_file(&image, &["read -P 0x11 0 256k"]);
        }
    }
}

/// Flags that say nothing, or that version 2 does not define: the check calls the image clean, as QEMU's does, and the
/// whole disk can be read.
#[test]
fn idle_flags_cost_no_data() {
    for version in [2, 3] {
        for driver in Driver::ALL {
            let scratch = Scratch::new();
            let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
            std::fs::write(scratch.file("base"), vec![0xb3; 1 << 20]).expect("writing");
            let options = if version == 2 { "compat=0.10" } else { "" };
            qemu::create_overlay(&image, options, "base", "raw");
            qemu::io_file(&image, &["write -q -P 0x11 0 128k"]);
            let l2 = header::first_l2(&image);
            header::set_u64(&image, l2 + 3 * 8, header::COPIED);
            if version == 2 {
                header::set_bits(&image, l2 + 8, 1);
                header::set_u64(&image, l2 + 4 * 8, 1);
            }
            qemu::assert_clean(&image);
            urus().arg("check").arg(&image).ok();
            urus().words("check -r all").arg(&image).ok();
            urus().arg("check").arg(&image).ok();
            qemu::assert_clean(&image);
            let served = Serve::new(&image, driver).with("--read-only").start();
            served.copy_out(&raw);
            served.stop();
            let read = content::bytes(&raw);
            let cluster = usize::try_from(64 * KIB).expect("small");
            for (number, part) in read.chunks_exact(cluster).enumerate() {
                let expected = match number {
                    0 => 0x11,
                    1 if version == 3 => 0x11,
                    1 => 0,
                    4 if version == 2 => 0,
                    _ => 0xb3,
                };
                assert!(
                    part.iter().all(|&byte| byte == expected),
                    "cluster {number}"
                );
            }
            // Such clusters can be written; the rest of them is what it read as.
            let served = Served::start(&image, driver);
            served.qemu_io(&[
                "write -q -P 0x44 68k 4k",
                "write -q -P 0x55 196k 4k",
                "write -q -P 0x66 260k 4k",
            ]);
            served.stop();
            qemu::assert_clean(&image);
            let four = if version == 2 { "0" } else { "0xb3" };
            let one = if version == 2 { "0" } else { "0x11" };
            qemu::io_file(
                &image,
                &[
                    format!("read -P {one} 64k 4k"),
                    "read -P 0x44 68k 4k".into(),
                    "read -P 0xb3 192k 4k".into(),
                    "read -P 0x55 196k 4k".into(),
                    format!("read -P {four} 256k 4k"),
                    "read -P 0x66 260k 4k".into(),
                ],
            );
        }
    }
}
