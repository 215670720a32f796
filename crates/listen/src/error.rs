//! Why a socket cannot listen.

use std::io;
use std::path::{Path, PathBuf};

/// An error of [`Listener`](crate::Listener), or of an address's text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something is at the path of the socket already, and somebody listens on it.
    #[error("{}: another server listens on this socket; stop that server or choose another path", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// A socket is at the path of the socket already, and nobody listens on it.
    #[error("{}: a socket that nobody listens on is in the way, left behind by a server that was killed; remove it (rm {}) and try again", path.display(), shell(path))]
    SocketStale {
        /// The path.
        path: PathBuf,
    },
    /// Something else is at the path of the socket.
    #[error("{}: this exists and is not a socket; choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path of the socket is too long for the operating system.
    #[error("{}: the path of a unix socket can have at most {limit} bytes, this has {bytes}; choose a shorter one", path.display())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
        /// The longest possible.
        limit: usize,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address, as given.
        address: String,
        /// What the operating system says.
        source: io::Error,
    },
    /// Not an address.
    #[error("'{text}' is not an address to listen on (unix:PATH or HOST:PORT): {why}")]
    Address {
        /// What was given.
        text: String,
        /// What is wrong with it, and what may have been meant.
        why: String,
    },
    /// The socket cannot be given to the group, or not have the mode, that was asked for.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Permissions {
        /// The path.
        path: PathBuf,
        /// What was tried.
        operation: String,
        /// What the operating system says.
        source: io::Error,
    },
    /// The descriptor to listen on does not listen.
    #[error("the descriptor {fd} is not a listening stream socket")]
    NotListening {
        /// The number of the descriptor.
        fd: i32,
    },
    /// The operating system refuses something that listening needs (descriptors).
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the operating system says.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn system(operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::System {
            operation,
            source: source.into(),
        }
    }
}

/// A path as one word of a shell command.
fn shell(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    //! Guards the command that an error tells the user to paste.
    use super::*;

    #[test]
    fn the_stale_socket_can_be_removed_by_what_the_error_says() {
        let text = |path: &str| Error::SocketStale { path: path.into() }.to_string();
        assert!(text("/tmp/a.sock").contains("(rm /tmp/a.sock)"));
        assert!(text("/tmp/my disk").contains("(rm '/tmp/my disk')"));
        assert!(text("it's").contains(r"(rm 'it'\''s')"));
    }
}
