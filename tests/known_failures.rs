//! Failures of other implementations, part two: the format, and what it costs to open and keep an image. Each test is
//! named after the program and, where there is one, the report.
//!
//! Part one (known_failures_races.rs) has ordering, races and error paths.

use std::path::Path;
use std::time::{Duration, Instant};
use urus_tests::mounted::{AsFile, Loop, Mount};
use urus_tests::script::{self, Model};
use urus_tests::served::Serve;
use urus_tests::{
    Driver, KIB, MIB, Scratch, Served, TIB, content, header, program, qemu, urus, urus_within,
};

/// What an image may make the program allocate.
const MEMORY: u64 = 256 * MIB;

/// Cloud Hypervisor writes in place where an internal snapshot shares the cluster, and its rebuild of the refcounts
/// after a crash forgets the snapshots. Here QEMU makes a snapshot and then leaves the image dirty; urus repairs it,
/// writes over everything that is shared, and is killed. The snapshot is what it was.
#[test]
fn cloud_hypervisor_internal_snapshot_damaged() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
        qemu::create(&image, "lazy_refcounts=on", 8 * MIB);
        qemu::io_file(&image, &["write -q -P 0x11 0 6M"]);
        qemu::img("snapshot -c then").arg(&image).ok();
        let commands = ["write -q -P 0x22 1M 1M", "flush", "abort"];
        let _ = qemu::io_program("qcow2", &image.display().to_string(), &commands).run();
        assert_ne!(
            header::u64_at(&image, header::INCOMPATIBLE) & header::DIRTY,
            0,
            "the image should be dirty"
        );

        let served = Served::start(&image, driver);
        let client = served.holding(
            "h.pwrite(b'\\x33' * (4 << 20), 0)\nh.flush()\nh.pwrite(b'\\x44' * 65536, 5 << 20)",
        );
        served.kill();
        client.release();
        qemu::assert_no_errors(&image);
        let served = Served::start(&image, driver);
        served.qemu_io(&[
            "read -P 0x33 0 4M",
            "write -q -P 0x55 4M 2M",
            "discard 0 64k",
        ]);
        served.stop();
        qemu::assert_no_errors(&image);
        qemu::img("convert -f qcow2 -O raw -l then")
            .arg(&image)
            .arg(&raw)
            .ok();
        let then = content::bytes(&raw);
        assert!(
            then[..6 << 20].iter().all(|&byte| byte == 0x11),
            "{driver:?}: the snapshot was written to"
        );
        assert!(
            then[6 << 20..].iter().all(|&byte| byte == 0),
            "{driver:?}: the snapshot was written to"
        );
    }
}

/// Cloud Hypervisor opens a compressed image for writing, dies, and then cannot open it any more.
#[test]
fn cloud_hypervisor_compressed_image_after_a_crash() {
    for compression in ["zlib", "zstd"] {
        for driver in Driver::ALL {
            let scratch = Scratch::new();
            let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
            let mut expected = content::compressible(7, 4 << 20);
            std::fs::write(&raw, &expected).expect("writing");
            let convert = qemu::img("convert -c -f raw -O qcow2 -o")
                .arg(format!("compression_type={compression}"));
            convert.arg(&raw).arg(&image).ok();
            let served = Served::start(&image, driver);
            let client = served
                .holding("h.pwrite(b'\\x11' * 1000, 100000)\nh.flush()\nh.trim(65536, 1 << 20)");
            served.kill();
            client.release();

            qemu::assert_no_errors(&image);
            expected[100_000..101_000].fill(0x11);
            let mut model = Model::holding(expected);
            model.follow(&[script::Step::Discard(MIB, 64 * KIB)]);
            let served = Served::start(&image, driver);
            served.copy_out(&raw);
            served.stop();
            model.assert_equals_file(&raw, &format!("{compression}, {driver:?}: read by urus"));
            qemu::convert_to_raw(&image, &raw);
            model.assert_equals_file(&raw, &format!("{compression}, {driver:?}: read by QEMU"));
        }
    }
}

/// Cloud Hypervisor erases the recorded backing format when it opens an overlay after a crash, so that the backing file
/// is probed from then on; and it probes in the first place where the overlay is version 2 or has a header of 104
/// bytes. The raw backing file here holds a qcow2 image: the guest must see that image's own bytes.
#[test]
fn cloud_hypervisor_backing_format_lost() {
    for (name, options) in [
        ("112 bytes", ""),
        ("104 bytes", ""),
        ("version 2", "compat=0.10"),
    ] {
        for driver in Driver::ALL {
            let scratch = Scratch::new();
            let (base, top) = (scratch.file("base.raw"), scratch.file("top.qcow2"));
            qemu::create(&base, "", 256 * KIB);
            qemu::io_file(&base, &["write -q -P 0x99 0 256k"]);
            let bytes = content::bytes(&base);
            qemu::create_overlay(&top, options, "base.raw", "raw");
            if name == "104 bytes" {
                header::shorten_to_104(&top);
                qemu::assert_clean(&top);
            }
            if name != "version 2" {
                // What a crash of another program leaves: the next open has something to repair.
                header::set_bits(&top, header::INCOMPATIBLE, header::DIRTY);
            }
            let reads_raw = |served: &Served| {
                let copy = scratch.file("copy");
                served.copy_out(&copy);
                let copy = content::bytes(&copy);
                assert!(
                    copy[..bytes.len() - 65536] == bytes[..bytes.len() - 65536],
                    "{name}, {driver:?}: probed"
                );
            };
            let served = Served::start(&top, driver);
            reads_raw(&served);
            let end = bytes.len() - 65536;
            let client = served.holding(&format!("h.pwrite(b'\\x11' * 512, {end})\nh.flush()"));
            served.kill();
            client.release();
            for step in ["killed", "served again"] {
                let info = qemu::info(&top);
                assert_eq!(
                    info["backing-filename-format"], "raw",
                    "{name}, {driver:?}, {step}"
                );
                assert_eq!(
                    info["backing-filename"], "base.raw",
                    "{name}, {driver:?}, {step}"
                );
                let served = Served::start(&top, driver);
                reads_raw(&served);
                served.stop();
            }
            assert!(
                bytes == content::bytes(&base),
                "{name}, {driver:?}: the backing file was changed"
            );
        }
    }
}

/// Cloud Hypervisor opens a LUKS image and puts plain text into it. Encryption is not supported yet: refused by name,
/// for reading too, and nothing is written. The same for the legacy cipher.
#[test]
fn cloud_hypervisor_luks_image_opened() {
    let scratch = Scratch::new();
    let (luks, legacy) = (scratch.file("luks.qcow2"), scratch.file("legacy.qcow2"));
    let create = qemu::img("create -q -f qcow2 --object secret,id=key,data=abc -o");
    let create = create.arg("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10");
    create.arg(&luks).arg("16M").ok();
    qemu::create(&legacy, "", 16 * MIB);
    header::set_u32(&legacy, header::CRYPT_METHOD, 1);
    for image in [&luks, &legacy] {
        let before = content::bytes(image);
        for driver in Driver::ALL {
            for arguments in ["", "--read-only"] {
                let finished = Serve::new(image, driver).with(arguments).refused();
                let _ = finished.says_one_of(&["luks", "encrypt", "aes"]);
            }
        }
        assert!(
            before == content::bytes(image),
            "{} was changed",
            image.display()
        );
    }
}

/// Cloud Hypervisor with clusters of 512 bytes: writes fail, or are gone after a clean close.
#[test]
fn cloud_hypervisor_clusters_of_512_bytes() {
    for driver in Driver::ALL {
        for cache in ["writeback", "none"] {
            let scratch = Scratch::new();
            let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
            qemu::create(&image, "cluster_size=512", 8 * MIB);
            let steps = script::random(512, 8 * MIB, 512, 300);
            let mut model = Model::zeroes(8 * MIB);
            model.follow(&steps);
            let served = Serve::new(&image, driver)
                .with("--cache")
                .arg(cache)
                .start();
            served.qemu_io(&script::commands(&steps));
            served.stop();
            qemu::assert_clean(&image);
            qemu::convert_to_raw(&image, &raw);
            model.assert_equals_file(&raw, &format!("{driver:?}, cache={cache}"));
        }
    }
}

/// Cloud Hypervisor drops bitmaps without a word and leaks their clusters. Until urus maintains them it refuses to write
/// to such an image, and says why; reading works, and the bitmaps stay.
#[test]
fn cloud_hypervisor_bitmaps_dropped() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", 8 * MIB);
    qemu::img("bitmap --add").arg(&image).arg("backup").ok();
    qemu::io_file(&image, &["write -q -P 0x11 0 1M"]);
    let before = content::bytes(&image);
    for driver in Driver::ALL {
        let _ = Serve::new(&image, driver)
            .refused()
            .says_one_of(&["bitmap"]);
        let served = Serve::new(&image, driver).with("--read-only").start();
        served.qemu_io_read_only(&["read -P 0x11 0 1M", "read -P 0 1M 7M"]);
        served.stop();
        assert!(
            before == content::bytes(&image),
            "{driver:?} changed the image"
        );
    }
    assert_eq!(
        qemu::info(&image)["format-specific"]["data"]["bitmaps"][0]["name"],
        "backup"
    );
}

/// Cloud Hypervisor #6354: lazy_refcounts is switched off in the image without a word. urus keeps the flag, and with it
/// whatever else it does not know: compatible bits, extensions, bytes after the header that it understands.
#[test]
fn cloud_hypervisor_6354_lazy_refcounts_and_unknown_extensions_lost() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "lazy_refcounts=on", 8 * MIB);
        let end = end_of_extensions(&image);
        let unknown = [
            &0x7572_7573_u32.to_be_bytes()[..],
            &11_u32.to_be_bytes(),
            b"keep me, ok\0\0\0\0\0",
        ]
        .concat();
        header::patch(&image, end, &unknown);
        header::set_bits(&image, header::COMPATIBLE, 1 << 40);
        header::set_bits(&image, header::AUTOCLEAR, 1 << 50);
        let served = Serve::new(&image, driver).with("--read-only").start();
        served.stop();
        assert_eq!(
            header::u64_at(&image, header::AUTOCLEAR),
            1 << 50,
            "{driver:?}: read-only clears nothing"
        );

        let served = Served::start(&image, driver);
        served.qemu_io(&["write -q -P 0x11 0 1M"]);
        served.stop();
        let kept = 1 << 40 | header::LAZY_REFCOUNTS;
        assert_eq!(
            header::u64_at(&image, header::COMPATIBLE),
            kept,
            "{driver:?}: compatible bits"
        );
        assert_eq!(
            header::u64_at(&image, header::INCOMPATIBLE),
            0,
            "{driver:?}: incompatible bits"
        );
        assert_eq!(
            header::u64_at(&image, header::AUTOCLEAR),
            0,
            "{driver:?}: unknown autoclear bits"
        );
        let cluster_0 = &content::bytes(&image)[..65536];
        let found = cluster_0
            .windows(unknown.len())
            .any(|window| window == unknown);
        assert!(found, "{driver:?}: an unknown extension was dropped");
        qemu::assert_clean(&image);
    }
}

/// Where the list of header extensions ends: the place for one more.
fn end_of_extensions(image: &Path) -> u64 {
    let mut at = u64::from(header::u32_at(image, header::HEADER_LENGTH));
    while header::u32_at(image, at) != 0 {
        at += 8 + u64::from(header::u32_at(image, at + 4)).next_multiple_of(8);
    }
    at
}

/// Cloud Hypervisor #6349: an image is refused because its refcount table is larger than its size needs. It may be: an
/// image that has shrunk, or whose tables were once grown in large steps.
#[test]
fn cloud_hypervisor_6349_large_refcount_table_refused() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "", 16 * MIB);
        qemu::io_file(&image, &["write -q -P 0x11 0 1M"]);
        let table = header::u64_at(&image, header::REFCOUNT_TABLE_OFFSET);
        let entry: [u8; 8] = header::read(&image, table);
        let new_table = std::fs::metadata(&image)
            .expect("metadata")
            .len()
            .next_multiple_of(65536);
        header::patch(
            &image,
            new_table,
            &[&entry[..], &[0; 16 * 65536 - 8]].concat(),
        );
        header::set_u64(&image, header::REFCOUNT_TABLE_OFFSET, new_table);
        header::set_u32(&image, header::REFCOUNT_TABLE_CLUSTERS, 16);
        let _ = qemu::img("check -q -f qcow2 -r all").arg(&image).run();
        qemu::assert_clean(&image);

        let served = Served::start(&image, driver);
        served.qemu_io(&["read -P 0x11 0 1M", "write -q -P 0x22 8M 4M"]);
        served.stop();
        qemu::assert_clean(&image);
        qemu::io_file(&image, &["read -P 0x11 0 1M", "read -P 0x22 8M 4M"]);
    }
}

/// Cloud Hypervisor #8007: with O_DIRECT, metadata I/O that is not aligned gets EINVAL. XFS on a loop device with
/// sectors of 4096 bytes takes nothing smaller, so everything that is smaller has to be widened.
#[test]
fn cloud_hypervisor_8007_direct_io_with_sectors_of_4096_bytes() {
    let scratch = Scratch::new();
    let disk = scratch.file("disk");
    std::fs::File::create(&disk)
        .and_then(|file| file.set_len(400 * MIB))
        .expect("a file for a loop device");
    let device = Loop::attach_with(&disk, "--sector-size 4096 --direct-io=on");
    program("mkfs.xfs").arg("-q").arg(device.device()).ok();
    let mount = Mount::device(device.device(), &scratch.file("mnt"));
    for driver in Driver::ALL {
        for options in [
            "cluster_size=512",
            "cluster_size=2k,refcount_bits=1",
            "cluster_size=4k",
            "",
            "compat=0.10",
        ] {
            let context = format!("{driver:?}, {options}");
            let (base, image) = (
                mount.path().join("base.qcow2"),
                mount.path().join("image.qcow2"),
            );
            let (size, raw) = (4 * MIB + 512, scratch.file("raw"));
            // The backing file's last sector is not a whole one of the disk's.
            qemu::create(&base, "cluster_size=512", 3 * MIB + 1536);
            let below = script::random(8, 3 * MIB, 512, 30);
            let below: Vec<_> = below
                .into_iter()
                .filter(|step| !matches!(step, script::Step::Discard(..)))
                .collect();
            qemu::io_file(&base, &script::commands(&below));
            qemu::create(&image, options, size);
            qemu::img("rebase -u -f qcow2 -F qcow2 -b base.qcow2")
                .arg(&image)
                .ok();
            let steps = script::random(8007, size, 4096, 80);
            let mut model = Model::zeroes(size);
            model.follow(&below);
            model.follow(&steps);
            let served = Serve::new(&image, driver).with("--cache none").start();
            served.qemu_io(&script::commands(&steps));
            served.copy_out(&raw);
            served.stop();
            model.assert_equals_file(&raw, &context);
            qemu::assert_clean(&image);
            qemu::convert_to_raw(&image, &raw);
            model.assert_equals_file(&raw, &context);
            std::fs::remove_file(&image).expect("removing an image");
        }
        // A raw image, written in pieces smaller than a sector of the disk.
        let image = mount.path().join("image.raw");
        let mut expected = content::noise(1, 25 * 4096);
        std::fs::write(&image, &expected).expect("writing");
        let served = Serve::new(&image, driver)
            .with("--format raw --cache none")
            .start();
        served.qemu_io(&[
            "write -q -P 0x11 99840 512",
            "write -q -P 0x22 1536 9216",
            "flush",
        ]);
        served.stop();
        expected[99_840..100_352].fill(0x11);
        expected[1536..10_752].fill(0x22);
        assert!(
            content::bytes(&image) == expected,
            "{driver:?}: a raw image"
        );
    }
    mount.unmount();
    device.detach();
}

/// Cloud Hypervisor #8178 and #8679: opening scans all metadata, a second for 1 TiB. The image here has every L2 table
/// and every refcount block that 1 TiB can have. The best of several starts counts, because the machine may be busy;
/// the time includes the start of the process.
#[test]
fn cloud_hypervisor_8679_open_of_one_tebibyte() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "preallocation=metadata", TIB);
    for driver in Driver::ALL {
        let start = || Serve::new(&image, driver).within(MEMORY).start();
        let times = (0..7).map(|_| {
            let served = start();
            let time = served.ready_after;
            served.stop();
            time
        });
        let best = times.min().expect("several starts");
        println!("{driver:?}: 1 TiB served after {best:?}");
        assert!(best < Duration::from_millis(150), "{driver:?}: {best:?}");

        // Nor after a kill in the middle of writing.
        let served = start();
        let client =
            served.holding("for n in range(64): h.pwrite(b'\\x11' * 65536, n << 34)\nh.flush()");
        served.kill();
        client.release();
        let best = (0..3).map(|_| {
            let served = start();
            let time = served.ready_after;
            served.nbdsh("for n in range(64): assert h.pread(512, n << 34) == b'\\x11' * 512");
            served.kill();
            time
        });
        let best = best.min().expect("several starts");
        assert!(
            best < Duration::from_millis(150),
            "{driver:?}, after a kill: {best:?}"
        );
    }
}

/// osv-scalibr #1997: a file of 120 bytes makes the reader ask for 4 GB. Each of these is refused at once, within
/// bounded memory, whatever the command.
#[test]
fn osv_scalibr_1997_small_file_asks_for_gigabytes() {
    let scratch = Scratch::new();
    let (whole, image) = (scratch.file("whole.qcow2"), scratch.file("image.qcow2"));
    qemu::create(&whole, "", TIB);
    let start = content::bytes(&whole)[..120].to_vec();
    let wild: [(&str, u64, &[u8]); 7] = [
        ("l1_size", header::L1_SIZE, &u32::MAX.to_be_bytes()),
        (
            "size",
            header::SIZE,
            &(i64::MAX.cast_unsigned() - 511).to_be_bytes(),
        ),
        (
            "refcount_table_clusters",
            header::REFCOUNT_TABLE_CLUSTERS,
            &u32::MAX.to_be_bytes(),
        ),
        (
            "nb_snapshots",
            header::NB_SNAPSHOTS,
            &u32::MAX.to_be_bytes(),
        ),
        (
            "backing_file_size",
            header::BACKING_FILE_OFFSET,
            &[0, 0, 0, 0, 0, 0, 0, 112, 0xff, 0xff, 0xff, 0xff],
        ),
        (
            "header_length",
            header::HEADER_LENGTH,
            &0xffff_fff8_u32.to_be_bytes(),
        ),
        (
            "extension length",
            112,
            &[0xe2, 0x79, 0x2a, 0xca, 0xff, 0xff, 0xff, 0xf0],
        ),
    ];
    for (what, offset, bytes) in wild {
        std::fs::write(&image, &start).expect("writing");
        header::patch(&image, offset, bytes);
        let before = content::bytes(&image);
        for driver in Driver::ALL {
            let _ = Serve::new(&image, driver).within(MEMORY).refused();
        }
        for command in ["info", "check", "map"] {
            let started = Instant::now();
            let finished = urus_within(MEMORY).arg(command).arg(&image).run();
            assert!(
                started.elapsed() < Duration::from_secs(5),
                "{what}: {finished}"
            );
            // What info can still tell of a broken image is its own affair; it must not die of it.
            if command != "info" {
                let _ = finished.expect_refusal();
            } else {
                assert!(finished.status.code().is_some(), "{what}: {finished}");
            }
        }
        assert!(
            before == content::bytes(&image),
            "{what}: the file was changed"
        );
    }
}

/// ublksrv #67: an image that qemu-img made with no options at all does not open.
#[test]
fn ublksrv_67_default_image_does_not_open() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::img("create -f qcow2").arg(&image).arg("1G").ok();
        let served = Served::start(&image, driver);
        served.qemu_io(&[
            "write -q -P 0x11 1000M 1M",
            "read -P 0x11 1000M 1M",
            "read -P 0 0 1M",
        ]);
        served.stop();
        qemu::assert_clean(&image);
        urus().arg("info").arg(&image).ok();
    }
}

/// krunkit, smolvm #992: fstrim in the guest gives nothing back to the host. A file system is filled, emptied and
/// trimmed; the image file must shrink on disk by nearly all of it.
#[test]
fn krunkit_fstrim_gives_nothing_back() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "", 256 * MIB);
        let served = Serve::new(&image, driver).with("--discard unmap").start();
        let file = AsFile::new(&served, &scratch.file("export"), 2);
        let device = Loop::attach(&scratch.file("export"));
        program("mke2fs")
            .words("-q -t ext4 -E nodiscard")
            .arg(device.device())
            .ok();
        let mount = Mount::device(device.device(), &scratch.file("mnt"));
        std::fs::write(mount.path().join("large"), content::noise(9, 64 << 20)).expect("writing");
        rustix::fs::syncfs(std::fs::File::open(mount.path()).expect("opening")).expect("syncfs");
        let full = content::allocated_bytes(&image);
        assert!(full > 64 * MIB, "{driver:?}: only {full} bytes");
        std::fs::remove_file(mount.path().join("large")).expect("removing");
        rustix::fs::syncfs(std::fs::File::open(mount.path()).expect("opening")).expect("syncfs");
        program("fstrim").arg(mount.path()).ok();
        mount.unmount();
        device.detach();
        file.close();
        served.stop();
        let empty = content::allocated_bytes(&image);
        assert!(
            empty + 60 * MIB < full,
            "{driver:?}: {full} bytes before, {empty} after fstrim"
        );
        qemu::assert_clean(&image);
    }
}
