//! What can go wrong: which image, what, and what the user can do about it.

use std::io;
use std::path::{Path, PathBuf};

use urus_ring::LockError;

use crate::{EngineError, ForeignFormat, foreign};

/// The facade's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of opening, creating, inspecting or using an image.
///
/// Its text names the image, what was found, and what to do. For transports that speak in numbers there is
/// [`errno`](Self::errno).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something about a file.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// What was tried: "open", "lock", "read the header", ...
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// Somebody else holds the image (QEMU, or another device of urus): they would damage each other's work.
    #[error("{}: locked by another process or device, which {}; close it there first: several may read an image, but one that \
             writes needs it alone", path.display(), if *by_writer { "has it open for writing" } else { "reads it and lets nobody write" })]
    InUse {
        /// The image.
        path: PathBuf,
        /// The other one writes the image; else it reads it.
        by_writer: bool,
    },
    /// The file is not in the format that the caller stated.
    #[error("{}: {}", path.display(), foreign::explain(path, *found))]
    NotQcow2 {
        /// The file.
        path: PathBuf,
        /// What it looks like instead, for messages.
        found: Option<ForeignFormat>,
    },
    /// The header, or another structure of the image, is refused.
    #[error("{}: {source}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// Why.
        source: urus_format::Error,
    },
    /// The image names a backing file, and [`BackingPolicy::Forbid`](crate::BackingPolicy::Forbid) was asked for.
    #[error("{}: names the backing file {backing:?}, and backing files are forbidden (--no-backing); allow them if you trust this image", image.display())]
    BackingForbidden {
        /// The image that names it.
        image: PathBuf,
        /// The name, as recorded.
        backing: String,
    },
    /// The backing file lies outside the directory in which backing files are allowed.
    #[error("{}: names the backing file {backing:?}, which does not lie beneath {}; {}", image.display(), allowed.display(), way_outside(image, needed.as_deref()))]
    BackingOutside {
        /// The image that names it.
        image: PathBuf,
        /// The name, as recorded.
        backing: String,
        /// The directory beneath which backing files may lie.
        allowed: PathBuf,
        /// The directory that would have to be allowed. None where no directory would do, because the name leads through an
        /// absolute symbolic link.
        needed: Option<PathBuf>,
    },
    /// The format of the backing file is neither recorded nor given. It is never guessed: a guest that can write a
    /// qcow2 header onto its raw disk could else make the host open any file.
    #[error("{}: does not record the format of its backing file {backing:?}, and it is never guessed; record it (qemu-img rebase -u -F FORMAT -b NAME IMAGE) or give it (--backing-format FORMAT)", image.display())]
    BackingFormatMissing {
        /// The image that names it.
        image: PathBuf,
        /// The name, as recorded.
        backing: String,
    },
    /// The backing file is recorded in a format that urus does not read.
    #[error("{}: its backing file {backing:?} has the format {format:?}; only qcow2 and raw are supported", image.display())]
    BackingFormatUnsupported {
        /// The image that names it.
        image: PathBuf,
        /// The name, as recorded.
        backing: String,
        /// The format, as recorded.
        format: String,
    },
    /// The recorded name of the backing file is not a plain file name.
    #[error("{}: the name of its backing file, {backing:?}, is refused: {why}", image.display())]
    BackingName {
        /// The image that names it.
        image: PathBuf,
        /// The name, as recorded.
        backing: String,
        /// Which rule it breaks.
        why: String,
    },
    /// The backing file cannot be opened.
    #[error("{}: cannot open its backing file {backing:?} beneath {}: {source}", image.display(), dir.display())]
    BackingOpen {
        /// The image that names it.
        image: PathBuf,
        /// The name, as recorded.
        backing: String,
        /// The directory beneath which it was looked for.
        dir: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// A backing file appears twice in its own chain.
    #[error("{}: its backing file {backing:?} is already in the chain above it: the chain is a loop", image.display())]
    BackingLoop {
        /// The image that names it.
        image: PathBuf,
        /// The name, as recorded.
        backing: String,
    },
    /// The chain of backing files has too many layers.
    #[error("{}: the chain has more than {limit} layers", image.display())]
    ChainTooDeep {
        /// The image at the top.
        image: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// [`OpenOptions::open_fds`](crate::OpenOptions::open_fds) got too few or too many backing descriptors.
    #[error("{}: {given} backing descriptors were given and the chain has {needed} backing files{}", image.display(), if *at_least { " or more" } else { "" })]
    BackingCount {
        /// The image at the top.
        image: PathBuf,
        /// Descriptors given.
        given: usize,
        /// Backing files in the chain.
        needed: usize,
        /// The chain goes on after `needed`.
        at_least: bool,
    },
    /// The engine refused or failed a request.
    #[error(transparent)]
    Engine(EngineError),
    /// An option, or a combination of options, makes no sense.
    #[error("{what}")]
    Invalid {
        /// What, and why.
        what: String,
    },
    /// The device was closed.
    #[error("the device is closed")]
    Closed,
}

/// What to do about a backing file outside of the allowed directory.
fn way_outside(image: &Path, needed: Option<&Path>) -> String {
    match needed {
        Some(dir) => format!(
            "if you trust this image, allow it: --backing-dir {}",
            foreign::shell(&dir.display().to_string())
        ),
        None => format!(
            "it leads through an absolute symbolic link, which is never followed; if you trust this image, record the file's own path: \
             qemu-img rebase -u -F FORMAT -b PATH {}",
            foreign::shell(&image.display().to_string())
        ),
    }
}

impl Error {
    /// The nearest `errno` (positive), for transports that speak in them.
    #[must_use]
    pub fn errno(&self) -> i32 {
        use rustix::io::Errno;
        let errno = match self {
            Self::Io { source, .. } | Self::BackingOpen { source, .. } => {
                return source.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
            }
            Self::Engine(error) => return error.errno(),
            Self::InUse { .. } => Errno::AGAIN,
            Self::NotQcow2 { .. }
            | Self::Format { .. }
            | Self::Invalid { .. }
            | Self::BackingCount { .. } => Errno::INVAL,
            Self::BackingForbidden { .. }
            | Self::BackingOutside { .. }
            | Self::BackingName { .. } => Errno::ACCESS,
            Self::BackingFormatMissing { .. } => Errno::INVAL,
            Self::BackingFormatUnsupported { .. } => Errno::OPNOTSUPP,
            Self::BackingLoop { .. } | Self::ChainTooDeep { .. } => Errno::LOOP,
            Self::Closed => Errno::SHUTDOWN,
        };
        errno.raw_os_error()
    }

    /// Whether the same request may succeed later, once the user has made space where the image lies (ENOSPC).
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::Engine(error) => error.is_out_of_space(),
            Self::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }

    /// What the operating system refused about a file.
    pub(crate) fn io(
        operation: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }

    /// What a structure of an image is refused for.
    pub(crate) fn format(path: &Path) -> impl FnOnce(urus_format::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match source {
            urus_format::Error::NotQcow2 => Self::NotQcow2 { path, found: None },
            source => Self::Format { path, source },
        }
    }

    /// Why an image could not be locked.
    pub(crate) fn lock(path: &Path) -> impl FnOnce(LockError) -> Self + use<> {
        let path = path.to_owned();
        move |error| match error {
            LockError::Held { by_writer, .. } => Self::InUse { path, by_writer },
            LockError::Io { source, .. } => Self::Io {
                operation: "lock",
                path,
                source,
            },
            other => Self::Io {
                operation: "lock",
                path,
                source: io::Error::other(other),
            },
        }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }
}

impl From<EngineError> for Error {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Closed => Self::Closed,
            error => Self::Engine(error),
        }
    }
}
