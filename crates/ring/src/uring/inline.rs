//! What the queue's thread does itself, because it is faster so.
//!
//! # Reads
//! A read that goes alone costs a preadv2(2) less than an entering of the ring, where the page cache has what it wants. It is tried with
//! RWF_NOWAIT, which never waits for a disk; what it does not find is the ring's, and after misses the next reads are not tried. A hit of
//! the engine comes by [`Inline::read_now`] and never is an operation; what a task of the engine reads is one, and waits here to be started.
//!
//! # Writes
//! Where a file system cannot take a buffered write without blocking (ext4, tmpfs, overlayfs), io_uring hands each one to a
//! kernel worker, and the workers queue up at the inode's lock: several times slower than a plain pwritev(2), which costs little as long
//! as the page cache takes the data. It may block, though, when the kernel throttles whoever dirties pages. So: only whole
//! pages (a part of one may have to be read first), a bounded amount at a time, and none for a while after a slow one; and with much in
//! flight, whoever makes more of them ([`Balance`]).
//!
//! Whether a file system is of that kind is found out by the first write, tried with RWF_NOWAIT.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use urus_engine::storage::{Completion, FileId, Memory, Op, OpKind, Slot};

use super::balance::{Balance, Way};
use crate::blocking::{Direction, fill_iovecs, transfer_vectored};
use crate::files::{FileSet, WritesWithoutBlocking};
use crate::memory::RingMemory;

/// Writes are made here from and to multiples of this.
const PAGE_BYTES: u64 = 4096;
/// The longest write made here; for a longer one a worker on another processor gains more than it costs.
const WRITE_BYTES_MAX: usize = 32 << 10;
/// Bytes made here between two enterings of the kernel, at most.
const TURN_BYTES_MAX: usize = 1 << 20;
/// A write that takes longer was blocked. (A thread that lost its processor for a turn takes less.)
const SLOW: Duration = Duration::from_millis(8);
/// How long the ring has the writes then.
const REST: Duration = Duration::from_millis(50);

/// The longest read tried here.
const READ_BYTES_MAX: usize = 128 << 10;
/// How many reads are not tried after one that missed, at most: twice as many each time.
const MISSES_MAX: u32 = 64;

/// A transfer waiting for its turn.
struct Queued {
    slot: Slot,
    file: FileId,
    offset: u64,
    memory: RingMemory,
}

pub(super) struct Inline {
    queued: VecDeque<Queued>,
    queued_bytes: usize,
    /// Since when the ring has the writes.
    slow_since: Option<Instant>,
    balance: Balance,
    /// A read that has come alone so far.
    lonely: Option<Queued>,
    /// Reads that are left to the ring before the next one is tried, and how many those are after another miss.
    untried: u32,
    misses: u32,
    /// Scratch, kept for its capacity.
    iovecs: Vec<libc::iovec>,
}

impl Inline {
    pub(super) fn new(depth: usize) -> Self {
        Self {
            queued: VecDeque::with_capacity(depth),
            queued_bytes: 0,
            slow_since: None,
            balance: Balance::new(),
            lonely: None,
            untried: 0,
            misses: 1,
            iovecs: Vec::new(),
        }
    }

    /// Reads all of `memory` where the page cache has it; false where that is not known, or not tried now.
    #[inline]
    pub(super) fn read_now(
        &mut self,
        file: FileId,
        offset: u64,
        memory: &RingMemory,
        files: &FileSet,
    ) -> bool {
        // One that is left to the ring counts when it comes as an operation.
        if self.untried > 1 || !is_for_page_cache(file, memory, files) {
            return false;
        }
        let whole = self.read_whole(file, offset, memory, files);
        // As does one that missed.
        self.untried = if whole { 0 } else { self.untried + 1 };
        whole
    }

    /// Takes a read that may be tried here as long as no other operation comes: nothing else waits to be started. Everything else is
    /// given back.
    #[inline]
    pub(super) fn take_read(
        &mut self,
        op: Op<RingMemory>,
        slot: Slot,
        files: &FileSet,
    ) -> Option<Op<RingMemory>> {
        match op.kind {
            OpKind::Read { offset, memory }
                if is_for_page_cache(op.file, &memory, files) && self.is_tried() =>
            {
                self.lonely = Some(Queued {
                    slot,
                    file: op.file,
                    offset,
                    memory,
                });
                None
            }
            kind => Some(Op {
                file: op.file,
                kind,
            }),
        }
    }

    /// Whether the next read is tried.
    #[inline]
    fn is_tried(&mut self) -> bool {
        self.untried = self.untried.saturating_sub(1);
        self.untried == 0
    }

    /// The read that is not alone any more: it is the ring's.
    #[inline]
    pub(super) fn take_lonely(&mut self) -> Option<(Op<RingMemory>, Slot)> {
        let Queued {
            slot,
            file,
            offset,
            memory,
        } = self.lonely.take()?;
        let kind = OpKind::Read { offset, memory };
        Some((Op { file, kind }, slot))
    }

    /// Tries the read that has stayed alone; what the page cache does not have, wholly, stays for the ring.
    #[inline]
    pub(super) fn try_lonely(&mut self, files: &FileSet) -> Option<Completion> {
        let read = self.lonely.take()?;
        if self.read_whole(read.file, read.offset, &read.memory, files) {
            return Some(Completion {
                slot: read.slot,
                result: Ok(read.memory.len()),
            });
        }
        self.lonely = Some(read);
        None
    }

    /// Reads without waiting. After a miss (a part, the end of the file, an error: the ring's to find out) the next reads are not tried.
    #[inline]
    fn read_whole(
        &mut self,
        file: FileId,
        offset: u64,
        memory: &RingMemory,
        files: &FileSet,
    ) -> bool {
        let fd = files.raw_fd(file);
        let flags = libc::RWF_NOWAIT;
        let mut only = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let iovecs = match memory.contiguous() {
            Some((base, len)) => {
                only.iov_base = base.as_ptr().cast();
                only.iov_len = len;
                std::slice::from_ref(&only)
            }
            None => {
                fill_iovecs(&mut self.iovecs, memory);
                &self.iovecs[..]
            }
        };
        // SAFETY: `transfer_vectored` wants iovecs that are valid for writes: they were made from `memory`, which is borrowed for longer
        // than this call, and whose bytes nobody holds as a slice (contract of `RingMemory`).
        let result = unsafe { transfer_vectored(fd, iovecs, offset, Direction::Read { flags }) };
        let whole = result.is_ok_and(|bytes| bytes == memory.len());
        if whole {
            self.misses = 1;
        } else {
            self.untried = self.misses;
            self.misses = (self.misses * 2).min(MISSES_MAX);
        }
        whole
    }

    /// Takes a write that is better made by this thread, with so many operations in flight; everything else is given back, for the ring.
    #[inline]
    pub(super) fn take(
        &mut self,
        op: Op<RingMemory>,
        slot: Slot,
        files: &FileSet,
        in_flight: usize,
    ) -> Option<Op<RingMemory>> {
        match op.kind {
            OpKind::Write {
                offset,
                memory,
                sync: false,
            } if self.wants(op.file, offset, &memory, files)
                && self.balance.next(in_flight, Instant::now) == Way::Here =>
            {
                self.queued_bytes += memory.len();
                self.queued.push_back(Queued {
                    slot,
                    file: op.file,
                    offset,
                    memory,
                });
                None
            }
            kind => Some(Op {
                file: op.file,
                kind,
            }),
        }
    }

    fn wants(&mut self, id: FileId, offset: u64, memory: &RingMemory, files: &FileSet) -> bool {
        let file = files.file(id);
        let len = memory.len();
        if !file.is_buffered_regular()
            || file.writes_without_blocking() == WritesWithoutBlocking::Yes
            || !offset.is_multiple_of(PAGE_BYTES)
            || !(len as u64).is_multiple_of(PAGE_BYTES)
            || len > WRITE_BYTES_MAX
            || self.queued_bytes + len > TURN_BYTES_MAX
        {
            return false;
        }
        match self.slow_since {
            Some(since) if since.elapsed() < REST => false,
            Some(_) => {
                self.slow_since = None;
                true
            }
            None => true,
        }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.queued.is_empty() && self.lonely.is_none()
    }

    /// Makes the writes taken, in order. What turns out to be the ring's goes to `to_ring`.
    pub(super) fn run(
        &mut self,
        files: &FileSet,
        ready: &mut VecDeque<Completion>,
        mut to_ring: impl FnMut(Op<RingMemory>, Slot),
    ) {
        let mut before = Instant::now();
        while let Some(write) = self.queued.pop_front() {
            let result = match self.slow_since {
                None => self.write(&write, files),
                Some(_) => None,
            };
            let Some(result) = result else {
                let kind = OpKind::Write {
                    offset: write.offset,
                    memory: write.memory,
                    sync: false,
                };
                let op = Op {
                    file: write.file,
                    kind,
                };
                to_ring(op, write.slot);
                continue;
            };
            let now = Instant::now();
            if now.duration_since(before) > SLOW {
                self.slow_since = Some(now);
            }
            before = now;
            ready.push_back(Completion {
                slot: write.slot,
                result,
            });
        }
        self.queued_bytes = 0;
    }

    /// Makes a write; `None` where the ring can do it without a worker.
    fn write(&mut self, write: &Queued, files: &FileSet) -> Option<io::Result<usize>> {
        const UNSUPPORTED: [i32; 2] = [libc::EOPNOTSUPP, libc::EINVAL];
        fill_iovecs(&mut self.iovecs, &write.memory);
        let file = files.file(write.file);
        if file.writes_without_blocking() == WritesWithoutBlocking::Unknown {
            let tried = self.call(write, files, libc::RWF_NOWAIT);
            let unsupported = tried.as_ref().is_err_and(|error| {
                error
                    .raw_os_error()
                    .is_some_and(|errno| UNSUPPORTED.contains(&errno))
            });
            file.learn_writes_without_blocking(!unsupported);
            if !unsupported {
                // EAGAIN, or done in part: the ring knows how to go on.
                return tried.ok().map(Ok);
            }
        }
        Some(self.call(write, files, 0))
    }

    fn call(&self, write: &Queued, files: &FileSet, flags: libc::c_int) -> io::Result<usize> {
        let fd = files.raw_fd(write.file);
        let direction = Direction::Write { flags };
        loop {
            // SAFETY: `transfer_vectored` wants iovecs that are valid for reads: `Inline::write` made them from the memory that
            // `Queued` holds for longer than this blocking call, and whose bytes nobody holds as a slice (contract of
            // `RingMemory`).
            let result = unsafe { transfer_vectored(fd, &self.iovecs, write.offset, direction) };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// Whether a read is one to look for in the page cache first.
#[inline]
fn is_for_page_cache(file: FileId, memory: &RingMemory, files: &FileSet) -> bool {
    memory.len() <= READ_BYTES_MAX && files.file(file).is_buffered_regular()
}

#[cfg(test)]
mod tests {
    //! Guards the choice between this thread and the ring: what is taken here must be written once and answered once, and what may
    //! block for long must not be taken.
    use super::*;
    use crate::files::OpenFile;
    use std::sync::Arc;
    use urus_engine::storage::FileId;

    fn files(can: Option<bool>) -> (tempfile::NamedTempFile, Arc<FileSet>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let open = OpenFile::open_image(file.path(), false, false).unwrap();
        if let Some(can) = can {
            open.learn_writes_without_blocking(can);
        }
        (file, FileSet::new(vec![open]))
    }

    fn write(offset: u64, len: usize, sync: bool) -> Op<RingMemory> {
        let memory = RingMemory::new(len);
        memory.write(0, &vec![7; len]);
        Op {
            file: FileId(0),
            kind: OpKind::Write {
                offset,
                memory,
                sync,
            },
        }
    }

    fn read(len: usize) -> Op<RingMemory> {
        let memory = RingMemory::new(len);
        Op {
            file: FileId(0),
            kind: OpKind::Read { offset: 0, memory },
        }
    }

    /// 8 KiB that the page cache has.
    fn two_blocks() -> (tempfile::NamedTempFile, Arc<FileSet>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [9; 8192]).unwrap();
        let open = OpenFile::open_image(file.path(), true, false).unwrap();
        (file, FileSet::new(vec![open]))
    }

    #[test]
    fn a_lonely_read_is_answered_once_or_left_to_the_ring() {
        let (_file, files) = two_blocks();
        let mut inline = Inline::new(8);
        assert!(inline.take_read(read(4096), 5, &files).is_none());
        assert!(!inline.is_empty());
        let done = inline.try_lonely(&files).unwrap();
        assert_eq!((done.slot, done.result.unwrap()), (5, 4096));
        assert!(inline.is_empty() && inline.take_lonely().is_none());
        // The end of the file is not for here to judge. After it the next are not tried, twice as many each time.
        let mut left = Vec::new();
        for slot in 0..100 {
            match inline.take_read(read(12_288), slot, &files) {
                Some(_) => left.push(slot),
                None => {
                    assert!(inline.try_lonely(&files).is_none());
                    let (op, same) = inline.take_lonely().unwrap();
                    assert!(same == slot && matches!(op.kind, OpKind::Read { offset: 0, .. }));
                }
            }
        }
        let tried: Vec<_> = (0..100).filter(|slot| !left.contains(slot)).collect();
        assert_eq!(tried, [0, 1, 3, 7, 15, 31, 63]);
    }

    /// The same for what never is an operation: what is not read at once comes as one, and is the ring's then.
    #[test]
    fn a_read_that_is_not_made_at_once_is_the_rings() {
        let (_file, files) = two_blocks();
        let mut inline = Inline::new(8);
        let whole = RingMemory::new(4096);
        for _ in 0..3 {
            whole.write(0, &[0; 4096]);
            assert!(inline.read_now(FileId(0), 4096, &whole, &files));
            let mut bytes = [0; 4096];
            whole.read(0, &mut bytes);
            assert_eq!(bytes, [9; 4096]);
        }
        let scattered = RingMemory::chain(vec![whole.slice(0, 512), RingMemory::new(512)]);
        assert!(inline.read_now(FileId(0), 0, &scattered, &files));
        let long = RingMemory::new(READ_BYTES_MAX + 1);
        assert!(!inline.read_now(FileId(0), 0, &long, &files) && inline.untried == 0);
        // Past the end of the file, so each try misses.
        let part = RingMemory::new(12_288);
        let mut tried = Vec::new();
        for number in 0..100 {
            let misses = inline.misses;
            assert!(!inline.read_now(FileId(0), 0, &part, &files));
            if inline.misses != misses || inline.untried == MISSES_MAX + 1 {
                tried.push(number);
            }
            assert!(
                inline.take_read(read(12_288), number, &files).is_some(),
                "the ring's"
            );
        }
        assert_eq!(tried, [0, 1, 3, 7, 15, 31, 63]);
        assert!(inline.is_empty());
    }

    #[test]
    fn the_ring_keeps_what_may_block() {
        let (_file, known) = files(Some(false));
        let mut inline = Inline::new(8);
        for (offset, len, sync) in [
            (512, 4096, false),
            (0, 512, false),
            (0, 4096, true),
            (0, WRITE_BYTES_MAX + 4096, false),
        ] {
            let op = write(offset, len, sync);
            assert!(
                inline.take(op, 0, &known, 1).is_some(),
                "{offset} {len} {sync}"
            );
        }
        assert!(inline.take(read(4096), 0, &known, 1).is_some());
        assert!(inline.take_read(write(0, 4096, false), 0, &known).is_some());
        assert!(
            inline
                .take_read(read(READ_BYTES_MAX + 1), 0, &known)
                .is_some()
        );
        let (_file, able) = files(Some(true));
        assert!(inline.take(write(0, 4096, false), 0, &able, 1).is_some());
        // A bounded amount at a time.
        let mut taken = 0;
        while inline
            .take(write(0, WRITE_BYTES_MAX, false), taken, &known, 1)
            .is_none()
        {
            taken += 1;
        }
        assert_eq!(taken, TURN_BYTES_MAX / WRITE_BYTES_MAX);
    }

    #[test]
    fn what_is_taken_is_written_and_answered_once() {
        for known in [None, Some(false)] {
            let (file, files) = files(known);
            let mut inline = Inline::new(8);
            for slot in 0..8 {
                let at = (8 + slot as u64) * 4096;
                assert!(
                    inline
                        .take(write(at, 4096, false), slot, &files, 1)
                        .is_none()
                );
            }
            let (mut ready, mut to_ring) = (VecDeque::new(), Vec::new());
            inline.run(&files, &mut ready, |op, slot| to_ring.push((op, slot)));
            assert!(inline.is_empty());
            let mut slots: Vec<_> = ready.iter().map(|completion| completion.slot).collect();
            slots.extend(to_ring.iter().map(|(_, slot)| *slot));
            slots.sort_unstable();
            assert_eq!(slots, (0..8).collect::<Vec<_>>());
            let content = std::fs::read(file.path()).unwrap();
            for completion in ready {
                assert_eq!(completion.result.unwrap(), 4096);
                let at = (8 + completion.slot) * 4096;
                assert!(content[at..at + 4096].iter().all(|byte| *byte == 7));
            }
            assert_ne!(
                files.file(FileId(0)).writes_without_blocking(),
                WritesWithoutBlocking::Unknown
            );
        }
    }

    #[test]
    fn after_a_slow_write_the_ring_has_them() {
        let (_file, files) = files(Some(false));
        let mut inline = Inline::new(8);
        assert!(inline.take(write(0, 4096, false), 0, &files, 1).is_none());
        inline.slow_since = Some(Instant::now());
        let (mut ready, mut to_ring) = (VecDeque::new(), 0);
        inline.run(&files, &mut ready, |_, _| to_ring += 1);
        assert_eq!((ready.len(), to_ring), (0, 1));
        assert!(inline.take(write(0, 4096, false), 0, &files, 1).is_some());
        inline.slow_since = Instant::now().checked_sub(REST);
        assert!(inline.take(write(0, 4096, false), 0, &files, 1).is_none());
    }

    #[test]
    fn errors_come_back_with_their_slot() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = OpenFile::open_image(file.path(), true, false).unwrap();
        open.learn_writes_without_blocking(false);
        let files = FileSet::new(vec![open]);
        let mut inline = Inline::new(8);
        assert!(inline.take(write(0, 4096, false), 3, &files, 1).is_none());
        let mut ready = VecDeque::new();
        inline.run(&files, &mut ready, |_, _| panic!("not the ring's"));
        let completion = ready.pop_front().unwrap();
        assert_eq!(completion.slot, 3);
        assert_eq!(
            completion.result.unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
    }
}
