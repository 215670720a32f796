//! P14: what a look-up in the cached mapping costs, and whether threads hinder one another. `cargo bench -p urus-benches --bench lookup`.
//!
//! Beside it a control that shares nothing: the same random places, and of each thread's own table of the map's size the word there. It pays
//! for the same random numbers, processor caches and clocks. Everything is measured in turn, and the ratios are those of each turn.

use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use urus_benches::disk::{CLUSTER_BYTES, Disk, new_file, read, write};
use urus_benches::noise::Places;
use urus_engine::{Options, Shared, limits, parts};

const PAIRS: usize = 15;
/// Sorted values left away at each end of 15 for the 95 % interval of their median.
const RANK: usize = 3;
const BAR_NANOSECONDS: f64 = 20.0;
const BAR_SCALING: f64 = 0.9;
const GIB: u64 = 1 << 30;

/// A warm map that covers a disk of this size.
struct Subject {
    size: u64,
    shared: Arc<Shared>,
}

impl Subject {
    /// The device belongs to this thread; the map to all, as long as the device is there.
    fn new(size: u64) -> (Disk, Self) {
        let span = limits::SLICE_BYTES / 8 * CLUSTER_BYTES;
        let file = new_file(size);
        let mut disk = Disk::open(std::slice::from_ref(&file), Options::default());
        disk.run((0..size / span).map(|slice| write(slice * span, 4096)));
        disk.close();
        let mut options = Options::default();
        options.read_only = true;
        let mut disk = Disk::open(&[file], options);
        disk.run((0..size / span).map(|slice| read(slice * span, 4096)));
        let shared = disk.shared();
        (disk, Self { size, shared })
    }

    fn look_up(&self, places: &mut Places, count: u64) -> u64 {
        let look = |_| parts::look_up(&self.shared, places.next_place()).expect("cached");
        (0..count).map(look).fold(0, u64::wrapping_add)
    }

    fn words(&self) -> usize {
        usize::try_from(self.size / CLUSTER_BYTES).expect("fits memory")
    }
}

/// Operations per nanosecond of so many threads, each with a state of its own.
#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn rate<T>(
    threads: u64,
    count: u64,
    make: impl Fn(u64) -> T + Sync,
    work: impl Fn(&mut T, u64) -> u64 + Sync,
) -> f64 {
    let barrier = Barrier::new(usize::try_from(threads).expect("few"));
    let one = |number| {
        let mut state = make(number);
        black_box(work(&mut state, count / 8));
        barrier.wait();
        let start = Instant::now();
        black_box(work(&mut state, count));
        count as f64 / start.elapsed().as_nanos().max(1) as f64
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|number| scope.spawn(move || one(number)))
            .collect();
        let rates = running
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        rates.sum()
    })
}

/// Median, and the ends of its 95 % interval.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = if sorted.len() == PAIRS { RANK } else { 0 };
    let (low, high) = (sorted[rank], sorted[sorted.len() - 1 - rank]);
    (sorted[sorted.len() / 2], low, high)
}

/// Missed only where the whole interval is.
fn verdict(met: bool, all_missed: bool) -> &'static str {
    match (met, all_missed) {
        (true, _) => "met",
        (false, true) => "missed",
        (false, false) => "not shown",
    }
}

fn measure(subject: &Subject, threads: u64, pairs: usize, count: u64) {
    let places = |number| Places::new(number + 1, subject.size);
    let look_up = |threads| {
        let work = |places: &mut Places, count| subject.look_up(places, count);
        rate(threads, count, places, work)
    };
    let control = |threads| {
        let make = |number| (places(number), vec![number; subject.words()]);
        let work = |(places, table): &mut (Places, Vec<u64>), count: u64| {
            let read = |_| table[usize::try_from(places.next_place() / CLUSTER_BYTES).unwrap_or(0)];
            (0..count).map(read).fold(0, u64::wrapping_add)
        };
        rate(threads, count, make, work)
    };
    let (mut times, mut control_times, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..pairs {
        let one = look_up(1);
        let many = look_up(threads);
        let (control_one, control_many) = (control(1), control(threads));
        times.push(1.0 / one);
        control_times.push(1.0 / control_one);
        ratios.push((many / one) / (control_many / control_one));
    }
    let gib = subject.size / GIB;
    let (time, low, high) = spread(&times);
    let (control_time, ..) = spread(&control_times);
    let judged = verdict(time <= BAR_NANOSECONDS, low > BAR_NANOSECONDS);
    println!(
        "map of {gib} GiB: a look-up takes {time:.1} ns ({low:.1} to {high:.1}), of which the control loop takes {control_time:.1}; \
         bar {BAR_NANOSECONDS} ns: {judged}"
    );
    let (ratio, low, high) = spread(&ratios);
    let judged = verdict(ratio >= BAR_SCALING, high < BAR_SCALING);
    println!(
        "map of {gib} GiB: {threads} threads scale {ratio:.2} ({low:.2} to {high:.2}) times as the control; bar {BAR_SCALING}: {judged}"
    );
}

fn main() {
    // As cargo's harnesses: only `cargo bench` measures.
    let measures = std::env::args().any(|argument| argument == "--bench");
    let (pairs, count) = if measures {
        (PAIRS, 4_000_000)
    } else {
        (1, 1000)
    };
    let processors = thread::available_parallelism().map_or(1, usize::from);
    // What a processor caches holds the first map; the second is as large as the default budget.
    for size in [GIB, 512 * GIB] {
        let (_disk, subject) = Subject::new(size);
        for threads in [2, 4, 8, 16]
            .into_iter()
            .filter(|n| *n <= processors.max(2))
        {
            measure(&subject, u64::try_from(threads).unwrap_or(2), pairs, count);
        }
    }
}
