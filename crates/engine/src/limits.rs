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
/// log2 of the bytes of a raw image that one lock of a write covers.
pub const RAW_LOCK_BITS: u32 = 16;
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

/// Tables that the directory of a map has room for from the beginning, at most.
pub const NEAR_TABLES: usize = if cfg!(feature = "loom") { 2 } else { 16 << 10 };

/// Those limits that a small image never reaches. The simulator makes them small, so that what happens beyond them is looked at as often
/// as the rest; everybody else has the values above. A slice is never smaller than the file's alignment, nor larger than a cluster.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// [`SLICE_BYTES`]; a power of two.
    pub slice_bytes: u64,
    /// [`REFCOUNT_SLICE_BYTES`]; a power of two.
    pub refcount_slice_bytes: u64,
    /// [`MIN_FRAMES`]
    pub min_frames: usize,
    /// [`NEAR_TABLES`]
    pub near_tables: usize,
    /// [`SCAN_SLICES_PER_STEP`]
    pub scan_slices: u64,
    /// [`RUN_CLUSTERS`]
    pub run_clusters: u64,
    /// [`RUN_BYTES`]
    pub run_bytes: u64,
    /// [`GROW_BYTES_MIN`]
    pub grow_bytes_min: u64,
    /// [`GROW_BYTES_MAX`]
    pub grow_bytes_max: u64,
    /// [`PENDING_FREES`]
    pub pending_frees: usize,
    /// [`DECODED_CACHE_BYTES`]
    pub decoded_bytes: u64,
    /// [`ZERO_STEP_CLUSTERS`]
    pub zero_step_clusters: u64,
    /// [`WRITE_STEP_CLUSTERS`]
    pub write_step_clusters: u64,
    /// [`ZERO_BUFFER_BYTES`]; a multiple of the file's alignment.
    pub zero_buffer_bytes: u64,
    /// [`ZERO_RANGE_FROM_BYTES`]
    pub zero_range_from_bytes: u64,
    /// [`STATUS_EXTENTS`]
    pub status_extents: usize,
    /// [`SKIPS_MAX`]; a power of two.
    pub skips: u64,
    /// [`SECTOR_BYTES`]: what is written of the tables in memory (L1, refcount table) where an entry changed; a power of two.
    pub table_unit_bytes: u64,
    /// [`DIRTY_SLICES`]
    pub dirty_slices: usize,
    /// [`PENDING_CHANGES`]
    pub pending_changes: usize,
    /// [`PARTS_AT_ONCE`]
    pub parts_at_once: usize,
    /// [`COMMIT_WINDOW_BYTES`]
    pub commit_window_bytes: u64,
    /// [`JOINED_BYTES`]
    pub joined_bytes: u64,
    /// [`SETTLE_STEP_CLUSTERS`]
    pub settle_step_clusters: u64,
    /// [`RAW_LOCK_BITS`]; of a range that is no smaller than the file's alignment.
    pub raw_lock_bits: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            slice_bytes: SLICE_BYTES,
            refcount_slice_bytes: REFCOUNT_SLICE_BYTES,
            min_frames: MIN_FRAMES,
            near_tables: NEAR_TABLES,
            scan_slices: SCAN_SLICES_PER_STEP,
            run_clusters: RUN_CLUSTERS,
            run_bytes: RUN_BYTES,
            grow_bytes_min: GROW_BYTES_MIN,
            grow_bytes_max: GROW_BYTES_MAX,
            pending_frees: PENDING_FREES,
            decoded_bytes: DECODED_CACHE_BYTES,
            zero_step_clusters: ZERO_STEP_CLUSTERS,
            write_step_clusters: WRITE_STEP_CLUSTERS,
            zero_buffer_bytes: ZERO_BUFFER_BYTES,
            zero_range_from_bytes: ZERO_RANGE_FROM_BYTES,
            status_extents: STATUS_EXTENTS,
            skips: SKIPS_MAX,
            table_unit_bytes: SECTOR_BYTES,
            dirty_slices: DIRTY_SLICES,
            pending_changes: PENDING_CHANGES,
            parts_at_once: PARTS_AT_ONCE,
            commit_window_bytes: COMMIT_WINDOW_BYTES,
            joined_bytes: JOINED_BYTES,
            settle_step_clusters: SETTLE_STEP_CLUSTERS,
            raw_lock_bits: RAW_LOCK_BITS,
        }
    }
}

const _: () = assert!(SLICE_BYTES.is_power_of_two() && REFCOUNT_SLICE_BYTES.is_power_of_two());
const _: () = assert!(ZERO_RANGE_FROM_BYTES < ZERO_BUFFER_BYTES);
const _: () = assert!(WRITE_STEP_CLUSTERS <= RUN_CLUSTERS);
