//! The io_uring driver: one ring per queue.
//!
//! * [`setup`]: making a ring with the best the kernel has.
//! * [`slots`]: operations in flight, which own their memory until their completion was seen.
//! * [`ring`]: the two queues and the system call between them; all `unsafe` about them.
//! * this file: the driver's life, its waiting and waking.
//!
//! # Waking
//! A multishot poll on the [`Bell`]'s eventfd is always pending in the ring, so that one `io_uring_enter` waits for
//! I/O, jobs and notifications alike. An eventfd for the caller's event loop is another one, registered with the ring:
//! the kernel signals it for each completion, that of the poll included. (The bell's own could not be: each
//! completion would ring it, and each ring complete the poll.)

mod ring;
pub(crate) mod setup;
mod slots;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue};
use rustix::event::EventfdFlags;
use urus_engine::storage::{Completion, Op, OpKind, Slot};
use urus_engine::sync::Arc;

use crate::bell::{self, Bell};
use crate::blocking;
use crate::files::FileSet;
use crate::memory::RingMemory;
use crate::offload::{self, Mailbox};

use ring::Ring;
use slots::Slots;

/// `user_data` of the poll on the bell; everything else is a slot.
const BELL: u64 = u64::MAX;

pub(crate) struct Uring {
    /// Before `slots`: the ring is closed before the memory goes. (`drop` has emptied it by then.)
    ring: Ring,
    slots: Slots,
    files: Arc<FileSet>,
    bell: Arc<Bell>,
    mailbox: Arc<Mailbox>,
    /// Completions that did not come through the ring.
    ready: VecDeque<Completion>,
    /// Whether the poll on the bell is pending (or about to be submitted).
    listening: bool,
    /// The eventfd for the caller's event loop, once asked for.
    event: Option<OwnedFd>,
    /// Operations taken whose completion was not handed out yet.
    in_flight: usize,
    depth: usize,
}

impl Uring {
    pub(crate) fn open(
        files: Arc<FileSet>,
        depth: u32,
        build: fn(u32) -> io::Result<IoUring>,
    ) -> io::Result<Self> {
        // One entry more, for the poll on the bell.
        let ring = Ring::new(build((depth + 1).next_power_of_two())?, &files)?;
        let depth = usize::try_from(depth)
            .expect("fits")
            .min(ring.capacity() - 1);
        let bell = Arc::new(Bell::new()?);
        let mut uring = Self {
            ring,
            slots: Slots::new(depth),
            files,
            mailbox: Mailbox::new(Arc::clone(&bell)),
            bell,
            ready: VecDeque::with_capacity(depth),
            listening: false,
            event: None,
            in_flight: 0,
            depth,
        };
        // Also finds out whether io_uring_enter is allowed.
        uring.listen();
        uring.ring.enter()?;
        Ok(uring)
    }

    pub(crate) fn files(&self) -> &FileSet {
        &self.files
    }

    pub(crate) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    #[inline]
    pub(crate) fn submit(&mut self, op: Op<RingMemory>, slot: Slot) -> Result<(), Op<RingMemory>> {
        if self.in_flight == self.depth {
            return Err(op);
        }
        self.in_flight += 1;
        match op.kind {
            OpKind::Job(job) => offload::submit(job, slot, &self.mailbox),
            OpKind::SetLen { len } if !self.ring.has_ftruncate() => {
                let result = blocking::set_len(&self.files, op.file, len);
                self.ready.push_back(Completion { slot, result });
            }
            kind => self.ring.push(
                &mut self.slots,
                Op {
                    file: op.file,
                    kind,
                },
                slot,
                &self.files,
            ),
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn kick(&mut self) {
        if self.event.is_some() {
            self.announce();
        }
        self.ring.flush();
    }

    #[inline]
    pub(crate) fn complete(&mut self) -> Option<Completion> {
        if !self.mailbox.is_empty() {
            self.mailbox.collect(&mut self.ready);
        }
        let completion = match self.ready.pop_front() {
            Some(completion) => Some(completion),
            None => self.reap(),
        };
        if completion.is_some() {
            self.in_flight -= 1;
        } else if self.event.is_some() {
            // The caller may go to sleep on its eventfd now, which hears the bell only through the poll.
            self.relisten();
        }
        completion
    }

    pub(crate) fn wait(&mut self, timeout: Option<Duration>) {
        if self.bell.is_rung()
            || !self.ready.is_empty()
            || !self.mailbox.is_empty()
            || self.ring.has_completions()
        {
            self.ring.flush();
        } else {
            self.listen();
            self.ring.enter_and_wait(timeout);
        }
        if self.bell.is_rung() {
            self.bell.silence();
        }
    }

    pub(crate) fn event_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        if self.event.is_none() {
            let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            self.ring.register_event_fd(event.as_raw_fd())?;
            // Completions and rings from before the registration have signalled nobody.
            bell::signal(event.as_fd());
            self.event = Some(event);
            self.relisten();
        }
        Ok(self.event.as_ref().expect("made above").as_fd())
    }

    pub(crate) fn consume_event(&mut self) {
        if let Some(event) = &self.event {
            bell::drain(event.as_fd());
        }
        if self.bell.is_rung() {
            self.bell.silence();
        }
    }

    /// The next completion from the ring. When it returns `None`, none is there and none waits for the kernel to be
    /// entered: a later one signals the eventfd.
    #[inline]
    fn reap(&mut self) -> Option<Completion> {
        let mut entered = false;
        loop {
            while let Some(entry) = self.ring.pop() {
                if entry.user_data() == BELL {
                    self.heard(&entry);
                } else {
                    return Some(self.slots.finish(&entry, &self.files));
                }
            }
            if entered || !self.ring.has_deferred() {
                return None;
            }
            self.ring.run_deferred();
            entered = true;
        }
    }

    /// Takes note of a completion of the poll on the bell. The rings themselves stay to be consumed by a wait.
    fn heard(&mut self, entry: &cqueue::Entry) {
        if entry.result() < 0 {
            let error = io::Error::from_raw_os_error(-entry.result());
            tracing::error!(%error, "the poll on a queue's eventfd failed; it is started again");
        }
        self.listening = cqueue::more(entry.flags());
    }

    /// Makes sure that the next entering of the kernel starts the poll on the bell, if it is not pending.
    fn listen(&mut self) {
        if !self.listening {
            self.ring.push_poll(self.bell.event_fd(), BELL);
            self.listening = true;
        }
    }

    /// Likewise, and enters the kernel for it.
    fn relisten(&mut self) {
        if !self.listening {
            self.listen();
            self.ring.flush();
        }
    }

    /// Signals the caller's eventfd for completions that the kernel knows nothing of.
    #[cold]
    fn announce(&mut self) {
        if let Some(event) = &self.event
            && !self.ready.is_empty()
        {
            bell::signal(event.as_fd());
        }
    }
}

impl Drop for Uring {
    /// Waits until the kernel has let go of every operation's memory.
    fn drop(&mut self) {
        let mut failures = 0;
        while self.slots.busy() > 0 {
            if let Some(entry) = self.ring.pop() {
                if entry.user_data() != BELL {
                    drop(self.slots.finish(&entry, &self.files));
                }
                continue;
            }
            if let Err(error) = self.ring.enter_for_one() {
                failures += 1;
                if failures > 1000 {
                    // Better leaked than written to by the kernel after it was freed.
                    tracing::error!(%error, operations = self.slots.busy(), "cannot wait for operations; leaking their memory");
                    std::mem::forget(std::mem::replace(&mut self.slots, Slots::new(0)));
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // Closing a ring lets go of its files some time later; unregistering does it now.
        self.ring.unregister_files();
    }
}
