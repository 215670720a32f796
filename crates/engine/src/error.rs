//! What can go wrong: what, where, and what the user can do.

use std::io;

use urus_format::EntryError;

use crate::errno::{EDQUOT, EINVAL, EIO, ENOMEM, ENOSPC, EOPNOTSUPP, EPERM, ESHUTDOWN};

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the engine. Cloneable, because one failure can end many requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A storage operation failed.
    #[error("{operation} of {file} at offset {offset:#x} ({bytes} bytes) failed: {}", io::Error::from_raw_os_error(*errno))]
    Io {
        /// The operation, named after what failed: "read", "write", "fdatasync", ...
        operation: &'static str,
        /// The file's name.
        file: String,
        /// Byte offset.
        offset: u64,
        /// Bytes of the operation.
        bytes: u64,
        /// The operating system's error number.
        errno: i32,
    },
    /// No space is left where the image lies. Nothing was changed; the request can be retried after space was made.
    #[error(
        "no space left for {file} ({operation} at offset {offset:#x}): free space on its file system and retry"
    )]
    OutOfSpace {
        /// The operation that found no space.
        operation: &'static str,
        /// The file's name.
        file: String,
        /// Byte offset.
        offset: u64,
    },
    /// A sync failed just now: what is on disk is not known, and the device is poisoned. Trying again cannot help, whatever
    /// the cause was. Reads still work; reopen the image to go on writing.
    #[error(
        "a sync of {file} failed ({}): what is on disk is not known, and no more writes are taken; {}reopen it to check and go on",
        io::Error::from_raw_os_error(*errno), space_first(*errno)
    )]
    SyncFailed {
        /// The file's name.
        file: String,
        /// The operating system's error number.
        errno: i32,
    },
    /// The process has no memory for the request. Nothing was changed; the request can be retried.
    #[error(
        "no memory for a block of {bytes} bytes: raise the limit of the process's memory (RLIMIT_AS, overcommit), or have fewer \
         and smaller requests in flight, and retry"
    )]
    OutOfMemory {
        /// Bytes that were not to be had.
        bytes: u64,
    },
    /// A sync failed before: what is on disk is not known. Reads still work; reopen the image to go on writing.
    #[error(
        "{file} takes no more writes: an earlier sync of it failed, so what is on disk is not known; reopen it to check and go on"
    )]
    Poisoned {
        /// The file's name.
        file: String,
    },
    /// A write on a device opened read-only.
    #[error("the device is read-only")]
    ReadOnly,
    /// The range passes the end of the device.
    #[error("range [{offset:#x}, +{len:#x}) passes the end of the device ({size:#x} bytes)")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Size of the device.
        size: u64,
    },
    /// A table of the image holds something impossible.
    #[error("{file} is corrupt: {what} at {place}; run `urus check`")]
    Corrupt {
        /// The file's name.
        file: String,
        /// What is wrong.
        what: String,
        /// Which table, index, offset.
        place: String,
    },
    /// An entry of a table is invalid.
    #[error("{file} is corrupt: {entry} in {table} {index}; run `urus check`")]
    BadEntry {
        /// The file's name.
        file: String,
        /// "L1 table", "L2 table of L1 entry", ...
        table: &'static str,
        /// Index of the entry.
        index: u64,
        /// What is wrong with it.
        entry: EntryError,
    },
    /// A compressed cluster does not decode.
    #[error("{file}: compressed data at {offset:#x} does not decode to one cluster: {source}")]
    Decompress {
        /// The file's name.
        file: String,
        /// Host offset of the compressed data.
        offset: u64,
        /// What the decoder says.
        source: urus_format::Error,
    },
    /// The header, or another structure, is refused.
    #[error("{file}: {source}")]
    Format {
        /// The file's name.
        file: String,
        /// Why.
        source: urus_format::Error,
    },
    /// The operation is not possible on this image or device.
    #[error("{what}")]
    Unsupported {
        /// What, and why.
        what: String,
    },
    /// The device was closed while the request waited.
    #[error("the device is closed")]
    Closed,
}

impl Error {
    /// The nearest `errno`, for transports that speak in them.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { errno, .. } => *errno,
            Self::OutOfSpace { .. } => ENOSPC,
            Self::OutOfMemory { .. } => ENOMEM,
            Self::ReadOnly => EPERM,
            Self::OutOfRange { .. } => EINVAL,
            Self::Unsupported { .. } => EOPNOTSUPP,
            Self::Closed => ESHUTDOWN,
            // Also for want of space: a client that waits for space and tries again would wait in vain.
            Self::SyncFailed { .. }
            | Self::Poisoned { .. }
            | Self::Corrupt { .. }
            | Self::BadEntry { .. }
            | Self::Decompress { .. }
            | Self::Format { .. } => EIO,
        }
    }

    /// Whether the same request may succeed later, once the user has made space.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        matches!(self, Self::OutOfSpace { .. })
    }
}

/// What to do before the image is reopened after a failed sync.
fn space_first(errno: i32) -> &'static str {
    match errno {
        ENOSPC | EDQUOT => "free space on its file system, then ",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    //! Guards what a user is told to do, and what a client does by the number alone.
    use super::*;

    #[test]
    fn a_failed_sync_is_never_to_be_tried_again() {
        for (errno, frees_space) in [(ENOSPC, true), (EDQUOT, true), (5, false)] {
            let error = Error::SyncFailed {
                file: "disk.qcow2".into(),
                errno,
            };
            let text = error.to_string();
            assert!(
                text.contains("reopen it") && !text.contains("retry"),
                "{text}"
            );
            assert_eq!(text.contains("free space"), frees_space, "{text}");
            // A client that waits for space (QEMU's werror=enospc) would wait for ever.
            assert_eq!(error.errno(), 5);
            assert!(!error.is_out_of_space());
        }
    }
}
