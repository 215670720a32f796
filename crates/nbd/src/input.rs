//! What was received and not yet understood.

use crate::limits::INPUT_BYTES;

/// A fixed buffer: filled at its end by the socket, consumed at its start by the protocol.
pub(crate) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; INPUT_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// All that is there.
    pub(crate) fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The first `N` bytes, once they are there.
    pub(crate) fn head<const N: usize>(&self) -> Option<&[u8; N]> {
        self.data().first_chunk()
    }

    /// Forgets the first `count` bytes.
    pub(crate) fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.end - self.start);
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    pub(crate) fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
    }

    pub(crate) fn is_full(&self) -> bool {
        self.end - self.start == self.bytes.len()
    }

    /// Where to receive into. Empty only when the input is full.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        // Moving is worth it only when little room is left at the end.
        if self.start > 0 && self.bytes.len() - self.end < self.bytes.len() / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    /// `count` bytes were received into [`space`](Self::space).
    pub(crate) fn received(&mut self, count: usize) {
        debug_assert!(count <= self.bytes.len() - self.end);
        self.end = (self.end + count).min(self.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    //! Guards the arithmetic that every byte of a peer passes through.
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in prop::collection::vec((0usize..INPUT_BYTES, 0usize..INPUT_BYTES), 1..40)) {
            let mut input = Input::new();
            let (mut written, mut read) = (0usize, 0usize);
            for (put, take) in steps {
                let room = input.space();
                let put = put.min(room.len());
                for slot in &mut room[..put] {
                    *slot = (written % 251).to_le_bytes()[0];
                    written += 1;
                }
                input.received(put);
                prop_assert_eq!(input.data().len(), written - read);
                let take = take.min(input.data().len());
                for &byte in &input.data()[..take] {
                    prop_assert_eq!(byte, (read % 251).to_le_bytes()[0]);
                    read += 1;
                }
                input.consume(take);
                prop_assert!(input.is_full() || !input.space().is_empty());
            }
        }
    }
}
