//! A naive QCOW2 checker, the simulator's judge.
//!
//! It takes the bytes of an image and counts who refers to each cluster. It is slow and simple on purpose, and
//! shares nothing with the engine or `urus-format`. No input makes it panic, and its work is bounded by the
//! length of the file.
//!
//! - [`check`] finds broken refcounts, overlaps and wrong COPIED flags, and counts leaks.
//! - [`header_kept`] says whether a header is what it was, but for what has to change.
//! - [`GuestReader`] reads what a guest would see.
//! - [`Owners`] says what lies at a host offset (to sort pending writes by kind).

mod kept;
mod layout;
mod reader;
mod walk;

use std::fmt;

pub use kept::header_kept;
pub use reader::{Backing, GuestReader, State};
pub use walk::check;

/// Which mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// The active L1 table.
    Active,
    /// The L1 table of the snapshot with this number (its place in the snapshot table).
    Snapshot(u32),
}

/// Who refers to a host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// The header, in cluster 0.
    Header,
    /// The refcount table.
    RefcountTable,
    /// The refcount block with this index in the refcount table.
    RefcountBlock(u64),
    /// An L1 table.
    L1(Table),
    /// The L2 table at this index of an L1 table.
    L2(Table, u64),
    /// The snapshot table.
    SnapshotTable,
    /// The bitmap directory.
    BitmapDirectory,
    /// The table of the bitmap with this number.
    BitmapTable(u32),
    /// Data of the bitmap with this number.
    Bitmap(u32),
    /// This guest cluster, stored plainly.
    Data(Table, u64),
    /// This guest cluster, compressed.
    Compressed(Table, u64),
}

impl Owner {
    /// Whether the cluster describes the image rather than holding guest data.
    #[must_use]
    pub fn is_metadata(self) -> bool {
        !matches!(self, Self::Data(..) | Self::Compressed(..))
    }
}

/// Something that must not be, in any image and after any power cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The header makes no sense; nothing else was looked at.
    Header(String),
    /// A valid feature that the checker does not follow.
    Refused(String),
    /// A snapshot's entry makes no sense.
    Snapshot {
        /// Its place in the table.
        number: u32,
        /// What is wrong.
        why: String,
    },
    /// The bitmap directory makes no sense.
    Bitmaps(String),
    /// A table that is misaligned or not whole within the file.
    BadTable {
        /// Which table.
        owner: Owner,
        /// Where it is said to be.
        offset: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// An entry with bits that must not be set.
    BadEntry {
        /// What the entry describes.
        owner: Owner,
        /// The entry.
        entry: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// Fewer counted references than there are (O1).
    RefcountTooLow {
        /// The host cluster's index.
        cluster: u64,
        /// What the refcount block says.
        refcount: u64,
        /// References found.
        references: u64,
        /// Who refers to it (the first few).
        owners: Vec<Owner>,
    },
    /// A cluster with two uses that exclude each other.
    Overlap {
        /// The host cluster's index.
        cluster: u64,
        /// Who refers to it (the first few).
        owners: Vec<Owner>,
    },
    /// COPIED where the refcount is not 1 (O10).
    Copied {
        /// Whose entry.
        owner: Owner,
        /// The host cluster's index.
        cluster: u64,
        /// Its refcount.
        refcount: u64,
    },
    /// Compressed data that does not give one cluster.
    Undecodable {
        /// Whose entry.
        owner: Owner,
        /// The entry.
        entry: u64,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(why) => write!(f, "header: {why}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Snapshot { number, why } => write!(f, "snapshot {number}: {why}"),
            Self::Bitmaps(why) => write!(f, "bitmaps: {why}"),
            Self::BadTable { owner, offset, why } => write!(f, "{owner:?} at {offset:#x}: {why}"),
            Self::BadEntry { owner, entry, why } => {
                write!(f, "{owner:?}, entry {entry:#018x}: {why}")
            }
            Self::RefcountTooLow {
                cluster,
                refcount,
                references,
                owners,
            } => {
                write!(
                    f,
                    "cluster {cluster}: refcount {refcount}, but {references} references: {owners:?}"
                )
            }
            Self::Overlap { cluster, owners } => {
                write!(f, "cluster {cluster} is used twice: {owners:?}")
            }
            Self::Copied {
                owner,
                cluster,
                refcount,
            } => {
                write!(
                    f,
                    "{owner:?}: COPIED, but cluster {cluster} has refcount {refcount}"
                )
            }
            Self::Undecodable { owner, entry } => {
                write!(f, "{owner:?}, entry {entry:#018x}: cannot be decoded")
            }
        }
    }
}

/// A cluster with more counted references than it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leak {
    /// The host cluster's index.
    pub cluster: u64,
    /// What the refcount block says.
    pub refcount: u64,
    /// References found.
    pub references: u64,
}

/// What [`check`] found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The first [`MAX_VIOLATIONS`] violations.
    pub violations: Vec<Violation>,
    /// How many there are.
    pub violation_count: u64,
    /// The first [`MAX_LEAKS`] leaked clusters.
    pub leaks: Vec<Leak>,
    /// How many there are.
    pub leak_count: u64,
    /// Active entries without COPIED though the refcount is 1: allowed, repair sets the flag again (O10).
    pub copied_clear: u64,
    /// Guest clusters with plain data in the active mapping.
    pub data_clusters: u64,
    /// Guest clusters with compressed data in the active mapping.
    pub compressed_clusters: u64,
    /// The dirty bit.
    pub dirty: bool,
    /// The corrupt bit.
    pub corrupt: bool,
    /// Who refers to which host cluster.
    pub owners: Owners,
}

/// So many violations are kept in a [`Report`].
pub const MAX_VIOLATIONS: usize = 100;
/// So many leaks are kept in a [`Report`].
pub const MAX_LEAKS: usize = 1000;

impl Report {
    /// No violation; leaks and clear COPIED flags are allowed.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.violation_count == 0
    }

    /// No violation, no leak, every COPIED flag right.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.is_sound() && self.leak_count == 0 && self.copied_clear == 0
    }

    fn add(&mut self, violation: Violation) {
        self.violation_count += 1;
        if self.violations.len() < MAX_VIOLATIONS {
            self.violations.push(violation);
        }
    }
}

/// One use of one host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Reference {
    cluster: u64,
    owner: Owner,
    /// An L2 table that several L1 tables share is walked once; what it refers to counts once for each.
    weight: u64,
}

/// Who refers to which host cluster, sorted by cluster.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    cluster_bits: u32,
    references: Vec<Reference>,
}

impl Owners {
    /// The first owner of the cluster in which a host offset lies.
    #[must_use]
    pub fn at(&self, host_offset: u64) -> Option<Owner> {
        let cluster = host_offset >> self.cluster_bits;
        let first = self.references.partition_point(|r| r.cluster < cluster);
        self.references
            .get(first)
            .filter(|r| r.cluster == cluster)
            .map(|r| r.owner)
    }
}
