//! The clients that people use, each against what the protocol leaves open: a program that is missing is a failed test.

mod common;

use std::path::Path;
use std::process::Command;

use common::*;
use urus_nbd::{Listen, Server};

/// Runs a program to its end, within two minutes. Its output, if it succeeds.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout")
        .arg("120")
        .arg(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{text}\n{}\n(a status of 127 says that it is not installed; see tests/packages.txt)",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn qemu_img_check(image: &Path) {
    run(
        "qemu-img",
        &["check", "-f", "qcow2", image.to_str().unwrap()],
    );
}

/// A file of `mib` MiB: data, zeroes and small changes.
fn source(path: &Path, mib: usize) -> Vec<u8> {
    let mut bytes = pattern(4, mib << 20);
    bytes[3 << 20..6 << 20].fill(0);
    bytes[(8 << 20) + 100..(8 << 20) + 70_000].fill(0);
    std::fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn nbdinfo_finds_every_ability() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| {
        builder.description("a disk for tests")
    });
    let uri = fixture.uri();
    let info = run("nbdinfo", &[&uri]);
    for line in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export-size: 67108864",
        "description: a disk for tests",
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(line), "{line:?} is not in\n{info}");
    }
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "67108864");
    let list = run("nbdinfo", &["--list", &uri]);
    assert!(list.contains("export=\"\""), "{list}");
    for ability in ["flush", "fua", "multi-conn", "trim", "zero", "cache", "df"] {
        run("nbdinfo", &["--can", ability, &uri]);
    }
    fixture.close();
}

#[test]
fn nbdinfo_maps_what_qemu_img_maps() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let mut client = fixture.client();
    for (offset, len) in [(0, 1), (5 * MIB, 3 << 20), (63 * MIB, 1 << 20)] {
        assert_eq!(client.write(0, offset, &pattern(offset, len)), 0);
    }
    let map = run("nbdinfo", &["--map", &fixture.uri()]);
    let extents: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().take(3).collect())
        .collect();
    assert_eq!(
        extents,
        [
            ["0", "65536", "0"],
            ["65536", "5177344", "3"],
            ["5242880", "3145728", "0"],
            ["8388608", "57671680", "3"],
            ["66060288", "1048576", "0"],
        ]
    );
    fixture.close();
}

#[test]
fn nbdsh_drives_every_command() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| builder.queues(2));
    let script = r#"
import errno
assert h.get_size() == 64 << 20
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation")
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20

# Every command, at odd offsets.
data = bytes(range(256)) * 1000
h.pwrite(data, 12345, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 12345) == data
h.zero(1000, 12345)
h.zero(1000, 14345, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.trim(1 << 20, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
expected = bytes(1000) + data[1000:2000] + bytes(1000) + data[3000:]
assert h.pread(len(data), 12345) == expected

# Chunks come within the request, and cover it.
chunks = []
def chunk(buf, offset, status, error):
    assert status == nbd.READ_DATA
    chunks.append((offset, len(buf)))
h.pread_structured(len(data), 12345, chunk, nbd.CMD_FLAG_DF)
assert chunks == [(12345, len(data))]

extents = []
def extent(context, offset, entries, error):
    assert context == "base:allocation"
    extents.append((offset, entries))
h.block_status(64 << 20, 0, extent)
assert extents == [(0, [327680, 0, (64 << 20) - 327680, 3])], extents
extents.clear()
h.block_status((64 << 20) - 1, 1, extent, nbd.CMD_FLAG_REQ_ONE)
assert extents == [(1, [327679, 0])], extents

# Errors.
h.set_strict_mode(0)
def fails(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise AssertionError("no error")
fails(errno.EINVAL, h.pread, 2, (64 << 20) - 1)
fails(errno.ENOSPC, h.pwrite, b"ab", (64 << 20) - 1)
fails(errno.ENOSPC, h.zero, 2, (64 << 20) - 1)
fails(errno.EINVAL, h.trim, 2, (64 << 20) - 1)
fails(errno.EINVAL, h.cache, 2, (64 << 20) - 1)
fails(errno.EINVAL, h.block_status, 2, (64 << 20) - 1, extent)
fails(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(5, 0) == bytes(5)

# What one connection writes and another flushes, a third reads.
others = []
for _ in range(3):
    other = nbd.NBD()
    other.connect_uri(h.get_uri())
    others.append(other)
assert all(other.can_multi_conn() for other in others)
others[0].pwrite(b"multi", 1 << 25)
others[1].flush()
assert others[2].pread(5, 1 << 25) == b"multi"

# Many at once.
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i % 256] * 4096)), i * 4096) for i in range(500)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
assert all(h.pread(4096, i * 4096) == bytes([i % 256] * 4096) for i in range(500))
for other in others:
    other.shutdown()
h.shutdown()
"#;
    // The connection asks for the context before it connects.
    let setup = format!(
        "h.add_meta_context('base:allocation'); h.connect_uri({:?})",
        fixture.uri()
    );
    run(
        "/usr/bin/python3",
        &["-m", "nbd", "-c", &setup, "-c", script],
    );
    let dir = fixture.close();
    qemu_img_check(&dir.path().join("disk"));
}

#[test]
fn nbdsh_without_structured_replies() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    let script = format!(
        r#"
h.set_request_structured_replies(False)
h.set_handshake_flags(0)
h.connect_uri({:?})
assert not h.get_structured_replies_negotiated()
assert not h.can_df()
h.pwrite(b"simple", 99)
assert h.pread(6, 99) == b"simple"
h.set_strict_mode(0)
try:
    h.pread(2, (1 << 20) - 1)
    raise AssertionError("no error")
except nbd.Error as error:
    assert error.errnum == 22
assert h.pread(6, 99) == b"simple"
h.shutdown()
"#,
        fixture.uri()
    );
    run("/usr/bin/python3", &["-m", "nbd", "-c", &script]);
    fixture.close();
}

#[test]
fn nbdcopy_both_ways_with_four_connections() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| builder.queues(2));
    let (uri, dir) = (fixture.uri(), fixture.dir.path());
    let (from, to) = (dir.join("from"), dir.join("to"));
    let bytes = source(&from, 64);
    let options = ["--connections=4", "--requests=64"];
    let run_copy = |source: &str, target: &str| {
        run(
            "nbdcopy",
            &[&options[..], &["--flush", source, target]].concat(),
        );
    };
    run_copy(from.to_str().unwrap(), &uri);
    run_copy(&uri, to.to_str().unwrap());
    assert!(std::fs::read(&to).unwrap() == bytes);
    let dir = fixture.close();
    qemu_img_check(&dir.path().join("disk"));
    let raw = dir.path().join("raw");
    let (disk, raw) = (dir.path().join("disk"), raw.to_str().unwrap());
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            disk.to_str().unwrap(),
            raw,
        ],
    );
    assert!(std::fs::read(raw).unwrap() == bytes);
}

#[test]
fn qemu_io_and_qemu_img_over_unix_and_tcp() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let tcp = Server::builder(fixture.device.clone())
        .export_name("disk")
        .queues(2)
        .listen(Listen::Tcp("127.0.0.1:0".into()))
        .start()
        .unwrap();
    let (unix, tcp_uri) = (fixture.uri(), tcp.uris().remove(0));
    let from = fixture.dir.path().join("from");
    source(&from, 64);
    run(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            from.to_str().unwrap(),
            &unix,
        ],
    );
    let compare = run(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            from.to_str().unwrap(),
            &tcp_uri,
        ],
    );
    assert!(compare.contains("identical"), "{compare}");
    let commands = [
        "write -P 0x11 -f 1000 70000",
        "read -P 0x11 1000 70000",
        "aio_write -P 0x22 1M 4M",
        "aio_write -P 0x33 5M 4M",
        "aio_flush",
        "read -P 0x22 1M 4M",
        "read -P 0x33 5M 4M",
        "write -z -u 2M 1M",
        "read -P 0 2M 1M",
        "write -z 3M 64k",
        "read -P 0 3M 64k",
        "discard 8M 1M",
        "flush",
    ];
    for uri in [&unix, &tcp_uri] {
        let arguments: Vec<&str> = commands
            .iter()
            .flat_map(|command| ["-c", command])
            .collect();
        let output = run(
            "qemu-io",
            &[&["-f", "raw"], &arguments[..], &[uri.as_str()]].concat(),
        );
        assert!(
            !output.contains("failed") && !output.contains("rror"),
            "{output}"
        );
    }
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &unix]);
    assert!(map.contains("\"zero\": true"), "{map}");
    tcp.shutdown().unwrap();
    let dir = fixture.close();
    qemu_img_check(&dir.path().join("disk"));
}

#[test]
fn fio_verifies_what_it_wrote_on_four_connections() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| builder.queues(2));
    let uri = fixture.uri();
    let work = [
        "--name=verify",
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        "--rw=randrw",
        "--bsrange=512-128k",
        "--iodepth=16",
        "--numjobs=4",
        "--size=16M",
        "--offset_increment=16M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--fsync=64",
    ];
    let aux = format!("--aux-path={}", fixture.dir.path().display());
    run("fio", &[&work[..], &[&aux]].concat());
    let dir = fixture.close();
    qemu_img_check(&dir.path().join("disk"));
}

#[test]
fn nbdkit_passes_through() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let from = fixture.dir.path().join("from");
    source(&from, 64);
    let uri = fixture.uri();
    let copy = format!(
        "nbdcopy --flush {} \"$uri\" && qemu-img compare -f raw -F raw {0} \"$uri\"",
        from.display()
    );
    let output = run(
        "nbdkit",
        &["-U", "-", "nbd", &format!("uri={uri}"), "--run", &copy],
    );
    assert!(output.contains("identical"), "{output}");
    fixture.close();
}
