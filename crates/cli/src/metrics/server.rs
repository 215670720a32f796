//! Answering scrapers: one thread for all of them, which waits for none.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags, accept_with, recv, send, shutdown};
use tracing::{debug, warn};
use urus_listen::{Address, Listener, Seldom, Spare};

use super::request::{Answer, HEAD_BYTES, answer, metrics};
use super::text::{Sources, text};
use crate::failure::Failure;

/// Connections at once; with one more, the oldest has to go: so whoever comes is heard, however many say nothing.
const CONNECTIONS: usize = 8;

/// Descriptors kept back for the moment in which there are no others.
const SPARE: usize = 2;

/// How long a connection may take for everything.
const TIME: Duration = Duration::from_secs(5);

/// How long nobody is taken when the system has no descriptor or memory for one.
const REST: Duration = Duration::from_millis(100);

/// A place where metrics are to be had. Dropping it ends that.
pub(crate) struct Metrics {
    stop: Arc<OwnedFd>,
    addresses: Vec<Address>,
    thread: Option<JoinHandle<()>>,
}

impl Metrics {
    /// Starts to answer.
    pub(crate) fn start(listener: Listener, sources: Sources) -> Result<Self, Failure> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| Failure::new(format!("cannot make an eventfd: {error}")))?;
        let stop = Arc::new(stop);
        let addresses = listener.addresses().cloned().collect();
        let mut reception = Reception {
            listener,
            sources,
            stop: Arc::clone(&stop),
            connections: Vec::with_capacity(CONNECTIONS),
            rests_until: None,
            spare: Spare::new(SPARE),
            failures: Seldom::default(),
        };
        let thread = std::thread::Builder::new()
            .name("urus-metrics".into())
            .spawn(move || reception.run())
            .map_err(|error| Failure::new(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            stop,
            addresses,
            thread: Some(thread),
        })
    }

    /// Where, with the ports that are really used.
    pub(crate) fn addresses(&self) -> &[Address] {
        &self.addresses
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        // A full counter stops as well.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread for metrics has panicked");
        }
    }
}

/// What the thread has.
struct Reception {
    listener: Listener,
    sources: Sources,
    stop: Arc<OwnedFd>,
    /// Oldest first.
    connections: Vec<Connection>,
    rests_until: Option<Instant>,
    spare: Spare,
    failures: Seldom,
}

/// Who may be ready.
#[derive(Clone, Copy)]
struct Ready {
    stop: bool,
    listener: bool,
    connections: [bool; CONNECTIONS],
}

impl Reception {
    fn run(&mut self) {
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    warn!(%error, "cannot wait for scrapers; no more metrics are given");
                    return;
                }
            };
            if ready.stop {
                return;
            }
            let now = Instant::now();
            let sources = &self.sources;
            let mut ready_connections = ready.connections.iter();
            self.connections.retain_mut(|connection| {
                let ready = ready_connections.next() == Some(&true);
                now < connection.ends && (!ready || connection.go_on(sources))
            });
            if ready.listener {
                self.accept(now);
            }
        }
    }

    /// Waits until somebody is ready, or has had enough time.
    fn wait(&mut self) -> Result<Ready, Errno> {
        let now = Instant::now();
        self.rests_until = self.rests_until.filter(|end| now < *end);
        let first_end = self.connections.iter().map(|connection| connection.ends);
        let timeout = first_end.chain(self.rests_until).min().map(|end| {
            let left = end.saturating_duration_since(now);
            Timespec::try_from(left).unwrap_or(Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            })
        });
        let listening = self.rests_until.is_none();
        let sockets: Vec<BorrowedFd<'_>> = self.listener.sockets().filter(|_| listening).collect();
        let mut polled: Vec<PollFd<'_>> =
            [PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN)]
                .into_iter()
                .chain(self.connections.iter().map(Connection::polled))
                .chain(
                    sockets
                        .iter()
                        .map(|socket| PollFd::from_borrowed_fd(*socket, PollFlags::IN)),
                )
                .collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let ready: Vec<bool> = polled
            .iter()
            .map(|polled| !polled.revents().is_empty())
            .collect();
        let (connections, listeners) = ready[1..].split_at(self.connections.len());
        let mut found = Ready {
            stop: ready[0],
            listener: listeners.contains(&true),
            connections: [false; CONNECTIONS],
        };
        found.connections[..connections.len()].copy_from_slice(connections);
        Ok(found)
    }

    fn accept(&mut self, now: Instant) {
        self.spare.refill();
        for socket in self.listener.sockets() {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let mut accepted = accept_with(socket, flags);
            if matches!(accepted, Err(Errno::MFILE | Errno::NFILE)) && self.spare.release() {
                accepted = accept_with(socket, flags);
            }
            match accepted {
                Ok(socket) => {
                    if self.connections.len() == CONNECTIONS {
                        debug!("too many connections for metrics: the oldest is cut off");
                        self.connections.remove(0);
                    }
                    self.connections.push(Connection {
                        socket,
                        ends: now + TIME,
                        state: State::Asked(Vec::new()),
                    });
                }
                // Nobody there, or no more.
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    if let Some(unmentioned) = self.failures.due() {
                        warn!(%error, unmentioned, "cannot accept a scraper");
                    }
                    self.rests_until = Some(now + REST);
                }
            }
        }
    }
}

struct Connection {
    socket: OwnedFd,
    /// Whatever it is doing then.
    ends: Instant,
    state: State,
}

enum State {
    /// What has come of the request.
    Asked(Vec<u8>),
    /// The response, and how much of it is sent.
    Answered(Vec<u8>, usize),
    /// All is sent. What still comes is read, since a socket closed before that may take the response with it.
    Over,
}

impl Connection {
    fn polled(&self) -> PollFd<'_> {
        let flags = match self.state {
            State::Asked(_) | State::Over => PollFlags::IN,
            State::Answered(..) => PollFlags::OUT,
        };
        PollFd::from_borrowed_fd(self.socket.as_fd(), flags)
    }

    /// Does what can be done without waiting; false when the connection is of no more use.
    fn go_on(&mut self, sources: &Sources) -> bool {
        let went = match &mut self.state {
            State::Asked(_) => self.receive(sources),
            State::Answered(..) => self.send(),
            State::Over => recv(&self.socket, &mut [0; 4096][..], RecvFlags::empty())
                .map(|(count, _)| count > 0),
        };
        match went {
            Ok(goes_on) => goes_on,
            Err(Errno::AGAIN | Errno::INTR) => true,
            Err(error) => {
                debug!(%error, "a connection for metrics has ended");
                false
            }
        }
    }

    fn receive(&mut self, sources: &Sources) -> Result<bool, Errno> {
        let State::Asked(bytes) = &mut self.state else {
            return Ok(true);
        };
        let mut more = [0; HEAD_BYTES];
        let room = HEAD_BYTES - bytes.len();
        let (count, _) = recv(&self.socket, &mut more[..room], RecvFlags::empty())?;
        if count == 0 {
            return Ok(false);
        }
        bytes.extend_from_slice(&more[..count]);
        let response = match answer(bytes) {
            Answer::Wait => return Ok(true),
            Answer::Text(response) => response,
            Answer::Metrics { with_body } => metrics(&text(sources), with_body),
        };
        self.state = State::Answered(response, 0);
        self.send()
    }

    fn send(&mut self) -> Result<bool, Errno> {
        let State::Answered(response, sent) = &mut self.state else {
            return Ok(true);
        };
        while *sent < response.len() {
            *sent += send(&self.socket, &response[*sent..], SendFlags::NOSIGNAL)?;
        }
        shutdown(&self.socket, Shutdown::Write)?;
        self.state = State::Over;
        Ok(true)
    }
}
