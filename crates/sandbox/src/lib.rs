//! How a server of images confines itself, once what it needs is open: an error of ours that a guest or a client has found must
//! not become a way into the host.
//!
//! Two layers, each of which holds where the other has gaps:
//!
//! - **Landlock** ([`FileAccess`]): no file is opened, made or removed, no TCP connection made, whichever way the kernel is asked; io_uring
//!   included, whose operations seccomp does not see. It holds for the thread that asks for it and those that this starts, so it
//!   comes before the first thread.
//! - **seccomp** ([`restrict_calls`]): only the [system calls](calls) that serving takes, with arguments looked at where they matter. It
//!   holds for all threads at once, and comes last: what is needed only to start, such as making a ring, is refused then.
//!
//! A call that is not allowed fails with EPERM. It does not kill the process: a list that a new C library makes incomplete must cost
//! one operation, not the writes that a guest has not flushed; and an intruder gets as little either way.
#![forbid(unsafe_code)]

mod access;
mod calls;
mod filter;

pub use access::{Enforced, FileAccess};
pub use calls::{Call, calls};
pub use filter::restrict_calls;

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Landlock is there and refuses.
    #[error("cannot restrict access to files (Landlock): {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter cannot be installed.
    #[error("cannot restrict system calls (seccomp): {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// The filter cannot be made: a mistake in the table of calls.
    #[error("cannot make the filter of system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
}
