//! Ways through the engine that only large images take: the simulator notes which of them its small sizes have led it through.
//!
//! Without the feature `planted-bugs` nothing is noted.

/// A way that a small image never goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Way {
    /// The third or a later slice of an L2 table was read.
    LaterSliceRead,
    /// Such a slice was written into a table in use.
    LaterSliceWritten,
    /// Such a slice went into a new table.
    LaterSliceOfNewTable,
    /// Two writes of one commit went into one L2 table, with a gap between.
    GapInTable,
    /// Adjacent slices of an L2 table went out in one write.
    SlicesJoined,
    /// A slice made room for another one while a neighbour in its table was dirty.
    EvictedBesideDirty,
    /// More frames than one chunk of the pool has.
    SecondFrameChunk,
    /// A table that the directory had no place for in the beginning.
    FarTable,
    /// A write had to wait until a commit cleaned a frame.
    NoFrame,
    /// A commit was asked for because many frames were dirty.
    ManyDirty,
    /// A sector of the L1 table past its first was written.
    LaterL1Sector,
    /// A commit wrote more than one sector of the L1 table.
    L1Sectors,
    /// A sector of the refcount table past its first was written.
    LaterTableSector,
    /// The third or a later slice of a refcount block was read.
    LaterCountsRead,
    /// Such a slice was written.
    LaterCountsWritten,
    /// A slice of refcounts was read while a neighbour in its block was dirty.
    CountsReadBesideDirty,
    /// A slice of refcounts was read while a commit was writing others.
    CountsReadInCommit,
    /// Two slices of refcounts were being read at once.
    CountsReadAtOnce,
    /// A slice of refcounts was dropped while a neighbour in its block was dirty.
    CountsDroppedBesideDirty,
    /// The cache of refcounts had grown past its bound by several slices, and came back to it.
    CountsShrunk,
    /// A reservation found nothing in the slices that one search may read.
    SearchEnded,
    /// A write got fewer adjacent clusters than it wanted.
    ShortRun,
    /// A commit was asked for because many clusters waited to be freed.
    ManyFreed,
    /// A commit was asked for because many changes waited for one.
    ManyChanges,
    /// A decoded cluster made room for another.
    DecodedDropped,
    /// What was known of one part of the disk made room for another part.
    SkipReplaced,
    /// A discard or write of zeroes ended a step before the slice ended.
    ZeroStep,
    /// A write ended a step before the clusters that change ended.
    WriteStep,
    /// New clusters were published in more than one slice.
    PublishedAcrossSlices,
    /// A status was full before its range ended.
    StatusFull,
    /// Zeroes were written by more than one buffer.
    ZeroBuffers,
    /// Part of a cluster was cleared by an operation of its own.
    ZeroRange,
    /// A read met the end of a file inside a sector.
    OddEnd,
    /// A write took a new cluster that the disk ends in.
    PartialCluster,
    /// The last cluster of a disk was cleared, which ends in it.
    PartialClusterCleared,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 35] = [
        Self::LaterSliceRead,
        Self::LaterSliceWritten,
        Self::LaterSliceOfNewTable,
        Self::GapInTable,
        Self::SlicesJoined,
        Self::EvictedBesideDirty,
        Self::SecondFrameChunk,
        Self::FarTable,
        Self::NoFrame,
        Self::ManyDirty,
        Self::LaterL1Sector,
        Self::L1Sectors,
        Self::LaterTableSector,
        Self::LaterCountsRead,
        Self::LaterCountsWritten,
        Self::CountsReadBesideDirty,
        Self::CountsReadInCommit,
        Self::CountsReadAtOnce,
        Self::CountsDroppedBesideDirty,
        Self::CountsShrunk,
        Self::SearchEnded,
        Self::ShortRun,
        Self::ManyFreed,
        Self::ManyChanges,
        Self::DecodedDropped,
        Self::SkipReplaced,
        Self::ZeroStep,
        Self::WriteStep,
        Self::PublishedAcrossSlices,
        Self::StatusFull,
        Self::ZeroBuffers,
        Self::ZeroRange,
        Self::OddEnd,
        Self::PartialCluster,
        Self::PartialClusterCleared,
    ];
}

/// A set of ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ways(u64);

impl Ways {
    /// Whether this way was taken.
    #[must_use]
    pub fn has(self, way: Way) -> bool {
        self.0 >> way as u32 & 1 != 0
    }

    /// Adds the ways of another set.
    pub fn add(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Those that were not taken.
    pub fn missed(self) -> impl Iterator<Item = Way> {
        Way::ALL.into_iter().filter(move |way| !self.has(*way))
    }
}

#[cfg(feature = "planted-bugs")]
mod notes {
    use super::{Way, Ways};
    use std::cell::Cell;

    thread_local! {
        static SEEN: Cell<Ways> = const { Cell::new(Ways(0)) };
    }

    pub(crate) fn note(way: Way, taken: impl FnOnce() -> bool) {
        let seen = SEEN.get();
        if !seen.has(way) && taken() {
            SEEN.set(Ways(seen.0 | 1 << way as u32));
        }
    }

    /// The ways that this thread has taken since it was last asked.
    #[must_use]
    pub fn take() -> Ways {
        SEEN.take()
    }
}

#[cfg(feature = "planted-bugs")]
pub(crate) use notes::note;
#[cfg(feature = "planted-bugs")]
pub use notes::take;

#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub(crate) fn note(_way: Way, _taken: impl FnOnce() -> bool) {}
