//! A device on a simulated machine: the engine's queues and its maintenance, polled by lot, and the guest's model
//! beside them.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc as Bytes;

use urus_engine::request::{Extent, Reply, Request, RequestKind};
use urus_engine::storage::FileId;
use urus_engine::sync::{Arc, Mutex};
use urus_engine::{
    Control, ControlReply, Error, LayerFormat, LayerSpec, Maintenance, Options, Queue, Shared,
};
use urus_format::Header;

use crate::contents::{Contents, SECTOR, index};
use crate::extents::{self, Chain};
use crate::image::Built;
use crate::memory::SimMemory;
use crate::model::{GuestOp, Model};
use crate::rng::{Rng, mix};
use crate::stamp::stamped;
use crate::storage::SimStorage;
use crate::workload::{Ask, Workload};
use crate::world::{IMAGE, SimWorld};

/// A request in flight.
#[derive(Clone, Debug)]
struct Open {
    /// Nothing where somebody else judges the reply.
    ask: Option<Ask>,
    issued: u64,
    change: Option<GuestOp>,
    /// A sync had failed before it was issued.
    poisoned: bool,
}

/// Token, result and memory of a reply.
pub type Answer = (u64, Result<(), String>, Option<SimMemory>);

struct Seat {
    queue: Queue<SimStorage>,
    handle: usize,
}

/// How the disk was stored at one moment at which all of its mapping was on disk and nothing was in flight.
struct Base {
    at: u64,
    chain: Chain,
    /// Made when it is asked for.
    map: OnceCell<Vec<Extent>>,
    /// The disk has grown since then, or was to.
    has_grown: bool,
}

/// How a machine is driven.
#[derive(Clone, Copy, Debug)]
pub struct Driving {
    /// Queues.
    pub queues: usize,
    /// Requests in flight on each, at most.
    pub depth: usize,
    /// Queues and maintenance are polled also when nothing woke them. Off, a lost wake-up shows as a hang.
    pub spurious: bool,
    /// Requests may fail (errors are injected).
    pub errors: bool,
    /// Completed writes outlive the process.
    pub outlives: bool,
}

impl Driving {
    /// Eight requests at once on each of so many queues, which are polled when they are woken; none may fail, and nothing outlives the process.
    #[must_use]
    pub const fn plain(queues: usize) -> Self {
        Self {
            queues,
            depth: 8,
            spurious: false,
            errors: false,
            outlives: false,
        }
    }
}

/// The device.
pub struct Machine {
    /// The machine's files.
    pub world: SimWorld,
    /// What the disk may hold.
    pub model: Model,
    /// Requests that failed.
    pub failed: u64,
    /// Replies to [`submit_kind`](Self::submit_kind).
    pub replies: Vec<Answer>,
    /// The image as it was opened, or as another process has put it there since.
    pub opened: Contents,
    /// Events of the log during which the image was opened, or read again.
    pub openings: Vec<Range<usize>>,
    /// Clusters that processes which were killed have left counted, and nothing refers to.
    pub leaked: u64,
    /// Other disks that this one was before, each with the moment at which it ended.
    past: Vec<(u64, Model)>,
    base: Base,
    layers: Vec<(FileId, bool)>,
    cluster_sectors: u64,
    /// A block status has no more of them, and then may end early.
    most_extents: usize,
    /// What draws nothing from it goes on as it would.
    lot: Rng,
    maintenance: Option<Maintenance<SimStorage>>,
    maintenance_handle: usize,
    seats: Vec<Seat>,
    open: BTreeMap<u64, Open>,
    next_token: u64,
    rng: Rng,
    driving: Driving,
    unkicked: bool,
    /// The process is being killed: what it still answers is nobody's any more.
    dying: bool,
}

/// Opens the device, with its queues.
fn start(
    world: &SimWorld,
    layers: Vec<LayerSpec>,
    options: Options,
    driving: &Driving,
) -> Result<(Maintenance<SimStorage>, usize, Vec<Seat>), String> {
    let storage = world.handle();
    let handle = storage.number();
    let mut maintenance = Maintenance::open(storage, layers, options)
        .map_err(|error| format!("the image does not open: {error}"))?;
    maintenance.poll();
    let seat = |_| {
        let storage = world.handle();
        let handle = storage.number();
        let mut queue = Queue::new(maintenance.shared(), storage, driving.depth);
        queue.outlive_process(driving.outlives);
        assert!(queue.complete().is_none());
        Seat { queue, handle }
    };
    let seats = (0..driving.queues).map(seat).collect();
    Ok((maintenance, handle, seats))
}

impl Machine {
    /// Opens the device.
    ///
    /// # Errors
    /// What the engine says.
    pub fn open(
        world: &SimWorld,
        layers: Vec<LayerSpec>,
        options: Options,
        model: Model,
        driving: Driving,
        rng: Rng,
    ) -> Result<Self, String> {
        let is_raw = |layer: &LayerSpec| matches!(layer.format, LayerFormat::Raw);
        let files: Vec<(FileId, bool)> = layers
            .iter()
            .map(|layer| (layer.file, is_raw(layer)))
            .collect();
        let began = world.log().events.len();
        let most_extents = options.sizes.status_extents;
        let (maintenance, maintenance_handle, seats) = start(world, layers, options, &driving)?;
        // Nothing but maintenance has touched the image, and what that did to its mapping (a repair) is on disk.
        let geometry = maintenance.shared().geometry();
        let mut machine = Self {
            world: world.clone(),
            model,
            failed: 0,
            replies: Vec::new(),
            opened: world.contents(IMAGE).clone(),
            openings: std::iter::once(began..world.log().events.len()).collect(),
            leaked: 0,
            past: Vec::new(),
            base: Base::now(world, &files),
            layers: files,
            most_extents,
            cluster_sectors: geometry.map_or(1, |geometry| geometry.cluster_bytes() / SECTOR),
            lot: Rng::new(mix(rng.clone().next_u64())),
            maintenance: Some(maintenance),
            maintenance_handle,
            seats,
            open: BTreeMap::new(),
            next_token: 1,
            rng,
            driving,
            unkicked: false,
            dying: false,
        };
        machine.poll_maintenance();
        Ok(machine)
    }

    /// The process is killed, wherever it is. What it has started still happens, before anybody else gets the image; nothing of it need be
    /// durable.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn die(&mut self) -> Result<(), String> {
        self.world.trace(0xd1e);
        self.dying = true;
        self.maintenance = None;
        // Queues wait for what is in flight; nobody starts anything more for them.
        self.run_until("requests of a device that is gone", |machine| {
            machine.open.is_empty()
        })?;
        self.seats.clear();
        self.world.bury();
        self.dying = false;
        Ok(())
    }

    /// After [`die`](Self::die) another process opens the image and finds this on the disk; so many clusters had leaked.
    ///
    /// # Errors
    /// What the engine says.
    pub fn succeed(
        &mut self,
        layers: Vec<LayerSpec>,
        options: Options,
        (guest, leaked): (&[u8], u64),
    ) -> Result<(), String> {
        let began = self.world.log().events.len();
        self.model
            .restart(guest, self.world.tick(), self.driving.outlives);
        (self.maintenance, self.maintenance_handle, self.seats) = {
            let (maintenance, handle, seats) = start(&self.world, layers, options, &self.driving)?;
            (Some(maintenance), handle, seats)
        };
        self.leaked = leaked;
        self.opened = self.world.contents(IMAGE).clone();
        self.openings.push(began..self.world.log().events.len());
        self.base = Base::now(&self.world, &self.layers);
        self.poll_maintenance();
        Ok(())
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    /// From now on requests may fail, or not.
    pub fn expect_errors(&mut self, errors: bool) {
        self.driving.errors = errors;
    }

    /// Whether a sync has failed, so that the device takes no more writes.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.shared().is_poisoned()
    }

    /// Submits a request to a queue drawn by lot; `false` when that one is full.
    pub fn submit(&mut self, ask: Ask) -> bool {
        let number = self.rng.index(self.seats.len());
        if self.seats[number].queue.in_flight() >= self.driving.depth {
            return false;
        }
        let issued = self.world.tick();
        let token = self.next_token;
        self.next_token += 1;
        self.world.trace(0x5b ^ token << 8);
        let bytes = |sectors: u64| sectors * 512;
        let (kind, change) = match ask {
            Ask::Read { lba, count } => {
                // What a read leaves untouched must show.
                let memory = self.guest_memory(vec![0xa5; index(bytes(count))]);
                (
                    RequestKind::Read {
                        offset: bytes(lba),
                        memory,
                    },
                    None,
                )
            }
            Ask::Write { lba, count, fua } => {
                let (op, version) = self.model.write(lba, count, fua, issued);
                let memory = self.guest_memory(stamped(lba, count, version));
                (
                    RequestKind::Write {
                        offset: bytes(lba),
                        memory,
                        fua,
                    },
                    Some(op),
                )
            }
            Ask::Discard { lba, count } => {
                let op = self.model.discard(lba, count, issued);
                let kind = RequestKind::Discard {
                    offset: bytes(lba),
                    len: bytes(count),
                };
                (kind, Some(op))
            }
            Ask::Zero {
                lba,
                count,
                unmap,
                fua,
            } => {
                let op = self.model.zero(lba, count, fua, issued);
                let (offset, len) = (bytes(lba), bytes(count));
                (
                    RequestKind::WriteZeroes {
                        offset,
                        len,
                        unmap,
                        fua,
                    },
                    Some(op),
                )
            }
            Ask::Flush => (RequestKind::Flush, Some(self.model.flush(issued))),
            Ask::Status { lba, count } => {
                let (offset, end) = asked_bytes(token, lba, count);
                let len = end - offset;
                (RequestKind::BlockStatus { offset, len }, None)
            }
        };
        let poisoned = self.is_poisoned();
        let open = Open {
            ask: Some(ask),
            issued,
            change,
            poisoned,
        };
        self.send(number, token, open, kind);
        true
    }

    /// Submits a request that the caller judges itself: the reply comes into [`replies`](Self::replies). Its token,
    /// or nothing where the queue drawn by lot is full.
    pub fn submit_kind(&mut self, kind: RequestKind<SimMemory>) -> Option<u64> {
        let number = self.rng.index(self.seats.len());
        if self.seats[number].queue.in_flight() >= self.driving.depth {
            return None;
        }
        let token = self.next_token;
        self.next_token += 1;
        let open = Open {
            ask: None,
            issued: self.world.tick(),
            change: None,
            poisoned: false,
        };
        self.send(number, token, open, kind);
        Some(token)
    }

    fn send(&mut self, number: usize, token: u64, open: Open, kind: RequestKind<SimMemory>) {
        self.open.insert(token, open);
        let queue = &mut self.seats[number].queue;
        assert!(
            queue.submit(Request { token, kind }).is_ok(),
            "there was room"
        );
        if self.rng.chance(192) {
            queue.kick();
        } else {
            self.unkicked = true;
        }
    }

    /// Memory of a guest that does not care for alignment.
    pub fn guest_memory(&mut self, bytes: Vec<u8>) -> SimMemory {
        let skew = [0, 0, 0, 512, 8][self.rng.index(5)];
        SimMemory::skewed(bytes, skew)
    }

    fn poll_maintenance(&mut self) {
        let Some(maintenance) = &mut self.maintenance else {
            return;
        };
        self.world.take_notification(self.maintenance_handle);
        loop {
            maintenance.poll();
            if maintenance.prepare_sleep() {
                return;
            }
        }
    }

    fn shared(&self) -> Arc<Shared> {
        self.maintenance
            .as_ref()
            .expect("the device is open")
            .shared()
    }

    fn poll_queue(&mut self, number: usize) -> Result<(), String> {
        let seat = &mut self.seats[number];
        self.world.take_notification(seat.handle);
        // Its owner takes some replies, and is not obliged to take all before the world goes on.
        while let Some(reply) = self.seats[number].queue.complete() {
            self.replied(reply)?;
        }
        Ok(())
    }

    fn replied(&mut self, reply: Reply<SimMemory>) -> Result<(), String> {
        let Reply {
            token,
            result,
            memory,
            extents,
        } = reply;
        let now = self.world.tick();
        self.world.trace(0xe0 ^ token << 8);
        let Some(open) = self.open.remove(&token) else {
            return Err(format!(
                "a reply to a request that is not in flight (token {token})"
            ));
        };
        let Some(ask) = open.ask else {
            let result = result.map_err(|error| error.to_string());
            self.replies.push((token, result, memory));
            return Ok(());
        };
        if let Some(op) = open.change {
            self.model.complete(op, now, result.is_ok());
        }
        match result {
            Err(error) => {
                self.failed += 1;
                if !self.is_expected(&error) {
                    return Err(format!("{:?} failed: {error}", ask));
                }
            }
            Ok(()) if open.poisoned && !matches!(ask, Ask::Read { .. } | Ask::Status { .. }) => {
                return Err(format!("{:?} succeeded after a sync had failed", ask));
            }
            Ok(()) => match ask {
                Ask::Read { lba, .. } => {
                    let bytes = memory.ok_or("a read gave no memory back")?.to_vec();
                    self.model
                        .check_read(lba, &bytes, open.issued, now)
                        .map_err(|mismatch| format!("read: {mismatch} ({:?})", ask))?;
                }
                Ask::Status { lba, count } => {
                    let (start, end) = asked_bytes(token, lba, count);
                    self.check_status(&extents, (start, end), open.issued, now)
                        .map_err(|wrong| {
                            let asked = format!("[{start:#x}, {end:#x})");
                            format!("block status of {asked}: {wrong}: {extents:?}")
                        })?;
                }
                _ => {}
            },
        }
        Ok(())
    }

    /// What a block status said, that was issued and completed at these moments: its form; that zero is said only of what may read so;
    /// what the tables said of clusters that have not changed since; and that what was written has data in the image.
    fn check_status(
        &self,
        extents: &[Extent],
        (start, end): (u64, u64),
        issued: u64,
        completed: u64,
    ) -> Result<(), String> {
        let end = match extents.last() {
            // It has as many as it may: the rest has to be asked for.
            Some(last) if extents.len() == self.most_extents => end.min(last.start + last.len),
            _ => end,
        };
        extents::check_form(extents, start, end, self.layers.len())?;
        for extent in extents.iter().filter(|extent| extent.zero) {
            let last = extent.start + extent.len - 1;
            for lba in extent.start / SECTOR..=last / SECTOR {
                let from = extent.start.saturating_sub(lba * SECTOR);
                if !self.model.may_be_zero_from(lba, from, issued, completed) {
                    return Err(format!("sector {lba} is said to be zero"));
                }
            }
        }
        let cluster = self.cluster_sectors;
        let room = self.model.room();
        let mut at = start;
        while at < end {
            let first = at / (cluster * SECTOR) * cluster;
            let part_end = end.min((first + cluster) * SECTOR);
            let found = extents::within(extents, at, part_end);
            let lbas = first..(first + cluster).min(room);
            let part = at..part_end;
            at = part_end;
            if self.model.is_written(lbas.clone(), self.base.at, issued) {
                let is_data = |part: &Extent| part.data && part.depth == 0 && !part.compressed;
                if !found.iter().all(is_data) {
                    return Err(format!("cluster {} was written", first / cluster));
                }
            }
            if !self.model.is_untouched(lbas, self.base.at) {
                continue;
            }
            let map = self.base.map()?;
            let mapped = map.last().map_or(0, |last| last.start + last.len);
            // The last cluster may have been cleared behind the old end.
            if (first + cluster) * SECTOR > mapped && self.base.has_grown {
                continue;
            }
            let expected = extents::within(map, part.start, part.end);
            if found != expected {
                return Err(format!(
                    "cluster {} is stored as {expected:?}",
                    first / cluster
                ));
            }
        }
        Ok(())
    }

    /// Flushes, so that the files say how the whole disk is stored, and asks for it from odd places. Now and then, by a lot of its own.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub fn survey(&mut self) -> Result<(), String> {
        if !self.lot.chance(85) {
            return Ok(());
        }
        self.drain()?;
        let failed = self.failed;
        self.ask(Ask::Flush)?;
        self.drain()?;
        if self.failed != failed || self.is_poisoned() {
            return Ok(());
        }
        self.base = Base::now(&self.world, &self.layers);
        let sectors = self.model.sectors();
        let mut lba = 0;
        while lba < sectors {
            let count = (1 + self.lot.below(self.cluster_sectors * 80)).min(sectors - lba);
            self.ask(Ask::Status { lba, count })?;
            lba += count;
        }
        for _ in 0..6 {
            let lba = self.lot.below(sectors);
            let count = 1 + self.lot.below(sectors - lba);
            self.ask(Ask::Status { lba, count })?;
        }
        self.drain()
    }

    /// Lets one thing happen, drawn by lot. `false` when nothing can.
    ///
    /// # Errors
    /// A read that returned what it must not, or a request that failed.
    pub fn step(&mut self) -> Result<bool, String> {
        let seats = self.seats.len();
        if self.driving.spurious && self.rng.chance(4) {
            self.poll_maintenance();
            let number = self.rng.index(seats);
            self.poll_queue(number)?;
        }
        let first = [0, 1, 2, 2][self.rng.index(4)];
        for what in (first..3).chain(0..first) {
            let happened = match what {
                0 => {
                    let number = self.rng.index(seats);
                    let awake = (0..seats).map(|add| (number + add) % seats).find(|seat| {
                        let seat = &self.seats[*seat];
                        seat.queue.has_reply() || self.world.is_awake(seat.handle)
                    });
                    if let Some(seat) = awake {
                        self.poll_queue(seat)?;
                    }
                    awake.is_some()
                }
                1 => {
                    let awake =
                        self.maintenance.is_some() && self.world.is_awake(self.maintenance_handle);
                    if awake {
                        self.poll_maintenance();
                    }
                    awake
                }
                _ => self.world.step(),
            };
            if happened {
                return Ok(true);
            }
        }
        // A guest may wait long before it kicks.
        if self.unkicked {
            self.unkicked = false;
            self.seats.iter_mut().for_each(|seat| seat.queue.kick());
            return Ok(true);
        }
        Ok(false)
    }

    /// Goes on until every request has its reply.
    ///
    /// # Errors
    /// As [`step`](Self::step), and a hang.
    pub fn drain(&mut self) -> Result<(), String> {
        self.run_until("requests", |machine| machine.open.is_empty())
    }

    /// Submits a request, as soon as there is room.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub fn ask(&mut self, ask: Ask) -> Result<(), String> {
        let mut submitted = self.submit(ask);
        while !submitted {
            self.make_room()?;
            submitted = self.submit(ask);
        }
        Ok(())
    }

    /// Goes on until one request more has its reply.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub fn make_room(&mut self) -> Result<(), String> {
        let before = self.open.len();
        self.run_until("requests", |machine| machine.open.len() < before)
    }

    fn run_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) -> Result<(), String> {
        let mut idle = 0;
        for _ in 0..20_000_000u64 {
            if done(self) {
                return Ok(());
            }
            if self.step()? {
                idle = 0;
            } else {
                idle += 1;
            }
            if idle > 8 {
                let open: Vec<&Open> = self.open.values().take(4).collect();
                return Err(format!("a hang: {what} never end; in flight: {open:?}"));
            }
        }
        Err(format!("a livelock: {what} never end"))
    }

    /// Lets everything happen that is under way, until the machine is idle.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn settle(&mut self) -> Result<(), String> {
        while self.step()? {}
        Ok(())
    }

    /// Asks something of the device and waits for the answer.
    ///
    /// # Errors
    /// As [`step`](Self::step); what the device answers.
    pub fn control(&mut self, control: impl FnOnce(ControlReply) -> Control) -> Result<(), String> {
        self.answer(control)?.map_err(|error| error.to_string())
    }

    fn answer(
        &mut self,
        control: impl FnOnce(ControlReply) -> Control,
    ) -> Result<Result<(), Error>, String> {
        let answer = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&answer);
        let reply: ControlReply = Box::new(move |result| *slot.lock() = Some(result));
        self.shared().control(control(reply));
        self.run_until("a control", |_| answer.lock().is_some())?;
        let answer = answer.lock().take();
        answer.ok_or_else(|| "a control ended without an answer".to_owned())
    }

    /// Whether errors may come, and this is one of those that then do: none but for want of space where none was injected.
    fn is_expected(&self, error: &Error) -> bool {
        self.dying
            || self.driving.errors
                && match error {
                    Error::OutOfSpace { .. } => true,
                    Error::Io { .. } | Error::SyncFailed { .. } | Error::OutOfMemory { .. } => {
                        self.world.injected() > 0
                    }
                    Error::Poisoned { .. } => self.is_poisoned(),
                    _ => false,
                }
    }

    /// Pauses while requests are in flight; whether it is paused now. What is asked of it meanwhile waits.
    ///
    /// # Errors
    /// As [`step`](Self::step); a failure that nobody expects.
    pub fn pause(&mut self, workload: &mut Workload) -> Result<bool, String> {
        let poisoned = self.is_poisoned();
        // A pause promises what a flush does.
        let flush = self.model.flush(self.world.tick());
        self.world.trace(0x70);
        let result = self.answer(Control::Pause)?;
        let now = self.world.tick();
        self.model.complete(flush, now, result.is_ok());
        match result {
            Ok(()) if poisoned => return Err("paused after a sync had failed".to_owned()),
            Ok(()) => {}
            Err(error) if self.is_expected(&error) => {
                self.failed += 1;
                return Ok(false);
            }
            Err(error) => return Err(format!("pausing failed: {error}")),
        }
        // A read that was alone may have been served by its kick, before the pause, with a reply that nobody has taken yet.
        for seat in 0..self.seats.len() {
            while self.seats[seat].queue.has_reply() {
                self.poll_queue(seat)?;
            }
        }
        for _ in 0..self.rng.below(4) {
            self.submit(workload.next_ask());
        }
        let waiting = self.open.len();
        self.settle()?;
        self.look_over_caches()?;
        if self.open.len() == waiting {
            Ok(true)
        } else {
            Err("a request was served during a pause".to_owned())
        }
    }

    /// Another process puts another image in the place of this one, while the device is paused. What waits is still to come.
    pub fn replace(&mut self, built: Built) {
        self.world.replace(IMAGE, built.bytes);
        let now = self.world.now();
        let snapshot = built
            .snapshot
            .map(|contents| Bytes::from(crate::image::bytes_of(&contents)));
        let new = self.model.replaced(built.active, snapshot);
        self.past
            .push((now, std::mem::replace(&mut self.model, new)));
        self.opened = self.world.contents(IMAGE).clone();
        self.base = Base::now(&self.world, &self.layers);
    }

    /// What the disk may hold, by the history that counted at this moment; and how many disks it was before that.
    #[must_use]
    pub fn model_at(&self, now: u64) -> (&Model, u64) {
        let passed = self.past.partition_point(|(ended, _)| *ended <= now);
        let model = self
            .past
            .get(passed)
            .map_or(&self.model, |(_, model)| model);
        (model, passed as u64)
    }

    /// Goes on after a pause; `header`: somebody else may have written the image. Whether it does so.
    ///
    /// # Errors
    /// As [`step`](Self::step); a failure that nobody expects.
    pub fn resume(&mut self, header: Option<Header>) -> Result<bool, String> {
        let header = header.map(Box::new);
        let began = self.world.log().events.len();
        let result = self.answer(|reply| Control::Resume(header, reply))?;
        let ended = self.world.log().events.len();
        self.openings.push(began..ended);
        match result {
            Ok(()) => Ok(true),
            Err(error) if self.is_expected(&error) => Ok(false),
            Err(error) => Err(format!("resuming failed: {error}")),
        }
    }

    /// Makes the disk larger while requests are in flight, to so many sectors; whether it is so now.
    ///
    /// # Errors
    /// As [`step`](Self::step); a failure that nobody expects.
    pub fn grow(&mut self, sectors: u64) -> Result<bool, String> {
        let poisoned = self.is_poisoned();
        self.base.has_grown = true;
        self.model.grow(sectors, self.world.tick());
        self.world.trace(0x96 ^ sectors << 8);
        let result = self.answer(|reply| Control::Resize(sectors * 512, reply))?;
        let now = self.world.tick();
        match result {
            Ok(()) if poisoned => Err("the disk has grown after a sync had failed".to_owned()),
            Ok(()) => {
                self.model.grown(now, true);
                Ok(true)
            }
            Err(Error::Unsupported { .. }) => {
                self.model.refused();
                Ok(false)
            }
            Err(error) => {
                self.model.grown(now, false);
                self.failed += 1;
                if self.is_expected(&error) {
                    Ok(false)
                } else {
                    Err(format!("growing to {sectors} sectors failed: {error}"))
                }
            }
        }
    }

    /// Closes the device.
    ///
    /// # Errors
    /// As [`step`](Self::step); what closing says.
    pub fn close(&mut self) -> Result<(), String> {
        self.drain()?;
        // A close promises what a flush does: what lies in the file then is all that was ever completed.
        let flush = self.model.flush(self.world.tick());
        let result = self.control(Control::Close);
        let now = self.world.tick();
        self.model.complete(flush, now, result.is_ok());
        self.look_over_caches()?;
        self.seats.clear();
        self.maintenance = None;
        result.map_err(|error| format!("closing failed: {error}"))
    }

    /// None of the engine's caches holds more than it may. Nothing is under way.
    fn look_over_caches(&self) -> Result<(), String> {
        let maintenance = self.maintenance.as_ref().expect("the device is open");
        urus_engine::parts::look_over_caches(maintenance)
            .map_err(|error| format!("caches: {error}"))
    }

    /// Reads the whole disk, in pieces.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub fn read_all(&mut self) -> Result<(), String> {
        let sectors = self.model.sectors();
        let mut lba = 0;
        while lba < sectors {
            let count = (1 + self.rng.below(64)).min(sectors - lba);
            self.ask(Ask::Read { lba, count })?;
            lba += count;
        }
        self.drain()
    }

    /// A file's bytes as reads see them now.
    #[must_use]
    pub fn file(&self, file: FileId) -> Vec<u8> {
        self.world.contents(file).bytes().to_vec()
    }

    /// The image's bytes as reads see them now.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        self.file(IMAGE)
    }
}

impl Base {
    fn now(world: &SimWorld, layers: &[(FileId, bool)]) -> Self {
        let files = layers
            .iter()
            .map(|(file, raw)| (world.contents(*file).clone(), *raw));
        Self {
            at: world.now(),
            chain: Chain::new(files.collect()),
            map: OnceCell::new(),
            has_grown: false,
        }
    }

    fn map(&self) -> Result<&[Extent], String> {
        if self.map.get().is_none() {
            let map = self.chain.map()?;
            return Ok(self.map.get_or_init(|| map));
        }
        Ok(self.map.get().expect("it is there"))
    }
}

/// A status is asked for bytes, not for sectors: by its token it begins and ends somewhere in the first and last one.
fn asked_bytes(token: u64, lba: u64, count: u64) -> (u64, u64) {
    let (start, end) = (lba * SECTOR, (lba + count) * SECTOR);
    let drawn = mix(token ^ mix(lba));
    match drawn % 3 {
        0 => (start, end),
        1 => (start + (drawn >> 8) % SECTOR, end),
        _ => {
            let start = start + (drawn >> 8) % (SECTOR / 2);
            (start, end - (drawn >> 32) % (SECTOR / 2))
        }
    }
}

impl Drop for Machine {
    /// A queue that is dropped waits for what is in flight, and here nobody would poll maintenance meanwhile. So a run
    /// that ends in the middle (it has failed) lets its queues leak.
    fn drop(&mut self) {
        if !self.open.is_empty() || std::thread::panicking() {
            std::mem::forget(std::mem::take(&mut self.seats));
            std::mem::forget(self.maintenance.take());
        }
    }
}
