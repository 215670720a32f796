//! What the guest asks for.

use crate::rng::Rng;

/// A guest's request, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Read.
    Read {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
    },
    /// Write stamps.
    Write {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
        /// Durable on completion.
        fua: bool,
    },
    /// Discard.
    Discard {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
    },
    /// Write zeroes.
    Zero {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
        /// Clusters may be given back.
        unmap: bool,
        /// Durable on completion.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Block status.
    Status {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
    },
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// A bit of everything, mostly in a window that moves.
    Mixed,
    /// Host clusters change hands all the time: much is written, discarded and flushed, all over a small disk.
    Churn,
    /// All over the disk, so that slices come and go.
    Scattered,
    /// Much is asked about how the disk is stored, while it changes.
    Asked,
    /// Whole blocks of 4096 bytes, but for the ends of write-zeroes.
    Ends,
}

/// Sectors of a block.
const BLOCK: u64 = 8;

/// Draws requests: mostly near one place that moves, so that they meet.
#[derive(Clone, Debug)]
pub struct Workload {
    rng: Rng,
    sectors: u64,
    cluster_sectors: u64,
    /// Weights: read, write, discard, zero, flush, status.
    weights: [u64; 6],
    fua: u32,
    /// So many in 256 requests are long.
    long: u32,
    /// So many in 256 requests may lie anywhere.
    everywhere: u32,
    window: (u64, u64),
    /// All but the ends of write-zeroes lie at blocks of eight sectors.
    blocks: bool,
}

impl Workload {
    /// A workload on a disk of so many sectors, with clusters of so many.
    #[must_use]
    pub fn new(mut rng: Rng, sectors: u64, cluster_sectors: u64) -> Self {
        let pick = |rng: &mut Rng, from: &[u64]| from[rng.index(from.len())];
        let weights = [
            pick(&mut rng, &[1, 4, 10]),
            pick(&mut rng, &[8, 16, 24]),
            pick(&mut rng, &[0, 3, 8, 16]),
            pick(&mut rng, &[0, 3, 8]),
            pick(&mut rng, &[1, 3, 6]),
            pick(&mut rng, &[0, 1]),
        ];
        let fua = [0, 0, 16, 64][rng.index(4)];
        let mut this = Self {
            rng,
            sectors,
            cluster_sectors,
            weights,
            fua,
            long: 12,
            everywhere: 24,
            window: (0, sectors),
            blocks: false,
        };
        this.move_window();
        this
    }

    /// Requests of a special kind.
    #[must_use]
    pub fn of_kind(mut self, load: Load) -> Self {
        match load {
            Load::Mixed => {}
            Load::Churn => {
                self.weights = [6, 16, 10, 4, 5, 0];
                self.long = 64;
                self.window = (0, self.sectors.min(self.cluster_sectors * 96));
            }
            Load::Scattered => {
                self.weights = [16, 16, 2, 2, 3, 0];
                self.long = 0;
                self.everywhere = 256;
            }
            Load::Ends => {
                self.weights = [4, 16, 2, 10, 2, 0];
                self.long = 0;
                self.blocks = true;
                self.window = (0, self.sectors.min(96));
            }
            Load::Asked => {
                self.weights = [2, 12, 5, 6, 2, 20];
                self.long = 64;
                self.everywhere = 96;
            }
        }
        self
    }

    /// The disk has so many sectors now, not fewer than before.
    pub fn grow_to(&mut self, sectors: u64) {
        self.sectors = sectors;
    }

    fn move_window(&mut self) {
        let len = (self.cluster_sectors * (1 << self.rng.below(6))).min(self.sectors);
        self.window = (self.rng.below(self.sectors - len + 1), len);
    }

    fn range(&mut self) -> (u64, u64) {
        if self.rng.chance(12) {
            self.move_window();
        }
        let (base, len) = if self.rng.chance(self.everywhere) {
            (0, self.sectors)
        } else {
            self.window
        };
        let mut start = base + self.rng.below(len);
        let mut count = match self.rng.index(4) {
            _ if self.rng.chance(self.long) => 1 + self.rng.below(self.cluster_sectors * 40),
            0 => 1,
            1 => 1 + self.rng.below(self.cluster_sectors),
            2 => self.cluster_sectors,
            _ => 1 + self.rng.below(self.cluster_sectors * 6),
        };
        if self.rng.chance(128) {
            start -= start % self.cluster_sectors;
            count = count.next_multiple_of(self.cluster_sectors);
        }
        (start, count.min(self.sectors - start))
    }

    /// The next request.
    pub fn next_ask(&mut self) -> Ask {
        let mut drawn = self.rng.below(self.weights.iter().sum());
        let mut kind = 0;
        while drawn >= self.weights[kind] {
            drawn -= self.weights[kind];
            kind += 1;
        }
        let (mut lba, mut count) = self.range();
        if self.blocks {
            lba -= lba % BLOCK;
            if kind != 3 {
                count = count.next_multiple_of(BLOCK);
            }
            count = count.min(self.sectors - lba);
        }
        let fua = self.rng.chance(self.fua);
        match kind {
            0 => Ask::Read { lba, count },
            1 => Ask::Write { lba, count, fua },
            2 => Ask::Discard { lba, count },
            3 => Ask::Zero {
                lba,
                count,
                unmap: self.rng.chance(160),
                fua,
            },
            4 => Ask::Flush,
            _ => Ask::Status { lba, count },
        }
    }
}
