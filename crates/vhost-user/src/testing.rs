//! What unit tests share: a guest's memory, and a driver's hand on its descriptors.

use std::sync::Arc;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Flags of descriptors (virtio 1.2, 2.7.5).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where data may lie; the queue of virtio-queue's mock begins at 0.
pub(crate) const DATA: u64 = 0x10_0000;

/// The end of the memory.
pub(crate) const END: u64 = 0x20_0000;

pub(crate) fn memory() -> Arc<GuestMemoryMmap> {
    let end = usize::try_from(END).unwrap();
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), end)]).unwrap())
}

pub(crate) fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor::from(Descriptor::new(address, len, flags, next))
}
