//! Threads that run slices: each with a queue on the subject (what is measured) and a queue on its control, one of them busy at a time.

use std::fs::File;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use urus::{Buffer, Device, Queue, Request};

use super::Mode;
use super::control::evict;
use super::latency::{self, Percentiles};
use super::report::{Pair, Slice};
use crate::failure::Failure;

/// Largest request.
pub(super) const MAX_BLOCK_BYTES: u64 = 32 << 20;

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
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Subject,
    Control,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Subject => Self::Control,
            Self::Control => Self::Subject,
        }
    }
}

impl Side {
    fn index(self) -> usize {
        match self {
            Self::Subject => 0,
            Self::Control => 1,
        }
    }
}

/// Run a slice: on which of the two, and where from.
#[derive(Clone, Copy, Debug)]
struct Order {
    side: Side,
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
    results: Receiver<Result<Done, Failure>>,
    cold: bool,
    /// What is dropped from the page cache before a cold slice: the subject's layers and the control's.
    files: [Vec<File>; 2],
}

impl Slices {
    /// Starts the threads, lets `work` run slices, and ends them.
    pub(super) fn with<T>(
        plan: Plan,
        subject: &Device,
        control: &Device,
        work: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        thread::scope(|scope| {
            let (results_in, results) = mpsc::channel();
            let mut slices = Self {
                workers: Vec::new(),
                results,
                cold: plan.cold,
                files: [files(subject), files(control)],
            };
            for number in 0..plan.queues {
                let (orders_in, orders) = mpsc::channel();
                let seats = [subject.queue()?, control.queue()?];
                let results = results_in.clone();
                scope.spawn(move || {
                    let [subject, control] = seats.map(urus::QueueSeat::activate);
                    let worker = subject.and_then(|subject| Ok((subject, control?)));
                    let mut worker = match worker {
                        Ok((subject, control)) => Worker::new(plan, number, subject, control),
                        Err(error) => {
                            let _ = results.send(Err(error.into()));
                            return;
                        }
                    };
                    for order in orders {
                        if results.send(worker.slice(order)).is_err() {
                            return;
                        }
                    }
                });
                slices.workers.push(orders_in);
            }
            // Only the threads have the other ends now.
            drop(results_in);
            work(&mut slices)
        })
    }

    /// Both slices of a pair, over the same places.
    pub(super) fn pair(&mut self, number: u64, first: Side) -> Result<Pair, Failure> {
        let one = self.slice(first, number)?;
        let other = self.slice(first.other(), number)?;
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

    fn slice(&mut self, side: Side, seed: u64) -> Result<Slice, Failure> {
        if self.cold {
            self.files[side.index()].iter().for_each(evict);
        }
        let mut latencies = latency::empty();
        let before = cpu_time();
        for worker in &self.workers {
            // A thread that has gone has left its reason among the results.
            let _ = worker.send(Order { side, seed });
        }
        let mut slice = Slice::default();
        for _ in &self.workers {
            let done = self
                .results
                .recv()
                .map_err(|_| Failure::new("a thread of the benchmark has ended"))??;
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

/// The files of all layers that have names.
fn files(device: &Device) -> Vec<File> {
    device
        .layers()
        .iter()
        .filter_map(|layer| File::open(&layer.path).ok())
        .collect()
}

fn slot_index(slot: u64) -> usize {
    usize::try_from(slot).expect("less than the depth")
}

/// CPU time of the whole process, in user and kernel mode, its ring's kernel workers included.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// One thread's queues and buffers.
struct Worker {
    plan: Plan,
    number: u16,
    subject: Queue,
    control: Queue,
    /// Each with its number, which is the token of its request.
    buffers: Vec<(u64, Buffer)>,
    /// When the request of each was submitted.
    started: Vec<Instant>,
}

impl Worker {
    fn new(plan: Plan, number: u16, subject: Queue, control: Queue) -> Self {
        let bytes = usize::try_from(plan.block_bytes).expect("at most MAX_BLOCK_BYTES");
        let mut places = Places::new(plan, number, 0);
        let buffers = (0..plan.depth)
            .map(|slot| {
                let mut buffer = Buffer::new(bytes);
                // Not zeroes: those could be written without being stored.
                for chunk in buffer.as_mut_slice().chunks_mut(8) {
                    chunk.copy_from_slice(&(places.draw() | 1).to_le_bytes()[..chunk.len()]);
                }
                (u64::from(slot), buffer)
            })
            .collect();
        Self {
            plan,
            number,
            subject,
            control,
            buffers,
            started: vec![
                Instant::now();
                usize::try_from(plan.depth).expect("32 bits fit a usize")
            ],
        }
    }

    fn slice(&mut self, order: Order) -> Result<Done, Failure> {
        let queue = match order.side {
            Side::Subject => &mut self.subject,
            Side::Control => &mut self.control,
        };
        let mut places = Places::new(self.plan, self.number, order.seed);
        let writes = self.plan.mode.writes();
        let mut latencies = latency::empty();
        let mut submit = |queue: &mut Queue, slot: u64, buffer: Buffer| {
            let offset = places.next();
            let request = if writes {
                Request::write(slot, offset, buffer)
            } else {
                Request::read(slot, offset, buffer)
            };
            queue
                .submit(request)
                .expect("the queue is as deep as there are buffers");
        };
        let (mut operations, mut seen) = (0, 0);
        let mut failed = None;
        let start = Instant::now();
        for (slot, buffer) in self.buffers.drain(..) {
            self.started[slot_index(slot)] = start;
            submit(queue, slot, buffer);
        }
        let mut is_over = false;
        while queue.in_flight() > 0 {
            // Starts everything that was submitted since the last time.
            queue.wait(None);
            // First all that is done, then all that is new: what comes together goes together. (And reads from the page cache, done as soon
            // as they are begun, could else keep this loop from ever looking at the clock.)
            while let Some(completion) = queue.completion() {
                operations += 1;
                if let Err(error) = completion.result {
                    failed.get_or_insert(error);
                }
                let buffer = completion.buffer.expect("reads and writes have a buffer");
                self.buffers.push((completion.token, buffer));
            }
            // One look at the clock for all that came together: a look costs as much as a look-up in the image.
            let now = Instant::now();
            is_over = is_over || failed.is_some() || now - start >= self.plan.slice;
            for (slot, _) in self.buffers.iter().skip(seen) {
                latencies
                    .saturating_record(latency::nanoseconds(now - self.started[slot_index(*slot)]));
            }
            if is_over {
                seen = self.buffers.len();
            } else {
                for (slot, buffer) in self.buffers.drain(..) {
                    self.started[slot_index(slot)] = now;
                    submit(queue, slot, buffer);
                }
            }
        }
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(Done {
                operations,
                time: start.elapsed(),
                latencies,
            }),
        }
    }
}

/// Where requests go. The same for both slices of a pair.
struct Places {
    block_bytes: u64,
    blocks: u64,
    is_random: bool,
    /// State of the random numbers, or the next block.
    state: u64,
}

impl Places {
    fn new(plan: Plan, number: u16, seed: u64) -> Self {
        let blocks = plan.span / plan.block_bytes;
        let mut places = Self {
            block_bytes: plan.block_bytes,
            blocks,
            is_random: plan.mode.is_random(),
            state: seed << 16 | u64::from(number),
        };
        if !places.is_random {
            // Each queue in a part of its own, each pair from somewhere else.
            let part = blocks / u64::from(plan.queues);
            let start = places.draw() % part.max(1);
            places.state = (part * u64::from(number) + start) % blocks;
        }
        places
    }

    fn next(&mut self) -> u64 {
        let block = if self.is_random {
            let draw = self.draw();
            u64::try_from((u128::from(draw) * u128::from(self.blocks)) >> 64)
                .expect("less than the number of blocks")
        } else {
            let block = self.state;
            self.state = (block + 1) % self.blocks;
            block
        };
        block * self.block_bytes
    }

    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    //! Guards the comparison: both sides must be asked for the same places, all of them in the span.
    use super::*;

    fn plan(mode: Mode) -> Plan {
        Plan {
            block_bytes: 4096,
            span: 4096 * 100,
            depth: 1,
            queues: 3,
            mode,
            slice: Duration::from_millis(1),
            cold: false,
        }
    }

    #[test]
    fn places_lie_in_the_span_and_repeat() {
        for mode in [Mode::Randread, Mode::Read] {
            for number in 0..3 {
                let draw = |seed| {
                    let mut places = Places::new(plan(mode), number, seed);
                    (0..1000).map(|_| places.next()).collect::<Vec<_>>()
                };
                assert_eq!(draw(5), draw(5));
                assert_ne!(draw(5), draw(6));
                assert!(draw(5).iter().all(|at| at % 4096 == 0 && *at < 4096 * 100));
                let mut all = draw(5);
                all.sort_unstable();
                all.dedup();
                assert_eq!(all.len(), 100, "every block has its turn");
            }
        }
    }
}
