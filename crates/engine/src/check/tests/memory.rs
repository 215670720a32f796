//! An image file in memory, which logs what is written and fails when told.

use std::cell::{Cell, RefCell};

use urus_format::Header;

use crate::check::CheckIo;
use crate::error::{Error, Result};
use crate::to_usize;

/// What was done to the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Write(u64, Vec<u8>),
    Barrier,
}

/// An operation that fails.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    /// Which, counted from 0 over reads, writes and barriers.
    pub(super) at: usize,
    /// And all that follow.
    pub(super) for_good: bool,
    /// A write that fails has been made up to its middle.
    pub(super) half: bool,
}

pub(super) struct Memory {
    pub(super) bytes: RefCell<Vec<u8>>,
    /// The file goes on with zeroes up to here.
    pub(super) len: Cell<u64>,
    pub(super) log: RefCell<Vec<Event>>,
    /// Bytes read so far.
    pub(super) read: Cell<u64>,
    /// The event with this number fails.
    pub(super) failing: Cell<Option<usize>>,
    /// Reads that touch this byte fail.
    pub(super) unreadable: Cell<Option<u64>>,
    pub(super) failure: Cell<Option<Failure>>,
    /// Operations so far.
    pub(super) operations: Cell<usize>,
    /// The event that failed by [`Self::failure`], as a place in the log.
    pub(super) failed: Cell<Option<usize>>,
}

impl Memory {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self {
            bytes: RefCell::new(bytes.to_vec()),
            len: Cell::new(bytes.len() as u64),
            log: RefCell::default(),
            read: Cell::new(0),
            failing: Cell::new(None),
            unreadable: Cell::new(None),
            failure: Cell::new(None),
            operations: Cell::new(0),
            failed: Cell::new(None),
        }
    }

    pub(super) fn header(&self) -> Header {
        Header::parse(&self.bytes.borrow(), self.len.get()).expect("a header that can be parsed")
    }

    pub(super) fn image(&self) -> super::Image {
        super::Image {
            bytes: self.bytes.borrow().clone(),
        }
    }

    /// Whether the operation that begins is to fail.
    fn fails(&self) -> bool {
        let number = self.operations.replace(self.operations.get() + 1);
        let failure = self.failure.get();
        failure.is_some_and(|one| number == one.at || one.for_good && number > one.at)
    }

    fn event(&self, event: Event) -> Result<()> {
        if self.failing.get() == Some(self.log.borrow().len()) {
            self.log.borrow_mut().push(event);
            return Err(fault("write", 0));
        }
        self.log.borrow_mut().push(event);
        Ok(())
    }
}

fn fault(operation: &'static str, offset: u64) -> Error {
    Error::Io {
        operation,
        file: "memory".into(),
        offset,
        bytes: 0,
        errno: 5,
    }
}

/// Writes as a file does.
pub(super) fn write(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let start = to_usize(offset);
    if bytes.len() < start + data.len() {
        bytes.resize(start + data.len(), 0);
    }
    bytes[start..start + data.len()].copy_from_slice(data);
}

impl CheckIo for Memory {
    async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.read.set(self.read.get() + len);
        let bad = self.unreadable.get();
        if self.fails() || bad.is_some_and(|bad| (offset..offset + len).contains(&bad)) {
            return Err(fault("read", offset));
        }
        let bytes = self.bytes.borrow();
        let mut out = vec![0; to_usize(len)];
        let start = to_usize(offset).min(bytes.len());
        let part = &bytes[start..bytes.len().min(start + out.len())];
        out[..part.len()].copy_from_slice(part);
        Ok(out)
    }

    async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        assert!(
            offset.is_multiple_of(512) && bytes.len().is_multiple_of(512),
            "whole sectors"
        );
        let fails = self.fails();
        if fails {
            self.failed.set(Some(self.log.borrow().len()));
        }
        self.event(Event::Write(offset, bytes.to_vec()))?;
        if fails {
            let half = self.failure.get().is_some_and(|failure| failure.half);
            let done = if half { bytes.len() / 1024 * 512 } else { 0 };
            write(&mut self.bytes.borrow_mut(), offset, &bytes[..done]);
            return Err(fault("write", offset));
        }
        write(&mut self.bytes.borrow_mut(), offset, bytes);
        self.len
            .set(self.len.get().max(offset + bytes.len() as u64));
        Ok(())
    }

    async fn barrier(&self) -> Result<()> {
        if self.fails() {
            self.failed.set(Some(self.log.borrow().len()));
            self.event(Event::Barrier)?;
            return Err(fault("barrier", 0));
        }
        self.event(Event::Barrier)
    }

    fn file_len(&self) -> Result<u64> {
        Ok(self.len.get())
    }

    fn name(&self) -> &str {
        "memory"
    }
}
