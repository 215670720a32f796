//! Replies, and the queue of replies on their way to a client ("Simple reply message" and "Structured reply chunk message" of the
//! protocol).

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use urus::Buffer;

use crate::limits::{Load, SEND_PIECES, SEND_TURN_BYTES};
use crate::options::ALLOCATION_CONTEXT;
use crate::pool::Pool;
use crate::wire::{CHUNK_DONE, CHUNK_MAGIC, ErrorCode, SIMPLE_REPLY_MAGIC, chunk, len32};

/// Bytes of the longest head: a chunk's, and the offset of its data.
const HEAD_BYTES: usize = 28;

/// One message to the client.
#[derive(Debug)]
pub(crate) struct Reply {
    head: [u8; HEAD_BYTES],
    head_len: usize,
    payload: Payload,
    /// What the request costs until this is sent.
    load: Load,
}

#[derive(Debug)]
enum Payload {
    None,
    /// Data that was read; goes back to the pool.
    Buffer(Buffer),
    Bytes(Vec<u8>),
}

impl Payload {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Buffer(buffer) => buffer.as_slice(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl Reply {
    fn new(pieces: &[&[u8]], payload: Payload, load: Load) -> Self {
        let mut head = [0; HEAD_BYTES];
        let mut head_len = 0;
        for piece in pieces {
            head[head_len..head_len + piece.len()].copy_from_slice(piece);
            head_len += piece.len();
        }
        Self {
            head,
            head_len,
            payload,
            load,
        }
    }

    /// Bytes of the handshake.
    pub(crate) fn handshake(bytes: Vec<u8>) -> Self {
        Self::new(&[], Payload::Bytes(bytes), Load::default())
    }

    fn simple(cookie: u64, code: u32, payload: Payload, load: Load) -> Self {
        Self::new(
            &[
                &SIMPLE_REPLY_MAGIC.to_be_bytes(),
                &code.to_be_bytes(),
                &cookie.to_be_bytes(),
            ],
            payload,
            load,
        )
    }

    /// The only chunk of a structured reply. `extra` is the part of its payload that goes into the head.
    fn chunk(cookie: u64, kind: u16, extra: &[u8], payload: Payload, load: Load) -> Self {
        let len = len32(extra.len() + payload.as_slice().len());
        Self::new(
            &[
                &CHUNK_MAGIC.to_be_bytes(),
                &CHUNK_DONE.to_be_bytes(),
                &kind.to_be_bytes(),
                &cookie.to_be_bytes(),
                &len.to_be_bytes(),
                extra,
            ],
            payload,
            load,
        )
    }

    /// A request that returns nothing has succeeded.
    pub(crate) fn done(cookie: u64, load: Load) -> Self {
        Self::simple(cookie, 0, Payload::None, load)
    }

    /// What was read at `offset`. All of it is there, so one chunk says all.
    pub(crate) fn data(
        cookie: u64,
        structured: bool,
        offset: u64,
        buffer: Option<Buffer>,
        load: Load,
    ) -> Self {
        match (structured, buffer.filter(|buffer| !buffer.is_empty())) {
            (true, Some(buffer)) => Self::chunk(
                cookie,
                chunk::OFFSET_DATA,
                &offset.to_be_bytes(),
                Payload::Buffer(buffer),
                load,
            ),
            // A data chunk must not be empty.
            (true, None) => Self::chunk(cookie, chunk::NONE, &[], Payload::None, load),
            (false, Some(buffer)) => Self::simple(cookie, 0, Payload::Buffer(buffer), load),
            (false, None) => Self::done(cookie, load),
        }
    }

    /// An error; with structured replies, with text for a person.
    pub(crate) fn error(
        cookie: u64,
        structured: bool,
        code: ErrorCode,
        text: &str,
        load: Load,
    ) -> Self {
        if !structured {
            return Self::simple(cookie, code.number(), Payload::None, load);
        }
        let text_len = u16::try_from(text.len()).unwrap_or(u16::MAX);
        let mut bytes = Vec::with_capacity(6 + usize::from(text_len));
        bytes.extend(code.number().to_be_bytes());
        bytes.extend(text_len.to_be_bytes());
        bytes.extend(&text.as_bytes()[..usize::from(text_len)]);
        Self::chunk(cookie, chunk::ERROR, &[], Payload::Bytes(bytes), load)
    }

    /// The extents of a range: (length, flags) pairs as they travel.
    pub(crate) fn block_status(cookie: u64, descriptors: Vec<u8>, load: Load) -> Self {
        Self::chunk(
            cookie,
            chunk::BLOCK_STATUS,
            &ALLOCATION_CONTEXT.to_be_bytes(),
            Payload::Bytes(descriptors),
            load,
        )
    }

    fn pieces(&self) -> [&[u8]; 2] {
        [&self.head[..self.head_len], self.payload.as_slice()]
    }

    fn len(&self) -> usize {
        self.head_len + self.payload.as_slice().len()
    }

    #[cfg(test)]
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.pieces().concat()
    }
}

/// Replies that wait to be sent, in order.
#[derive(Debug, Default)]
pub(crate) struct Output {
    queue: VecDeque<Reply>,
    /// Bytes of the first reply that are sent already.
    sent: usize,
    /// Bytes that wait.
    bytes: usize,
}

/// What became of an attempt to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Requests whose replies are sent completely.
    pub(crate) freed: Load,
    /// More waits until the socket takes it.
    pub(crate) blocked: bool,
}

impl Output {
    pub(crate) fn push(&mut self, reply: Reply) {
        self.bytes += reply.len();
        self.queue.push_back(reply);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes that wait.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sends what the socket takes, many replies per system call.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, pool: &mut Pool) -> Result<Sent, Errno> {
        let mut outcome = Sent {
            freed: Load::default(),
            blocked: false,
        };
        let mut turn = 0;
        while !self.queue.is_empty() {
            if turn >= SEND_TURN_BYTES {
                outcome.blocked = true;
                break;
            }
            match self.send_once(socket) {
                Ok(count) => {
                    turn += count;
                    self.advance(count, &mut outcome.freed, pool);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    outcome.blocked = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(outcome)
    }

    fn send_once(&self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let mut slices: [IoSlice<'_>; SEND_PIECES] = std::array::from_fn(|_| IoSlice::new(&[]));
        let mut count = 0;
        let mut skip = self.sent;
        'replies: for reply in &self.queue {
            for piece in reply.pieces() {
                let rest = piece.get(skip..).unwrap_or_default();
                skip = skip.saturating_sub(piece.len());
                if rest.is_empty() {
                    continue;
                }
                if count == SEND_PIECES {
                    break 'replies;
                }
                slices[count] = IoSlice::new(rest);
                count += 1;
            }
        }
        // NOSIGNAL: a client that is gone is an error here, not a signal to the process this runs in.
        sendmsg(
            socket,
            &slices[..count],
            &mut SendAncillaryBuffer::default(),
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
    }

    /// `count` more bytes are sent.
    fn advance(&mut self, count: usize, freed: &mut Load, pool: &mut Pool) {
        self.sent += count;
        self.bytes -= count;
        while let Some(first) = self.queue.front() {
            let len = first.len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            if let Some(reply) = self.queue.pop_front() {
                freed.add(reply.load);
                if let Payload::Buffer(buffer) = reply.payload {
                    pool.give(buffer);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards the layouts of replies, and that a client that takes its replies in odd pieces gets every byte once and in order.
    use super::*;
    use rustix::io::read;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::os::fd::AsFd;

    fn load() -> Load {
        Load::request(0)
    }

    #[test]
    fn simple_replies_have_the_layout_of_the_document() {
        let done = Reply::done(0x0102_0304_0506_0708, load()).to_bytes();
        assert_eq!(
            done,
            b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
        );
        let failed = Reply::error(1, false, ErrorCode::NoSpc, "full", load()).to_bytes();
        assert_eq!(failed, b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x01");
        let data = Reply::data(1, false, 9, Some(Buffer::from_vec(b"abc".to_vec())), load());
        assert_eq!(
            data.to_bytes(),
            b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x01abc"
        );
    }

    #[test]
    fn structured_replies_have_the_layout_of_the_document() {
        let data = Reply::data(1, true, 9, Some(Buffer::from_vec(b"abc".to_vec())), load());
        assert_eq!(
            data.to_bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x0b\0\0\0\0\0\0\0\x09abc"
        );
        let nothing = Reply::data(1, true, 9, Some(Buffer::new(0)), load());
        assert_eq!(
            nothing.to_bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x01\0\0\0\0"
        );
        let failed = Reply::error(1, true, ErrorCode::Io, "no", load()).to_bytes();
        assert_eq!(
            failed,
            b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x01\0\0\0\x08\0\0\0\x05\0\x02no"
        );
        let status = Reply::block_status(1, vec![0, 0, 2, 0, 0, 0, 0, 3], load()).to_bytes();
        assert_eq!(
            status,
            b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x01\0\0\0\x0c\0\0\0\x01\0\0\x02\0\0\0\0\x03"
        );
    }

    #[test]
    fn slow_clients_get_every_byte_once_and_in_order() {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let mut output = Output::default();
        let mut pool = Pool::new(1 << 20);
        let mut expected = Vec::new();
        let mut load = Load::default();
        for cookie in 0..300u64 {
            let fill = cookie.to_le_bytes()[0];
            let reply = match cookie % 3 {
                0 => Reply::done(cookie, Load::request(0)),
                1 => Reply::data(
                    cookie,
                    true,
                    0,
                    Some(Buffer::from_vec(vec![fill; 20_011])),
                    Load::request(20_011),
                ),
                _ => Reply::error(cookie, true, ErrorCode::Io, "text", Load::request(0)),
            };
            load.add(reply.load);
            expected.extend(reply.to_bytes());
            output.push(reply);
        }
        assert_eq!(output.bytes(), expected.len());
        let mut received = Vec::new();
        let mut chunk = vec![0; 7919];
        while received.len() < expected.len() {
            let sent = output.send(ours.as_fd(), &mut pool).unwrap();
            load.remove(sent.freed);
            assert_eq!(sent.blocked, !output.is_empty());
            let count = read(&theirs, &mut chunk).unwrap();
            received.extend_from_slice(&chunk[..count]);
        }
        assert!(received == expected, "bytes were lost, doubled or moved");
        assert_eq!(load, Load::default());
        assert_eq!(output.bytes(), 0);
    }

    #[test]
    fn a_client_that_is_gone_is_an_error() {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        drop(theirs);
        let mut output = Output::default();
        output.push(Reply::done(1, load()));
        assert_eq!(
            output.send(ours.as_fd(), &mut Pool::new(1 << 20)),
            Err(Errno::PIPE)
        );
    }
}
