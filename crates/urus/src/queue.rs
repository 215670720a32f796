//! A queue: where one thread submits requests and reaps completions.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::{Completion, Device, Rejected, Request};

/// A queue of a [`Device`], with its own ring, bound to the thread that activated it.
///
/// Submit any number of requests, then [`kick`](Self::kick) once. Completions come in any order.
/// Dropping it waits for the requests in flight.
#[derive(Debug)]
pub struct Queue {
    device: Device,
    event_fd: OwnedFd,
    thread_bound: PhantomData<*const ()>,
}

impl Queue {
    /// Takes a request, to be started at the latest by [`kick`](Self::kick).
    ///
    /// # Errors
    /// The request itself, when as many as [`depth`](Self::depth) are in flight.
    pub fn submit(&mut self, request: Request) -> Result<(), Rejected> {
        Err(Rejected { request })
    }

    /// Starts everything submitted: one system call for all of it.
    pub fn kick(&mut self) {}

    /// The next completion, without waiting.
    pub fn completion(&mut self) -> Option<Completion> {
        None
    }

    /// Sleeps until [`completion`](Self::completion) may have something, or the time is over.
    pub fn wait(&mut self, _timeout: Option<Duration>) {}

    /// An eventfd that becomes readable when [`completion`](Self::completion) may have something: for epoll, poll or another ring.
    /// After it did, call [`consume_event`](Self::consume_event) first, then `completion` until it returns None.
    #[must_use]
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.event_fd.as_fd()
    }

    /// Makes [`event_fd`](Self::event_fd) unreadable until the next event.
    pub fn consume_event(&mut self) {}

    /// Requests submitted whose completion was not yet taken.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        0
    }

    /// Requests that can be in flight at once.
    #[must_use]
    pub fn depth(&self) -> usize {
        0
    }

    /// The device it belongs to.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }
}
