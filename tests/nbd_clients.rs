//! The NBD export as its clients see it: libnbd's tools, QEMU's, fio, nbdkit; several at once; and when the server is told
//! to stop while they are at it.
//!
//! Guards against an export that only its own author's client understands, that promises in the handshake what it does
//! not keep, or that loses acknowledged writes when it is stopped.

use rustix::process::Signal;
use serde_json::Value;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};
use urus_tests::served::Serve;
use urus_tests::{Driver, KIB, MIB, Scratch, Served, content, program, qemu, urus};

const SIZE: u64 = 16 * MIB;

fn image(scratch: &Scratch) -> std::path::PathBuf {
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    image
}

/// What the handshake promises, for a writable export and for a read-only one.
#[test]
fn nbdinfo_sees_what_the_export_can() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let served = Served::start(&image, driver);
        let info = program("nbdinfo")
            .arg("--json")
            .arg(served.uri())
            .ok()
            .json();
        assert_eq!(info["protocol"], "newstyle-fixed", "{info}");
        assert_eq!(info["structured"], true, "{info}");
        let export = &info["exports"][0];
        assert_eq!(export["export-size"], SIZE, "{info}");
        assert_eq!(export["is_read_only"], false, "{info}");
        for can in [
            "can_flush",
            "can_fua",
            "can_trim",
            "can_zero",
            "can_multi_conn",
            "can_df",
        ] {
            assert_eq!(export[can], true, "{can}: {info}");
        }
        let contexts = export["contexts"].as_array().expect("contexts");
        assert!(
            contexts.iter().any(|context| context == "base:allocation"),
            "{info}"
        );
        let largest = export["block_size_maximum"].as_u64().expect("a block size");
        assert!(largest >= 32 * MIB, "clients send up to 32 MiB: {info}");

        let size = program("nbdinfo").arg("--size").arg(served.uri()).ok();
        assert_eq!(size.stdout.trim(), SIZE.to_string());
        let list = program("nbdinfo")
            .words("--list --json")
            .arg(served.uri())
            .ok()
            .json();
        assert_eq!(list["exports"].as_array().map(Vec::len), Some(1), "{list}");
        for can in [
            "connect",
            "flush",
            "fua",
            "multi-conn",
            "trim",
            "write",
            "zero",
            "df",
            "structured-reply",
        ] {
            program("nbdinfo")
                .arg("--can")
                .arg(can)
                .arg(served.uri())
                .ok();
        }
        let read_only = program("nbdinfo")
            .words("--is read-only")
            .arg(served.uri())
            .run();
        assert_eq!(read_only.status.code(), Some(2), "{read_only}");
        served.stop();

        let served = Serve::new(&image, driver).with("--read-only").start();
        program("nbdinfo")
            .words("--is read-only")
            .arg(served.uri())
            .ok();
        for cannot in ["write", "trim", "zero"] {
            let answer = program("nbdinfo")
                .arg("--can")
                .arg(cannot)
                .arg(served.uri())
                .run();
            assert_eq!(answer.status.code(), Some(2), "{answer}");
        }
        served.nbdsh(
            "import errno
h.set_strict_mode(0)
for attempt in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.trim(65536, 0), lambda: h.zero(65536, 0)):
    try: attempt()
    except nbd.Error as error: assert error.errnum == errno.EPERM, error
    else: raise Exception('a read-only export was written to')
assert h.pread(512, 0) == bytes(512)",
        );
        served.stop();
    }
}

/// The ranges of an NBD map: start, length, and whether they are (not allocated, zero).
fn nbd_map(served: &Served) -> Vec<(u64, u64, bool, bool)> {
    let map = program("nbdinfo")
        .words("--map --json")
        .arg(served.uri())
        .ok()
        .json();
    let ranges = map.as_array().expect("a list");
    let number = |range: &Value, name: &str| range[name].as_u64().expect("a number");
    let flags = |range: &Value| number(range, "type");
    let tuple = |range: &Value| {
        let (hole, zero) = (flags(range) & 1 != 0, flags(range) & 2 != 0);
        (number(range, "offset"), number(range, "length"), hole, zero)
    };
    ranges.iter().map(tuple).collect()
}

/// `base:allocation` covers the whole export without a gap, in the largest pieces, and agrees with what QEMU maps.
#[test]
fn block_status_agrees_with_qemu() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (base, top) = (scratch.file("base.qcow2"), scratch.file("top.qcow2"));
        qemu::create(&base, "", SIZE);
        qemu::io_file(
            &base,
            &[
                "write -q -P 1 1M 1M",
                "write -q -P 1 4M 2M",
                "write -q -z 8M 1M",
            ],
        );
        qemu::create_overlay(&top, "", "base.qcow2", "qcow2");
        qemu::io_file(
            &top,
            &[
                "write -q -P 2 3M 1M",
                "write -q -z 5M 512k",
                "write -q -P 2 12M 64k",
            ],
        );
        let served = Served::start(&top, driver);
        let map = nbd_map(&served);
        served.stop();
        let mut end = 0;
        for (start, length, ..) in &map {
            assert_eq!(*start, end, "a gap or an overlap: {map:?}");
            end += length;
        }
        assert_eq!(end, SIZE, "{map:?}");
        let equal =
            |pair: &[(u64, u64, bool, bool)]| (pair[0].2, pair[0].3) == (pair[1].2, pair[1].3);
        assert!(
            !map.windows(2).any(equal),
            "neighbours that should be one: {map:?}"
        );
        for range in qemu::map(&top).as_array().expect("a list") {
            let (start, zero) = (
                range["start"].as_u64().expect("a number"),
                range["zero"] == true,
            );
            let inside =
                |entry: &&(u64, u64, bool, bool)| (entry.0..entry.0 + entry.1).contains(&start);
            let entry = map.iter().find(inside).expect("a range");
            assert_eq!(entry.3, zero, "{range} in {map:?}");
            assert!(
                !entry.2 || zero,
                "what is data cannot be a hole: {range} in {map:?}"
            );
        }
    }
}

/// Each command and flag by hand, and what must be an error.
#[test]
fn nbdsh_commands_and_flags() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let served = Serve::new(&image, driver).with("--num-queues 2").start();
        served.nbdsh(
            "import errno, os
size = h.get_size()
assert h.get_protocol() == 'newstyle-fixed' and h.get_structured_replies_negotiated()
big = os.urandom(32 << 20)[:size]

def expect(number, attempt):
    try: attempt()
    except nbd.Error as error: assert error.errnum in number, (error, number)
    else: raise Exception('no error')

# Unaligned, across clusters, as large as it gets, with and without FUA.
h.pwrite(big, 0)
assert h.pread(size, 0) == big
h.pwrite(b'abc', 65535, nbd.CMD_FLAG_FUA)
assert h.pread(5, 65534) == big[65534:65535] + b'abc' + big[65538:65539]
h.pwrite(b'x', size - 1)
assert h.pread(1, size - 1) == b'x'
pieces = []
h.pread_structured(200000, 1000, lambda data, offset, status, error: pieces.append((offset, data)) or 0)
assert b''.join(data for _, data in sorted(pieces)) == h.pread(200000, 1000)
h.pread_structured(4096, 0, lambda *a: 0, nbd.CMD_FLAG_DF)
h.flush()

# Zeroes: with a hole and without, not aligned, with FUA.
h.zero(100000, 12345)
assert h.pread(100002, 12344) == big[12344:12345] + bytes(100000) + big[112345:112346]
h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(65536, 131072) == bytes(65536)
h.zero(65536 * 4, 65536 * 8, nbd.CMD_FLAG_FUA)
assert h.pread(65536 * 4, 65536 * 8) == bytes(65536 * 4)

# Trim leaves zeroes or what was there; what it only touches stays.
before = h.pread(65536 * 3, 65536 * 20)
h.trim(65536 * 2, 65536 * 20 + 1000)
h.trim(512, 65536 * 22 + 1024, nbd.CMD_FLAG_FUA)
after = h.pread(65536 * 3, 65536 * 20)
assert after[:1000] == before[:1000] and after[65536 * 2 + 1536:] == before[65536 * 2 + 1536:]
assert all(new in (0, old) for new, old in zip(after, before))

# Errors leave the connection usable.
h.set_strict_mode(0)
expect([errno.EINVAL], lambda: h.pread(512, size))
expect([errno.EINVAL], lambda: h.pread(1024, size - 512))
expect([errno.ENOSPC, errno.EINVAL], lambda: h.pwrite(b'x' * 1024, size - 512))
expect([errno.ENOSPC, errno.EINVAL], lambda: h.zero(1024, size - 512))
expect([errno.EINVAL], lambda: h.trim(1024, size - 512))
expect([errno.EINVAL], lambda: h.pread(512, 2**63 - 512))
assert h.pread(1, size - 1) == b'x'
h.shutdown()",
        );
        let no_such = program("nbdinfo")
            .arg(served.uri().replace("///", "///nothing-of-that-name"))
            .run();
        assert!(!no_such.status.success(), "{no_such}");
        served.qemu_io(&["read 0 1M"]);
        served.stop();
        qemu::assert_clean(&image);
    }
}

/// FUA means durable: written with it, killed, still there, in a cluster that was not allocated before.
#[test]
fn fua_survives_a_kill() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let served = Served::start(&image, driver);
        let client = served.holding(
            "h.pwrite(b'\\x11' * 4096, 1 << 20, nbd.CMD_FLAG_FUA)
h.pwrite(b'\\x22' * 65536, 2 << 20)
h.zero(65536, 2 << 20, nbd.CMD_FLAG_FUA)",
        );
        served.kill();
        client.release();
        qemu::assert_no_errors(&image);
        qemu::io_file(&image, &["read -P 0x11 1M 4k", "read -P 0 2M 64k"]);
    }
}

/// nbdcopy with four connections: in, from server to server, and out again.
#[test]
fn nbdcopy_both_ways() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (source, back) = (scratch.file("source"), scratch.file("back"));
        // Longer than nbdcopy's share of one thread, 128 MiB, and sparse.
        let file = std::fs::File::create(&source).expect("a file");
        file.set_len(600 * MIB).expect("a length");
        for number in 0..5 {
            use std::os::unix::fs::FileExt;
            let bytes = content::noise(number, 5 << 20);
            file.write_all_at(&bytes, number * 127 * MIB + number * 4096)
                .expect("writing");
        }
        let (one, two) = (scratch.file("one.qcow2"), scratch.file("two.qcow2"));
        qemu::create(&one, "", 600 * MIB);
        qemu::create(&two, "cluster_size=4k", 600 * MIB);
        let first = Serve::new(&one, driver).with("--num-queues 4").start();
        let second = Serve::new(&two, driver).with("--num-queues 4").start();
        let copy = || program("nbdcopy").words("--connections=4 --requests=16");
        copy().arg("--flush").arg(&source).arg(first.uri()).ok();
        copy()
            .arg("--flush")
            .arg(first.uri())
            .arg(second.uri())
            .ok();
        copy().arg(second.uri()).arg(&back).ok();
        first.stop();
        second.stop();
        content::assert_same(&source, &back);
        for image in [&one, &two] {
            qemu::assert_clean(image);
            qemu::assert_reads_as(image, &source);
            let allocated = content::allocated_bytes(image);
            assert!(
                allocated < 40 * MIB,
                "{}: {allocated} bytes for 25 MiB of data",
                image.display()
            );
        }
    }
}

/// qemu-img and qemu-io as clients, and fio, over a unix socket and over TCP at the same time.
#[test]
fn qemu_and_fio_over_both_transports() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
        qemu::create(&image, "", 64 * MIB);
        let address = free_port();
        let served = Serve::new(&image, driver)
            .with("--num-queues 2 --nbd")
            .arg(&address)
            .start();
        let tcp = format!("nbd://{address}");
        let info = qemu::img("info --output=json -f raw").arg(&tcp).ok().json();
        assert_eq!(info["virtual-size"], 64 * MIB, "{info}");
        std::fs::write(&raw, content::noise(5, 64 << 20)).expect("writing");
        qemu::img("convert -n -f raw -O raw -W -m 8")
            .arg(&raw)
            .arg(&tcp)
            .ok();
        qemu::img("compare -f raw -F raw")
            .arg(&raw)
            .arg(served.uri())
            .ok();
        qemu::io("raw", &tcp, &["write -P 0x11 1M 1M", "flush"]);
        served.qemu_io(&["read -P 0x11 1M 1M"]);
        let fio = program("fio")
            .words("--name=both --ioengine=nbd --rw=randrw --bs=4k --iodepth=32 --size=16m");
        let fio = fio
            .words("--offset=16m --verify=crc32c --minimal")
            .arg(format!("--uri={tcp}"));
        fio.current_dir(scratch.path()).ok();
        served.stop();
        qemu::assert_clean(&image);
        qemu::io_file(&image, &["read -P 0x11 1M 1M"]);
    }
}

fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

/// nbdkit's nbd plugin in between: another server's view of this one.
#[test]
fn nbdkit_in_between() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let served = Served::start(&image, Driver::IoUring);
    let directory = tempfile::Builder::new()
        .prefix("urus-")
        .tempdir()
        .expect("a directory for a socket");
    let socket = directory.path().join("between");
    let nbdkit = program("nbdkit")
        .words("--foreground --exit-with-parent --unix")
        .arg(&socket);
    let nbdkit = nbdkit
        .arg("nbd")
        .arg(format!("socket={}", served.socket().display()))
        .arg("shared=true");
    let between = urus_tests::mounted::Background::start(nbdkit, &scratch.file("log"), &socket);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    qemu::io(
        "raw",
        &uri,
        &[
            "write -P 0x11 0 1M",
            "write -z -u 512k 64k",
            "discard 1M 1M",
            "flush",
        ],
    );
    program("nbdinfo").arg("--map").arg(&uri).ok();
    served.qemu_io(&["read -P 0x11 0 512k", "read -P 0 512k 64k"]);
    drop(between);
    served.stop();
    qemu::assert_clean(&image);
}

/// Two clients see each other's writes at once, as multi-conn promises; a third that talks nonsense and a fourth that
/// says nothing do not get in their way, nor in the way of stopping.
#[test]
fn several_clients_and_a_rude_one() {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let served = Serve::new(&image, driver).with("--num-queues 2").start();
        let _silent = UnixStream::connect(served.socket()).expect("connecting");
        let mut rude = UnixStream::connect(served.socket()).expect("connecting");
        let _ = rude.write_all(&content::noise(6, 100_000));
        served.nbdsh_with_connections(
            2,
            "for n in range(200):
    a, b = hs[n % 2], hs[1 - n % 2]
    a.pwrite(bytes([n + 1]) * 4096, n * 4096)
    assert b.pread(4096, n * 4096) == bytes([n + 1]) * 4096
hs[0].flush()
hs[0].shutdown()
assert hs[1].pread(1, 0) == b'\\x01'",
        );
        let idle = served.holding("h.pwrite(b'\\x77' * 512, 8 << 20)");
        let started = Instant::now();
        served.stop();
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "{driver:?}: idle clients held up the end"
        );
        idle.release();
        qemu::assert_clean(&image);
        qemu::io_file(&image, &["read -P 0x77 8M 512", "read -P 1 0 4k"]);
    }
}

/// Told to stop in the middle of work the server finishes what it took on: all that it acknowledged is in the image,
/// without any flush by the client, and the image is clean. Once, and with more signals after the first.
#[test]
fn sigterm_under_load() {
    for driver in Driver::ALL {
        for signals in [
            &[Signal::TERM][..],
            &[Signal::INT],
            &[Signal::TERM, Signal::TERM, Signal::INT, Signal::TERM],
        ] {
            let scratch = Scratch::new();
            let (image, acknowledged) = (scratch.file("image.qcow2"), scratch.file("acknowledged"));
            qemu::create(&image, "cluster_size=4k", 64 * MIB);
            let served = Serve::new(&image, driver).with("--num-queues 4").start();
            let script = format!(
                "import os
log = os.open('{}', os.O_WRONLY | os.O_CREAT)
for n in range(1 << 20):
    h.pwrite(bytes([n % 251 + 1]) * 4096, n * 37 % 16384 * 4096)
    os.pwrite(log, b'%8d' % (n + 1), 0)",
                acknowledged.display()
            );
            std::thread::scope(|scope| {
                scope.spawn(|| served.nbdsh_program(&script).run());
                let begun = || {
                    std::fs::metadata(&acknowledged)
                        .is_ok_and(|file| file.len() > 0)
                        .then_some(())
                };
                assert!(
                    urus_tests::program::poll(Duration::from_secs(20), begun).is_some(),
                    "no write"
                );
                std::thread::sleep(Duration::from_millis(150));
                for signal in signals {
                    served.signal(*signal);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            let _ = served.ended();
            qemu::assert_clean(&image);
            assert_eq!(
                acknowledged_is_there(&image, &acknowledged, &scratch),
                Ok(()),
                "{driver:?}, {signals:?}"
            );
        }
    }
}

/// Block `n` of the client's sequence was written with `n % 251 + 1`; the last lap over a block counts, and one write
/// more may have been done than was acknowledged.
fn acknowledged_is_there(
    image: &Path,
    acknowledged: &Path,
    scratch: &Scratch,
) -> Result<(), String> {
    let raw = scratch.file("raw");
    qemu::convert_to_raw(image, &raw);
    let found = content::bytes(&raw);
    let text = std::fs::read_to_string(acknowledged).expect("the client's log");
    let count: usize = text.trim().parse().expect("a number");
    for n in count.saturating_sub(16_384)..count {
        let at = n * 37 % 16_384 * 4096;
        let byte = u8::try_from(n % 251 + 1).expect("a byte");
        let next_lap = u8::try_from((n + 16_384) % 251 + 1).expect("a byte");
        let block = &found[at..at + 4096];
        let later = n + 16_384 == count && block.iter().all(|&found| found == next_lap);
        if !later && block.iter().any(|&found| found != byte) {
            return Err(format!("write {n} of {count} acknowledged ones is missing"));
        }
    }
    Ok(())
}

/// Without --nbd it serves beside the image; what it prints can be pasted; each log line names the image.
#[test]
fn default_socket_and_lines_to_paste() {
    let scratch = Scratch::new();
    let log = scratch.file("log");
    let serve = urus()
        .words("-v serve demo.qcow2 --create 64M")
        .current_dir(scratch.path());
    let image = scratch.file("demo.qcow2");
    let socket = || {
        let entries = std::fs::read_dir(scratch.path()).expect("reading a directory");
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names
            .into_iter()
            .find(|name| name.starts_with("demo.qcow2") && name.ends_with("sock"))
    };
    let mut server =
        urus_tests::mounted::Background::start_when(serve, &log, || socket().is_some());
    let name = socket().expect("a socket beside the image");
    let uri = format!("nbd+unix:///?socket={}", scratch.file(&name).display());
    program("nbdinfo").words("--can connect").arg(&uri).ok();
    let printed = std::fs::read_to_string(&log).expect("the log");
    for tool in ["nbdcopy", "qemu-img", "fio"] {
        let line = printed
            .lines()
            .find(|line| line.trim_start().starts_with(tool));
        let line = line.unwrap_or_else(|| panic!("no line to paste for {tool}:\n{printed}"));
        let line = line.replace("--runtime=10", "--runtime=1");
        program("sh")
            .arg("-c")
            .arg(line)
            .current_dir(scratch.path())
            .ok();
    }
    assert_eq!(server.stop(), Some(0));
    assert!(socket().is_none(), "the socket is left");
    qemu::assert_clean(&image);
    assert_eq!(qemu::info(&image)["virtual-size"], 64 * MIB);
    let printed = std::fs::read_to_string(&log).expect("the log");
    for line in printed
        .lines()
        .filter(|line| line.contains(" INFO ") || line.contains(" WARN "))
    {
        assert!(
            line.contains("demo.qcow2"),
            "a log line without the image's name: {line}"
        );
    }
}

/// `--discard ignore` keeps every cluster; `unmap` gives the space back to the file system while the server runs.
#[test]
fn discard_policies() {
    for driver in Driver::ALL {
        for (policy, gives_back) in [("unmap", true), ("ignore", false)] {
            let scratch = Scratch::new();
            let image = image(&scratch);
            qemu::io_file(&image, &["write -q -P 0x11 0 16M"]);
            let served = Serve::new(&image, driver)
                .with("--discard")
                .arg(policy)
                .start();
            let before = content::allocated_bytes(&image);
            served.qemu_io(&["discard 1M 12M", "flush"]);
            // Punching may follow the flush at a distance.
            let shrunk = || (content::allocated_bytes(&image) + 11 * MIB < before).then_some(());
            let patience = Duration::from_secs(if gives_back { 20 } else { 1 });
            let shrunk = urus_tests::program::poll(patience, shrunk).is_some();
            assert_eq!(shrunk, gives_back, "{driver:?}, discard={policy}");
            served.qemu_io(&[
                "write -P 0x22 2M 64k",
                "read -P 0x22 2M 64k",
                "read -P 0x11 13M 3M",
            ]);
            served.stop();
            qemu::assert_clean(&image);
        }
    }
}

/// A raw image through the same server.
#[test]
fn raw_image() {
    for driver in Driver::ALL {
        for cache in ["writeback", "none"] {
            let scratch = Scratch::new();
            let image = scratch.file("image.raw");
            let mut expected = content::noise(12, 4 << 20);
            std::fs::write(&image, &expected).expect("writing");
            let served = Serve::new(&image, driver)
                .with("--format raw --cache")
                .arg(cache)
                .start();
            served.qemu_io(&["write -q -P 0x11 1000k 100k", "write -q -z 2M 64k", "flush"]);
            served.nbdsh("h.pwrite(b'\\x22' * 1000, 777)");
            served.stop();
            expected[1000 << 10..1100 << 10].fill(0x11);
            expected[2 << 20..(2 << 20) + usize::try_from(64 * KIB).expect("small")].fill(0);
            expected[777..1777].fill(0x22);
            assert!(
                content::bytes(&image) == expected,
                "{driver:?}, cache={cache}"
            );
        }
    }
}
