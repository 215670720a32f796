//! Why a server cannot start, or did not end well.

use std::io;
use std::path::PathBuf;

/// An error of [`ServerBuilder::start`](crate::ServerBuilder::start) or [`Server::shutdown`](crate::Server::shutdown).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot listen.
    #[error(transparent)]
    Listen(#[from] urus_listen::Error),
    /// Credentials for TLS are missing or wrong.
    #[error("{}: {what}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// An option makes no sense.
    #[error("{what}")]
    Invalid {
        /// What, and why.
        what: String,
    },
    /// The device gives no queue.
    #[error(transparent)]
    Device(#[from] urus::Error),
    /// The operating system refuses something the server needs (threads, descriptors).
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the operating system says.
        source: io::Error,
    },
    /// A thread of the server has ended before its time; clients may have been cut off.
    #[error(
        "a thread of the NBD server has failed; its clients were cut off, and the log says why"
    )]
    ThreadFailed,
}

impl Error {
    pub(crate) fn system(operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::System {
            operation,
            source: source.into(),
        }
    }
}
