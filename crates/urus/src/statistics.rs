//! What a device and its queues have done, in numbers: for metrics.
//!
//! Each queue counts on lines of its own, to which its thread alone stores; whoever asks reads them all. A queue's place, and so what
//! was counted there, passes on to the next queue when it is dropped.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use urus_ring::DriverKind;

use crate::Counters;
use crate::request::Kind;

/// A device at a moment: what [`Device::statistics`](crate::Device::statistics) returns.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// What all queues together have made of the image's metadata.
    pub counters: Counters,
    /// Each queue that there is or was, by its number.
    pub queues: Vec<QueueStatistics>,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Files in the chain: 1 without a backing file.
    pub chain_depth: usize,
    /// What does the I/O of maintenance: "io_uring" or "blocking".
    pub driver: &'static str,
    /// Whether everything that changes the disk is refused.
    pub read_only: bool,
    /// Whether the device is paused: requests wait.
    pub paused: bool,
    /// Whether a sync has failed, so that writes are refused.
    pub poisoned: bool,
}

/// A queue's place at a moment: what was counted there by the queue that has it now, and by those before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStatistics {
    /// What does its I/O: "io_uring" or "blocking"; None while no queue has the place.
    pub driver: Option<&'static str>,
    /// Requests submitted whose completion was not yet taken.
    pub in_flight: u64,
    /// Reads.
    pub reads: OperationStatistics,
    /// Writes.
    pub writes: OperationStatistics,
    /// Flushes.
    pub flushes: OperationStatistics,
    /// Discards.
    pub discards: OperationStatistics,
    /// Write-zeroes.
    pub write_zeroes: OperationStatistics,
    /// Block-status requests.
    pub block_statuses: OperationStatistics,
}

impl QueueStatistics {
    /// All kinds with their names.
    pub fn by_kind(&self) -> impl Iterator<Item = (&'static str, &OperationStatistics)> {
        [
            ("read", &self.reads),
            ("write", &self.writes),
            ("flush", &self.flushes),
            ("discard", &self.discards),
            ("write_zeroes", &self.write_zeroes),
            ("block_status", &self.block_statuses),
        ]
        .into_iter()
    }
}

/// Requests of one kind whose completion was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OperationStatistics {
    /// Those that succeeded.
    pub operations: u64,
    /// Bytes of those: read, written, or of the range. 0 for flushes.
    pub bytes: u64,
    /// Those that failed, which count nowhere else.
    pub errors: u64,
    /// How long those that succeeded took, from submission until the queue has found them done: with
    /// [`OpenOptions::latencies`](crate::OpenOptions::latencies), else none. The clock is read once for what is submitted before a kick,
    /// and once for what is found together.
    pub latency: Histogram,
}

/// Durations, counted in buckets: each ends at twice the one before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Histogram {
    /// How many lie in each bucket, above the end of the one before.
    pub counts: [u64; Self::BUCKETS],
    /// All together.
    pub sum: Duration,
}

impl Histogram {
    /// From 1 µs to 16.8 s, and one for what is longer.
    pub const BUCKETS: usize = 26;

    /// The longest duration that the bucket counts; None for the last, which has no end.
    #[must_use]
    pub fn end(bucket: usize) -> Option<Duration> {
        (bucket < Self::BUCKETS - 1).then(|| Duration::from_micros(1 << bucket))
    }

    /// How many there are in all.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn bucket(nanoseconds: u64) -> usize {
        // The exponent of the power of two that it does not pass.
        let micros = nanoseconds.div_ceil(1000).max(1);
        let exponent = u64::BITS - (micros - 1).leading_zeros();
        Self::BUCKETS.min(exponent as usize + 1) - 1
    }
}

/// Where requests of one kind are counted.
#[derive(Default)]
struct KindLine {
    buckets: [AtomicU64; Histogram::BUCKETS],
    nanoseconds: AtomicU64,
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl KindLine {
    fn read(&self) -> OperationStatistics {
        let counts = std::array::from_fn(|bucket| self.buckets[bucket].load(Relaxed));
        let latency = Histogram {
            counts,
            sum: Duration::from_nanos(self.nanoseconds.load(Relaxed)),
        };
        OperationStatistics {
            operations: self.operations.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            errors: self.errors.load(Relaxed),
            latency,
        }
    }
}

/// A queue's counters. Apart from everything else's cache lines (which processors fetch in pairs).
#[derive(Default)]
#[repr(align(128))]
struct Line {
    in_flight: AtomicU64,
    /// 0 while no queue is active here; else see `driver_number`.
    driver: AtomicU8,
    kinds: [KindLine; 6],
}

/// What is counted of a request: remembered while it is in flight.
#[derive(Clone, Copy)]
pub(crate) struct Counted {
    kind: usize,
    bytes: u64,
}

impl Counted {
    #[inline]
    pub(crate) fn of(kind: &Kind) -> Self {
        let (kind, bytes) = match kind {
            Kind::Read { buffer, .. } => (0, buffer.len() as u64),
            Kind::Write { buffer, .. } => (1, buffer.len() as u64),
            Kind::Flush => (2, 0),
            Kind::Discard { len, .. } => (3, *len),
            Kind::WriteZeroes { len, .. } => (4, *len),
            Kind::BlockStatus { len, .. } => (5, *len),
        };
        Self { kind, bytes }
    }
}

/// The places of a device's queues.
#[derive(Default)]
pub(crate) struct Places(Mutex<Vec<(Arc<Line>, bool)>>);

impl Places {
    fn list(&self) -> MutexGuard<'_, Vec<(Arc<Line>, bool)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first place that is free.
    pub(crate) fn take(self: &Arc<Self>) -> Place {
        let mut list = self.list();
        let number = match list.iter().position(|(_, taken)| !taken) {
            Some(number) => number,
            None => {
                list.push((Arc::default(), false));
                list.len() - 1
            }
        };
        let (line, taken) = &mut list[number];
        *taken = true;
        Place {
            line: Arc::clone(line),
            number,
            places: Arc::clone(self),
        }
    }

    pub(crate) fn read(&self) -> Vec<QueueStatistics> {
        let read = |(line, _): &(Arc<Line>, bool)| {
            let [
                reads,
                writes,
                flushes,
                discards,
                write_zeroes,
                block_statuses,
            ] = line.kinds.each_ref().map(KindLine::read);
            QueueStatistics {
                driver: driver_name(line.driver.load(Relaxed)),
                in_flight: line.in_flight.load(Relaxed),
                reads,
                writes,
                flushes,
                discards,
                write_zeroes,
                block_statuses,
            }
        };
        self.list().iter().map(read).collect()
    }
}

/// A queue's place: only its thread counts here.
pub(crate) struct Place {
    line: Arc<Line>,
    number: usize,
    places: Arc<Places>,
}

impl Place {
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    pub(crate) fn activated(&self, driver: DriverKind) {
        self.line.driver.store(driver_number(driver), Relaxed);
    }

    #[inline]
    pub(crate) fn set_in_flight(&self, requests: usize) {
        self.line.in_flight.store(requests as u64, Relaxed);
    }

    #[inline]
    pub(crate) fn succeeded(&self, counted: Counted) {
        let kind = &self.line.kinds[counted.kind];
        add(&kind.operations, 1);
        add(&kind.bytes, counted.bytes);
    }

    #[inline]
    pub(crate) fn took(&self, counted: Counted, took: Duration) {
        let kind = &self.line.kinds[counted.kind];
        // 584 years.
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        add(&kind.buckets[Histogram::bucket(nanoseconds)], 1);
        add(&kind.nanoseconds, nanoseconds);
    }

    pub(crate) fn failed(&self, counted: Counted) {
        add(&self.line.kinds[counted.kind].errors, 1);
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Place").field(&self.number).finish()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.line.driver.store(0, Relaxed);
        self.line.in_flight.store(0, Relaxed);
        self.places.list()[self.number].1 = false;
    }
}

/// Adds to a counter that only this thread changes.
#[inline]
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(count), Relaxed);
}

fn driver_number(driver: DriverKind) -> u8 {
    match driver {
        DriverKind::IoUring => 1,
        DriverKind::Blocking | DriverKind::Auto => 2,
    }
}

fn driver_name(number: u8) -> Option<&'static str> {
    match number {
        0 => None,
        1 => Some(crate::device::driver_name(DriverKind::IoUring)),
        _ => Some(crate::device::driver_name(DriverKind::Blocking)),
    }
}

#[cfg(test)]
mod tests {
    //! Guards the histogram's edges: what is exactly as long as a bucket's end belongs into it (Prometheus's `le`), and nothing is
    //! too long to count.
    use super::*;

    #[test]
    fn a_bucket_ends_with_its_end() {
        for bucket in 0..Histogram::BUCKETS - 1 {
            let end = Histogram::end(bucket).unwrap();
            let nanoseconds = u64::try_from(end.as_nanos()).unwrap();
            assert_eq!(Histogram::bucket(nanoseconds), bucket);
            assert_eq!(Histogram::bucket(nanoseconds + 1), bucket + 1);
        }
        assert_eq!(Histogram::bucket(0), 0);
        assert_eq!(Histogram::bucket(u64::MAX), Histogram::BUCKETS - 1);
        assert_eq!(Histogram::end(Histogram::BUCKETS - 1), None);
        assert_eq!(
            Histogram::end(Histogram::BUCKETS - 2),
            Some(Duration::from_micros(1 << 24))
        );
    }
}
