//! The whole engine on several threads, in schedules that shuttle draws: queues that allocate, discard, zero, flush and
//! read the same few clusters, maintenance beside them, and an owner who pauses, resumes, lets somebody else write the image meanwhile,
//! grows the disk, closes the device under its guests and opens it again. A lost wake-up shows as a deadlock, a lost or foreign sector
//! in a read, a wrong refcount in the file that is left, and whatever a power cut must not find in what one would find.
//!
//! `cargo test -p urus-sim --features shuttle --test shuttle`; `URUS_SCHEDULES` says how many, `URUS_SEED`
//! which of those in which threads are put aside, `URUS_EXACT` a single one of them.

mod disk;
mod guest;
mod scheduler;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use shuttle::rand::{Rng as _, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread::JoinHandle;
use urus_engine::planted::{Bug, plant};
use urus_engine::{Control, ControlReply, Error, LayerFormat, Maintenance, Shared};
use urus_sim::config::{self, Config};

use disk::Paused;
use guest::{Guest, Ledger};
use scheduler::Stalling;

/// What happens in a run.
#[derive(Clone, Copy)]
struct Life {
    queues: usize,
    /// Of each queue, in each of its device's lives.
    requests: usize,
    /// Requests go to slices far apart, too.
    spread: bool,
    /// Times that its owner does something while guests are busy.
    controls: usize,
    /// How often the device is opened.
    openings: usize,
}

impl Life {
    /// Guests alone, and a quiet end.
    const fn quiet(queues: usize, requests: usize) -> Self {
        Self {
            queues,
            requests,
            spread: false,
            controls: 0,
            openings: 1,
        }
    }

    /// Its owner has plans.
    const fn busy(queues: usize, requests: usize, controls: usize) -> Self {
        Self {
            controls,
            openings: 2,
            ..Self::quiet(queues, requests)
        }
    }

    const fn spread(mut self) -> Self {
        self.spread = true;
        self
    }
}

/// A device, and maintenance on its thread.
struct Open {
    shared: Arc<Shared>,
    paused: Paused,
    maintenance: JoinHandle<()>,
    /// Tells maintenance to be gone without a close.
    gone: Arc<shuttle::sync::atomic::AtomicBool>,
}

impl Open {
    fn new(ledger: &Arc<Ledger>) -> Self {
        type Slot = (Mutex<Option<Arc<Shared>>>, Condvar);
        let opened: Arc<Slot> = Arc::default();
        let paused = Paused::default();
        let gone = Arc::new(shuttle::sync::atomic::AtomicBool::new(false));
        let maintenance = {
            let (ledger, opened) = (Arc::clone(ledger), Arc::clone(&opened));
            let (paused, gone) = (Arc::clone(&paused), Arc::clone(&gone));
            shuttle::thread::spawn(move || {
                let layers = config::layers(&ledger.disk.now(), &ledger.scene().fixture.raw);
                let handle = ledger.disk.handle(&paused);
                let opened_now =
                    Maintenance::open(handle, layers.unwrap(), ledger.config.options());
                let mut maintenance = opened_now.unwrap();
                *opened.0.lock().unwrap() = Some(maintenance.shared());
                opened.1.notify_one();
                loop {
                    maintenance.poll();
                    if maintenance.is_closed() || gone.load(Ordering::SeqCst) {
                        return;
                    }
                    maintenance.wait(None);
                }
            })
        };
        let mut slot = opened.0.lock().unwrap();
        while slot.is_none() {
            slot = opened.1.wait(slot).unwrap();
        }
        let shared = slot.take().unwrap();
        drop(slot);
        Self {
            shared,
            paused,
            maintenance,
            gone,
        }
    }

    /// Asks something of the device and waits for the answer.
    fn ask(&self, control: impl FnOnce(ControlReply) -> Control) -> Result<(), Error> {
        type Slot = (Mutex<Option<Result<(), Error>>>, Condvar);
        let answer: Arc<Slot> = Arc::default();
        let slot = Arc::clone(&answer);
        self.shared.control(control(Box::new(move |result| {
            *slot.0.lock().unwrap() = Some(result);
            slot.1.notify_one();
        })));
        let mut slot = answer.0.lock().unwrap();
        while slot.is_none() {
            slot = answer.1.wait(slot).unwrap();
        }
        slot.take().unwrap()
    }

    /// A control that promises what a flush does.
    fn ask_durably(&self, ledger: &Ledger, control: impl FnOnce(ControlReply) -> Control) {
        let flush = {
            let now = ledger.tick();
            ledger.model.lock().unwrap().flush(now)
        };
        self.ask(control).unwrap();
        let now = ledger.tick();
        ledger.model.lock().unwrap().complete(flush, now, true);
    }

    /// Nothing is in flight, and the files are as they should be, with nothing leaked.
    fn close(self, ledger: &Ledger) {
        self.ask_durably(ledger, Control::Close);
        self.paused.store(true, Ordering::SeqCst);
        self.maintenance.join().unwrap();
        ledger.judge_quiet(ledger.disk.now(), "after closing");
    }
}

/// The image's header as it is on disk.
fn header(ledger: &Ledger) -> Option<Box<urus_format::Header>> {
    let layers = config::layers(&ledger.disk.now(), &ledger.scene().fixture.raw).unwrap();
    match layers.into_iter().next().expect("there is an image").format {
        LayerFormat::Qcow2(header) => Some(header),
        LayerFormat::Raw => None,
    }
}

/// Somebody else has the image in a pause: a device of its own, a guest of its own.
fn somebody_else(ledger: &Arc<Ledger>, spread: bool) {
    let other = Open::new(ledger);
    let mut guest = Guest::new(&other.shared, ledger, &other.paused);
    for _ in 0..thread_rng().gen_range(0..5) {
        guest.random(spread);
    }
    guest.drain();
    drop(guest);
    other.close(ledger);
}

fn pause(device: &Open, ledger: &Arc<Ledger>, life: Life) {
    device.ask_durably(ledger, Control::Pause);
    // From here on the device lets the image be.
    device.paused.store(true, Ordering::SeqCst);
    ledger.judge_quiet(ledger.disk.after_power_cut(), "paused");
    let released = thread_rng().gen_range(0..3) > 0;
    if released {
        if thread_rng().gen_range(0..3) > 0 {
            somebody_else(ledger, life.spread);
        }
        let header = header(ledger);
        device.paused.store(false, Ordering::SeqCst);
        device.ask(|reply| Control::Resume(header, reply)).unwrap();
    } else {
        for _ in 0..thread_rng().gen_range(0..20) {
            shuttle::thread::yield_now();
        }
        device.paused.store(false, Ordering::SeqCst);
        device.ask(|reply| Control::Resume(None, reply)).unwrap();
    }
}

fn grow(device: &Open, ledger: &Ledger) {
    let room = ledger.config.sectors + ledger.config.grows;
    let old = device.shared.size() / 512;
    if old == room {
        return;
    }
    let sectors = thread_rng().gen_range(old..=room);
    let now = ledger.tick();
    ledger.model.lock().unwrap().grow(sectors, now);
    let result = device.ask(|reply| Control::Resize(sectors * 512, reply));
    let now = ledger.tick();
    let mut model = ledger.model.lock().unwrap();
    match result {
        Ok(()) => model.grown(now, true),
        Err(Error::Unsupported { .. }) => model.refused(),
        Err(error) => panic!("growing: {error}"),
    }
}

/// A device's life from its opening to its end.
fn live(ledger: &Arc<Ledger>, life: Life) {
    ledger.closing.store(false, Ordering::SeqCst);
    let device = Open::new(ledger);
    let guests: Vec<_> = (0..life.queues)
        .map(|_| {
            let (shared, ledger) = (Arc::clone(&device.shared), Arc::clone(ledger));
            let paused = Arc::clone(&device.paused);
            shuttle::thread::spawn(move || {
                let mut guest = Guest::new(&shared, &ledger, &paused);
                for _ in 0..life.requests {
                    if guest.closed {
                        break;
                    }
                    guest.random(life.spread);
                }
                guest.drain();
            })
        })
        .collect();
    for _ in 0..life.controls {
        match thread_rng().gen_range(0..4) {
            0 | 1 => pause(&device, ledger, life),
            2 if ledger.config.grows > 0 => grow(&device, ledger),
            _ => device.ask_durably(ledger, Control::Flush),
        }
    }
    let end = if life.controls == 0 {
        0
    } else {
        thread_rng().gen_range(0..4)
    };
    if end == 1 {
        // Its guests are still at it.
        ledger.closing.store(true, Ordering::SeqCst);
        let (paused, maintenance) = (Arc::clone(&device.paused), device.maintenance);
        let device = Open {
            maintenance: shuttle::thread::spawn(|| {}),
            ..device
        };
        device.ask_durably(ledger, Control::Close);
        paused.store(true, Ordering::SeqCst);
        guests.into_iter().for_each(|guest| guest.join().unwrap());
        maintenance.join().unwrap();
        device.maintenance.join().unwrap();
        ledger.judge_quiet(ledger.disk.now(), "closed under its guests");
        return;
    }
    if end == 2 {
        // It goes without a close: everybody is told, and nothing is lost that was promised.
        ledger.closing.store(true, Ordering::SeqCst);
        device.gone.store(true, Ordering::SeqCst);
        device.shared.control(Control::Flush(Box::new(drop)));
        device.maintenance.join().unwrap();
        guests.into_iter().for_each(|guest| guest.join().unwrap());
        if let Err(error) = ledger.judge(ledger.disk.after_power_cut(), false) {
            panic!("a cut after it was dropped under its guests: {error}");
        }
        ledger.adopt();
        return;
    }
    guests.into_iter().for_each(|guest| guest.join().unwrap());
    let mut guest = Guest::new(&device.shared, ledger, &device.paused);
    guest.flush();
    let sectors = device.shared.size() / 512;
    let step = 256;
    for lba in (0..sectors).step_by(usize::try_from(step).unwrap()) {
        guest.read(lba, step.min(sectors - lba));
    }
    guest.drain();
    drop(guest);
    device.close(ledger);
}

fn device(config: &Config, life: Life) {
    let ledger = Ledger::new(config, thread_rng().r#gen());
    for _ in 0..life.openings {
        live(&ledger, life);
    }
}

fn schedules() -> usize {
    std::env::var("URUS_SCHEDULES").map_or(400, |number| number.parse().expect("a number"))
}

fn seed() -> u64 {
    std::env::var("URUS_SEED").map_or_else(
        |_| u64::from(std::process::id()),
        |number| number.parse().expect("a number"),
    )
}

fn configuration(name: &str) -> Config {
    config::find(name).expect("there is one")
}

/// A third of the schedules is drawn step by step, a third by priorities, and in a third threads are put aside.
fn explore(name: &'static str, life: Life) {
    let part = schedules().div_ceil(3);
    let run = move || device(&configuration(name), life);
    schedule(RandomScheduler::new(part), run);
    schedule(PctScheduler::new(3, part), run);
    schedule(Stalling::new(seed(), part), run);
}

fn schedule(scheduler: impl Scheduler + 'static, run: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::new();
    // The engine's futures are polled on these stacks.
    config.stack_size = 1 << 20;
    shuttle::Runner::new(scheduler, config).run(run);
}

#[test]
fn allocate_discard_and_flush() {
    explore("half full", Life::quiet(3, 6));
}

#[test]
fn four_queues() {
    explore("1K", Life::quiet(4, 4));
}

#[test]
fn copy_on_write_beneath_a_snapshot() {
    explore("snapshot", Life::quiet(2, 8));
}

#[test]
fn compressed_clusters_written_over() {
    explore("compressed", Life::quiet(2, 8));
}

#[test]
fn allocate_and_evict() {
    explore("tiny cache", Life::quiet(3, 12).spread());
}

/// The owner's doings, in fewer schedules: each is longer.
fn explore_busy(name: &'static str, life: Life) {
    let run = move || device(&configuration(name), life);
    let part = schedules().div_ceil(6);
    schedule(Stalling::new(seed(), part), run);
    schedule(PctScheduler::new(3, part.div_ceil(4)), run);
    schedule(RandomScheduler::new(part.div_ceil(4)), run);
}

#[test]
fn pause_resume_and_close() {
    explore_busy("half full", Life::busy(3, 6, 3));
}

#[test]
fn pause_and_resume_beneath_a_snapshot() {
    explore_busy("snapshot, three queues", Life::busy(3, 5, 2));
}

#[test]
fn pause_and_resume_over_compressed_clusters() {
    explore_busy("zstd", Life::busy(2, 8, 3));
}

#[test]
fn pause_and_resume_with_few_slices() {
    explore_busy("tiny cache, snapshot", Life::busy(2, 10, 2).spread());
}

#[test]
fn grow_and_pause() {
    explore_busy("grows", Life::busy(3, 6, 4));
}

#[test]
fn grow_over_a_longer_backing_file() {
    explore_busy("grows over a longer backing file", Life::busy(2, 8, 3));
}

#[test]
fn grow_beneath_a_snapshot() {
    explore_busy("grows, snapshot, backed, 1K", Life::busy(2, 6, 3));
}

#[test]
fn grow_a_raw_disk() {
    explore_busy("grows, raw", Life::busy(2, 6, 3));
}

#[test]
fn grow_over_a_chain() {
    explore_busy("chain, grows", Life::busy(2, 6, 3));
}

#[test]
fn outlive_the_process() {
    explore_busy("outlives", Life::busy(3, 6, 2));
}

#[test]
fn writes_smaller_than_a_block() {
    explore_busy("direct I/O, 4096", Life::busy(3, 6, 2));
}

/// The schedules find what they are for; each search ends with the first find, and its bound lies at some ten times what it took.
#[test]
fn planted_bugs_show() {
    let grows = "grows over a longer backing file";
    for (bug, name, life, bound) in [
        (Bug::EarlyReuse, "half full", Life::quiet(3, 6), 3_000),
        (Bug::NoClusterLocks, "half full", Life::quiet(3, 6), 3_000),
        (Bug::EarlyDecrement, "half full", Life::quiet(3, 8), 10_000),
        (Bug::NoInFlightPins, "full", Life::quiet(3, 8), 10_000),
        (Bug::EarlyResume, "half full", Life::busy(3, 6, 3), 3_000),
        (Bug::EarlySize, grows, Life::busy(2, 8, 3), 20_000),
    ] {
        let only = std::env::var("URUS_BUG");
        if only.is_ok_and(|only| only != format!("{bug:?}")) {
            continue;
        }
        let tried = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let run = {
            let tried = Arc::clone(&tried);
            move || {
                tried.fetch_add(1, Ordering::SeqCst);
                device(&configuration(name), life);
            }
        };
        // On a thread of its own: a panic leaves shuttle's thread in a state in which whatever comes next panics too.
        let search = move || {
            plant(bug);
            schedule(Stalling::new(3, bound), run);
        };
        let found = std::thread::spawn(search).join().is_err();
        let tried = tried.load(Ordering::SeqCst);
        assert!(found, "{bug:?} was not found in {tried} schedules");
        println!("{bug:?}: found in schedule {tried}");
    }
}
