//! Where front ends come from: a socket that listens, or one that is connected already.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::{info, warn};

use crate::Error;

/// A unix socket for front ends. They can connect from now on, and wait until a [`Server`](crate::Server) takes them
/// up.
///
/// On drop, the socket's file is removed, unless it has been replaced meanwhile.
#[derive(Debug)]
pub struct Listener {
    pub(crate) source: Source,
    file: Option<SocketFile>,
}

#[derive(Debug)]
pub(crate) enum Source {
    /// Any number of front ends, one after the other.
    Listening(UnixListener),
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
        let path = path.into();
        let listener = match UnixListener::bind(&path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(&path)?;
                UnixListener::bind(&path)
            }
            bound => bound,
        };
        let listener = listener.map_err(|source| Error::Listen {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            source: Source::Listening(listener),
            file: SocketFile::of(&path),
        })
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
        let source = if sockopt::socket_acceptconn(&socket) == Ok(true) {
            Source::Listening(socket.into())
        } else {
            Source::Connected(socket.into())
        };
        Ok(Self { source, file: None })
    }

    /// The path, when it was bound here.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }
}

/// Removes a socket at which nobody listens.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Err(Error::NotASocket { path: path.into() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        _ => return Err(Error::SocketInUse { path: path.into() }),
    }
    info!(path = %path.display(), "replacing the socket that a killed back end left behind");
    std::fs::remove_file(path).map_err(|source| Error::Listen {
        path: path.into(),
        source,
    })
}

/// The file of a socket that we have made. Removed on drop if it is still the same.
#[derive(Debug)]
struct SocketFile {
    /// Absolute: the process may change its directory.
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> Option<Self> {
        let path = std::path::absolute(path).ok()?;
        let identity = identity(&path)?;
        Some(Self { path, identity })
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = path.symlink_metadata().ok()?;
    found
        .file_type()
        .is_socket()
        .then(|| (found.dev(), found.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) != Some(self.identity) {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards users' files: only a socket that nobody listens on is replaced, and only our own is removed.
    use super::*;

    #[test]
    fn what_is_in_the_way_is_told_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        let taken = Listener::bind(&path).unwrap_err();
        assert!(matches!(taken, Error::SocketInUse { .. }), "{taken}");
        drop(listener);
        assert!(!path.exists(), "our own socket is removed");

        std::fs::write(&path, "precious").unwrap();
        let file = Listener::bind(&path).unwrap_err();
        assert!(matches!(file, Error::NotASocket { .. }), "{file}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let nowhere = Listener::bind(dir.path().join("no/socket")).unwrap_err();
        assert!(nowhere.to_string().contains("no/socket"), "{nowhere}");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_replaced_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(listener.path(), Some(path.as_path()));
        std::fs::remove_file(&path).unwrap();
        let other = Listener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists(), "somebody else's socket is kept");
        drop(other);
    }

    #[test]
    fn descriptors_are_told_apart() {
        let (one, _other) = UnixStream::pair().unwrap();
        let connected = Listener::from_fd(one.into()).unwrap();
        assert!(matches!(connected.source, Source::Connected(_)));
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let listening = Listener::from_fd(listener.into()).unwrap();
        assert!(matches!(listening.source, Source::Listening(_)));
        assert_eq!(listening.path(), None);
        let file = tempfile::tempfile().unwrap();
        let error = Listener::from_fd(file.into()).unwrap_err();
        assert!(matches!(error, Error::NotASocketFd { .. }), "{error}");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(Listener::from_fd(tcp.into()).is_err());
    }
}
