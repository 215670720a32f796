//! One file of a chain, and for qcow2 its mapping and what of it differs from the disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use urus_format::{Compression, Geometry, Header, L1Entry};

use crate::error::{Error, Result};
use crate::frames::Frames;
use crate::map::Map;
use crate::storage::FileId;
use crate::sync::{AtomicU64, Mutex, Ordering};

/// A file of the chain, opened by the caller, and what it is.
#[derive(Debug)]
pub struct LayerSpec {
    /// The open file.
    pub file: FileId,
    /// Its name, for messages.
    pub name: String,
    /// Its format: stated by the caller, never guessed.
    pub format: LayerFormat,
}

/// The format of a layer.
#[derive(Debug)]
pub enum LayerFormat {
    /// The file is the disk.
    Raw,
    /// QCOW2 with this header.
    Qcow2(Box<Header>),
}

/// Names a layer for as long as its device lives: what is cached of one is never taken for another's, wherever in the chain it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LayerId(pub(crate) u32);

/// One file of a chain, as the engine sees it.
pub(crate) struct Layer {
    pub(crate) id: LayerId,
    pub(crate) file: FileId,
    pub(crate) name: String,
    /// Bytes of its virtual disk; past it, it reads as zeroes.
    pub(crate) size: AtomicU64,
    pub(crate) kind: LayerKind,
}

// A device has few of them, and a look-up goes through one pointer less.
#[allow(clippy::large_enum_variant)]
pub(crate) enum LayerKind {
    Raw,
    Qcow2(Qcow2Layer),
}

pub(crate) struct Qcow2Layer {
    pub(crate) geometry: Geometry,
    pub(crate) compression: Compression,
    pub(crate) map: Map,
    pub(crate) meta: Mutex<Meta>,
}

impl Layer {
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn qcow2(&self) -> Option<&Qcow2Layer> {
        match &self.kind {
            LayerKind::Raw => None,
            LayerKind::Qcow2(layer) => Some(layer),
        }
    }

    /// An entry of its L1 table, as it is in memory. Of a qcow2 layer.
    pub(crate) fn l1_entry(&self, l1_index: u64) -> Result<Option<L1Entry>> {
        let qcow2 = self.qcow2().expect("only qcow2 layers have tables");
        L1Entry::decode(qcow2.map.l1(l1_index), &qcow2.geometry).map_err(|entry| Error::BadEntry {
            file: self.name.clone(),
            table: "L1 table, entry",
            index: l1_index,
            entry,
        })
    }
}

/// What a host cluster of metadata holds (the overlap check: one look-up before every metadata write).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Header,
    L1Table,
    L2Table,
    RefcountTable,
    RefcountBlock,
    Snapshots,
}

#[derive(Default)]
pub(crate) struct ClusterHasher(u64);

impl Hasher for ClusterHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        // Fibonacci hashing, folded: cluster numbers are dense, and this never has to resist anybody (a
        // hostile image chooses few and distinct clusters, each backed by a table of its own).
        let product = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

/// Owners of metadata clusters, by cluster. Never iterated: its order is nobody's business.
pub(crate) type Owners = HashMap<u64, Owner, BuildHasherDefault<ClusterHasher>>;

/// An L2 table that is not on disk where its L1 entry (in memory) says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewTable {
    /// What it starts from: a table shared with a snapshot, or nothing.
    pub(crate) copy_from: Option<u64>,
}

/// References taken out of the live mapping: host clusters `[first, first + count)`, each loses one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Removed {
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// O7: requests that began before this epoch mark may still use them.
    pub(crate) mark: u64,
}

impl Removed {
    /// Adds what was removed last. Where it is adjacent to what was removed just before, both become one, which is over with the newer
    /// mark: a request that began between the two may still use the second.
    pub(crate) fn add_to(self, list: &mut Vec<Self>) {
        match list.last_mut() {
            Some(last)
                if last.first + last.count == self.first
                    && (last.mark == self.mark || last.mark + 1 == self.mark) =>
            {
                last.count += self.count;
                // O7
                last.mark = self.mark;
            }
            _ => list.push(self),
        }
    }
}

/// What is cached of a layer's tables, and, of one that is written, what differs from the disk.
#[derive(Default)]
pub(crate) struct Meta {
    pub(crate) frames: Frames,
    /// By L1 index.
    pub(crate) new_tables: BTreeMap<u64, NewTable>,
    /// L1 entries that changed since the last seal.
    pub(crate) dirty_l1: BTreeSet<u64>,
    /// Host clusters that got their first reference since the last seal (first, count).
    pub(crate) used: Vec<(u64, u64)>,
    /// References removed since the last seal.
    pub(crate) removed: Vec<Removed>,
    /// Where its metadata lies. Known of an image that is written only.
    pub(crate) owners: Owners,
}

impl Meta {
    /// Changes that the next commit has to know of: they are kept in memory until it does.
    pub(crate) fn pending_changes(&self) -> usize {
        self.used.len() + self.removed.len()
    }
}

impl Owner {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1Table => "an L1 table",
            Self::L2Table => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::Snapshots => "the snapshot table",
        }
    }
}
