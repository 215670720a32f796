//! Waking a driver's thread: an eventfd with a flag before it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;
use urus_engine::storage::Notify;
use urus_engine::sync::{AtomicBool, Ordering};

/// Rung by any thread, heard by the driver's.
///
/// No ring is lost: whoever rings first sets `rung` and then writes the eventfd; the listener reads the eventfd first
/// and clears `rung` after, so a ring that comes between is absorbed by the wake-up that is under way. (A listener that
/// sees the flag before the write arrives is woken once more for nothing.) Whatever the ringer did before `ring` is
/// visible after the `silence` that returns true: both are one read-modify-write of the flag.
#[derive(Debug)]
pub(crate) struct Bell {
    event: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            event,
            rung: AtomicBool::new(false),
        })
    }

    pub(crate) fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            signal(self.event.as_fd());
        }
    }

    /// Whether it was rung and not silenced since.
    pub(crate) fn is_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    /// Consumes the rings so far; returns whether there were any.
    pub(crate) fn silence(&self) -> bool {
        drain(self.event.as_fd());
        self.rung.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Notify for Bell {
    fn notify(&self) {
        self.ring();
    }
}

/// Makes an eventfd readable.
pub(crate) fn signal(event: BorrowedFd<'_>) {
    // EAGAIN would mean that the counter is full: readable already.
    let _ = rustix::io::retry_on_intr(|| rustix::io::write(event, &1_u64.to_ne_bytes()));
}

/// Makes an eventfd (non-blocking) unreadable.
pub(crate) fn drain(event: BorrowedFd<'_>) {
    let mut count = [0_u8; 8];
    let _ = rustix::io::retry_on_intr(|| rustix::io::read(event, &mut count));
}
