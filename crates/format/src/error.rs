//! What can be wrong with an image's metadata.

use crate::{Compression, names::NameFault};

/// Why a structure was refused, or cannot be written.
///
/// Each message names the structure or field, the value found and what was expected instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file does not start with the magic number.
    #[error("not a qcow2 image: it does not start with the bytes 'Q' 'F' 'I' 0xfb")]
    NotQcow2,
    /// A structure needs more bytes than there are.
    #[error("{structure} is cut off: it needs {need_bytes} bytes and there are {have_bytes}")]
    Truncated {
        /// The structure that passes the end.
        structure: &'static str,
        /// Bytes from the start of the file (or of the given buffer) to the structure's end.
        need_bytes: u64,
        /// Bytes there are.
        have_bytes: u64,
    },
    /// A field has a value that no image may have.
    #[error("{field} is {value} ({value:#x}); expected {expected}")]
    Invalid {
        /// The field's name in the specification.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it may hold.
        expected: String,
    },
    /// A stored name that cannot be one.
    #[error("{field}: {fault}")]
    Name {
        /// Whose name it is.
        field: &'static str,
        /// What is wrong with it.
        fault: NameFault,
    },
    /// The image uses a feature that urus does not implement (or not for what was asked).
    #[error("not supported: {feature}")]
    Unsupported {
        /// The feature, in words.
        feature: String,
    },
    /// The header with its extensions and the backing file name does not fit into cluster 0.
    #[error(
        "the header needs {need_bytes} bytes, but cluster 0 has {cluster_bytes}; shorten the backing file name"
    )]
    NoSpace {
        /// Bytes needed.
        need_bytes: u64,
        /// Bytes of a cluster.
        cluster_bytes: u64,
    },
    /// A field of the header on disk is not what it was when the image was opened.
    #[error(
        "{field} in the header is not what it was when the image was opened: another program has written it; \
         close the image in one of the two and open it again"
    )]
    HeaderChanged {
        /// The field's name in the specification.
        field: &'static str,
    },
    /// Compressed data that does not decode to exactly one cluster.
    #[error("compressed cluster ({codec}): {reason} after {have_bytes} of {need_bytes} bytes")]
    Compressed {
        /// The codec that the header names.
        codec: Compression,
        /// What went wrong.
        reason: &'static str,
        /// Bytes decoded.
        have_bytes: u64,
        /// Bytes of a cluster.
        need_bytes: u64,
    },
}

impl Error {
    /// An [`Error::Invalid`].
    pub(crate) fn invalid(
        field: &'static str,
        value: impl Into<u64>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field,
            value: value.into(),
            expected: expected.into(),
        }
    }
}
