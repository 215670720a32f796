//! Every limit of the back end, in one place.

use std::time::Duration;

/// Virtqueues at most: the messages that carry eventfds name the queue in 8 bits.
pub(crate) const QUEUES: usize = 256;

/// Entries of a virtqueue at most (virtio 1.2, 2.7 "Split Virtqueues").
pub(crate) const QUEUE_SIZE: u16 = 32_768;

/// Descriptors of one request at most, whatever the size of its queue: what one vectored system call takes (IOV_MAX).
pub(crate) const CHAIN_DESCRIPTORS: usize = 1024;

/// Data segments of one request that drivers are told of: with header and status they fit the smallest common queue,
/// of 128 entries, without indirect descriptors.
pub(crate) const SEG_MAX: u32 = 126;

/// Bytes of one such segment. libblkio keeps the product of both in 31 bits.
pub(crate) const SEGMENT_BYTES: u32 = 16 << 20;

/// Sectors of one segment of a discard or write-zeroes: 4 GiB.
pub(crate) const CLEAR_SECTORS: u32 = 8 << 20;

/// Segments of one discard or write-zeroes.
pub(crate) const CLEAR_SEGMENTS: u32 = 32;

/// Regions of guest memory at most.
pub(crate) const MEMORY_SLOTS: usize = 509;

/// Bytes of a shared area for requests in flight, or of a dirty log: what a front end may make us map.
pub(crate) const SHARED_BYTES: u64 = 1 << 32;

/// Bytes of the name that GET_ID answers with.
pub(crate) const SERIAL_BYTES: usize = 20;

/// How long a front end may take from its connection to the first message, and from that to the first one that begins a session.
/// After that it may be silent for ever, as one is whose guest does not use its disk.
/// Also for the rest of a message of which it has sent a part, and for taking an answer. Unless the builder says otherwise.
pub(crate) const INTRODUCTION_TIME: Duration = Duration::from_secs(10);

/// Connections at once that have said nothing yet. With one more, the oldest has to go.
pub(crate) const SILENT_CONNECTIONS: usize = 16;

/// How long a queue polls at most after it ran out of work.
pub(crate) const POLL_TIME: Duration = Duration::from_millis(100);

/// How long after a driver's notification a request of it is to be seen.
pub(crate) const UNHEARD_TIME: Duration = Duration::from_secs(2);

const _: () = {
    assert!(SEG_MAX as u64 * SEGMENT_BYTES as u64 <= i32::MAX as u64);
    assert!(SEG_MAX as usize + 2 <= CHAIN_DESCRIPTORS);
    assert!(QUEUE_SIZE.is_power_of_two());
};
