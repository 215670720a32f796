//! The gate: closed for a pause, a resize or a close, it holds new requests back, while those that came through before go on.
//!
//! Whoever closes it waits for the pins afterwards (O7): so a request either is seen there or sees the gate closed.

use crate::pins::{Pins, QueuePins};
use crate::sync::{AtomicBool, Ordering};

/// Open at first.
pub(crate) struct Gate {
    closed: AtomicBool,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            closed: AtomicBool::new(false),
        }
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// A request begins, before its first look-up: its pin, or nothing where the gate is closed.
    #[inline]
    pub(crate) fn enter(&self, pins: &QueuePins) -> Option<u64> {
        // O7: the pin is set before the gate is looked at.
        let epoch = pins.begin();
        if self.is_closed() {
            pins.end(epoch);
            return None;
        }
        Some(epoch)
    }

    /// A queue's turn: looks at what has come, and lets what was held go on while the gate is open. It ends with a look at
    /// the gate that no other look follows: a look takes the wake of a gate that has opened, and with it the queue's
    /// only reason not to sleep.
    pub(crate) fn turn(
        &self,
        mut look: impl FnMut(),
        is_held: impl Fn() -> bool,
        mut release: impl FnMut(),
    ) {
        loop {
            look();
            if !is_held() || self.is_closed() {
                return;
            }
            release();
        }
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Lets requests go on, those that were held too.
    pub(crate) fn open(&self, pins: &Pins) {
        self.closed.store(false, Ordering::SeqCst);
        pins.nudge_queues();
    }
}
