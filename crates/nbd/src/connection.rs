//! One client: its socket, where it stands in the protocol, and what it holds of the server.
//!
//! A connection belongs to one worker. The worker lets it receive, asks for what was understood ([`next`](Connection::next)) until there is
//! no more, hands replies over ([`answer`](Connection::answer)), and lets it send ([`send`](Connection::send)).
//!
//! This file is about what the bytes mean. They are moved in one of two ways:
//! * [`ringed`]: by operations in the ring of a queue of the worker's.
//! * [`ready`]: by system calls, when epoll says that the socket is ready. TLS always, and everything where there is no ring.

mod ready;
mod ringed;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::net::Shutdown;
use tracing::debug;
use urus::Buffer;

use crate::complaints;
use crate::export::{ExportId, Exports};
use crate::handshake::{Handshake, Progress, Session, greeting};
use crate::input::Input;
use crate::limits::{HANDSHAKE_OUTPUT_BYTES, LINGER_TIME, Load, READ_AHEAD_BYTES};
use crate::pool::Pool;
use crate::reply::{Output, Reply, Tag};
use crate::transmission::{Command, Refusal, payload};
use crate::transport::Transport;
use crate::wire::{ErrorCode, RequestHeader};
pub(crate) use ready::Watch;
use ringed::Ringed;
pub(crate) use ringed::Way;

/// How long clients may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// For the whole handshake.
    pub(crate) handshake: Duration,
    /// For the last replies.
    pub(crate) drain: Duration,
}

/// One client.
pub(crate) struct Connection {
    /// For the log.
    id: u64,
    exports: Arc<Exports>,
    /// None once closed.
    transport: Option<Transport>,
    /// Its operations, where a ring moves the bytes; else epoll says when.
    ring: Option<Ringed>,
    input: Input,
    output: Output,
    phase: Phase,
    /// The payload of a write that is on its way.
    incoming: Option<Incoming>,
    /// Reads put off until enough of the output is sent. Their load counts.
    later: VecDeque<Wanted>,
    load: Load,
    /// Requests that the engine works on. The connection is kept until they are back, even when closed.
    operations: usize,
    /// More input may come: no end of stream, no disconnect.
    reading: bool,
    /// What is in the input was understood as far as it goes, or until something has gone: only then more is received.
    understood: bool,
    /// A request waits in the input until load has gone.
    stalled: bool,
    /// The socket did not take all of the output.
    blocked: bool,
    /// TLS begins once the output is sent. Nothing is read before that.
    starting_tls: bool,
    /// The server shuts down: what comes is refused.
    stopping: bool,
    times: Times,
    deadline: Option<Instant>,
    /// What epoll was asked to tell, once it was.
    interest: Option<EventFlags>,
    /// Whether the worker has it on its list.
    pub(crate) listed: bool,
    /// Counts the connection as long as it lives.
    _permit: Permit,
}

enum Phase {
    Handshake(Handshake),
    Transmission(Session),
    /// Nothing more is understood; what is in flight is finished and sent.
    Ending {
        /// The end is the server's doing, so the client may have sent what nobody will read.
        linger: bool,
    },
    /// All is sent, and the client knows that nothing more comes. Waits for the client to close: closing before would
    /// destroy replies that it has not yet taken.
    Lingering,
}

enum Incoming {
    Payload {
        tag: Tag,
        command: Command,
        /// None while a receive in a ring has it.
        buffer: Option<Buffer>,
        filled: usize,
    },
    /// The payload of a write that is refused.
    Skip {
        tag: Tag,
        refusal: Refusal,
        remaining: u64,
    },
}

/// A request for the engine.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) export: ExportId,
    pub(crate) tag: Tag,
    pub(crate) command: Command,
    pub(crate) payload: Option<Buffer>,
    pub(crate) load: Load,
}

/// A place among a server's connections; given back on drop.
#[derive(Debug)]
pub(crate) struct Permit([Arc<AtomicUsize>; 2]);

impl Permit {
    /// Counts one more in each of `counters`: the server's and the worker's.
    pub(crate) fn new(counters: [Arc<AtomicUsize>; 2]) -> Self {
        for counter in &counters {
            counter.fetch_add(1, Relaxed);
        }
        Self(counters)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        for counter in &self.0 {
            counter.fetch_sub(1, Relaxed);
        }
    }
}

impl Connection {
    /// A connection just accepted, whose socket does not block. It is greeted with the first [`send`](Self::send). `in_ring`: its bytes
    /// are moved by a ring. None where there is no memory for it.
    pub(crate) fn new(
        id: u64,
        socket: OwnedFd,
        in_ring: bool,
        exports: Arc<Exports>,
        times: Times,
        permit: Permit,
    ) -> Option<Self> {
        let mut output = Output::default();
        output.push(Reply::handshake(greeting()));
        Some(Self {
            id,
            phase: Phase::Handshake(Handshake::new(Arc::clone(&exports))),
            exports,
            transport: Some(Transport::plain(socket)),
            ring: in_ring.then(Ringed::default),
            input: Input::try_new()?,
            output,
            incoming: None,
            later: VecDeque::new(),
            load: Load::default(),
            operations: 0,
            reading: true,
            understood: false,
            stalled: false,
            blocked: false,
            starting_tls: false,
            stopping: false,
            times,
            deadline: Instant::now().checked_add(times.handshake),
            interest: None,
            listed: false,
            _permit: permit,
        })
    }

    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.transport.as_ref().map(Transport::socket)
    }

    /// When [`expire`](Self::expire) is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Closed, and nothing in flight: the connection can be forgotten.
    pub(crate) fn is_over(&self) -> bool {
        self.transport.is_none() && self.operations == 0 && !self.has_ring_operations()
    }

    fn wants_input(&self) -> bool {
        match self.phase {
            Phase::Handshake(_) | Phase::Transmission(_) => {
                self.reading && !self.starting_tls && !self.stalled && !self.input.is_full()
            }
            Phase::Ending { .. } => false,
            Phase::Lingering => true,
        }
    }

    /// Moves input into the payload on its way. True while the payload is not complete, so that more can be received at once.
    fn fill_payload(&mut self) -> bool {
        match &mut self.incoming {
            Some(Incoming::Payload { buffer, filled, .. }) => {
                let Some(buffer) = buffer else {
                    return true;
                };
                let rest = &mut buffer.as_mut_slice()[*filled..];
                let count = rest.len().min(self.input.data().len());
                rest[..count].copy_from_slice(&self.input.data()[..count]);
                let complete = count == rest.len();
                *filled += count;
                self.input.consume(count);
                !complete
            }
            Some(Incoming::Skip { remaining, .. }) => {
                let held = self.input.data().len();
                let count = usize::try_from(*remaining).map_or(held, |rest| rest.min(held));
                self.input.consume(count);
                *remaining -= count as u64;
                *remaining > 0
            }
            None => false,
        }
    }

    /// The next request for the engine. None until there is more input, or less load; what can be answered without the engine is
    /// answered on the way.
    pub(crate) fn next(&mut self, pool: &mut Pool) -> Option<Wanted> {
        if self.may_read()
            && let Some(read) = self.later.pop_front()
        {
            return Some(read);
        }
        if self.is_receiving() {
            return None;
        }
        self.stalled = false;
        self.understood = false;
        loop {
            match &mut self.phase {
                Phase::Handshake(_) => {
                    if !self.handshake() && !self.take_decrypted() {
                        break;
                    }
                }
                Phase::Transmission(session) => {
                    let session = *session;
                    match self.transmission(session, pool) {
                        Ok(Some(wanted)) => return Some(wanted),
                        Ok(None) => {}
                        Err(Pause) if self.take_decrypted() => {}
                        Err(Pause) => break,
                    }
                }
                Phase::Ending { .. } | Phase::Lingering => break,
            }
        }
        let open = matches!(self.phase, Phase::Handshake(_) | Phase::Transmission(_));
        if open && !self.reading && !self.stalled {
            // What is there is understood, and no more comes.
            let linger = self.stopping && (self.has_work() || !self.output.is_empty());
            self.end(linger, "the input has ended");
        }
        self.understood = true;
        None
    }

    /// One step of the handshake. False when it has to wait.
    fn handshake(&mut self) -> bool {
        let Phase::Handshake(handshake) = &mut self.phase else {
            return false;
        };
        if self.starting_tls {
            return false;
        }
        if self.output.bytes() > HANDSHAKE_OUTPUT_BYTES {
            self.stalled = true;
            return false;
        }
        let mut bytes = Vec::new();
        let progress = handshake.advance(&mut self.input, &mut bytes);
        if let Some(why) = handshake.take_complaint() {
            let socket = self.transport.as_ref().map(Transport::socket);
            complaints::refused(self.id, socket, complaints::Reason::Policy, why);
        }
        if !bytes.is_empty() {
            self.output.push(Reply::handshake(bytes));
        }
        match progress {
            Progress::Again => true,
            Progress::More => false,
            Progress::StartTls => {
                self.starting_tls = true;
                false
            }
            Progress::Enter(session) => {
                let export = &self.exports.get(session.export).name;
                debug!(
                    connection = self.id,
                    export,
                    ?session,
                    "the client has chosen an export"
                );
                self.deadline = None;
                self.phase = Phase::Transmission(session);
                true
            }
            Progress::Close(why) => {
                self.end(true, why);
                false
            }
        }
    }

    /// One step of the transmission phase.
    fn transmission(&mut self, session: Session, pool: &mut Pool) -> Result<Option<Wanted>, Pause> {
        if self.incoming.is_some() {
            if self.fill_payload() {
                return Err(Pause);
            }
            return Ok(self.payload_complete(session, pool));
        }
        let head_len = session.style.request_bytes();
        let Some(head) = self.input.data().get(..head_len) else {
            return Err(Pause);
        };
        let Some(header) = RequestHeader::decode(head, session.style) else {
            self.end(true, "a request does not begin with its magic number");
            return Ok(None);
        };
        let command = if self.stopping {
            Err(Refusal {
                code: ErrorCode::Shutdown,
                why: "the server is shutting down",
            })
        } else {
            session.command(&header, self.exports.get(session.export))
        };
        let command = command.and_then(|command| match command {
            // What makes earlier writes safe is done with the memory that is kept back.
            Command::Flush | Command::Disconnect => Ok(command),
            _ if urus::memory_is_short() => Err(Refusal::NO_MEMORY),
            _ => Ok(command),
        });
        let load = Load::request(command.as_ref().map_or(0, Command::held_bytes));
        if !self.load.admits(load) {
            self.stalled = true;
            return Err(Pause);
        }
        self.input.consume(head_len);
        if matches!(command, Ok(Command::Disconnect)) {
            self.end(false, "the client disconnects");
            return Ok(None);
        }
        self.load.add(load);
        let tag = Tag {
            cookie: header.cookie,
            offset: header.offset,
            style: session.style,
        };
        match command {
            Err(refusal) => self.refuse(tag, &header, refusal),
            Ok(command) if command.is_empty() => self.empty(tag, command, load),
            Ok(command @ (Command::Write { len, .. } | Command::Query { len, .. })) => {
                if let Some(buffer) = pool.take(len) {
                    self.incoming = Some(Incoming::Payload {
                        tag,
                        command,
                        buffer: Some(buffer),
                        filled: 0,
                    });
                } else {
                    // As if it had not been admitted: what is refused holds no payload.
                    self.load.remove(load);
                    self.load.add(Load::request(0));
                    self.refuse(tag, &header, Refusal::NO_MEMORY);
                }
            }
            Ok(command) => {
                let wanted = wanted(session, tag, command, None);
                if !matches!(command, Command::Read { .. }) || self.may_read() {
                    return Ok(Some(wanted));
                }
                self.later.push_back(wanted);
            }
        }
        Ok(None)
    }

    /// Whether what would be read now can soon be sent. Else reads are put off.
    fn may_read(&self) -> bool {
        self.output.bytes() < READ_AHEAD_BYTES
    }

    /// Whether requests that were understood are not answered.
    fn has_work(&self) -> bool {
        self.operations > 0 || !self.later.is_empty()
    }

    /// The payload on its way is complete.
    fn payload_complete(&mut self, session: Session, pool: &mut Pool) -> Option<Wanted> {
        match self.incoming.take()? {
            Incoming::Payload {
                tag,
                command: Command::Query { offset, one, .. },
                buffer,
                ..
            } => {
                let export = self.exports.get(session.export);
                let payload = buffer.as_ref().map_or(&[][..], Buffer::as_slice);
                let command = session.query(offset, one, payload, export);
                buffer.into_iter().for_each(|buffer| pool.give(buffer));
                match command {
                    Ok(command) => Some(wanted(session, tag, command, None)),
                    Err(refusal) => {
                        let load = Load::request(
                            Command::Query {
                                offset,
                                len: 0,
                                one,
                            }
                            .held_bytes(),
                        );
                        self.push_refusal(tag, refusal, load);
                        None
                    }
                }
            }
            Incoming::Payload {
                tag,
                command,
                buffer,
                ..
            } => Some(wanted(session, tag, command, buffer)),
            Incoming::Skip { tag, refusal, .. } => {
                self.push_refusal(tag, refusal, Load::request(0));
                None
            }
        }
    }

    fn refuse(&mut self, tag: Tag, header: &RequestHeader, refusal: Refusal) {
        debug!(
            connection = self.id,
            ?header,
            why = refusal.why,
            "refused a request"
        );
        let remaining = header.payload_len(tag.style);
        if remaining == 0 {
            self.push_refusal(tag, refusal, Load::request(0));
        } else if payload(remaining).is_some() {
            self.incoming = Some(Incoming::Skip {
                tag,
                refusal,
                remaining,
            });
        } else {
            // It would take too long to read a payload that nobody wants.
            self.push_refusal(tag, refusal, Load::request(0));
            self.end(true, "a payload is longer than the maximum block size");
        }
    }

    /// `load` is what the request has cost so far.
    fn push_refusal(&mut self, tag: Tag, refusal: Refusal, load: Load) {
        self.output
            .push(Reply::error(tag, refusal.code, refusal.why, load));
    }

    fn empty(&mut self, tag: Tag, command: Command, load: Load) {
        self.output.push(match command {
            Command::Read { .. } => Reply::data(tag, None, load),
            _ => Reply::done(tag, load),
        });
    }

    /// The engine was asked for one more request of this connection.
    pub(crate) fn begin_operation(&mut self) {
        self.operations += 1;
    }

    /// The engine is done with one.
    pub(crate) fn answer(&mut self, reply: Reply) {
        debug_assert!(self.operations > 0);
        self.operations -= 1;
        if self.transport.is_some() {
            self.output.push(reply);
        }
    }

    /// What can be sent goes out. True when that has made room for a request that waits.
    pub(crate) fn send(&mut self, pool: &mut Pool) -> bool {
        if self.transport.is_none() {
            return false;
        }
        let room = if self.in_ring() {
            // What there is goes with `begin_send`, and what that makes room for is noticed when it has ended.
            self.blocked = !self.output.is_empty();
            Some(false)
        } else {
            self.send_ready(pool)
        };
        let Some(room) = room else {
            return false;
        };
        let unsettled = self.starting_tls || self.has_unsent();
        if unsettled && !self.blocked && !self.settle() {
            return false;
        }
        if let Phase::Ending { linger } = self.phase
            && !self.has_work()
            && self.output.is_empty()
            && !self.blocked
        {
            self.finish(linger);
        }
        room
    }

    fn has_unsent(&self) -> bool {
        self.transport.as_ref().is_some_and(Transport::has_unsent)
    }

    /// The output is with the transport: what TLS still holds of it is sent, and TLS begins where it has to. False if the
    /// connection is closed over it.
    fn settle(&mut self) -> bool {
        let Some(transport) = &mut self.transport else {
            return false;
        };
        let result = match transport.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.blocked = true;
                return true;
            }
            Ok(()) if std::mem::take(&mut self.starting_tls) => match self.exports.tls() {
                Some(config) => {
                    debug_assert!(!self.ring.as_ref().is_some_and(Ringed::is_busy));
                    self.ring = None;
                    transport.start_tls(config).map_err(io::Error::other)
                }
                None => Ok(()),
            },
            result => result,
        };
        if let Err(error) = result {
            self.close(&format!("cannot send: {error}"));
            return false;
        }
        true
    }

    /// The server shuts down. What was read is answered, what is in flight finished; nothing more is read.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
        self.reading = false;
        match self.phase {
            Phase::Handshake(_) => self.close("the server is shutting down"),
            Phase::Transmission(_) => {
                self.deadline = Instant::now().checked_add(self.times.drain);
            }
            // On its way already.
            Phase::Ending { .. } | Phase::Lingering => {}
        }
    }

    /// The deadline has come.
    pub(crate) fn expire(&mut self) {
        match self.phase {
            Phase::Handshake(_) => self.close("the client did not finish the handshake in time"),
            // The engine takes its time, not the client.
            Phase::Ending { .. } if self.operations > 0 => {
                self.deadline = Instant::now().checked_add(self.times.drain);
            }
            _ => self.close("the client did not take its replies in time"),
        }
    }

    /// Nothing more is understood. In flight requests finish, and their replies are sent.
    fn end(&mut self, linger: bool, why: &str) {
        debug!(connection = self.id, why, "the connection ends");
        self.reading = false;
        self.stalled = false;
        self.incoming = None;
        self.input.clear();
        self.phase = Phase::Ending { linger };
        self.deadline = self
            .deadline
            .or_else(|| Instant::now().checked_add(self.times.drain));
    }

    /// All is done and sent.
    fn finish(&mut self, linger: bool) {
        if let Some(transport) = &mut self.transport {
            transport.finish();
        }
        if !linger {
            return self.close("done");
        }
        if let Some(transport) = &self.transport
            && rustix::net::shutdown(transport.socket(), Shutdown::Write).is_ok()
        {
            self.phase = Phase::Lingering;
            self.deadline = Instant::now().checked_add(LINGER_TIME);
        } else {
            self.close("the client is gone");
        }
    }

    /// Closes at once. The connection is kept until what is in flight has come back.
    pub(crate) fn close(&mut self, why: &str) {
        if self.transport.take().is_some() {
            debug!(connection = self.id, why, "closed");
        }
        self.reading = false;
        self.stalled = false;
        self.blocked = false;
        self.incoming = None;
        self.later = VecDeque::new();
        self.input.clear();
        self.output = Output::default();
        self.deadline = None;
        self.phase = Phase::Ending { linger: false };
    }
}

/// Nothing can be done until there is more input, or less load.
struct Pause;

fn wanted(session: Session, tag: Tag, command: Command, payload: Option<Buffer>) -> Wanted {
    Wanted {
        export: session.export,
        tag,
        command,
        payload,
        load: Load::request(command.held_bytes()),
    }
}
