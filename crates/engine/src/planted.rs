//! Bugs planted on purpose, each removing one rule, so that the simulator shows that it would find them.
//!
//! Without the feature `planted-bugs` every question here is the constant `false`.

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Bug {
    /// None.
    None = 0,
    /// O1: the refcounts of a commit are not written before barrier 1.
    RefcountsAfterPointers = 1,
    /// O2: barrier 1 is left out, so an L2 entry may be durable before its data.
    NoBarrierBeforePointers = 2,
    /// O3: the L1 entry is written together with the new L2 table (imago, Cloud Hypervisor #8721).
    EarlyL1Entry = 3,
    /// O4: a freed cluster is reusable at once (QEMU 10.0.2's early reuse).
    EarlyReuse = 4,
    /// O5: a freed range is punched before the removal is durable (Cloud Hypervisor #8624).
    EarlyPunch = 5,
    /// O6: decrements are written with the commit that removes the pointer.
    EarlyDecrement = 6,
    /// O7: reuse does not wait for requests in flight through the old mapping.
    NoInFlightPins = 7,
    /// O8: a new refcount block's table entry is written without the block's barrier.
    EarlyRefcountBlock = 8,
    /// O11: clusters of a failed write are given back twice (Cloud Hypervisor #8748).
    DoubleGiveBack = 9,
    /// O14: changes of one guest cluster do not exclude one another.
    NoClusterLocks = 10,
    /// A flush is acknowledged before barrier 2.
    EarlyAcknowledge = 11,
    /// O2: the rest of a reused cluster is not cleared on a partial write.
    NoClearing = 12,
    /// Frozen bytes are not used: the commit writes live L2 entries.
    LiveEntries = 13,
    /// O11: a failed barrier does not poison.
    NoPoison = 14,
    /// O10: COPIED is kept on a cluster that an internal snapshot shares, so it is written in place.
    IgnoreSnapshots = 15,
    /// O15: after a failed commit a table that may be in use counts as new, and is rewritten before barrier 1.
    RewrittenTable = 16,
    /// O5: a freed range is punched after the allocator has it (Cloud Hypervisor #8624).
    LatePunch = 17,
    /// O1: a new L2 table is not counted, so its cluster is handed out again (Cloud Hypervisor #8606).
    UncountedTable = 18,
    /// O11: an L2 table is let go before what takes its place is durable (Cloud Hypervisor #8637).
    EarlyTableRelease = 19,
    /// O16: a FUA write is acknowledged without a commit.
    FuaWithoutCommit = 20,
    /// O17: a failed sync is not told to the flushes that it covered.
    SilentSyncFailure = 21,
    /// O18: writes smaller than a block do not exclude their neighbours.
    NoBlockLocks = 22,
    /// O19: a slice read before it changed is installed after its newer frame was let go.
    StaleLoad = 23,
    /// O19: a slice is evicted before its write-back was seen.
    EvictTooEarly = 24,
    /// O22: a flush with no metadata to write issues no barrier.
    NoIdleBarrier = 25,
    /// O15: what a failed commit removed counts as durably removed.
    SettleAfterFailure = 26,
    /// O8: the header names a moved refcount table before the table is durable.
    EarlyHeader = 27,
    /// O23: a write that is to outlive the process completes though its mapping is in memory alone.
    OutlivedByNothing = 28,
    /// O20: a disk grows before what becomes visible is zero.
    GrowthShowsBacking = 29,
    /// O8: the header names a moved L1 table before the table is durable.
    EarlyL1Table = 30,
    /// A backing file that ends early is passed over as if it had nothing, and what lies beneath it shows.
    SkipsShortLayer = 31,
    /// A changed slice of an L2 table in use is written one slice too early, from the table's third on.
    ThirdSliceMisplaced = 32,
    /// A changed sector of the L1 table is written over the first, whichever it is.
    SecondL1SectorMisplaced = 33,
    /// The third slice of a refcount block is written in the place of the first.
    WrongCountsSlice = 34,
    /// The cache of refcounts keeps all that a commit has cleaned.
    CountsNeverShrink = 35,
    /// A raw backing file that ends inside a sector is taken to end before it.
    OddEndCutOff = 36,
    /// The last cluster of a disk that ends in it counts as whole when the disk grows: what it holds beyond the old end shows.
    PartialClusterTakenWhole = 37,
    /// A block status says zero of what the image leaves to its backing file.
    StatusHidesBacking = 40,
    /// A block status past the end of a shorter backing file names that file, and not the layer above.
    StatusBelowTheEnd = 41,
    /// O19: what was decoded of an image is kept when another process has written it during a pause.
    KeepsDecoded = 42,
    /// Clusters that a queue reserved before a pause count as free after another process has written the image.
    KeepsReserved = 43,
    /// O5: a punch that the file system cannot do counts as done, so that what is left there counts as zero.
    PunchTakenForDone = 44,
    /// Zeroes that the file system cannot make of a range of a raw image count as made.
    ZeroTakenForDone = 45,
    /// O7: a pause lets requests go on before the metadata that was read again is in place.
    EarlyResume = 51,
    /// O20: a disk shows its new size before the file says so.
    EarlySize = 52,
    /// O11: work of several parts ends with the first part that fails, while others are still writing.
    EndsWithFirstError = 70,
    /// Work of several parts ends while the last of them is still running.
    EndsBeforeLastPart = 71,
    /// Removals that were to be settled in steps are forgotten when a step fails.
    ForgetsLaterSteps = 72,
    /// A new cluster that reads as zeroes in the file counts as zeroes of the data, though that passes a cipher.
    ZeroesPastCipher = 80,
    /// O29: what a process that was killed has written counts as durable for the next one, since it can be read.
    TrustsThePageCache = 81,
    /// O30: the header of a new image is written before the rest of it is durable.
    EarlyNewHeader = 82,
    /// O30: what was in a file stays an image while a new one is written over it.
    KeepsOldHeader = 83,
    /// O28: a change of the header writes it as this engine would lay it out.
    WholeHeader = 60,
    /// O28: a change of the header is put into bytes that were read before another change.
    StaleHeader = 61,
    /// O28: feature bits are written in version 2 too, which has other things there.
    FeatureBitsAnyVersion = 62,
    /// The snapshot table is taken to be as long as this engine would write it.
    OwnSnapshotTable = 63,
    /// O28: after a failed write of the header it is written as this engine would lay it out.
    RestoredAnew = 64,
}

impl Bug {
    /// Those that threads on schedules find (the simulator's `tests/shuttle`).
    pub const THREADED: [Self; 2] = [Self::EarlyResume, Self::EarlySize];

    /// Those that the simulator hunts.
    pub const ALL: [Self; 53] = [
        Self::RefcountsAfterPointers,
        Self::NoBarrierBeforePointers,
        Self::EarlyL1Entry,
        Self::EarlyReuse,
        Self::EarlyPunch,
        Self::EarlyDecrement,
        Self::NoInFlightPins,
        Self::EarlyRefcountBlock,
        Self::DoubleGiveBack,
        Self::NoClusterLocks,
        Self::EarlyAcknowledge,
        Self::NoClearing,
        Self::LiveEntries,
        Self::NoPoison,
        Self::IgnoreSnapshots,
        Self::RewrittenTable,
        Self::LatePunch,
        Self::UncountedTable,
        Self::EarlyTableRelease,
        Self::FuaWithoutCommit,
        Self::SilentSyncFailure,
        Self::NoBlockLocks,
        Self::StaleLoad,
        Self::EvictTooEarly,
        Self::NoIdleBarrier,
        Self::SettleAfterFailure,
        Self::EarlyHeader,
        Self::OutlivedByNothing,
        Self::GrowthShowsBacking,
        Self::EarlyL1Table,
        Self::SkipsShortLayer,
        Self::ThirdSliceMisplaced,
        Self::SecondL1SectorMisplaced,
        Self::WrongCountsSlice,
        Self::CountsNeverShrink,
        Self::OddEndCutOff,
        Self::PartialClusterTakenWhole,
        Self::StatusHidesBacking,
        Self::StatusBelowTheEnd,
        Self::KeepsDecoded,
        Self::KeepsReserved,
        Self::PunchTakenForDone,
        Self::ZeroTakenForDone,
        Self::EndsWithFirstError,
        Self::EndsBeforeLastPart,
        Self::ForgetsLaterSteps,
        Self::WholeHeader,
        Self::StaleHeader,
        Self::FeatureBitsAnyVersion,
        Self::OwnSnapshotTable,
        Self::RestoredAnew,
        Self::ZeroesPastCipher,
        Self::TrustsThePageCache,
    ];
}

#[cfg(feature = "planted-bugs")]
mod switch {
    use super::Bug;
    use std::cell::{Cell, RefCell};

    thread_local! {
        static PLANTED: Cell<Bug> = const { Cell::new(Bug::None) };
        static KEPT: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
    }

    /// Plants a bug on this thread (the simulator runs a whole device on one).
    pub fn plant(bug: Bug) {
        PLANTED.with(|planted| planted.set(bug));
    }

    pub(crate) fn is(bug: Bug) -> bool {
        PLANTED.with(Cell::get) == bug
    }

    /// Bytes that a bug uses later than it should.
    pub(crate) fn keep(bytes: Option<Vec<u8>>) {
        KEPT.set(bytes);
    }

    pub(crate) fn kept() -> Option<Vec<u8>> {
        if is(Bug::StaleHeader) {
            KEPT.with_borrow(Clone::clone)
        } else {
            None
        }
    }
}

#[cfg(feature = "planted-bugs")]
pub use switch::plant;
#[cfg(feature = "planted-bugs")]
pub(crate) use switch::{is, keep, kept};

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn is(_bug: Bug) -> bool {
    false
}

#[cfg(not(feature = "planted-bugs"))]
pub(crate) fn keep(_bytes: Option<Vec<u8>>) {}

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn kept() -> Option<Vec<u8>> {
    None
}
