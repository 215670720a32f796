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

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Lets requests go on, those that were held too.
    pub(crate) fn open(&self, pins: &Pins) {
        self.closed.store(false, Ordering::SeqCst);
        pins.nudge_queues();
    }
}
