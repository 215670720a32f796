//! Buffers over the memory of a guest, as the rust-vmm crates map it.
//!
//! This is what makes [`Buffer::from_segments`] safe to use for transports: bounds are checked against the map, and the
//! map is kept.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::{Buffer, MemoryRegion};

/// A range lies outside the guest's memory, or reaches over the end of a region of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutsideGuestMemory {
    /// Where the range begins, in the guest's physical memory.
    pub address: u64,
    /// Its bytes.
    pub len: usize,
}

impl fmt::Display for OutsideGuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes at {:#x} do not lie in the guest's memory",
            self.len, self.address
        )
    }
}

impl std::error::Error for OutsideGuestMemory {}

impl Buffer {
    /// A buffer over ranges (start, bytes) of a guest's memory, one after the other. It keeps the whole map, so that
    /// nothing is unmapped while a request is in flight; whoever replaces the map just makes a new one.
    ///
    /// # Errors
    /// A range that is not wholly inside regions of the map. Adjacent regions may share a range.
    pub fn from_guest(
        memory: &Arc<GuestMemoryMmap>,
        ranges: &[(GuestAddress, usize)],
    ) -> Result<Self, OutsideGuestMemory> {
        // SAFETY: there are no segments.
        let mut buffer = unsafe { Self::from_segments(Arc::new(()), &[]) };
        buffer.set_guest(memory, ranges)?;
        Ok(buffer)
    }

    /// Points a used buffer of [`from_guest`](Self::from_guest) at other ranges, without allocating where it had at
    /// least as many before. On an error the buffer is as it was.
    ///
    /// # Errors
    /// As [`from_guest`](Self::from_guest).
    ///
    /// # Panics
    /// When the buffer owns its bytes.
    pub fn set_guest(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        ranges: &[(GuestAddress, usize)],
    ) -> Result<(), OutsideGuestMemory> {
        for &(address, len) in ranges {
            let mut found = 0;
            for (_, piece) in pieces(memory, address, len) {
                found += piece;
            }
            if found != len {
                return Err(OutsideGuestMemory {
                    address: address.raw_value(),
                    len,
                });
            }
        }
        let segments = ranges
            .iter()
            .flat_map(|&(address, len)| pieces(memory, address, len));
        // SAFETY: each segment lies within one mapping of `memory` (`pieces` asks its region for every byte), which is
        // unmapped no earlier than when its region is dropped, and the map given along keeps all its regions. A mapping
        // that is not the region's own was vouched for by whoever made the region, with `unsafe` of its own.
        unsafe { self.point_at(Arc::clone(memory) as _, segments) };
        Ok(())
    }
}

impl MemoryRegion {
    /// The regions of a guest's memory, which keep the whole map.
    #[must_use]
    pub fn of_guest(memory: &Arc<GuestMemoryMmap>) -> Vec<Self> {
        let region = |region: &GuestRegionMmap| {
            let len = usize::try_from(region.len()).ok()?;
            let base = first_byte(region, MemoryRegionAddress(0), len)?;
            // SAFETY: as in `set_guest`: the mapping is unmapped no earlier than when its region is dropped, which the map keeps.
            Some(unsafe { Self::new(Arc::clone(memory) as _, base, len) })
        };
        memory.iter().filter_map(region).collect()
    }
}

/// The pieces of this process's memory that a range of the guest's is mapped to, as far as it is.
fn pieces(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    len: usize,
) -> impl Iterator<Item = (NonNull<u8>, usize)> {
    let mut next = Some(address);
    let mut left = len;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let (region, start) = memory.to_region_addr(next?)?;
        let room = region.len() - start.raw_value();
        let here = usize::try_from(room).map_or(left, |room| room.min(left));
        let base = first_byte(region, start, here)?;
        left -= here;
        next = next?.checked_add(here as u64);
        Some((base, here))
    })
}

/// Where a range of a region is, if all of it is there.
fn first_byte(
    region: &impl GuestMemoryRegion,
    start: MemoryRegionAddress,
    len: usize,
) -> Option<NonNull<u8>> {
    let slice = region.get_slice(start, len).ok()?;
    NonNull::new(slice.ptr_guard_mut().as_ptr())
}

#[cfg(test)]
mod tests {
    //! Guards the only way from a guest's addresses to pointers: nothing outside its memory, and the map is kept.
    use super::*;
    use vm_memory::Bytes;

    const PAGE: usize = 4096;

    /// Two adjacent regions, and one apart.
    fn memory() -> Arc<GuestMemoryMmap> {
        let at = |page: usize| GuestAddress((page * PAGE) as u64);
        let ranges = [(at(1), PAGE), (at(2), PAGE), (at(5), PAGE)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    #[test]
    fn ranges_become_one_buffer() {
        let memory = memory();
        let ranges = [
            (GuestAddress(0x5ff0), 16),
            (GuestAddress(0x1ffe), 4),
            (GuestAddress(0x1000), 0),
        ];
        let mut buffer = Buffer::from_guest(&memory, &ranges).unwrap();
        assert_eq!(buffer.len(), 20);
        assert!(!buffer.is_owned());
        buffer.copy_from(14, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(
            memory.read_obj::<[u8; 2]>(GuestAddress(0x5ffe)).unwrap(),
            [1, 2]
        );
        assert_eq!(
            memory.read_obj::<[u8; 4]>(GuestAddress(0x1ffe)).unwrap(),
            [3, 4, 5, 6]
        );
    }

    #[test]
    fn what_is_outside_is_refused_and_changes_nothing() {
        let memory = memory();
        let mut buffer = Buffer::from_guest(&memory, &[(GuestAddress(0x1000), 8)]).unwrap();
        for (address, len) in [
            (0, 1),
            (0xfff, 2),
            (0x2fff, 2),
            (0x4fff, 1),
            (0x5000, PAGE + 1),
            (0x1000, usize::MAX),
            (u64::MAX, 1),
            (u64::MAX - 1, 8),
        ] {
            let range = (GuestAddress(address), len);
            let error = buffer
                .set_guest(&memory, &[(GuestAddress(0x1000), 1), range])
                .unwrap_err();
            assert_eq!(error, OutsideGuestMemory { address, len });
            assert_eq!(buffer.len(), 8);
        }
    }

    #[test]
    fn the_map_lives_as_long_as_its_buffers() {
        let memory = memory();
        let weak = Arc::downgrade(&memory);
        let mut buffer = Buffer::from_guest(&memory, &[(GuestAddress(0x1000), 8)]).unwrap();
        drop(memory);
        buffer.copy_from(0, &[7; 8]);
        assert!(weak.upgrade().is_some());
        let other = self::memory();
        buffer
            .set_guest(&other, &[(GuestAddress(0x1000), 8)])
            .unwrap();
        assert!(weak.upgrade().is_none());
    }
}
