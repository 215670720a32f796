//! A load of everything: reads over the whole disk, so that slices come and go; writes to some places all over it; and in one region writes to
//! new clusters, discards, zeroes and flushes, so that the mapping never comes to rest. Queues are dropped and made anew all the while.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use urus::{Buffer, Device, Queue, Request};

use super::super::wide::{SLICE_SPAN, slices};
use crate::failure::Failure;

const REQUEST_BYTES: usize = 16 << 10;
/// What changes lie in, and places that are written to besides: both bound what the image file can grow to.
const REGION_BYTES: u64 = 1 << 30;
const PLACES: u64 = 4096;
/// Largest discard, and range of zeroes.
const CLEAR_BYTES: u64 = 1 << 20;
/// How long a queue lives.
const QUEUE_LIFE: Duration = Duration::from_secs(1);

/// The load on a device.
pub(super) struct Mixture<'a> {
    device: &'a Device,
    depth: u32,
    is_over: AtomicBool,
    requests: AtomicU64,
    queues_made: AtomicU64,
}

/// What was done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) requests: u64,
    pub(super) queues_made: u64,
}

impl<'a> Mixture<'a> {
    pub(super) fn new(device: &'a Device, depth: u32) -> Self {
        Self {
            device,
            depth,
            is_over: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            queues_made: AtomicU64::new(0),
        }
    }

    /// Runs on so many queues for as long as `watch` takes.
    pub(super) fn run(
        &self,
        queues: u16,
        watch: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Done, Failure> {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..queues)
                .map(|number| scope.spawn(move || self.one(u64::from(number))))
                .collect();
            let watched = watch();
            self.is_over.store(true, Ordering::Relaxed);
            for thread in threads {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(Failure::new("a thread of the load has ended")))?;
            }
            watched
        })?;
        Ok(Done {
            requests: self.requests.load(Ordering::Relaxed),
            queues_made: self.queues_made.load(Ordering::Relaxed),
        })
    }

    fn one(&self, number: u64) -> Result<(), Failure> {
        let mut noise = Noise(number + 1);
        let mut buffers: Vec<Buffer> = (0..self.depth)
            .map(|_| {
                let mut buffer = Buffer::new(REQUEST_BYTES);
                buffer.as_mut_slice().fill(b'm');
                buffer
            })
            .collect();
        while !self.is_over.load(Ordering::Relaxed) {
            let mut queue = self.device.queue()?.activate()?;
            self.queues_made.fetch_add(1, Ordering::Relaxed);
            let begin = Instant::now();
            while begin.elapsed() < QUEUE_LIFE && !self.is_over.load(Ordering::Relaxed) {
                self.batch(&mut queue, &mut buffers, &mut noise)?;
            }
        }
        Ok(())
    }

    /// As many requests as the queue is deep, and waits for all of them.
    fn batch(
        &self,
        queue: &mut Queue,
        buffers: &mut Vec<Buffer>,
        noise: &mut Noise,
    ) -> Result<(), Failure> {
        for token in 0..u64::from(self.depth) {
            let request = self.request(token, buffers, noise);
            queue
                .submit(request)
                .expect("the queue is as deep as there are requests");
        }
        while queue.in_flight() > 0 {
            queue.wait(None);
            while let Some(completion) = queue.completion() {
                self.requests.fetch_add(1, Ordering::Relaxed);
                buffers.extend(completion.buffer);
                completion.result?;
            }
        }
        Ok(())
    }

    fn request(&self, token: u64, buffers: &mut Vec<Buffer>, noise: &mut Noise) -> Request {
        let size = self.device.size();
        // What starts in it may end a little after it.
        let region = size.min(REGION_BYTES) - CLEAR_BYTES;
        let bytes = u64::try_from(REQUEST_BYTES).expect("16 KiB");
        let inside = |noise: &mut Noise| noise.below(region / bytes) * bytes;
        let mut buffer = || buffers.pop().expect("one for each request");
        match noise.below(100) {
            0..60 => Request::read(token, noise.below(size / bytes) * bytes, buffer()),
            60..65 => Request::read(token, inside(noise), buffer()),
            65..80 => {
                let all = slices(size);
                let place = noise.below(all.min(PLACES)) * (all / all.min(PLACES)) * SLICE_SPAN;
                Request::write(token, place, buffer())
            }
            80..90 => Request::write(token, inside(noise), buffer()),
            90..95 => Request::discard(token, inside(noise), 4 * bytes),
            95..97 => {
                let start = noise.below(region / CLEAR_BYTES) * CLEAR_BYTES;
                Request::discard(token, start, CLEAR_BYTES)
            }
            97..99 => {
                let start = noise.below(region / CLEAR_BYTES) * CLEAR_BYTES;
                let unmap = noise.below(2) == 0;
                Request::write_zeroes(token, start, CLEAR_BYTES).unmap(unmap)
            }
            _ => Request::flush(token),
        }
    }
}

/// SplitMix64.
struct Noise(u64);

impl Noise {
    fn below(&mut self, count: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        u64::try_from((u128::from(z) * u128::from(count)) >> 64).expect("less than the count")
    }
}
