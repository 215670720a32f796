//! The control thread: takes front ends, one at a time, and does what their messages say.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use tracing::{debug, error, info, warn};
use urus_listen::Stopper;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::backchannel::{look_for_socket, send_config_change};
use crate::frontend::{Core, FrontEnd};
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

    /// Waits until `fd` is readable, or the bell has rung. Whether `fd` is.
    fn wait(&self, fd: BorrowedFd<'_>) -> Result<bool, Errno> {
        let mut polled = [
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
            PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, None) {
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
        Source::Connected(stream) => serve(core, &stream, signals),
        Source::Listening(mut acceptor, _) => {
            while let Some(socket) = acceptor.accept() {
                let stream = UnixStream::from(socket);
                match stream.set_nonblocking(false) {
                    Ok(()) => serve(core, &stream, signals)?,
                    Err(error) => warn!(%error, "cannot use the connection"),
                }
            }
            Ok(())
        }
    }
}

/// Serves one front end until it goes. What it had in flight has ended on return.
fn serve(core: &Core, stream: &UnixStream, signals: &Signals) -> Result<(), Errno> {
    info!("a front end has connected");
    let front_end = Arc::new(Mutex::new(FrontEnd::new(core.clone())));
    match stream.try_clone() {
        Ok(copy) => *signals.connection() = Some(copy),
        Err(error) => {
            warn!(%error, "cannot use the connection");
            return Ok(());
        }
    }
    let result = converse(stream, &front_end, signals);
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
) -> Result<(), Errno> {
    let Ok(copy) = stream.try_clone() else {
        return Ok(());
    };
    let mut handler = BackendReqHandler::from_stream(copy, Arc::clone(front_end));
    let mut back_channel = None;
    while !signals.is_stopped() {
        let ready = signals.wait(stream.as_fd())?;
        if signals.resized.swap(false, Ordering::SeqCst) {
            tell_of_change(back_channel.as_ref());
        }
        if !ready || signals.is_stopped() {
            continue;
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

fn tell_of_change(back_channel: Option<&OwnedFd>) {
    let Some(socket) = back_channel else {
        debug!("the front end has no channel for changes of the configuration");
        return;
    };
    if let Err(error) = send_config_change(socket) {
        warn!(%error, "cannot tell the front end that the disk has another size");
    }
}
