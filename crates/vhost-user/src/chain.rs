//! Descriptor chains: from a head in the descriptor table to ranges of the guest's memory.
//!
//! Everything here was written by the guest, who may be changing it meanwhile: each descriptor is copied once, and
//! judged by the copy. A chain that breaks the rules of virtio 1.2, 2.7.5 ("The Virtqueue Descriptor Table") is
//! refused as a whole; whether its ranges are in the guest's memory is asked when they are used.
//!
//! (The iterator of the virtio-queue crate cannot tell the end of a chain from a loop or a bad index, and cannot begin
//! at a head of our choosing, as resubmission after a reconnect has to.)

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileSlice};

use crate::limits::CHAIN_DESCRIPTORS;

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_BYTES: usize = 16;

/// Start and bytes of a range of the guest's memory.
pub(crate) type Range = (GuestAddress, usize);

/// Which rule a chain breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadChain {
    #[error("descriptor {0} is beyond the end of its table")]
    Index(u16),
    #[error("a descriptor chain is a loop, or has more than {CHAIN_DESCRIPTORS} descriptors")]
    TooLong,
    #[error("a descriptor for the device to read comes after one for it to write")]
    Order,
    #[error("an indirect table of {0} bytes")]
    TableBytes(u32),
    #[error("an indirect table lies outside the guest's memory")]
    TableOutside,
    #[error("an indirect table within an indirect table, or amid a chain that goes on")]
    Nested,
    #[error("a chain of 4 GiB or more")]
    Bytes,
}

struct Descriptor {
    address: GuestAddress,
    len: u32,
    flags: u32,
    next: u16,
}

impl Descriptor {
    fn decode(bytes: [u8; DESCRIPTOR_BYTES]) -> Self {
        let (address, rest) = bytes.split_first_chunk().expect("16 bytes have 8");
        let (len, rest) = rest.split_first_chunk().expect("8 bytes have 4");
        let (flags, rest) = rest.split_first_chunk().expect("4 bytes have 2");
        let (next, _) = rest.split_first_chunk().expect("2 bytes are 2");
        Self {
            address: GuestAddress(u64::from_le_bytes(*address)),
            len: u32::from_le_bytes(*len),
            flags: u16::from_le_bytes(*flags).into(),
            next: u16::from_le_bytes(*next),
        }
    }
}

/// A chain taken apart. Kept for its capacity.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// What the device reads.
    pub(crate) readable: Vec<Range>,
    /// What it writes.
    pub(crate) writable: Vec<Range>,
    /// A copy of an indirect table.
    table: Vec<u8>,
}

impl Chain {
    /// Takes apart the chain that begins at `head` of the descriptor table.
    pub(crate) fn read(
        &mut self,
        memory: &GuestMemoryMmap,
        descriptors: &VolatileSlice<'_>,
        head: u16,
    ) -> Result<(), BadChain> {
        self.readable.clear();
        self.writable.clear();
        let mut walk = Walk::default();
        let direct = |index: u16| {
            let mut bytes = [0; DESCRIPTOR_BYTES];
            let start = usize::from(index) * DESCRIPTOR_BYTES;
            let read = descriptors.read_slice(&mut bytes, start);
            read.map(|()| Descriptor::decode(bytes))
                .map_err(|_| BadChain::Index(index))
        };
        let mut next = Some(head);
        while let Some(index) = next {
            let descriptor = direct(index)?;
            if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
                return self.read_indirect(memory, &descriptor, &mut walk);
            }
            next = walk.step(&descriptor, &mut self.readable, &mut self.writable)?;
        }
        Ok(())
    }

    fn read_indirect(
        &mut self,
        memory: &GuestMemoryMmap,
        descriptor: &Descriptor,
        walk: &mut Walk,
    ) -> Result<(), BadChain> {
        if descriptor.flags & VRING_DESC_F_NEXT != 0 {
            return Err(BadChain::Nested);
        }
        let bytes = usize::try_from(descriptor.len).unwrap_or(usize::MAX);
        if bytes == 0
            || !bytes.is_multiple_of(DESCRIPTOR_BYTES)
            || bytes > CHAIN_DESCRIPTORS * DESCRIPTOR_BYTES
        {
            return Err(BadChain::TableBytes(descriptor.len));
        }
        // In one go: what the guest changes meanwhile makes no difference.
        self.table.resize(bytes, 0);
        memory
            .read_slice(&mut self.table, descriptor.address)
            .map_err(|_| BadChain::TableOutside)?;
        let (table, _) = self.table.as_chunks::<DESCRIPTOR_BYTES>();
        let mut next = Some(0);
        while let Some(index) = next {
            let bytes = table
                .get(usize::from(index))
                .ok_or(BadChain::Index(index))?;
            let descriptor = Descriptor::decode(*bytes);
            if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
                return Err(BadChain::Nested);
            }
            next = walk.step(&descriptor, &mut self.readable, &mut self.writable)?;
        }
        Ok(())
    }

    /// Copies the first `bytes.len()` bytes that the device reads, and takes them off the chain. False when there are
    /// not as many, or they are not in the guest's memory.
    pub(crate) fn take_front(&mut self, memory: &GuestMemoryMmap, bytes: &mut [u8]) -> bool {
        let mut filled = 0;
        let mut used_up = 0;
        for (address, len) in &mut self.readable {
            let count = (*len).min(bytes.len() - filled);
            if memory
                .read_slice(&mut bytes[filled..filled + count], *address)
                .is_err()
            {
                return false;
            }
            filled += count;
            *len -= count;
            if *len > 0 {
                // Within the range, whose end fits the address space: it was just read up to here.
                address.0 += count as u64;
                break;
            }
            used_up += 1;
        }
        self.readable.drain(..used_up);
        filled == bytes.len()
    }

    /// Takes the last byte that the device writes off the chain: its address.
    pub(crate) fn take_last_writable(&mut self) -> Option<GuestAddress> {
        let (address, len) = self.writable.last_mut()?;
        *len -= 1;
        let last = address.0.checked_add(*len as u64);
        if *len == 0 {
            self.writable.pop();
        }
        last.map(GuestAddress)
    }
}

/// Bytes of all ranges.
pub(crate) fn total(ranges: &[Range]) -> usize {
    ranges.iter().map(|&(_, len)| len).sum()
}

/// What has been seen of a chain so far.
#[derive(Default)]
struct Walk {
    descriptors: usize,
    bytes: u32,
}

impl Walk {
    /// Adds a descriptor to the chain; returns the index of the one after it.
    fn step(
        &mut self,
        descriptor: &Descriptor,
        readable: &mut Vec<Range>,
        writable: &mut Vec<Range>,
    ) -> Result<Option<u16>, BadChain> {
        self.descriptors += 1;
        // A loop ends here too.
        if self.descriptors > CHAIN_DESCRIPTORS {
            return Err(BadChain::TooLong);
        }
        self.bytes = self
            .bytes
            .checked_add(descriptor.len)
            .ok_or(BadChain::Bytes)?;
        let is_writable = descriptor.flags & VRING_DESC_F_WRITE != 0;
        if !is_writable && !writable.is_empty() {
            return Err(BadChain::Order);
        }
        let list = if is_writable { writable } else { readable };
        if descriptor.len > 0 {
            let len = usize::try_from(descriptor.len).map_err(|_| BadChain::Bytes)?;
            list.push((descriptor.address, len));
        }
        let goes_on = descriptor.flags & VRING_DESC_F_NEXT != 0;
        Ok(goes_on.then_some(descriptor.next))
    }
}

#[cfg(test)]
mod tests;
