//! What a caller asks of a [`Queue`](crate::Queue), and what it gets back.

use crate::{Buffer, Error, Extent};

/// A request. Its buffer belongs to the queue from [`submit`](crate::Queue::submit) until the [`Completion`]
/// gives it back.
///
/// Offsets and lengths are in bytes of the virtual disk. Any alignment is taken; multiples of
/// [`Device::alignment`](crate::Device::alignment) are served without copying.
#[derive(Debug)]
pub struct Request {
    pub(crate) token: u64,
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Kind {
    Read {
        offset: u64,
        buffer: Buffer,
    },
    Write {
        offset: u64,
        buffer: Buffer,
        fua: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        unmap: bool,
        fua: bool,
    },
    Flush,
    BlockStatus {
        offset: u64,
        len: u64,
    },
}

impl Request {
    /// Fill `buffer` from `offset`.
    #[must_use]
    pub fn read(token: u64, offset: u64, buffer: Buffer) -> Self {
        Self {
            token,
            kind: Kind::Read { offset, buffer },
        }
    }

    /// Write `buffer` at `offset`. Later reads see it once it has completed; it is durable after the next
    /// flush, or on completion with [`fua`](Self::fua).
    #[must_use]
    pub fn write(token: u64, offset: u64, buffer: Buffer) -> Self {
        Self {
            token,
            kind: Kind::Write {
                offset,
                buffer,
                fua: false,
            },
        }
    }

    /// The range is no longer needed. Whole clusters in it are given back and read as zeroes; the rest of the
    /// range keeps its content. A hint: where it cannot be recorded, nothing happens.
    #[must_use]
    pub fn discard(token: u64, offset: u64, len: u64) -> Self {
        Self {
            token,
            kind: Kind::Discard { offset, len },
        }
    }

    /// The range reads as zeroes afterwards. Clusters stay allocated unless [`unmap`](Self::unmap).
    #[must_use]
    pub fn write_zeroes(token: u64, offset: u64, len: u64) -> Self {
        Self {
            token,
            kind: Kind::WriteZeroes {
                offset,
                len,
                unmap: false,
                fua: false,
            },
        }
    }

    /// Everything whose completion was seen before this is submitted, on any queue of the device, is durable
    /// when it completes.
    #[must_use]
    pub fn flush(token: u64) -> Self {
        Self {
            token,
            kind: Kind::Flush,
        }
    }

    /// How the range is stored: answered by [`Completion::extents`].
    #[must_use]
    pub fn block_status(token: u64, offset: u64, len: u64) -> Self {
        Self {
            token,
            kind: Kind::BlockStatus { offset, len },
        }
    }

    /// Durable on completion. For writes and write-zeroes; the other kinds take no notice.
    #[must_use]
    pub fn fua(mut self, durable: bool) -> Self {
        if let Kind::Write { fua, .. } | Kind::WriteZeroes { fua, .. } = &mut self.kind {
            *fua = durable;
        }
        self
    }

    /// Clusters may be given back. For write-zeroes; the other kinds take no notice.
    #[must_use]
    pub fn unmap(mut self, give_back: bool) -> Self {
        if let Kind::WriteZeroes { unmap, .. } = &mut self.kind {
            *unmap = give_back;
        }
        self
    }

    /// The caller's own name for it, returned with the [`Completion`].
    #[must_use]
    pub fn token(&self) -> u64 {
        self.token
    }

    /// The buffer, for a request that was never submitted.
    #[must_use]
    pub fn into_buffer(self) -> Option<Buffer> {
        match self.kind {
            Kind::Read { buffer, .. } | Kind::Write { buffer, .. } => Some(buffer),
            _ => None,
        }
    }
}

/// The end of a request: every request that was submitted gets exactly one.
#[derive(Debug)]
#[non_exhaustive]
pub struct Completion {
    /// The request's token.
    pub token: u64,
    /// How it ended. A failed write may have written any part of its range, and nothing else. A failed read leaves
    /// the buffer's content undefined.
    pub result: Result<(), Error>,
    /// The request's buffer: the kernel is done with it.
    pub buffer: Option<Buffer>,
    /// The answer to [`Request::block_status`], in ascending order and without gaps.
    pub extents: Vec<Extent>,
}

/// A request that was not taken, because as many as the queue's depth are in flight. Submit it again after the next
/// completion.
#[derive(Debug)]
pub struct Rejected {
    /// The request, as it was.
    pub request: Request,
}

impl std::fmt::Display for Rejected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the queue is full: as many requests as its depth are in flight")
    }
}

impl std::error::Error for Rejected {}
