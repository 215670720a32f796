//! Simulated files, and a scheduler that decides by lot when an operation takes effect and when its completion
//! arrives. The two differ, and the engine may look for completions later still.
//!
//! [`SimWorld`] is shared by all [`SimStorage`] handles of a device (one for each queue,
//! one for maintenance). Everything that happens comes from [`SimWorld::step`] and from the calls on the handles,
//! so one seed gives one run.

use std::cell::{Ref, RefCell};
use std::rc::Rc;

use urus_engine::storage::{FileId, FileProperties};
use urus_engine::sync::{Arc, Ordering};

use crate::callers::Asked;
use crate::census::{Census, Kind};
use crate::checker;
use crate::contents::Contents;
use crate::fault::{Fault, FaultPlan};
use crate::log::{Event, Log, OpId};
use crate::op::{Landed, Outcome, Running};
use crate::rng::{Rng, TraceHash};
use crate::space::Space;
use crate::storage::{Flag, SimStorage};

/// The image: the first file of a machine.
pub const IMAGE: FileId = FileId(0);

/// What a simulated file is.
#[derive(Clone, Debug)]
pub struct FileSpec {
    /// Its bytes, all of them durable.
    pub contents: Vec<u8>,
    /// What it can do.
    pub properties: FileProperties,
    /// Whether it may be changed at all; a change of a file that may not is a complaint.
    pub writable: bool,
    /// It cannot grow beyond this many bytes (ENOSPC).
    pub capacity: u64,
}

/// No simulated file may grow beyond this: a wild offset is a complaint, not a machine out of memory.
pub const MAX_FILE_BYTES: u64 = 256 << 20;

impl FileSpec {
    /// A buffered regular file that can do everything.
    #[must_use]
    pub fn new(contents: Vec<u8>) -> Self {
        let properties = FileProperties {
            alignment: 1,
            memory_alignment: 1,
            regular: true,
            can_punch: true,
            can_zero_range: true,
        };
        Self {
            contents,
            properties,
            writable: true,
            capacity: MAX_FILE_BYTES,
        }
    }

    /// Opened with O_DIRECT: what is not aligned is refused with EINVAL.
    #[must_use]
    pub fn direct(mut self, alignment: u32) -> Self {
        self.properties.alignment = alignment;
        self.properties.memory_alignment = alignment;
        self
    }

    /// A block device: fixed length, and what was never written reads as anything but zeroes.
    #[must_use]
    pub fn block_device(mut self, len: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        while self.contents.len() < len {
            self.contents
                .extend_from_slice(&(rng.next_u64() | 0x0101_0101_0101_0101).to_le_bytes());
        }
        self.contents.truncate(len);
        self.properties.regular = false;
        self
    }

    /// Its bytes as a world holds them.
    pub(crate) fn into_contents(self) -> Contents {
        if self.properties.regular {
            Contents::new(self.contents)
        } else {
            Contents::fixed(self.contents)
        }
    }

    /// Never changed by anybody, as a backing file.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }
}

/// log2 of the steps that a stuck operation waits, at most.
pub const STUCK_STEPS_BITS: u64 = 15;

/// How the simulated machine behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimConfig {
    /// Operations that one handle can have in flight; more are given back.
    pub depth: usize,
    /// So many in 256 submissions are given back though there is room (never when nothing is in flight).
    pub refuse: u32,
    /// So many in 256 operations are slow: others overtake them for a long time.
    pub slow: u32,
    /// So many in 256 operations are stuck: they have no effect, or their completions are held back, for a drawn number of steps (at most
    /// 2 to the power of [`STUCK_STEPS_BITS`]), unless nothing else can happen.
    pub stuck: u32,
    /// So many in 256 operations of several sectors take effect in two parts.
    pub split: u32,
    /// Whether operations may start before `kick`. Off, a forgotten kick shows as a hang.
    pub eager: bool,
    /// Whether the device may punch holes; where it was told not to, one is a complaint.
    pub gives_back: bool,
    /// So many in 256 punches, zero ranges and allocations are answered by EOPNOTSUPP, though the file is said to be able to do them.
    pub unsupported: u32,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            depth: 64,
            refuse: 4,
            slow: 32,
            stuck: 0,
            split: 48,
            eager: false,
            gives_back: true,
            unsupported: 0,
        }
    }
}

impl SimConfig {
    /// A behaviour drawn by lot.
    #[must_use]
    pub fn random(rng: &mut Rng) -> Self {
        let pick = |rng: &mut Rng, from: &[u32]| from[rng.index(from.len())];
        Self {
            depth: pick(rng, &[1, 2, 4, 16, 64, 256]) as usize,
            refuse: pick(rng, &[0, 0, 4, 64]),
            slow: pick(rng, &[0, 16, 64, 128]),
            stuck: pick(rng, &[0, 0, 4, 16]),
            split: pick(rng, &[0, 32, 128]),
            eager: rng.chance(64),
            gives_back: true,
            unsupported: 0,
        }
    }
}

pub(crate) struct File {
    pub(crate) contents: Contents,
    pub(crate) properties: FileProperties,
    pub(crate) writable: bool,
    pub(crate) capacity: u64,
    /// Room on its disk, where that is counted.
    pub(crate) space: Option<Space>,
}

/// One [`SimStorage`]: what it has in flight and what waits to be seen.
pub(crate) struct Handle {
    pub(crate) in_flight: Vec<usize>,
    pub(crate) ready: Vec<Landed>,
    pub(crate) flag: Arc<Flag>,
    pub(crate) closed: bool,
}

pub(crate) struct World {
    pub(crate) config: SimConfig,
    pub(crate) rng: Rng,
    pub(crate) files: Vec<File>,
    pub(crate) handles: Vec<Handle>,
    /// Submitted and not (wholly) in effect.
    pub(crate) running: Vec<Running>,
    /// In effect; the completion has not arrived.
    pub(crate) landed: Vec<Landed>,
    pub(crate) log: Log,
    pub(crate) faults: FaultPlan,
    pub(crate) trace: TraceHash,
    pub(crate) now: u64,
    pub(crate) steps: u64,
    pub(crate) next_op: u32,
    pub(crate) complaints: Vec<String>,
    /// Waits in a row during which nothing could happen.
    pub(crate) idle_waits: u32,
}

impl World {
    pub(crate) fn record(&mut self, event: Event) {
        self.now += 1;
        self.log.events.push((self.now, event));
    }

    pub(crate) fn complain(&mut self, what: String) {
        if self.complaints.len() < 20 {
            self.complaints.push(what);
        }
    }

    pub(crate) fn new_op(&mut self) -> OpId {
        self.next_op += 1;
        OpId(self.next_op)
    }

    /// One thing happens. What is left to run after the world is released comes back.
    fn step(&mut self) -> Outcome {
        self.steps += 1;
        let (eager, steps) = (self.config.eager, self.steps);
        let may_start = |op: &Running| op.kicked || eager;
        let mut startable: Vec<usize> = Vec::new();
        let mut stuck: Vec<usize> = Vec::new();
        for (at, op) in self
            .running
            .iter()
            .enumerate()
            .filter(|(_, op)| may_start(op))
        {
            let list = if op.stuck_until > steps {
                &mut stuck
            } else {
                &mut startable
            };
            list.push(at);
        }
        let due = |landed: &Landed| landed.held_until <= steps;
        let mut landed: Vec<usize> = (0..self.landed.len())
            .filter(|at| due(&self.landed[*at]))
            .collect();
        if startable.is_empty() && landed.is_empty() {
            // Nothing else can happen.
            startable = stuck;
            landed = (0..self.landed.len()).collect();
        }
        let candidates = startable.len() + landed.len();
        if candidates == 0 {
            return Outcome::Idle;
        }
        self.idle_waits = 0;
        // A slow operation is drawn again a few times before its turn comes.
        for attempt in 0.. {
            let drawn = self.rng.index(candidates);
            if drawn < landed.len() {
                let landed = self.landed.swap_remove(landed[drawn]);
                self.arrive(landed);
                return Outcome::Done;
            }
            let at = startable[drawn - landed.len()];
            if attempt < 8 && self.running[at].slow && self.rng.chance(240) {
                continue;
            }
            let op = self.running.swap_remove(at);
            return self.advance(op);
        }
        unreachable!("the loop ends by returning")
    }

    pub(crate) fn arrive(&mut self, landed: Landed) {
        self.trace.add(0xa0 ^ u64::from(landed.op.0) << 8);
        let handle = &mut self.handles[landed.handle];
        if !handle.closed {
            handle.ready.push(landed);
        } else if landed.logged {
            // Nobody hears of it; whoever comes later finds it done.
            self.record(Event::Seen { op: landed.op });
        }
    }
}

/// The files, the scheduler and the log of one simulated machine. Cheap to clone: all clones are the same world.
#[derive(Clone)]
pub struct SimWorld(pub(crate) Rc<RefCell<World>>);

impl SimWorld {
    /// A machine with these files; the first is the image, its backing files follow.
    #[must_use]
    pub fn new(seed: u64, config: SimConfig, files: Vec<FileSpec>) -> Self {
        let file = |spec: FileSpec| {
            let (properties, writable, capacity) = (spec.properties, spec.writable, spec.capacity);
            (spec.into_contents(), properties, writable, capacity)
        };
        Self::holding(seed, config, files.into_iter().map(file))
    }

    /// A machine with files of these contents: what they can do, whether they may be changed, and what they may grow to.
    pub(crate) fn holding(
        seed: u64,
        config: SimConfig,
        files: impl Iterator<Item = (Contents, FileProperties, bool, u64)>,
    ) -> Self {
        let files: Vec<File> = files
            .map(|(contents, properties, writable, capacity)| File {
                contents,
                properties,
                writable,
                capacity: capacity.min(MAX_FILE_BYTES),
                space: None,
            })
            .collect();
        let initial = files.iter().map(|file| file.contents.clone()).collect();
        Self(Rc::new(RefCell::new(World {
            config,
            rng: Rng::new(seed),
            files,
            handles: Vec::new(),
            running: Vec::new(),
            landed: Vec::new(),
            log: Log {
                initial,
                events: Vec::new(),
            },
            faults: FaultPlan::default(),
            trace: TraceHash::default(),
            now: 0,
            steps: 0,
            next_op: 0,
            complaints: Vec::new(),
            idle_waits: 0,
        })))
    }

    /// Another handle, for one more queue.
    #[must_use]
    pub fn handle(&self) -> SimStorage {
        let flag = Arc::new(Flag::default());
        let mut world = self.0.borrow_mut();
        let number = world.handles.len();
        let handle = Handle {
            in_flight: Vec::new(),
            ready: Vec::new(),
            flag: Arc::clone(&flag),
            closed: false,
        };
        world.handles.push(handle);
        drop(world);
        SimStorage::new(self.clone(), number, flag)
    }

    /// Lets one thing happen: an operation takes effect (maybe in part), or a completion arrives. False when nothing
    /// is left that could.
    pub fn step(&self) -> bool {
        let outcome = self.0.borrow_mut().step();
        match outcome {
            Outcome::Idle => false,
            Outcome::Done => true,
            Outcome::Job(job, landed) => {
                // Not under the borrow: what the job does is not the world's to know.
                job();
                self.0.borrow_mut().landed.push(landed);
                true
            }
        }
    }

    /// Lets everything happen that can.
    pub fn settle(&self) {
        while self.step() {}
    }

    /// What a process that is gone had not started yet never happens; all else has.
    pub(crate) fn bury(&self) {
        self.settle();
        let mut world = self.0.borrow_mut();
        for op in std::mem::take(&mut world.running) {
            if world.handles[op.handle].closed {
                world.record(Event::Dropped { op: op.op });
            } else {
                world.running.push(op);
            }
        }
    }

    /// Whether the owner of this handle has a reason to look: a completion arrived, or somebody notified it. A runner
    /// that polls only then finds lost wake-ups.
    #[must_use]
    pub fn is_awake(&self, handle: usize) -> bool {
        let world = self.0.borrow();
        let handle = &world.handles[handle];
        !handle.ready.is_empty() || handle.flag.is_set()
    }

    /// Clears a handle's notification, as a poll of its owner's event loop does; whether there was one.
    pub fn take_notification(&self, handle: usize) -> bool {
        self.0.borrow().handles[handle]
            .flag
            .0
            .swap(false, Ordering::SeqCst)
    }

    /// The moment of the last event.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.borrow().now
    }

    /// A new moment, later than every event so far: for what happens outside the storage (a guest's request is
    /// issued or completed).
    pub fn tick(&self) -> u64 {
        let mut world = self.0.borrow_mut();
        world.now += 1;
        world.now
    }

    /// Adds something of the runner's own to the trace hash.
    pub fn trace(&self, value: u64) {
        self.0.borrow_mut().trace.add(value);
    }

    /// Names the run so far: equal for equal seeds.
    #[must_use]
    pub fn trace_hash(&self) -> u64 {
        self.0.borrow().trace.value()
    }

    /// What happened so far.
    #[must_use]
    pub fn log(&self) -> Ref<'_, Log> {
        Ref::map(self.0.borrow(), |world| &world.log)
    }

    /// A file as reads see it now.
    #[must_use]
    pub fn contents(&self, file: FileId) -> Ref<'_, Contents> {
        Ref::map(self.0.borrow(), |world| {
            &world.files[usize::from(file.0)].contents
        })
    }

    /// From now on these errors are given. Replaces what was planned before; the counts go on.
    pub fn plan_faults(&self, faults: Vec<Fault>) {
        let plan = &mut self.0.borrow_mut().faults;
        if !faults.is_empty() {
            plan.touches.get_or_insert_default();
        }
        plan.faults = faults;
    }

    /// Another process has written the file while the device was paused: it holds these bytes now, durably. A block device keeps its length.
    pub fn replace(&self, file: FileId, mut bytes: Vec<u8>) {
        let mut world = self.0.borrow_mut();
        assert!(world.running.is_empty(), "nothing of ours is in flight");
        let old = &world.files[usize::from(file.0)].contents;
        let contents = if old.is_fixed() {
            assert!(bytes.len() <= old.bytes().len(), "it fits the device");
            bytes.extend_from_slice(&old.bytes()[bytes.len()..]);
            Contents::fixed(bytes)
        } else {
            Contents::new(bytes)
        };
        world.files[usize::from(file.0)].contents = contents.clone();
        world.trace.add(contents.hash());
        world.record(Event::Replaced { file, contents });
    }

    /// From now on every change of a file is a complaint.
    pub(crate) fn forbid_writes(&self) {
        let files = &mut self.0.borrow_mut().files;
        files.iter_mut().for_each(|file| file.writable = false);
    }

    /// Limits how far a file can grow (ENOSPC beyond); to lift it again, give a larger limit.
    pub fn limit(&self, file: FileId, capacity: u64) {
        self.0.borrow_mut().files[usize::from(file.0)].capacity = capacity.min(MAX_FILE_BYTES);
    }

    /// From now on the disk has room for so many more blocks of [`BLOCK`](crate::space::BLOCK) bytes of this file (ENOSPC beyond). What
    /// is punched, or cut off, comes back.
    pub fn give_room(&self, file: FileId, blocks: u64) {
        let file = &mut self.0.borrow_mut().files[usize::from(file.0)];
        file.space = Some(Space::new(file.contents.bytes(), blocks));
    }

    /// Makes a block device longer, as an administrator does while it is in use.
    pub fn lengthen(&self, file: FileId, len: u64) {
        let file = &mut self.0.borrow_mut().files[usize::from(file.0)];
        file.contents.lengthen(len);
    }

    /// Storage operations submitted so far.
    #[must_use]
    pub fn op_count(&self) -> u64 {
        self.0.borrow().faults.ops
    }

    /// Those of them that were fdatasyncs.
    #[must_use]
    pub fn sync_count(&self) -> u64 {
        self.0.borrow().faults.syncs
    }

    /// Planned errors that really hit.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.0.borrow().faults.injected
    }

    /// What errors were planned for, and what they hit.
    #[must_use]
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        if let Some(touches) = &self.0.borrow().faults.touches {
            let owners = checker::check(self.contents(IMAGE).bytes()).owners;
            census.take(touches, &owners);
        }
        census
    }

    /// The kind of each operation, in order, where errors were planned from the start.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        let owners = checker::check(self.contents(IMAGE).bytes()).owners;
        let world = self.0.borrow();
        let touches = world.faults.touches.iter().flatten();
        touches.map(|touch| touch.kind(&owners)).collect()
    }

    /// Who asked for all that can fail, where errors were planned from the start.
    pub(crate) fn asked(&self) -> Asked {
        self.0.borrow().faults.asked.clone()
    }

    /// The fdatasyncs that failed for good, EINTR and its like not counted.
    #[must_use]
    pub fn failed_syncs(&self) -> usize {
        let failed = |(_, event): &&(u64, Event)| matches!(event, Event::Synced { ok: false, .. });
        self.0.borrow().log.events.iter().filter(failed).count()
    }

    /// Planned errors that hit an fdatasync, EINTR and its like counted.
    #[must_use]
    pub fn injected_syncs(&self) -> u64 {
        self.0.borrow().faults.injected_syncs
    }

    /// Writes of the header that failed by planned errors, EINTR and its like not counted.
    #[must_use]
    pub fn injected_headers(&self) -> usize {
        let world = self.0.borrow();
        let touches = world.faults.touches.iter().flatten();
        touches.filter(|touch| touch.fails_header()).count()
    }

    /// Operations submitted whose completions were not seen.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0
            .borrow()
            .handles
            .iter()
            .map(|handle| handle.in_flight.len())
            .sum()
    }

    /// What no driver's user may do (the first few): memory changed under a write, unaligned I/O, changes of a
    /// read-only file, wild offsets.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        self.0.borrow().complaints.clone()
    }
}

impl Flag {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
