//! Starting and ending a server: what start refuses, and that an end loses nothing, leaves nothing, and comes.

mod common;

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use common::*;
use urus_nbd::{Error, Listen, ListenError, Listener};

#[test]
fn an_end_under_load_answers_what_was_started() {
    for round in 0..20 {
        let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| builder.queues(2));
        let server = fixture.server.as_ref().unwrap();
        assert_eq!(server.connections(), 0);
        let clients: Vec<_> = (0..4u64)
            .map(|index| {
                let mut client = fixture.client();
                std::thread::spawn(move || {
                    // Writes until the server ends; returns the writes that were answered with success.
                    let mut done = Vec::new();
                    for cookie in 0.. {
                        let offset = index * 16 * MIB + (cookie % 1000) * 4096;
                        let bytes = write_request(0, cookie, offset, &pattern(cookie, 4096));
                        use std::io::Write;
                        if client.stream.write_all(&bytes).is_err() {
                            break;
                        }
                        let mut magic = [0; 4];
                        use std::io::Read;
                        if client.stream.read_exact(&mut magic).is_err() {
                            break;
                        }
                        match u32::from_be_bytes(magic) {
                            0x6744_6698 => {
                                let rest = client.receive(12);
                                assert_eq!(rest[..4], [0; 4]);
                                done.push((offset, cookie));
                            }
                            0x668e_33ef => {
                                // ESHUTDOWN, with text.
                                let rest = client.receive(16);
                                let len = u32::from_be_bytes(rest[12..].try_into().unwrap());
                                let payload = client.receive(usize::try_from(len).unwrap());
                                assert_eq!(payload[..4], [0, 0, 0, 108]);
                                break;
                            }
                            magic => panic!("{magic:#x}"),
                        }
                    }
                    done
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(10 + round * 3));
        let dir = fixture.close();
        assert!(!dir.path().join("socket").exists());
        let device = urus::OpenOptions::new()
            .read_only(true)
            .open(dir.path().join("disk"))
            .unwrap();
        let mut io = device.blocking().unwrap();
        for client in clients {
            let mut last = std::collections::HashMap::new();
            for (offset, cookie) in client.join().unwrap() {
                last.insert(offset, cookie);
            }
            for (offset, cookie) in last {
                let mut found = vec![0; 4096];
                io.read_at(&mut found, offset).unwrap();
                // One write more may have been done whose reply the client did not wait for.
                let newer = pattern(cookie + 1000, 4096);
                assert!(found == pattern(cookie, 4096) || found == newer);
            }
        }
    }
}

#[test]
fn idle_and_half_connected_clients_do_not_delay_the_end() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    let mut idle = fixture.client();
    let mut greeted = fixture.connect();
    greeted.greet(3);
    let mut silent = fixture.connect();
    // A write whose payload never comes.
    let mut half = fixture.client();
    half.send(&request(0, WRITE, 1, 0, 1 << 20));
    // One that was cut off, and does not close.
    let mut bad = fixture.client();
    bad.send(&[0; 28]);
    assert!(bad.is_closed());
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    fixture.close();
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    assert!(idle.is_closed() && greeted.is_closed() && silent.is_closed() && half.is_closed());
}

#[test]
fn dropping_is_ending() {
    let mut fixture = Fixture::new(&Image::qcow2(MIB));
    let mut client = fixture.client();
    assert_eq!(client.write(FUA, 0, b"x"), 0);
    drop(fixture.server.take());
    assert!(client.is_closed());
    assert!(!fixture.socket().exists());
    assert!(UnixStream::connect(fixture.socket()).is_err());
    fixture.device.close().unwrap();
}

#[test]
fn a_server_can_follow_another_on_the_same_device() {
    let mut fixture = Fixture::new(&Image::qcow2(MIB));
    for round in 0..5u8 {
        assert_eq!(fixture.client().write(0, u64::from(round), &[round]), 0);
        fixture.server.take().unwrap().shutdown().unwrap();
        let server = server(&fixture.device)
            .listen(Listen::Unix(fixture.socket()))
            .start()
            .unwrap();
        fixture.server = Some(server);
    }
    assert_eq!(fixture.client().read(0, 5).unwrap(), [0, 1, 2, 3, 4]);
    fixture.close();
}

#[test]
fn clients_that_connect_before_the_start_are_served() {
    let mut fixture = Fixture::new(&Image::qcow2(MIB));
    fixture.server.take().unwrap().shutdown().unwrap();
    let listener = Listener::bind(Listen::Unix(fixture.socket())).unwrap();
    let mut early = fixture.connect();
    let server = server(&fixture.device).listener(listener).start().unwrap();
    fixture.server = Some(server);
    early.greet(3);
    assert_eq!(early.go("").0, MIB);
    fixture.close();
}

#[test]
fn senseless_servers_are_refused_and_leave_nothing() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    let builder = || server(&fixture.device);
    let path = fixture.dir.path().join("other");
    let unix = || Listen::Unix(path.clone());
    for (error, part) in [
        (builder().start(), "address"),
        (builder().listen(unix()).queues(0).start(), "0 queues"),
        (builder().listen(unix()).queues(257).start(), "257 queues"),
        (
            builder()
                .listen(unix())
                .export_name("x".repeat(4097))
                .start(),
            "4097 bytes",
        ),
        (
            builder()
                .listen(unix())
                .listen(Listen::Unix(fixture.socket()))
                .start(),
            "another server listens",
        ),
    ] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!path.exists());
    }
    let (fd, _other) = UnixStream::pair().unwrap();
    let error = builder().listen(Listen::Fd(fd.into())).start().unwrap_err();
    assert!(matches!(
        error,
        Error::Listen(ListenError::NotListening { .. })
    ));
    fixture.device.close().unwrap();
    let error = builder().listen(unix()).start().unwrap_err();
    assert!(matches!(error, Error::Device(_)), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_listening_descriptor_is_served() {
    let mut fixture = Fixture::new(&Image::qcow2(MIB));
    fixture.server.take().unwrap().shutdown().unwrap();
    let listener = UnixListener::bind(fixture.socket()).unwrap();
    let server = server(&fixture.device)
        .listen(Listen::Fd(listener.into()))
        .start()
        .unwrap();
    assert_eq!(server.uris().len(), 1);
    fixture.server = Some(server);
    assert_eq!(fixture.client().read(0, 1), Ok(vec![0]));
    let dir = fixture.close();
    assert!(dir.path().join("socket").exists(), "not ours to remove");
}

#[test]
fn a_closed_device_says_that_it_shuts_down() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    let mut client = fixture.client();
    assert_eq!(client.read(0, 1), Ok(vec![0]));
    fixture.device.close().unwrap();
    assert_eq!(client.read(0, 1), Err(108));
    assert_eq!(client.write(0, 0, b"x"), 108);
}
