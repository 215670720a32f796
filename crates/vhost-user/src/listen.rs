//! Where front ends come from: a socket that listens, or one that is connected already.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType, sockopt};
use urus_listen::{Acceptor, Listen, Permissions, Stopper};

use crate::Error;

/// A unix socket for front ends. They can connect from now on, and wait until a [`Server`](crate::Server) takes them
/// up.
///
/// On drop, the socket's file is removed, unless it has been replaced meanwhile.
#[derive(Debug)]
pub struct Listener {
    pub(crate) source: Source,
    path: Option<PathBuf>,
}

#[derive(Debug)]
pub(crate) enum Source {
    /// Any number of front ends, one after the other.
    Listening(Acceptor, Stopper),
    /// This one.
    Connected(UnixStream),
}

impl Listener {
    /// Listens at `path`. A socket that a killed back end has left there is replaced, so that it can be started again;
    /// anything else is not.
    ///
    /// # Errors
    /// A path at which something is or nothing can be; nothing is changed then.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Self::of(urus_listen::Listener::bind_replacing_stale(Listen::Unix(
            path.into(),
        ))?)
    }

    /// As [`bind`](Self::bind), with a socket for those whom `permissions` let.
    ///
    /// # Errors
    /// As [`bind`](Self::bind), and a group that the process may not give a file to.
    pub fn bind_with(path: impl Into<PathBuf>, permissions: Permissions) -> Result<Self, Error> {
        let listen = Listen::Unix(path.into());
        let listener = urus_listen::Listener::bind_with(listen, permissions, true)?;
        Self::of(listener)
    }

    /// A unix stream socket that was passed in: one that listens, or one that a front end is connected to, after whom
    /// no other comes.
    ///
    /// # Errors
    /// Any other descriptor.
    pub fn from_fd(socket: OwnedFd) -> Result<Self, Error> {
        let is_unix = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if !is_unix {
            return Err(Error::NotASocketFd {
                fd: socket.as_raw_fd(),
            });
        }
        if sockopt::socket_acceptconn(&socket) == Ok(true) {
            return Self::of(urus_listen::Listener::bind(Listen::Fd(socket))?);
        }
        Ok(Self {
            source: Source::Connected(socket.into()),
            path: None,
        })
    }

    fn of(listener: urus_listen::Listener) -> Result<Self, Error> {
        let path = listener.path().map(Path::to_owned);
        let (acceptor, stopper) = Acceptor::new(vec![listener])?;
        Ok(Self {
            source: Source::Listening(acceptor, stopper),
            path,
        })
    }

    /// The path, when it was bound here.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

#[cfg(test)]
mod tests {
    //! Guards the start after a kill, and descriptors against being taken for what they are not.
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(listener.path(), Some(path.as_path()));
        let taken = Listener::bind(&path).unwrap_err();
        assert!(matches!(taken, Error::Listen(_)), "{taken}");
        drop(listener);
        assert!(!path.exists(), "our own socket is removed");
    }

    #[test]
    fn descriptors_are_told_apart() {
        let (one, _other) = UnixStream::pair().unwrap();
        let connected = Listener::from_fd(one.into()).unwrap();
        assert!(matches!(connected.source, Source::Connected(_)));
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let listening = Listener::from_fd(listener.into()).unwrap();
        assert!(matches!(listening.source, Source::Listening(..)));
        assert_eq!(listening.path(), None);
        let file = tempfile::tempfile().unwrap();
        let error = Listener::from_fd(file.into()).unwrap_err();
        assert!(matches!(error, Error::NotASocketFd { .. }), "{error}");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(Listener::from_fd(tcp.into()).is_err());
    }
}
