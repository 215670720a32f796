//! Extended headers over a real device, with a client that is scripted byte by byte; the layers of a chain as the metadata context
//! `qemu:allocation-depth` tells them; zeroes that must be fast; and several exports of one server.

mod common;

use common::*;
use urus::{CreateOptions, Format, OpenOptions};
use urus_nbd::{Listen, Server};

const EINVAL: u32 = 22;
const ENOTSUP: u32 = 95;
const FAST_ZERO: u16 = 1 << 4;
const PAYLOAD_LEN: u16 = 1 << 5;
/// Of a virtual disk that no request of 32 bits can cover.
const SIZE: u64 = 1 << 40;

/// A chunk of a reply with extended headers.
#[derive(Debug, PartialEq, Eq)]
struct Chunk {
    done: bool,
    kind: u16,
    cookie: u64,
    offset: u64,
    payload: Vec<u8>,
}

impl Chunk {
    fn error(&self) -> u32 {
        if self.kind & 0x8000 == 0 {
            return 0;
        }
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }

    /// The metadata context, and the extents.
    fn extents(&self) -> (u32, Vec<(u64, u64)>) {
        assert_eq!(self.kind, 6);
        let count = u32::from_be_bytes(self.payload[4..8].try_into().unwrap());
        let extents: Vec<_> = self.payload[8..]
            .chunks(16)
            .map(|pair| [&pair[..8], &pair[8..]])
            .map(|pair| pair.map(|half| u64::from_be_bytes(half.try_into().unwrap())))
            .map(|[len, flags]| (len, flags))
            .collect();
        assert_eq!(usize::try_from(count).unwrap(), extents.len());
        let context = u32::from_be_bytes(self.payload[..4].try_into().unwrap());
        (context, extents)
    }
}

struct Extended(Client);

impl Extended {
    /// In the transmission phase, with both metadata contexts; and the export's flags.
    fn connect(fixture: &Fixture, export: &str) -> (Self, u16) {
        let mut client = fixture.connect();
        client.greet(3);
        assert_eq!(client.option(11, b""), [(1, vec![])]);
        let mut data = string(export);
        data.extend(2u32.to_be_bytes());
        data.extend(string("base:allocation"));
        data.extend(string("qemu:allocation-depth"));
        let replies = client.option(10, &data);
        let ids: Vec<_> = replies.iter().map(|(_, data)| data.get(..4)).collect();
        let expected = [Some(&[0, 0, 0, 1][..]), Some(&[0, 0, 0, 2]), None];
        assert_eq!(ids, expected);
        let (_, flags) = client.go(export);
        (Self(client), flags)
    }

    fn send(&mut self, flags: u16, command: u16, offset: u64, len: u64, payload: &[u8]) {
        let mut bytes = 0x21e4_1c71u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(0x1234u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(payload);
        self.0.send(&bytes);
    }

    fn chunk(&mut self) -> Chunk {
        let head = self.0.receive(32);
        let u64_at = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
        let u16_at = |at: usize| u16::from_be_bytes(head[at..at + 2].try_into().unwrap());
        assert_eq!(head[..4], 0x6e8a_278cu32.to_be_bytes());
        Chunk {
            done: u16_at(4) & 1 != 0,
            kind: u16_at(6),
            cookie: u64_at(8),
            offset: u64_at(16),
            payload: self.0.receive(usize::try_from(u64_at(24)).unwrap()),
        }
    }

    /// A request, and its error value.
    fn ask(&mut self, flags: u16, command: u16, offset: u64, len: u64, payload: &[u8]) -> u32 {
        self.send(flags, command, offset, len, payload);
        let chunk = self.chunk();
        assert_eq!(
            (chunk.done, chunk.cookie, chunk.offset),
            (true, 0x1234, offset)
        );
        chunk.error()
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.ask(PAYLOAD_LEN, WRITE, offset, data.len() as u64, data)
    }

    /// What each metadata context says.
    fn status(&mut self, flags: u16, offset: u64, len: u64) -> [Vec<(u64, u64)>; 2] {
        self.send(flags, BLOCK_STATUS, offset, len, &[]);
        let (first, second) = (self.chunk(), self.chunk());
        assert_eq!((first.done, second.done), (false, true));
        let ((1, allocation), (2, depth)) = (first.extents(), second.extents()) else {
            panic!("not the contexts that were selected");
        };
        [allocation, depth]
    }
}

#[test]
fn requests_longer_than_32_bits() {
    let fixture = Fixture::new(&Image::qcow2(SIZE));
    let (mut client, flags) = Extended::connect(&fixture, "");
    assert_eq!(flags & (1 << 12), 1 << 12, "BLOCK_STAT_PAYLOAD");
    let data = pattern(1, 100_000);
    assert_eq!(client.write(SIZE / 2, &data), 0);
    // A client that forgets the flag is understood.
    assert_eq!(client.ask(FUA, WRITE, 5, 3, b"abc"), 0);
    client.send(DF, READ, SIZE / 2, 100_000, &[]);
    let chunk = client.chunk();
    assert_eq!((chunk.done, chunk.kind, chunk.offset), (true, 1, SIZE / 2));
    assert_eq!(chunk.payload[..8], (SIZE / 2).to_be_bytes());
    assert!(chunk.payload[8..] == data);
    let around = [(1 << 16, 0), (SIZE / 2 - (1 << 16), 3), (2 << 16, 0)];
    let [allocation, depth] = client.status(0, 0, SIZE);
    assert_eq!(allocation[..3], around);
    assert_eq!(allocation[3], (SIZE / 2 - (2 << 16), 3));
    assert_eq!(
        depth.iter().map(|&(_, depth)| depth).collect::<Vec<_>>(),
        [1, 0, 1, 0]
    );
    let [allocation, depth] = client.status(REQ_ONE, 1 << 16, SIZE - (1 << 16));
    assert_eq!((allocation, depth.len()), (vec![around[1]], 1));

    assert_eq!(client.ask(FUA, WRITE_ZEROES, 0, SIZE, &[]), 0);
    assert_eq!(client.ask(0, TRIM, 0, SIZE, &[]), 0);
    let [allocation, _] = client.status(0, 0, SIZE);
    assert_eq!(allocation, [(SIZE, 3)]);
    for (command, len) in [(READ, 1 << 33), (TRIM, SIZE + 1), (TRIM, u64::MAX)] {
        assert_eq!(client.ask(0, command, 0, len, &[]), EINVAL, "{command}");
    }
    assert_eq!(client.ask(0, FLUSH, 0, 0, &[]), 0);
    fixture.close();
}

#[test]
fn a_block_status_of_some_contexts() {
    let fixture = Fixture::new(&Image::qcow2(SIZE));
    let (mut client, _) = Extended::connect(&fixture, "");
    let query = |ids: &[u32]| {
        let mut payload = (SIZE - 4096).to_be_bytes().to_vec();
        ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
        payload
    };
    let ask = |client: &mut Extended, payload: &[u8]| {
        let len = payload.len() as u64;
        client.send(PAYLOAD_LEN, BLOCK_STATUS, 4096, len, payload);
        client.chunk()
    };
    let only = ask(&mut client, &query(&[2]));
    assert!(only.done);
    assert_eq!(only.extents(), (2, vec![(SIZE - 4096, 0)]));
    let wrong = [
        query(&[]),
        query(&[3]),
        query(&[1, 1]),
        query(&[1, 2, 1]),
        vec![0; 5],
    ];
    for payload in wrong {
        assert_eq!(ask(&mut client, &payload).error(), EINVAL, "{payload:?}");
    }
    // A payload where none belongs is passed over.
    assert_eq!(client.ask(PAYLOAD_LEN, TRIM, 0, 3, b"abc"), EINVAL);
    let [allocation, _] = client.status(0, 0, SIZE);
    assert_eq!(allocation, [(SIZE, 3)]);
    // And one without end ends the connection, as with writes.
    assert_eq!(
        client.ask(PAYLOAD_LEN, BLOCK_STATUS, 0, 1 << 40, &[]),
        EINVAL
    );
    assert!(client.0.is_closed());
    fixture.close();
}

#[test]
fn headers_of_the_other_kind_end_the_connection() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    let (mut client, _) = Extended::connect(&fixture, "");
    client.0.send(&request(0, READ, 1, 0, 512));
    client.0.send(&[0; 32]);
    assert!(client.0.is_closed());
    fixture.close();
}

#[test]
fn depths_of_a_chain_with_a_short_backing_file() {
    let dir = tempfile::tempdir().unwrap();
    let create = |name: &str, size: u64, backing: Option<&str>| {
        let mut options = CreateOptions::new();
        options.size(size);
        if let Some(backing) = backing {
            options.backing(backing, Format::Qcow2);
        }
        urus::create(dir.path().join(name), &options).unwrap();
    };
    let write = |name: &str, offset: u64| {
        let device = OpenOptions::new().open(dir.path().join(name)).unwrap();
        let mut io = device.blocking().unwrap();
        io.write_at(&[1; 65_536], offset).unwrap();
        drop(io);
        device.close().unwrap();
    };
    create("base", 4 * MIB, None);
    write("base", 0);
    create("middle", 2 * MIB, Some("base"));
    write("middle", MIB);
    create("disk", 4 * MIB, Some("middle"));
    write("disk", 3 * MIB);
    let fixture = Fixture::over(dir, &Image::qcow2(4 * MIB), |builder| builder);
    let (mut client, _) = Extended::connect(&fixture, "");
    let [allocation, depth] = client.status(0, 0, 4 * MIB);
    let cluster = 1 << 16;
    assert_eq!(
        depth,
        [
            (cluster, 3),
            (MIB - cluster, 0),
            (cluster, 2),
            (MIB - cluster, 0),
            (MIB, 2), // beyond the end of the middle one
            (cluster, 1),
            (MIB - cluster, 2),
        ]
    );
    assert_eq!(
        allocation,
        [
            (cluster, 0),
            (MIB - cluster, 3),
            (cluster, 0),
            (2 * MIB - cluster, 3),
            (cluster, 0),
            (MIB - cluster, 3),
        ]
    );
    fixture.close();
}

#[test]
fn fast_zeroes_are_fast_or_refused() {
    let fixture = Fixture::new(&Image::qcow2(MIB));
    let mut client = fixture.client();
    assert_eq!(client.write(0, 0, &pattern(1, 1 << 20)), 0);
    for (flags, offset, len, expected) in [
        (FAST_ZERO, 65_536, 131_072, 0),
        (FAST_ZERO | NO_HOLE | FUA, 0, 65_536, 0),
        (FAST_ZERO, 65_536, 1000, ENOTSUP),
        (FAST_ZERO, 1000, 65_536, ENOTSUP),
        (FAST_ZERO | NO_HOLE, 983_040, 65_535, ENOTSUP),
    ] {
        assert_eq!(
            client.ask(flags, WRITE_ZEROES, offset, len),
            expected,
            "{offset} {len}"
        );
    }
    let mut expected = pattern(1, 1 << 20);
    expected[..196_608].fill(0);
    assert!(
        client.read(0, 1 << 20).unwrap() == expected,
        "a refused request changes nothing"
    );
    fixture.close();
}

#[test]
fn several_exports_of_one_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut devices = Vec::new();
    for (name, size) in [("one", MIB), ("two", 2 * MIB), ("three", 3 * MIB)] {
        let path = dir.path().join(name);
        urus::create(&path, CreateOptions::new().size(size)).unwrap();
        devices.push(OpenOptions::new().open(&path).unwrap());
    }
    let socket = dir.path().join("socket");
    let server = Server::builder(devices[0].clone())
        .export(devices[1].clone())
        .export_name("two")
        .description("the second")
        .export(devices[2].clone())
        .export_name("three")
        .queues(2)
        .listen(Listen::Unix(socket.clone()))
        .start()
        .unwrap();
    let mut clients = Vec::new();
    for (name, size) in [
        ("", MIB),
        ("two", 2 * MIB),
        ("three", 3 * MIB),
        ("two", 2 * MIB),
    ] {
        let mut client = Client::connect(&socket);
        client.greet(3);
        assert_eq!(client.option(3, b"").len(), 4, "three names and the end");
        assert_eq!(client.go(name).0, size, "{name}");
        clients.push(client);
    }
    for (index, client) in clients.iter_mut().enumerate().take(3) {
        let data = vec![u8::try_from(index).unwrap() + 1; 70_000];
        assert_eq!(client.write(0, 1000, &data), 0);
    }
    for (index, client) in clients.iter_mut().enumerate() {
        let byte = [1, 2, 3, 2][index];
        assert_eq!(client.read(1000, 70_000).unwrap(), vec![byte; 70_000]);
    }
    // What was selected for one export does not hold for another.
    let mut client = Client::connect(&socket);
    client.greet(3);
    client.structured();
    client.select_allocation("two");
    client.go("three");
    assert_eq!(client.ask(0, BLOCK_STATUS, 0, 512), EINVAL);
    drop(clients);
    server.shutdown().unwrap();

    let error = Server::builder(devices[0].clone())
        .export(devices[1].clone())
        .listen(Listen::Unix(socket))
        .start()
        .unwrap_err();
    assert!(error.to_string().contains("the name \"\""), "{error}");
    devices.iter().for_each(|device| device.close().unwrap());
}
