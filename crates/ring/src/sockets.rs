//! What a queue's ring sends to sockets and receives from them, beside its work on files.
//!
//! For servers: whoever serves a device over sockets has one thing to sleep in, and one system call starts the work on files and the
//! work on sockets. The engine has no part in it; it knows files only.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::blocking::PIECES_MAX;
use crate::memory::Buffer;
use crate::uring::Uring;

/// Bytes of buffers in the order in which they travel, and the buffers. An operation on a socket owns its parts until the kernel has
/// ended it.
#[derive(Debug, Default)]
pub struct Parts {
    buffers: Vec<Option<Buffer>>,
    /// Of which buffer, and which of its bytes. None is empty.
    ranges: std::collections::VecDeque<(usize, Range<usize>)>,
}

impl Parts {
    /// Without buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a buffer over, and returns its number.
    pub fn own(&mut self, buffer: Buffer) -> usize {
        self.buffers.push(Some(buffer));
        self.buffers.len() - 1
    }

    /// Appends bytes of the buffer of that number. Adjacent bytes of one buffer become one piece.
    ///
    /// # Panics
    /// When there is no such buffer, or no such bytes.
    pub fn push(&mut self, buffer: usize, range: Range<usize>) {
        let owned = self.buffers.get(buffer).and_then(Option::as_ref);
        let len = owned.expect("a buffer that was taken over").len();
        assert!(range.start <= range.end && range.end <= len);
        if range.is_empty() {
            return;
        }
        match self.ranges.back_mut() {
            Some((last, before)) if *last == buffer && before.end == range.start => {
                before.end = range.end;
            }
            _ => self.ranges.push_back((buffer, range)),
        }
    }

    /// Forgets the first `count` bytes, which have travelled.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let (_, first) = self.ranges.front_mut().expect("as many bytes");
            let step = count.min(first.len());
            first.start += step;
            count -= step;
            if first.start == first.end {
                self.ranges.pop_front();
            }
        }
    }

    /// The buffer of that number, to keep. None if it was taken before.
    ///
    /// # Panics
    /// When bytes of it are still to travel.
    pub fn take(&mut self, buffer: usize) -> Option<Buffer> {
        let in_use = self.ranges.iter().any(|(index, _)| *index == buffer);
        assert!(!in_use, "bytes of the buffer are still to travel");
        self.buffers.get_mut(buffer)?.take()
    }

    /// Drops all bytes and buffers. What was allocated for lists stays, for the next operation.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.buffers.clear();
    }

    /// Gives up the bytes that are still to travel, so that all buffers can be taken.
    pub fn forget_bytes(&mut self) {
        self.ranges.clear();
    }

    /// Whether no bytes are left to travel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// A copy of the bytes that are still to travel.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (buffer, range) in &self.ranges {
            let owned = self.buffers[*buffer].as_ref();
            let at = bytes.len();
            bytes.resize(at + range.len(), 0);
            owned
                .expect("`take` leaves buffers of which bytes are to travel")
                .copy_to(range.start, &mut bytes[at..]);
        }
        bytes
    }

    /// Fills `iovecs` with the first pieces, as many as one system call takes.
    pub(crate) fn fill_iovecs(&self, iovecs: &mut Vec<libc::iovec>) {
        let pieces = self.ranges.iter().flat_map(|(buffer, range)| {
            let buffer = self.buffers[*buffer].as_ref();
            let buffer = buffer.expect("`take` leaves buffers of which bytes are to travel");
            buffer.pieces(range.start, range.len())
        });
        iovecs.clear();
        iovecs.extend(pieces.take(PIECES_MAX).map(|(base, len)| libc::iovec {
            iov_base: base.as_ptr().cast(),
            iov_len: len,
        }));
    }
}

/// The end of an operation on a socket.
#[derive(Debug)]
pub struct SocketCompletion {
    /// What the operation was submitted with.
    pub token: u64,
    /// Its memory again; none for a poll.
    pub parts: Option<Parts>,
    /// Bytes received (0 at the end of the stream) or sent, which may be fewer than there were; or the events that a poll has seen.
    /// ECANCELED after [`Sockets::cancel`].
    pub result: io::Result<usize>,
}

/// The sockets' side of a driver. Operations start with the driver's next [`kick`](urus_engine::storage::Storage::kick) or
/// [`wait`](urus_engine::storage::Storage::wait), and a wait ends for their completions too. Receives and polls, which mostly have to wait for
/// the peer, start with a kick only where it enters the kernel for something else, or the eventfd is watched; else with the wait. There may
/// be any number of operations; they don't count against the driver's depth.
///
/// Dropping the driver cancels them and waits until the kernel has let go of their memory.
pub struct Sockets<'a>(pub(crate) &'a mut Uring);

impl std::fmt::Debug for Sockets<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sockets").finish_non_exhaustive()
    }
}

impl Sockets<'_> {
    /// Receives once, into the first bytes of `parts` or all of them, as soon as there is something.
    pub fn receive(&mut self, token: u64, socket: Arc<OwnedFd>, parts: Parts) {
        self.0.submit_socket(token, socket, Work::Receive(parts));
    }

    /// Sends the first bytes of `parts` or all of them, as soon as the socket takes some. A peer that is gone is an error (EPIPE) and no
    /// signal.
    pub fn send(&mut self, token: u64, socket: Arc<OwnedFd>, parts: Parts) {
        self.0.submit_socket(token, socket, Work::Send(parts));
    }

    /// Waits once until `file` is readable: something else that the queue's thread is to be woken for.
    pub fn poll(&mut self, token: u64, file: Arc<OwnedFd>) {
        self.0.submit_socket(token, file, Work::Poll);
    }

    /// Ends all operations with this token early. Each still has its completion, with what it did or with ECANCELED.
    pub fn cancel(&mut self, token: u64) {
        self.0.cancel_socket(token);
    }

    /// The next completion, without waiting. To be called until it returns None after each wait, as well as the
    /// driver's [`complete`](urus_engine::storage::Storage::complete).
    pub fn completion(&mut self) -> Option<SocketCompletion> {
        self.0.socket_completion()
    }
}

/// What is to be done with a socket.
pub(crate) enum Work {
    Receive(Parts),
    Send(Parts),
    Poll,
}

#[cfg(test)]
mod tests {
    //! Guards the arithmetic of what travels: every byte once, in order, from the right buffer.
    use super::*;

    /// The bytes as the kernel would be told.
    fn bytes(parts: &Parts) -> Vec<(usize, Range<usize>)> {
        parts.ranges.iter().cloned().collect()
    }

    #[test]
    fn bytes_travel_once() {
        let mut parts = Parts::new();
        let (first, second) = (parts.own(Buffer::new(100)), parts.own(Buffer::new(50)));
        parts.push(first, 10..20);
        parts.push(first, 20..30);
        parts.push(second, 7..7);
        parts.push(second, 0..50);
        assert_eq!(bytes(&parts), [(first, 10..30), (second, 0..50)]);
        let mut iovecs = Vec::new();
        parts.fill_iovecs(&mut iovecs);
        let lens: Vec<_> = iovecs.iter().map(|iovec| iovec.iov_len).collect();
        assert_eq!(lens, [20, 50]);
        parts.advance(25);
        assert_eq!(bytes(&parts), [(second, 5..50)]);
        assert_eq!(parts.take(first).map(|buffer| buffer.len()), Some(100));
        assert!(parts.take(first).is_none());
        parts.advance(45);
        assert!(parts.is_empty() && parts.take(second).is_some());
    }

    #[test]
    #[should_panic(expected = "still to travel")]
    fn memory_is_not_taken_before_its_time() {
        let mut parts = Parts::new();
        let buffer = parts.own(Buffer::new(8));
        parts.push(buffer, 0..8);
        parts.advance(7);
        parts.take(buffer);
    }
}
