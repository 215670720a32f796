//! A thread that has an image open in one of the three libraries, and runs slices on it when it is told to.

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustix::time::{ClockId, clock_gettime};

use crate::places::{Area, Places};

/// What a slice consists of.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) path: PathBuf,
    pub(crate) span: u64,
    pub(crate) block_bytes: usize,
    /// Requests in flight.
    pub(crate) depth: usize,
    pub(crate) writes: bool,
    pub(crate) direct: bool,
    pub(crate) slice: Duration,
}

impl Plan {
    /// The places of a lane of requests.
    pub(crate) fn places(&self, lane: u16, seed: u64) -> Places {
        let area = Area {
            block_bytes: self.block_bytes as u64,
            span: self.span,
            is_random: true,
            queues: 1,
        };
        Places::new(area, lane, seed)
    }
}

/// What was done in a slice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    operations: u64,
    time: Duration,
    cpu: Duration,
}

impl Slice {
    pub(crate) fn new(operations: u64, time: Duration) -> Self {
        Self {
            operations,
            time,
            cpu: Duration::ZERO,
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    pub(crate) fn per_second(&self) -> f64 {
        self.operations as f64 / self.time.as_secs_f64()
    }

    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    pub(crate) fn cpu_microseconds(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.operations.max(1) as f64
    }
}

/// The other end of a contender's orders: a seed for each slice.
pub(crate) struct Orders {
    seeds: Receiver<u64>,
    results: Sender<Result<Slice, String>>,
}

impl Orders {
    /// The seed of the next slice; none when there is nothing left to do.
    pub(crate) fn next(&self) -> Option<u64> {
        self.seeds.recv().ok()
    }

    pub(crate) fn answer(&self, result: Result<Slice, String>) {
        // Who asked may have gone.
        let _ = self.results.send(result);
    }
}

pub(crate) struct Contender {
    seeds: Sender<u64>,
    results: Receiver<Result<Slice, String>>,
    thread: JoinHandle<Result<(), String>>,
}

impl Contender {
    /// A thread that runs `serve`: opens the image, answers each order, and closes it when there are no more.
    pub(crate) fn start(
        plan: &Plan,
        serve: fn(&Plan, &Orders) -> Result<(), String>,
    ) -> Result<Self, String> {
        let (seeds, seeds_out) = mpsc::channel();
        let (results_in, results) = mpsc::channel();
        let plan = plan.clone();
        let thread = thread::Builder::new()
            .spawn(move || {
                let orders = Orders {
                    seeds: seeds_out,
                    results: results_in,
                };
                serve(&plan, &orders)
            })
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        Ok(Self {
            seeds,
            results,
            thread,
        })
    }

    /// One slice, with the CPU time of the whole process meanwhile: nobody else is busy in it.
    pub(crate) fn slice(&self, seed: u64) -> Result<Slice, String> {
        let before = cpu_time();
        // A thread that has gone tells why at its end.
        let _ = self.seeds.send(seed);
        let slice = self
            .results
            .recv()
            .map_err(|_| "a contender cannot open the image or has ended".to_owned())??;
        Ok(Slice {
            cpu: cpu_time().saturating_sub(before),
            ..slice
        })
    }

    pub(crate) fn end(self) -> Result<(), String> {
        drop(self.seeds);
        self.thread
            .join()
            .unwrap_or_else(|_| Err("a contender panicked".to_owned()))
    }
}

/// A slice of asynchronous requests: as many lanes as are to be in flight, each with one request after the other.
pub(crate) async fn lanes<F>(plan: &Plan, lane: impl Fn(u16, Clock) -> F) -> Result<Slice, String>
where
    F: Future<Output = Result<u64, String>>,
{
    let clock = Clock {
        start: Instant::now(),
        slice: plan.slice,
    };
    let depth = u16::try_from(plan.depth).map_err(|error| error.to_string())?;
    let mut lanes: FuturesUnordered<F> = (0..depth).map(|number| lane(number, clock)).collect();
    let mut operations = 0;
    while let Some(done) = lanes.next().await {
        operations += done?;
    }
    Ok(Slice::new(operations, clock.start.elapsed()))
}

/// Tells when a slice is over.
#[derive(Clone, Copy)]
pub(crate) struct Clock {
    start: Instant,
    slice: Duration,
}

impl Clock {
    /// Looked at once for eight requests: a look costs as much as a look-up in an image.
    pub(crate) fn is_over(&self, operations: u64) -> bool {
        operations.is_multiple_of(8) && self.start.elapsed() >= self.slice
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
