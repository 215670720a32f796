//! A queue: requests in, replies out, on one thread.
//!
//! A request whose clusters are all mapped as they have to be (a *hit*) goes straight to the ring: no task, no lock, no
//! allocation. Everything else becomes a task of this queue. Either way it ends with exactly one reply.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use slab::Slab;

use crate::error::{Error, Result};
use crate::hit::Direct;
use crate::pins::QueuePins;
use crate::planted::{self, Bug};
use crate::request::{Extent, Reply, Request, RequestKind};
use crate::shared::Shared;
use crate::storage::{Memory, Storage};
use crate::sync::{Arc, Ordering};
use crate::worker::Worker;
use crate::zero::Clearing;

/// A request in flight that its operation alone does not keep.
pub(crate) struct Pending<M> {
    token: u64,
    memory: Option<M>,
    /// Operations of a hit that are not over; a task counts as one.
    pub(crate) remaining: u32,
    /// Apart, as a hit's is never there: this is moved with each request.
    error: Option<Box<Error>>,
    extents: Vec<Extent>,
    /// What [`QueuePins::begin`] returned.
    epoch: u64,
}

pub(crate) struct Core<S: Storage> {
    pub(crate) worker: Rc<Worker<S>>,
    pins: QueuePins,
    /// Requests of several parts, and tasks.
    pub(crate) pending: RefCell<Slab<Pending<S::Memory>>>,
    replies: RefCell<VecDeque<Reply<S::Memory>>>,
    /// Requests that wait for the gate to open.
    held: RefCell<VecDeque<Request<S::Memory>>>,
    /// A hit to be read that came when nothing else waited to be started.
    pub(crate) alone: RefCell<Option<Direct<S::Memory>>>,
    /// Requests taken whose reply was not handed out yet.
    in_flight: Cell<usize>,
    /// O23: completed changes outlive the process.
    outlives: Cell<bool>,
}

/// One queue of a device: it belongs to the thread that made it. Any number of them work side by side.
///
/// Dropping a queue waits for what is in flight; its replies are lost, the caller's memory is not.
pub struct Queue<S: Storage> {
    core: Rc<Core<S>>,
    depth: usize,
}

impl<S: Storage> Queue<S> {
    /// A queue of at most `depth` requests in flight.
    pub fn new(shared: Arc<Shared>, storage: S, depth: usize) -> Self {
        let worker = Worker::new(Arc::clone(&shared), storage);
        let pins = QueuePins::new(
            Arc::clone(&shared.pins),
            Arc::clone(worker.reactor().inbox()),
        );
        let core = Core {
            worker,
            pins,
            pending: RefCell::new(Slab::with_capacity(depth)),
            replies: RefCell::new(VecDeque::with_capacity(depth)),
            held: RefCell::new(VecDeque::new()),
            alone: RefCell::new(None),
            in_flight: Cell::new(0),
            outlives: Cell::new(false),
        };
        Self {
            core: Rc::new(core),
            depth,
        }
    }

    /// Whether writes and write-zeroes submitted from now on are, once completed, still there when this process is killed, flushed or
    /// not (O23). They may still be lost with the power.
    pub fn outlive_process(&mut self, outlive: bool) {
        self.core.outlives.set(outlive);
    }

    /// Takes a request; its operations start at the next [`kick`](Self::kick), [`complete`](Self::complete) or
    /// [`wait`](Self::wait). An invalid request is taken too, and answered with its error.
    ///
    /// # Errors
    /// The request itself, when `depth` requests are in flight.
    pub fn submit(&mut self, request: Request<S::Memory>) -> Result<(), Request<S::Memory>> {
        if self.in_flight() >= self.depth {
            return Err(request);
        }
        let core = &self.core;
        core.in_flight.set(core.in_flight.get() + 1);
        core.begin(request);
        Ok(())
    }

    /// Starts everything submitted: one system call for all of it.
    pub fn kick(&mut self) {
        self.core.start_alone();
        self.core.worker.reactor().kick();
    }

    /// The next reply, without waiting. Does the queue's work: to be called until it returns `None`, whenever
    /// the storage's notifier or a completion says so.
    pub fn complete(&mut self) -> Option<Reply<S::Memory>> {
        if let Some(reply) = self.core.take_reply() {
            return Some(reply);
        }
        self.core.start_alone();
        if let Some(reply) = self.core.take_reply() {
            return Some(reply);
        }
        loop {
            self.turn();
            if let Some(reply) = self.core.take_reply() {
                return Some(reply);
            }
            // From here on whoever wakes the queue notifies its thread.
            if self.core.worker.reactor().prepare_sleep() {
                return None;
            }
        }
    }

    fn turn(&mut self) {
        let core = &self.core;
        let shared = &core.worker.shared;
        let look = || {
            core.worker
                .reactor()
                .turn(|direct, result| core.direct_done(direct, result));
        };
        let is_held = || {
            if core.held.borrow().is_empty() {
                return false;
            }
            if shared.closed.load(Ordering::SeqCst) {
                core.reject_held();
                return false;
            }
            true
        };
        shared.gate.turn(look, is_held, || core.release_held());
    }

    /// Sleeps until there may be a reply, or the time is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        if !self.core.replies.borrow().is_empty() {
            return;
        }
        self.core.start_alone();
        if !self.core.replies.borrow().is_empty() {
            // It was alone, so nothing else waits to be started.
            return;
        }
        self.core.worker.reactor().kick();
        self.core.worker.reactor().wait(timeout);
    }

    /// Requests taken whose reply was not handed out yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.in_flight.get()
    }

    /// Whether nothing is under way: then [`complete`](Self::complete) has nothing to do or to find, before something is submitted.
    #[must_use]
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.core.in_flight.get() == 0 && self.core.worker.reactor().is_idle()
    }

    /// Whether a reply waits to be taken.
    #[must_use]
    pub fn has_reply(&self) -> bool {
        !self.core.replies.borrow().is_empty()
    }

    /// The device's shared state.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.core.worker.shared
    }

    /// Works with the queue's storage (its eventfd, its name).
    pub fn with_storage<R>(&mut self, f: impl FnOnce(&mut S) -> R) -> R {
        self.core.worker.reactor().with_storage(f)
    }
}

impl<S: Storage> Drop for Queue<S> {
    fn drop(&mut self) {
        self.core.reject_held();
        self.core.join_alone();
        while self.core.in_flight.get() > self.core.replies.borrow().len()
            || self.core.worker.reactor().task_count() > 0
        {
            let core = Rc::clone(&self.core);
            if !core
                .worker
                .reactor()
                .turn(|direct, result| core.direct_done(direct, result))
            {
                core.worker.reactor().wait(None);
            }
        }
        self.core.worker.release_runs();
    }
}

impl<S: Storage> Core<S> {
    fn begin(self: &Rc<Self>, request: Request<S::Memory>) {
        self.join_alone();
        let shared = &self.worker.shared;
        let Some(epoch) = shared.gate.enter(&self.pins) else {
            if shared.closed.load(Ordering::SeqCst) {
                self.reject(request);
            } else {
                self.held.borrow_mut().push_back(request);
            }
            return;
        };
        let Request { token, kind } = request;
        match kind {
            RequestKind::Read { offset, memory } => self.begin_read(token, epoch, offset, memory),
            RequestKind::Write {
                offset,
                memory,
                fua,
            } => self.begin_write(token, epoch, offset, memory, fua),
            RequestKind::Discard { offset, len } => {
                self.begin_clear(token, epoch, (offset, len), Clearing::Discard, false);
            }
            RequestKind::WriteZeroes {
                offset,
                len,
                unmap,
                fua,
            } => {
                let how = if unmap {
                    Clearing::Unmap
                } else {
                    Clearing::Keep
                };
                self.begin_clear(token, epoch, (offset, len), how, fua);
            }
            RequestKind::Flush => {
                let request = self.insert(token, epoch, None);
                self.spawn(request, |core| async move { core.flush().await });
            }
            RequestKind::BlockStatus { offset, len } => {
                let request = self.insert(token, epoch, None);
                self.spawn(request, move |core| async move {
                    core.worker.check_range(offset, len)?;
                    let extents = core.worker.block_status(offset, len).await?;
                    core.pending.borrow_mut()[request].extents = extents;
                    Ok(())
                });
            }
        }
    }

    pub(crate) fn insert(&self, token: u64, epoch: u64, memory: Option<S::Memory>) -> usize {
        self.pending.borrow_mut().insert(Pending {
            token,
            memory,
            remaining: 1,
            error: None,
            extents: Vec::new(),
            epoch,
        })
    }

    /// Runs a request as a task.
    pub(crate) fn spawn<F>(
        self: &Rc<Self>,
        request: usize,
        work: impl FnOnce(Rc<Self>) -> F + 'static,
    ) where
        F: Future<Output = Result<()>> + 'static,
    {
        let core = Rc::clone(self);
        self.worker.reactor().spawn(async move {
            let result = work(Rc::clone(&core)).await;
            core.part_done(request, result.err().map(Box::new));
        });
    }

    /// A request that nothing else was kept of has ended: the kernel is done with all that it submitted.
    #[inline]
    pub(crate) fn reply(
        &self,
        token: u64,
        epoch: u64,
        result: Result<(), Box<Error>>,
        memory: Option<S::Memory>,
    ) {
        self.pins.end(epoch);
        self.replies.borrow_mut().push_back(Reply {
            token,
            result,
            memory,
            extents: Vec::new(),
        });
    }

    #[inline]
    fn take_reply(&self) -> Option<Reply<S::Memory>> {
        let reply = self.replies.borrow_mut().pop_front()?;
        self.in_flight.set(self.in_flight.get() - 1);
        Some(reply)
    }

    /// One part of a request has ended; with the last one the request has.
    pub(crate) fn part_done(&self, request: usize, error: Option<Box<Error>>) {
        let mut pending = self.pending.borrow_mut();
        let state = &mut pending[request];
        if let Some(error) = error {
            state.error.get_or_insert(error);
        }
        state.remaining -= 1;
        if state.remaining == 0 {
            let ended = pending.remove(request);
            drop(pending);
            self.pins.end(ended.epoch);
            self.replies.borrow_mut().push_back(Reply {
                token: ended.token,
                result: ended.error.map_or(Ok(()), Err),
                memory: ended.memory,
                extents: ended.extents,
            });
        }
    }

    fn begin_write(
        self: &Rc<Self>,
        token: u64,
        epoch: u64,
        offset: u64,
        memory: S::Memory,
        fua: bool,
    ) {
        let len = memory.len();
        let shared = &self.worker.shared;
        if let Err(error) = shared
            .check_writable()
            .and_then(|()| self.worker.check_range(offset, len as u64))
        {
            return self.reply(token, epoch, Err(Box::new(error)), Some(memory));
        }
        shared.observe(offset, len as u64);
        let outlives = self.outlives();
        let memory = if fua || self.worker.image.serialize_writes.load(Ordering::SeqCst) {
            memory
        } else {
            match self.write_hit((token, epoch), offset, memory, outlives) {
                Some(memory) => memory,
                None => return,
            }
        };
        let request = self.insert(token, epoch, Some(memory.clone()));
        let align = self.worker.files.data_unit(self.worker.image.file());
        let unaligned = !offset.is_multiple_of(align) || !(len as u64).is_multiple_of(align);
        self.spawn(request, move |core| async move {
            if unaligned {
                core.serialize_writes(request).await?;
            }
            core.worker.write_guest(offset, memory).await?;
            let fua = fua && !planted::is(Bug::FuaWithoutCommit);
            core.secure(offset, len as u64, fua, outlives).await
        });
    }

    fn begin_clear(
        self: &Rc<Self>,
        token: u64,
        epoch: u64,
        range: (u64, u64),
        how: Clearing,
        fua: bool,
    ) {
        let request = self.insert(token, epoch, None);
        let shared = &self.worker.shared;
        if let Err(error) = shared
            .check_writable()
            .and_then(|()| self.worker.check_range(range.0, range.1))
        {
            return self.part_done(request, Some(Box::new(error)));
        }
        shared.observe(range.0, range.1);
        let align = self.worker.files.data_unit(self.worker.image.file());
        let unaligned = how != Clearing::Discard
            && (!range.0.is_multiple_of(align) || !range.1.is_multiple_of(align));
        let outlives = self.outlives();
        self.spawn(request, move |core| async move {
            if unaligned {
                core.serialize_writes(request).await?;
            }
            core.worker.clear_guest(range.0, range.1, how).await?;
            if how == Clearing::Discard {
                // A hint, which may come to nothing.
                return Ok(());
            }
            core.secure(range.0, range.1, fua, outlives).await
        });
    }

    /// Whether a request that begins now is to outlive the process.
    fn outlives(&self) -> bool {
        self.outlives.get() && !planted::is(Bug::OutlivedByNothing)
    }

    /// What a change that has been made still needs before it completes: a commit for FUA (O16), and for what is to
    /// outlive the process where its mapping is in memory alone (O23).
    async fn secure(&self, offset: u64, len: u64, fua: bool, outlives: bool) -> Result<()> {
        if fua || outlives && !self.worker.image.is_settled(offset, len) {
            self.flush().await
        } else {
            Ok(())
        }
    }

    /// Everything whose completion was seen before is durable afterwards (O16, O17: the maintenance executor
    /// issues the barrier).
    async fn flush(&self) -> Result<()> {
        let shared = &self.worker.shared;
        if shared.read_only() {
            return Ok(());
        }
        shared
            .request_flush()
            .receive()
            .await
            .unwrap_or(Err(Error::Closed))
    }

    /// O18: before the first write that is smaller than the file's alignment, every write in flight that took
    /// no lock must end, and no new one may begin.
    async fn serialize_writes(&self, request: usize) -> Result<()> {
        let shared = &self.worker.shared;
        self.worker
            .image
            .serialize_writes
            .store(true, Ordering::SeqCst);
        // The pin moves past the mark, without a gap, so that this request does not wait for itself.
        let mark = shared.pins.mark();
        let moved = self.pins.begin();
        let before = std::mem::replace(&mut self.pending.borrow_mut()[request].epoch, moved);
        self.pins.end(before);
        shared
            .wait_for_pins(mark)
            .receive()
            .await
            .ok_or(Error::Closed)
    }

    fn release_held(self: &Rc<Self>) {
        let held = std::mem::take(&mut *self.held.borrow_mut());
        for request in held {
            self.begin(request);
        }
        self.start_alone();
    }

    fn reject_held(&self) {
        let held = std::mem::take(&mut *self.held.borrow_mut());
        for request in held {
            self.reject(request);
        }
    }

    fn reject(&self, request: Request<S::Memory>) {
        let memory = match request.kind {
            RequestKind::Read { memory, .. } | RequestKind::Write { memory, .. } => Some(memory),
            _ => None,
        };
        let reply = Reply {
            token: request.token,
            result: Err(Box::new(Error::Closed)),
            memory,
            extents: Vec::new(),
        };
        self.replies.borrow_mut().push_back(reply);
    }
}
