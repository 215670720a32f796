//! Metrics of a server (`--metrics`): what clients have done is in them, exactly, in a form that a strict reader takes, under the names that are documented;
//! and scrapers that break the rules, or just say nothing, keep neither others waiting nor the server from ending.

#[path = "../common/mod.rs"]
mod common;
mod exposition;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Scratch, urus};
use exposition::Exposition;
use rustix::process::{Pid, Signal, kill_process};

const NBD: &str = "'nbd+unix:///?socket=nbd'";

/// `urus serve` that has said that it is ready.
struct Server {
    child: Child,
    /// Where its metrics are, as it says.
    address: String,
}

impl Server {
    fn start(scratch: &Scratch, line: &str) -> Self {
        let mut child = scratch
            .command(urus(), &format!("serve {line}"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("urus");
        let lines = BufReader::new(child.stdout.as_mut().expect("piped")).lines();
        let mut address = String::new();
        for line in lines {
            let line = line.expect("text");
            if let Some(found) = line.strip_prefix("  metrics   ") {
                address = found.to_owned();
            }
            if line.contains("Ctrl-C") {
                break;
            }
        }
        Self { child, address }
    }

    fn connect(&self, scratch: &Scratch) -> Box<dyn Stream> {
        let time = Some(Duration::from_secs(60));
        match self.address.strip_prefix("unix:") {
            Some(path) => {
                let stream = UnixStream::connect(scratch.path(path)).expect("a listener");
                stream.set_read_timeout(time).expect("a time");
                Box::new(stream)
            }
            None => {
                let stream = TcpStream::connect(&self.address).expect("a listener");
                stream.set_read_timeout(time).expect("a time");
                Box::new(stream)
            }
        }
    }

    /// Everything that is answered to `request`.
    fn ask(&self, scratch: &Scratch, request: &[u8]) -> String {
        let mut stream = self.connect(scratch);
        stream.write_all(request).expect("a server that listens");
        let mut response = String::new();
        stream.read_to_string(&mut response).expect("text");
        response
    }

    fn scrape(&self, scratch: &Scratch) -> Exposition {
        let response = self.ask(
            scratch,
            b"GET /metrics HTTP/1.1\r\nHost: urus\r\nAccept: text/plain\r\n\r\n",
        );
        let (head, body) = response.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(
            head.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"),
            "{head}"
        );
        assert!(
            head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())),
            "{head}"
        );
        Exposition::parse(body)
    }

    /// Waits until a metric has that value: what a connection begins or ends is seen a little later.
    fn becomes(&self, scratch: &Scratch, name: &str, value: f64) {
        let begin = Instant::now();
        while self.scrape(scratch).sum(name, &[]) != value {
            assert!(begin.elapsed() < Duration::from_secs(30), "{name}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("a living server");
        assert_eq!(self.child.wait().expect("waiting").code(), Some(0));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

trait Stream: Read + Write {
    fn finish_sending(&self);
}

impl Stream for UnixStream {
    fn finish_sending(&self) {
        self.shutdown(Shutdown::Write).expect("a connection");
    }
}

impl Stream for TcpStream {
    fn finish_sending(&self) {
        self.shutdown(Shutdown::Write).expect("a connection");
    }
}

/// What a client does is known to the byte.
fn counts(metrics: &str, io: &str) {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 plain.qcow2 64M
         qemu-io -c 'write -q -P 5 0 128k' plain.qcow2
         qemu-img convert -c -O qcow2 plain.qcow2 base.qcow2
         qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2");
    let server = Server::start(
        &scratch,
        &format!("disk.qcow2 --nbd unix:nbd --metrics {metrics} --num-queues 1 --io {io}"),
    );
    // Clusters: one in part and one whole, both new; then the base's second, in three reads; the first is given back.
    scratch.sh(&format!(
        "qemu-io -t writeback -f raw -c 'write -q 0 4k' -c 'write -q 256k 64k' -c flush \
         -c 'read -q 64k 4k' -c 'read -q 68k 4k' -c 'read -q 100k 512' \
         -c 'discard -q 256k 64k' -c 'write -q -z 512k 128k' -c flush {NBD}"
    ));
    let seen = server.scrape(&scratch);
    let by_kind = |name: &str| {
        [
            "read",
            "write",
            "flush",
            "discard",
            "write_zeroes",
            "block_status",
        ]
        .map(|kind| {
            seen.sum(
                name,
                &[("image", "disk.qcow2"), ("queue", "0"), ("kind", kind)],
            )
        })
    };
    // Beside the two that were asked for, QEMU flushes as it closes the export. It may ask for block status as it likes.
    assert_eq!(
        by_kind("urus_operations_total")[..5],
        [3.0, 2.0, 3.0, 1.0, 1.0]
    );
    assert_eq!(
        by_kind("urus_operation_bytes_total")[..5],
        [8704.0, 69632.0, 0.0, 65536.0, 131_072.0]
    );
    assert_eq!(by_kind("urus_operation_errors_total"), [0.0; 6]);
    assert_eq!(
        seen.sum("urus_operation_duration_seconds_count", &[("kind", "read")]),
        3.0
    );
    for (name, value) in [
        ("urus_image_size_bytes", f64::from(64 << 20)),
        ("urus_image_chain_depth", 2.0),
        ("urus_image_read_only", 0.0),
        ("urus_image_poisoned", 0.0),
        ("urus_requests_in_flight", 0.0),
        // An L2 table and two of data.
        ("urus_allocated_clusters_total", 3.0),
        ("urus_copy_on_write_bytes_total", 61440.0),
        ("urus_decoded_cache_misses_total", 2.0),
        ("urus_decoded_cache_hits_total", 2.0),
        // The base's only one; the image's own began in memory.
        ("urus_mapping_cache_misses_total", 1.0),
        ("urus_mapping_cache_evictions_total", 0.0),
    ] {
        assert_eq!(seen.sum(name, &[]), value, "{name}");
    }
    let driver = match io {
        "blocking" => "blocking",
        _ => "io_uring",
    };
    for info in ["urus_image_info", "urus_queue_info"] {
        assert_eq!(seen.sum(info, &[("driver", driver)]), 1.0);
    }
    assert!(seen.sum("urus_mapping_cache_hits_total", &[]) > 0.0);
    assert!(seen.sum("urus_commits_total", &[]) >= 2.0);
    assert!(seen.sum("urus_barriers_total", &[]) >= 3.0);
    server.becomes(&scratch, "urus_nbd_connections", 0.0);
    server.becomes(&scratch, "urus_freed_clusters_total", 1.0);
    server.end();
}

#[test]
fn operations_are_counted_over_a_unix_socket() {
    counts("unix:metrics", "io_uring");
}

#[test]
fn operations_are_counted_over_tcp() {
    counts("127.0.0.1:0", "blocking");
}

/// The table of docs/METRICS.md: each metric's type and labels.
fn documented() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let document = include_str!("../../../../docs/METRICS.md");
    let rows = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `urus_"));
    rows.map(|row| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let name = format!("urus_{}", cells[0].trim_end_matches('`'));
        let labels = cells[2].split(", ").map(|label| label.trim_matches('`'));
        let labels = labels.filter(|label| !label.is_empty());
        (
            name,
            (cells[1].to_owned(), labels.map(str::to_owned).collect()),
        )
    })
    .collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_one_is_there() {
    let scratch = Scratch::new();
    let server = Server::start(
        &scratch,
        "disk.qcow2 --create 16M --nbd unix:nbd --vhost-user vhost --metrics unix:metrics",
    );
    scratch.sh(&format!("qemu-io -f raw -c 'write -q 0 4k' {NBD}"));
    let Exposition(families) = server.scrape(&scratch);
    let printed: BTreeMap<_, _> = families
        .into_iter()
        .map(|(name, family)| {
            let series = family.series.keys();
            let labels = series.flat_map(|(_, labels)| labels).map(|(name, _)| name);
            let labels = labels.filter(|label| *label != "le").cloned().collect();
            (name, (family.kind, labels))
        })
        .collect();
    assert_eq!(printed, documented());
    server.end();
}

/// A front end that has said something: one that says nothing is none.
fn front_end(scratch: &Scratch) -> UnixStream {
    const SET_OWNER: [u8; 12] = [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let mut front_end = UnixStream::connect(scratch.path("vhost")).expect("a server");
    front_end.write_all(&SET_OWNER).expect("a connection");
    front_end
}

/// What is no operation: clients that come and go, a pause, several images.
#[test]
fn states_are_seen() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 'a\"b\\c.qcow2' 32M");
    let server = Server::start(
        &scratch,
        "disk.qcow2 --create 16M --image other=a\"b\\c.qcow2 --nbd unix:nbd --vhost-user vhost \
         --control unix:ctl --metrics unix:metrics",
    );
    let first = [("image", "disk.qcow2"), ("export", "")];
    let other = [("image", "a\"b\\c.qcow2"), ("export", "other")];
    let seen = server.scrape(&scratch);
    assert_eq!(
        seen.sum("urus_image_size_bytes", &other),
        f64::from(32 << 20)
    );
    assert_eq!(seen.sum("urus_image_paused", &first), 0.0);

    server.becomes(&scratch, "urus_nbd_connections", 0.0);
    let clients = [(); 2].map(|()| UnixStream::connect(scratch.path("nbd")).expect("a server"));
    server.becomes(&scratch, "urus_nbd_connections", 2.0);
    drop(clients);
    server.becomes(&scratch, "urus_nbd_connections", 0.0);
    let front_end = front_end(&scratch);
    server.becomes(&scratch, "urus_vhost_user_connected", 1.0);
    drop(front_end);
    server.becomes(&scratch, "urus_vhost_user_connected", 0.0);

    assert_eq!(scratch.urus("ctl resize ctl 24M").code, Some(0));
    assert_eq!(scratch.urus("ctl pause --image other ctl").code, Some(0));
    let seen = server.scrape(&scratch);
    assert_eq!(
        seen.sum("urus_image_size_bytes", &first),
        f64::from(24 << 20)
    );
    assert_eq!(seen.sum("urus_image_paused", &first), 0.0);
    assert_eq!(seen.sum("urus_image_paused", &other), 1.0);
    server.end();
}

/// The other command, which prints nothing.
#[test]
fn a_back_end_program_has_them_too() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 disk.qcow2 16M");
    let child = scratch
        .command(
            urus(),
            "vhost-user-blk --blk-file disk.qcow2 --socket-path vhost --metrics unix:metrics",
        )
        .spawn()
        .expect("urus");
    let server = Server {
        child,
        address: "unix:metrics".into(),
    };
    let begin = Instant::now();
    while !scratch.path("metrics").exists() {
        assert!(begin.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(10));
    }
    let seen = server.scrape(&scratch);
    assert_eq!(seen.sum("urus_vhost_user_connected", &[]), 0.0);
    assert_eq!(seen.sum("urus_image_size_bytes", &[]), f64::from(16 << 20));
    let front_end = front_end(&scratch);
    server.becomes(&scratch, "urus_vhost_user_connected", 1.0);
    drop(front_end);
    server.end();
    assert!(!scratch.path("metrics").exists());
}

fn hostile_clients_of(metrics: &str) {
    let scratch = Scratch::new();
    let server = Server::start(
        &scratch,
        &format!("disk.qcow2 --create 16M --nbd unix:nbd --metrics {metrics}"),
    );
    let too_much = [b"GET /metrics HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 100_000]].concat();
    for (request, status) in [
        (b"GET / HTTP/1.1\r\n\r\n".as_slice(), "200"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", "200"),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", "404"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\x00\xff\r\n\r\n", "400"),
        (&too_much[..9000], "431"),
    ] {
        let response = server.ask(&scratch, request);
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status} ")),
            "{response}"
        );
    }
    // Many that say nothing, or a little at a time, or take nothing; and one that is in a hurry.
    let mut silent: Vec<_> = (0..40).map(|_| server.connect(&scratch)).collect();
    for stream in silent.iter_mut().skip(20) {
        // Those that were cut off for others may know it already.
        let _ = stream.write_all(b"GET /metrics HT");
    }
    let begin = Instant::now();
    for _ in 0..100 {
        server.scrape(&scratch);
    }
    assert!(
        begin.elapsed() < Duration::from_secs(4),
        "others have waited"
    );
    drop(silent);

    let mut slow = server.connect(&scratch);
    let begin = Instant::now();
    while slow.write_all(b"x").is_ok() && begin.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(200));
    }
    let took = begin.elapsed();
    assert!(
        took > Duration::from_secs(4) && took < Duration::from_secs(20),
        "who trickles has five seconds: {took:?}"
    );
    // One that leaves in the middle, and one that says that it has no more.
    let mut leaving = server.connect(&scratch);
    leaving.write_all(b"GET").expect("a connection");
    leaving.finish_sending();
    let mut rest = Vec::new();
    leaving.read_to_end(&mut rest).expect("an end");
    assert_eq!(rest, b"");
    let mut half = server.connect(&scratch);
    half.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")
        .expect("a connection");
    half.finish_sending();
    half.read_to_end(&mut rest).expect("an end");
    assert!(rest.ends_with(b"\n"));
    // It ends, whoever is there.
    let _silent = server.connect(&scratch);
    server.end();
}

#[test]
fn hostile_clients_hold_nobody_up() {
    hostile_clients_of("unix:metrics");
}

#[test]
fn hostile_clients_hold_nobody_up_over_tcp() {
    hostile_clients_of("127.0.0.1:0");
}

#[test]
fn addresses_are_judged_before_anything_is_made() {
    let scratch = Scratch::new();
    let ran = scratch.urus("serve disk.qcow2 --create 16M --metrics nowhere");
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("--metrics"), "{ran:?}");
    scratch.sh("touch file");
    let ran = scratch.urus("serve disk.qcow2 --create 16M --metrics unix:file");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("not a socket"), "{ran:?}");
    assert!(!scratch.path("disk.qcow2").exists());

    let line = "disk.qcow2 --create 16M --nbd unix:nbd --metrics unix:metrics";
    let mut server = Server::start(&scratch, line);
    let ran = scratch.urus("serve other.qcow2 --create 16M --metrics unix:metrics");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("another server listens"), "{ran:?}");
    // A killed one leaves its sockets: that of metrics is in nobody's way.
    server.child.kill().expect("a child");
    server.child.wait().expect("waiting");
    scratch.sh("rm nbd");
    let server = Server::start(&scratch, line);
    server.scrape(&scratch);
    server.end();
    assert!(!scratch.path("metrics").exists());
}
