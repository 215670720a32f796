//! Waking a driver's thread: an eventfd with a flag before it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
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
            self.signal();
        }
    }

    /// Makes the eventfd readable without ringing.
    pub(crate) fn signal(&self) {
        // EAGAIN would mean that the counter is full: readable already.
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.event, &1_u64.to_ne_bytes()));
    }

    /// Whether it was rung and not silenced since.
    pub(crate) fn is_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    /// Consumes the rings so far; returns whether there were any.
    pub(crate) fn silence(&self) -> bool {
        self.drain();
        self.rung.swap(false, Ordering::AcqRel)
    }

    /// Forgets signals, but no rings. Whoever signals first does what the signal is about; so what a forgotten signal
    /// was about is visible after this.
    pub(crate) fn forget_signals(&self) {
        self.drain();
        // Whoever rang set the flag before the write that was just drained.
        if self.is_rung() {
            self.signal();
        }
    }

    /// Sleeps until the eventfd is readable, a signal handler ran, or the time is over.
    pub(crate) fn sleep(&self, timeout: Option<Duration>) {
        // A time too long for the kernel is forever.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let _ = poll(
            &mut [PollFd::new(&self.event, PollFlags::IN)],
            timeout.as_ref(),
        );
    }

    fn drain(&self) {
        let mut count = [0_u8; 8];
        let _ = rustix::io::retry_on_intr(|| rustix::io::read(&self.event, &mut count));
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
