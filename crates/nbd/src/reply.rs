//! Replies, and the queue of replies on their way to a client ("Simple reply message" and "Structured reply chunk message" of the
//! protocol).

use std::collections::VecDeque;
use std::io;
use std::io::IoSlice;

use urus::{Buffer, Parts, may_fail};

use crate::contexts::Context;
use crate::flight::Flight;
use crate::limits::{Load, SEND_PIECES, SEND_TURN_BYTES};
use crate::pool::Pool;
use crate::status::Descriptors;
use crate::transport::Transport;
use crate::wire::{
    CHUNK_DONE, CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, ErrorCode, SIMPLE_REPLY_MAGIC, Style, chunk,
    len32,
};

/// For the client whose request is refused for want of memory.
pub(crate) const NO_MEMORY: &str =
    "the server has no memory for the request; try again, with fewer or smaller requests at once";

/// Bytes of the longest head: an extended chunk's, and the offset of its data.
pub(crate) const HEAD_BYTES: usize = 40;

/// What the replies to a request repeat of it, and how they look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) style: Style,
}

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
pub(crate) enum Payload {
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

/// The head of a chunk with `len` bytes of payload, and its length.
fn chunk_head(tag: Tag, flags: u16, kind: u16, len: usize) -> ([u8; 32], usize) {
    let [flags, kind] = [flags, kind].map(u16::to_be_bytes);
    let [cookie, offset] = [tag.cookie, tag.offset].map(u64::to_be_bytes);
    let (magic, len) = (CHUNK_MAGIC.to_be_bytes(), len32(len));
    let extended = EXTENDED_CHUNK_MAGIC.to_be_bytes();
    let (short, long) = (len.to_be_bytes(), u64::from(len).to_be_bytes());
    let pieces: &[&[u8]] = if tag.style == Style::Extended {
        &[&extended, &flags, &kind, &cookie, &offset, &long]
    } else {
        &[&magic, &flags, &kind, &cookie, &short]
    };
    let mut head = [0; 32];
    let mut at = 0;
    for piece in pieces {
        head[at..at + piece.len()].copy_from_slice(piece);
        at += piece.len();
    }
    (head, at)
}

/// Appends one context's chunk of a block status.
fn status_chunk(
    bytes: &mut Vec<u8>,
    tag: Tag,
    flags: u16,
    context: Context,
    descriptors: &Descriptors,
) {
    let extended = tag.style == Style::Extended;
    let (kind, len) = if extended {
        (chunk::BLOCK_STATUS_EXT, 8 + 16 * descriptors.len())
    } else {
        (chunk::BLOCK_STATUS, 4 + 8 * descriptors.len())
    };
    let (head, head_len) = chunk_head(tag, flags, kind, len);
    bytes.extend(&head[..head_len]);
    bytes.extend(context.id().to_be_bytes());
    if extended {
        bytes.extend(len32(descriptors.len()).to_be_bytes());
    }
    for &(len, status) in descriptors {
        if extended {
            bytes.extend(len.to_be_bytes());
            bytes.extend(u64::from(status).to_be_bytes());
        } else {
            let len = u32::try_from(len)
                .expect("an extent lies within a request, whose length has 32 bits");
            bytes.extend(len.to_be_bytes());
            bytes.extend(status.to_be_bytes());
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

    fn simple(tag: Tag, code: u32, payload: Payload, load: Load) -> Self {
        Self::new(
            &[
                &SIMPLE_REPLY_MAGIC.to_be_bytes(),
                &code.to_be_bytes(),
                &tag.cookie.to_be_bytes(),
            ],
            payload,
            load,
        )
    }

    /// The only chunk of a structured reply. `extra` is the part of its payload that goes into the head.
    fn chunk(tag: Tag, kind: u16, extra: &[u8], payload: Payload, load: Load) -> Self {
        let len = extra.len() + payload.as_slice().len();
        let (head, head_len) = chunk_head(tag, CHUNK_DONE, kind, len);
        Self::new(&[&head[..head_len], extra], payload, load)
    }

    /// A request that returns nothing has succeeded.
    pub(crate) fn done(tag: Tag, load: Load) -> Self {
        match tag.style {
            Style::Simple | Style::Structured => Self::simple(tag, 0, Payload::None, load),
            // With extended headers every reply is structured.
            Style::Extended => Self::chunk(tag, chunk::NONE, &[], Payload::None, load),
        }
    }

    /// What was read. All of it is there, so one chunk says all.
    pub(crate) fn data(tag: Tag, buffer: Option<Buffer>, load: Load) -> Self {
        match (tag.style, buffer.filter(|buffer| !buffer.is_empty())) {
            (Style::Simple, Some(buffer)) => Self::simple(tag, 0, Payload::Buffer(buffer), load),
            (Style::Simple, None) => Self::done(tag, load),
            (_, Some(buffer)) => Self::chunk(
                tag,
                chunk::OFFSET_DATA,
                &tag.offset.to_be_bytes(),
                Payload::Buffer(buffer),
                load,
            ),
            // A data chunk must not be empty.
            (_, None) => Self::chunk(tag, chunk::NONE, &[], Payload::None, load),
        }
    }

    /// The request is refused because there is no memory for it.
    pub(crate) fn no_memory(tag: Tag, load: Load) -> Self {
        Self::error(tag, ErrorCode::NoMem, NO_MEMORY, load)
    }

    /// An error; with structured replies, with text for a person.
    pub(crate) fn error(tag: Tag, code: ErrorCode, text: &str, load: Load) -> Self {
        if tag.style == Style::Simple {
            return Self::simple(tag, code.number(), Payload::None, load);
        }
        let text_len = u16::try_from(text.len()).unwrap_or(u16::MAX);
        let mut bytes = Vec::with_capacity(6 + usize::from(text_len));
        bytes.extend(code.number().to_be_bytes());
        bytes.extend(text_len.to_be_bytes());
        bytes.extend(&text.as_bytes()[..usize::from(text_len)]);
        Self::chunk(tag, chunk::ERROR, &[], Payload::Bytes(bytes), load)
    }

    /// The extents of a range, as each metadata context has them: a chunk for each.
    pub(crate) fn block_status(tag: Tag, lists: &[(Context, Descriptors)], load: Load) -> Self {
        let mut bytes = Vec::new();
        let descriptors: usize = lists.iter().map(|(_, list)| list.len()).sum();
        let most = lists.len() * HEAD_BYTES + descriptors * 16;
        if may_fail(|| bytes.try_reserve_exact(most)).is_err() {
            return Self::no_memory(tag, load);
        }
        for (index, (context, descriptors)) in lists.iter().enumerate() {
            let done = if index + 1 == lists.len() {
                CHUNK_DONE
            } else {
                0
            };
            status_chunk(&mut bytes, tag, done, *context, descriptors);
        }
        Self::new(&[], Payload::Bytes(bytes), load)
    }

    pub(crate) fn head(&self) -> &[u8] {
        &self.head[..self.head_len]
    }

    /// The rest, and what the request costs until it is sent.
    pub(crate) fn into_payload(self) -> (Payload, Load) {
        (self.payload, self.load)
    }

    fn pieces(&self) -> [&[u8]; 2] {
        [self.head(), self.payload.as_slice()]
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
    /// Replies before those, that a ring sends.
    flight: Flight,
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
        self.queue.is_empty() && self.flight.is_empty()
    }

    /// Bytes that wait.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sends what the socket takes, many replies per system call.
    pub(crate) fn send(&mut self, transport: &mut Transport, pool: &mut Pool) -> io::Result<Sent> {
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
            match self.send_once(transport) {
                Ok(count) => {
                    turn += count;
                    self.advance(count, &mut outcome.freed, pool);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    outcome.blocked = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(outcome)
    }

    /// What a ring is to send next; [`sent`](Self::sent) takes it back. Not while it has some already.
    pub(crate) fn begin(&mut self) -> Option<Parts> {
        debug_assert!(self.sent == 0);
        self.flight.begin(&mut self.queue)
    }

    /// The ring has sent `count` bytes. Returns the requests whose replies are sent completely.
    pub(crate) fn sent(&mut self, parts: Parts, count: usize, pool: &mut Pool) -> Load {
        self.bytes -= count;
        self.flight.sent(parts, count, pool)
    }

    fn send_once(&self, transport: &mut Transport) -> io::Result<usize> {
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
        transport.send(&slices[..count])
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

    fn load() -> Load {
        Load::request(0)
    }

    fn tag(cookie: u64, style: Style) -> Tag {
        Tag {
            cookie,
            offset: 9,
            style,
        }
    }

    #[test]
    fn simple_replies_have_the_layout_of_the_document() {
        let done = Reply::done(tag(0x0102_0304_0506_0708, Style::Structured), load()).to_bytes();
        assert_eq!(
            done,
            b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
        );
        let failed =
            Reply::error(tag(1, Style::Simple), ErrorCode::NoSpc, "full", load()).to_bytes();
        assert_eq!(failed, b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x01");
        let data = Reply::data(
            tag(1, Style::Simple),
            Some(Buffer::from_vec(b"abc".to_vec())),
            load(),
        );
        assert_eq!(
            data.to_bytes(),
            b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x01abc"
        );
    }

    #[test]
    fn structured_replies_have_the_layout_of_the_document() {
        let data = Reply::data(
            tag(1, Style::Structured),
            Some(Buffer::from_vec(b"abc".to_vec())),
            load(),
        );
        assert_eq!(
            data.to_bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x0b\0\0\0\0\0\0\0\x09abc"
        );
        let nothing = Reply::data(tag(1, Style::Structured), Some(Buffer::new(0)), load());
        assert_eq!(
            nothing.to_bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x01\0\0\0\0"
        );
        let failed =
            Reply::error(tag(1, Style::Structured), ErrorCode::Io, "no", load()).to_bytes();
        assert_eq!(
            failed,
            b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x01\0\0\0\x08\0\0\0\x05\0\x02no"
        );
        let status = Reply::block_status(
            tag(1, Style::Structured),
            &[(Context::Allocation, vec![(512, 3)])],
            load(),
        )
        .to_bytes();
        assert_eq!(
            status,
            b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x01\0\0\0\x0c\0\0\0\x01\0\0\x02\0\0\0\0\x03"
        );
    }

    #[test]
    fn extended_replies_have_the_layout_of_the_document() {
        let extended = tag(1, Style::Extended);
        let head = |done: u8, kind: &[u8; 2], len: u8| {
            let mut bytes = b"\x6e\x8a\x27\x8c\0".to_vec();
            bytes.push(done);
            bytes.extend(kind);
            bytes.extend(b"\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0");
            bytes.push(len);
            bytes
        };
        let done = Reply::done(extended, load()).to_bytes();
        assert_eq!(done, head(1, b"\0\0", 0));
        let data = Reply::data(extended, Some(Buffer::from_vec(b"abc".to_vec())), load());
        let expected = [head(1, b"\0\x01", 11), b"\0\0\0\0\0\0\0\x09abc".to_vec()];
        assert_eq!(data.to_bytes(), expected.concat());
        let failed = Reply::error(extended, ErrorCode::NotSup, "no", load()).to_bytes();
        let expected = [head(1, b"\x80\x01", 8), b"\0\0\0\x5f\0\x02no".to_vec()];
        assert_eq!(failed, expected.concat());
        let lists = [
            (Context::Allocation, vec![(1 << 32, 3)]),
            (Context::Depth, vec![(1 << 32, 2)]),
        ];
        let status = Reply::block_status(extended, &lists, load()).to_bytes();
        let expected = [
            head(0, b"\0\x06", 24),
            b"\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x03".to_vec(),
            head(1, b"\0\x06", 24),
            b"\0\0\0\x02\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x02".to_vec(),
        ];
        assert_eq!(status, expected.concat());
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
        let mut transport = Transport::plain(ours);
        let mut output = Output::default();
        let mut pool = Pool::new(1 << 20);
        let mut expected = Vec::new();
        let mut load = Load::default();
        for cookie in 0..300u64 {
            let fill = cookie.to_le_bytes()[0];
            let reply = match cookie % 3 {
                0 => Reply::done(tag(cookie, Style::Structured), Load::request(0)),
                1 => Reply::data(
                    tag(cookie, Style::Structured),
                    Some(Buffer::from_vec(vec![fill; 20_011])),
                    Load::request(20_011),
                ),
                _ => Reply::error(
                    tag(cookie, Style::Structured),
                    ErrorCode::Io,
                    "text",
                    Load::request(0),
                ),
            };
            load.add(reply.load);
            expected.extend(reply.to_bytes());
            output.push(reply);
        }
        assert_eq!(output.bytes(), expected.len());
        let mut received = Vec::new();
        let mut chunk = vec![0; 7919];
        while received.len() < expected.len() {
            let sent = output.send(&mut transport, &mut pool).unwrap();
            load.remove(sent.freed);
            assert_eq!(sent.blocked, !output.is_empty());
            let count = read(&theirs, &mut chunk).unwrap();
            received.extend_from_slice(&chunk[..count]);
        }
        assert!(received == expected, "bytes were lost, doubled or moved");
        assert_eq!(load, Load::default());
        assert_eq!(output.bytes(), 0);
    }

    /// As a ring would send them: some bytes of what it was given, and later the rest.
    #[test]
    fn what_a_ring_sends_in_odd_pieces_is_whole_and_in_order() {
        let mut output = Output::default();
        let mut pool = Pool::new(1 << 20);
        let (mut expected, mut received) = (Vec::new(), Vec::new());
        let mut load = Load::default();
        let mut step = 1;
        for cookie in 0..600u64 {
            let fill = cookie.to_le_bytes()[0];
            let structured = tag(cookie, Style::Structured);
            let reply = match cookie % 3 {
                0 => Reply::done(structured, Load::request(0)),
                1 => Reply::data(
                    structured,
                    Some(Buffer::from_vec(vec![fill; 30_011])),
                    Load::request(30_011),
                ),
                _ => Reply::error(structured, ErrorCode::Io, "text", Load::request(0)),
            };
            load.add(reply.load);
            expected.extend(reply.to_bytes());
            output.push(reply);
            while output.bytes() > 2_000_000 || (cookie == 599 && !output.is_empty()) {
                let parts = output.begin().unwrap();
                let bytes = parts.to_bytes();
                step = step * 7 % 100_003;
                let count = step.min(bytes.len());
                received.extend_from_slice(&bytes[..count]);
                load.remove(output.sent(parts, count, &mut pool));
            }
        }
        assert!(received == expected, "bytes were lost, doubled or moved");
        assert_eq!((load, output.bytes()), (Load::default(), 0));
        assert!(output.begin().is_none());
        assert_eq!(pool.take(30_011).unwrap().len(), 30_011);
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
        output.push(Reply::done(tag(1, Style::Simple), load()));
        let sent = output.send(&mut Transport::plain(ours), &mut Pool::new(1 << 20));
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
