//! The ways of a request that need no task, each on a disk where everything it meets is cached.

use urus_engine::Options;
use urus_engine::request::RequestKind;

use crate::disk::{CLUSTER_BYTES, DEPTH, Disk, new_file, read, write};
use crate::memory::Bytes;

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 4096;
/// Size of the disks.
const SIZE: u64 = 1 << 30;
/// Between the places that are asked for: two lie in a slice's neighbourhood, and all of the disk's slices take part.
const STRIDE: u64 = 4 << 20;
/// Layers of the chain.
const LAYERS: usize = 10;

/// A way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// A read of a cluster of the image itself.
    Read,
    /// The same, one after the other.
    ReadAlone,
    /// A write over one.
    Overwrite,
    /// A read of a cluster that the image says is zero.
    Zeroes,
    /// A read that finds its cluster in the tenth layer.
    Chain,
    /// A read of a cluster that nothing was written to.
    Unallocated,
}

impl Case {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Read,
        Self::ReadAlone,
        Self::Overwrite,
        Self::Zeroes,
        Self::Chain,
        Self::Unallocated,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read_4k",
            Self::ReadAlone => "read_4k_alone",
            Self::Overwrite => "overwrite_4k",
            Self::Zeroes => "read_zeroes_4k",
            Self::Chain => "read_4k_chain_10",
            Self::Unallocated => "read_unallocated_4k",
        }
    }

    /// The case of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|case| case.name() == name)
    }

    fn request(self, number: u64) -> RequestKind<Bytes> {
        let place = place(number);
        match self {
            Self::Read | Self::ReadAlone | Self::Zeroes | Self::Chain => read(place, REQUEST_BYTES),
            Self::Overwrite => write(place, REQUEST_BYTES),
            Self::Unallocated => read(place + 2 * CLUSTER_BYTES, REQUEST_BYTES),
        }
    }
}

/// Somewhere in a cluster, so that it is a part of one.
fn place(number: u64) -> u64 {
    number % (SIZE / STRIDE) * STRIDE + 8192
}

fn places() -> impl Iterator<Item = u64> {
    (0..SIZE / STRIDE).map(place)
}

/// A disk for a case, warmed.
pub struct Hits {
    case: Case,
    disk: Disk,
    next: u64,
}

impl Hits {
    /// Makes it.
    #[must_use]
    pub fn new(case: Case) -> Self {
        let layers = if case == Case::Chain { LAYERS } else { 1 };
        let files: Vec<_> = (0..layers).map(|_| new_file(SIZE)).collect();
        for (number, file) in files.iter().enumerate() {
            let mut disk = Disk::open(std::slice::from_ref(file), Options::default());
            if number == layers - 1 {
                disk.run(places().map(|place| write(place, REQUEST_BYTES)));
            } else {
                // A neighbour, so that every layer has a slice there.
                disk.run(places().map(|place| write(place + CLUSTER_BYTES, REQUEST_BYTES)));
            }
            if case == Case::Zeroes {
                disk.run(places().map(|place| RequestKind::WriteZeroes {
                    offset: place - place % CLUSTER_BYTES,
                    len: CLUSTER_BYTES,
                    unmap: false,
                    fua: false,
                }));
            }
            disk.close();
        }
        let mut options = Options::default();
        options.read_only = case != Case::Overwrite;
        let mut disk = Disk::open(&files, options);
        let all = SIZE / STRIDE;
        disk.run((0..all).map(|number| case.request(number)));
        let mut hits = Self {
            case,
            disk,
            next: 0,
        };
        // Lets everything that grows reach its size.
        hits.run(all);
        hits
    }

    /// So many requests more.
    ///
    /// # Panics
    /// Where one of them is no hit.
    pub fn run(&mut self, count: u64) {
        let mut before = self.disk.shared().counters();
        let (case, first) = (self.case, self.next);
        let depth = if case == Case::ReadAlone { 1 } else { DEPTH };
        let requests = (first..first + count).map(|number| case.request(number));
        self.disk.hits(depth, requests);
        self.next += count;
        let after = self.disk.shared().counters();
        // That the mapping cache answers is what makes it a hit.
        before.mapping_hits = after.mapping_hits;
        assert_eq!(before, after, "a hit loads, commits and allocates nothing");
    }
}

#[cfg(test)]
mod tests {
    //! Guards the cases: each has to be the way that its name says, and a hit at that.
    use super::*;

    #[test]
    fn every_case_hits() {
        for case in Case::ALL {
            assert_eq!(Case::from_name(case.name()), Some(case));
            Hits::new(case).run(1000);
        }
    }

    #[test]
    fn the_cases_meet_what_they_are_named_for() {
        let extent = |case: Case| {
            let mut hits = Hits::new(case);
            let RequestKind::Read { offset, .. } = case.request(7) else {
                panic!("{case:?} is no read");
            };
            hits.disk.extent(offset)
        };
        let found = extent(Case::Read);
        assert!(found.data && found.depth == 0);
        let found = extent(Case::Zeroes);
        assert!(found.zero && found.present && !found.data);
        let found = extent(Case::Chain);
        assert!(found.data && found.depth == 9);
        assert!(!extent(Case::Unallocated).present);
    }
}
