//! A queue: requests in, replies out, on one thread.
//!
//! A request whose clusters are all mapped as they have to be (a *hit*) goes straight to the ring: no task, no lock, no
//! allocation. Everything else becomes a task of this queue. Either way it ends with exactly one reply.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use slab::Slab;
use urus_format::L2Entry;

use crate::error::{Error, Result};
use crate::limits;
use crate::pins::QueuePins;
use crate::planted::{self, Bug};
use crate::request::{Extent, Reply, Request, RequestKind};
use crate::resolve::{LayerEntry, Piece};
use crate::shared::{LayerKind, Shared};
use crate::storage::{FileId, IMAGE, Memory, Op, OpKind, Storage};
use crate::sync::{Arc, Ordering};
use crate::to_usize;
use crate::worker::{Direct, Worker, interrupted};
use crate::write::writable_in_place;
use crate::zero::Clearing;

/// A request in flight.
struct Pending<M> {
    token: u64,
    memory: Option<M>,
    /// Operations of a hit that are not over; a task counts as one.
    remaining: u32,
    /// Apart, as a hit's is never there: this is moved with each request.
    error: Option<Box<Error>>,
    extents: Vec<Extent>,
    /// What [`QueuePins::begin`] returned.
    epoch: u64,
}

/// A part of a hit: one operation on adjacent bytes of one file.
#[derive(Clone, Copy)]
struct Part {
    file: FileId,
    host: u64,
    start: usize,
    len: usize,
}

/// Parts of a hit, without allocation.
struct Parts {
    parts: [Part; limits::DIRECT_PIECES],
    count: usize,
}

impl Parts {
    fn new() -> Self {
        Self {
            parts: [Part {
                file: IMAGE,
                host: 0,
                start: 0,
                len: 0,
            }; limits::DIRECT_PIECES],
            count: 0,
        }
    }

    /// Adds a part, joined to the last where both are adjacent; `false` when there are too many.
    fn push(&mut self, part: Part) -> bool {
        if let Some(last) = self.count.checked_sub(1).map(|last| &mut self.parts[last]) {
            let adjacent = last.file == part.file
                && last.host + last.len as u64 == part.host
                && last.start + last.len == part.start;
            if adjacent {
                last.len += part.len;
                return true;
            }
        }
        if self.count == self.parts.len() {
            return false;
        }
        self.parts[self.count] = part;
        self.count += 1;
        true
    }

    fn as_slice(&self) -> &[Part] {
        &self.parts[..self.count]
    }
}

struct Core<S: Storage> {
    worker: Rc<Worker<S>>,
    pins: QueuePins,
    pending: RefCell<Slab<Pending<S::Memory>>>,
    replies: RefCell<VecDeque<Reply<S::Memory>>>,
    /// Requests that wait for the gate to open.
    held: RefCell<VecDeque<Request<S::Memory>>>,
    held_count: Cell<usize>,
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
        let pins = QueuePins::new(Arc::clone(&shared.pins), Arc::clone(worker.reactor.inbox()));
        let core = Core {
            worker,
            pins,
            pending: RefCell::new(Slab::with_capacity(depth)),
            replies: RefCell::new(VecDeque::with_capacity(depth)),
            held: RefCell::new(VecDeque::new()),
            held_count: Cell::new(0),
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
        self.core.begin(request);
        Ok(())
    }

    /// Starts everything submitted: one system call for all of it.
    pub fn kick(&mut self) {
        self.core.worker.reactor.kick();
    }

    /// The next reply, without waiting. Does the queue's work: to be called until it returns `None`, whenever
    /// the storage's notifier or a completion says so.
    pub fn complete(&mut self) -> Option<Reply<S::Memory>> {
        if let Some(reply) = self.core.replies.borrow_mut().pop_front() {
            return Some(reply);
        }
        loop {
            self.turn();
            if let Some(reply) = self.core.replies.borrow_mut().pop_front() {
                return Some(reply);
            }
            // From here on whoever wakes the queue notifies its thread.
            if self.core.worker.reactor.prepare_sleep() {
                return None;
            }
        }
    }

    fn turn(&mut self) {
        let core = &self.core;
        core.worker
            .reactor
            .turn(|direct, result| core.direct_done(direct, result));
        let shared = &core.worker.shared;
        if core.held_count.get() == 0 {
            return;
        }
        if shared.closed.load(Ordering::SeqCst) {
            core.reject_held();
        } else if !shared.gate_closed.load(Ordering::SeqCst) {
            core.release_held();
            core.worker
                .reactor
                .turn(|direct, result| core.direct_done(direct, result));
        }
    }

    /// Sleeps until there may be a reply, or the time is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        if !self.core.replies.borrow().is_empty() {
            return;
        }
        self.core.worker.reactor.kick();
        self.core.worker.reactor.wait(timeout);
    }

    /// Requests taken whose reply was not handed out yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.pending.borrow().len()
            + self.core.held_count.get()
            + self.core.replies.borrow().len()
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
        self.core.worker.reactor.with_storage(f)
    }
}

impl<S: Storage> Drop for Queue<S> {
    fn drop(&mut self) {
        self.core.reject_held();
        while !self.core.pending.borrow().is_empty() || self.core.worker.reactor.task_count() > 0 {
            let core = Rc::clone(&self.core);
            if !core
                .worker
                .reactor
                .turn(|direct, result| core.direct_done(direct, result))
            {
                core.worker.reactor.wait(None);
            }
        }
        self.core.worker.release_runs();
    }
}

impl<S: Storage> Core<S> {
    fn begin(self: &Rc<Self>, request: Request<S::Memory>) {
        let shared = &self.worker.shared;
        // O7: the pin is set before the gate is looked at and before the first look-up.
        let epoch = self.pins.begin();
        if shared.gate_closed.load(Ordering::SeqCst) {
            self.pins.end(epoch);
            if shared.closed.load(Ordering::SeqCst) {
                self.reject(request);
            } else {
                self.held_count.set(self.held_count.get() + 1);
                self.held.borrow_mut().push_back(request);
            }
            return;
        }
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
                    core.worker.shared.check_range(offset, len)?;
                    let extents = core.worker.block_status(offset, len).await?;
                    core.pending.borrow_mut()[request].extents = extents;
                    Ok(())
                });
            }
        }
    }

    fn insert(&self, token: u64, epoch: u64, memory: Option<S::Memory>) -> usize {
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
    fn spawn<F>(self: &Rc<Self>, request: usize, work: impl FnOnce(Rc<Self>) -> F + 'static)
    where
        F: Future<Output = Result<()>> + 'static,
    {
        let core = Rc::clone(self);
        self.worker.reactor.spawn(async move {
            let result = work(Rc::clone(&core)).await;
            core.part_done(request, result.err().map(Box::new));
        });
    }

    /// One part of a request has ended; with the last one the request has.
    fn part_done(&self, request: usize, error: Option<Box<Error>>) {
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

    fn begin_read(self: &Rc<Self>, token: u64, epoch: u64, offset: u64, memory: S::Memory) {
        let len = memory.len();
        let request = self.insert(token, epoch, Some(memory.clone()));
        if let Err(error) = self.worker.shared.check_range(offset, len as u64) {
            return self.part_done(request, Some(Box::new(error)));
        }
        let mut parts = Parts::new();
        if self.hit_for_read(offset, &memory, &mut parts) {
            self.submit_parts(request, &memory, &parts, false);
        } else {
            self.spawn(request, move |core| async move {
                core.worker.read_guest(0, offset, memory).await
            });
        }
    }

    /// Whether a read is a hit. Zeroes are filled in at once.
    fn hit_for_read(&self, offset: u64, memory: &S::Memory, parts: &mut Parts) -> bool {
        let len = memory.len();
        let mut done = 0;
        while done < len {
            let (piece, bytes) = self
                .worker
                .resolve(0, offset + done as u64, (len - done) as u64);
            let bytes = to_usize(bytes);
            match piece {
                Piece::Data { file, offset: host } => {
                    let part = Part {
                        file,
                        host,
                        start: done,
                        len: bytes,
                    };
                    if !parts.push(part) {
                        return false;
                    }
                }
                Piece::Zero => memory.zero(done, bytes),
                Piece::Compressed { .. } | Piece::Miss { .. } | Piece::Bad(_) => return false,
            }
            done += bytes;
        }
        self.aligned(parts, memory)
    }

    fn aligned(&self, parts: &Parts, memory: &S::Memory) -> bool {
        parts.as_slice().iter().all(|part| {
            let properties = self.worker.reactor.properties(part.file);
            let align = u64::from(properties.alignment);
            align == 1
                || (part.host % align == 0
                    && (part.len as u64).is_multiple_of(align)
                    && memory
                        .slice(part.start, part.len)
                        .is_aligned(properties.memory_alignment as usize))
        })
    }

    fn submit_parts(&self, request: usize, memory: &S::Memory, parts: &Parts, write: bool) {
        if parts.count == 0 {
            return self.part_done(request, None);
        }
        // At most DIRECT_PIECES.
        self.pending.borrow_mut()[request].remaining =
            u32::try_from(parts.count).unwrap_or(u32::MAX);
        for part in parts.as_slice() {
            let direct = Direct {
                request,
                file: part.file,
                offset: part.host,
                memory: memory.slice(part.start, part.len),
                write,
                retries: 0,
            };
            self.submit_one(direct);
        }
    }

    fn submit_one(&self, direct: Direct<S::Memory>) {
        let memory = direct.memory.clone();
        let kind = if direct.write {
            OpKind::Write {
                offset: direct.offset,
                memory,
                sync: false,
            }
        } else {
            OpKind::Read {
                offset: direct.offset,
                memory,
            }
        };
        self.worker.reactor.submit_direct(
            Op {
                file: direct.file,
                kind,
            },
            direct,
        );
    }

    /// An operation of a hit has completed: whole, short, interrupted or failed.
    fn direct_done(&self, mut direct: Direct<S::Memory>, result: io::Result<usize>) {
        let name = if direct.write { "write" } else { "read" };
        let fail = |error: &io::Error| {
            Some(Box::new(self.worker.io_error(
                name,
                direct.file,
                direct.offset,
                direct.memory.len() as u64,
                error,
            )))
        };
        let outcome = match result {
            Ok(bytes) if bytes >= direct.memory.len() => None,
            Ok(0) if direct.write => fail(&io::Error::from_raw_os_error(28)),
            Ok(0) if self.worker.is_past_end(direct.file, direct.offset) => {
                // The end of the file: the rest reads as zeroes.
                direct.memory.zero(0, direct.memory.len());
                None
            }
            Ok(0) if direct.retries < limits::RETRIES => {
                // The file has grown meanwhile; or it is broken, and then its bytes are no zeroes.
                direct.retries += 1;
                return self.submit_one(direct);
            }
            Ok(bytes)
                if !direct.write
                    && self
                        .worker
                        .ends_file(direct.file, direct.offset + bytes as u64) =>
            {
                direct.memory.zero(bytes, direct.memory.len() - bytes);
                None
            }
            Ok(bytes) if direct.retries < limits::RETRIES => {
                // Short: from the last whole sector on. Bounded, as less than one makes no progress.
                let whole = self.worker.whole_blocks(direct.file, direct.offset, bytes);
                direct.retries += u32::from(whole < bytes);
                direct.offset += whole as u64;
                direct.memory = direct.memory.slice(whole, direct.memory.len() - whole);
                return self.submit_one(direct);
            }
            Ok(_) => fail(&io::Error::from_raw_os_error(5)),
            Err(error) if interrupted(&error) && direct.retries < limits::RETRIES => {
                direct.retries += 1;
                return self.submit_one(direct);
            }
            Err(error) => fail(&error),
        };
        self.part_done(direct.request, outcome);
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
        let request = self.insert(token, epoch, Some(memory.clone()));
        let shared = &self.worker.shared;
        if let Err(error) = shared
            .check_writable()
            .and_then(|()| shared.check_range(offset, len as u64))
        {
            return self.part_done(request, Some(Box::new(error)));
        }
        let mut parts = Parts::new();
        let outlives = self.outlives();
        if !fua
            && !shared.serialize_writes.load(Ordering::SeqCst)
            && self.hit_for_write(offset, &memory, &mut parts)
            && (!outlives || shared.is_settled(offset, len as u64))
        {
            return self.submit_parts(request, &memory, &parts, true);
        }
        let align = u64::from(self.worker.reactor.properties(IMAGE).alignment);
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

    /// Whether a write is a hit: every cluster the image's own, nothing to change but data.
    fn hit_for_write(&self, offset: u64, memory: &S::Memory, parts: &mut Parts) -> bool {
        let shared = &self.worker.shared;
        let len = memory.len();
        let mut done = 0;
        let fits = match &shared.layers[0].kind {
            LayerKind::Raw => parts.push(Part {
                file: IMAGE,
                host: offset,
                start: 0,
                len,
            }),
            LayerKind::Qcow2(image) => loop {
                if done == len {
                    break true;
                }
                let at = offset + done as u64;
                let within = image.geometry.in_cluster(at);
                let bytes = to_usize(image.geometry.cluster_bytes() - within).min(len - done);
                match self.worker.layer_entry(0, at) {
                    LayerEntry::Entry(L2Entry::Data { host, copied })
                        if writable_in_place(copied) =>
                    {
                        let part = Part {
                            file: IMAGE,
                            host: host.0 + within,
                            start: done,
                            len: bytes,
                        };
                        if !parts.push(part) {
                            break false;
                        }
                    }
                    _ => break false,
                }
                done += bytes;
            },
        };
        fits && self.aligned(parts, memory)
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
            .and_then(|()| shared.check_range(range.0, range.1))
        {
            return self.part_done(request, Some(Box::new(error)));
        }
        let align = u64::from(self.worker.reactor.properties(IMAGE).alignment);
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
        if fua || outlives && !self.worker.shared.is_settled(offset, len) {
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
        shared.serialize_writes.store(true, Ordering::SeqCst);
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
        self.held_count.set(0);
        for request in held {
            self.begin(request);
        }
    }

    fn reject_held(&self) {
        let held = std::mem::take(&mut *self.held.borrow_mut());
        self.held_count.set(0);
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
