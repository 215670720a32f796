//! The blocking driver: plain system calls, made in order by [`kick`](Blocking::kick).
//!
//! For where io_uring is missing or forbidden. It holds up its queue's thread while it works.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use rustix::fs::FallocateFlags;
use urus_engine::storage::{Completion, FileId, Op, OpKind, Slot};
use urus_engine::sync::Arc;

use crate::bell::Bell;
use crate::files::FileSet;
use crate::memory::RingMemory;
use crate::offload::{self, Mailbox};

/// Pieces that one vectored system call takes (IOV_MAX).
pub(crate) const PIECES_MAX: usize = 1024;
/// Bytes that one system call reads or writes at most (MAX_RW_COUNT in the kernel).
pub(crate) const BYTES_MAX: usize = 0x7FFF_F000;

pub(crate) struct Blocking {
    files: Arc<FileSet>,
    bell: Arc<Bell>,
    mailbox: Arc<Mailbox>,
    queued: VecDeque<(Slot, Op<RingMemory>)>,
    ready: VecDeque<Completion>,
    /// Scratch, kept for its capacity.
    iovecs: Vec<libc::iovec>,
    /// Operations taken whose completion was not handed out yet.
    in_flight: usize,
    depth: usize,
    /// Whether someone watches the eventfd.
    watched: bool,
}

impl Blocking {
    pub(crate) fn open(files: Arc<FileSet>, depth: usize) -> io::Result<Self> {
        let bell = Arc::new(Bell::new()?);
        Ok(Self {
            files,
            mailbox: Mailbox::new(Arc::clone(&bell)),
            bell,
            queued: VecDeque::with_capacity(depth),
            ready: VecDeque::with_capacity(depth),
            iovecs: Vec::new(),
            in_flight: 0,
            depth,
            watched: false,
        })
    }

    pub(crate) fn files(&self) -> &FileSet {
        &self.files
    }

    pub(crate) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    pub(crate) fn submit(&mut self, op: Op<RingMemory>, slot: Slot) -> Result<(), Op<RingMemory>> {
        if self.in_flight == self.depth {
            return Err(op);
        }
        self.in_flight += 1;
        match op.kind {
            OpKind::Job(job) => offload::submit(job, slot, &self.mailbox),
            _ => self.queued.push_back((slot, op)),
        }
        Ok(())
    }

    pub(crate) fn kick(&mut self) {
        while let Some((slot, op)) = self.queued.pop_front() {
            let result = self.execute(op);
            self.ready.push_back(Completion { slot, result });
        }
        if self.watched && !self.ready.is_empty() {
            self.bell.signal();
        }
    }

    pub(crate) fn complete(&mut self) -> Option<Completion> {
        self.mailbox.collect(&mut self.ready);
        let completion = self.ready.pop_front()?;
        self.in_flight -= 1;
        Some(completion)
    }

    pub(crate) fn wait(&mut self, timeout: Option<Duration>) {
        self.kick();
        let rung = self.bell.is_rung();
        if !rung && self.ready.is_empty() && self.mailbox.is_empty() {
            self.bell.sleep(timeout);
        }
        if self.watched || rung || self.bell.is_rung() {
            self.bell.silence();
        }
    }

    pub(crate) fn event_fd(&mut self) -> BorrowedFd<'_> {
        if !self.watched {
            self.watched = true;
            self.bell.signal();
        }
        self.bell.event_fd()
    }

    pub(crate) fn consume_event(&mut self) {
        self.bell.silence();
    }

    fn execute(&mut self, op: Op<RingMemory>) -> io::Result<usize> {
        let file = self.files.file(op.file);
        let fallocate = |flags, offset, len| -> io::Result<usize> {
            rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, flags, offset, len))?;
            Ok(0)
        };
        match op.kind {
            OpKind::Read { offset, memory } => {
                self.transfer(op.file, &memory, offset, Direction::Read { flags: 0 })
            }
            OpKind::Write {
                offset,
                memory,
                sync,
            } => {
                let flags = if sync { libc::RWF_DSYNC } else { 0 };
                self.transfer(op.file, &memory, offset, Direction::Write { flags })
            }
            OpKind::Punch { offset, len } => {
                let result = fallocate(
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    offset,
                    len,
                );
                learn(&self.files, Learnable::Punch(op.file), &result);
                result
            }
            OpKind::ZeroRange { offset, len } => {
                let result = fallocate(FallocateFlags::ZERO_RANGE, offset, len);
                learn(&self.files, Learnable::ZeroRange(op.file), &result);
                result
            }
            OpKind::Allocate { offset, len } => fallocate(FallocateFlags::empty(), offset, len),
            OpKind::SyncData => {
                Ok(rustix::io::retry_on_intr(|| rustix::fs::fdatasync(file)).map(|()| 0)?)
            }
            OpKind::SetLen { len } => set_len(&self.files, op.file, len),
            OpKind::Job(_) => unreachable!("jobs go to the pool"),
        }
    }

    fn transfer(
        &mut self,
        file: FileId,
        memory: &RingMemory,
        offset: u64,
        direction: Direction,
    ) -> io::Result<usize> {
        fill_iovecs(&mut self.iovecs, memory);
        let fd = self.files.raw_fd(file);
        loop {
            // SAFETY: `transfer_vectored` wants iovecs that are valid for reads (of a write) and writes (of a read):
            // they were just made from `memory`, which is borrowed for longer than this blocking call, and whose bytes
            // nobody holds as a slice (contract of `RingMemory`).
            let result = unsafe { transfer_vectored(fd, &self.iovecs, offset, direction) };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy)]
pub(crate) enum Direction {
    /// With RWF_ flags.
    Read { flags: libc::c_int },
    /// With flags of pwritev2(2).
    Write { flags: libc::c_int },
}

/// Fills `iovecs` with the first pieces of `memory`, as many as one system call takes. Allocates only to grow.
pub(crate) fn fill_iovecs(iovecs: &mut Vec<libc::iovec>, memory: &RingMemory) {
    iovecs.clear();
    iovecs.extend(
        memory
            .pieces()
            .take(PIECES_MAX)
            .map(|(base, len)| libc::iovec {
                iov_base: base.as_ptr().cast(),
                iov_len: len,
            }),
    );
}

/// One preadv2(2) or pwritev2(2).
///
/// # Safety
/// The iovecs must be valid for writes (of a read) or reads (of a write) during the call.
#[inline]
pub(crate) unsafe fn transfer_vectored(
    fd: RawFd,
    iovecs: &[libc::iovec],
    offset: u64,
    direction: Direction,
) -> io::Result<usize> {
    let count = libc::c_int::try_from(iovecs.len()).expect("no more than PIECES_MAX");
    let Ok(offset) = libc::off64_t::try_from(offset) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let done = match direction {
        // SAFETY: passed on to the caller.
        Direction::Read { flags: 0 } => unsafe {
            libc::preadv64(fd, iovecs.as_ptr(), count, offset)
        },
        // SAFETY: passed on to the caller; the types are those that preadv2(2) gives the system call, whose offset comes in two halves of
        // which a 64-bit kernel takes the first whole. Not by libc's wrapper: that is a point of cancellation, and what it does for
        // this costs as much as a look-up.
        Direction::Read { flags } => unsafe {
            let done = libc::syscall(
                libc::SYS_preadv2,
                libc::c_long::from(fd),
                iovecs.as_ptr(),
                libc::c_long::from(count),
                offset,
                libc::c_long::from(0_u8),
                libc::c_long::from(flags),
            );
            libc::ssize_t::try_from(done).unwrap_or(-1)
        },
        // SAFETY: likewise.
        Direction::Write { flags: 0 } => unsafe {
            libc::pwritev64(fd, iovecs.as_ptr(), count, offset)
        },
        // SAFETY: likewise.
        Direction::Write { flags } => unsafe {
            libc::pwritev64v2(fd, iovecs.as_ptr(), count, offset, flags)
        },
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// ftruncate(2).
pub(crate) fn set_len(files: &FileSet, file: FileId, len: u64) -> io::Result<usize> {
    rustix::io::retry_on_intr(|| rustix::fs::ftruncate(files.file(file), len))?;
    Ok(0)
}

/// Operations whose success or failure says what a file system can do.
#[derive(Clone, Copy)]
pub(crate) enum Learnable {
    Punch(FileId),
    ZeroRange(FileId),
}

/// Keeps [`FileProperties`](urus_engine::storage::FileProperties) true to what was seen.
pub(crate) fn learn(files: &FileSet, what: Learnable, result: &io::Result<usize>) {
    let refused = matches!(result, Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP));
    match what {
        Learnable::Punch(file) if refused => files.file(file).learn_no_punch(),
        Learnable::Punch(file) if result.is_ok() => files.file(file).learn_punch(),
        Learnable::ZeroRange(file) if refused => files.file(file).learn_no_zero_range(),
        _ => {}
    }
}
