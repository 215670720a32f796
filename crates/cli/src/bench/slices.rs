//! Threads that run slices: each with a client of every target (what is measured, and what it is measured against), one of them busy
//! at a time.

use std::fs::File;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};

use super::Mode;
use super::client::{Client, Load, Seat, Target};
use super::control::evict;
use super::latency::{self, Percentiles};
use super::places::{Area, Places};
use super::report::{Pair, Slice};
use crate::failure::Failure;

/// Largest request.
pub(super) const MAX_BLOCK_BYTES: u64 = 32 << 20;

/// Writes of a writer between two flushes.
const FLUSH_EVERY: u64 = 256;

/// What a slice consists of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) block_bytes: u64,
    /// Multiple of the block size.
    pub(super) span: u64,
    pub(super) depth: u32,
    pub(super) queues: u16,
    pub(super) mode: Mode,
    pub(super) slice: Duration,
    /// The page cache is dropped before each slice. What the engine has cached within its budgets stays.
    pub(super) cold: bool,
    /// Beside the queues one more writes at random and flushes now and then; what it does is not counted.
    pub(super) writer: bool,
    /// A device's queues know the memory of their requests beforehand.
    pub(super) registered: bool,
}

impl Plan {
    pub(super) fn block_len(&self) -> usize {
        usize::try_from(self.block_bytes).expect("at most MAX_BLOCK_BYTES")
    }

    fn area(&self) -> Area {
        Area {
            block_bytes: self.block_bytes,
            span: self.span,
            is_random: self.mode.is_random(),
            queues: self.queues,
        }
    }
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Subject,
    Control,
}

impl Side {
    /// Who is first in the pair of that number: they take turns, so that what drifts does not favour one.
    pub(super) fn first(number: u16) -> Self {
        if number.is_multiple_of(2) {
            Self::Control
        } else {
            Self::Subject
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Subject => Self::Control,
            Self::Control => Self::Subject,
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Subject => 0,
            Self::Control => 1,
        }
    }
}

/// Run a slice: on which target, and where from.
#[derive(Clone, Copy, Debug)]
struct Order {
    target: usize,
    seed: u64,
}

/// What a thread did in a slice.
#[derive(Debug)]
struct Done {
    operations: u64,
    time: Duration,
    latencies: Histogram<u64>,
}

/// The threads, waiting for orders.
pub(super) struct Slices {
    workers: Vec<Sender<Order>>,
    /// What writes beside them, where the plan wants it.
    writer: Option<Sender<Order>>,
    /// What the writer does is nothing.
    results: Receiver<Result<Option<Done>, Failure>>,
    cold: bool,
    /// What is dropped from the page cache before a cold slice, by target.
    files: Vec<Vec<File>>,
}

impl Slices {
    /// Starts the threads, lets `work` run slices, and ends them.
    pub(super) fn with<T>(
        plan: Plan,
        targets: &[Target<'_>],
        work: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        thread::scope(|scope| {
            let (results_in, results) = mpsc::channel();
            let mut slices = Self {
                workers: Vec::new(),
                writer: None,
                results,
                cold: plan.cold,
                files: targets.iter().map(|target| target.files()).collect(),
            };
            let start = |number, writes| {
                let (orders_in, orders) = mpsc::channel();
                let seats = targets
                    .iter()
                    .map(|target| target.seat(number, writes))
                    .collect::<Result<Vec<_>, _>>()?;
                let results = results_in.clone();
                let role = match number == plan.queues {
                    true => Role::Writer,
                    false => Role::Counted,
                };
                scope.spawn(move || Worker::run(plan, number, role, seats, &orders, &results));
                Ok::<_, Failure>(orders_in)
            };
            let mut workers = Vec::new();
            for number in 0..plan.queues {
                workers.push(start(number, plan.mode.writes())?);
            }
            slices.writer = plan.writer.then(|| start(plan.queues, true)).transpose()?;
            slices.workers = workers;
            // Only the threads have the other ends now.
            drop(results_in);
            work(&mut slices)
        })
    }

    /// Both slices of a pair, over the same places.
    pub(super) fn pair(&mut self, number: u64, first: Side) -> Result<Pair, Failure> {
        self.pair_of(number, first, usize::MAX)
    }

    /// The same on the first `queues` queues alone.
    pub(super) fn pair_of(
        &mut self,
        number: u64,
        first: Side,
        queues: usize,
    ) -> Result<Pair, Failure> {
        let one = self.slice(first.index(), number, queues)?;
        let other = self.slice(first.other().index(), number, queues)?;
        Ok(match first {
            Side::Subject => Pair {
                subject: one,
                control: other,
            },
            Side::Control => Pair {
                subject: other,
                control: one,
            },
        })
    }

    /// A slice on one target, on the first `queues` queues.
    pub(super) fn slice(
        &mut self,
        target: usize,
        seed: u64,
        queues: usize,
    ) -> Result<Slice, Failure> {
        if self.cold {
            self.files[target].iter().for_each(evict);
        }
        let mut latencies = latency::empty();
        let before = cpu_time();
        let busy = self.workers.iter().take(queues).chain(&self.writer);
        let mut expected = 0;
        for worker in busy {
            // A thread that has gone has left its reason among the results.
            let _ = worker.send(Order { target, seed });
            expected += 1;
        }
        let mut slice = Slice::default();
        for _ in 0..expected {
            let done = self
                .results
                .recv()
                .map_err(|_| Failure::new("a thread of the benchmark has ended"))??;
            let Some(done) = done else { continue };
            #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
            let operations = done.operations as f64;
            slice.operations += done.operations;
            slice.iops += operations / done.time.as_secs_f64();
            // The same bounds: nothing can be out of them.
            let _ = latencies.add(&done.latencies);
        }
        slice.cpu = cpu_time().saturating_sub(before);
        slice.latency = Percentiles::of(&latencies);
        Ok(slice)
    }
}

/// CPU time of the whole process, in user and kernel mode, its ring's kernel workers included.
pub(super) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// What the plan says.
    Counted,
    /// Writes and flushes beside it.
    Writer,
}

/// What one thread has.
struct Worker {
    plan: Plan,
    number: u16,
    /// By target.
    clients: Vec<Client>,
    /// When the request of each slot was submitted.
    started: Vec<Instant>,
    /// Slots to be used again. Scratch, kept for its capacity.
    free: Vec<usize>,
}

impl Worker {
    /// A thread's life.
    fn run(
        plan: Plan,
        number: u16,
        role: Role,
        seats: Vec<Seat>,
        orders: &Receiver<Order>,
        results: &Sender<Result<Option<Done>, Failure>>,
    ) {
        let clients = seats.into_iter().map(|seat| seat.activate(plan)).collect();
        let clients = match clients {
            Ok(clients) => clients,
            Err(failure) => {
                let _ = results.send(Err(failure));
                return;
            }
        };
        let depth = usize::try_from(plan.depth).expect("32 bits fit a usize");
        let mut worker = Self {
            plan,
            number,
            clients,
            started: vec![Instant::now(); depth],
            free: Vec::with_capacity(depth),
        };
        for order in orders {
            if results.send(worker.order(order, role)).is_err() {
                return;
            }
        }
    }

    fn order(&mut self, order: Order, role: Role) -> Result<Option<Done>, Failure> {
        let mut clients = std::mem::take(&mut self.clients);
        let result = match &mut clients[order.target] {
            Client::Device(device) => self.serve(device, order.seed, role),
            Client::Raw(raw) => self.serve(&mut **raw, order.seed, role),
        };
        self.clients = clients;
        result
    }

    fn serve(
        &mut self,
        client: &mut impl Load,
        seed: u64,
        role: Role,
    ) -> Result<Option<Done>, Failure> {
        match role {
            Role::Counted => self.slice(client, seed).map(Some),
            Role::Writer => self.write_and_flush(client, seed).map(|()| None),
        }
    }

    /// Keeps as many requests in flight as there are slots, until the time is over.
    fn slice(&mut self, client: &mut impl Load, seed: u64) -> Result<Done, Failure> {
        let mut places = Places::new(self.plan.area(), self.number, seed);
        let writes = self.plan.mode.writes();
        let mut latencies = latency::empty();
        let (mut operations, mut is_over, mut failed) = (0, false, None);
        let start = Instant::now();
        for slot in 0..self.started.len() {
            self.started[slot] = start;
            client.submit(slot, places.next(), writes);
        }
        while client.in_flight() > 0 {
            // Starts everything that was submitted since the last time.
            client.wait()?;
            // First all that is done, then all that is new: what comes together goes together. (And reads from the page cache, done as soon
            // as they are begun, could else keep this loop from ever looking at the clock.)
            while let Some((slot, result)) = client.completion() {
                operations += 1;
                if let Err(error) = result {
                    failed.get_or_insert(error);
                }
                self.free.push(slot);
            }
            // One look at the clock for all that came together: a look costs as much as a look-up in the image.
            let now = Instant::now();
            is_over = is_over || failed.is_some() || now - start >= self.plan.slice;
            for slot in self.free.drain(..) {
                latencies.saturating_record(latency::nanoseconds(now - self.started[slot]));
                if !is_over {
                    self.started[slot] = now;
                    client.submit(slot, places.next(), writes);
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(Done {
                operations,
                time: start.elapsed(),
                latencies,
            }),
        }
    }

    /// Writes at random, as many at once as there are slots, with a flush after every [`FLUSH_EVERY`], until the time is over.
    fn write_and_flush(&mut self, client: &mut impl Load, seed: u64) -> Result<(), Failure> {
        let area = Area {
            is_random: true,
            ..self.plan.area()
        };
        let mut places = Places::new(area, self.number, seed);
        let start = Instant::now();
        while start.elapsed() < self.plan.slice {
            let mut left = FLUSH_EVERY;
            self.free.extend(0..self.started.len());
            loop {
                for slot in self.free.drain(..) {
                    if left > 0 {
                        left -= 1;
                        client.submit(slot, places.next(), true);
                    }
                }
                if client.in_flight() == 0 {
                    break;
                }
                client.wait()?;
                while let Some((slot, result)) = client.completion() {
                    result?;
                    self.free.push(slot);
                }
            }
            client.flush()?;
        }
        Ok(())
    }
}
