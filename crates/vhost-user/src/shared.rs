//! Files that front end and back end share beside the guest's memory.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use urus::Guard;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::limits::SHARED_BYTES;
use crate::memory::{BadMemory, check_file};

/// A part of such a file, mapped.
#[derive(Debug)]
pub(crate) struct Shared {
    mapping: Arc<MmapRegion>,
    guard: Guard,
    /// Where the part begins in the mapping, which begins at a page.
    start: usize,
    len: usize,
}

/// What mappings begin at.
const PAGE: u64 = 4096;

impl Shared {
    /// Maps `bytes` bytes of `file` from `offset`.
    pub(crate) fn map(file: File, offset: u64, bytes: u64) -> Result<Self, BadMemory> {
        let end = offset.checked_add(bytes).ok_or(BadMemory::AddressSpace)?;
        if bytes > SHARED_BYTES || !offset.is_multiple_of(align_of::<AtomicU64>() as u64) {
            return Err(BadMemory::AddressSpace);
        }
        check_file(&file, end)?;
        let first = offset - offset % PAGE;
        let small = |bytes: u64| usize::try_from(bytes).map_err(|_| BadMemory::AddressSpace);
        let mapping = MmapRegion::from_file(FileOffset::new(file, first), small(end - first)?)
            .map_err(BadMemory::Map)?;
        let mapping = Arc::new(mapping);
        let guard = Guard::of_mapping(&mapping).map_err(BadMemory::Guard)?;
        Ok(Self {
            mapping,
            guard,
            start: small(offset - first)?,
            len: small(bytes)?,
        })
    }

    /// Whether the file was shortened: nothing in it can be believed.
    pub(crate) fn is_broken(&self) -> bool {
        self.guard.is_broken()
    }

    /// A range of it; None when that is outside.
    pub(crate) fn slice(&self, at: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let end = at.checked_add(len)?;
        if end > self.len {
            return None;
        }
        self.mapping.get_slice(self.start + at, len).ok()
    }
}
