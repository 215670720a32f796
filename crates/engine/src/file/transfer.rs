//! One read or write of one file, carried to its end. Storage may do a part of it, or nothing, or be interrupted; what comes of that is
//! decided here and nowhere else. Who waits for it, a task or a hit's completion, is no matter of its.

use std::io;

use crate::errno::{EIO, ENOSPC};
use crate::limits;
use crate::storage::{FileId, Memory, Op, OpKind};
use crate::to_usize;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// A read or write, and how far it has come.
pub(crate) struct Transfer<M> {
    pub(crate) file: FileId,
    pub(crate) direction: Direction,
    /// Where in the file the rest begins.
    pub(crate) offset: u64,
    /// The rest.
    pub(crate) memory: M,
    /// Operations that brought it no further, or not by whole blocks.
    retries: u32,
}

/// What is to be done after an operation that was not whole.
pub(crate) enum Next {
    /// Nothing: the rest reads as zeroes.
    Over,
    /// [`Transfer::op`] is to be run.
    Again,
    /// It is over without success.
    Failed(io::Error),
}

/// What a transfer asks of the file that it works on.
pub(crate) trait Ends {
    /// Whether there is nothing from this offset on.
    fn is_past_end(&self, file: FileId, offset: u64) -> bool;
    /// Where a short read or write may go on: at a whole sector, or the guest sees a sector of which one half is older than the other;
    /// under O_DIRECT at a whole block, or it is refused.
    fn resume_unit(&self, file: FileId) -> u64;
}

impl<M: Memory> Transfer<M> {
    #[inline]
    pub(crate) fn new(direction: Direction, file: FileId, offset: u64, memory: M) -> Self {
        Self {
            file,
            direction,
            offset,
            memory,
            retries: 0,
        }
    }

    /// The operation that does the rest.
    #[inline]
    pub(crate) fn op(&self) -> Op<M> {
        let (offset, memory) = (self.offset, self.memory.clone());
        let kind = match self.direction {
            Direction::Read => OpKind::Read { offset, memory },
            Direction::Write => OpKind::Write {
                offset,
                memory,
                sync: false,
            },
        };
        Op {
            file: self.file,
            kind,
        }
    }

    /// As errors call it.
    pub(crate) fn name(&self) -> &'static str {
        match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        }
    }

    /// Whether the operation has done all of the rest.
    #[inline]
    pub(crate) fn is_whole(&self, result: &io::Result<usize>) -> bool {
        matches!(result, Ok(bytes) if *bytes >= self.memory.len())
    }

    /// An operation has ended and did not do all of the rest.
    #[cold]
    pub(crate) fn not_whole(&mut self, result: io::Result<usize>, files: &impl Ends) -> Next {
        let failed = |errno| Next::Failed(io::Error::from_raw_os_error(errno));
        let may_retry = self.retries < limits::RETRIES;
        match result {
            // A device that takes nothing and says no error is full.
            Ok(0) if self.direction == Direction::Write => failed(ENOSPC),
            Ok(bytes) if self.direction == Direction::Read && self.meets_end(bytes, files) => {
                self.memory.zero(bytes, self.memory.len() - bytes);
                Next::Over
            }
            Ok(bytes) => {
                // From the last whole block on. Nothing at all is no progress either: the file has grown meanwhile, or it is broken, and
                // then its bytes are no zeroes.
                let unit = files.resume_unit(self.file);
                let end = self.offset + bytes as u64;
                let whole = to_usize((end - end % unit).saturating_sub(self.offset));
                if whole < bytes || bytes == 0 {
                    if !may_retry {
                        return failed(EIO);
                    }
                    self.retries += 1;
                }
                self.offset += whole as u64;
                self.memory = self.memory.slice(whole, self.memory.len() - whole);
                Next::Again
            }
            Err(error) if may_retry && is_transient(&error) => {
                self.retries += 1;
                Next::Again
            }
            Err(error) => Next::Failed(error),
        }
    }

    /// Whether a read that stopped after so many bytes has met the end of the file: at once, or inside a sector or block. (One that stops
    /// between two blocks is asked once more.)
    fn meets_end(&self, bytes: usize, files: &impl Ends) -> bool {
        let end = self.offset + bytes as u64;
        (bytes == 0 || !end.is_multiple_of(files.resume_unit(self.file)))
            && files.is_past_end(self.file, end)
    }
}

/// Whether an operation that failed so deserves another try.
pub(crate) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

#[cfg(test)]
mod tests {
    //! Guards against a transfer that goes on at the wrong place, for ever, or not at all.

    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    #[derive(Clone)]
    struct Bytes {
        all: Rc<RefCell<Vec<u8>>>,
        start: usize,
        len: usize,
    }

    impl Bytes {
        fn new(len: usize) -> Self {
            Self {
                all: Rc::new(RefCell::new(vec![7; len])),
                start: 0,
                len,
            }
        }
    }

    impl Memory for Bytes {
        fn len(&self) -> usize {
            self.len
        }
        fn slice(&self, start: usize, len: usize) -> Self {
            assert!(start + len <= self.len);
            Self {
                all: Rc::clone(&self.all),
                start: self.start + start,
                len,
            }
        }
        fn read(&self, start: usize, dst: &mut [u8]) {
            dst.copy_from_slice(&self.all.borrow()[self.start + start..][..dst.len()]);
        }
        fn write(&self, start: usize, src: &[u8]) {
            self.all.borrow_mut()[self.start + start..][..src.len()].copy_from_slice(src);
        }
        fn zero(&self, start: usize, len: usize) {
            self.write(start, &vec![0; len]);
        }
        fn is_zero(&self) -> bool {
            false
        }
        fn is_aligned(&self, _align: usize) -> bool {
            true
        }
        fn chain(_parts: Vec<Self>) -> Self {
            unreachable!("no transfer gathers")
        }
    }

    /// A file of so many bytes, in blocks of so many.
    struct File(u64, u64);

    impl Ends for File {
        fn is_past_end(&self, _file: FileId, offset: u64) -> bool {
            self.0 <= offset
        }
        fn resume_unit(&self, _file: FileId) -> u64 {
            self.1
        }
    }

    const FILE: FileId = FileId(0);

    fn transfer(direction: Direction, offset: u64, len: usize) -> Transfer<Bytes> {
        Transfer::new(direction, FILE, offset, Bytes::new(len))
    }

    fn errno(next: Next) -> Option<i32> {
        match next {
            Next::Failed(error) => error.raw_os_error(),
            Next::Over | Next::Again => None,
        }
    }

    #[test]
    fn what_was_short_goes_on_at_a_whole_block() {
        for direction in [Direction::Read, Direction::Write] {
            let mut it = transfer(direction, 512, 2048);
            assert!(matches!(
                it.not_whole(Ok(1000), &File(1 << 20, 512)),
                Next::Again
            ));
            assert_eq!((it.offset, it.memory.len()), (1024, 2048 - 512));
            assert!(!it.is_whole(&Ok(1024)) && it.is_whole(&Ok(2048 - 512)));
            // Blocks of 4096 that it does not reach: all of it again.
            let mut it = transfer(direction, 4096, 8192);
            assert!(matches!(
                it.not_whole(Ok(512), &File(1 << 20, 4096)),
                Next::Again
            ));
            assert_eq!((it.offset, it.memory.len()), (4096, 8192));
        }
    }

    #[test]
    fn a_read_meets_the_end_between_and_inside_sectors() {
        for (length, bytes) in [(1024, 0), (1300, 276)] {
            let mut it = transfer(Direction::Read, 1024, 1024);
            let next = it.not_whole(Ok(bytes), &File(length, 512));
            assert!(matches!(next, Next::Over));
            let read = it.memory.all.borrow();
            assert!(read[..bytes].iter().all(|byte| *byte == 7));
            assert!(read[bytes..].iter().all(|byte| *byte == 0));
        }
        // What an earlier operation has read stays.
        let mut it = transfer(Direction::Read, 0, 2048);
        assert!(matches!(
            it.not_whole(Ok(512), &File(700, 512)),
            Next::Again
        ));
        assert!(matches!(it.not_whole(Ok(188), &File(700, 512)), Next::Over));
        let read = it.memory.all.borrow();
        assert!(read[..700].iter().all(|byte| *byte == 7));
        assert!(read[700..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn nothing_goes_on_for_ever() {
        let file = File(1 << 20, 512);
        for (direction, result, expected) in [
            (Direction::Read, Ok(0), EIO),
            (Direction::Read, Ok(100), EIO),
            (Direction::Write, Ok(0), ENOSPC),
            (Direction::Write, Ok(511), EIO),
            (Direction::Read, Err(4), 4),
            (Direction::Write, Err(11), 11),
            (Direction::Write, Err(5), 5),
        ] {
            let mut it = transfer(direction, 0, 4096);
            let mut times = 0;
            let failed = loop {
                let result = result.map_err(io::Error::from_raw_os_error);
                match errno(it.not_whole(result, &file)) {
                    Some(errno) => break errno,
                    None => times += 1,
                }
            };
            assert_eq!(failed, expected);
            assert!(times <= limits::RETRIES);
            assert_eq!(it.memory.len(), 4096, "no byte was done");
        }
    }

    #[test]
    fn a_write_never_takes_the_end_for_done() {
        let mut it = transfer(Direction::Write, 0, 4096);
        assert!(matches!(
            it.not_whole(Ok(100), &File(100, 512)),
            Next::Again
        ));
        assert_eq!(it.memory.len(), 4096);
    }
}
