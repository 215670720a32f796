//! What was received and not yet understood.

use std::ops::Range;

use urus::Buffer;

use crate::limits::INPUT_BYTES;

/// A fixed buffer: filled at its end by the socket, consumed at its start by the protocol.
///
/// A receive in a ring owns the buffer ([`lend`](Self::lend)); until it is back, nothing seems to be there.
pub(crate) struct Input {
    bytes: Option<Buffer>,
    start: usize,
    end: usize,
}

impl Input {
    /// None where there is no memory for it.
    pub(crate) fn try_new() -> Option<Self> {
        Some(Self {
            bytes: Some(Buffer::try_new(INPUT_BYTES)?),
            start: 0,
            end: 0,
        })
    }

    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self::try_new().expect("there is memory for a test")
    }

    /// All that is there.
    pub(crate) fn data(&self) -> &[u8] {
        match &self.bytes {
            Some(bytes) => &bytes.as_slice()[self.start..self.end],
            None => &[],
        }
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
        self.end - self.start == INPUT_BYTES
    }

    /// Where to receive into. Empty only when the input is full, or lent.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        let Some(bytes) = &mut self.bytes else {
            return &mut [];
        };
        let bytes = bytes.as_mut_slice();
        // Moving is worth it only when little room is left at the end.
        if self.start > 0 && INPUT_BYTES - self.end < INPUT_BYTES / 2 {
            bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut bytes[self.end..]
    }

    /// The buffer, and where to receive into. None while it is lent already.
    pub(crate) fn lend(&mut self) -> Option<(Buffer, Range<usize>)> {
        self.space();
        Some((self.bytes.take()?, self.end..INPUT_BYTES))
    }

    /// The buffer that was lent is back; what it received is still to be told.
    pub(crate) fn take_back(&mut self, buffer: Buffer) {
        debug_assert!(self.bytes.is_none() && buffer.len() == INPUT_BYTES);
        self.bytes = Some(buffer);
    }

    /// `count` bytes were received into [`space`](Self::space).
    pub(crate) fn received(&mut self, count: usize) {
        debug_assert!(count <= INPUT_BYTES - self.end);
        self.end = (self.end + count).min(INPUT_BYTES);
    }
}

#[cfg(test)]
mod tests {
    //! Guards the arithmetic that every byte of a peer passes through.
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in prop::collection::vec((0usize..INPUT_BYTES, 0usize..INPUT_BYTES, any::<bool>()), 1..40)) {
            let mut input = Input::new();
            let (mut written, mut read) = (0usize, 0usize);
            for (put, take, lent) in steps {
                let held = written - read;
                let mut fill = |room: &mut [u8]| {
                    let put = put.min(room.len());
                    for slot in &mut room[..put] {
                        *slot = (written % 251).to_le_bytes()[0];
                        written += 1;
                    }
                    put
                };
                let put = if lent {
                    let (mut buffer, room) = input.lend().unwrap();
                    prop_assert!(input.data().is_empty() && input.space().is_empty());
                    prop_assert!(input.lend().is_none());
                    prop_assert_eq!(input.is_full(), held == INPUT_BYTES);
                    let put = fill(&mut buffer.as_mut_slice()[room]);
                    input.take_back(buffer);
                    put
                } else {
                    fill(input.space())
                };
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
