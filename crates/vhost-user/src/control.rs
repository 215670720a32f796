//! The control thread: takes front ends, one at a time, and does what their messages say.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tracing::{debug, error, info, warn};
use urus_listen::{Next, Stopper};
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::backchannel::{HEADER_BYTES, look_for_socket, send_config_change};
use crate::frontend::{Core, FrontEnd};
use crate::limits::SILENT_CONNECTIONS;
use crate::listen::{Listener, Source};

/// What others tell the control thread.
#[derive(Debug)]
pub(crate) struct Signals {
    stop: AtomicBool,
    /// The disk has another size.
    resized: AtomicBool,
    bell: OwnedFd,
    /// Ends the waiting for a front end.
    reception: Option<Stopper>,
    /// The connection of the moment, to be cut off.
    connection: Mutex<Option<UnixStream>>,
}

impl Signals {
    pub(crate) fn new(source: &Source) -> Result<Self, Errno> {
        Ok(Self {
            stop: AtomicBool::new(false),
            resized: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            reception: match source {
                Source::Listening(_, stopper) => Some(stopper.clone()),
                Source::Connected(_) => None,
            },
            connection: Mutex::default(),
        })
    }

    /// The control thread is to end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
        if let Some(reception) = &self.reception {
            reception.stop();
        }
        // It may be waiting for the rest of a message.
        if let Some(connection) = &*self.connection() {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The front end is to be told that the disk has another size.
    pub(crate) fn resized(&self) {
        self.resized.store(true, Ordering::SeqCst);
        self.ring();
    }

    fn ring(&self) {
        // A full counter rings as well.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn connection(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a front end is being served.
    pub(crate) fn is_connected(&self) -> bool {
        self.connection().is_some()
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Waits until `fd` is readable, the bell has rung, or the time is over. Whether `fd` is.
    fn wait(&self, fd: BorrowedFd<'_>, timeout: Option<Duration>) -> Result<bool, Errno> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut polled = [
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
            PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(error) => return Err(error),
        }
        let ready = !polled[0].revents().is_empty();
        if !polled[1].revents().is_empty() {
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        }
        Ok(ready)
    }
}

/// Serves front ends until it is told to stop, or the only one has gone.
pub(crate) fn run(core: &Core, listener: Listener, signals: &Signals) -> Result<(), Errno> {
    match listener.source {
        // It keeps nobody out, and may begin when it likes.
        Source::Connected(stream) => serve(core, &stream, signals, None),
        Source::Listening(mut acceptor, _) => {
            let mut silent = Silent::new(core.introduction_time);
            while let Some(next) = acceptor.next(&silent.sockets(), silent.timeout()) {
                match next {
                    Next::Client(socket) => silent.add(socket),
                    Next::Ready(index) => {
                        let stream = silent.connections.remove(index).0;
                        if has_spoken(&stream) {
                            let time = Some(core.introduction_time);
                            serve(core, &stream, signals, time)?;
                        }
                    }
                    Next::Nothing => {}
                }
                silent.forget();
            }
            Ok(())
        }
    }
}

/// Connections that have said nothing yet. A front end speaks first, so the first one that does is served: one that is silent keeps
/// nobody waiting.
struct Silent {
    time: Duration,
    /// Oldest first, with the time at which each has to go.
    connections: Vec<(UnixStream, Instant)>,
}

impl Silent {
    fn new(time: Duration) -> Self {
        Self {
            time,
            connections: Vec::new(),
        }
    }

    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = self.connections.iter();
        sockets.map(|(stream, _)| stream.as_fd()).collect()
    }

    fn timeout(&self) -> Option<Duration> {
        let (_, first) = self.connections.first()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    fn add(&mut self, socket: OwnedFd) {
        if self.connections.len() == SILENT_CONNECTIONS {
            debug!("too many connections say nothing: the oldest is closed");
            self.connections.remove(0);
        }
        let stream = UnixStream::from(socket);
        match stream.set_nonblocking(false) {
            Ok(()) => {
                let end = Instant::now() + self.time;
                self.connections.push((stream, end));
            }
            Err(error) => warn!(%error, "cannot use the connection"),
        }
    }

    /// Closes those whose time is over.
    fn forget(&mut self) {
        let now = Instant::now();
        let before = self.connections.len();
        self.connections.retain(|(_, end)| *end > now);
        if self.connections.len() < before {
            debug!("connections that said nothing are closed");
        }
    }
}

/// Whether there is something to read, and not the end alone.
fn has_spoken(stream: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    recv(stream, &mut [0_u8; 1][..], flags).is_ok_and(|(count, _)| count > 0)
}

/// Serves one front end until it goes. What it had in flight has ended on return.
fn serve(
    core: &Core,
    stream: &UnixStream,
    signals: &Signals,
    introduction_time: Option<Duration>,
) -> Result<(), Errno> {
    info!("a front end has connected");
    core.shared.served.store(false, Ordering::Relaxed);
    let front_end = Arc::new(Mutex::new(FrontEnd::new(core.clone())));
    match stream.try_clone() {
        Ok(copy) => *signals.connection() = Some(copy),
        Err(error) => {
            warn!(%error, "cannot use the connection");
            return Ok(());
        }
    }
    let result = converse(stream, &front_end, signals, introduction_time);
    *signals.connection() = None;
    let mut front_end = front_end.lock().unwrap_or_else(PoisonError::into_inner);
    if front_end.stop_all().is_err() {
        error!("a queue's thread has failed");
    }
    info!("the front end is gone");
    result
}

fn converse(
    stream: &UnixStream,
    front_end: &Arc<Mutex<FrontEnd>>,
    signals: &Signals,
    introduction_time: Option<Duration>,
) -> Result<(), Errno> {
    let Ok(copy) = stream.try_clone() else {
        return Ok(());
    };
    let mut handler = BackendReqHandler::from_stream(copy, Arc::clone(front_end));
    let mut back_channel = None;
    let end = introduction_time.map(|time| Instant::now() + time);
    let mut begun = false;
    let mut half_since = None;
    while !signals.is_stopped() {
        begun = begun || has_begun(front_end);
        let end = end.filter(|_| !begun);
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            warn!("the front end did not begin a session in time; its connection is closed");
            return Ok(());
        }
        let ready = signals.wait(stream.as_fd(), left)?;
        if signals.resized.swap(false, Ordering::SeqCst) {
            tell_of_change(back_channel.as_ref());
        }
        if !ready || signals.is_stopped() {
            continue;
        }
        // The handler waits for the rest of a message for as long as that takes.
        match (is_whole(stream), half_since) {
            (true, _) => half_since = None,
            (false, None) => {
                half_since = Some(Instant::now());
                continue;
            }
            (false, Some(since)) if introduction_time.is_none_or(|time| since.elapsed() < time) => {
                std::thread::sleep(HALF_MESSAGE_REST);
                continue;
            }
            (false, Some(_)) => {
                warn!(
                    "the front end has sent half a message and no more; its connection is closed"
                );
                return Ok(());
            }
        }
        // At the end of the stream there is nothing to look at; the handler says so.
        if let Ok(Some(socket)) = look_for_socket(stream) {
            back_channel = Some(socket);
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(ProtocolError::ReqHandlerError(error)) => {
                warn!(%error, "refused what the front end asks for");
            }
            Err(ProtocolError::Disconnected | ProtocolError::SocketBroken(_)) => return Ok(()),
            Err(error) => {
                if !signals.is_stopped() {
                    warn!(%error, "the front end does not keep to the protocol; its connection is closed");
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Between two looks at a message of which a part is there.
const HALF_MESSAGE_REST: Duration = Duration::from_millis(5);

/// Whether all of the next message is there, or no more will come, or the handler refuses it by its header.
fn is_whole(stream: &UnixStream) -> bool {
    /// The longest message that the handler takes.
    const LONGEST: u64 = 4096;
    let ends = PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP;
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
    let found = poll(&mut polled, Some(&Timespec::default()));
    if found.is_ok() && polled[0].revents().intersects(ends) {
        return true;
    }
    let mut header = [0; HEADER_BYTES];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let Ok((HEADER_BYTES, _)) = recv(stream, &mut header[..], flags) else {
        return false;
    };
    let body = header
        .last_chunk()
        .map_or(0, |size| u32::from_ne_bytes(*size));
    let message = HEADER_BYTES as u64 + u64::from(body);
    message > LONGEST || rustix::io::ioctl_fionread(stream).is_ok_and(|there| there >= message)
}

fn has_begun(front_end: &Mutex<FrontEnd>) -> bool {
    let front_end = front_end.lock().unwrap_or_else(PoisonError::into_inner);
    front_end.has_begun()
}

fn tell_of_change(back_channel: Option<&OwnedFd>) {
    let Some(socket) = back_channel else {
        debug!("the front end has no channel for changes of the configuration");
        return;
    };
    if let Err(error) = send_config_change(socket) {
        warn!(%error, "cannot tell the front end that the disk has another size");
    }
}
