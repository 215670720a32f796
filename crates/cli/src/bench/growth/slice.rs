//! A slice: one point of a curve under load for a moment, on as many threads as it has queues.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use urus::{Buffer, Device, Queue, Request};

use crate::failure::Failure;

/// What a slice did, all queues together.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slice {
    pub(super) operations: u64,
    pub(super) time: Duration,
    pub(super) cpu: Duration,
}

impl Slice {
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    pub(super) fn rate(&self) -> f64 {
        self.operations as f64 / self.time.as_secs_f64().max(1e-9)
    }

    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    pub(super) fn cpu_microseconds(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.operations.max(1) as f64
    }
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) bytes: usize,
    pub(super) writes: bool,
    /// Where they go: `count` places, each so many bytes after the one before…
    pub(super) stride: u64,
    pub(super) count: u64,
    /// …one after the other, or at random.
    pub(super) in_order: bool,
    pub(super) depth: u32,
    pub(super) queues: u16,
    /// A flush after so many requests, waited for; none for 0. Then the slice ends after the given number of requests.
    pub(super) flush_every: u64,
    /// Ends the slice, whatever the time.
    pub(super) most: u64,
}

impl Work {
    /// Runs it on the device.
    pub(super) fn run(&self, device: &Device, seed: u64, time: Duration) -> Result<Slice, Failure> {
        let queues = usize::from(self.queues);
        // Until all have a ring, and until all are done: so neither starting nor ending a thread counts.
        let (ready, done) = (Barrier::new(queues + 1), Barrier::new(queues + 1));
        thread::scope(|scope| {
            let threads: Vec<_> = (0..u64::from(self.queues))
                .map(|number| {
                    let (ready, done) = (&ready, &done);
                    scope.spawn(move || {
                        let queue = device.queue().and_then(urus::QueueSeat::activate);
                        ready.wait();
                        let _arrival = Arrival(done);
                        self.one(&mut queue?, seed << 8 | number, time)
                    })
                })
                .collect();
            ready.wait();
            let (cpu, start) = (cpu_time(), Instant::now());
            done.wait();
            let mut slice = Slice {
                operations: 0,
                time: start.elapsed(),
                cpu: cpu_time().saturating_sub(cpu),
            };
            for thread in threads {
                slice.operations += thread
                    .join()
                    .unwrap_or_else(|_| Err(Failure::new("a thread of the benchmark has ended")))?;
            }
            Ok(slice)
        })
    }

    /// One queue's part; how many requests it was.
    fn one(&self, queue: &mut Queue, seed: u64, time: Duration) -> Result<u64, Failure> {
        let mut places = Places::new(self, seed);
        let mut buffers: Vec<Buffer> = (0..self.depth)
            .map(|_| {
                let mut buffer = Buffer::new(self.bytes);
                // Not zeroes: those could be written without being stored.
                buffer.as_mut_slice().fill(b'g');
                buffer
            })
            .collect();
        let start = Instant::now();
        let (mut sent, mut unflushed, mut flushing) = (0, 0, false);
        loop {
            let is_over = sent >= self.most || start.elapsed() >= time;
            let wants_flush = self.flush_every > 0 && (unflushed >= self.flush_every || is_over);
            while !is_over && !wants_flush && !flushing && sent < self.most {
                let Some(buffer) = buffers.pop() else { break };
                let place = places.next() * self.stride;
                let request = if self.writes {
                    Request::write(0, place, buffer)
                } else {
                    Request::read(0, place, buffer)
                };
                submit(queue, request);
                sent += 1;
                unflushed += 1;
            }
            if wants_flush && unflushed > 0 && queue.in_flight() == 0 {
                submit(queue, Request::flush(0));
                (unflushed, flushing) = (0, true);
            }
            if queue.in_flight() == 0 {
                flushing = false;
                if is_over {
                    return Ok(sent);
                }
                continue;
            }
            queue.wait(None);
            while let Some(completion) = queue.completion() {
                completion.result?;
                buffers.extend(completion.buffer);
            }
        }
    }
}

/// Tells that a queue is done, however it came to that: whoever waits for it must not wait forever.
struct Arrival<'a>(&'a Barrier);

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.0.wait();
    }
}

fn submit(queue: &mut Queue, request: Request) {
    queue
        .submit(request)
        .expect("the queue is as deep as there are buffers");
}

/// Numbers of places.
struct Places {
    count: u64,
    in_order: bool,
    state: u64,
}

impl Places {
    fn new(work: &Work, seed: u64) -> Self {
        let mut places = Self {
            count: work.count,
            in_order: work.in_order,
            state: seed,
        };
        if places.in_order {
            // From somewhere.
            places.state = places.draw() % places.count;
        }
        places
    }

    fn next(&mut self) -> u64 {
        if self.in_order {
            let place = self.state;
            self.state = (place + 1) % self.count;
            return place;
        }
        let draw = u128::from(self.draw());
        u64::try_from((draw * u128::from(self.count)) >> 64).expect("less than the count")
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

/// Of the whole process, in user and kernel mode.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
