//! What the tests share: a device in a scratch directory, a server over it, and a client that speaks NBD byte by byte, written apart from the
//! server's own code (it shares none of its numbers).
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use urus::{CreateOptions, Device, Format, IoDriver, OpenOptions};
use urus_nbd::{Listen, Server, ServerBuilder};

pub const MIB: u64 = 1 << 20;

/// A scratch directory with an image and a server.
pub struct Fixture {
    pub dir: TempDir,
    pub device: Device,
    pub server: Option<Server>,
}

/// How to open the image.
pub struct Image {
    pub format: Format,
    pub size: u64,
    pub read_only: bool,
    pub io: IoDriver,
}

impl Image {
    pub fn qcow2(size: u64) -> Self {
        Self {
            format: Format::Qcow2,
            size,
            read_only: false,
            io: IoDriver::Auto,
        }
    }

    pub fn raw(size: u64) -> Self {
        Self {
            format: Format::Raw,
            ..Self::qcow2(size)
        }
    }
}

/// A server to be, whose sockets are moved as the suite wants it: see `over_epoll.rs`.
pub fn server(device: &Device) -> ServerBuilder {
    let over_epoll = module_path!().starts_with("over_epoll");
    Server::builder(device.clone()).ring_sockets(!over_epoll)
}

impl Fixture {
    pub fn new(image: &Image) -> Self {
        Self::with(image, |builder| builder)
    }

    pub fn with(image: &Image, configure: impl FnOnce(ServerBuilder) -> ServerBuilder) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut options = CreateOptions::new();
        options.format(image.format).size(image.size);
        urus::create(&path, &options).unwrap();
        Self::over(dir, image, configure)
    }

    /// Over an image that is there already, as `disk` in `dir`.
    pub fn over(
        dir: TempDir,
        image: &Image,
        configure: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> Self {
        let device = OpenOptions::new()
            .format(image.format)
            .read_only(image.read_only)
            .io(image.io)
            .open(dir.path().join("disk"))
            .unwrap();
        let builder = server(&device).listen(Listen::Unix(dir.path().join("socket")));
        let server = configure(builder).start().unwrap();
        Self {
            dir,
            device,
            server: Some(server),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn uri(&self) -> String {
        self.server.as_ref().unwrap().uris().remove(0)
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.socket())
    }

    /// A client in the transmission phase, with structured replies and `base:allocation`.
    pub fn client(&self) -> Client {
        let mut client = self.connect();
        client.greet(3);
        client.structured();
        client.select_allocation("");
        client.go("");
        client
    }

    /// A client in the transmission phase, with simple replies.
    pub fn simple_client(&self) -> Client {
        let mut client = self.connect();
        client.greet(3);
        client.go("");
        client
    }

    /// Ends the server and the device, and returns the directory with the image.
    pub fn close(mut self) -> TempDir {
        self.server.take().unwrap().shutdown().unwrap();
        self.device.close().unwrap();
        self.dir
    }
}

/// A client that can do anything, also what it must not.
pub struct Client {
    pub stream: UnixStream,
    structured: bool,
}

/// A reply in the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Simple {
        cookie: u64,
        error: u32,
        data: Vec<u8>,
    },
    Chunk {
        cookie: u64,
        done: bool,
        kind: u16,
        payload: Vec<u8>,
    },
}

impl Reply {
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }

    /// The error value; 0 for success.
    pub fn error(&self) -> u32 {
        match self {
            Self::Simple { error, .. } => *error,
            Self::Chunk { kind, payload, .. } if kind & 0x8000 != 0 => {
                u32::from_be_bytes(payload[..4].try_into().unwrap())
            }
            Self::Chunk { .. } => 0,
        }
    }
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;
pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;

pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

pub fn write_request(flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = request(flags, WRITE, cookie, offset, len);
    bytes.extend_from_slice(data);
    bytes
}

pub fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

impl Client {
    pub fn connect(socket: &std::path::Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        // A reply that never comes is a failed test, not a test that never ends.
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Self {
            stream,
            structured: false,
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.receive(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.receive(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.receive(8).try_into().unwrap())
    }

    /// Whether the server has ended the connection, after anything it still had to say.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::ConnectionReset,
            }
        }
    }

    pub fn greet(&mut self, flags: u32) {
        assert_eq!(self.receive(18), b"NBDMAGICIHAVEOPT\x00\x03");
        self.send(&flags.to_be_bytes());
    }

    /// Sends an option and returns the replies to it, up to the last one.
    pub fn option(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option(kind, data));
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.u64(), 0x0003_e889_0455_65a9);
            assert_eq!(self.u32(), kind);
            let reply = self.u32();
            let len = usize::try_from(self.u32()).unwrap();
            let data = self.receive(len);
            replies.push((reply, data));
            if reply == 1 || reply & (1 << 31) != 0 {
                return replies;
            }
        }
    }

    pub fn structured(&mut self) {
        assert_eq!(self.option(8, b""), [(1, vec![])]);
        self.structured = true;
    }

    pub fn select_allocation(&mut self, export: &str) {
        let mut data = string(export);
        data.extend(1u32.to_be_bytes());
        data.extend(string("base:allocation"));
        let replies = self.option(10, &data);
        assert_eq!(replies.len(), 2, "{replies:?}");
    }

    /// Enters the transmission phase; size and flags of the export.
    pub fn go(&mut self, export: &str) -> (u64, u16) {
        let mut data = string(export);
        data.extend(0u16.to_be_bytes());
        let replies = self.option(7, &data);
        let (_, info) = &replies[0];
        assert_eq!(info.len(), 12, "{replies:?}");
        (
            u64::from_be_bytes(info[2..10].try_into().unwrap()),
            u16::from_be_bytes(info[10..].try_into().unwrap()),
        )
    }

    /// The next reply. `data` bytes follow a simple reply without error.
    pub fn reply(&mut self, data: usize) -> Reply {
        match self.u32() {
            0x6744_6698 => {
                let error = self.u32();
                let cookie = self.u64();
                let data = self.receive(if error == 0 { data } else { 0 });
                Reply::Simple {
                    cookie,
                    error,
                    data,
                }
            }
            0x668e_33ef => {
                assert!(self.structured, "structured replies were not negotiated");
                let flags = self.u16();
                let kind = self.u16();
                let cookie = self.u64();
                let len = usize::try_from(self.u32()).unwrap();
                Reply::Chunk {
                    cookie,
                    done: flags & 1 != 0,
                    kind,
                    payload: self.receive(len),
                }
            }
            magic => panic!("a reply begins with {magic:#x}"),
        }
    }

    /// One request without payload, and its error value.
    pub fn ask(&mut self, flags: u16, command: u16, offset: u64, len: u32) -> u32 {
        self.send(&request(flags, command, 77, offset, len));
        let reply = self.reply(0);
        assert_eq!(reply.cookie(), 77);
        reply.error()
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.send(&request(0, READ, 78, offset, len));
        let count = usize::try_from(len).unwrap();
        let reply = self.reply(if self.structured { 0 } else { count });
        assert_eq!(reply.cookie(), 78);
        if reply.error() != 0 {
            return Err(reply.error());
        }
        match reply {
            Reply::Simple { data, .. } => {
                assert!(!self.structured, "a read's reply must be structured");
                Ok(data)
            }
            Reply::Chunk {
                done,
                kind,
                payload,
                ..
            } => {
                assert!(done);
                if len == 0 {
                    assert_eq!((kind, payload.len()), (0, 0));
                    return Ok(payload);
                }
                assert_eq!(kind, 1);
                assert_eq!(payload[..8], offset.to_be_bytes());
                assert_eq!(payload.len(), 8 + count);
                Ok(payload[8..].to_vec())
            }
        }
    }

    /// Writes, and returns the error value.
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.send(&write_request(flags, 79, offset, data));
        let reply = self.reply(0);
        assert_eq!(reply.cookie(), 79);
        reply.error()
    }

    /// Lengths and flags of the extents from `offset` on.
    pub fn status(&mut self, flags: u16, offset: u64, len: u32) -> Vec<(u32, u32)> {
        self.send(&request(flags, BLOCK_STATUS, 80, offset, len));
        let Reply::Chunk {
            cookie: 80,
            done: true,
            kind: 5,
            payload,
        } = self.reply(0)
        else {
            panic!("not a block status");
        };
        payload[4..]
            .chunks(8)
            .map(|pair| {
                (
                    u32::from_be_bytes(pair[..4].try_into().unwrap()),
                    u32::from_be_bytes(pair[4..].try_into().unwrap()),
                )
            })
            .collect()
    }
}

/// Bytes that differ from place to place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}
