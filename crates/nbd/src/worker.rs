//! A worker: one thread with one queue per export, and the connections it was given.
//!
//! It sleeps in the ring of its first queue, which also receives from its sockets and sends to them ([`ring`]), so that one system call
//! starts all the work on files and on sockets. What a ring cannot do (TLS, other queues' eventfds, and an eventfd of the worker's own for what
//! other threads send it) is watched by one epoll, which the ring polls. Without a ring the worker sleeps in that epoll, over all sockets.
//!
//! All requests found in one wake-up are submitted before the queue is kicked once, and all replies that are ready then go out with as
//! few system calls as they take.

mod ring;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use slab::Slab;
use tracing::{debug, warn};
use urus::{Error, Queue, Request};
use urus_listen::Seldom;

use crate::connection::{Connection, Permit, Times, Wanted, Watch};
use crate::export::{ExportId, Exports};
use crate::limits::{POOL_BYTES, SUBMIT_ROUND_BYTES};
use crate::operation::{Operation, Origin, Step};
use crate::pool::Pool;
use crate::reply::{NO_MEMORY, Reply};
use crate::transmission::Command;

/// What other threads send a worker.
#[derive(Debug)]
pub(crate) enum Message {
    /// A client, accepted elsewhere.
    Client {
        id: u64,
        socket: OwnedFd,
        permit: Permit,
    },
    /// Finish what is in flight, and end.
    Stop,
}

/// Where other threads leave messages.
#[derive(Debug)]
pub(crate) struct Inbox {
    messages: Mutex<Vec<Message>>,
    bell: OwnedFd,
    /// The worker's thread is there to take messages.
    open: AtomicBool,
    /// Connections that the worker has.
    pub(crate) connections: Arc<AtomicUsize>,
}

impl Inbox {
    pub(crate) fn new() -> Result<Arc<Self>, Errno> {
        Ok(Arc::new(Self {
            messages: Mutex::new(Vec::new()),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            open: AtomicBool::new(true),
            connections: Arc::default(),
        }))
    }

    /// Whether somebody takes messages.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Relaxed)
    }

    pub(crate) fn send(&self, message: Message) {
        self.messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(message);
        // A full counter rings as well.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// The worker's thread ends: clients that were sent to it are let go.
    pub(crate) fn close(&self) {
        self.open.store(false, Relaxed);
        self.take();
    }

    fn take(&self) -> Vec<Message> {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A queue of one export, and the requests that it could not take yet.
struct Lane {
    queue: Queue,
    waiting: VecDeque<Request>,
    /// Something was submitted and not yet kicked.
    submitted: bool,
}

impl Lane {
    fn submit(&mut self, request: Request) {
        self.submitted = true;
        if !self.waiting.is_empty() {
            self.waiting.push_back(request);
        } else if let Err(rejected) = self.queue.submit(request) {
            self.waiting.push_back(rejected.request);
        }
    }

    /// Submits what had to wait, as far as there is room now.
    fn resubmit(&mut self) {
        while let Some(request) = self.waiting.pop_front() {
            self.submitted = true;
            if let Err(rejected) = self.queue.submit(request) {
                self.waiting.push_front(rejected.request);
                break;
            }
        }
    }

    fn kick(&mut self) -> bool {
        if self.submitted {
            self.queue.kick();
        }
        std::mem::take(&mut self.submitted)
    }
}

/// Who an event of epoll is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Inbox,
    Lane(ExportId),
    Connection(usize),
}

impl Source {
    fn data(self) -> epoll::EventData {
        let (kind, index) = match self {
            Self::Inbox => (0, 0),
            Self::Lane(index) => (1, index),
            Self::Connection(index) => (2, index),
        };
        epoll::EventData::new_u64((index as u64) << 2 | kind)
    }

    fn of(data: epoll::EventData) -> Self {
        let data = data.u64();
        let index =
            usize::try_from(data >> 2).expect("made from an index that fits an address space");
        match data & 3 {
            0 => Self::Inbox,
            1 => Self::Lane(index),
            _ => Self::Connection(index),
        }
    }
}

const EVENTS: usize = 256;

/// The lists of [`Worker::work`], kept so that they are not allocated each time.
#[derive(Default)]
struct Rounds {
    /// Connections that are asked what they want.
    round: Vec<usize>,
    /// Others that got replies meanwhile.
    answered: Vec<usize>,
    /// Those of the round that want more than its budget.
    unfinished: Vec<usize>,
}

pub(crate) struct Worker {
    epoll: Arc<OwnedFd>,
    /// The ring of the first queue moves the sockets' bytes, and the worker sleeps in it.
    in_ring: bool,
    /// The ring polls the epoll.
    polled: bool,
    inbox: Arc<Inbox>,
    exports: Arc<Exports>,
    times: Times,
    connections: Slab<Connection>,
    operations: Slab<Operation>,
    pool: Pool,
    /// Connections with something to do.
    ready: Vec<usize>,
    rounds: Rounds,
    /// A queue may have completions.
    look_again: bool,
    stopping: bool,
    complaints: Complaints,
    /// One per export. Declared last: queues drain when dropped.
    lanes: Vec<Lane>,
}

impl Worker {
    /// On the thread that is to run it.
    pub(crate) fn new(
        inbox: Arc<Inbox>,
        exports: Arc<Exports>,
        mut queues: Vec<Queue>,
        times: Times,
    ) -> Result<Self, crate::Error> {
        let failed = |error| crate::Error::system("watch for events", error);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        epoll::add(
            &epoll,
            &inbox.bell,
            Source::Inbox.data(),
            epoll::EventFlags::IN,
        )
        .map_err(failed)?;
        let in_ring = queues
            .first_mut()
            .is_some_and(|queue| queue.sockets().is_some());
        for (index, queue) in queues.iter_mut().enumerate().skip(usize::from(in_ring)) {
            epoll::add(
                &epoll,
                queue.event_fd()?,
                Source::Lane(index).data(),
                epoll::EventFlags::IN,
            )
            .map_err(failed)?;
        }
        Ok(Self {
            epoll: Arc::new(epoll),
            in_ring,
            polled: false,
            inbox,
            exports,
            times,
            connections: Slab::new(),
            operations: Slab::new(),
            pool: Pool::new(POOL_BYTES),
            ready: Vec::new(),
            rounds: Rounds::default(),
            look_again: false,
            stopping: false,
            complaints: Complaints::default(),
            lanes: queues
                .into_iter()
                .map(|queue| Lane {
                    queue,
                    waiting: VecDeque::new(),
                    submitted: false,
                })
                .collect(),
        })
    }

    /// Serves until it is told to stop, and then until nothing is in flight.
    pub(crate) fn run(mut self) -> Result<(), Errno> {
        let mut events = Vec::with_capacity(EVENTS);
        while !(self.stopping && self.connections.is_empty() && self.operations.is_empty()) {
            let timeout = self.time_to_sleep();
            if self.in_ring {
                self.sleep_in_ring(&mut events, timeout)?;
            } else {
                self.sleep(&mut events, timeout)?;
            }
            for event in events.drain(..) {
                self.event(event);
            }
            self.expire();
            if std::mem::take(&mut self.look_again) {
                self.complete();
            }
            self.work();
        }
        Ok(())
    }

    /// Until the next deadline.
    fn time_to_sleep(&self) -> Option<Duration> {
        if self.look_again {
            return Some(Duration::ZERO);
        }
        let next = self
            .connections
            .iter()
            .filter_map(|(_, connection)| connection.deadline())
            .min();
        next.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Waits for events of the epoll.
    fn sleep(
        &mut self,
        events: &mut Vec<epoll::Event>,
        timeout: Option<Duration>,
    ) -> Result<(), Errno> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match epoll::wait(&self.epoll, spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn event(&mut self, event: epoll::Event) {
        match Source::of(event.data) {
            Source::Inbox => {
                for message in self.inbox.take() {
                    self.message(message);
                }
            }
            Source::Lane(index) => {
                self.lanes[index].queue.consume_event();
                self.look_again = true;
            }
            Source::Connection(index) => {
                let flags = event.flags;
                let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
                if let Some(connection) = self.connections.get_mut(index)
                    && (gone || flags.contains(epoll::EventFlags::IN))
                {
                    connection.receive(gone);
                }
                self.list(index);
            }
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Client { id, socket, permit } => {
                if self.stopping {
                    return;
                }
                let roomy = !urus::memory_is_short();
                let connection = roomy.then(|| {
                    Connection::new(
                        id,
                        socket,
                        self.in_ring,
                        Arc::clone(&self.exports),
                        self.times,
                        permit,
                    )
                });
                let Some(connection) = connection.flatten() else {
                    return self.complaints.no_room(id);
                };
                let index = self.connections.insert(connection);
                self.list(index);
            }
            Message::Stop => {
                self.stopping = true;
                for (index, connection) in &mut self.connections {
                    connection.stop();
                    list(&mut self.ready, index, connection);
                }
            }
        }
    }

    fn expire(&mut self) {
        let mut now = None;
        for (index, connection) in &mut self.connections {
            if let Some(deadline) = connection.deadline()
                && deadline <= *now.get_or_insert_with(Instant::now)
            {
                connection.expire();
                list(&mut self.ready, index, connection);
            }
        }
    }

    fn list(&mut self, index: usize) {
        if let Some(connection) = self.connections.get_mut(index) {
            list(&mut self.ready, index, connection);
        }
    }

    /// Goes on with the connections that are listed, until none has anything to do; where the ring has more to tell, once.
    fn work(&mut self) {
        while !self.ready.is_empty() {
            self.round();
            if self.in_ring {
                self.look_again |= !self.ready.is_empty();
                break;
            }
        }
        self.look_again |= self.kick();
    }

    fn round(&mut self) {
        let Rounds {
            mut round,
            mut answered,
            mut unfinished,
        } = std::mem::take(&mut self.rounds);
        std::mem::swap(&mut round, &mut self.ready);
        let mut budget = SUBMIT_ROUND_BYTES;
        for &index in &round {
            if !self.submit(index, &mut budget) {
                unfinished.push(index);
            }
        }
        if self.kick() {
            // What was in the page cache is there already.
            self.complete();
        }
        // The connections of this round stay listed until here, so that no connection is twice in the two lists.
        std::mem::swap(&mut answered, &mut self.ready);
        for index in round.drain(..).chain(answered.drain(..)) {
            self.send(index);
        }
        for index in unfinished.drain(..) {
            self.list(index);
        }
        self.rounds = Rounds {
            round,
            answered,
            unfinished,
        };
    }

    /// Submits what a connection wants of the engine. False when the round's budget is used up before that.
    fn submit(&mut self, index: usize, budget: &mut usize) -> bool {
        let Some(connection) = self.connections.get_mut(index) else {
            return true;
        };
        while *budget > 0 {
            let Some(wanted) = connection.next(&mut self.pool) else {
                return true;
            };
            *budget = budget.saturating_sub(wanted.load.bytes);
            let Wanted {
                export,
                tag,
                command,
                payload,
                load,
            } = wanted;
            let entry = self.operations.vacant_entry();
            let begun = Operation::begin(
                entry.key() as u64,
                Origin {
                    connection: index,
                    tag,
                    load,
                },
                command,
                payload,
                self.exports.get(export),
                &mut self.pool,
            );
            connection.begin_operation();
            let Some((operation, request)) = begun else {
                self.complaints.no_memory(command);
                connection.answer(Reply::no_memory(tag, load));
                continue;
            };
            entry.insert(operation);
            self.lanes[export].submit(request);
        }
        false
    }

    fn kick(&mut self) -> bool {
        let mut kicked = false;
        for lane in &mut self.lanes {
            kicked |= lane.kick();
        }
        kicked
    }

    /// Takes what the queues have completed, and lists the connections that get replies.
    fn complete(&mut self) {
        for index in 0..self.lanes.len() {
            self.complete_lane(index);
        }
    }

    fn complete_lane(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        while let Some(completion) = lane.queue.completion() {
            let key = usize::try_from(completion.token).ok();
            let Some(operation) = key.and_then(|key| self.operations.get_mut(key)) else {
                debug_assert!(false, "a completion for nobody");
                continue;
            };
            let reply = match operation.advance(completion, &mut self.pool) {
                Step::Ask(request) => {
                    lane.submit(request);
                    continue;
                }
                Step::Answer(reply) => reply,
                Step::Fail(error) => {
                    self.complaints.request_failed(operation, &error);
                    operation.failure(&error)
                }
            };
            let index = operation.connection;
            if let Some(key) = key {
                self.operations.remove(key);
            }
            if let Some(connection) = self.connections.get_mut(index) {
                connection.answer(reply);
                list(&mut self.ready, index, connection);
            }
        }
        lane.resubmit();
    }

    /// Sends what a connection has, and settles what becomes of it.
    fn send(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        connection.listed = false;
        if connection.send(&mut self.pool) {
            list(&mut self.ready, index, connection);
        }
        if connection.is_over() {
            self.connections.remove(index);
            return;
        }
        if connection.in_ring() {
            self.drive(index);
        } else {
            self.watch(index);
        }
    }

    /// Tells epoll what a connection waits for.
    fn watch(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let Some(change) = connection.changed_interest() else {
            return;
        };
        let Some(socket) = connection.socket() else {
            return;
        };
        let source = Source::Connection(index).data();
        let told = match change {
            Watch::Add(interest) => epoll::add(&self.epoll, socket, source, interest),
            Watch::Modify(interest) => epoll::modify(&self.epoll, socket, source, interest),
        };
        if let Err(error) = told {
            connection.close(&format!("cannot watch it: {error}"));
            list(&mut self.ready, index, connection);
        }
    }
}

fn list(ready: &mut Vec<usize>, index: usize, connection: &mut Connection) {
    if !connection.listed {
        connection.listed = true;
        ready.push(index);
    }
}

/// Logs failures, at most one a second: a full disk fails thousands.
#[derive(Debug, Default)]
struct Complaints {
    last: Option<Instant>,
    silent: u64,
    turned_away: Seldom,
}

impl Complaints {
    fn request_failed(&mut self, operation: &Operation, error: &Error) {
        self.complain(operation.command, error);
    }

    fn no_memory(&mut self, command: Command) {
        self.complain(command, &NO_MEMORY);
    }

    fn no_room(&mut self, connection: u64) {
        if let Some(unmentioned) = self.turned_away.due() {
            warn!(
                connection,
                unmentioned, "no memory for another client; it is turned away"
            );
        }
    }

    fn complain(&mut self, command: Command, error: &dyn std::fmt::Display) {
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < Duration::from_secs(1))
        {
            self.silent += 1;
            debug!(?command, %error, "a request failed");
            return;
        }
        let unmentioned = std::mem::take(&mut self.silent);
        self.last = Some(now);
        warn!(?command, %error, unmentioned, "a request failed");
    }
}
