//! The io_uring driver: one ring per queue.
//!
//! * [`setup`]: making a ring with the best the kernel has.
//! * [`slots`]: operations in flight, which own their memory until their completion was seen.
//! * [`ring`]: the two queues and the system call between them; all `unsafe` about them.
//! * [`registered`]: memory whose pages the kernel has looked up once.
//! * [`sockets`]: operations on sockets, for servers.
//! * [`inline`]: buffered writes that are faster without the ring.
//! * this file: the driver's life, its waiting and waking.
//!
//! # Waking
//! A multishot poll on the [`Bell`]'s eventfd is always pending in the ring, so that one `io_uring_enter` waits for
//! I/O, jobs and notifications alike.
//!
//! Once a caller asks for the eventfd, to watch it in its own event loop, that poll is removed and the eventfd is
//! registered with the ring, so that the kernel signals it for completions. (Not both at once: each completion would
//! complete the poll. Nor another eventfd beside the bell's: Linux 6.18 was seen to lose signals of an eventfd
//! that come about inside the writing of another, and it delays them by an RCU grace period anyway.)

mod balance;
mod inline;
mod registered;
mod ring;
pub(crate) mod setup;
mod slots;
mod sockets;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue};
use urus_engine::storage::{Completion, FileId, Op, OpKind, Slot};
use urus_engine::sync::Arc;

use crate::bell::Bell;
use crate::blocking;
use crate::files::FileSet;
use crate::memory::{MemoryRegion, RingMemory};
use crate::offload::{self, Mailbox};
use crate::sockets::{SocketCompletion, Work};

use inline::Inline;
use ring::Ring;
use slots::Slots;
use sockets::Table;

/// `user_data` of the poll on the bell.
const BELL: u64 = u64::MAX;
/// `user_data` of its removal.
const REMOVAL: u64 = u64::MAX - 1;
/// `user_data` of cancellations. Everything else is a slot, or [`Table`]'s.
const CANCELLATION: u64 = u64::MAX - 2;

/// Entries of the submission queue for operations on sockets, at least.
const SOCKET_ENTRIES: u32 = 64;
/// Reads past the page cache that go to the kernel together, before they are told to start: a disk that waits for the last of a long batch
/// is idle meanwhile. (At depth 32, 4 and 6 did 1.15 times as many reads as whole batches, for no more CPU time; one by one costs
/// a fifth more of it.)
const DIRECT_READS: usize = 4;
/// How long a wait lasts while the kernel has no room for an operation.
const CROWDED: Duration = Duration::from_millis(1);

pub(crate) struct Uring {
    /// Before `slots`: the ring is closed before the memory goes. (`drop` has emptied it by then.)
    ring: Ring,
    slots: Slots,
    /// Where the ring serves sockets too. (As `slots`, gone after the ring.)
    sockets: Option<Table>,
    inline: Inline,
    files: Arc<FileSet>,
    bell: Arc<Bell>,
    mailbox: Arc<Mailbox>,
    /// Completions that did not come through the ring.
    ready: VecDeque<Completion>,
    /// Whether the poll on the bell is pending (or about to be submitted).
    listening: bool,
    /// Whether the caller watches the bell's eventfd, which is then registered with the ring and not polled by it.
    watched: bool,
    /// Operations taken whose completion was not handed out yet.
    in_flight: usize,
    depth: usize,
}

impl Uring {
    pub(crate) fn open(
        files: Arc<FileSet>,
        depth: u32,
        sockets: bool,
        build: fn(u32) -> io::Result<IoUring>,
    ) -> io::Result<Self> {
        // Two entries more, for the poll on the bell and its removal.
        let more = 2 + if sockets { SOCKET_ENTRIES } else { 0 };
        let ring = Ring::new(build((depth + more).next_power_of_two())?, &files, sockets)?;
        let more = usize::try_from(more).expect("fits");
        let depth = usize::try_from(depth)
            .expect("fits")
            .min(ring.capacity() - more);
        let share = ring.capacity() - depth - 2;
        let bell = Arc::new(Bell::new()?);
        let mut uring = Self {
            ring,
            slots: Slots::new(depth),
            sockets: sockets.then(|| Table::new(share)),
            inline: Inline::new(depth),
            files,
            mailbox: Mailbox::new(Arc::clone(&bell)),
            bell,
            ready: VecDeque::with_capacity(depth),
            listening: false,
            watched: false,
            in_flight: 0,
            depth,
        };
        // Also finds out whether io_uring_enter is allowed.
        uring.listen();
        uring.ring.enter()?;
        Ok(uring)
    }

    pub(crate) fn register_memory(&mut self, regions: Vec<MemoryRegion>) -> io::Result<()> {
        self.ring.register_memory(regions)
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
            kind => {
                let op = Op {
                    file: op.file,
                    kind,
                };
                self.take(op, slot);
            }
        }
        Ok(())
    }

    /// Reads what the page cache has, for an engine that has nothing else to start.
    #[inline]
    pub(crate) fn read_now(&mut self, file: FileId, offset: u64, memory: &RingMemory) -> bool {
        // Nobody waits in the kernel for a caller that watches the eventfd: what this thread does would have to be announced.
        !self.watched && self.inline.read_now(file, offset, memory, &self.files)
    }

    #[inline]
    fn take(&mut self, op: Op<RingMemory>, slot: Slot) {
        if !matches!(op.kind, OpKind::Read { .. }) {
            self.give_lonely_to_ring();
            if let Some(op) = self.inline.take(op, slot, &self.files, self.in_flight) {
                self.ring.push(&mut self.slots, op, slot, &self.files);
            }
            return;
        }
        // As in `read_now`.
        let is_alone = !self.watched && self.inline.is_empty() && self.ring.is_flushed();
        let op = match is_alone {
            true => self.inline.take_read(op, slot, &self.files),
            false => {
                self.give_lonely_to_ring();
                Some(op)
            }
        };
        if let Some(op) = op {
            let is_direct = self.files.file(op.file).is_direct();
            self.ring.push(&mut self.slots, op, slot, &self.files);
            if is_direct && self.ring.unsubmitted() >= DIRECT_READS {
                self.ring.flush();
            }
        }
    }

    #[inline]
    fn give_lonely_to_ring(&mut self) {
        if let Some((op, slot)) = self.inline.take_lonely() {
            self.ring.push(&mut self.slots, op, slot, &self.files);
        }
    }

    #[inline]
    pub(crate) fn kick(&mut self) {
        self.start();
        if self.watched && (!self.ready.is_empty() || self.has_socket_completions()) {
            // The kernel knows nothing of these.
            self.bell.signal();
        }
    }

    /// Starts everything taken: first what the kernel does meanwhile, then what this thread does.
    #[inline]
    fn start(&mut self) {
        // What waits for a peer as a rule goes along with other work, or else with the system call that sleeps. (A caller that watches
        // the eventfd makes none.)
        let urgent = self.sockets.as_ref().is_some_and(Table::is_urgent);
        if urgent || self.watched || !self.ring.is_flushed() {
            self.push_sockets();
        }
        if self.ring.is_flushed() {
            let read = self.inline.try_lonely(&self.files);
            self.ready.extend(read);
        }
        self.give_lonely_to_ring();
        self.ring.flush();
        if self.inline.is_empty() {
            return;
        }
        let (ring, slots, files) = (&mut self.ring, &mut self.slots, &self.files);
        self.inline.run(files, &mut self.ready, |op, slot| {
            ring.push(slots, op, slot, files);
        });
        self.ring.flush();
    }

    #[inline]
    pub(crate) fn complete(&mut self) -> Option<Completion> {
        if !self.mailbox.is_empty() {
            self.mailbox.collect(&mut self.ready);
        }
        let completion = match self.ready.pop_front() {
            Some(completion) => completion,
            None => self.reap()?,
        };
        self.in_flight -= 1;
        Some(completion)
    }

    pub(crate) fn wait(&mut self, mut timeout: Option<Duration>) {
        if !self.inline.is_empty() {
            self.start();
        }
        if !self.push_sockets() {
            timeout = Some(timeout.map_or(CROWDED, |timeout| timeout.min(CROWDED)));
        }
        let idle = !self.bell.is_rung()
            && self.ready.is_empty()
            && self.mailbox.is_empty()
            && !self.has_socket_completions()
            && !self.ring.has_completions();
        match (idle, self.watched) {
            (false, _) => self.ring.flush(),
            (true, false) => {
                self.listen();
                let for_disk = self.slots.busy() > 0;
                self.ring.enter_and_wait(timeout, for_disk);
            }
            (true, true) => {
                self.ring.flush();
                if self.ring.has_deferred() {
                    self.ring.run_deferred();
                }
                if !self.ring.has_completions() {
                    self.bell.sleep(timeout);
                }
            }
        }
        if self.watched || self.bell.is_rung() {
            self.bell.silence();
        }
    }

    pub(crate) fn event_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        if !self.watched {
            self.stop_listening()?;
            self.ring
                .register_event_fd(self.bell.event_fd().as_raw_fd())?;
            self.watched = true;
            // Completions from before the registration have signalled nobody.
            self.bell.signal();
        }
        Ok(self.bell.event_fd())
    }

    pub(crate) fn consume_event(&mut self) {
        self.bell.silence();
    }

    /// The next completion from the ring. When it returns `None`, none is there and none waits for the kernel to be
    /// entered: a later one signals the eventfd.
    #[inline]
    fn reap(&mut self) -> Option<Completion> {
        let mut entered = false;
        loop {
            while let Some(entry) = self.ring.pop() {
                if let Some(completion) = self.finish(&entry) {
                    return Some(completion);
                }
            }
            // Once: the kernel may set the flag for deferred work just after that work was run, and nothing clears
            // it until there is some again. What is put off after the kernel was entered signals anew.
            if entered || !self.ring.has_deferred() || !self.ring.run_deferred() {
                return None;
            }
            entered = true;
            if self.watched {
                // What was deferred signalled when it was put off, and signals again now that it is completed; the
                // caller is just taking it, and would be woken once more for nothing.
                self.bell.forget_signals();
            }
        }
    }

    /// Lets go of what the kernel has ended; returns nothing for what was the driver's own.
    #[inline]
    fn finish(&mut self, entry: &cqueue::Entry) -> Option<Completion> {
        if Table::owns(entry.user_data()) {
            if let Some(sockets) = &mut self.sockets {
                sockets.finish(entry);
            }
            return None;
        }
        if entry.user_data() < CANCELLATION {
            return Some(self.slots.finish(entry, &self.files));
        }
        if entry.user_data() == BELL {
            // The rings themselves stay to be consumed by a wait.
            self.listening = cqueue::more(entry.flags());
            let result = entry.result();
            if result < 0 && result != -libc::ECANCELED {
                let error = io::Error::from_raw_os_error(-result);
                tracing::error!(%error, "the poll on a queue's eventfd failed; it is started again");
            }
        }
        None
    }

    /// Puts what is to be done with sockets into the submission queue; false when not all of it found room.
    #[inline]
    fn push_sockets(&mut self) -> bool {
        match &mut self.sockets {
            Some(sockets) if sockets.has_pending() => {
                sockets.push_pending(&mut self.ring);
                !sockets.has_pending()
            }
            _ => true,
        }
    }

    #[inline]
    fn has_socket_completions(&self) -> bool {
        self.sockets.as_ref().is_some_and(Table::has_done)
    }

    pub(crate) fn serves_sockets(&self) -> bool {
        self.sockets.is_some()
    }

    pub(crate) fn submit_socket(&mut self, token: u64, socket: Arc<OwnedFd>, work: Work) {
        if let Some(sockets) = &mut self.sockets {
            sockets.submit(token, socket, work);
        }
    }

    pub(crate) fn cancel_socket(&mut self, token: u64) {
        if let Some(sockets) = &mut self.sockets {
            sockets.cancel(|other| other == token);
        }
    }

    /// The next completion of an operation on a socket; what else completes on the way waits for [`complete`](Self::complete).
    #[inline]
    pub(crate) fn socket_completion(&mut self) -> Option<SocketCompletion> {
        loop {
            if let Some(done) = self.sockets.as_mut()?.pop_done() {
                return Some(done);
            }
            let entry = self.ring.pop()?;
            let completion = self.finish(&entry);
            self.ready.extend(completion);
        }
    }

    /// Operations that the kernel works on.
    fn busy(&self) -> usize {
        self.slots.busy() + self.sockets.as_ref().map_or(0, Table::busy)
    }

    /// Ends the operations on sockets, which may take for ever by themselves, and waits for a completion.
    fn end_sockets(&mut self) -> io::Result<()> {
        if let Some(sockets) = &mut self.sockets
            && sockets.busy() > 0
        {
            sockets.cancel(|_| true);
            sockets.push_pending(&mut self.ring);
        }
        self.ring.enter_for_one()
    }

    /// Makes sure that the next entering of the kernel starts the poll on the bell, if it is not pending.
    fn listen(&mut self) {
        if !self.listening {
            self.ring.push_poll(self.bell.event_fd(), BELL);
            self.listening = true;
        }
    }

    /// Ends the poll on the bell.
    fn stop_listening(&mut self) -> io::Result<()> {
        self.ring.flush();
        if self.listening {
            self.ring.push_poll_removal(BELL, REMOVAL);
        }
        while self.listening {
            self.ring.enter_for_one()?;
            while let Some(entry) = self.ring.pop() {
                if entry.user_data() == REMOVAL && entry.result() == -libc::EALREADY {
                    // It was just completing, to go on after.
                    self.ring.push_poll_removal(BELL, REMOVAL);
                }
                let completion = self.finish(&entry);
                self.ready.extend(completion);
            }
        }
        Ok(())
    }
}

impl Drop for Uring {
    /// Waits until the kernel has let go of every operation's memory.
    fn drop(&mut self) {
        self.start();
        let mut failures = 0;
        while self.busy() > 0 {
            if let Some(entry) = self.ring.pop() {
                drop(self.finish(&entry));
                continue;
            }
            if let Err(error) = self.end_sockets() {
                failures += 1;
                if failures > 1000 {
                    // Better leaked than written to by the kernel after it was freed.
                    tracing::error!(%error, operations = self.busy(), "cannot wait for operations; leaking their memory");
                    std::mem::forget(std::mem::replace(&mut self.slots, Slots::new(0)));
                    std::mem::forget(self.sockets.take());
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // Closing a ring lets go of its files some time later; unregistering does it now.
        self.ring.unregister_files();
    }
}
