//! The device's side of a split virtqueue (virtio 1.2, 2.7): what is available, what is used, who wants to be told.
//!
//! Unlike virtio-queue's, it publishes the used ring once per batch, and honours VIRTQ_AVAIL_F_NO_INTERRUPT.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::chain::DESCRIPTOR_BYTES;

/// Flags and index before the entries of either ring.
const HEADER_BYTES: usize = 4;
/// Where the index is.
const INDEX: usize = 2;
const AVAIL_ENTRY_BYTES: usize = 2;
const USED_ENTRY_BYTES: usize = 8;
/// `used_event` or `avail_event` after the entries.
const EVENT_BYTES: usize = 2;

/// Why a ring cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRing {
    #[error("the rings lie outside the guest's memory, or not on their boundaries")]
    Memory,
    #[error("the driver says that {available} requests are available in a queue of {size}")]
    Index { available: u16, size: u16 },
    #[error("the driver offers descriptor {head} of a queue of {size}")]
    Head { head: u16, size: u16 },
    #[error("the driver offers descriptor {0} again while its request is in flight")]
    Twice(u16),
}

/// Where a virtqueue lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Entries; a power of two.
    pub(crate) size: u16,
    pub(crate) descriptors: GuestAddress,
    pub(crate) avail: GuestAddress,
    pub(crate) used: GuestAddress,
}

impl Layout {
    /// The rings in a guest's memory.
    pub(crate) fn view<'a>(&self, memory: &'a GuestMemoryMmap) -> Result<View<'a>, BadRing> {
        let size = usize::from(self.size);
        let slice = |at, bytes| memory.get_slice(at, bytes).map_err(|_| BadRing::Memory);
        Ok(View {
            descriptors: slice(self.descriptors, size * DESCRIPTOR_BYTES)?,
            avail: slice(
                self.avail,
                HEADER_BYTES + size * AVAIL_ENTRY_BYTES + EVENT_BYTES,
            )?,
            used: slice(
                self.used,
                HEADER_BYTES + size * USED_ENTRY_BYTES + EVENT_BYTES,
            )?,
        })
    }

    /// Where the used entry of an index lies, from the start of the used ring, and its bytes.
    pub(crate) fn used_entry(&self, index: u16) -> (usize, usize) {
        let slot = usize::from(index & (self.size - 1));
        (HEADER_BYTES + slot * USED_ENTRY_BYTES, USED_ENTRY_BYTES)
    }

    fn used_event(&self) -> usize {
        HEADER_BYTES + usize::from(self.size) * AVAIL_ENTRY_BYTES
    }

    fn avail_event(&self) -> usize {
        HEADER_BYTES + usize::from(self.size) * USED_ENTRY_BYTES
    }
}

/// The rings of a virtqueue, to look at for as long as nothing changes the memory's map.
pub(crate) struct View<'a> {
    pub(crate) descriptors: VolatileSlice<'a>,
    avail: VolatileSlice<'a>,
    used: VolatileSlice<'a>,
}

impl View<'_> {
    /// The index of the used ring, as it is in memory.
    pub(crate) fn used_index(&self) -> Result<u16, BadRing> {
        load(&self.used, INDEX, Ordering::Acquire)
    }
}

fn load(ring: &VolatileSlice<'_>, at: usize, order: Ordering) -> Result<u16, BadRing> {
    ring.load(at, order)
        .map(u16::from_le)
        .map_err(|_| BadRing::Memory)
}

fn store(ring: &VolatileSlice<'_>, at: usize, value: u16, order: Ordering) -> Result<(), BadRing> {
    ring.store(value.to_le(), at, order)
        .map_err(|_| BadRing::Memory)
}

/// Where the device stands in a virtqueue.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) layout: Layout,
    /// Index of the next entry of the available ring.
    next_avail: u16,
    /// Index of the next entry of the used ring.
    next_used: u16,
    /// What the used index was when the driver was last asked whether it wants to be told.
    asked_used: u16,
    event_idx: bool,
}

impl Ring {
    pub(crate) fn new(layout: Layout, next_avail: u16, next_used: u16, event_idx: bool) -> Self {
        Self {
            layout,
            next_avail,
            next_used,
            asked_used: next_used,
            event_idx,
        }
    }

    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    pub(crate) fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Requests that the driver has made available and that were not taken.
    pub(crate) fn available(&self, view: &View<'_>) -> Result<u16, BadRing> {
        let index = load(&view.avail, INDEX, Ordering::Acquire)?;
        let available = index.wrapping_sub(self.next_avail);
        if available > self.layout.size {
            return Err(BadRing::Index {
                available,
                size: self.layout.size,
            });
        }
        Ok(available)
    }

    /// Takes the next request: the head of its chain. Only as many as are [`available`](Self::available).
    pub(crate) fn take(&mut self, view: &View<'_>) -> Result<u16, BadRing> {
        let size = self.layout.size;
        let slot = usize::from(self.next_avail & (size - 1));
        let head = load(
            &view.avail,
            HEADER_BYTES + slot * AVAIL_ENTRY_BYTES,
            Ordering::Relaxed,
        )?;
        if head >= size {
            return Err(BadRing::Head { head, size });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(head)
    }

    /// Puts a request into the used ring, of which the driver sees nothing yet. `written`: bytes that the device has
    /// written from the beginning of what it may write.
    pub(crate) fn put_used(
        &mut self,
        view: &View<'_>,
        head: u16,
        written: u32,
    ) -> Result<(), BadRing> {
        let (at, _) = self.layout.used_entry(self.next_used);
        let mut entry = [0; USED_ENTRY_BYTES];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        view.used
            .write_slice(&entry, at)
            .map_err(|_| BadRing::Memory)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver everything that was put into the used ring.
    pub(crate) fn publish(&self, view: &View<'_>) -> Result<(), BadRing> {
        store(&view.used, INDEX, self.next_used, Ordering::Release)
    }

    /// Whether the driver wants to be told of what was published since this was last asked.
    pub(crate) fn wants_call(&mut self, view: &View<'_>) -> Result<bool, BadRing> {
        // The index before the driver's wish: the driver does it the other way round, so one of both sees the other.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.asked_used, self.next_used);
        if !self.event_idx {
            let flags = load(&view.avail, 0, Ordering::Relaxed)?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = load(&view.avail, self.layout.used_event(), Ordering::Relaxed)?;
        // Is the entry that the driver waits for among those between `before` and now?
        let since_event = self.next_used.wrapping_sub(event).wrapping_sub(1);
        Ok(since_event < self.next_used.wrapping_sub(before))
    }

    /// Asks the driver to kick for the next request; true when there is one already, so that it may not.
    pub(crate) fn want_kicks(&self, view: &View<'_>) -> Result<bool, BadRing> {
        if self.event_idx {
            let at = self.layout.avail_event();
            store(&view.used, at, self.next_avail, Ordering::Relaxed)?;
        } else {
            store(&view.used, 0, 0, Ordering::Relaxed)?;
        }
        // As in `wants_call`, with roles exchanged.
        fence(Ordering::SeqCst);
        Ok(self.available(view)? > 0)
    }

    pub(crate) fn uses_event_idx(&self) -> bool {
        self.event_idx
    }

    /// Tells the driver that kicks are of no use for now, for rings without event indices.
    pub(crate) fn refuse_kicks(&self, view: &View<'_>) -> Result<(), BadRing> {
        let flags = u16::try_from(VRING_USED_F_NO_NOTIFY).expect("a flag of 16 bits");
        store(&view.used, 0, flags, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
