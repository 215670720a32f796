//! The guest's memory, as the front end has shared it at one moment.
//!
//! A [`Map`] never changes: a new table makes a new one, and requests in flight keep the one that they began with.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat};
use tracing::debug;
use urus::Guard;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::limits;

/// Why memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadMemory {
    #[error("{0} regions of memory, and {limit} are possible", limit = limits::MEMORY_SLOTS)]
    TooMany(usize),
    #[error("the file of a region ends at {file_bytes} bytes, before the region does at {end}")]
    ShortFile { file_bytes: u64, end: u64 },
    #[error("a region of memory has no place in the address space")]
    AddressSpace,
    #[error("regions of memory overlap, or are empty: {0}")]
    Layout(vm_memory::GuestRegionCollectionError),
    #[error("cannot map memory: {0}")]
    Map(vm_memory::mmap::MmapRegionError),
    #[error("cannot guard memory against the shortening of its file: {0}")]
    Guard(std::io::Error),
    #[error("no such region of memory")]
    Unknown,
    #[error("cannot inspect the file of a region: {0}")]
    Inspect(rustix::io::Errno),
}

/// Where a region is, for those who name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// In the guest's physical memory.
    pub(crate) guest: u64,
    pub(crate) bytes: u64,
    /// In the front end's address space, in which it names the rings.
    pub(crate) user: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Region {
    place: Place,
    mapping: Arc<GuestRegionMmap>,
    /// Whoever works on the memory keeps the [`Map`], and with it this.
    guard: Arc<Guard>,
}

impl Region {
    /// Maps `file` from `offset`, both in bytes.
    pub(crate) fn map(place: Place, file: File, offset: u64) -> Result<Self, BadMemory> {
        let end = offset
            .checked_add(place.bytes)
            .ok_or(BadMemory::AddressSpace)?;
        check_file(&file, end)?;
        let bytes = usize::try_from(place.bytes).map_err(|_| BadMemory::AddressSpace)?;
        let mapping =
            MmapRegion::from_file(FileOffset::new(file, offset), bytes).map_err(BadMemory::Map)?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(place.guest))
            .ok_or(BadMemory::AddressSpace)?;
        let mapping = Arc::new(mapping);
        let guard = Guard::of_guest_region(&mapping).map_err(BadMemory::Guard)?;
        Ok(Self {
            place,
            mapping,
            guard: Arc::new(guard),
        })
    }
}

/// Touching a mapping beyond the end of its file breaks it ([`Guard`]). A file that ends too early is refused at once; one that can be
/// shortened later is said in the log, for nothing else tells a careless front end from a careful one.
pub(crate) fn check_file(file: impl AsFd, end: u64) -> Result<(), BadMemory> {
    let status = fstat(&file).map_err(BadMemory::Inspect)?;
    // What knows no seals (a file in a directory, hugetlbfs) has none.
    let seals = fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
    if !seals.contains(SealFlags::SHRINK) {
        debug!("a file of the front end's is not sealed against shortening (F_SEAL_SHRINK)");
    }
    if FileType::from_raw_mode(status.st_mode) == FileType::RegularFile {
        let file_bytes = u64::try_from(status.st_size).unwrap_or(0);
        if file_bytes < end {
            return Err(BadMemory::ShortFile { file_bytes, end });
        }
    }
    Ok(())
}

/// The guest's memory at one moment.
#[derive(Debug, Default)]
pub(crate) struct Map {
    regions: Vec<Region>,
    memory: Arc<GuestMemoryMmap>,
}

impl Map {
    pub(crate) fn new(mut regions: Vec<Region>) -> Result<Self, BadMemory> {
        if regions.len() > limits::MEMORY_SLOTS {
            return Err(BadMemory::TooMany(regions.len()));
        }
        if regions.is_empty() {
            return Ok(Self::default());
        }
        regions.sort_by_key(|region| region.place.guest);
        let mappings = regions
            .iter()
            .map(|region| Arc::clone(&region.mapping))
            .collect();
        let memory = GuestMemoryMmap::from_arc_regions(mappings).map_err(BadMemory::Layout)?;
        Ok(Self {
            regions,
            memory: Arc::new(memory),
        })
    }

    /// With one region more.
    pub(crate) fn with(&self, region: Region) -> Result<Self, BadMemory> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions)
    }

    /// With one region less.
    pub(crate) fn without(&self, place: Place) -> Result<Self, BadMemory> {
        let mut regions = self.regions.clone();
        let index = regions
            .iter()
            .position(|region| region.place == place)
            .ok_or(BadMemory::Unknown)?;
        regions.remove(index);
        Self::new(regions)
    }

    /// Whether the file behind a part of it was shortened: nothing in it can be believed.
    pub(crate) fn is_broken(&self) -> bool {
        self.regions.iter().any(|region| region.guard.is_broken())
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// The guest's address of what the front end has at `user` in its own address space.
    pub(crate) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.place.user)?;
            let inside = offset < region.place.bytes;
            inside.then(|| GuestAddress(region.mapping.start_addr().0 + offset))
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    //! Guards the table of memory: nothing beyond a file is mapped, nothing overlaps, addresses are translated.
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    pub(crate) fn memfd(bytes: u64) -> File {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        file.into()
    }

    fn place(guest: u64, bytes: u64, user: u64) -> Place {
        Place { guest, bytes, user }
    }

    #[test]
    fn a_region_must_lie_in_its_file_and_in_the_address_space() {
        let map = |place, file_bytes, offset| Region::map(place, memfd(file_bytes), offset).err();
        assert!(map(place(0, 8192, 0), 8192, 0).is_none());
        assert!(map(place(0, 4096, 0), 8192, 4096).is_none());
        let short = map(place(0, 8192, 0), 8191, 0).unwrap();
        assert!(
            matches!(
                short,
                BadMemory::ShortFile {
                    file_bytes: 8191,
                    end: 8192
                }
            ),
            "{short}"
        );
        assert!(matches!(
            map(place(0, 4096, 0), 8192, 4097),
            Some(BadMemory::ShortFile { .. })
        ));
        assert!(matches!(
            map(place(0, 4096, 0), 8192, 1),
            Some(BadMemory::Map(_))
        ));
        assert!(matches!(
            map(place(0, u64::MAX, 0), 8192, 4096),
            Some(BadMemory::AddressSpace)
        ));
        assert!(matches!(
            map(place(u64::MAX - 4095, 8192, 0), 8192, 0),
            Some(BadMemory::AddressSpace)
        ));
    }

    #[test]
    fn regions_come_and_go_without_overlapping() {
        let region = |at: Place| Region::map(at, memfd(at.bytes), 0).unwrap();
        let low = place(0, 8192, 0x7000_0000);
        let high = place(0x10_000, 4096, 0x5000_0000);
        let map = Map::new(vec![region(high), region(low)]).unwrap();
        assert_eq!(map.guest_address(0x7000_0010), Some(GuestAddress(0x10)));
        assert_eq!(map.guest_address(0x5000_0fff), Some(GuestAddress(0x10_fff)));
        assert_eq!(map.guest_address(0x5000_1000), None);
        assert_eq!(map.guest_address(0x4fff_ffff), None);

        let overlap = map.with(region(place(4096, 8192, 0))).unwrap_err();
        assert!(matches!(overlap, BadMemory::Layout(_)), "{overlap}");
        let more = map.with(region(place(8192, 4096, 0x9000_0000))).unwrap();
        assert_eq!(more.guest_address(0x9000_0000), Some(GuestAddress(8192)));
        let less = more.without(low).unwrap();
        assert_eq!(less.guest_address(0x7000_0010), None);
        assert!(matches!(less.without(low), Err(BadMemory::Unknown)));
        let none = less
            .without(high)
            .unwrap()
            .without(place(8192, 4096, 0x9000_0000))
            .unwrap();
        assert_eq!(none.guest_address(0x9000_0000), None);
    }
}
