//! Sockets beside a queue's requests.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use urus_ring::{Driver, Parts, SocketCompletion};

/// The work on sockets of a queue's ring, from [`Queue::sockets`](crate::Queue::sockets).
///
/// An operation owns its memory and its descriptor until its completion. It starts with the queue's next
/// [`kick`](crate::Queue::kick) or [`wait`](crate::Queue::wait), by the system call that starts the requests (a receive or a poll
/// with the wait, where a kick has nothing else to start and the eventfd is not watched); a wait ends for it too.
/// Then [`completion`](Self::completion) and [`Queue::completion`](crate::Queue::completion) are to be called until both return None.
///
/// Operations on sockets do not count as requests in flight. Dropping the queue ends them.
pub struct Sockets<'a> {
    pub(crate) engine: &'a mut urus_engine::Queue<Driver>,
}

impl Sockets<'_> {
    /// Receives once, into the first bytes of `parts` or all of them, as soon as there is something. 0 at the end of the stream.
    pub fn receive(&mut self, token: u64, socket: Arc<OwnedFd>, parts: Parts) {
        self.with(|sockets| sockets.receive(token, socket, parts));
    }

    /// Sends the first bytes of `parts` or all of them, as soon as the socket takes some. A peer that is gone is an error (EPIPE) and no
    /// signal.
    pub fn send(&mut self, token: u64, socket: Arc<OwnedFd>, parts: Parts) {
        self.with(|sockets| sockets.send(token, socket, parts));
    }

    /// Waits once until `file` is readable: something else that the queue's thread is to be woken for.
    pub fn poll(&mut self, token: u64, file: Arc<OwnedFd>) {
        self.with(|sockets| sockets.poll(token, file));
    }

    /// Ends all operations with this token early. Each still has its completion, with what it did or with ECANCELED.
    pub fn cancel(&mut self, token: u64) {
        self.with(|sockets| sockets.cancel(token));
    }

    /// The next completion, without waiting.
    pub fn completion(&mut self) -> Option<SocketCompletion> {
        self.with(|sockets| sockets.completion()).flatten()
    }

    fn with<R>(&mut self, work: impl FnOnce(&mut urus_ring::Sockets<'_>) -> R) -> Option<R> {
        self.engine
            .with_storage(|driver| driver.sockets().map(|mut sockets| work(&mut sockets)))
    }
}

impl fmt::Debug for Sockets<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets").finish_non_exhaustive()
    }
}
