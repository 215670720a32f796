//! The two queues and the system call between them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};
use urus_engine::storage::{Op, OpKind, Slot};

use super::registered::Registered;
use super::slots::{InFlight, Slots};
use super::{CANCELLATION, setup};
use crate::blocking::{BYTES_MAX, fill_iovecs};
use crate::files::FileSet;
use crate::memory::{MemoryRegion, RingMemory};

pub(super) struct Ring {
    /// Before `memory`: closed before its mappings go.
    uring: IoUring,
    memory: Registered,
    /// Whether files are registered: then a file's id is its index.
    registered: bool,
    ftruncate: bool,
    can_wait_quietly: bool,
}

/// `IORING_ENTER_NO_IOWAIT` (6.15), which `io_uring` does not export.
const ENTER_NO_IOWAIT: u32 = 1 << 7;

impl Ring {
    /// `sockets`: it is to send and receive too.
    pub(super) fn new(uring: IoUring, files: &FileSet, sockets: bool) -> io::Result<Self> {
        let ftruncate = setup::probe(&uring, sockets)?;
        let fds = files
            .iter()
            .map(|file| std::os::fd::AsFd::as_fd(file).as_raw_fd())
            .collect::<Vec<_>>();
        // May fail for want of memory or of file descriptors (RLIMIT_NOFILE): then they go by descriptor.
        let registered = !fds.is_empty()
            && uring
                .submitter()
                .register_files(&fds)
                .inspect_err(
                    |error| tracing::debug!(%error, "files are not registered with the ring"),
                )
                .is_ok();
        setup::enable(&uring, ftruncate, sockets)?;
        let can_wait_quietly = uring.params().is_feature_no_iowait();
        Ok(Self {
            uring,
            memory: Registered::default(),
            registered,
            ftruncate,
            can_wait_quietly,
        })
    }

    /// Replaces the memory that is registered. On an error none is.
    pub(super) fn register_memory(&mut self, regions: Vec<MemoryRegion>) -> io::Result<()> {
        self.memory.replace(&self.uring, regions)
    }

    /// Entries of the submission queue.
    pub(super) fn capacity(&self) -> usize {
        usize::try_from(self.uring.params().sq_entries()).expect("32 bits fit a usize")
    }

    pub(super) fn has_ftruncate(&self) -> bool {
        self.ftruncate
    }

    pub(super) fn register_event_fd(&self, fd: RawFd) -> io::Result<()> {
        self.uring.submitter().register_eventfd(fd)
    }

    pub(super) fn unregister_files(&mut self) {
        if self.registered {
            self.registered = false;
            let _ = self.uring.submitter().unregister_files();
        }
    }

    /// Puts an operation into the submission queue, and what it owns into its slot. There is room: the driver takes
    /// fewer operations than there are entries.
    #[inline]
    pub(super) fn push(
        &mut self,
        slots: &mut Slots,
        op: Op<RingMemory>,
        slot: Slot,
        files: &FileSet,
    ) {
        let iovecs = slots.iovecs(slot);
        let entry = if self.registered {
            assert!(usize::from(op.file.0) < files.len(), "no such file");
            entry(&op.kind, Fixed(u32::from(op.file.0)), &self.memory, iovecs)
        } else {
            entry(&op.kind, Fd(files.raw_fd(op.file)), &self.memory, iovecs)
        };
        let entry = entry.user_data(u64::try_from(slot).expect("a slot fits 64 bits"));
        slots.fill(slot, InFlight::of(op.file, op.kind));
        // SAFETY: `push` wants memory and iovecs valid until the operation has ended. The memory was just moved into
        // the slot, which lets go of it only in `Slots::finish`, with the completion in hand; `Uring`'s drop waits for
        // all completions or leaks the slots, and forgetting the driver leaks them too. The iovecs are the slot's own
        // and are not touched while it is in flight (`Slots::iovecs` asserts it).
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.expect("the submission queue has room for every operation in flight");
    }

    /// Puts a multishot poll for readability into the submission queue.
    pub(super) fn push_poll(&mut self, fd: BorrowedFd<'_>, user_data: u64) {
        let events = u32::try_from(libc::POLLIN).expect("a flag");
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), events)
            .multi(true)
            .build()
            .user_data(user_data);
        // SAFETY: a poll has no memory that `push` would want valid.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.expect("the submission queue has entries more than operations");
    }

    /// The next completion in the queue.
    #[inline]
    pub(super) fn pop(&mut self) -> Option<cqueue::Entry> {
        self.uring.completion().next()
    }

    pub(super) fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// Whether completions wait for this thread to enter the kernel: deferred work, or an overflown queue.
    #[inline]
    pub(super) fn has_deferred(&mut self) -> bool {
        let submission = self.uring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    /// Enters the kernel for them, and for nothing else. Returns whether that went well.
    pub(super) fn run_deferred(&mut self) -> bool {
        // SAFETY: `enter` wants flags and an argument that fit together: GETEVENTS takes none, and waits for none
        // with a minimum of 0. Nothing is submitted.
        let result = unsafe {
            self.uring
                .submitter()
                .enter::<libc::sigset_t>(0, 0, EnterFlags::GETEVENTS.bits(), None)
        };
        if let Err(error) = result {
            tracing::debug!(%error, "io_uring_enter for deferred completions");
            return false;
        }
        true
    }

    /// Puts the removal of a poll into the submission queue.
    pub(super) fn push_poll_removal(&mut self, poll: u64, user_data: u64) {
        let entry = opcode::PollRemove::new(poll).build().user_data(user_data);
        // SAFETY: a removal has no memory that `push` would want valid.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.expect("the submission queue has entries more than operations");
    }

    /// Puts an operation that is no slot's into the submission queue. There is room: see `Table`.
    ///
    /// # Safety
    /// What `entry` points to must be valid until the operation has ended.
    #[inline]
    pub(super) unsafe fn push_owned(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise is the same.
        let pushed = unsafe { self.uring.submission().push(entry) };
        pushed.expect("the submission queue has entries more than operations on files");
    }

    /// Puts the cancellation of an operation into the submission queue.
    pub(super) fn push_cancellation(&mut self, target: u64) {
        let entry = opcode::AsyncCancel::new(target)
            .build()
            .user_data(CANCELLATION);
        // SAFETY: a cancellation has no memory that `push_owned` would want valid.
        unsafe { self.push_owned(&entry) }
    }

    /// Whether the kernel has taken everything off the submission queue.
    #[inline]
    pub(super) fn is_flushed(&mut self) -> bool {
        self.uring.submission().is_empty()
    }

    /// Entries that the kernel has not taken yet.
    #[inline]
    pub(super) fn unsubmitted(&mut self) -> usize {
        self.uring.submission().len()
    }

    /// Submits everything, in one system call as a rule. What the kernel has no room for stays in the queue for the
    /// next time: it makes room as completions are taken.
    #[inline]
    pub(super) fn flush(&mut self) {
        let submission = self.uring.submission();
        if submission.is_empty() && !submission.taskrun() {
            return;
        }
        drop(submission);
        if let Err(error) = self.enter() {
            tracing::debug!(%error, "io_uring_enter");
        }
    }

    /// As [`flush`](Self::flush).
    ///
    /// # Errors
    /// As io_uring_enter(2): EAGAIN and EBUSY when the kernel has no room.
    pub(super) fn enter(&mut self) -> io::Result<()> {
        loop {
            match self.uring.submitter().submit() {
                // Before SUBMIT_ALL (5.18) the kernel stops after an operation that fails at once.
                Ok(0) => return Ok(()),
                Ok(_) if self.uring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Submits everything and sleeps until something completes or the time is over, in one system call. `for_disk`: an operation on a
    /// file is under way, so the sleep is a wait for I/O, which the kernel counts as such (iowait, pressure stall information). A wait for a peer or a
    /// notification is none, and a kernel from 6.15 on can be told.
    pub(super) fn enter_and_wait(&mut self, timeout: Option<Duration>, for_disk: bool) {
        let quiet = !for_disk && self.can_wait_quietly;
        let result = match timeout {
            None if quiet => {
                let flags = EnterFlags::GETEVENTS.bits() | ENTER_NO_IOWAIT;
                let unsubmitted = self.unsubmitted32();
                let submitter = self.uring.submitter();
                // SAFETY: `enter` wants flags and an argument that fit together: these take none. It submits entries that were pushed,
                // whose memory `push` and `push_owned` were promised.
                unsafe { submitter.enter::<libc::sigset_t>(unsubmitted, 1, flags, None) }
            }
            None => self.uring.submitter().submit_and_wait(1),
            Some(timeout) => {
                let time = Timespec::from(timeout);
                let arguments = SubmitArgs::new().timespec(&time);
                if quiet {
                    let flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
                    let flags = flags.bits() | ENTER_NO_IOWAIT;
                    let unsubmitted = self.unsubmitted32();
                    let submitter = self.uring.submitter();
                    // SAFETY: as above; EXT_ARG takes such arguments, and they and the time live until it returns.
                    unsafe { submitter.enter(unsubmitted, 1, flags, Some(&arguments)) }
                } else {
                    self.uring.submitter().submit_with_args(1, &arguments)
                }
            }
        };
        let Err(error) = result else { return };
        match error.raw_os_error() {
            // The time is over; or a signal came: the caller looks around and waits again.
            Some(libc::ETIME | libc::EINTR) => {}
            // No room to submit all. Completions make some; where none is on its way, time does.
            _ => {
                tracing::debug!(%error, "io_uring_enter to wait");
                std::thread::sleep(Duration::from_millis(1));
                self.run_deferred();
            }
        }
    }

    fn unsubmitted32(&mut self) -> u32 {
        u32::try_from(self.unsubmitted()).expect("no more than entries")
    }

    /// Submits what is left and waits for a completion, for a ring that is going away.
    pub(super) fn enter_for_one(&mut self) -> io::Result<()> {
        match self.uring.submitter().submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

/// The submission entry of an operation. `iovecs` is filled where its memory is scattered.
#[inline]
fn entry(
    kind: &OpKind<RingMemory>,
    file: impl Target,
    registered: &Registered,
    iovecs: &mut Vec<libc::iovec>,
) -> squeue::Entry {
    match *kind {
        OpKind::Read { offset, ref memory } => match memory.contiguous() {
            Some((base, len)) => {
                let len = io_len(len);
                match registered.find(base, len) {
                    Some(index) => file.read_fixed(base.as_ptr(), len, index, offset),
                    None => file.read(base.as_ptr(), len, offset),
                }
            }
            None => {
                fill_iovecs(iovecs, memory);
                file.readv(iovecs, offset)
            }
        },
        OpKind::Write {
            offset,
            ref memory,
            sync,
        } => {
            let flags = if sync { libc::RWF_DSYNC } else { 0 };
            match memory.contiguous() {
                Some((base, len)) => {
                    let len = io_len(len);
                    match registered.find(base, len) {
                        Some(index) => file.write_fixed(base.as_ptr(), len, index, offset, flags),
                        None => file.write(base.as_ptr(), len, offset, flags),
                    }
                }
                None => {
                    fill_iovecs(iovecs, memory);
                    file.writev(iovecs, offset, flags)
                }
            }
        }
        OpKind::Punch { offset, len } => file.fallocate(
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
        ),
        OpKind::ZeroRange { offset, len } => {
            file.fallocate(libc::FALLOC_FL_ZERO_RANGE, offset, len)
        }
        OpKind::Allocate { offset, len } => file.fallocate(0, offset, len),
        OpKind::SyncData => file.sync_data(),
        OpKind::SetLen { len } => file.set_len(len),
        OpKind::Job(_) => unreachable!("jobs go to the pool"),
    }
}

/// The length of one operation; a longer one completes short, and the engine goes on.
pub(super) fn io_len(len: usize) -> u32 {
    u32::try_from(len.min(BYTES_MAX)).expect("BYTES_MAX fits 32 bits")
}

/// A file as a ring knows it: by descriptor or by registered index. (The crate's own trait for this is sealed.)
trait Target {
    fn read(self, base: *mut u8, len: u32, offset: u64) -> squeue::Entry;
    fn read_fixed(self, base: *mut u8, len: u32, index: u16, offset: u64) -> squeue::Entry;
    fn readv(self, iovecs: &[libc::iovec], offset: u64) -> squeue::Entry;
    fn write(self, base: *const u8, len: u32, offset: u64, flags: libc::c_int) -> squeue::Entry;
    fn write_fixed(
        self,
        base: *const u8,
        len: u32,
        index: u16,
        offset: u64,
        flags: libc::c_int,
    ) -> squeue::Entry;
    fn writev(self, iovecs: &[libc::iovec], offset: u64, flags: libc::c_int) -> squeue::Entry;
    fn fallocate(self, mode: libc::c_int, offset: u64, len: u64) -> squeue::Entry;
    fn sync_data(self) -> squeue::Entry;
    fn set_len(self, len: u64) -> squeue::Entry;
}

macro_rules! target {
    ($type:ty) => {
        impl Target for $type {
            #[inline]
            fn read(self, base: *mut u8, len: u32, offset: u64) -> squeue::Entry {
                opcode::Read::new(self, base, len).offset(offset).build()
            }
            #[inline]
            fn read_fixed(self, base: *mut u8, len: u32, index: u16, offset: u64) -> squeue::Entry {
                opcode::ReadFixed::new(self, base, len, index)
                    .offset(offset)
                    .build()
            }
            fn readv(self, iovecs: &[libc::iovec], offset: u64) -> squeue::Entry {
                opcode::Readv::new(self, iovecs.as_ptr(), count(iovecs))
                    .offset(offset)
                    .build()
            }
            #[inline]
            fn write(
                self,
                base: *const u8,
                len: u32,
                offset: u64,
                flags: libc::c_int,
            ) -> squeue::Entry {
                opcode::Write::new(self, base, len)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            #[inline]
            fn write_fixed(
                self,
                base: *const u8,
                len: u32,
                index: u16,
                offset: u64,
                flags: libc::c_int,
            ) -> squeue::Entry {
                opcode::WriteFixed::new(self, base, len, index)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            fn writev(
                self,
                iovecs: &[libc::iovec],
                offset: u64,
                flags: libc::c_int,
            ) -> squeue::Entry {
                opcode::Writev::new(self, iovecs.as_ptr(), count(iovecs))
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            fn fallocate(self, mode: libc::c_int, offset: u64, len: u64) -> squeue::Entry {
                opcode::Fallocate::new(self, len)
                    .offset(offset)
                    .mode(mode)
                    .build()
            }
            fn sync_data(self) -> squeue::Entry {
                opcode::Fsync::new(self).flags(FsyncFlags::DATASYNC).build()
            }
            fn set_len(self, len: u64) -> squeue::Entry {
                opcode::Ftruncate::new(self, len).build()
            }
        }
    };
}

target!(Fd);
target!(Fixed);

fn count(iovecs: &[libc::iovec]) -> u32 {
    u32::try_from(iovecs.len()).expect("no more than PIECES_MAX")
}

#[cfg(test)]
mod tests {
    //! Guards the speed that registering memory is for: operations in it say so to the kernel, and no others do.
    use super::*;
    use crate::Buffer;
    use urus_engine::storage::Memory;

    #[test]
    fn what_lies_in_registered_memory_goes_as_such() {
        let (mut buffers, region) = Buffer::pool(1, 8192);
        let ring = setup::build(4).unwrap();
        setup::enable(&ring, false, false).unwrap();
        let mut registered = Registered::default();
        registered.replace(&ring, vec![region]).unwrap();
        let inside = buffers.remove(0).into_memory();
        let outside = Buffer::new(8192).into_memory();
        let code = |kind: OpKind<RingMemory>| {
            let entry = entry(&kind, Fixed(0), &registered, &mut Vec::new());
            format!("{entry:?}")
        };
        let has = |text: String, code: u8| text.contains(&format!("op_code: {code},"));
        let read = |memory| OpKind::Read { offset: 0, memory };
        let write = |memory| OpKind::Write {
            offset: 0,
            memory,
            sync: true,
        };
        assert!(has(
            code(read(inside.slice(4096, 4096))),
            opcode::ReadFixed::CODE
        ));
        assert!(has(code(write(inside.clone())), opcode::WriteFixed::CODE));
        assert!(has(code(read(outside.clone())), opcode::Read::CODE));
        assert!(has(code(write(outside.clone())), opcode::Write::CODE));
        let both = RingMemory::chain(vec![inside, outside]);
        assert!(has(code(read(both)), opcode::Readv::CODE));
    }
}
