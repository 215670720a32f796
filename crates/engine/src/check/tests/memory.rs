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
        if self
            .unreadable
            .get()
            .is_some_and(|bad| (offset..offset + len).contains(&bad))
        {
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
        self.event(Event::Write(offset, bytes.to_vec()))?;
        write(&mut self.bytes.borrow_mut(), offset, bytes);
        self.len
            .set(self.len.get().max(offset + bytes.len() as u64));
        Ok(())
    }

    async fn barrier(&self) -> Result<()> {
        self.event(Event::Barrier)
    }

    fn file_len(&self) -> Result<u64> {
        Ok(self.len.get())
    }

    fn name(&self) -> &str {
        "memory"
    }
}
