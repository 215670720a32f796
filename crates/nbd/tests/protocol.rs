//! The protocol over a real device, with a client that is scripted byte by byte: what each request does, what each error value is, and that
//! replies are complete and single whatever comes at once.

mod common;

use std::collections::HashMap;
use std::time::Duration;

use common::*;
use rustix::net::{RecvFlags, recv};
use urus::{Format, IoDriver, PauseOptions};

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

#[test]
fn what_is_written_is_read_at_any_offset_and_length() {
    for (format, io) in [
        (Format::Raw, IoDriver::Auto),
        (Format::Qcow2, IoDriver::Auto),
        (Format::Qcow2, IoDriver::Blocking),
    ] {
        let fixture = Fixture::new(&Image {
            format,
            io,
            ..Image::raw(64 * MIB)
        });
        let mut simple = fixture.simple_client();
        let mut structured = fixture.client();
        let mut model = vec![0; 8 << 20];
        for (round, (offset, len)) in [
            (0, 1),
            (511, 2),
            (4095, 4098),
            (65_535, 65_538),
            (1 << 20, 1 << 20),
            (3, 300_000),
        ]
        .into_iter()
        .enumerate()
        {
            let data = pattern(round as u64, len);
            let client = if round % 2 == 0 {
                &mut simple
            } else {
                &mut structured
            };
            assert_eq!(client.write(0, offset as u64, &data), 0);
            model[offset..offset + len].copy_from_slice(&data);
            for client in [&mut simple, &mut structured] {
                assert!(
                    client.read(0, 8 << 20).unwrap() == model,
                    "{format} round {round}"
                );
                let some = client.read(offset as u64 + 1, 17).unwrap();
                assert_eq!(some, model[offset + 1..offset + 18]);
            }
        }
        fixture.close();
    }
}

#[test]
fn requests_sent_at_once_are_all_answered_once() {
    for io in [IoDriver::Auto, IoDriver::Blocking] {
        requests_at_once(io);
    }
}

fn requests_at_once(io: IoDriver) {
    const COUNT: u64 = 2000;
    let fixture = Fixture::new(&Image {
        io,
        ..Image::qcow2(64 * MIB)
    });
    let mut client = fixture.client();
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        use std::io::Write;
        let mut bytes = Vec::new();
        for cookie in 0..COUNT {
            let offset = cookie * 4096;
            bytes.extend(match cookie % 4 {
                0 => write_request(0, cookie, offset, &pattern(cookie, 4096)),
                1 => request(0, READ, cookie, offset, 4096),
                2 => request(0, 99, cookie, offset, 4096),
                _ => request(0, FLUSH, cookie, 0, 0),
            });
        }
        sender.write_all(&bytes).unwrap();
    });
    let mut answered = HashMap::new();
    for _ in 0..COUNT {
        let reply = client.reply(0);
        *answered.entry(reply.cookie()).or_insert(0) += 1;
        let expected = if reply.cookie() % 4 == 2 { EINVAL } else { 0 };
        assert_eq!(reply.error(), expected);
    }
    sending.join().unwrap();
    assert!((0..COUNT).all(|cookie| answered.get(&cookie) == Some(&1)));
    for cookie in (0..COUNT).step_by(4) {
        assert!(client.read(cookie * 4096, 4096).unwrap() == pattern(cookie, 4096));
    }
    fixture.close();
}

/// More than the server takes on in one round, all of it received at once, and nothing after.
#[test]
fn large_reads_sent_at_once_are_answered_without_more_input() {
    const LEN: u32 = 128 << 10;
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let mut client = fixture.client();
    let requests: Vec<_> = (0..60)
        .map(|cookie| request(0, READ, cookie, cookie * u64::from(LEN), LEN))
        .collect();
    client.send(&requests.concat());
    let mut open: std::collections::HashSet<u64> = (0..60).collect();
    while !open.is_empty() {
        let reply = client.reply(LEN as usize);
        assert_eq!(reply.error(), 0);
        assert!(open.remove(&reply.cookie()));
    }
    fixture.close();
}

#[test]
fn the_payload_of_a_refused_write_is_not_taken_for_requests() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    let mut client = fixture.client();
    // The payload looks like requests.
    let evil = request(0, TRIM, 1, 0, 1 << 20).repeat(20_000);
    assert_eq!(client.write(0, 0, b"kept"), 0);
    assert_eq!(client.write(0x8000, 0, &evil), EINVAL);
    assert_eq!(client.write(0, MIB - 1, &evil), ENOSPC);
    assert_eq!(client.write(0, MIB, &[1]), ENOSPC);
    assert_eq!(client.read(0, 4).unwrap(), b"kept");
    fixture.close();
}

#[test]
fn errors_have_the_values_of_the_protocol() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    for mut client in [fixture.client(), fixture.simple_client()] {
        for offset in [MIB, MIB - 10, u64::MAX, u64::MAX - 10] {
            assert_eq!(client.read(offset, 11), Err(EINVAL));
            assert_eq!(client.ask(0, TRIM, offset, 11), EINVAL);
            assert_eq!(client.ask(0, CACHE, offset, 11), EINVAL);
            assert_eq!(client.ask(0, WRITE_ZEROES, offset, 11), ENOSPC);
            assert_eq!(client.write(0, offset, &[0; 11]), ENOSPC);
        }
        assert_eq!(client.ask(0, 99, 0, 1), EINVAL);
        assert_eq!(client.ask(0, FLUSH, 0, 1), EINVAL);
        assert_eq!(client.ask(REQ_ONE, FLUSH, 0, 0), EINVAL);
        assert_eq!(client.read(0, u32::MAX), Err(EINVAL));
        assert_eq!(client.ask(0, BLOCK_STATUS, 0, 0), EINVAL);
        // Requests of no bytes do nothing.
        assert_eq!(client.read(5, 0), Ok(vec![]));
        assert_eq!(client.write(0, MIB, &[]), 0);
        assert_eq!(client.ask(0, TRIM, 0, 0), 0);
        assert_eq!(client.ask(FUA, WRITE_ZEROES, 0, 0), 0);
        assert_eq!(client.ask(0, CACHE, 0, 0), 0);
    }
    fixture.close();
}

#[test]
fn a_read_only_export_permits_no_change() {
    let dir = Fixture::new(&Image::qcow2(MIB)).close();
    let image = Image {
        read_only: true,
        ..Image::qcow2(MIB)
    };
    let fixture = Fixture::over(dir, &image, |builder| builder);
    let mut client = fixture.connect();
    client.greet(3);
    let (size, flags) = client.go("");
    assert_eq!(size, MIB);
    assert_eq!(flags & 2, 2, "READ_ONLY");
    assert_eq!(flags & (1 << 5 | 1 << 6), 0, "neither trim nor zeroes");
    assert_eq!(client.write(0, 0, b"x"), EPERM);
    assert_eq!(client.ask(0, TRIM, 0, 512), EPERM);
    assert_eq!(client.ask(0, WRITE_ZEROES, 0, 512), EPERM);
    assert_eq!(client.ask(0, FLUSH, 0, 0), 0);
    assert_eq!(client.read(0, 1), Ok(vec![0]));
    fixture.close();
}

#[test]
fn trim_zeroes_flush_cache_and_fua() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let mut client = fixture.client();
    let data = pattern(1, 1 << 20);
    assert_eq!(client.write(FUA, 0, &data), 0);
    assert_eq!(client.ask(FUA, WRITE_ZEROES, 1000, 200_000), 0);
    assert_eq!(client.ask(FUA | NO_HOLE, WRITE_ZEROES, 300_000, 200_000), 0);
    let mut expected = data;
    expected[1000..201_000].fill(0);
    expected[300_000..500_000].fill(0);
    assert!(client.read(0, 1 << 20).unwrap() == expected);
    assert_eq!(client.ask(FUA, TRIM, 512 << 10, 512 << 10), 0);
    assert_eq!(
        client.read(512 << 10, 512 << 10).unwrap(),
        vec![0; 512 << 10]
    );
    assert_eq!(client.ask(0, CACHE, 0, 64 << 20), 0);
    assert_eq!(client.ask(FUA, CACHE, 5, 700_000), 0);
    assert_eq!(client.ask(FUA, FLUSH, 0, 0), 0);
    assert_eq!(client.read(0, 512 << 10).unwrap(), expected[..512 << 10]);
    fixture.close();
}

#[test]
fn block_status_tells_data_holes_and_zeroes() {
    const SIZE: u64 = 256 * MIB;
    let fixture = Fixture::new(&Image::qcow2(SIZE));
    let mut client = fixture.client();
    assert_eq!(client.write(0, MIB, &pattern(1, 1 << 20)), 0);
    let whole = u32::try_from(SIZE).unwrap();
    let expected = [(1 << 20, 3), (1 << 20, 0), (254 << 20, 3)];
    assert_eq!(client.status(0, 0, whole), expected);
    assert_eq!(client.status(REQ_ONE, 0, whole), expected[..1]);
    assert_eq!(client.status(REQ_ONE, MIB + 100, 4096), [(4096, 0)]);
    assert_eq!(client.status(FUA, MIB - 1, 2), [(1, 3), (1, 0)]);

    // More extents than fit one reply.
    for cluster in (0..SIZE >> 16).step_by(2) {
        assert_eq!(client.write(0, cluster << 16, &[1]), 0);
    }
    let mut at = 0;
    let mut extents = Vec::new();
    let mut replies = 0;
    while at < SIZE {
        let reply = client.status(0, at, u32::try_from(SIZE - at).unwrap());
        at += reply.iter().map(|&(len, _)| u64::from(len)).sum::<u64>();
        extents.extend(reply);
        replies += 1;
    }
    assert!(replies > 1);
    assert_eq!(at, SIZE);
    // Every second cluster, but 16 to 32 in one piece.
    let data = extents.iter().filter(|&&(_, flags)| flags == 0).count();
    assert_eq!(data, 2048 - 9 + 1);

    let mut without = fixture.simple_client();
    assert_eq!(without.ask(0, BLOCK_STATUS, 0, 512), EINVAL);
    fixture.close();
}

#[test]
fn large_payloads_are_served_and_larger_ones_end_the_connection() {
    const LARGEST: usize = 32 << 20;
    let fixture = Fixture::new(&Image::raw(64 * MIB));
    let mut client = fixture.client();
    let data = pattern(3, LARGEST);
    assert_eq!(client.write(0, 12_345, &data), 0);
    assert!(
        client
            .read(12_345, u32::try_from(LARGEST).unwrap())
            .unwrap()
            == data
    );
    assert_eq!(
        client.read(0, u32::try_from(LARGEST).unwrap() + 1),
        Err(EINVAL)
    );
    client.send(&request(
        0,
        WRITE,
        5,
        0,
        u32::try_from(LARGEST).unwrap() + 1,
    ));
    assert_eq!(client.reply(0).error(), EINVAL);
    assert!(client.is_closed());
    fixture.close();
}

#[test]
fn disconnect_finishes_what_came_before() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let mut client = fixture.client();
    let mut bytes = Vec::new();
    for cookie in 0..50 {
        bytes.extend(write_request(
            0,
            cookie,
            cookie << 16,
            &pattern(cookie, 4096),
        ));
    }
    bytes.extend(request(0, DISC, 0, 0, 0));
    client.send(&bytes);
    let mut cookies: Vec<_> = (0..50)
        .map(|_| {
            let reply = client.reply(0);
            assert_eq!(reply.error(), 0);
            reply.cookie()
        })
        .collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..50));
    assert!(client.is_closed());
    let mut again = fixture.client();
    for cookie in 0..50 {
        assert!(again.read(cookie << 16, 4096).unwrap() == pattern(cookie, 4096));
    }
    fixture.close();
}

#[test]
fn a_client_that_only_closes_its_sending_side_gets_its_replies() {
    let fixture = Fixture::new(&Image::qcow2(64 * MIB));
    let mut client = fixture.client();
    for cookie in 0..20 {
        client.send(&request(0, READ, cookie, 0, 1 << 20));
    }
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..20 {
        assert_eq!(client.reply(0).error(), 0);
    }
    assert!(client.is_closed());
    fixture.close();
}

#[test]
fn connections_of_several_queues_see_each_other() {
    let fixture = Fixture::with(&Image::qcow2(64 * MIB), |builder| builder.queues(3));
    let mut clients: Vec<_> = (0..6).map(|_| fixture.client()).collect();
    for round in 0..60usize {
        let offset = (round as u64 * 70_001) % (60 * MIB);
        let data = pattern(round as u64, 70_000);
        assert_eq!(clients[round % 6].write(0, offset, &data), 0);
        // What one connection has written, another makes durable, and a third sees.
        assert_eq!(clients[(round + 1) % 6].ask(0, FLUSH, 0, 0), 0);
        assert!(clients[(round + 2) % 6].read(offset, 70_000).unwrap() == data);
    }
    assert_eq!(fixture.server.as_ref().unwrap().connections(), 6);
    fixture.close();
}

#[test]
fn a_client_that_takes_no_replies_blocks_no_other() {
    let fixture = Fixture::with(&Image::raw(64 * MIB), |builder| {
        builder.drain_time(Duration::from_millis(200))
    });
    let mut writer = fixture.client();
    let data = pattern(9, 4 << 20);
    assert_eq!(writer.write(0, 0, &data), 0);
    let mut slow = fixture.client();
    for cookie in 0..200 {
        slow.send(&request(0, READ, cookie, 0, 4 << 20));
    }
    for _ in 0..200 {
        assert!(writer.read(4096, 4096).unwrap() == data[4096..8192]);
    }
    for _ in 0..200 {
        let Reply::Chunk { payload, .. } = slow.reply(0) else {
            panic!("a read's reply must be structured");
        };
        assert!(payload[8..] == data);
    }
    // One that takes none at all does not keep the server from ending.
    for cookie in 0..64 {
        slow.send(&request(0, READ, cookie, 0, 4 << 20));
    }
    let start = std::time::Instant::now();
    fixture.close();
    assert!(start.elapsed() < Duration::from_secs(5));
}

/// What was asked after reads whose replies the client does not take yet is done nevertheless, and no reply is forgotten.
#[test]
fn replies_that_wait_hold_up_no_request() {
    let fixture = Fixture::new(&Image::raw(64 * MIB));
    let mut other = fixture.client();
    let data = pattern(3, 1 << 20);
    assert_eq!(other.write(0, 0, &data), 0);
    let mut slow = fixture.client();
    for cookie in 0..50 {
        slow.send(&request(0, READ, cookie, 0, 1 << 20));
    }
    slow.send(&write_request(0, 50, 32 * MIB, b"after"));
    let start = std::time::Instant::now();
    while other.read(32 * MIB, 5).unwrap() != b"after" {
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    let mut open: std::collections::HashSet<u64> = (0..=50).collect();
    while !open.is_empty() {
        let reply = slow.reply(0);
        assert_eq!(reply.error(), 0);
        assert!(open.remove(&reply.cookie()));
        if let Reply::Chunk { payload, .. } = reply {
            assert!(payload[8..] == data);
        }
    }
    // A client that sends no more gets what it has asked for.
    for cookie in 0..50 {
        slow.send(&request(0, READ, cookie, 0, 1 << 20));
    }
    slow.stream.shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..50 {
        assert_eq!(slow.reply(0).error(), 0);
    }
    assert!(slow.is_closed());
    fixture.close();
}

/// What a client asks for and does not take is not read for it in advance, beyond a bound: it would have to be fetched from memory twice,
/// and hold some of it. It is read once the client takes what is there.
#[test]
fn reads_wait_until_the_client_takes_what_was_read() {
    let fixture = Fixture::new(&Image::raw(64 * MIB));
    let mut other = fixture.client();
    let mut slow = fixture.client();
    // More than a socket holds.
    slow.send(&request(0, READ, 0, 0, 8 << 20));
    recv(&slow.stream, &mut [0], RecvFlags::PEEK).unwrap();
    for cookie in 1..50 {
        slow.send(&request(0, READ, cookie, 0, 1 << 20));
    }
    slow.send(&write_request(0, 50, 32 * MIB, b"after"));
    let start = std::time::Instant::now();
    while other.read(32 * MIB, 5).unwrap() != b"after" {
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    let queues = fixture.device.statistics().queues;
    let read: u64 = queues.iter().map(|queue| queue.reads.bytes).sum();
    assert!(read < 9 * MIB, "{read} bytes were read for who takes none");
    let mut cookies: Vec<u64> = (0..=50).map(|_| slow.reply(0).cookie()).collect();
    cookies.sort_unstable();
    assert!(cookies.iter().copied().eq(0..=50));
    fixture.close();
}

#[test]
fn names_and_descriptions_are_told() {
    let fixture = Fixture::with(&Image::qcow2(MIB), |builder| {
        builder.export_name("disk 1").description("the first")
    });
    assert!(fixture.uri().starts_with("nbd+unix:///disk%201?socket="));
    let mut client = fixture.connect();
    client.greet(3);
    let mut expected = string("disk 1");
    expected.extend(b"the first");
    assert_eq!(client.option(3, b""), [(2, expected), (1, vec![])]);
    let mut data = string("other");
    data.extend(0u16.to_be_bytes());
    assert_eq!(client.option(7, &data)[0].0, (1 << 31) + 6);
    assert_eq!(client.go("disk 1").0, MIB);
    assert_eq!(fixture.simple_client().read(0, 1), Ok(vec![0]));
    fixture.close();
}

#[test]
fn a_device_can_grow_and_pause_under_its_clients() {
    let fixture = Fixture::with(&Image::qcow2(MIB), |builder| builder.queues(2));
    let mut early = fixture.client();
    assert_eq!(early.write(0, MIB, b"beyond"), ENOSPC);
    fixture.device.resize(2 * MIB).unwrap();
    let mut late = fixture.connect();
    late.greet(3);
    assert_eq!(late.go("").0, 2 * MIB);
    assert_eq!(late.write(0, MIB, b"beyond"), 0);
    assert_eq!(early.read(MIB, 6).unwrap(), b"beyond");

    fixture.device.pause(PauseOptions::new()).unwrap();
    early.send(&write_request(0, 1, 0, b"waits"));
    late.send(&request(0, FLUSH, 2, 0, 0));
    std::thread::sleep(Duration::from_millis(50));
    fixture.device.resume().unwrap();
    assert_eq!(early.reply(0).error(), 0);
    assert_eq!(late.reply(0).error(), 0);
    assert_eq!(late.read(0, 5).unwrap(), b"waits");
    fixture.close();
}
