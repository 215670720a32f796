//! What a back end has done.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of a back end, over all its queues and front ends. They only grow.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// Counters of one queue, which its thread alone changes.
        #[derive(Debug, Default)]
        pub(crate) struct QueueStats {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Stats {
            pub(crate) fn add(&mut self, queue: &QueueStats) {
                $(self.$name += queue.$name.load(Relaxed);)*
            }
        }
    };
}

counters! {
    /// Reads taken from the driver.
    reads,
    /// Bytes of those that succeeded.
    read_bytes,
    /// Writes taken.
    writes,
    /// Bytes of those that succeeded.
    written_bytes,
    /// Flushes taken.
    flushes,
    /// Discards taken.
    discards,
    /// Write-zeroes taken.
    write_zeroes,
    /// Requests that ended with an error.
    failed,
    /// Requests done again that an earlier back end had left.
    resubmitted,
    /// Times that requests were started: one system call each.
    batches,
    /// Times that the driver was told of ended requests.
    calls,
}

/// Adds to a counter that only this thread changes.
pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(count), Relaxed);
}
