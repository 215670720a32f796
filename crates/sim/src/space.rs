//! Room on the disk that a file lies on, in blocks: what a file system counts, holes left out.

use std::collections::BTreeSet;
use std::ops::Range;

use urus_engine::storage::OpKind;

use crate::contents::index;
use crate::memory::SimMemory;
use crate::storage::bytes_of;

/// What a file system gives out at once, in bytes.
pub const BLOCK: u64 = 4096;

/// The blocks that a file has, and how many more there are for it.
pub(crate) struct Space {
    backed: BTreeSet<u64>,
    left: u64,
}

impl Space {
    /// What of these bytes is not zero has its blocks; `left` more can be had.
    pub(crate) fn new(bytes: &[u8], left: u64) -> Self {
        let is_data = |block: &[u8]| block.iter().any(|byte| *byte != 0);
        let backed = (0..)
            .zip(bytes.chunks(index(BLOCK)))
            .filter(|(_, block)| is_data(block))
            .map(|(number, _)| number)
            .collect();
        Self { backed, left }
    }

    /// Takes what an operation needs, all of it or nothing; `false` where there is not enough. Gives back what it lets go of.
    pub(crate) fn account(&mut self, kind: &OpKind<SimMemory>) -> bool {
        match kind {
            OpKind::Write { offset, memory, .. } => self.take(*offset, bytes_of(memory)),
            OpKind::ZeroRange { offset, len } | OpKind::Allocate { offset, len } => {
                self.take(*offset, *len)
            }
            OpKind::Punch { offset, len } => {
                let whole = offset.div_ceil(BLOCK)..offset.saturating_add(*len) / BLOCK;
                self.give_back(whole);
                true
            }
            OpKind::SetLen { len } => {
                self.give_back(len.div_ceil(BLOCK)..u64::MAX);
                true
            }
            _ => true,
        }
    }

    fn take(&mut self, offset: u64, len: u64) -> bool {
        let blocks = offset / BLOCK..offset.saturating_add(len).div_ceil(BLOCK);
        let missing: Vec<u64> = blocks
            .filter(|block| !self.backed.contains(block))
            .collect();
        let Some(left) = self.left.checked_sub(missing.len() as u64) else {
            return false;
        };
        self.left = left;
        self.backed.extend(missing);
        true
    }

    fn give_back(&mut self, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        let gone: Vec<u64> = self.backed.range(blocks).copied().collect();
        self.left += gone.len() as u64;
        for block in gone {
            self.backed.remove(&block);
        }
    }
}
