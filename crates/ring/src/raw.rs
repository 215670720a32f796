//! One file and nothing between: the ways in which a program without an image format would read and write it.
//!
//! Not for devices. A device is measured against the best of these, so that what the engine and its driver cost is
//! seen beside what the kernel can do and not only beside the same driver.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};

use urus_engine::storage::Memory;

use crate::memory::RingMemory;
use crate::uring::setup;

/// How a file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawMethod {
    /// pread(2) and pwrite(2), one after the other.
    Inline,
    /// io_uring, by descriptor.
    Ring,
    /// io_uring, with the file registered.
    RegisteredFile,
    /// io_uring, with the file and the memory registered.
    RegisteredBuffers,
}

impl RawMethod {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Inline,
        Self::Ring,
        Self::RegisteredFile,
        Self::RegisteredBuffers,
    ];

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Inline => "inline pread and pwrite",
            Self::Ring => "io_uring",
            Self::RegisteredFile => "io_uring, registered file",
            Self::RegisteredBuffers => "io_uring, registered file and buffers",
        }
    }
}

/// Which way a block goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawDirection {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// A file with a block of memory for each operation in flight; each has a slot, from 0.
///
/// Dropping it waits for what the kernel is still doing.
pub struct RawFile {
    /// Before the memory: it is closed first. (`drop` has emptied it by then.)
    ring: Option<IoUring>,
    file: File,
    method: RawMethod,
    blocks: Vec<RingMemory>,
    /// By slot.
    busy: Vec<bool>,
    in_flight: usize,
    /// Results of inline operations.
    ready: VecDeque<(usize, io::Result<()>)>,
}

impl RawFile {
    /// For up to `depth` operations at once, of `block_bytes` each; what is written is not zero.
    ///
    /// # Errors
    /// As io_uring_setup(2) and io_uring_register(2), for instance where memory may not be pinned.
    ///
    /// # Panics
    /// For a depth of 0 or blocks of 0 bytes.
    pub fn open(file: File, method: RawMethod, depth: u32, block_bytes: usize) -> io::Result<Self> {
        assert!(depth > 0 && block_bytes > 0, "nothing could be done");
        let slots = usize::try_from(depth).expect("32 bits fit a usize");
        let blocks: Vec<_> = (0..slots).map(|_| filled(block_bytes)).collect();
        let ring = match method {
            RawMethod::Inline => None,
            _ => Some(ring(&file, method, depth, &blocks)?),
        };
        Ok(Self {
            ring,
            file,
            method,
            blocks,
            busy: vec![false; slots],
            in_flight: 0,
            ready: VecDeque::with_capacity(slots),
        })
    }

    /// Takes the operation of a free slot, at `offset`; it begins with the next [`wait`](Self::wait) at the latest.
    ///
    /// # Panics
    /// When the slot is in flight.
    #[inline]
    pub fn submit(&mut self, slot: usize, offset: u64, direction: RawDirection) {
        assert!(!self.busy[slot], "slot {slot} is in flight already");
        self.busy[slot] = true;
        self.in_flight += 1;
        if self.ring.is_none() {
            let result = self.inline(slot, offset, direction);
            self.ready.push_back((slot, result));
            return;
        }
        let entry = self.entry(slot, offset, direction);
        let ring = self.ring.as_mut().expect("looked at above");
        // SAFETY: `push` wants the memory valid until the operation has ended: it is the slot's block, which lives as
        // long as `self` and is not used again before its completion was seen (asserted above). `drop` waits for all
        // completions or leaks the blocks, and forgetting `self` leaks them too.
        let pushed = unsafe { ring.submission().push(&entry) };
        pushed.expect("the submission queue has room for every slot");
    }

    /// Starts everything submitted and sleeps until something has ended, unless it has already.
    ///
    /// # Errors
    /// As io_uring_enter(2).
    pub fn wait(&mut self) -> io::Result<()> {
        let Some(ring) = self.ring.as_mut().filter(|_| self.in_flight > 0) else {
            return Ok(());
        };
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// An operation that has ended, with its slot. One that moved fewer bytes than a block is an error.
    #[inline]
    pub fn completion(&mut self) -> Option<(usize, io::Result<()>)> {
        let (slot, result) = match &mut self.ring {
            None => self.ready.pop_front()?,
            Some(ring) => {
                let entry = ring.completion().next()?;
                let slot = usize::try_from(entry.user_data()).expect("a slot that was pushed");
                let result = usize::try_from(entry.result())
                    .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
                (slot, whole(result, self.block(slot).1))
            }
        };
        self.busy[slot] = false;
        self.in_flight -= 1;
        Some((slot, result))
    }

    /// Operations whose completion was not taken.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// fdatasync(2), waited for.
    ///
    /// # Errors
    /// As fdatasync(2).
    pub fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn inline(&self, slot: usize, offset: u64, direction: RawDirection) -> io::Result<()> {
        let (base, len) = self.block(slot);
        let base = base.as_ptr();
        let fd = self.file.as_raw_fd();
        let offset = libc::off64_t::try_from(offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        loop {
            // SAFETY: `pread64` wants memory valid for writes of `len` bytes and `pwrite64` for reads: it is the slot's
            // block, which lives longer than this call and of which nobody holds a slice.
            let done = unsafe {
                match direction {
                    RawDirection::Read => libc::pread64(fd, base.cast(), len, offset),
                    RawDirection::Write => libc::pwrite64(fd, base.cast(), len, offset),
                }
            };
            let result = usize::try_from(done).map_err(|_| io::Error::last_os_error());
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return whole(result, len),
            }
        }
    }

    fn entry(&self, slot: usize, offset: u64, direction: RawDirection) -> squeue::Entry {
        let (base, len) = self.block(slot);
        let base = base.as_ptr();
        let len = u32::try_from(len).expect("checked when it was opened");
        let index = u16::try_from(slot).unwrap_or(u16::MAX);
        let (file, flags) = match self.method {
            RawMethod::Inline | RawMethod::Ring => {
                (Fd(self.file.as_raw_fd()), squeue::Flags::empty())
            }
            // The only one registered.
            _ => (Fd(0), squeue::Flags::FIXED_FILE),
        };
        let entry = match (direction, self.method) {
            (RawDirection::Read, RawMethod::RegisteredBuffers) => {
                opcode::ReadFixed::new(file, base, len, index)
                    .offset(offset)
                    .build()
            }
            (RawDirection::Write, RawMethod::RegisteredBuffers) => {
                opcode::WriteFixed::new(file, base, len, index)
                    .offset(offset)
                    .build()
            }
            (RawDirection::Read, _) => opcode::Read::new(file, base, len).offset(offset).build(),
            (RawDirection::Write, _) => opcode::Write::new(file, base, len).offset(offset).build(),
        };
        entry
            .flags(flags)
            .user_data(u64::try_from(slot).expect("a slot fits 64 bits"))
    }

    fn block(&self, slot: usize) -> (NonNull<u8>, usize) {
        piece(&self.blocks[slot])
    }
}

impl Drop for RawFile {
    /// Waits until the kernel has let go of all blocks.
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.completion().is_some() {
                continue;
            }
            if let Err(error) = self.wait() {
                // Better leaked than written to by the kernel after they were freed.
                tracing::error!(%error, operations = self.in_flight, "cannot wait for operations; leaking their memory");
                std::mem::forget(std::mem::take(&mut self.blocks));
                return;
            }
        }
    }
}

/// A ring that does what `method` says, with the best flags that the kernel has.
fn ring(file: &File, method: RawMethod, depth: u32, blocks: &[RingMemory]) -> io::Result<IoUring> {
    let ring = setup::build(depth.next_power_of_two())?;
    ring.submitter().register_enable_rings()?;
    let too_much = || io::Error::from_raw_os_error(libc::EINVAL);
    if u32::try_from(piece(&blocks[0]).1).is_err() || ring.params().sq_entries() < depth {
        return Err(too_much());
    }
    if method != RawMethod::Ring {
        ring.submitter().register_files(&[file.as_raw_fd()])?;
    }
    if method == RawMethod::RegisteredBuffers {
        if u16::try_from(blocks.len()).is_err() {
            return Err(too_much());
        }
        let iovecs: Vec<_> = blocks
            .iter()
            .map(|block| {
                let (base, len) = piece(block);
                libc::iovec {
                    iov_base: base.as_ptr().cast(),
                    iov_len: len,
                }
            })
            .collect();
        // SAFETY: `register_buffers` wants memory that is valid until the ring is gone: the blocks go into the
        // `RawFile` beside the ring, which is dropped first.
        unsafe { ring.submitter().register_buffers(&iovecs)? };
    }
    Ok(ring)
}

/// A block of no zeroes: those could be stored without being written.
fn filled(bytes: usize) -> RingMemory {
    let memory = RingMemory::new(bytes);
    memory.write(0, &vec![b'r'; bytes]);
    memory
}

fn piece(block: &RingMemory) -> (NonNull<u8>, usize) {
    block.contiguous().expect("made in one piece")
}

/// Nothing for a whole block.
fn whole(result: io::Result<usize>, len: usize) -> io::Result<()> {
    match result {
        Ok(done) if done == len => Ok(()),
        Ok(done) => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{done} of {len} bytes were transferred"),
        )),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    //! Guards what devices are measured against: a control that moved other bytes, or fewer, would be fast for nothing.
    use super::*;

    const BLOCK: usize = 4096;

    fn end_all(raw: &mut RawFile) -> Vec<(usize, io::Result<()>)> {
        let mut ended = Vec::new();
        while raw.in_flight() > 0 {
            raw.wait().unwrap();
            while let Some(completion) = raw.completion() {
                ended.push(completion);
            }
        }
        ended
    }

    #[test]
    fn each_method_writes_and_reads_the_blocks_it_was_told() {
        for method in RawMethod::ALL {
            let file = tempfile::tempfile().unwrap();
            file.set_len(64 * BLOCK as u64).unwrap();
            let mut raw = RawFile::open(file.try_clone().unwrap(), method, 5, BLOCK).unwrap();
            for slot in 0..5 {
                raw.submit(slot, (10 + slot as u64) * BLOCK as u64, RawDirection::Write);
            }
            let mut ended = end_all(&mut raw);
            ended.sort_by_key(|(slot, _)| *slot);
            assert_eq!(ended.len(), 5, "{method:?}");
            assert!(ended.iter().all(|(_, result)| result.is_ok()), "{ended:?}");
            raw.sync_data().unwrap();
            let mut content = vec![0; 64 * BLOCK];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).unwrap();
            for (index, block) in content.chunks(BLOCK).enumerate() {
                let expected = if (10..15).contains(&index) { b'r' } else { 0 };
                assert!(
                    block.iter().all(|byte| *byte == expected),
                    "{method:?} {index}"
                );
            }
            // A hole is read into the slot's own block.
            raw.submit(3, 0, RawDirection::Read);
            assert!(matches!(end_all(&mut raw)[..], [(3, Ok(()))]), "{method:?}");
            let mut read = vec![1; BLOCK];
            raw.blocks[3].read(0, &mut read);
            assert!(read.iter().all(|byte| *byte == 0), "{method:?}");
            raw.blocks[2].read(0, &mut read);
            assert!(read.iter().all(|byte| *byte == b'r'), "{method:?}");
        }
    }

    #[test]
    fn what_is_not_whole_is_an_error() {
        for method in RawMethod::ALL {
            let file = tempfile::tempfile().unwrap();
            file.set_len(100).unwrap();
            let mut raw = RawFile::open(file, method, 1, BLOCK).unwrap();
            raw.submit(0, 0, RawDirection::Read);
            let ended = end_all(&mut raw);
            let kind = ended[0].1.as_ref().unwrap_err().kind();
            assert_eq!(kind, io::ErrorKind::UnexpectedEof, "{method:?}");
        }
    }

    #[test]
    fn dropping_waits_for_what_is_in_flight() {
        for method in RawMethod::ALL {
            let file = tempfile::tempfile().unwrap();
            file.set_len(1 << 20).unwrap();
            let mut raw = RawFile::open(file, method, 8, BLOCK).unwrap();
            for slot in 0..8 {
                raw.submit(slot, 0, RawDirection::Read);
            }
            drop(raw);
        }
    }
}
