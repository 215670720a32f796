//! Moving a connection's bytes by system calls, when epoll says that its socket is ready.

use std::io::{self, IoSliceMut};

use rustix::event::epoll::EventFlags;

use super::{Connection, Incoming, Phase};
use crate::complaints;
use crate::limits::RECEIVE_TURN_BYTES;
use crate::pool::Pool;
use crate::transport::Transport;

/// How epoll is to be told of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    Add(EventFlags),
    Modify(EventFlags),
}

impl Connection {
    /// The events to ask epoll for, if they are others than before.
    pub(crate) fn changed_interest(&mut self) -> Option<Watch> {
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, self.wants_input());
        wanted.set(EventFlags::OUT, self.blocked);
        match self.interest.replace(wanted) {
            None => Some(Watch::Add(wanted)),
            Some(before) if before != wanted => Some(Watch::Modify(wanted)),
            Some(_) => None,
        }
    }

    /// The socket has something to tell. `gone`: the client can neither send nor receive any more.
    pub(crate) fn receive(&mut self, gone: bool) {
        if self.wants_input() {
            self.receive_turn();
        } else if gone {
            // Nobody is left to take the replies, and what was not read was not asked for.
            self.close("the client is gone");
        }
    }

    fn receive_turn(&mut self) {
        let mut turn = 0;
        while self.wants_input() && turn < RECEIVE_TURN_BYTES {
            match self.receive_once() {
                Ok((0, _)) => {
                    self.reading = false;
                    if matches!(self.phase, Phase::Lingering) {
                        self.close("the client has closed");
                    }
                    return;
                }
                Ok((count, offered)) => {
                    turn += count;
                    // TLS gives a record at a time, however much the socket has.
                    if count < offered && !self.is_tls() {
                        return;
                    }
                    if !self.fill_payload() {
                        // The input must be understood before more is read.
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.complain_of_tls(&error);
                    return self.close(&format!("cannot receive: {error}"));
                }
            }
        }
    }

    /// A TLS handshake that fails is told, by an alert to the client as well: as a rule a certificate is wrong.
    fn complain_of_tls(&self, error: &io::Error) {
        let is_handshake =
            matches!(&self.phase, Phase::Handshake(handshake) if handshake.is_over_tls());
        if is_handshake && error.kind() == io::ErrorKind::InvalidData {
            let socket = self.transport.as_ref().map(Transport::socket);
            let why = format!("TLS has failed: {error}");
            complaints::refused(self.id, socket, complaints::Reason::Handshake, &why);
        }
    }

    fn is_tls(&self) -> bool {
        self.transport.as_ref().is_some_and(Transport::is_tls)
    }

    /// Moves what the TLS session has decrypted already to where it belongs. True if there was any.
    pub(super) fn take_decrypted(&mut self) -> bool {
        let Some(transport) = &mut self.transport else {
            return false;
        };
        let open = matches!(self.phase, Phase::Handshake(_) | Phase::Transmission(_));
        if !open || self.starting_tls || self.stalled {
            return false;
        }
        // What is in the input comes first; a payload is complete only through `fill_payload`.
        let count = transport.take_decrypted(self.input.space());
        self.input.received(count);
        count > 0
    }

    /// Receives once, straight into the payload on its way, then into the input. The bytes received, and for how many there was room.
    fn receive_once(&mut self) -> io::Result<(usize, usize)> {
        let Some(transport) = &mut self.transport else {
            return Ok((0, 0));
        };
        if matches!(self.phase, Phase::Lingering) {
            self.input.clear();
        }
        let mut payload: &mut [u8] = &mut [];
        if let (true, Some(Incoming::Payload { buffer, filled, .. })) =
            (self.input.data().is_empty(), &mut self.incoming)
        {
            payload = match buffer {
                Some(buffer) => &mut buffer.as_mut_slice()[*filled..],
                None => &mut [],
            };
        }
        let wanted = payload.len();
        let space = self.input.space();
        let offered = wanted + space.len();
        let mut slices = [IoSliceMut::new(payload), IoSliceMut::new(space)];
        let used = if wanted == 0 {
            &mut slices[1..]
        } else {
            &mut slices[..]
        };
        let count = transport.receive(used)?;
        if let Some(Incoming::Payload { filled, .. }) = &mut self.incoming {
            *filled += count.min(wanted);
        }
        self.input.received(count.saturating_sub(wanted));
        Ok((count, offered))
    }

    /// Sends what the socket takes. Whether that has made room for a request that waits; None if the connection is closed over it.
    pub(super) fn send_ready(&mut self, pool: &mut Pool) -> Option<bool> {
        let transport = self.transport.as_mut()?;
        if self.output.is_empty() && !transport.has_unsent() && !self.starting_tls {
            return Some(false);
        }
        match self.output.send(transport, pool) {
            Ok(sent) => {
                self.load.remove(sent.freed);
                self.blocked = sent.blocked;
                let room = self.stalled && (sent.freed.requests > 0 || self.output.is_empty());
                Some(room || (!self.later.is_empty() && self.may_read()))
            }
            Err(error) => {
                self.close(&format!("cannot send: {error}"));
                None
            }
        }
    }
}
