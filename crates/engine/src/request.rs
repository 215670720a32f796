//! What a transport asks of a queue, and what it gets back.

use crate::error::Error;

/// A request. Its memory belongs to the engine until the [`Reply`] gives it back.
pub struct Request<M> {
    /// The caller's own name for it; returned with the reply.
    pub token: u64,
    /// What is asked.
    pub kind: RequestKind<M>,
}

/// Kinds of requests. Offsets and lengths are in bytes of the virtual disk; any alignment is taken.
#[derive(Debug)]
pub enum RequestKind<M> {
    /// Fill `memory` from `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Destination; its length is the length of the request.
        memory: M,
    },
    /// Write `memory` at `offset`. Completes when a later read sees it; durable after the next flush.
    Write {
        /// First byte.
        offset: u64,
        /// Source; its length is the length of the request.
        memory: M,
        /// Durable on completion.
        fua: bool,
    },
    /// The guest no longer needs the range: whole clusters in it are given back, and read as zeroes; the rest of the range
    /// keeps its content. Where that cannot be recorded (version 2 with a backing file) nothing happens.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Clusters may be given back; else those that are allocated stay so.
        unmap: bool,
        /// Durable on completion.
        fua: bool,
    },
    /// Everything whose completion was seen before is durable on completion.
    Flush,
    /// How the range is allocated; answered by [`Reply::extents`].
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// How a range of the virtual disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte on the virtual disk.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Which layer decides: 0 is the image, 1 its backing file, and so on.
    pub depth: u32,
    /// A layer of the chain says something of this range (else it lies in none of them, and reads as zeroes).
    pub present: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Has data in a file (a preallocated zero cluster has none, as QEMU counts).
    pub data: bool,
    /// Compressed.
    pub compressed: bool,
    /// Where it lies in that layer's file, where it lies there as it is.
    pub host: Option<u64>,
}

/// The end of a request: every request gets exactly one.
#[derive(Debug)]
pub struct Reply<M> {
    /// The request's token.
    pub token: u64,
    /// How it ended. A failed write may have written any part of its range, and nothing else.
    pub result: Result<(), Box<Error>>,
    /// The request's memory.
    pub memory: Option<M>,
    /// The answer to [`RequestKind::BlockStatus`].
    pub extents: Vec<Extent>,
}
