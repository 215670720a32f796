//! The whole engine on several threads, in schedules that shuttle draws: queues that allocate, discard, zero, flush and
//! read the same few clusters, maintenance beside them. A lost wake-up shows as a deadlock, a lost or foreign sector in a
//! read, a wrong refcount in the file that is left.
//!
//! `cargo test -p urus-sim --features shuttle --test shuttle`; `URUS_SCHEDULES` says how many.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shuttle::rand::{Rng as _, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::{Condvar, Mutex};
use urus_engine::planted::{Bug, plant};
use urus_engine::request::{Reply, Request, RequestKind};
use urus_engine::storage::{
    Completion, FileId, FileProperties, Memory, Notify, Op, OpKind, Slot, Storage,
};
use urus_engine::{Control, Maintenance, Queue, Shared};
use urus_sim::config::{self, Config, FIRST_VERSION};
use urus_sim::contents::Contents;
use urus_sim::judge::Scene;
use urus_sim::memory::SimMemory;
use urus_sim::model::{GuestOp, Model};
use urus_sim::rng::Rng;
use urus_sim::stamp::stamped;

/// What wakes a thread out of its sleep.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Notify for Bell {
    fn notify(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }
}

/// Files in memory, behind a lock that is a point where shuttle may switch threads.
#[derive(Clone)]
struct Disk(Arc<Vec<Mutex<Vec<u8>>>>);

/// One thread's way to the disk. Operations happen on `kick`, in any order.
struct Handle {
    disk: Disk,
    bell: Arc<Bell>,
    submitted: Vec<(Op<SimMemory>, Slot)>,
    done: VecDeque<Completion>,
}

impl Disk {
    fn handle(&self) -> Handle {
        Handle {
            disk: self.clone(),
            bell: Arc::default(),
            submitted: Vec::new(),
            done: VecDeque::new(),
        }
    }

    fn perform(&self, Op { file, kind }: Op<SimMemory>) -> usize {
        let mut bytes = self.0[usize::from(file.0)].lock().unwrap();
        let at = |offset: u64| usize::try_from(offset).unwrap();
        match kind {
            OpKind::Read { offset, memory } => {
                let start = at(offset).min(bytes.len());
                let end = (start + memory.len()).min(bytes.len());
                memory.write(0, &bytes[start..end]);
                end - start
            }
            OpKind::Write { offset, memory, .. } => {
                let end = at(offset) + memory.len();
                let len = bytes.len().max(end);
                bytes.resize(len, 0);
                bytes[at(offset)..end].copy_from_slice(&memory.to_vec());
                memory.len()
            }
            OpKind::Punch { offset, len } => {
                let end = at(offset + len).min(bytes.len());
                let start = at(offset).min(end);
                bytes[start..end].fill(0);
                0
            }
            OpKind::ZeroRange { offset, len } => {
                let end = at(offset + len);
                let grown = bytes.len().max(end);
                bytes.resize(grown, 0);
                bytes[at(offset)..end].fill(0);
                0
            }
            OpKind::Allocate { offset, len } => {
                let grown = bytes.len().max(at(offset + len));
                bytes.resize(grown, 0);
                0
            }
            OpKind::SetLen { len } => {
                bytes.resize(at(len), 0);
                0
            }
            OpKind::SyncData => 0,
            OpKind::Job(job) => {
                drop(bytes);
                job();
                0
            }
        }
    }
}

impl Storage for Handle {
    type Memory = SimMemory;

    fn allocate(&self, bytes: usize) -> SimMemory {
        SimMemory::zeroed(bytes)
    }

    fn submit(&mut self, op: Op<SimMemory>, slot: Slot) -> Result<(), Op<SimMemory>> {
        self.submitted.push((op, slot));
        Ok(())
    }

    fn read_now(&mut self, file: FileId, offset: u64, memory: &SimMemory) -> bool {
        if thread_rng().gen_range(0..2) == 0 {
            return false;
        }
        let bytes = self.disk.0[usize::from(file.0)].lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        match bytes.get(start..start + memory.len()) {
            Some(found) => {
                memory.write(0, found);
                true
            }
            None => false,
        }
    }

    fn kick(&mut self) {
        while !self.submitted.is_empty() {
            let next = thread_rng().gen_range(0..self.submitted.len());
            let (op, slot) = self.submitted.swap_remove(next);
            let result = Ok(self.disk.perform(op));
            self.done.push_back(Completion { slot, result });
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn wait(&mut self, _timeout: Option<Duration>) {
        if !self.done.is_empty() {
            return;
        }
        let mut rung = self.bell.rung.lock().unwrap();
        while !*rung {
            rung = self.bell.changed.wait(rung).unwrap();
        }
        *rung = false;
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        Arc::clone(&self.bell) as Arc<dyn Notify>
    }

    fn properties(&self, _file: FileId) -> FileProperties {
        FileProperties {
            alignment: 1,
            memory_alignment: 1,
            regular: true,
            can_punch: true,
            can_zero_range: true,
        }
    }

    fn file_len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.disk.0[usize::from(file.0)].lock().unwrap().len() as u64)
    }
}

/// What the disk may hold, and the moments of requests and replies. Never locked across a switch of threads.
struct Ledger {
    model: std::sync::Mutex<Model>,
    now: AtomicU64,
}

impl Ledger {
    fn tick(&self) -> u64 {
        self.now.fetch_add(1, Ordering::SeqCst) + 1
    }
}

/// One queue on its thread, and its requests in flight: token, change or (for a read) address, moment.
struct Guest {
    queue: Queue<Handle>,
    ledger: Arc<Ledger>,
    open: Vec<(u64, Result<GuestOp, u64>, u64)>,
    next: u64,
}

impl Guest {
    fn new(shared: &Arc<Shared>, disk: &Disk, ledger: &Arc<Ledger>) -> Self {
        Self {
            queue: Queue::new(Arc::clone(shared), disk.handle(), 3),
            ledger: Arc::clone(ledger),
            open: Vec::new(),
            next: 0,
        }
    }

    fn submit(
        &mut self,
        make: impl FnOnce(&mut Model, u64) -> (RequestKind<SimMemory>, Result<GuestOp, u64>),
    ) {
        while self.open.len() >= 3 {
            self.take_replies();
        }
        let now = self.ledger.tick();
        let (kind, what) = make(&mut self.ledger.model.lock().unwrap(), now);
        let token = self.next;
        self.next += 1;
        self.open.push((token, what, now));
        assert!(self.queue.submit(Request { token, kind }).is_ok());
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
        reply.result.expect("no request fails");
        let now = self.ledger.tick();
        let mut model = self.ledger.model.lock().unwrap();
        match what {
            Ok(op) => model.complete(op, now, true),
            Err(lba) => {
                let bytes = reply.memory.expect("a read gives its memory back").to_vec();
                if let Err(mismatch) = model.check_read(lba, &bytes, issued, now) {
                    panic!("read: {mismatch}");
                }
            }
        }
    }

    fn drain(&mut self) {
        while !self.open.is_empty() {
            self.take_replies();
        }
    }

    fn read(&mut self, lba: u64, count: u64) {
        self.submit(|_, _| {
            let memory = SimMemory::from_vec(vec![0xa5; usize::try_from(count * 512).unwrap()]);
            let offset = lba * 512;
            (RequestKind::Read { offset, memory }, Err(lba))
        });
    }

    fn flush(&mut self) {
        self.submit(|model, now| (RequestKind::Flush, Ok(model.flush(now))));
    }

    /// A request drawn by lot, within a few clusters that everybody uses.
    fn random(&mut self, window: u64) {
        let mut lot = thread_rng();
        let count = lot.gen_range(1..=window.min(6));
        let lba = lot.gen_range(0..=window - count);
        let (offset, len) = (lba * 512, count * 512);
        match lot.gen_range(0..10) {
            0 | 1 => self.read(lba, count),
            2 | 3 => self.submit(|model, now| {
                let op = model.discard(lba, count, now);
                (RequestKind::Discard { offset, len }, Ok(op))
            }),
            4 => self.flush(),
            5 => self.submit(|model, now| {
                let op = model.zero(lba, count, false, now);
                let (unmap, fua) = (count % 2 == 0, false);
                let kind = RequestKind::WriteZeroes {
                    offset,
                    len,
                    unmap,
                    fua,
                };
                (kind, Ok(op))
            }),
            _ => self.submit(|model, now| {
                let fua = lba % 5 == 0;
                let (op, version) = model.write(lba, count, fua, now);
                let memory = SimMemory::from_vec(stamped(lba, count, version));
                let kind = RequestKind::Write {
                    offset,
                    memory,
                    fua,
                };
                (kind, Ok(op))
            }),
        }
    }
}

/// One run: so many queues, each with so many requests, on a disk of this configuration.
fn device(config: &Config, queues: usize, requests: usize) {
    let seed = thread_rng().r#gen();
    let scene = Scene::new(config, &mut Rng::new(seed));
    let files = scene.files();
    let layers = config::layers(files, &scene.fixture.raw).unwrap();
    let disk = Disk(Arc::new(
        files
            .iter()
            .map(|file| Mutex::new(file.bytes().to_vec()))
            .collect(),
    ));
    let ledger = Arc::new(Ledger {
        model: std::sync::Mutex::new(Model::new(scene.fixture.initial.clone(), FIRST_VERSION)),
        now: AtomicU64::new(0),
    });
    let opened: Arc<(Mutex<Option<Arc<Shared>>>, Condvar)> = Arc::default();
    let maintenance = {
        let (disk, opened, options) = (disk.clone(), Arc::clone(&opened), config.options());
        shuttle::thread::spawn(move || {
            let mut maintenance = Maintenance::open(disk.handle(), layers, options).unwrap();
            *opened.0.lock().unwrap() = Some(maintenance.shared());
            opened.1.notify_one();
            maintenance.run();
        })
    };
    let shared = {
        let mut slot = opened.0.lock().unwrap();
        while slot.is_none() {
            slot = opened.1.wait(slot).unwrap();
        }
        slot.take().unwrap()
    };
    let window = config.cluster_sectors() * 6;
    let guests: Vec<_> = (0..queues)
        .map(|_| {
            let (shared, disk, ledger) = (Arc::clone(&shared), disk.clone(), Arc::clone(&ledger));
            shuttle::thread::spawn(move || {
                let mut guest = Guest::new(&shared, &disk, &ledger);
                for _ in 0..requests {
                    guest.random(window);
                }
                guest.drain();
            })
        })
        .collect();
    guests.into_iter().for_each(|guest| guest.join().unwrap());
    let mut guest = Guest::new(&shared, &disk, &ledger);
    guest.flush();
    guest.read(0, window);
    guest.drain();
    drop(guest);
    shared.control(Control::Close(Box::new(|result| result.unwrap())));
    maintenance.join().unwrap();
    let left: Vec<Contents> = disk
        .0
        .iter()
        .map(|file| Contents::new(file.lock().unwrap().clone()))
        .collect();
    let view = ledger.model.lock().unwrap().after_cut(ledger.tick());
    let found = scene
        .judge(&left, &view)
        .unwrap_or_else(|error| panic!("after closing: {error}"));
    assert_eq!(found.leaks, 0, "after closing");
}

fn schedules() -> usize {
    std::env::var("URUS_SCHEDULES").map_or(400, |number| number.parse().expect("a number"))
}

fn configuration(name: &str) -> Config {
    config::find(name).expect("there is one")
}

fn explore(name: &'static str, queues: usize, requests: usize) {
    let half = schedules() / 2;
    let run = move || device(&configuration(name), queues, requests);
    schedule(RandomScheduler::new(half), run);
    schedule(PctScheduler::new(3, half), run);
}

fn schedule(scheduler: impl Scheduler + 'static, run: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::new();
    // The engine's futures are polled on these stacks.
    config.stack_size = 1 << 20;
    shuttle::Runner::new(scheduler, config).run(run);
}

#[test]
fn allocate_discard_and_flush() {
    explore("half full", 3, 6);
}

#[test]
fn four_queues() {
    explore("1K", 4, 4);
}

#[test]
fn copy_on_write_beneath_a_snapshot() {
    explore("snapshot", 2, 8);
}

#[test]
fn compressed_clusters_written_over() {
    explore("compressed", 2, 8);
}

#[test]
fn allocate_and_evict() {
    explore("tiny cache", 2, 8);
}

/// The schedules find what they are for. `EarlyDecrement` shows in one of some thousand: the search ends when it is found, and its bound
/// lies at ten times that.
#[test]
fn planted_bugs_show() {
    for (bug, queues, requests, bound) in [
        (Bug::EarlyReuse, 3, 6, 3_000),
        (Bug::NoClusterLocks, 3, 6, 3_000),
        (Bug::EarlyDecrement, 4, 12, 50_000),
    ] {
        plant(bug);
        let run = || {
            let device = move || device(&configuration("half full"), queues, requests);
            schedule(RandomScheduler::new(bound), device);
        };
        let found = catch_unwind(AssertUnwindSafe(run)).is_err();
        plant(Bug::None);
        assert!(found, "{bug:?} was not found");
    }
}
