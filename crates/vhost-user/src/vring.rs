//! One virtqueue at work: takes requests from its ring, hands them to the engine, and puts what has ended into the
//! used ring.
//!
//! A request in flight owns what it needs: a buffer over the guest's memory that keeps the map of its time, and the
//! places of its status and data. So a map that is replaced meanwhile is of no concern to it.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::{debug, warn};
use urus::{Buffer, Completion, Queue, Request as EngineRequest};
use vm_memory::{Bytes, GuestAddress};

use crate::chain::{BadChain, Chain, Range, total};
use crate::dirty::DirtyLog;
use crate::inflight::Notes;
use crate::memory::Map;
use crate::request::{Clear, Disk, Kind, NoStatus, Request, Status, parse};
use crate::ring::{BadRing, Ring, View};
use crate::stats::{QueueStats, add};

/// Why a virtqueue works no more, until the driver sets it up again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error(transparent)]
    Ring(#[from] BadRing),
    #[error(transparent)]
    Chain(#[from] BadChain),
    #[error(transparent)]
    Request(#[from] NoStatus),
    #[error(transparent)]
    Memory(#[from] Shortened),
}

/// A file that the front end shares was shortened: what it held is gone, and what is in its place is no one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the front end has shortened the file of its memory, of its notes of requests in flight or of its log; it has to share them anew"
)]
pub(crate) struct Shortened;

/// How to log what is written to the guest's memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Logging {
    /// For all that requests write.
    pub(crate) log: Option<Arc<DirtyLog>>,
    /// The guest's address of the used ring, when changes of that are to be logged as well.
    pub(crate) used: Option<u64>,
}

/// What a virtqueue begins with.
pub(crate) struct Start {
    pub(crate) map: Arc<Map>,
    pub(crate) ring: Ring,
    pub(crate) kick: Arc<File>,
    pub(crate) call: Option<File>,
    pub(crate) error: Option<File>,
    pub(crate) notes: Option<Notes>,
    /// Heads to do again before anything else.
    pub(crate) left: Vec<u16>,
    pub(crate) logging: Logging,
}

/// A request in flight, or a free place for one with its capacities.
#[derive(Default)]
struct Slot {
    head: u16,
    status_at: GuestAddress,
    /// What the device may write: to be logged, and counted.
    writable: Vec<Range>,
    bytes: u64,
    is_read: bool,
    is_write: bool,
    /// Engine requests that are not over.
    parts: u32,
    failed: bool,
    map: Option<Arc<Map>>,
}

/// What all queues of a device go by.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) disk: Disk,
    /// Writes are durable when they complete: the driver has turned the cache off.
    pub(crate) write_through: AtomicBool,
    /// The guest lives on when this process is killed, and counts on writes that have completed (O23).
    pub(crate) outlived: AtomicBool,
    /// A request of the present front end's guest was seen, on any virtqueue.
    pub(crate) served: AtomicBool,
}

/// A virtqueue that runs.
pub(crate) struct Vring {
    index: u16,
    shared: Arc<Shared>,
    stats: Arc<QueueStats>,
    start: Start,
    /// Heads in flight.
    busy: Vec<bool>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Parts of requests that the engine's queue had no room for.
    waiting: VecDeque<EngineRequest>,
    /// Buffers to use again. They hold the map that they were last used with.
    spare: Vec<Buffer>,
    chain: Chain,
    clears: Vec<Clear>,
    /// Something is in the used ring that was not published.
    unpublished: bool,
    in_flight: usize,
    broken: bool,
    /// It has had a request.
    served: bool,
    /// [`urus::faults`] when memory was last looked at.
    faults: u64,
}

/// What one turn has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Requests were taken, or have ended.
    pub(crate) progress: bool,
}

impl Vring {
    pub(crate) fn new(
        index: u16,
        shared: Arc<Shared>,
        stats: Arc<QueueStats>,
        mut start: Start,
    ) -> Self {
        start.left.reverse();
        let vring = Self {
            index,
            shared,
            stats,
            busy: vec![false; start.ring.layout.size.into()],
            start,
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            spare: Vec::new(),
            chain: Chain::default(),
            clears: Vec::new(),
            unpublished: false,
            in_flight: 0,
            broken: false,
            served: false,
            faults: 0,
        };
        // A predecessor may have been killed after it had published, and before it told the driver; what ends from now on
        // lies beyond the entry that the driver waits for, so that it would never be told. A call too many does no harm.
        vring.call();
        vring
    }

    pub(crate) fn kick(&self) -> &File {
        &self.start.kick
    }

    /// Whether no virtqueue of this front end has had a request.
    pub(crate) fn is_unheard_of(&self) -> bool {
        !self.served && !self.broken && !self.shared.served.load(Ordering::Relaxed)
    }

    /// Requests taken and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether it takes no more until it is set up again.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Where a successor goes on.
    pub(crate) fn next_avail(&self) -> u16 {
        self.start.ring.next_avail()
    }

    pub(crate) fn set_call(&mut self, call: Option<File>) {
        self.start.call = call;
        // What ended before it was there could not be told.
        self.call();
    }

    pub(crate) fn set_error(&mut self, error: Option<File>) {
        self.start.error = error;
    }

    pub(crate) fn set_map(&mut self, map: Arc<Map>) {
        self.start.map = map;
        self.spare.clear();
    }

    pub(crate) fn set_logging(&mut self, logging: Logging) {
        self.start.logging = logging;
    }

    /// Takes what is available (unless `stopping`), starts it with one system call, and answers what has ended.
    pub(crate) fn turn(&mut self, queue: &mut Queue, stopping: bool) -> Turn {
        match self.try_turn(queue, stopping) {
            Ok(turn) => turn,
            Err(error) => {
                // Nonsense that comes from lost memory is not the driver's.
                let error = self.memory_is_whole().map_or_else(Broken::from, |()| error);
                self.break_off(&error);
                Turn { progress: true }
            }
        }
    }

    /// Whether what is shared with the front end is still there. Once a process has seen one fault, each is found here before anything
    /// that came of it is believed.
    fn memory_is_whole(&mut self) -> Result<(), Shortened> {
        let faults = urus::faults();
        if faults == self.faults {
            return Ok(());
        }
        let Start {
            map,
            notes,
            logging,
            ..
        } = &self.start;
        let broken = map.is_broken()
            || notes.as_ref().is_some_and(Notes::is_broken)
            || logging.log.as_ref().is_some_and(|log| log.is_broken());
        if broken {
            return Err(Shortened);
        }
        self.faults = faults;
        Ok(())
    }

    fn try_turn(&mut self, queue: &mut Queue, stopping: bool) -> Result<Turn, Broken> {
        let map = Arc::clone(&self.start.map);
        let view = self.start.ring.layout.view(map.memory());
        let mut progress = false;
        self.believe_memory()?;
        if let (Ok(view), false, false) = (&view, stopping, self.broken) {
            progress |= self.take_all(queue, &map, view)?;
        }
        while let Some(completion) = queue.completion() {
            progress = true;
            self.complete(completion, view.as_ref().ok())?;
        }
        progress |= self.resubmit(queue);
        // Before anything is said to be done with it.
        self.believe_memory()?;
        if self.unpublished {
            self.publish(&view?)?;
        }
        Ok(Turn { progress })
    }

    /// Breaks off, once, if memory is lost.
    fn believe_memory(&mut self) -> Result<(), Shortened> {
        if self.broken {
            return Ok(());
        }
        let whole = self.memory_is_whole();
        if whole.is_err() {
            // There is nobody to show it to.
            self.unpublished = false;
        }
        whole
    }

    /// Asks for kicks, before a sleep. True when there is something to do already.
    pub(crate) fn want_kicks(&mut self, queue: &Queue) -> bool {
        if self.broken {
            return false;
        }
        let map = Arc::clone(&self.start.map);
        let asked = self
            .start
            .ring
            .layout
            .view(map.memory())
            .and_then(|view| self.start.ring.want_kicks(&view));
        if self.memory_is_whole().is_err() {
            self.break_off(&Shortened.into());
            return false;
        }
        match asked {
            // Where the engine's queue is full, its completions wake us.
            Ok(more) => more && queue.in_flight() < queue.depth() && self.waiting.is_empty(),
            // The front end is just changing the map, perhaps; taking requests says what is wrong.
            Err(BadRing::Memory) => false,
            Err(error) => {
                self.break_off(&error.into());
                false
            }
        }
    }

    /// Tells the driver that kicks are of no use while we look by ourselves.
    pub(crate) fn refuse_kicks(&self) {
        if self.start.ring.uses_event_idx() {
            // They have ended with the last one.
            return;
        }
        let map = &self.start.map;
        let view = self.start.ring.layout.view(map.memory());
        // A driver that kicks nevertheless does no harm.
        let _ = view.and_then(|view| self.start.ring.refuse_kicks(&view));
    }

    /// Takes what is available, as far as the engine's queue has room. True when there was any.
    fn take_all(
        &mut self,
        queue: &mut Queue,
        map: &Arc<Map>,
        view: &View<'_>,
    ) -> Result<bool, Broken> {
        let mut taken = false;
        let result = self.take_while_room(queue, map, view, &mut taken);
        if taken {
            queue.kick();
            add(&self.stats.batches, 1);
            if !self.served {
                self.served = true;
                self.shared.served.store(true, Ordering::Relaxed);
            }
        }
        result.map(|()| taken)
    }

    fn take_while_room(
        &mut self,
        queue: &mut Queue,
        map: &Arc<Map>,
        view: &View<'_>,
        taken: &mut bool,
    ) -> Result<(), Broken> {
        while self.waiting.is_empty() && queue.in_flight() < queue.depth() {
            let Some(head) = self.start.left.pop() else {
                break;
            };
            *taken = true;
            add(&self.stats.resubmitted, 1);
            self.begin(queue, map, view, head)?;
        }
        if !self.start.left.is_empty() {
            return Ok(());
        }
        let mut available = self.start.ring.available(view)?;
        while available > 0 && self.waiting.is_empty() && queue.in_flight() < queue.depth() {
            available -= 1;
            let head = self.start.ring.take(view)?;
            *taken = true;
            if let Some(notes) = &mut self.start.notes {
                notes.take(head);
            }
            self.begin(queue, map, view, head)?;
        }
        Ok(())
    }

    /// Begins one request.
    fn begin(
        &mut self,
        queue: &mut Queue,
        map: &Arc<Map>,
        view: &View<'_>,
        head: u16,
    ) -> Result<(), Broken> {
        if self.busy[usize::from(head)] {
            return Err(BadRing::Twice(head).into());
        }
        let memory = map.memory();
        self.chain.read(memory, &view.descriptors, head)?;
        let disk = &self.shared.disk;
        let request = parse(memory, &mut self.chain, disk, &mut self.clears)?;
        self.count(request.kind);
        let token = self.slot(map, head, request);
        let fua = self.shared.write_through.load(Ordering::Relaxed);
        queue.outlive_process(self.shared.outlived.load(Ordering::Relaxed));
        let id = token as u64;
        match request.kind {
            Kind::Ended { status, written } => self.answer(token, status, written, view)?,
            Kind::Flush => self.submit(queue, EngineRequest::flush(id)),
            Kind::Read { offset } => {
                match buffer(&mut self.spare, map, &self.slots[token].writable) {
                    Some(buffer) => self.submit(queue, EngineRequest::read(id, offset, buffer)),
                    None => self.answer(token, Status::IoError, 0, view)?,
                }
            }
            Kind::Write { offset } => match buffer(&mut self.spare, map, &self.chain.readable) {
                Some(buffer) => {
                    let request = EngineRequest::write(id, offset, buffer).fua(fua);
                    self.submit(queue, request);
                }
                None => self.answer(token, Status::IoError, 0, view)?,
            },
            Kind::Discard => self.submit_clears(queue, token, |clear| {
                EngineRequest::discard(id, clear.offset, clear.len)
            }),
            Kind::WriteZeroes => self.submit_clears(queue, token, |clear| {
                EngineRequest::write_zeroes(id, clear.offset, clear.len)
                    .unmap(clear.unmap)
                    .fua(fua)
            }),
        }
        Ok(())
    }

    fn count(&self, kind: Kind) {
        let stats = &self.stats;
        let counter = match kind {
            Kind::Read { .. } => &stats.reads,
            Kind::Write { .. } => &stats.writes,
            Kind::Flush => &stats.flushes,
            Kind::Discard => &stats.discards,
            Kind::WriteZeroes => &stats.write_zeroes,
            Kind::Ended { .. } => return,
        };
        add(counter, 1);
    }

    /// A place for a request, which takes its writable ranges from the chain.
    fn slot(&mut self, map: &Arc<Map>, head: u16, request: Request) -> usize {
        let token = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[token];
        slot.head = head;
        slot.status_at = request.status_at;
        slot.is_read = matches!(request.kind, Kind::Read { .. });
        slot.is_write = matches!(request.kind, Kind::Write { .. });
        let data = if slot.is_write {
            &self.chain.readable
        } else {
            &self.chain.writable
        };
        slot.bytes = total(data) as u64;
        // The slot's own ranges from before go to the chain, for their capacity.
        std::mem::swap(&mut slot.writable, &mut self.chain.writable);
        slot.parts = 1;
        slot.failed = false;
        slot.map = Some(Arc::clone(map));
        self.busy[usize::from(head)] = true;
        self.in_flight += 1;
        token
    }

    /// Submits the parts of a discard or write-zeroes.
    fn submit_clears(
        &mut self,
        queue: &mut Queue,
        token: usize,
        request: impl Fn(Clear) -> EngineRequest,
    ) {
        self.slots[token].parts = u32::try_from(self.clears.len()).expect("a bounded list");
        for index in 0..self.clears.len() {
            let request = request(self.clears[index]);
            self.submit(queue, request);
        }
    }

    fn submit(&mut self, queue: &mut Queue, request: EngineRequest) {
        if !self.waiting.is_empty() {
            self.waiting.push_back(request);
        } else if let Err(rejected) = queue.submit(request) {
            self.waiting.push_back(rejected.request);
        }
    }

    /// Submits what the engine's queue had no room for. True when some of it was taken.
    fn resubmit(&mut self, queue: &mut Queue) -> bool {
        let mut submitted = false;
        while let Some(request) = self.waiting.pop_front() {
            if let Err(rejected) = queue.submit(request) {
                self.waiting.push_front(rejected.request);
                break;
            }
            submitted = true;
        }
        if submitted {
            queue.kick();
        }
        submitted
    }

    /// A part of a request has ended.
    fn complete(&mut self, completion: Completion, view: Option<&View<'_>>) -> Result<(), Broken> {
        self.spare.extend(completion.buffer);
        let token = usize::try_from(completion.token).expect("made from a usize");
        let slot = &mut self.slots[token];
        slot.parts -= 1;
        if let Err(error) = completion.result {
            // A guest that asks for nonsense must not fill the log.
            debug!(queue = self.index, head = slot.head, %error, "a request failed");
            slot.failed = true;
        }
        if slot.parts > 0 {
            return Ok(());
        }
        let (status, written) = match (slot.failed, slot.is_read) {
            (true, _) => (Status::IoError, 0),
            (false, true) => (Status::Ok, total(&slot.writable)),
            (false, false) => (Status::Ok, 0),
        };
        if status == Status::Ok {
            if slot.is_read {
                add(&self.stats.read_bytes, slot.bytes);
            } else if slot.is_write {
                add(&self.stats.written_bytes, slot.bytes);
            }
        }
        match view {
            Some(view) => self.answer(token, status, written, view),
            None => {
                self.release(token);
                Err(BadRing::Memory.into())
            }
        }
    }

    /// Writes a request's status, and puts it into the used ring, for the next [`publish`](Self::publish).
    fn answer(
        &mut self,
        token: usize,
        status: Status,
        written: usize,
        view: &View<'_>,
    ) -> Result<(), Broken> {
        let slot = &self.slots[token];
        let (head, status_at) = (slot.head, slot.status_at);
        if status != Status::Ok {
            add(&self.stats.failed, 1);
        }
        // It lies in this map: that was asked when the request was taken.
        let map = slot.map.as_ref().expect("a request in flight has its map");
        let stored = map.memory().write_obj(status.byte(), status_at);
        debug_assert!(stored.is_ok(), "a status byte that was there is gone");
        if let Some(log) = &self.start.logging.log {
            for &(address, len) in &slot.writable {
                log.mark(address.0, len);
            }
            log.mark(status_at.0, 1);
        }
        // From the beginning of what the device may write, and without a gap: so the status counts only when all of the
        // data was written.
        let all = written == total(&slot.writable);
        let written = u32::try_from(written + usize::from(all)).unwrap_or(u32::MAX);
        self.release(token);
        if self.broken {
            return Ok(());
        }
        let entry = self.start.ring.next_used();
        self.start.ring.put_used(view, head, written)?;
        if let Some(notes) = &mut self.start.notes {
            notes.answer(head);
        }
        self.log_used(self.start.ring.layout.used_entry(entry));
        self.unpublished = true;
        Ok(())
    }

    /// The request in a slot is over.
    fn release(&mut self, token: usize) {
        let slot = &mut self.slots[token];
        slot.map = None;
        self.busy[usize::from(slot.head)] = false;
        self.in_flight -= 1;
        self.free.push(token);
    }

    /// Shows the driver what was answered, and tells it if it wants to be told.
    fn publish(&mut self, view: &View<'_>) -> Result<(), Broken> {
        self.unpublished = false;
        let ring = &mut self.start.ring;
        ring.publish(view)?;
        let used_index = ring.next_used();
        let wants_call = ring.wants_call(view)?;
        // The index, with the flags before it.
        self.log_used((0, 4));
        if let Some(notes) = &mut self.start.notes {
            notes.published(used_index);
        }
        if wants_call {
            self.call();
        }
        Ok(())
    }

    fn log_used(&self, (start, len): (usize, usize)) {
        let logging = &self.start.logging;
        if let (Some(log), Some(used)) = (&logging.log, logging.used) {
            log.mark(used.saturating_add(start as u64), len);
        }
    }

    fn call(&self) {
        if let Some(call) = &self.start.call {
            add(&self.stats.calls, 1);
            signal(call);
        }
    }

    /// Stops to take requests: what the driver has put into the ring makes no sense, and there is no way to tell it.
    fn break_off(&mut self, error: &Broken) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        warn!(queue = self.index, %error, "the queue is stopped until its driver sets it up again");
        if let Some(event) = &self.start.error {
            signal(event);
        }
    }
}

/// A buffer over ranges of the guest's memory. None when they are not in it.
fn buffer(spare: &mut Vec<Buffer>, map: &Map, ranges: &[Range]) -> Option<Buffer> {
    let Some(mut buffer) = spare.pop() else {
        return Buffer::from_guest(map.memory(), ranges).ok();
    };
    if buffer.set_guest(map.memory(), ranges).is_ok() {
        return Some(buffer);
    }
    spare.push(buffer);
    None
}

/// Adds one to an eventfd. One that is full is readable anyway.
fn signal(event: &File) {
    if let Err(error) = rustix::io::write(event, &1_u64.to_ne_bytes())
        && error != rustix::io::Errno::AGAIN
    {
        debug!(%error, "cannot signal an eventfd of the front end");
    }
}
