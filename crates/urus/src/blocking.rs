//! Plain blocking reads and writes.

use crate::{Buffer, Completion, Device, EngineError, Extent, Queue, Request, Result, limits};

/// Plain reads and writes over one [`Queue`], for tools and tests. Each call waits until it is done.
///
/// Offsets and lengths are in bytes, of any alignment. Long transfers are cut into pieces, several of which are
/// under way at once: so they are not atomic, and a failed one may have done any part.
#[derive(Debug)]
pub struct BlockingIo {
    queue: Queue,
    /// Buffers to use again.
    spare: Vec<Buffer>,
}

/// A part of a transfer.
#[derive(Clone, Copy)]
struct Chunk {
    offset: u64,
    /// Where it lies in the caller's bytes.
    start: usize,
    len: usize,
}

impl BlockingIo {
    pub(crate) fn new(queue: Queue) -> Self {
        Self {
            queue,
            spare: Vec::new(),
        }
    }

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// A range past the end, or what the engine reports.
    pub fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.transfer(
            chunks(offset, bytes.len()),
            bytes,
            |chunk, buffer, _| Request::read(token(chunk), chunk.offset, buffer),
            |chunk_start, buffer, bytes| {
                buffer.copy_to(0, &mut bytes[chunk_start..][..buffer.len()])
            },
        )
    }

    /// Writes `bytes` at `offset`. Durable after [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at), and on a read-only device.
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.transfer(
            chunks(offset, bytes.len()),
            bytes,
            |chunk, mut buffer, bytes| {
                buffer.copy_from(0, &bytes[chunk.start..][..chunk.len]);
                Request::write(token(chunk), chunk.offset, buffer)
            },
            |_, _, _| {},
        )
    }

    /// The range is no longer needed ([`Request::discard`]).
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.call(Request::discard(0, offset, len)).result
    }

    /// The range reads as zeroes afterwards ([`Request::write_zeroes`]); `unmap` lets clusters be given back.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.call(Request::write_zeroes(0, offset, len).unmap(unmap))
            .result
    }

    /// Everything written before is durable.
    ///
    /// # Errors
    /// After one has failed, nothing is written any more.
    pub fn flush(&mut self) -> Result<()> {
        self.call(Request::flush(0)).result
    }

    /// How the range is stored: in ascending order, without gaps, from `offset` on. A long answer may end before the
    /// range does: ask again from there. It is empty only for an empty range.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn block_status(&mut self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let Completion {
            result, extents, ..
        } = self.call(Request::block_status(0, offset, len));
        result.map(|()| extents)
    }

    /// Submits one request and waits for it.
    pub fn call(&mut self, request: Request) -> Completion {
        self.submit(request);
        self.next()
    }

    /// The device it works on.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.queue.device()
    }

    /// Cuts a transfer into chunks and keeps a few of them going. `done` gets the start of a chunk in `bytes`,
    /// and its buffer.
    fn transfer<B>(
        &mut self,
        mut chunks: impl Iterator<Item = Chunk>,
        mut bytes: B,
        mut request: impl FnMut(Chunk, Buffer, &mut B) -> Request,
        mut done: impl FnMut(usize, &Buffer, &mut B),
    ) -> Result<()> {
        let mut result = Ok(());
        let limit = limits::BLOCKING_CHUNKS.min(self.queue.depth());
        loop {
            while self.queue.in_flight() < limit
                && result.is_ok()
                && let Some(chunk) = chunks.next()
            {
                let Some(buffer) = self.buffer(chunk.len) else {
                    let bytes = u64::try_from(chunk.len).expect("a length fits 64 bits");
                    result = Err(EngineError::OutOfMemory { bytes }.into());
                    break;
                };
                let request = request(chunk, buffer, &mut bytes);
                self.submit(request);
            }
            if self.queue.in_flight() == 0 {
                return result;
            }
            let completion = self.next();
            let buffer = completion.buffer.expect("reads and writes have a buffer");
            match completion.result {
                Ok(()) => {
                    let start = usize::try_from(completion.token).expect("made from a usize");
                    done(start, &buffer, &mut bytes);
                }
                Err(error) => result = result.and(Err(error)),
            }
            if self.spare.len() < limits::BLOCKING_CHUNKS {
                self.spare.push(buffer);
            }
        }
    }

    fn submit(&mut self, request: Request) {
        self.queue
            .submit(request)
            .expect("fewer requests are in flight than the queue takes");
    }

    fn next(&mut self) -> Completion {
        self.queue.kick();
        loop {
            if let Some(completion) = self.queue.completion() {
                return completion;
            }
            self.queue.wait(None);
        }
    }

    fn buffer(&mut self, len: usize) -> Option<Buffer> {
        match self.spare.iter().position(|buffer| buffer.len() == len) {
            Some(index) => Some(self.spare.swap_remove(index)),
            None => {
                // Make room for this size.
                self.spare.pop();
                Buffer::try_new(len)
            }
        }
    }
}

/// Where a chunk starts in the caller's bytes names it.
fn token(chunk: Chunk) -> u64 {
    chunk.start as u64
}

/// Cuts a range at multiples of the chunk size, so that all chunks but the first and the last are aligned.
fn chunks(offset: u64, len: usize) -> impl Iterator<Item = Chunk> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = len.checked_sub(start).filter(|&left| left > 0)?;
        let at = offset.saturating_add(start as u64);
        let room = limits::BLOCKING_CHUNK_BYTES - at % limits::BLOCKING_CHUNK_BYTES;
        let chunk = Chunk {
            offset: at,
            start,
            len: usize::try_from(room).map_or(left, |room| room.min(left)),
        };
        start += chunk.len;
        Some(chunk)
    })
}

#[cfg(test)]
mod tests {
    //! Guards the arithmetic that cuts transfers.
    use super::*;

    #[test]
    fn chunks_cover_the_range() {
        const MIB: u64 = 1 << 20;
        for (offset, len, count) in [
            (0, 0, 0),
            (0, 1, 1),
            (MIB - 1, 2, 2),
            (5, 4 << 20, 5),
            (MIB, 3 << 20, 3),
        ] {
            let chunks = chunks(offset, len).collect::<Vec<_>>();
            assert_eq!(chunks.len(), count, "{offset} {len}");
            let mut start = 0;
            for chunk in chunks {
                assert_eq!((chunk.start, chunk.offset), (start, offset + start as u64));
                assert!(
                    chunk.len > 0
                        && chunk.offset / MIB == (chunk.offset + chunk.len as u64 - 1) / MIB
                );
                start += chunk.len;
            }
            assert_eq!(start, len);
        }
    }
}
