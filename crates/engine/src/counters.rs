//! What a device has done, in numbers.
//!
//! A hit counts on a line of its worker's, which no other thread writes; what waits for I/O or holds a lock anyway counts on
//! the device's. Nothing is decided by any of it.

use crate::chain::Layer;
use crate::shared::Shared;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, Tally};

/// Counters of one device; they only grow.
#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) slice_loads: AtomicU64,
    pub(crate) commits: AtomicU64,
    pub(crate) barriers: AtomicU64,
    pub(crate) allocated_clusters: AtomicU64,
    pub(crate) freed_clusters: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    pub(crate) decoded_clusters: AtomicU64,
    hits: Mutex<Hits>,
}

#[derive(Default)]
struct Hits {
    /// Of the workers that there are.
    lines: Vec<Arc<Line>>,
    /// Of those that there were.
    ended: u64,
}

/// Alone on its cache lines (processors fetch them in pairs).
#[derive(Default)]
#[repr(align(128))]
struct Line(Tally);

/// Counters of one device at a moment; they only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Look-ups in the L2 tables that the mapping cache has answered, over all layers. A request may look up a cluster more than once.
    pub mapping_hits: u64,
    /// L2 slices read because they were not cached.
    pub slice_loads: u64,
    /// L2 slices that made room for others in the mapping cache.
    pub evicted_slices: u64,
    /// Commits of metadata.
    pub commits: u64,
    /// fdatasyncs.
    pub barriers: u64,
    /// Clusters that came into use, for data or for metadata.
    pub allocated_clusters: u64,
    /// Clusters that went out of use, for others to take.
    pub freed_clusters: u64,
    /// Bytes copied from older places to complete partly written clusters.
    pub copied_bytes: u64,
    /// Compressed clusters found decoded.
    pub decoded_hits: u64,
    /// Compressed clusters decoded because they were not cached.
    pub decoded_clusters: u64,
}

impl Shared {
    /// The counters now. Each is exact; they are not read at the same moment.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let evicted = |layer: &Layer| {
            let qcow2 = layer.qcow2();
            qcow2.map_or(0, |qcow2| qcow2.meta.lock().frames.evicted())
        };
        let layers = self.chain.layers();
        Counters {
            mapping_hits: self.stats.mapping_hits(),
            slice_loads: read(&self.stats.slice_loads),
            evicted_slices: layers.map(evicted).sum(),
            commits: read(&self.stats.commits),
            barriers: read(&self.stats.barriers),
            allocated_clusters: read(&self.stats.allocated_clusters),
            freed_clusters: read(&self.stats.freed_clusters),
            copied_bytes: read(&self.stats.copied_bytes),
            decoded_hits: self.decoded.hits(),
            decoded_clusters: read(&self.stats.decoded_clusters),
        }
    }

    pub(crate) fn count(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

impl Stats {
    fn mapping_hits(&self) -> u64 {
        let hits = self.hits.lock();
        let lines = hits.lines.iter().map(|line| line.0.load(Ordering::Relaxed));
        hits.ended + lines.sum::<u64>()
    }
}

/// Where one worker counts its hits.
pub(crate) struct HitCount {
    shared: Arc<Shared>,
    line: Arc<Line>,
}

impl HitCount {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let line = Arc::new(Line::default());
        shared.stats.hits.lock().lines.push(Arc::clone(&line));
        Self { shared, line }
    }

    /// Adds one: no other thread does.
    #[inline]
    pub(crate) fn add(&self) {
        let tally = &self.line.0;
        tally.store(tally.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

impl Drop for HitCount {
    fn drop(&mut self) {
        let mut hits = self.shared.stats.hits.lock();
        hits.lines.retain(|line| !Arc::ptr_eq(line, &self.line));
        hits.ended += self.line.0.load(Ordering::Relaxed);
    }
}
