//! Plain blocking reads and writes.

use crate::device::pending;
use crate::{Device, Extent, Queue, Result};

/// Plain reads and writes over one [`Queue`], for tools and tests. Each call waits until it is done.
///
/// Offsets and lengths are in bytes, of any alignment.
#[derive(Debug)]
pub struct BlockingIo {
    queue: Queue,
}

impl BlockingIo {
    #[allow(clippy::unnecessary_wraps, reason = "stand-in")]
    pub(crate) fn new(queue: Queue) -> Result<Self> {
        Ok(Self { queue })
    }

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// A range past the end, or what the engine reports.
    pub fn read_at(&mut self, _bytes: &mut [u8], _offset: u64) -> Result<()> {
        Err(pending())
    }

    /// Writes `bytes` at `offset`. Durable after [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at), and on a read-only device.
    pub fn write_at(&mut self, _bytes: &[u8], _offset: u64) -> Result<()> {
        Err(pending())
    }

    /// The range is no longer needed ([`Request::discard`](crate::Request::discard)).
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn discard(&mut self, _offset: u64, _len: u64) -> Result<()> {
        Err(pending())
    }

    /// The range reads as zeroes afterwards ([`Request::write_zeroes`](crate::Request::write_zeroes)); `unmap` lets clusters be given back.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn write_zeroes(&mut self, _offset: u64, _len: u64, _unmap: bool) -> Result<()> {
        Err(pending())
    }

    /// Everything written before is durable.
    ///
    /// # Errors
    /// After one has failed, nothing is written any more.
    pub fn flush(&mut self) -> Result<()> {
        Err(pending())
    }

    /// How the range is stored, in ascending order and without gaps.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn block_status(&mut self, _offset: u64, _len: u64) -> Result<Vec<Extent>> {
        Err(pending())
    }

    /// The device it works on.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.queue.device()
    }
}
