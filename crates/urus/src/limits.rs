//! Every limit of the facade, in one place.

/// Layers of a chain, the image included.
pub(crate) const MAX_CHAIN_LAYERS: usize = 64;

/// How much of an image is read to find its header: all of the first cluster for the usual cluster sizes.
pub(crate) const HEADER_READ_BYTES: usize = 64 << 10;

/// How much of a snapshot table is read at first: it does not say how long it is.
pub(crate) const SNAPSHOT_READ_BYTES: usize = 64 << 10;

/// Requests in flight per queue, at most.
pub const MAX_QUEUE_DEPTH: u32 = 4096;

/// Requests in flight per queue, unless the caller says otherwise.
pub(crate) const QUEUE_DEPTH: u32 = 128;

/// How [`BlockingIo`](crate::BlockingIo) cuts transfers.
pub(crate) const BLOCKING_CHUNK_BYTES: u64 = 1 << 20;

/// Transfers that [`BlockingIo`](crate::BlockingIo) has in flight at once.
pub(crate) const BLOCKING_CHUNKS: usize = 4;

/// Operations that the maintenance thread has in flight at once.
pub(crate) const MAINTENANCE_DEPTH: u32 = 128;

const _: () = {
    assert!(QUEUE_DEPTH >= 1 && QUEUE_DEPTH <= MAX_QUEUE_DEPTH);
    // Files of a device are named by 16 bits.
    assert!(MAX_CHAIN_LAYERS <= u16::MAX as usize);
};
