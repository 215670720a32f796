//! Taking clients.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tracing::{error, warn};

use crate::{Error, Listener, Seldom, Spare};

/// Descriptors that have to be free before clients are taken again.
const MARGIN: usize = 8;

/// How long no client is taken when the system has no descriptor or memory for one.
const REST: Duration = Duration::from_millis(100);

/// Takes the clients of any number of listeners, on a thread of its owner's, until the [`Stopper`] says that it is enough.
#[derive(Debug)]
pub struct Acceptor {
    listeners: Vec<Listener>,
    stop: Arc<OwnedFd>,
    /// The socket to look at first, so that no busy one keeps the others waiting.
    next: usize,
    /// For clients that are to be taken when no descriptor is left.
    spare: Spare,
    failures: Seldom,
    /// There was no descriptor for a client. Those that come free are for whoever keeps some back, until there are more.
    scarce: bool,
}

/// What an [`Acceptor`] has waited for.
#[derive(Debug)]
pub enum Next {
    /// A client. Its connection does not block.
    Client(OwnedFd),
    /// The descriptor of this number can be read.
    Ready(usize),
    /// The time is over.
    Nothing,
}

/// Ends the waiting of an [`Acceptor`], from any thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<OwnedFd>);

impl Stopper {
    /// From now on no client is taken. Doing it again does nothing.
    pub fn stop(&self) {
        // A full counter stops as well.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }
}

impl Acceptor {
    /// For the clients of these.
    ///
    /// # Errors
    /// The operating system gives no descriptor.
    pub fn new(listeners: Vec<Listener>) -> Result<(Self, Stopper), Error> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| Error::system("make an eventfd", error))?;
        let stop = Arc::new(stop);
        let stopper = Stopper(Arc::clone(&stop));
        let acceptor = Self {
            listeners,
            stop,
            next: 0,
            spare: Spare::new(0),
            failures: Seldom::default(),
            scarce: false,
        };
        Ok((acceptor, stopper))
    }

    /// Keeps so many descriptors back, with which a client is taken when the process has no others left.
    #[must_use]
    pub fn with_spare(mut self, descriptors: usize) -> Self {
        self.spare = Spare::new(descriptors);
        self
    }

    /// Waits for a client; None once it was told to stop. The connection does not block.
    pub fn accept(&mut self) -> Option<OwnedFd> {
        loop {
            if let Next::Client(client) = self.next(&[], None)? {
                return Some(client);
            }
        }
    }

    /// Waits for a client, for one of `others` to be readable, or until the time is over; None once it was told to stop.
    pub fn next(&mut self, others: &[BorrowedFd<'_>], timeout: Option<Duration>) -> Option<Next> {
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.spare.refill();
            let sockets: Vec<BorrowedFd<'_>> = self
                .listeners
                .iter()
                .flat_map(|listener| listener.sockets())
                .collect();
            let mut polled: Vec<PollFd<'_>> = std::iter::once(self.stop.as_fd())
                .chain(sockets.iter().copied())
                .chain(others.iter().copied())
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut polled, left.as_ref()) {
                Ok(0) => return Some(Next::Nothing),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    error!(%error, "cannot wait for clients; no more are accepted");
                    return None;
                }
            }
            let is_ready = |polled: &PollFd<'_>| !polled.revents().is_empty();
            if is_ready(&polled[0]) {
                return None;
            }
            let count = sockets.len();
            // Before clients: they were there first.
            let ready = (0..others.len()).find(|index| is_ready(&polled[1 + count + index]));
            if let Some(index) = ready {
                return Some(Next::Ready(index));
            }
            let in_turn = (0..count).map(|step| (self.next + step) % count);
            for index in in_turn.filter(|index| is_ready(&polled[index + 1])) {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                self.scarce = self.scarce && !Spare::new(MARGIN).is_full();
                let mut accepted = match self.scarce {
                    true => Err(Errno::MFILE),
                    false => accept_with(sockets[index], flags),
                };
                if matches!(accepted, Err(Errno::MFILE | Errno::NFILE)) && self.spare.release() {
                    accepted = accept_with(sockets[index], flags);
                }
                match accepted {
                    Ok(socket) => {
                        self.next = (index + 1) % count;
                        return Some(Next::Client(socket));
                    }
                    Err(error) => {
                        let is_scarce = matches!(error, Errno::MFILE | Errno::NFILE);
                        self.scarce |= is_scarce && self.spare.is_empty();
                        failed(&mut self.failures, error, &self.stop);
                    }
                }
            }
        }
    }
}

/// What becomes of a client that could not be taken.
fn failed(failures: &mut Seldom, error: Errno, stop: &OwnedFd) {
    match error {
        // The client has thought better of it.
        Errno::AGAIN | Errno::INTR | Errno::CONNABORTED => {}
        _ => {
            if let Some(unmentioned) = failures.due() {
                warn!(%error, unmentioned, "cannot accept a client; clients wait until there is room for them");
            }
            let rest = Timespec::try_from(REST).ok();
            let stop = PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN);
            // As a rule descriptors or memory are short; others get some time to give theirs back.
            let _ = poll(&mut [stop], rest.as_ref());
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards clients against being forgotten beside a busy socket, and servers against not ending.
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::Listen;

    #[test]
    fn each_socket_has_its_turn_until_it_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("a"), dir.path().join("b")];
        let bind = |path: &std::path::PathBuf| Listener::bind(Listen::Unix(path.clone())).unwrap();
        let (mut acceptor, stopper) = Acceptor::new(paths.iter().map(bind).collect()).unwrap();
        let _busy: Vec<_> = (0..3)
            .map(|_| UnixStream::connect(&paths[0]).unwrap())
            .collect();
        let quiet = UnixStream::connect(&paths[1]).unwrap();
        let name = |socket: &OwnedFd| {
            let name = rustix::net::getsockname(socket).unwrap();
            let name = rustix::net::SocketAddrUnix::try_from(name).unwrap();
            name.path().unwrap().to_string_lossy().into_owned()
        };
        let first_two: Vec<_> = (0..2).map(|_| name(&acceptor.accept().unwrap())).collect();
        assert!(first_two[0].ends_with("/a") && first_two[1].ends_with("/b"));
        drop(quiet);
        assert!(acceptor.accept().is_some());
        assert!(acceptor.accept().is_some());
        let waiting = std::thread::spawn(move || acceptor.accept().is_none());
        stopper.stop();
        assert!(waiting.join().unwrap());
        assert!(!paths[0].exists(), "the listeners went with it");
    }
}
