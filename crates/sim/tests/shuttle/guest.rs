//! A guest on its thread: requests drawn by lot, each reply held against the model, and looks at the disk in between.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use shuttle::rand::{Rng as _, thread_rng};
use urus_engine::request::{Reply, Request, RequestKind};
use urus_engine::{Counters, Error, Queue, Shared};
use urus_format::Header;
use urus_sim::config::{Config, FIRST_VERSION};
use urus_sim::contents::Contents;
use urus_sim::judge::{Found, Scene};
use urus_sim::memory::SimMemory;
use urus_sim::model::{GuestOp, Model};
use urus_sim::rng::Rng;
use urus_sim::stamp::stamped;

use crate::disk::{Disk, Handle, Paused};

thread_local! {
    /// Every shuttle thread of a run is this one thread of the system.
    static SCENE: RefCell<Option<(u64, Rc<Scene>)>> = const { RefCell::new(None) };
}

/// The files before the first request, by the seed that they come from.
pub(crate) fn scene(config: &Config, seed: u64) -> Rc<Scene> {
    SCENE.with(|cell| {
        let mut cell = cell.borrow_mut();
        match &*cell {
            Some((known, scene)) if *known == seed && scene.config.name == config.name => {
                Rc::clone(scene)
            }
            _ => {
                let scene = Rc::new(Scene::new(config, &mut Rng::new(seed)));
                *cell = Some((seed, Rc::clone(&scene)));
                scene
            }
        }
    })
}

/// What all threads of a run know. Its locks are never held across a switch of threads.
pub(crate) struct Ledger {
    pub(crate) config: Config,
    seed: u64,
    pub(crate) disk: Disk,
    pub(crate) model: std::sync::Mutex<Model>,
    now: AtomicU64,
    /// The device is about to be closed or dropped: requests may be refused.
    pub(crate) closing: AtomicBool,
    counters: std::sync::Mutex<Option<(Weak<Shared>, Counters)>>,
    /// Clusters that a device has leaked which went without a close.
    pub(crate) leaked: AtomicU64,
}

impl Ledger {
    pub(crate) fn new(config: &Config, seed: u64) -> Arc<Self> {
        let scene = scene(config, seed);
        let fixture = &scene.fixture;
        let files = scene.files().iter().zip(&fixture.files);
        let disk = Disk::new(files.map(|(file, spec)| (file.bytes().to_vec(), spec.properties)));
        let model = Model::new(fixture.initial.clone(), FIRST_VERSION)
            .with_room(config.sectors + config.grows);
        Arc::new(Self {
            config: config.clone(),
            seed,
            disk,
            model: std::sync::Mutex::new(model),
            now: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            counters: std::sync::Mutex::default(),
            leaked: AtomicU64::new(0),
        })
    }

    pub(crate) fn tick(&self) -> u64 {
        self.now.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(crate) fn scene(&self) -> Rc<Scene> {
        scene(&self.config, self.seed)
    }

    /// Judges files that a kill or a power cut would leave at this moment.
    pub(crate) fn judge(&self, files: Vec<Vec<u8>>, killed: bool) -> Result<Found, String> {
        let view = {
            let model = self.model.lock().unwrap();
            if killed {
                model.after_kill(self.tick())
            } else {
                model.after_cut(self.tick())
            }
        };
        let files: Vec<Contents> = files.into_iter().map(Contents::new).collect();
        self.scene().judge(&files, &view)
    }

    /// Judges files of a device that has nothing to do and nothing left to settle.
    pub(crate) fn judge_quiet(&self, files: Vec<Vec<u8>>, when: &str) {
        match self.judge(files, false) {
            Ok(Found { leaks, .. }) => {
                let known = self.leaked.load(Ordering::SeqCst);
                assert!(leaks <= known, "{when}: {leaks} leaks, {known} before");
            }
            Err(error) => panic!("{when}: {error}"),
        }
    }

    /// A device went without a close: the disk is from now on what its files hold, and they stay as they are.
    pub(crate) fn adopt(&self) {
        let found = self.judge(self.disk.now(), false);
        let found = found.unwrap_or_else(|error| panic!("dropped under its guests: {error}"));
        self.disk.sync();
        self.leaked.store(found.leaks, Ordering::SeqCst);
        let mut model = self.model.lock().unwrap();
        let adopted = model.adopt(&found.guest);
        *model = adopted.unwrap_or_else(|mismatch| panic!("dropped: {mismatch}"));
    }

    /// O20: the size that a device shows is not ahead of what its file says. And what it counts never goes back.
    fn look_at(&self, shared: &Arc<Shared>) {
        let shown = shared.size();
        let image = self.disk.now().swap_remove(0);
        let on_disk = if self.config.raw {
            image.len() as u64
        } else {
            let header = Header::parse(&image, image.len() as u64).expect("the header parses");
            header.size
        };
        assert!(
            shown <= on_disk,
            "the device shows {shown} bytes, its file has {on_disk}"
        );
        // Guests of a device that has gone may look once more, when there is another.
        let of_this = |(device, _): &(Weak<Shared>, Counters)| {
            std::ptr::eq(device.as_ptr(), Arc::as_ptr(shared))
        };
        let before = self.counters.lock().unwrap().clone().filter(of_this);
        let before = before.map_or(Counters::default(), |(_, counters)| counters);
        let now = shared.counters();
        assert!(
            now.mapping_hits >= before.mapping_hits
                && now.slice_loads >= before.slice_loads
                && now.evicted_slices >= before.evicted_slices
                && now.commits >= before.commits
                && now.barriers >= before.barriers
                && now.allocated_clusters >= before.allocated_clusters
                && now.freed_clusters >= before.freed_clusters
                && now.decoded_hits >= before.decoded_hits,
            "counters went back: {before:?}, {now:?}"
        );
        *self.counters.lock().unwrap() = Some((Arc::downgrade(shared), now));
    }
}

/// What a request in flight is to the model.
enum What {
    Change(GuestOp),
    Read(u64),
    Status,
    /// A read that may lie past the disk's end.
    Beyond(u64),
}

/// One queue on its thread, and its requests in flight: token, what it is, moment of issue.
pub(crate) struct Guest {
    shared: Arc<Shared>,
    queue: Queue<Handle>,
    pub(crate) ledger: Arc<Ledger>,
    paused: Paused,
    open: Vec<(u64, What, u64)>,
    next: u64,
    /// The device was closed: nothing more is to be had.
    pub(crate) closed: bool,
}

impl Guest {
    pub(crate) fn new(shared: &Arc<Shared>, ledger: &Arc<Ledger>, paused: &Paused) -> Self {
        Self {
            queue: seat(shared, ledger, paused),
            shared: Arc::clone(shared),
            ledger: Arc::clone(ledger),
            paused: Arc::clone(paused),
            open: Vec::new(),
            next: 0,
            closed: false,
        }
    }

    /// Another queue takes this one's place, which is dropped with requests in flight: their replies are lost.
    fn change_seats(&mut self) {
        let next = seat(&self.shared, &self.ledger, &self.paused);
        drop(std::mem::replace(&mut self.queue, next));
        let now = self.ledger.tick();
        let mut model = self.ledger.model.lock().unwrap();
        for (_, what, _) in self.open.drain(..) {
            if let What::Change(op) = what {
                model.complete(op, now, false);
            }
        }
    }

    fn submit(&mut self, make: impl FnOnce(&mut Model, u64) -> (RequestKind<SimMemory>, What)) {
        while self.open.len() >= 3 {
            self.take_replies();
        }
        let now = self.ledger.tick();
        let (kind, what) = make(&mut self.ledger.model.lock().unwrap(), now);
        let token = self.next;
        self.next += 1;
        self.open.push((token, what, now));
        assert!(self.queue.submit(Request { token, kind }).is_ok());
        if thread_rng().gen_range(0..3) == 0 {
            self.queue.kick();
        }
    }

    /// Waits for one reply at least.
    fn take_replies(&mut self) {
        let before = self.open.len();
        loop {
            while let Some(reply) = self.queue.complete() {
                self.replied(reply);
            }
            if self.open.len() < before {
                return;
            }
            self.queue.wait(None);
        }
    }

    fn replied(&mut self, reply: Reply<SimMemory>) {
        let at = self
            .open
            .iter()
            .position(|(token, ..)| *token == reply.token);
        let (_, what, issued) = self
            .open
            .swap_remove(at.expect("one reply to each request"));
        let now = self.ledger.tick();
        let mut model = self.ledger.model.lock().unwrap();
        if let What::Change(op) = what {
            model.complete(op, now, reply.result.is_ok());
        }
        match reply.result.map_err(|error| *error) {
            Err(Error::Closed) if self.ledger.closing.load(Ordering::SeqCst) => {
                self.closed = true;
                return;
            }
            Err(Error::OutOfRange { .. }) if matches!(what, What::Beyond(_)) => return,
            Err(error) => panic!("no request fails: {error}"),
            Ok(()) => {}
        }
        match what {
            What::Change(_) => {}
            What::Read(lba) | What::Beyond(lba) => {
                let bytes = reply.memory.expect("a read gives its memory back").to_vec();
                if let Err(mismatch) = model.check_read(lba, &bytes, issued, now) {
                    panic!("read: {mismatch}");
                }
            }
            What::Status => {
                for extent in reply.extents.iter().filter(|extent| extent.zero) {
                    let zeroes = vec![0; usize::try_from(extent.len).unwrap()];
                    let said = model.check_read(extent.start / 512, &zeroes, issued, now);
                    if let Err(mismatch) = said {
                        panic!("status says zero: {mismatch}");
                    }
                }
            }
        }
    }

    pub(crate) fn drain(&mut self) {
        while !self.open.is_empty() {
            self.take_replies();
        }
    }

    pub(crate) fn read(&mut self, lba: u64, count: u64) {
        self.submit(|_, _| (read(lba, count), What::Read(lba)));
    }

    pub(crate) fn flush(&mut self) {
        self.submit(|model, now| (RequestKind::Flush, What::Change(model.flush(now))));
    }

    /// Some sectors, within a few clusters that everybody uses: at the start, at the end as it is now, or (`spread`) so far apart that
    /// each has an L2 slice of its own.
    fn place(&self, spread: bool) -> (u64, u64) {
        let mut lot = thread_rng();
        let sectors = self.shared.size() / 512;
        let cluster = self.ledger.config.cluster_sectors();
        let window = (cluster * 6).min(sectors);
        let start = match lot.gen_range(0..4) {
            0 if self.ledger.config.grows > 0 => sectors - window,
            1 | 2 if spread => lot.gen_range(0..sectors.div_ceil(64)) * 64,
            _ => 0,
        };
        let end = (start + window).min(sectors);
        let count = lot.gen_range(1..=(end - start).min(6));
        (lot.gen_range(start..=end - count), count)
    }

    /// A request drawn by lot, or something else that a guest may do.
    pub(crate) fn random(&mut self, spread: bool) {
        let mut lot = thread_rng();
        let (lba, count) = self.place(spread);
        let (offset, len) = (lba * 512, count * 512);
        match lot.gen_range(0..24) {
            0..4 => self.read(lba, count),
            4..8 => self.submit(|model, now| {
                let op = model.discard(lba, count, now);
                (RequestKind::Discard { offset, len }, What::Change(op))
            }),
            8 | 9 => self.flush(),
            10 | 11 => self.submit(|model, now| {
                let (unmap, fua) = (count % 2 == 0, false);
                let op = model.zero(lba, count, fua, now);
                let kind = RequestKind::WriteZeroes {
                    offset,
                    len,
                    unmap,
                    fua,
                };
                (kind, What::Change(op))
            }),
            12 => self.submit(|_, _| (RequestKind::BlockStatus { offset, len }, What::Status)),
            13 if lot.gen_range(0..3) == 0 => self.change_seats(),
            14 if self.ledger.config.grows > 0 => {
                let end = self.shared.size() / 512;
                self.submit(|_, _| (read(end, 1), What::Beyond(end)));
            }
            15 => self.look(),
            _ => self.submit(|model, now| {
                let fua = lba % 5 == 0;
                let (op, version) = model.write(lba, count, fua, now);
                let memory = SimMemory::from_vec(stamped(lba, count, version));
                let kind = RequestKind::Write {
                    offset,
                    memory,
                    fua,
                };
                (kind, What::Change(op))
            }),
        }
    }

    /// What if the power failed now, or the process were killed?
    fn look(&self) {
        self.ledger.look_at(&self.shared);
        let (files, killed) = if self.ledger.config.outlives {
            (self.ledger.disk.now(), true)
        } else {
            (self.ledger.disk.after_power_cut(), false)
        };
        if let Err(error) = self.ledger.judge(files, killed) {
            panic!("a cut or kill: {error}");
        }
    }
}

fn seat(shared: &Arc<Shared>, ledger: &Ledger, paused: &Paused) -> Queue<Handle> {
    let mut queue = Queue::new(Arc::clone(shared), ledger.disk.handle(paused), 3);
    queue.outlive_process(ledger.config.outlives);
    queue
}

fn read(lba: u64, count: u64) -> RequestKind<SimMemory> {
    RequestKind::Read {
        offset: lba * 512,
        memory: SimMemory::from_vec(vec![0xa5; usize::try_from(count * 512).unwrap()]),
    }
}
