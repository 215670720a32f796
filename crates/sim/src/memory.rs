//! Memory for simulated I/O: shared heap blocks, in pieces, with an address that can be misaligned on purpose.

use std::cell::RefCell;
use std::rc::Rc;

use urus_engine::storage::Memory;

/// A heap block. Its simulated address is `skew`, so that alignment is the same in every run.
#[derive(Debug)]
struct Block {
    bytes: RefCell<Vec<u8>>,
    skew: usize,
}

#[derive(Clone, Debug)]
struct Piece {
    block: Rc<Block>,
    start: usize,
    len: usize,
}

/// Memory as the engine sees it.
#[derive(Clone, Debug)]
pub struct SimMemory {
    pieces: Rc<[Piece]>,
    len: usize,
}

impl SimMemory {
    /// Zeroed memory, aligned for everything.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self::from_vec(vec![0; len])
    }

    /// Memory with this content, aligned for everything.
    #[must_use]
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self::skewed(bytes, 0)
    }

    /// Memory whose address is `skew` modulo any alignment: what a careless guest hands in.
    #[must_use]
    pub fn skewed(bytes: Vec<u8>, skew: usize) -> Self {
        let len = bytes.len();
        let block = Rc::new(Block {
            bytes: RefCell::new(bytes),
            skew,
        });
        Self {
            pieces: Rc::new([Piece {
                block,
                start: 0,
                len,
            }]),
            len,
        }
    }

    /// A copy of the content.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        self.read(0, &mut out);
        out
    }

    /// Calls `f` with each part of `[start, start + len)`: its block, the range in it, and how far into the whole
    /// range it lies.
    fn for_each(
        &self,
        start: usize,
        len: usize,
        mut f: impl FnMut(&Block, std::ops::Range<usize>, usize),
    ) {
        let end = start
            .checked_add(len)
            .filter(|end| *end <= self.len)
            .expect("the range lies in the memory");
        let mut piece_start = 0;
        for piece in self.pieces.iter() {
            let piece_end = piece_start + piece.len;
            let (from, to) = (start.max(piece_start), end.min(piece_end));
            if from < to {
                let in_block = piece.start + from - piece_start;
                f(&piece.block, in_block..in_block + (to - from), from - start);
            }
            piece_start = piece_end;
        }
    }
}

impl Memory for SimMemory {
    fn len(&self) -> usize {
        self.len
    }

    fn slice(&self, start: usize, len: usize) -> Self {
        let end = start
            .checked_add(len)
            .filter(|end| *end <= self.len)
            .expect("the range lies in the memory");
        let mut piece_start = 0;
        let mut pieces = Vec::new();
        for piece in self.pieces.iter() {
            let piece_end = piece_start + piece.len;
            let (from, to) = (start.max(piece_start), end.min(piece_end));
            if from < to {
                let block = Rc::clone(&piece.block);
                pieces.push(Piece {
                    block,
                    start: piece.start + from - piece_start,
                    len: to - from,
                });
            }
            piece_start = piece_end;
        }
        Self {
            pieces: pieces.into(),
            len,
        }
    }

    fn read(&self, start: usize, dst: &mut [u8]) {
        self.for_each(start, dst.len(), |block, range, at| {
            dst[at..at + range.len()].copy_from_slice(&block.bytes.borrow()[range]);
        });
    }

    fn write(&self, start: usize, src: &[u8]) {
        self.for_each(start, src.len(), |block, range, at| {
            let src = &src[at..at + range.len()];
            block.bytes.borrow_mut()[range].copy_from_slice(src);
        });
    }

    fn zero(&self, start: usize, len: usize) {
        self.for_each(start, len, |block, range, _| {
            block.bytes.borrow_mut()[range].fill(0)
        });
    }

    fn is_zero(&self) -> bool {
        let mut zero = true;
        self.for_each(0, self.len, |block, range, _| {
            zero = zero && block.bytes.borrow()[range].iter().all(|byte| *byte == 0);
        });
        zero
    }

    fn is_aligned(&self, align: usize) -> bool {
        let aligned = |piece: &Piece| {
            (piece.block.skew + piece.start).is_multiple_of(align)
                && piece.len.is_multiple_of(align)
        };
        self.pieces.iter().all(aligned)
    }

    fn chain(parts: Vec<Self>) -> Self {
        let len = parts.iter().map(|part| part.len).sum();
        Self {
            pieces: parts
                .iter()
                .flat_map(|part| part.pieces.iter().cloned())
                .collect(),
            len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_chains_share_the_bytes() {
        let a = SimMemory::from_vec((0..10).collect());
        let b = SimMemory::from_vec((10..20).collect());
        let chain = SimMemory::chain(vec![b.slice(2, 5), a.slice(1, 0), a.clone()]);
        assert_eq!(chain.len(), 15);
        assert_eq!(
            chain.to_vec(),
            [12, 13, 14, 15, 16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        );
        let middle = chain.slice(4, 3);
        assert_eq!(middle.to_vec(), [16, 0, 1]);
        middle.write(0, &[90, 91, 92]);
        assert_eq!(a.to_vec()[..3], [91, 92, 2]);
        assert_eq!(b.to_vec()[6], 90);
        chain.zero(3, 4);
        assert_eq!(chain.to_vec()[2..8], [14, 0, 0, 0, 0, 2]);
        assert!(chain.slice(3, 4).is_zero() && !chain.is_zero());
    }

    #[test]
    fn alignment_follows_the_simulated_address() {
        assert!(SimMemory::zeroed(4096).is_aligned(512));
        assert!(!SimMemory::zeroed(100).is_aligned(512));
        assert!(!SimMemory::skewed(vec![0; 512], 8).is_aligned(512));
        assert!(!SimMemory::zeroed(4096).slice(8, 512).is_aligned(512));
        assert!(SimMemory::zeroed(100).slice(0, 0).is_aligned(512));
    }

    #[test]
    #[should_panic(expected = "the range lies in the memory")]
    fn out_of_bounds_is_a_programmers_error() {
        SimMemory::zeroed(10).write(9, &[0; 2]);
    }
}
