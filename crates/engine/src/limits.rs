//! Every limit of the engine, in one place.

/// Bytes of a mapping-cache frame's slice, where clusters are at least as large.
pub const SLICE_BYTES: u64 = if cfg!(feature = "loom") { 16 } else { 4096 };
/// Bytes of a cached slice of refcounts, where clusters are at least as large.
pub const REFCOUNT_SLICE_BYTES: u64 = 4096;
/// Default budget of the mapping cache: holds the whole map of 512 GiB with 64 KiB clusters.
pub const DEFAULT_L2_CACHE_BYTES: u64 = 64 << 20;
/// Fewest frames that the mapping cache works with: a handful for each request that needs one at a time.
pub const MIN_FRAMES: usize = 16;
/// Slices of refcounts kept in memory when they are clean, by default.
pub const REFCOUNT_CACHE_SLICES: usize = 2048;
/// Slices of refcounts that one search for free space reads before the file is extended instead.
pub const SCAN_SLICES_PER_STEP: u64 = 64;
/// Clusters that a queue reserves at once, at most.
pub const RUN_CLUSTERS: u64 = 64;
/// Bytes that a queue reserves at once, at most (at least one cluster).
pub const RUN_BYTES: u64 = 4 << 20;
/// How often the search for a long run of adjacent clusters starts anew before it is given up.
pub const RUN_RESTARTS: u32 = 16;
/// The file is lengthened ahead by this part of what is in use…
pub const GROW_PART: u64 = 8;
/// …but by no fewer bytes than these (one cluster at least)…
pub const GROW_BYTES_MIN: u64 = 64 << 10;
/// …and no more than these.
pub const GROW_BYTES_MAX: u64 = 16 << 20;
/// Parts of one request, or writes of one commit, that run side by side.
pub const PARTS_AT_ONCE: usize = 64;
/// Bytes that the writes of a commit that run side by side hold, at most (one write at least).
pub const COMMIT_WINDOW_BYTES: u64 = 8 << 20;
/// Bytes of neighbouring L2 slices that become one write (a cluster at least).
pub const JOINED_BYTES: u64 = 64 << 10;
/// Dirty L2 slices at most, whatever the cache's budget: it bounds what one commit copies and writes. A
/// commit starts at half of them.
pub const DIRTY_SLICES: usize = 16 << 10;
/// Changes (first references, removed references) that may wait for a commit before the next one
/// waits for it. A commit starts at a quarter of them.
pub const PENDING_CHANGES: usize = 16 << 10;
/// Freed clusters that are settled in one step.
pub const SETTLE_STEP_CLUSTERS: u64 = 4096;
/// Freed clusters that may wait for a commit before one is started without being asked for.
pub const PENDING_FREES: usize = 4096;
/// Budget of the cache of decoded clusters: holds a working set of 64 MiB whose ends lie inside clusters.
pub const DECODED_CACHE_BYTES: u64 = 72 << 20;
/// Clusters that a discard or write-zeroes changes in one step, holding their locks.
pub const ZERO_STEP_CLUSTERS: u64 = 512;
/// Clusters that one step of an allocating write changes at once.
pub const WRITE_STEP_CLUSTERS: u64 = 64;
/// Pieces of a request served without a task.
pub const DIRECT_PIECES: usize = 8;
/// What storage writes whole or not at all (ordering.md, assumptions).
pub const SECTOR_BYTES: u64 = 512;
/// How often an interrupted operation (EINTR, EAGAIN) is tried again before it counts as failed.
pub const RETRIES: u32 = 16;
/// Bytes of zeroes written in one operation where a range has to be cleared by writing.
pub const ZERO_BUFFER_BYTES: u64 = 1 << 20;
/// Parts of a cluster longer than this are cleared by ZeroRange, where the file can.
pub const ZERO_RANGE_FROM_BYTES: u64 = 128 << 10;
/// Extents in the answer to one block-status request.
pub const STATUS_EXTENTS: usize = 4096;
/// Largest refcount table (specification: 8 MiB as QEMU keeps it).
pub const REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Parts of the disk of which it is remembered which layers of a long chain have nothing for them (2 MiB of memory).
pub const SKIPS_MAX: u64 = 256 << 10;
/// Largest L1 table.
pub const L1_TABLE_BYTES: u64 = 32 << 20;

const _: () = assert!(SLICE_BYTES.is_power_of_two() && REFCOUNT_SLICE_BYTES.is_power_of_two());
const _: () = assert!(ZERO_RANGE_FROM_BYTES < ZERO_BUFFER_BYTES);
const _: () = assert!(WRITE_STEP_CLUSTERS <= RUN_CLUSTERS);
