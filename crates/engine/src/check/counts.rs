//! How often each cluster is referred to, and which refcounts are one. Memory is bounded by what the file
//! holds, not by where its entries point.

use std::cell::Cell;
use std::collections::BTreeMap;

/// log2 of the clusters in a chunk.
const CHUNK_BITS: u32 = 11;
/// Clusters in a chunk.
pub(super) const CHUNK_CLUSTERS: usize = 1 << CHUNK_BITS;
/// Counts kept one by one before a chunk becomes an array: past it the list would take as much.
const SPARSE_MAX: usize = CHUNK_CLUSTERS / 4;
/// Stands for a count that is found in `large`.
const LARGE: u16 = u16::MAX;

/// Estimated cost of an entry in a map.
pub(super) const MAP_ENTRY_BYTES: u64 = 80;
const CHUNK_COST_BYTES: u64 = MAP_ENTRY_BYTES + 32;
const LARGE_COST_BYTES: u64 = MAP_ENTRY_BYTES;
const DENSE_COST_BYTES: u64 = (CHUNK_CLUSTERS * 2) as u64;
const SPARSE_COST_BYTES: u64 = 8;

fn split(cluster: u64) -> (u64, usize) {
    let within = cluster % (CHUNK_CLUSTERS as u64);
    // Less than a chunk's clusters.
    #[allow(clippy::cast_possible_truncation)]
    let within = within as usize;
    (cluster >> CHUNK_BITS, within)
}

enum Chunk {
    /// Position and count, by position.
    Sparse(Vec<(u16, u16)>),
    Dense(Box<[u16; CHUNK_CLUSTERS]>),
}

/// What changing a count costs in memory.
fn no_cost() -> u64 {
    0
}

impl Chunk {
    fn get(&self, within: usize) -> u16 {
        match self {
            Self::Dense(counts) => counts[within],
            Self::Sparse(list) => match find(list, within) {
                Ok(at) => list[at].1,
                Err(_) => 0,
            },
        }
    }

    /// Returns the memory that this took in addition.
    fn set(&mut self, within: usize, count: u16) -> u64 {
        let list = match self {
            Self::Dense(counts) => {
                counts[within] = count;
                return no_cost();
            }
            Self::Sparse(list) => list,
        };
        match find(list, within) {
            Ok(at) => list[at].1 = count,
            Err(at) if list.len() < SPARSE_MAX => {
                list.insert(at, (position(within), count));
                return SPARSE_COST_BYTES;
            }
            Err(_) => {
                let mut counts = Box::new([0; CHUNK_CLUSTERS]);
                for (within, count) in list.iter() {
                    counts[usize::from(*within)] = *count;
                }
                counts[within] = count;
                *self = Self::Dense(counts);
                return DENSE_COST_BYTES;
            }
        }
        no_cost()
    }
}

fn find(list: &[(u16, u16)], within: usize) -> Result<usize, usize> {
    list.binary_search_by_key(&position(within), |entry| entry.0)
}

fn position(within: usize) -> u16 {
    u16::try_from(within).expect("a chunk has fewer clusters than a u16 counts")
}

/// References by cluster. It keeps the account of the memory for the other maps of a check too.
pub(super) struct Counts {
    /// Chunk number to index in `chunks`.
    index: BTreeMap<u64, usize>,
    chunks: Vec<Chunk>,
    /// The chunk used last: references come in runs.
    last: Option<(u64, usize)>,
    /// Counts of [`LARGE`] and more.
    large: BTreeMap<u64, u64>,
    bytes: u64,
    max_bytes: u64,
}

impl Counts {
    /// No references. At most `max_bytes` of memory are used, by estimate.
    pub(super) fn new(max_bytes: u64) -> Self {
        Self {
            index: BTreeMap::new(),
            chunks: Vec::new(),
            last: None,
            large: BTreeMap::new(),
            bytes: 0,
            max_bytes,
        }
    }

    /// Notes memory that is used beside the counts.
    pub(super) fn charge(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Whether the memory is used up. Later references are not counted: the counts are useless then.
    pub(super) fn is_full(&self) -> bool {
        self.bytes > self.max_bytes
    }

    /// Adds references; returns the new count.
    pub(super) fn add(&mut self, cluster: u64, references: u64) -> u64 {
        if self.is_full() {
            return 0;
        }
        let count = self.get(cluster).saturating_add(references);
        self.set(cluster, count);
        count
    }

    /// Takes one reference away, where there is one.
    pub(super) fn remove_one(&mut self, cluster: u64) {
        match self.get(cluster) {
            0 => {}
            count => self.set(cluster, count - 1),
        }
    }

    /// References to a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let (number, within) = split(cluster);
        let index = match self.last {
            Some((last, index)) if last == number => index,
            _ => match self.index.get(&number) {
                Some(index) => *index,
                None => return 0,
            },
        };
        self.widen(cluster, self.chunks[index].get(within))
    }

    fn widen(&self, cluster: u64, count: u16) -> u64 {
        if count == LARGE {
            self.large
                .get(&cluster)
                .copied()
                .unwrap_or(u64::from(LARGE))
        } else {
            u64::from(count)
        }
    }

    fn set(&mut self, cluster: u64, count: u64) {
        let (number, within) = split(cluster);
        let index = match self.last {
            Some((last, index)) if last == number => index,
            _ => {
                let next = self.chunks.len();
                let index = *self.index.entry(number).or_insert(next);
                if index == next {
                    self.chunks.push(Chunk::Sparse(Vec::new()));
                    self.bytes += CHUNK_COST_BYTES;
                }
                self.last = Some((number, index));
                index
            }
        };
        let narrow = match u16::try_from(count) {
            Ok(narrow) if narrow < LARGE => {
                // Rarely anything there, and then it must go.
                if !self.large.is_empty() {
                    self.large.remove(&cluster);
                }
                narrow
            }
            _ => {
                if self.large.insert(cluster, count).is_none() {
                    self.bytes += LARGE_COST_BYTES;
                }
                LARGE
            }
        };
        self.bytes += self.chunks[index].set(within, narrow);
    }

    /// Fills `out` with the references to the clusters from `first` on; `false` where all are 0.
    pub(super) fn fill(&self, first: u64, out: &mut [u64]) -> bool {
        out.fill(0);
        let mut any = false;
        let mut done = 0;
        while done < out.len() {
            let cluster = first + done as u64;
            let (number, within) = split(cluster);
            let step = (CHUNK_CLUSTERS - within).min(out.len() - done);
            if let Some(index) = self.index.get(&number) {
                let chunk = &self.chunks[*index];
                for offset in 0..step {
                    let count = chunk.get(within + offset);
                    out[done + offset] = self.widen(cluster + offset as u64, count);
                    any |= count != 0;
                }
            }
            done += step;
        }
        any
    }

    /// The clusters from `from` on that have references, in order.
    pub(super) fn iter_from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (from_number, from_within) = split(from);
        self.index
            .range(from_number..)
            .flat_map(move |(number, index)| {
                let first = number << CHUNK_BITS;
                let chunk = &self.chunks[*index];
                let start = if *number == from_number {
                    from_within
                } else {
                    0
                };
                (start..CHUNK_CLUSTERS).filter_map(move |within| {
                    let cluster = first + within as u64;
                    match chunk.get(within) {
                        0 => None,
                        count => Some((cluster, self.widen(cluster, count))),
                    }
                })
            })
    }

    /// The last cluster with references.
    pub(super) fn last(&self) -> Option<u64> {
        self.index.iter().rev().find_map(|(number, index)| {
            let chunk = &self.chunks[*index];
            let within = (0..CHUNK_CLUSTERS)
                .rev()
                .find(|within| chunk.get(*within) != 0)?;
            Some((number << CHUNK_BITS) + within as u64)
        })
    }
}

/// A set of clusters. Its memory follows the refcount blocks it is made from: 256 bytes for 2048 clusters.
#[derive(Default)]
pub(super) struct ClusterSet {
    /// Chunk number to index in `chunks`.
    index: BTreeMap<u64, usize>,
    chunks: Vec<[u64; CHUNK_CLUSTERS / 64]>,
    /// The chunk looked at last.
    last: Cell<Option<(u64, usize)>>,
}

impl ClusterSet {
    /// Adds those of 64 clusters whose bit is set, from `first` on, a multiple of 64.
    pub(super) fn insert(&mut self, first: u64, members: u64) {
        debug_assert_eq!(first % 64, 0);
        if members == 0 {
            return;
        }
        let (number, within) = split(first);
        let index = *self.index.entry(number).or_insert(self.chunks.len());
        if index == self.chunks.len() {
            self.chunks.push([0; CHUNK_CLUSTERS / 64]);
        }
        self.chunks[index][within / 64] |= members;
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        let (number, within) = split(cluster);
        let index = match self.last.get() {
            Some((last, index)) if last == number => index,
            _ => {
                let Some(index) = self.index.get(&number) else {
                    return false;
                };
                self.last.set(Some((number, *index)));
                *index
            }
        };
        self.chunks[index][within / 64] >> (within % 64) & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Counts behave as a plain map, sparse or dense, small or large.
        #[test]
        fn counts_are_a_map(
            ops in prop::collection::vec((0u64..3000, prop_oneof![Just(1u64), 1u64..70_000]), 0..1500),
            removed in prop::collection::vec(0u64..3000, 0..50),
            base in prop_oneof![Just(0u64), Just(1u64 << 50)],
        ) {
            let mut counts = Counts::new(u64::MAX);
            let mut model = BTreeMap::new();
            for (cluster, by) in ops {
                let now = model.entry(base + cluster).or_insert(0);
                *now += by;
                prop_assert_eq!(counts.add(base + cluster, by), *now);
            }
            for cluster in removed {
                counts.remove_one(base + cluster);
                if let Some(count) = model.get_mut(&(base + cluster)) {
                    *count = count.saturating_sub(1);
                }
            }
            model.retain(|_, count| *count != 0);
            prop_assert_eq!(counts.iter_from(0).collect::<BTreeMap<_, _>>(), model.clone());
            prop_assert_eq!(counts.last(), model.last_key_value().map(|entry| *entry.0));
            let mut late = model.clone();
            late.retain(|cluster, _| *cluster >= base + 777);
            prop_assert_eq!(counts.iter_from(base + 777).collect::<BTreeMap<_, _>>(), late);
            let mut filled = vec![0; 2100];
            let any = counts.fill(base + 100, &mut filled);
            for (cluster, count) in (base + 100..).zip(&filled) {
                prop_assert_eq!(*count, model.get(&cluster).copied().unwrap_or(0));
            }
            prop_assert_eq!(any, filled.iter().any(|count| *count != 0));
        }
    }

    /// Memory stays near its limit whatever is asked for: what matters for images that lie.
    #[test]
    fn memory_is_bounded() {
        let mut counts = Counts::new(1 << 20);
        for cluster in 0..1 << 20 {
            counts.add(cluster << 11, u64::MAX);
        }
        assert!(counts.is_full());
        assert!(counts.bytes < (1 << 20) + 1024 && counts.chunks.len() < 20_000);
    }

    #[test]
    fn sets() {
        let mut set = ClusterSet::default();
        for cluster in [0u64, 63, 64, 2047, 2048, 1 << 60] {
            assert!(!set.contains(cluster));
            set.insert(cluster - cluster % 64, 1 << (cluster % 64));
            assert!(set.contains(cluster) && !set.contains(cluster ^ 1 << 40));
            assert!(!set.contains(cluster ^ 2));
        }
        set.insert(1 << 50, 0);
        assert_eq!(set.chunks.len(), 3, "nothing is kept of nothing");
    }
}
