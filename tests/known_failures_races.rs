//! Failures of other implementations, part one: ordering, races, error paths. Each test is named after the program and
//! the report in which the failure was seen, and shows that urus does not share it, from outside, through NBD.
//!
//! Being outside, these tests see what a killed process leaves behind, not what a power cut does; the crash states are
//! the simulator's part (urus-sim), which removes each rule on purpose and must notice.
//!
//! Not to be seen from outside, and tested elsewhere: Cloud Hypervisor #8607 (pause, in the facade's tests) and the
//! lock that is let go between mapping and I/O (in the engine's and the simulator's).

use std::path::Path;
use std::time::Duration;
use urus_tests::mounted::Mount;
use urus_tests::script::{self, Model, Rng, Step};
use urus_tests::served::Serve;
use urus_tests::{Driver, KIB, MIB, Scratch, Served, content, header, program, qemu};

const CLUSTER: usize = 64 << 10;

/// A killed server's image must have no errors, must read with QEMU, and must be usable again; leaks are allowed.
fn reopens(image: &Path, driver: Driver) {
    qemu::assert_no_errors(image);
    let served = Served::start(image, driver);
    served.qemu_io(&["write -P 0x77 0 4k", "flush", "read -P 0x77 0 4k"]);
    served.stop();
    qemu::assert_no_errors(image);
}

/// QEMU 10.0.2: a small write over a compressed cluster frees the compressed bytes, and the next allocating write may
/// take their place before the mapping that gave them up is on disk. Killed there, the untouched rest of that guest
/// cluster, flushed long ago, is gone. `check` does not notice, so this reads every byte. In QEMU the dangerous moment
/// is short: a kill at a random moment meets it about once in twenty times. So there are many kills.
#[test]
fn qemu_early_reuse_of_a_compressed_cluster() {
    const COMPRESSED: usize = 128;
    let scratch = Scratch::new();
    let (source, original) = (scratch.file("source"), scratch.file("original.qcow2"));
    let old = content::compressible(1, COMPRESSED * CLUSTER);
    std::fs::write(&source, &old).expect("writing");
    qemu::img("convert -c -f raw -O qcow2")
        .arg(&source)
        .arg(&original)
        .ok();
    qemu::img("resize -q -f qcow2")
        .arg(&original)
        .arg("32M")
        .ok();
    let mut rng = Rng::new(10_002);
    for round in 0..20 {
        let driver = Driver::alternating(round);
        let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
        std::fs::copy(&original, &image).expect("copying");
        let served = Served::start(&image, driver);
        // Never a flush: what is freed stays free only in memory. The last round waits until all is written.
        let (depth, sign) = (1 + rng.below(16), scratch.file("sign"));
        let script = format!(
            "def write(offset, data):
    while h.aio_in_flight() >= {depth}: h.poll(-1)
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset)
open('{}', 'w')
for c in range({COMPRESSED}):
    write(c * 65536 + 8192, b'\\xee' * 4096)
    if c % 2: write(({COMPRESSED} + c) * 65536, b'\\xdd' * 65536)
while h.aio_in_flight(): h.poll(-1)
h.pread(512, 0)",
            sign.display()
        );
        let wait = Duration::from_millis(if round < 18 { rng.below(100) } else { 3000 });
        killed_during(served, &script, &sign, wait);

        qemu::assert_no_errors(&image);
        qemu::convert_to_raw(&image, &raw);
        let found = content::bytes(&raw);
        for (number, (old, found)) in old.chunks(CLUSTER).zip(found.chunks(CLUSTER)).enumerate() {
            let written = 8192..12288;
            assert!(
                old[..written.start] == found[..written.start],
                "{driver:?}: cluster {number}, before the write"
            );
            assert!(
                old[written.end..] == found[written.end..],
                "{driver:?}: cluster {number}, after the write"
            );
            for (old, found) in old[written.clone()]
                .chunks(512)
                .zip(found[written].chunks(512))
            {
                assert!(
                    found == old || found == [0xee; 512],
                    "{driver:?}: cluster {number}, where it was written"
                );
            }
        }
        for (number, sector) in found[old.len()..].chunks(512).enumerate() {
            let known =
                [0, 0xdd].contains(&sector[0]) && sector.iter().all(|&byte| byte == sector[0]);
            assert!(known, "{driver:?}: foreign bytes in new sector {number}");
        }
        reopens(&image, driver);
    }
}

/// Kills the server so long after its client has made the file `sign`, whatever the client is doing then.
fn killed_during(served: Served, script: &str, sign: &Path, wait: Duration) {
    let _ = std::fs::remove_file(sign);
    let client = served.nbdsh_program(script).limit(Duration::from_secs(60));
    std::thread::scope(|scope| {
        let client = scope.spawn(|| client.run());
        let begun =
            urus_tests::program::poll(Duration::from_secs(20), || sign.exists().then_some(()));
        assert!(begun.is_some(), "the client did not begin: {script}");
        std::thread::sleep(wait);
        served.kill();
        // The client has lost its server; how it takes that is its own affair.
        let _ = client.join();
    });
}

/// imago 0.2.6: one allocating write and an abort, and L1 points to an L2 table whose refcount is still 0; the next
/// writer gives that table away.
#[test]
fn imago_one_write_then_abort() {
    for driver in Driver::ALL {
        for options in [
            "",
            "cluster_size=512",
            "cluster_size=2M",
            "lazy_refcounts=on",
        ] {
            let scratch = Scratch::new();
            let image = scratch.file("image.qcow2");
            qemu::create(&image, options, 64 * MIB);
            let served = Served::start(&image, driver);
            let client = served.holding("h.pwrite(b'\\x11' * 65536, 1 << 20)");
            served.kill();
            client.release();
            reopens(&image, driver);
        }
    }
}

/// Cloud Hypervisor #7660 and #8358: with several queues each had metadata of its own, and the first 64 KiB of the
/// file, the header, were overwritten. Four connections take turns within every cluster of an empty image.
#[test]
fn cloud_hypervisor_7660_8358_header_overwritten_with_several_queues() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
        qemu::create(&image, "", 32 * MIB);
        let served = Serve::new(&image, driver).with("--num-queues 4").start();
        served.nbdsh_with_connections(
            4,
            "for first in range(0, 8192, 64):
    for b in range(first, first + 64):
        put(b % 4, b * 4096, bytes([b % 251 + 1]) * 4096)
    settle()",
        );
        served.copy_out(&raw);
        served.stop();
        qemu::assert_clean(&image);
        let expected: Vec<u8> = (0..8192_usize)
            .flat_map(|block| [small(block % 251) + 1; 4096])
            .collect();
        assert!(expected == content::bytes(&raw), "{driver:?}");
        qemu::assert_reads_as(&image, &raw);
    }
}

/// Cloud Hypervisor #8606: after days of writes, 118 of 200 L2 tables had been handed out again as data. Many small L2
/// tables, a cache that holds few of them, four connections that write and discard without end; then every byte.
#[test]
fn cloud_hypervisor_8606_l2_tables_reallocated_as_data() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
        let quarter = 8 * MIB;
        qemu::create(&image, "cluster_size=1k", 4 * quarter);
        let mut model = Model::zeroes(4 * quarter);
        for round in 0..3 {
            let scripts = quarters(100 * round, quarter, 4 * KIB, 250);
            let served = Serve::new(&image, driver)
                .with("--num-queues 4 --l2-cache-size 65536")
                .start();
            script::run_in_parallel(&served, &scripts);
            scripts.iter().for_each(|steps| model.follow(steps));
            served.copy_out(&raw);
            served.stop();
            model.assert_equals_file(&raw, &format!("{driver:?}, round {round}"));
            qemu::assert_clean(&image);
        }
    }
}

/// Four scripts, one for each quarter of the image.
fn quarters(seed: u64, quarter: u64, cluster: u64, steps: usize) -> Vec<Vec<Step>> {
    (0..4)
        .map(|n| {
            script::shifted(
                &script::random(seed + n, quarter, cluster, steps),
                n * quarter,
            )
        })
        .collect()
}

/// Cloud Hypervisor #8624: a freed cluster's hole was punched late, after another queue's flush had already let a third
/// one reuse the cluster, and erased the new owner's data. Two connections free and flush, two allocate and flush.
#[test]
fn cloud_hypervisor_8624_late_punch_of_a_reused_cluster() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
        let quarter = 16 * MIB;
        qemu::create(&image, "", 4 * quarter);
        let mut model = Model::zeroes(4 * quarter);
        let mut rng = Rng::new(8624);
        let mut scripts = vec![Vec::new(); 4];
        for round in 0..80 {
            for (n, steps) in (0..4_u64).zip(&mut scripts) {
                let offset = n * quarter + rng.below(240) * 64 * KIB;
                steps.push(Step::Write(
                    offset,
                    (1 + rng.below(8)) * 64 * KIB,
                    small(round % 250) + 1,
                ));
                if n < 2 {
                    steps.push(Step::Discard(offset, 512 * KIB));
                }
                steps.push(Step::Flush);
            }
        }
        let served = Serve::new(&image, driver).with("--num-queues 4").start();
        script::run_in_parallel(&served, &scripts);
        scripts.iter().for_each(|steps| model.follow(steps));
        served.copy_out(&raw);
        served.stop();
        model.assert_equals_file(&raw, &format!("{driver:?}"));
        qemu::assert_clean(&image);
    }
}

/// Cloud Hypervisor #8621: several queues and a backing file, and the guest's file system was damaged. Four connections
/// write single blocks into the same clusters at the same time; all other blocks must still be the backing file's.
#[test]
fn cloud_hypervisor_8621_several_queues_and_a_backing_file() {
    for driver in Driver::ALL {
        for compressed in [false, true] {
            let scratch = Scratch::new();
            let (top, raw) = (scratch.file("top.qcow2"), scratch.file("raw"));
            let mut expected = content::compressible(8621, 256 * CLUSTER);
            std::fs::write(&raw, &expected).expect("writing");
            let convert =
                qemu::img("convert -f raw -O qcow2").words(if compressed { "-c" } else { "" });
            convert.arg(&raw).arg(scratch.file("base.qcow2")).ok();
            qemu::create_overlay(&top, "", "base.qcow2", "qcow2");

            let served = Serve::new(&top, driver).with("--num-queues 4").start();
            served.nbdsh_with_connections(
                4,
                "def chosen(b): return b * 2654435761 // 128 % 3 == 0
for first in range(0, 4096, 64):
    for b in range(first, first + 64):
        if chosen(b): put(b % 4, b * 4096, bytes([b % 251 + 1]) * 4096)
    if first % 256 == 0: flush(first // 64 % 4)
settle()",
            );
            served.copy_out(&raw);
            served.stop();
            for (block, bytes) in expected.chunks_mut(4096).enumerate() {
                if block * 2_654_435_761 / 128 % 3 == 0 {
                    bytes.fill(small(block % 251) + 1);
                }
            }
            let found = content::bytes(&raw);
            let wrong = expected
                .chunks(4096)
                .zip(found.chunks(4096))
                .position(|(expected, found)| expected != found);
            assert_eq!(
                wrong, None,
                "{driver:?}, compressed {compressed}: the first wrong block"
            );
            qemu::assert_clean(&top);
            qemu::assert_reads_as(&top, &raw);
        }
    }
}

/// Cloud Hypervisor #8637 and #8748: on a full disk an old table was let go before its replacement was safe, and a
/// failed write left a cluster behind that was then handed out twice. Here the disk fills up; the error is ENOSPC, what
/// was written stays readable, and when there is room again the same write succeeds and nothing has leaked.
#[test]
fn cloud_hypervisor_8637_8748_full_disk() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let mount = Mount::small(12 * MIB, &scratch.file("mnt"));
        let image = mount.path().join("image.qcow2");
        let ballast = mount.path().join("ballast");
        std::fs::write(&ballast, vec![1; 4 << 20]).expect("filling a small disk");
        qemu::create(&image, "", 64 * MIB);
        let served = Served::start(&image, driver);
        let script = format!(
            "import errno, os
def block(c): return bytes([c % 251 + 1]) * 65536
def expect_enospc(do):
    try: do()
    except nbd.Error as error: assert error.errnum == errno.ENOSPC, error
    else: raise Exception('no error on a full disk')
full = 0
try:
    while full < 1024:
        h.pwrite(block(full), full * 65536)
        full += 1
except nbd.Error as error:
    assert error.errnum == errno.ENOSPC, error
assert 60 < full < 1024, full
for c in range(10): expect_enospc(lambda: h.pwrite(block(full + c), (full + c) * 65536))
for c in range(full): assert h.pread(65536, c * 65536) == block(c), c
os.unlink('{}')
for c in range(full, full + 40): h.pwrite(block(c), c * 65536)
h.flush()
for c in range(full + 40): assert h.pread(65536, c * 65536) == block(c), c
print(full + 40)",
            ballast.display()
        );
        let finished = served.nbdsh(&script);
        let blocks: usize = finished.stdout.trim().parse().expect("a number of blocks");
        served.stop();

        qemu::assert_clean(&image);
        let raw = scratch.file("raw");
        qemu::convert_to_raw(&image, &raw);
        let found = content::bytes(&raw);
        for (number, bytes) in found.chunks(CLUSTER).take(blocks).enumerate() {
            assert!(
                bytes.iter().all(|&byte| byte == small(number % 251) + 1),
                "{driver:?}: cluster {number}"
            );
        }
        mount.unmount();
    }
}

/// Cloud Hypervisor #8721: an L1 entry was published before the refcount of its table was 1. The server is killed at
/// random moments under load: never an error in the metadata, and all that was flushed before is there.
#[test]
fn cloud_hypervisor_8721_kill_nine_under_load() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (image, log) = (scratch.file("image.qcow2"), scratch.file("flushed"));
        for round in 0..8 {
            let _ = std::fs::remove_file(&image);
            // Small clusters: many tables to publish.
            qemu::create(&image, "cluster_size=512", 32 * MIB);
            let served = Served::start(&image, driver);
            let script = format!(
                "import os
log = os.open('{}', os.O_WRONLY | os.O_CREAT)
for c in range(8192):
    h.pwrite(bytes([c % 251 + 1]) * 4096, c * 37 % 8192 * 4096)
    if c % 8 == 7:
        h.flush()
        os.pwrite(log, b'%8d' % (c + 1), 0)",
                log.display()
            );
            // The first rounds end while the first tables are made, the later ones in the middle of things.
            killed_during(served, &script, &log, Duration::from_millis(round * 35));
            let flushed = std::fs::read_to_string(&log).unwrap_or_default();
            let flushed: usize = flushed.trim().parse().unwrap_or(0);
            qemu::assert_no_errors(&image);
            let raw = scratch.file("raw");
            qemu::convert_to_raw(&image, &raw);
            let found = content::bytes(&raw);
            for c in 0..flushed {
                let at = c * 37 % 8192 * 4096;
                let whole = found[at..at + 4096]
                    .iter()
                    .all(|&byte| byte == small(c % 251) + 1);
                assert!(
                    whole,
                    "{driver:?}, round {round}: block {c} of {flushed} flushed ones"
                );
            }
            reopens(&image, driver);
        }
    }
}

/// Cloud Hypervisor #8647: the dirty bit was cleared by the first of several handles, and after a failed flush. An image
/// that QEMU left dirty, with refcounts that lag, is repaired before the first of four queues allocates; opened
/// read-only it is not touched.
#[test]
fn cloud_hypervisor_8647_dirty_image_repaired_before_use() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        dirty_image(&image);
        let before = content::bytes(&image);
        let served = Serve::new(&image, driver).with("--read-only").start();
        served.qemu_io_read_only(&["read -P 0xab 0 3M"]);
        served.stop();
        assert!(
            before == content::bytes(&image),
            "{driver:?}: a read-only server changed the image"
        );

        let served = Serve::new(&image, driver).with("--num-queues 4").start();
        served.nbdsh_with_connections(
            4,
            "for c in range(64): put(c % 4, (4 << 20) + c * 65536, b'\\xcd' * 65536)
settle()",
        );
        served.stop();
        assert_eq!(
            header::u64_at(&image, header::INCOMPATIBLE) & header::DIRTY,
            0,
            "{driver:?}: still dirty"
        );
        qemu::assert_clean(&image);
        qemu::io_file(&image, &["read -P 0xab 0 3M", "read -P 0xcd 4M 4M"]);
    }
}

/// An image of 16 MiB whose first 3 MiB QEMU wrote, without writing the refcounts, before it died.
fn dirty_image(image: &Path) {
    qemu::create(image, "lazy_refcounts=on", 16 * MIB);
    let commands = ["write -P 0xab 0 3M", "flush", "abort"];
    let finished = qemu::io_program("qcow2", &image.display().to_string(), &commands).run();
    assert!(
        !finished.status.success(),
        "abort should have killed qemu-io: {finished}"
    );
    assert_ne!(
        header::u64_at(image, header::INCOMPATIBLE) & header::DIRTY,
        0,
        "the image should be dirty"
    );
    let check = qemu::img("check -f qcow2").arg(image).run();
    assert_eq!(
        check.status.code(),
        Some(2),
        "the refcounts should lag: {check}"
    );
}

/// Cloud Hypervisor #8597: the file grew to about twice its live data, and repeated writes and zeroes leaked clusters
/// where discarding was off.
#[test]
fn cloud_hypervisor_8597_file_does_not_grow() {
    for (driver, discard) in [
        (Driver::IoUring, "unmap"),
        (Driver::IoUring, "ignore"),
        (Driver::Blocking, "unmap"),
        (Driver::Blocking, "ignore"),
    ] {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "", 64 * MIB);
        let served = Serve::new(&image, driver)
            .with("--discard")
            .arg(discard)
            .start();
        let mut rounds = Vec::new();
        for round in 0..12 {
            let zero = if round % 2 == 0 {
                "write -q -z 0 16M"
            } else {
                "write -q -z -u 0 16M"
            };
            let write = format!("write -q -P {} 0 16M", round + 1);
            rounds.extend([
                write,
                "flush".to_owned(),
                zero.to_owned(),
                "flush".to_owned(),
            ]);
        }
        rounds.push("write -q -P 0x99 0 16M".to_owned());
        served.qemu_io(&rounds);
        served.stop();
        qemu::assert_clean(&image);
        qemu::io_file(&image, &["read -P 0x99 0 16M"]);
        let length = std::fs::metadata(&image).expect("metadata").len();
        assert!(
            length <= 21 * MIB,
            "{driver:?}, discard={discard}: {length} bytes for 16 MiB of data"
        );
    }
}

/// libkrun #824: one request at a time for a whole disk. The image lies on a disk that takes 60 ms for a read; sixteen
/// reads of one connection, sent together, must not take sixteen times that.
#[test]
fn libkrun_824_requests_run_side_by_side() {
    let scratch = Scratch::new();
    let (image, slow) = (scratch.file("image.qcow2"), scratch.file("slow"));
    qemu::create(&image, "", 64 * MIB);
    qemu::io_file(&image, &["write -q -P 0x42 0 64M"]);
    let socket = tempfile::Builder::new()
        .prefix("urus-")
        .tempdir()
        .expect("a directory for a socket");
    let socket = socket.path().join("slow");
    let nbdkit =
        program("nbdkit").words("--foreground --exit-with-parent --filter=delay --filter=nocache");
    let nbdkit = nbdkit
        .arg("--unix")
        .arg(&socket)
        .arg("file")
        .arg(&image)
        .words("rdelay=60ms cachemode=none");
    let _slow_disk =
        urus_tests::mounted::Background::start(nbdkit, &scratch.file("nbdkit.log"), &socket);
    let file = urus_tests::mounted::AsFile::of_uri(
        &format!("nbd+unix:///?socket={}", socket.display()),
        &slow,
        8,
    );

    let served = Serve::new(&slow, Driver::IoUring)
        .with("--read-only --num-queues 1")
        .start();
    let finished = served.nbdsh(
        "import time
assert h.pread(512, 0) == b'\\x42' * 512
def timed(offsets):
    start = time.monotonic()
    for offset in offsets: h.aio_pread(nbd.Buffer(4096), offset)
    while h.aio_in_flight(): h.poll(-1)
    return time.monotonic() - start
one = min(timed([(20 + n) << 20]) for n in range(3))
sixteen = timed([(30 + n) << 20 for n in range(16)])
print(one, sixteen)
assert sixteen < 8 * one, (one, sixteen)",
    );
    println!(
        "one read, sixteen reads: {} seconds",
        finished.stdout.trim()
    );
    served.stop();
    file.close();
}

fn small(number: usize) -> u8 {
    u8::try_from(number).expect("a small number")
}
