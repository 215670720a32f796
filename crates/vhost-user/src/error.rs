//! Why a back end cannot start, or did not end well.

use std::io;

/// An error of [`ServerBuilder::start`](crate::ServerBuilder::start), [`Listener::bind`](crate::Listener::bind) or
/// [`Server::shutdown`](crate::Server::shutdown).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot listen.
    #[error(transparent)]
    Listen(#[from] urus_listen::Error),
    /// The descriptor is not what a front end can be reached by.
    #[error("the descriptor {fd} is not a unix stream socket")]
    NotASocketFd {
        /// The number of the descriptor.
        fd: i32,
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
    /// The operating system refuses something the back end needs (threads, descriptors).
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the operating system says.
        source: io::Error,
    },
    /// A thread of the back end has ended before its time.
    #[error("a thread of the vhost-user back end has failed; the log says why")]
    ThreadFailed,
}

impl Error {
    pub(crate) fn system(operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::System {
            operation,
            source: source.into(),
        }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }
}
