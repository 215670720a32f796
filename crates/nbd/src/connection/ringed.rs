//! Moving a connection's bytes by operations in a ring.
//!
//! At most one receive and one send are in the ring. A receive is started only when all input is understood as far as it goes; it owns
//! the input, and the payload that is on its way, until it has ended, and nothing is understood meanwhile. A send owns the replies it
//! sends. A connection that is closed cancels both and is kept until they have ended.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use urus::Parts;

use super::{Connection, Incoming, Phase};
use crate::pool::Pool;

/// In which direction an operation moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Receive,
    Send,
}

/// What of a connection is in the ring.
#[derive(Debug, Default)]
pub(super) struct Ringed {
    receive: Option<Receive>,
    /// The parts of the last receive, for the next.
    spare: Parts,
    send: Option<Send>,
}

/// A receive in the ring.
#[derive(Debug)]
struct Receive {
    /// The number of the input's buffer in the parts.
    input: usize,
    /// The number of the payload's, and for how many bytes of it there is room.
    payload: Option<(usize, usize)>,
    cancelled: bool,
}

/// A send in the ring.
#[derive(Debug, Default)]
struct Send {
    cancelled: bool,
}

impl Ringed {
    pub(super) fn is_busy(&self) -> bool {
        self.receive.is_some() || self.send.is_some()
    }
}

impl Connection {
    /// Whether a ring moves the bytes.
    pub(crate) fn in_ring(&self) -> bool {
        self.ring.is_some()
    }

    pub(super) fn has_ring_operations(&self) -> bool {
        self.ring.as_ref().is_some_and(Ringed::is_busy)
    }

    pub(super) fn is_receiving(&self) -> bool {
        self.ring
            .as_ref()
            .is_some_and(|ring| ring.receive.is_some())
    }

    /// What the ring is to receive into now, if anything; [`received`](Self::received) takes it back.
    pub(crate) fn begin_receive(&mut self) -> Option<(Arc<OwnedFd>, Parts)> {
        if self.is_receiving() || !self.understood || !self.wants_input() {
            return None;
        }
        let ring = self.ring.as_mut()?;
        let socket = self.transport.as_ref()?.share_socket();
        if matches!(self.phase, Phase::Lingering) {
            self.input.clear();
        }
        let mut parts = std::mem::take(&mut ring.spare);
        let mut payload = None;
        if self.input.data().is_empty()
            && let Some(Incoming::Payload { buffer, filled, .. }) = &mut self.incoming
            && let Some(buffer) = buffer.take()
        {
            let room = *filled..buffer.len();
            let index = parts.own(buffer);
            payload = Some((index, room.len()));
            parts.push(index, room);
        }
        let (buffer, room) = self.input.lend()?;
        let input = parts.own(buffer);
        parts.push(input, room);
        ring.receive = Some(Receive {
            input,
            payload,
            cancelled: false,
        });
        Some((socket, parts))
    }

    /// A receive has ended.
    pub(crate) fn received(&mut self, mut parts: Parts, result: io::Result<usize>) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        let Some(Receive { input, payload, .. }) = ring.receive.take() else {
            debug_assert!(false, "a receive ended that did not begin");
            return;
        };
        parts.forget_bytes();
        if let Some(buffer) = parts.take(input) {
            self.input.take_back(buffer);
        }
        let mut expected = 0;
        let back = payload.and_then(|(index, room)| Some((parts.take(index)?, room)));
        if let (Some((back, room)), Some(Incoming::Payload { buffer, .. })) =
            (back, &mut self.incoming)
        {
            *buffer = Some(back);
            expected = room;
        }
        parts.clear();
        ring.spare = parts;
        if self.transport.is_none() {
            return;
        }
        match result {
            Ok(0) => {
                self.reading = false;
                if matches!(self.phase, Phase::Lingering) {
                    self.close("the client has closed");
                }
            }
            Ok(count) => {
                if let Some(Incoming::Payload { filled, .. }) = &mut self.incoming {
                    *filled += count.min(expected);
                }
                self.input.received(count.saturating_sub(expected));
                self.understood = false;
            }
            Err(error) if is_no_failure(&error) => {}
            Err(error) => self.close(&format!("cannot receive: {error}")),
        }
    }

    /// What the ring is to send now, if anything; [`sent`](Self::sent) takes it back.
    pub(crate) fn begin_send(&mut self) -> Option<(Arc<OwnedFd>, Parts)> {
        let ring = self.ring.as_mut()?;
        if ring.send.is_some() {
            return None;
        }
        let socket = self.transport.as_ref()?.share_socket();
        let parts = self.output.begin()?;
        ring.send = Some(Send::default());
        Some((socket, parts))
    }

    /// A send has ended.
    pub(crate) fn sent(&mut self, parts: Parts, result: io::Result<usize>, pool: &mut Pool) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        ring.send = None;
        if self.transport.is_none() {
            // The replies were given up when it was closed.
            return;
        }
        let count = match result {
            Ok(count) => count,
            Err(error) if is_no_failure(&error) => 0,
            Err(error) => return self.close(&format!("cannot send: {error}")),
        };
        self.load.remove(self.output.sent(parts, count, pool));
    }

    /// Whether the ring has an operation whose end nobody waits for any more: it is to be cancelled. Tells each once.
    pub(crate) fn take_cancellation(&mut self) -> Option<Way> {
        let unwanted = !self.wants_input();
        let closed = self.transport.is_none();
        let ring = self.ring.as_mut()?;
        if let Some(receive) = &mut ring.receive
            && unwanted
            && !std::mem::replace(&mut receive.cancelled, true)
        {
            return Some(Way::Receive);
        }
        if let Some(send) = &mut ring.send
            && closed
            && !std::mem::replace(&mut send.cancelled, true)
        {
            return Some(Way::Send);
        }
        None
    }
}

/// An operation that did not come to its work, and may be tried again if it is still wanted.
fn is_no_failure(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::CANCELED | Errno::INTR | Errno::AGAIN))
}
