//! The contract between the engine and whatever does its I/O.
//!
//! Every line that decides anything is engine code above this trait; a driver only translates. So the same
//! engine runs on io_uring, on plain system calls, and on simulated storage that loses power.
//!
//! A [`Storage`] belongs to one thread: the queue's or the maintenance executor's. Several of them, one per
//! queue, work on the same open files.

use std::io;
use std::time::Duration;

use crate::sync::Arc;

/// A file of the device. 0 is the image itself; backing files follow, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u16);

/// Names an operation in flight: chosen by the engine, returned with the completion. Small and dense
/// (a slab index), so that a driver can use it as an index too. Never reused before its completion was seen.
pub type Slot = usize;

/// A piece of memory that I/O reads into or writes from: a handle, cheap to clone and to slice.
///
/// All clones live on one thread. What keeps the memory alive (a heap block, a guest's memory map) is kept by
/// every clone, so memory outlives the operation that uses it by construction. It may be scattered.
/// Ranges out of bounds are a programmer's error and panic.
pub trait Memory: Clone + 'static {
    /// Bytes.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The part `[start, start + len)`, sharing the memory.
    #[must_use]
    fn slice(&self, start: usize, len: usize) -> Self;
    /// Copies `dst.len()` bytes out, from `start`.
    fn read(&self, start: usize, dst: &mut [u8]);
    /// Copies `src` in, at `start`.
    fn write(&self, start: usize, src: &[u8]);
    /// Fills `[start, start + len)` with zeroes.
    fn zero(&self, start: usize, len: usize);
    /// Whether the bytes are all zero.
    fn is_zero(&self) -> bool;
    /// Whether each piece starts at a multiple of `align` and is a multiple of it long (what O_DIRECT needs).
    fn is_aligned(&self, align: usize) -> bool;
    /// This memory followed by `parts`, as one piece: for gathering several into one vectored operation.
    fn chain(parts: Vec<Self>) -> Self;
}

/// What to do.
pub enum OpKind<M> {
    /// Read `memory.len()` bytes at `offset`. Completes with the bytes read; 0 at or past the end of file.
    Read {
        /// Byte offset in the file.
        offset: u64,
        /// Destination.
        memory: M,
    },
    /// Write `memory.len()` bytes at `offset`. Completes with the bytes written.
    Write {
        /// Byte offset in the file.
        offset: u64,
        /// Source.
        memory: M,
        /// Durable on completion (RWF_DSYNC).
        sync: bool,
    },
    /// Give the range back to the file system; it reads as zeroes. The file's length stays.
    Punch {
        /// Byte offset in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make the range read as zeroes, allocated where the file system can; may extend the file.
    ZeroRange {
        /// Byte offset in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Reserve space for the range; may extend the file.
    Allocate {
        /// Byte offset in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// fdatasync.
    SyncData,
    /// ftruncate.
    SetLen {
        /// The new length in bytes.
        len: u64,
    },
    /// CPU work on another thread, such as decoding a cluster. `file` is ignored. Completes with 0.
    Job(Box<dyn FnOnce() + Send>),
}

/// An operation on a file.
pub struct Op<M> {
    /// The file it works on.
    pub file: FileId,
    /// What to do.
    pub kind: OpKind<M>,
}

/// An operation that has ended. The driver has let go of it: the kernel is done with its memory.
pub struct Completion {
    /// The slot given at submission.
    pub slot: Slot,
    /// Bytes done for reads and writes (possibly fewer than asked: the engine continues), else 0.
    pub result: io::Result<usize>,
}

/// A part of a file: data, or a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// Not a hole.
    pub data: bool,
    /// Bytes, at least one.
    pub len: u64,
}

/// What a file can do, found once at open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileProperties {
    /// Offsets and lengths of reads and writes must be multiples of this (1 for buffered files, else 512 or 4096).
    pub alignment: u32,
    /// Memory of reads and writes must be aligned to this (1 for buffered files).
    pub memory_alignment: u32,
    /// A regular file: grows when written past its end, and reads zeroes where never written.
    pub regular: bool,
    /// Punch is known to work (else it is tried once).
    pub can_punch: bool,
    /// ZeroRange works.
    pub can_zero_range: bool,
}

/// Wakes the thread that owns a [`Storage`] out of [`Storage::wait`] (and signals its eventfd, where it has
/// one). Callable from any thread.
pub trait Notify: Send + Sync {
    /// Wakes it.
    fn notify(&self);
}

/// Does the engine's I/O for one thread.
pub trait Storage: 'static {
    /// The memory its operations work on.
    type Memory: Memory;

    /// Memory for the engine's own use: zeroed, aligned for every file of the device. None where there is none to be
    /// had: whatever needed it fails with [`Error::OutOfMemory`](crate::Error::OutOfMemory), and nothing else does.
    fn allocate(&self, bytes: usize) -> Option<Self::Memory>;

    /// Takes an operation, to be started at the latest by [`kick`](Self::kick). Where there is no room it gives the
    /// operation back; the engine tries again after the next completion.
    ///
    /// # Errors
    /// The operation itself, when there is no room.
    fn submit(&mut self, op: Op<Self::Memory>, slot: Slot) -> Result<(), Op<Self::Memory>>;

    /// Reads all of `memory` at `offset` if that can be done at once, without waiting for anything (from a page cache); else returns
    /// false, nothing is known of the memory's content, and the read is to be submitted. For a read that has come alone, which then
    /// is no operation: what does not know, or would rather have it submitted, says false.
    fn read_now(&mut self, file: FileId, offset: u64, memory: &Self::Memory) -> bool {
        let _ = (file, offset, memory);
        false
    }

    /// Starts everything submitted: one system call for all of it.
    fn kick(&mut self);

    /// The next completion, without waiting.
    fn complete(&mut self) -> Option<Completion>;

    /// Sleeps until something completes or the notifier was used, or the time is over. Never misses a
    /// notification sent before it was called and not yet consumed. A simulator returns at once.
    fn wait(&mut self, timeout: Option<Duration>);

    /// The way to wake this storage's thread.
    fn notifier(&self) -> Arc<dyn Notify>;

    /// What a file can do.
    fn properties(&self, file: FileId) -> FileProperties;

    /// Whether a file has data at `offset`, or a hole that reads as zeroes, and for how long it goes on so, `len` bytes at most (`len` is
    /// not 0). Asked of the file system, which may read metadata for it. What does not know its holes is all data.
    fn extent(&self, file: FileId, offset: u64, len: u64) -> FileExtent {
        let _ = (file, offset);
        FileExtent { data: true, len }
    }

    /// Length of a file in bytes, now. (For a block device its size.)
    ///
    /// # Errors
    /// As the operating system says.
    fn file_len(&self, file: FileId) -> io::Result<u64>;
}
