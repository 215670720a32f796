//! The NBD server, over a Unix socket: handshakes and commands, well-formed and not. Written apart from the server's
//! own code, as the tests' client is.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use urus::{CreateOptions, Device, Format, IoDriver, OpenOptions};
use urus_nbd::{Listen, Server};

use crate::Verdict;
use crate::input::Input;
use crate::require;

/// The disk that is served.
const DISK_BYTES: u64 = 8 << 20;
/// Parts of a script.
const MOST_PARTS: u32 = 48;
/// What one request, and all of them together, may ask to be sent back.
const READ_BYTES: u32 = 256 << 10;
const ALL_READ_BYTES: u32 = 2 << 20;
/// A server that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(20);

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;

/// The server, started once for each thread that fuzzes.
struct Served {
    dir: TempDir,
    server: Option<Server>,
    device: Device,
}

impl Served {
    fn new() -> Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let dir = tempfile::tempdir().map_err(|error| text(&error))?;
        let path = dir.path().join("disk");
        let mut options = CreateOptions::new();
        options.format(Format::Qcow2).size(DISK_BYTES);
        urus::create(&path, &options).map_err(|error| text(&error))?;
        let device = OpenOptions::new()
            .io(IoDriver::Blocking)
            .open(&path)
            .map_err(|error| text(&error))?;
        let server = Server::builder(device.clone())
            .listen(Listen::Unix(dir.path().join("socket")))
            .start()
            .map_err(|error| text(&error))?;
        Ok(Self {
            dir,
            server: Some(server),
            device,
        })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.server.take());
        let _ = self.device.close();
    }
}

thread_local! {
    static SERVED: Result<Served, String> = Served::new();
}

/// Starts the server, so that no input pays for it.
///
/// # Errors
/// Why it does not start.
pub fn prepare() -> Verdict {
    SERVED.with(|served| served.as_ref().map(|_| ()).map_err(Clone::clone))
}

/// Talks to the server. It answers each well-formed request once, ends the connection in the end, and serves the next.
///
/// # Errors
/// What is wrong.
pub fn nbd(data: &[u8]) -> Verdict {
    SERVED.with(|served| {
        let served = served.as_ref().map_err(Clone::clone)?;
        let script = Script::read(&mut Input::new(data));
        let said = talk(&served.socket(), &script.bytes)?;
        if script.orderly {
            script.judge(&said)?;
        }
        alive(&served.socket())
    })
}

/// Sends everything, then ends the input; returns what comes back until the server ends it too.
fn talk(socket: &std::path::Path, bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut stream =
        UnixStream::connect(socket).map_err(|error| format!("no connection: {error}"))?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .map_err(|error| error.to_string())?;
    let mut taking = stream.try_clone().map_err(|error| error.to_string())?;
    let taker = std::thread::spawn(move || {
        let mut all = Vec::new();
        let ended = taking.read_to_end(&mut all);
        (all, ended)
    });
    let sent = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let (all, ended) = taker.join().map_err(|_| "the reader panicked".to_owned())?;
    for error in [sent.err(), ended.err()].into_iter().flatten() {
        require!(
            !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            "a hang: the server neither answers nor ends the connection"
        );
    }
    Ok(all)
}

/// The server still serves: a plain client writes, and reads what it wrote.
fn alive(socket: &std::path::Path) -> Verdict {
    let mut bytes = vec![0, 0, 0, 3];
    option(&mut bytes, GO, &[0; 6]);
    let at = DISK_BYTES - 8;
    request(&mut bytes, 0, WRITE, 1, at, 5);
    bytes.extend(b"alive");
    let said = talk(socket, &bytes)?;
    let written = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    require!(
        said.ends_with(&written),
        "another client is not served: {said:02x?}"
    );
    Ok(())
}

fn option(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(b"IHAVEOPT");
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(data);
}

/// With extended headers.
fn extended_request(bytes: &mut Vec<u8>, flags: u16, command: u16, offset: u64, len: u64) {
    bytes.extend(0x21e4_1c71u32.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(7u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
}

fn request(bytes: &mut Vec<u8>, flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
    bytes.extend(0x2560_9513u32.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
}

/// A request that has to be answered.
struct Asked {
    cookie: u64,
    command: u16,
    len: u32,
}

/// What the client says.
struct Script {
    bytes: Vec<u8>,
    asked: Vec<Asked>,
    structured: bool,
    /// Extended headers were asked for: what follows is survived, not judged.
    extended: bool,
    /// Nothing in it breaks the protocol: every request is answered.
    orderly: bool,
    read_left: u32,
}

impl Script {
    fn read(input: &mut Input<'_>) -> Self {
        let shape = input.u8();
        let mut script = Self {
            bytes: Vec::new(),
            asked: Vec::new(),
            structured: false,
            extended: false,
            orderly: true,
            read_left: ALL_READ_BYTES,
        };
        if shape & 0x80 != 0 {
            script.orderly = false;
            script.bytes.extend(input.rest());
            return script;
        }
        script.bytes.extend([0, 0, 0, 3]);
        script.handshake(shape, input);
        for _ in 0..MOST_PARTS {
            if input.is_empty() || !script.part(input) {
                break;
            }
        }
        script
    }

    fn handshake(&mut self, shape: u8, input: &mut Input<'_>) {
        for _ in 0..shape & 7 {
            let kind = input.u8();
            let len = usize::from(input.u8());
            match kind % 16 {
                0 | 1 => {
                    self.structured = true;
                    option(&mut self.bytes, STRUCTURED, &[]);
                }
                2 | 3 => option(&mut self.bytes, 10, &context(b"base:allocation")),
                4 => option(&mut self.bytes, 9, &context(input.take(len % 24))),
                5 => option(&mut self.bytes, 10, &context(input.take(len % 24))),
                6 => option(&mut self.bytes, 3, &[]),
                7 => option(&mut self.bytes, 6, &[0, 0, 0, 0, 0, 1, 0, 3]),
                8 => {
                    // An option of any kind, with any data; what is no known one is refused, and the talk goes on.
                    self.orderly = false;
                    let kind = input.u32() % 32;
                    option(&mut self.bytes, kind, input.take(len));
                }
                9 => {
                    // A length that does not fit.
                    self.orderly = false;
                    self.bytes.extend(b"IHAVEOPT");
                    self.bytes.extend(u32::from(kind >> 4).to_be_bytes());
                    self.bytes.extend(input.u32().to_be_bytes());
                    self.bytes.extend(input.take(len));
                }
                10 => {
                    self.orderly = false;
                    option(&mut self.bytes, 1, input.take(len));
                }
                11 => {
                    self.orderly = false;
                    self.bytes.extend(input.take(len));
                }
                12 => {
                    // Long, but not too long to be skipped.
                    let data = vec![kind; 66 << 10];
                    self.orderly = false;
                    option(&mut self.bytes, u32::from(kind >> 4), &data);
                }
                13 => {
                    self.orderly = false;
                    self.extended = true;
                    option(&mut self.bytes, 11, &[]);
                }
                _ => {
                    self.orderly = false;
                    option(&mut self.bytes, u32::from(kind >> 4), &[]);
                }
            }
        }
        option(&mut self.bytes, GO, &[0; 6]);
    }

    /// False after the last one.
    fn part(&mut self, input: &mut Input<'_>) -> bool {
        let kind = input.u8();
        if self.extended {
            self.extended_part(kind, input);
            return true;
        }
        if kind >= 0xf0 {
            self.orderly = false;
            let len = usize::from(input.u8());
            match kind & 3 {
                0 => self.bytes.extend(input.take(len)),
                1 => {
                    let (flags, command) = (input.u16(), input.u16());
                    request(&mut self.bytes, flags, command, 7, input.u64(), input.u32());
                }
                // A payload that is cut off, or none.
                _ => request(&mut self.bytes, 0, WRITE, 8, 0, input.u32()),
            }
            return true;
        }
        let command = [READ, WRITE, WRITE, 3, 4, 5, 6, 7, DISCONNECT, 99][usize::from(kind % 10)];
        let flags = match input.u8() {
            few if few < 0xc0 => [0, 0, 1, 2, 4, 8][usize::from(few % 6)],
            many => u16::from(many) << 2,
        };
        let offset = match kind / 10 % 4 {
            0 => u64::from(input.u16()) * 512,
            1 => u64::from(input.u32()),
            2 => DISK_BYTES.saturating_sub(u64::from(input.u16())),
            _ => u64::from(input.u16()) << 16,
        };
        let mut len = match kind / 40 % 4 {
            0 => u32::from(input.u8()) * 512,
            1 => u32::from(input.u16()),
            2 => 65536,
            _ => input.u32() % (1 << 24),
        };
        if command == READ {
            len = len.min(READ_BYTES).min(self.read_left);
            self.read_left -= len;
        }
        if command == WRITE {
            len = len.min(64 << 10);
        }
        if command == DISCONNECT {
            request(&mut self.bytes, 0, command, 9, 0, 0);
            return false;
        }
        let cookie = 1000 + self.asked.len() as u64;
        request(&mut self.bytes, flags, command, cookie, offset, len);
        if command == WRITE {
            let byte = kind ^ 0x5a;
            self.bytes.extend(std::iter::repeat_n(byte, len as usize));
        }
        self.asked.push(Asked {
            cookie,
            command,
            len,
        });
        true
    }

    fn extended_part(&mut self, kind: u8, input: &mut Input<'_>) {
        let flags = u16::from(input.u8());
        let offset = u64::from(input.u16()) << 8;
        let command = u16::from(kind % 9);
        let mut len = match kind / 9 % 4 {
            0 => u64::from(input.u8()),
            1 => u64::from(input.u16()),
            2 => 8 + 4 * u64::from(input.u8() % 4),
            _ => input.u64(),
        };
        if command == READ {
            len = len.min(u64::from(self.read_left.min(READ_BYTES)));
            self.read_left -= u32::try_from(len).unwrap_or(0);
        }
        extended_request(&mut self.bytes, flags, command, offset, len);
        if command == WRITE || flags & 32 != 0 {
            let payload = usize::try_from(len.min(256)).unwrap_or(0);
            self.bytes.extend(input.take(payload));
        }
    }

    /// Every request has exactly one end among the replies, and nothing else is there.
    fn judge(&self, said: &[u8]) -> Verdict {
        let mut reader = Replies { rest: said };
        require!(
            reader.take(18)?.starts_with(b"NBDMAGICIHAVEOPT"),
            "no greeting"
        );
        loop {
            let head = reader.take(20)?;
            require!(
                head[..8] == 0x0003_e889_0455_65a9u64.to_be_bytes(),
                "no reply to an option: {head:02x?}"
            );
            let (option, kind) = (be32(&head[8..]), be32(&head[12..]));
            reader.take(be32(&head[16..]) as usize)?;
            if option == GO && kind == 1 {
                break;
            }
            require!(option != GO || kind < 1 << 31, "the export is refused");
        }
        let mut open: Vec<&Asked> = self.asked.iter().collect();
        while !reader.rest.is_empty() {
            let magic = be32(reader.take(4)?);
            let (cookie, done) = match magic {
                0x6744_6698 => {
                    let head = reader.take(12)?;
                    let cookie = be64(&head[4..]);
                    let asked = open.iter().find(|asked| asked.cookie == cookie);
                    let data = asked.filter(|asked| asked.command == READ && be32(head) == 0);
                    require!(
                        data.is_none() || !self.structured,
                        "a simple reply with data, though structured ones were agreed on"
                    );
                    reader.take(data.map_or(0, |asked| asked.len as usize))?;
                    (cookie, true)
                }
                0x668e_33ef if self.structured => {
                    let head = reader.take(16)?;
                    reader.take(be32(&head[12..]) as usize)?;
                    (be64(&head[4..]), head[1] & 1 != 0)
                }
                _ => return Err(format!("{magic:#x} begins no reply")),
            };
            let at = open
                .iter()
                .position(|asked| asked.cookie == cookie)
                .ok_or_else(|| format!("a reply to {cookie}, which waits for none"))?;
            if done {
                open.swap_remove(at);
            }
        }
        require!(
            open.is_empty(),
            "{} of {} requests have no reply",
            open.len(),
            self.asked.len()
        );
        Ok(())
    }
}

/// The empty export name and one query.
fn context(query: &[u8]) -> Vec<u8> {
    let mut data = vec![0, 0, 0, 0, 0, 0, 0, 1];
    data.extend(u32::try_from(query.len()).unwrap_or(0).to_be_bytes());
    data.extend(query);
    data
}

struct Replies<'a> {
    rest: &'a [u8],
}

impl<'a> Replies<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or_else(|| format!("the replies end {} bytes early", count - self.rest.len()))?;
        self.rest = rest;
        Ok(taken)
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes[..4]
        .iter()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes[..8]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}
