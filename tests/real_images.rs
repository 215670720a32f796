//! Real data through the whole program: an ext4 file system with a gibibyte of files from this machine.
//!
//! Guards against everything that small synthetic images do not show: long runs of real compressed clusters, big and
//! sparse address ranges, readers that ask for megabytes at once, file systems that check their own structures.
//! - What nbdcopy gets out is what went in, for plain, zlib and zstd images, for overlays, and for a chain of three.
//! - What fio wrote over four connections is there: fio itself, qemu-img check and qemu-io agree.
//! - A kernel mounts the export, unpacks a tree into it, and e2fsck finds nothing to say.

use std::path::{Path, PathBuf};
use std::time::Duration;
use urus_tests::fixture::{self, Stored};
use urus_tests::mounted::{AsFile, Loop, Mount};
use urus_tests::served::Serve;
use urus_tests::{Driver, MIB, Scratch, Served, content, program, qemu};

/// `BASE ← TOP`, with the fixture under the name `base.qcow2` beside the overlay.
fn overlay(scratch: &Scratch, stored: Stored) -> PathBuf {
    let top = scratch.file("top.qcow2");
    fixture::link(&fixture::image(stored), &scratch.file("base.qcow2"));
    qemu::create_overlay(&top, "", "base.qcow2", "qcow2");
    top
}

fn assert_served_equals_source(image: &Path, arguments: &str, driver: Driver, copy: &Path) {
    let served = Serve::new(image, driver).with(arguments).start();
    served.copy_out(copy);
    served.stop();
    content::assert_same(&fixture::ext4(), copy);
    std::fs::remove_file(copy).expect("removing a copy");
}

fn copied_out(stored: Stored, driver: Driver) {
    let scratch = Scratch::new();
    let top = overlay(&scratch, stored);
    let copy = scratch.file("copy.raw");
    assert_served_equals_source(&scratch.file("base.qcow2"), "--read-only", driver, &copy);
    let before = content::bytes(&top);
    assert_served_equals_source(&top, "", driver, &copy);
    assert!(
        before == content::bytes(&top),
        "reading changed the overlay"
    );
}

#[test]
fn plain_image_and_overlay_copied_out_with_io_uring() {
    copied_out(Stored::Plain, Driver::IoUring);
}

#[test]
fn plain_image_and_overlay_copied_out_with_the_blocking_driver() {
    copied_out(Stored::Plain, Driver::Blocking);
}

#[test]
fn zlib_image_and_overlay_copied_out_with_io_uring() {
    copied_out(Stored::Zlib, Driver::IoUring);
}

#[test]
fn zlib_image_and_overlay_copied_out_with_the_blocking_driver() {
    copied_out(Stored::Zlib, Driver::Blocking);
}

#[test]
fn zstd_image_and_overlay_copied_out_with_io_uring() {
    copied_out(Stored::Zstd, Driver::IoUring);
}

#[test]
fn zstd_image_and_overlay_copied_out_with_the_blocking_driver() {
    copied_out(Stored::Zstd, Driver::Blocking);
}

/// Base (zlib) ← middle ← top, where urus has written into the middle and into the top: each read has to find the
/// nearest layer that knows the cluster, also where one cluster is a patchwork of two layers.
fn chain_of_three(driver: Driver) {
    let scratch = Scratch::new();
    let middle = scratch.file("middle.qcow2");
    let top = scratch.file("top.qcow2");
    fixture::link(&fixture::image(Stored::Zlib), &scratch.file("base.qcow2"));
    qemu::create_overlay(&middle, "", "base.qcow2", "qcow2");
    qemu::create_overlay(&top, "", "middle.qcow2", "qcow2");
    assert_served_equals_source(&top, "--read-only", driver, &scratch.file("copy.raw"));

    for (image, seed) in [(&middle, 1), (&top, 2)] {
        let served = Served::start(image, driver);
        let writes: Vec<String> = (0..48_u64)
            .map(|number| {
                let offset = (number * 37 + seed * 11) % 96 * 10 * MIB + number * 512;
                format!(
                    "write -q -P {} {offset} {}",
                    16 * seed + number % 16,
                    512 * (1 + number * 3)
                )
            })
            .collect();
        served.qemu_io(&writes);
        served.stop();
        qemu::assert_clean(image);
    }
    let copy = scratch.file("copy.raw");
    let served = Served::start(&top, driver);
    served.copy_out(&copy);
    served.stop();
    qemu::assert_reads_as(&top, &copy);
}

#[test]
fn chain_of_three_with_io_uring() {
    chain_of_three(Driver::IoUring);
}

#[test]
fn chain_of_three_with_the_blocking_driver() {
    chain_of_three(Driver::Blocking);
}

/// Four connections of sixteen requests each overwrite 256 MiB of an overlay over compressed clusters, in pieces that
/// start and end anywhere; fio verifies checksums over the same connections.
fn fio_verifies(driver: Driver) {
    let scratch = Scratch::new();
    let top = overlay(&scratch, Stored::Zstd);
    let served = Serve::new(&top, driver).with("--num-queues 4").start();
    // Two marks that are left of and right of where fio writes.
    let marks = ["write -q -P 0xa5 0 192k", "write -q -P 0x5a 300M 333k"];
    served.qemu_io(&marks);
    let fio = program("fio")
        .words("--name=verify --ioengine=nbd --rw=randwrite --bsrange=4k-64k --iodepth=16");
    let fio = fio.words(
        "--numjobs=4 --offset=1m --offset_increment=64m --size=64m --group_reporting --minimal",
    );
    let fio = fio
        .words("--verify=crc32c --do_verify=1 --verify_fatal=1")
        .arg(format!("--uri={}", served.uri()));
    fio.current_dir(scratch.path())
        .limit(Duration::from_secs(240))
        .ok();
    let copy = scratch.file("copy.raw");
    served.copy_out(&copy);
    served.stop();

    qemu::assert_clean(&top);
    qemu::assert_reads_as(&top, &copy);
    qemu::io_file(&top, &["read -P 0xa5 0 192k", "read -P 0x5a 300M 333k"]);
}

#[test]
fn fio_verifies_four_connections_with_io_uring() {
    fio_verifies(Driver::IoUring);
}

#[test]
fn fio_verifies_four_connections_with_the_blocking_driver() {
    fio_verifies(Driver::Blocking);
}

/// The file system inside the image, mounted by the kernel through the export. The unpacked tree is read back after a
/// fresh mount, so from the image and not from the cache; e2fsck judges the device, and then the file that QEMU reads.
fn mounted(stored: Stored, driver: Driver) {
    let scratch = Scratch::new();
    let top = overlay(&scratch, stored);
    let directories = fixture::some_directories(80 * MIB);
    let tar = scratch.file("tree.tar");
    program("tar")
        .words("-C / -cf")
        .arg(&tar)
        .args(directories.iter().map(|path| relative(path)))
        .ok();

    let served = Serve::new(&top, driver).with("--num-queues 4").start();
    let file = AsFile::new(&served, &scratch.file("export"), 4);
    let device = Loop::attach(&scratch.file("export"));
    let mount = Mount::device(device.device(), &scratch.file("mnt"));
    let unpacked = mount.path().join("unpacked");
    std::fs::create_dir(&unpacked).expect("a directory in the mounted file system");
    program("tar")
        .arg("-C")
        .arg(&unpacked)
        .arg("-xf")
        .arg(&tar)
        .ok();
    mount.unmount();

    let mount = Mount::device(device.device(), &scratch.file("mnt"));
    for directory in &directories {
        let copy = mount.path().join("unpacked").join(relative(directory));
        program("diff")
            .words("-r --no-dereference")
            .arg(directory)
            .arg(copy)
            .ok();
    }
    mount.unmount();
    program("e2fsck").words("-fn").arg(device.device()).ok();
    device.detach();
    file.close();
    served.stop();

    qemu::assert_clean(&top);
    let raw = scratch.file("copy.raw");
    qemu::convert_to_raw(&top, &raw);
    program("e2fsck").words("-fn").arg(&raw).ok();
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").expect("an absolute path")
}

#[test]
fn tree_unpacked_into_a_mounted_overlay_with_io_uring() {
    mounted(Stored::Plain, Driver::IoUring);
}

#[test]
fn tree_unpacked_into_a_mounted_overlay_with_the_blocking_driver() {
    mounted(Stored::Zstd, Driver::Blocking);
}
