//! Every limit of the facade, in one place.

/// Layers of a chain, the image included.
pub(crate) const MAX_CHAIN_LAYERS: usize = 64;

/// Requests in flight per queue, at most.
pub const MAX_QUEUE_DEPTH: u32 = 4096;

/// Requests in flight per queue, unless the caller says otherwise.
pub(crate) const QUEUE_DEPTH: u32 = 128;

/// Memory for L2 tables, unless the caller says otherwise: what QEMU takes too.
pub(crate) const L2_CACHE_BYTES: u64 = 32 << 20;

/// How [`BlockingIo`](crate::BlockingIo) cuts transfers.
pub(crate) const BLOCKING_CHUNK_BYTES: usize = 1 << 20;

const _: () = {
    assert!(QUEUE_DEPTH >= 1 && QUEUE_DEPTH <= MAX_QUEUE_DEPTH);
    // Files of a device are named by 16 bits.
    assert!(MAX_CHAIN_LAYERS <= u16::MAX as usize);
};
