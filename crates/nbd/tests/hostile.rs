//! Peers that break the rules: whatever they send, the server does not fail, holds a bounded amount for them, and serves the others.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::*;
use proptest::prelude::*;
use urus_nbd::{Listen, Server};

/// A server that all cases of a property test share.
fn shared() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| Fixture::with(&Image::qcow2(64 * MIB), |builder| builder.queues(2)))
}

/// Sends `bytes` and takes what comes back until the server closes or has nothing to say for a while. Returns whether it closed.
fn throw(mut stream: UnixStream, bytes: &[u8]) -> bool {
    stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut taking = stream.try_clone().unwrap();
    let taker = std::thread::spawn(move || {
        let mut chunk = vec![0; 1 << 16];
        loop {
            match taking.read(&mut chunk) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    });
    let _ = stream.write_all(bytes);
    taker.join().unwrap()
}

/// The server still serves.
fn check(socket: &Path) {
    let mut client = Client::connect(socket);
    client.greet(3);
    client.go("");
    assert_eq!(client.write(0, 60 * MIB, b"alive"), 0);
    assert_eq!(client.read(60 * MIB, 5).unwrap(), b"alive");
}

/// A request whose every field may be anything, often something sensible.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let command = prop_oneof![4 => 0u16..9, 1 => any::<u16>()];
    let flags = prop_oneof![4 => 0u16..16, 1 => any::<u16>()];
    let offset = prop_oneof![(0..60 * MIB), Just(64 * MIB - 1), any::<u64>(),];
    let len = prop_oneof![4 => 0u32..100_000, 1 => any::<u32>(), 1 => Just(32 << 20)];
    let payload = prop_oneof![Just(0usize), Just(1), Just(3)];
    (command, flags, offset, len, payload, any::<u64>()).prop_map(
        |(command, flags, offset, len, payload, cookie)| {
            let mut bytes = request(flags, command, cookie, offset, len);
            // The whole payload, some of it, or none.
            if command == WRITE && payload > 0 && len < 200_000 {
                bytes.extend(vec![0xa5; usize::try_from(len).unwrap() / payload]);
            }
            bytes
        },
    )
}

/// The same with extended headers: lengths of 64 bits, and payloads where the flag says so, or not.
fn any_extended_request() -> impl Strategy<Value = Vec<u8>> {
    let command = prop_oneof![4 => 0u16..9, 1 => any::<u16>()];
    let flags = prop_oneof![4 => 0u16..64, 1 => any::<u16>()];
    let len = prop_oneof![4 => 0u64..100_000, 2 => 8u64..20, 1 => any::<u64>()];
    let payload = prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..24);
    (command, flags, 0..80 * MIB, len, payload, any::<bool>()).prop_map(
        |(command, flags, offset, len, payload, fitting)| {
            let len = if fitting { payload.len() as u64 } else { len };
            let mut bytes = 0x21e4_1c71u32.to_be_bytes().to_vec();
            bytes.extend(flags.to_be_bytes());
            bytes.extend(command.to_be_bytes());
            bytes.extend(7u64.to_be_bytes());
            bytes.extend(offset.to_be_bytes());
            bytes.extend(len.to_be_bytes());
            if fitting && (command == WRITE || flags & 32 != 0) {
                bytes.extend(payload);
            }
            bytes
        },
    )
}

/// With both metadata contexts.
fn extended_client(fixture: &Fixture) -> Client {
    let mut client = fixture.connect();
    client.greet(3);
    assert_eq!(client.option(11, b""), [(1, vec![])]);
    let mut data = string("");
    data.extend(2u32.to_be_bytes());
    data.extend(string("base:allocation"));
    data.extend(string("qemu:allocation-depth"));
    assert_eq!(client.option(10, &data).len(), 3);
    client.go("");
    client
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_extended_requests(requests in prop::collection::vec(any_extended_request(), 1..40)) {
        let fixture = shared();
        throw(extended_client(fixture).stream, &requests.concat());
        check(&fixture.socket());
    }

    #[test]
    fn hostile_handshakes(bytes in prop::collection::vec(any::<u8>(), 0..300), flags in prop_oneof![Just(3u32), any::<u32>()]) {
        let fixture = shared();
        let mut all = flags.to_be_bytes().to_vec();
        all.extend(&bytes);
        throw(UnixStream::connect(fixture.socket()).unwrap(), &bytes);
        throw(UnixStream::connect(fixture.socket()).unwrap(), &all);
        check(&fixture.socket());
    }

    #[test]
    fn hostile_requests(
        requests in prop::collection::vec(any_request(), 1..40),
        garbage in prop::collection::vec(any::<u8>(), 0..60),
        structured in any::<bool>(),
    ) {
        let fixture = shared();
        let client = if structured { fixture.client() } else { fixture.simple_client() };
        let mut bytes = requests.concat();
        bytes.extend(garbage);
        throw(client.stream, &bytes);
        check(&fixture.socket());
    }
}

#[test]
fn garbage_ends_the_connection() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let handshake = UnixStream::connect(fixture.socket()).unwrap();
    assert!(throw(handshake, b"\0\0\0\x03GET / HTTP/1.1\r\n\r\n"));
    let client = fixture.client();
    assert!(throw(
        client.stream,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    ));
    check(&fixture.socket());
    fixture.close();
}

#[test]
fn a_client_that_says_nothing_is_let_go() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| {
        builder.handshake_time(Duration::from_millis(300))
    });
    let start = Instant::now();
    let mut silent = fixture.connect();
    let mut dripping = fixture.connect();
    dripping.greet(3);
    while start.elapsed() < Duration::from_secs(20) {
        // A little progress buys no time.
        if dripping.stream.write_all(&option(3, b"")).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(silent.is_closed());
    assert!(dripping.is_closed());
    assert!(start.elapsed() < Duration::from_secs(10));
    // The time is for the handshake only.
    let mut client = fixture.client();
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(client.read(0, 1), Ok(vec![0]));
    fixture.close();
}

#[test]
fn no_more_clients_than_allowed() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| {
        builder.max_connections(3).queues(2)
    });
    let mut clients: Vec<_> = (0..3).map(|_| fixture.client()).collect();
    assert!(fixture.connect().is_closed());
    for client in &mut clients {
        assert_eq!(client.read(0, 1), Ok(vec![0]));
    }
    drop(clients.pop());
    // The place is free once the server has noticed.
    let start = Instant::now();
    while fixture.server.as_ref().unwrap().connections() == 3 {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(fixture.client().read(0, 1), Ok(vec![0]));
    fixture.close();
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn one_client_can_make_the_server_hold_only_so_much() {
    // The server runs in this process; the tests of this file run side by side, so the bound is taken generously.
    let fixture = Fixture::with(&Image::raw(64 * MIB), |builder| {
        builder.drain_time(Duration::from_millis(100))
    });
    let mut client = fixture.client();
    assert_eq!(client.write(0, 0, &vec![1; 32 << 20]), 0);
    let before = resident();
    let mut greedy = fixture.client();
    greedy
        .stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    // 100 GiB of replies, none of them taken; then requests as fast as they are read.
    let reads = request(0, READ, 1, 0, 32 << 20).repeat(3200);
    let _ = greedy.stream.write_all(&reads);
    let mut bad = fixture.client();
    bad.stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let _ = bad
        .stream
        .write_all(&request(0xffff, 99, 1, 0, 0).repeat(1 << 20));
    let grown = resident().saturating_sub(before);
    assert!(grown < 300 << 20, "{} MiB", grown >> 20);
    assert_eq!(client.read(0, 1), Ok(vec![1]));
    fixture.close();
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| builder.queues(2));
    for round in 0..100u64 {
        let mut client = fixture.client();
        let mut bytes = Vec::new();
        for cookie in 0..10 {
            bytes.extend(request(0, READ, cookie, cookie << 16, 1 << 20));
            bytes.extend(write_request(
                0,
                cookie,
                cookie << 16,
                &pattern(round, 65_536),
            ));
            bytes.extend(request(0, FLUSH, cookie, 0, 0));
        }
        bytes.truncate(bytes.len() * usize::try_from(round + 1).unwrap() / 100);
        client.send(&bytes);
    }
    let start = Instant::now();
    while fixture.server.as_ref().unwrap().connections() > 0 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
    check(&fixture.socket());
    fixture.close();
}

#[test]
fn tcp_clients_get_the_last_replies_before_the_end() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let server = Server::builder(fixture.device.clone())
        .listen(Listen::Tcp("127.0.0.1:0".into()))
        .start()
        .unwrap();
    let urus_nbd::Address::Tcp(address) = server.addresses()[0].clone() else {
        panic!("not a TCP address");
    };
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend(option(7, &[0, 0, 0, 0, 0, 0]));
    for cookie in 0..40 {
        bytes.extend(request(0, READ, cookie, 0, 256 << 10));
    }
    // Garbage, and more of it than the server will read.
    bytes.extend(vec![0x55; 4 << 20]);
    let mut sending = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let _ = sending.write_all(&bytes);
    });
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    sender.join().unwrap();
    let replies = 40 * (16 + (256 << 10));
    assert!(all.len() > replies, "{} of {replies} bytes", all.len());
    server.shutdown().unwrap();
    fixture.close();
}

#[test]
fn a_client_that_drips_its_tls_handshake_is_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-nodes", "-subj", "/CN=x"])
        .args(["-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-keyout", "server-key.pem", "-out", "server-cert.pem"])
        .current_dir(dir.path())
        .output()
        .expect("openssl, see tests/packages.txt");
    assert!(made.status.success(), "{made:?}");
    let credentials = urus_nbd::TlsCredentials::from_directory(dir.path(), false).unwrap();
    let fixture = Fixture::with(&Image::qcow2(MIB), |builder| {
        builder
            .tls(credentials)
            .handshake_time(Duration::from_millis(300))
    });
    let start = Instant::now();
    let mut dripping = fixture.connect();
    dripping.greet(3);
    assert_eq!(dripping.option(5, b""), [(1, vec![])]);
    // The head of a record that would be a client's first, and never its end.
    for byte in [22, 3, 1, 1, 0, 1].into_iter().chain([0; 250]) {
        if dripping.stream.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(dripping.is_closed());
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(fixture.connect().receive(8), b"NBDMAGIC");
    fixture.close();
}
