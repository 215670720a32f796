//! L1 and L2 table entries (specification: "Cluster mapping").

use crate::{Geometry, HostOffset};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Why an entry is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EntryError {
    /// Reserved bits are set.
    ReservedBits(u64),
    /// The offset is no multiple of the cluster size.
    Unaligned(u64),
}

impl std::fmt::Display for EntryError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ReservedBits(raw) => write!(f, "reserved bits set in entry {raw:#018x}"),
            Self::Unaligned(raw) => write!(f, "offset of entry {raw:#018x} is not cluster-aligned"),
        }
    }
}

impl std::error::Error for EntryError {}

/// An L1 entry: where an L2 table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// Host offset of the L2 table, cluster-aligned.
    pub table: HostOffset,
    /// Refcount of the table is exactly one: it may be changed in place.
    pub copied: bool,
}

impl L1Entry {
    /// Decodes an entry; `None` where no L2 table is allocated. COPIED says nothing of a table that is not there.
    ///
    /// # Errors
    /// Reserved bits, an unaligned offset.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Option<Self>, EntryError> {
        if raw & !COPIED == 0 {
            return Ok(None);
        }
        if raw & L1_RESERVED != 0 {
            return Err(EntryError::ReservedBits(raw));
        }
        let table = raw & OFFSET_MASK;
        if geometry.in_cluster(table) != 0 {
            return Err(EntryError::Unaligned(raw));
        }
        Ok(Some(Self {
            table: HostOffset(table),
            copied: raw & COPIED != 0,
        }))
    }

    /// The entry as it stands on disk, in host byte order.
    #[must_use]
    pub fn encode(self) -> u64 {
        debug_assert_eq!(self.table.0 & !OFFSET_MASK, 0);
        self.table.0 | if self.copied { COPIED } else { 0 }
    }
}

/// The words of an L2 entry: the standard entry, and the subcluster bitmap of an extended one (else 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Raw {
    /// The first 8 bytes: the cluster descriptor.
    pub entry: u64,
    /// Bytes 8 to 15 of an extended entry: the subcluster bitmap.
    pub subclusters: u64,
}

/// Where compressed data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CompressedExtent {
    /// First byte, unaligned.
    pub offset: HostOffset,
    /// Bytes that may hold the stream: up to the end of its last 512-byte sector. Decoding stops after one
    /// cluster of output; the last sector may pass the end of the file.
    pub bytes: u64,
}

impl CompressedExtent {
    /// Whether an L2 entry can hold this extent: large clusters leave fewer bits for the offset (49, half a
    /// PiB, with 2 MiB). Every decoded extent is.
    #[must_use]
    pub fn is_encodable(&self, geometry: &Geometry) -> bool {
        let fits = self.offset.0 >> compressed_offset_bits(geometry) == 0;
        // Twice a cluster is what the sector count can say.
        let most_bytes = 2 * geometry.cluster_bytes() - self.offset.0 % 512;
        fits && (1..=most_bytes).contains(&self.bytes)
    }
}

/// Bits of the offset in a compressed cluster's descriptor; the sector count has the rest, up to bit 61.
fn compressed_offset_bits(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits() - 8)
}

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing here: reads from the backing file, or zeroes.
    Unallocated,
    /// Reads as zeroes, no host cluster.
    Zero,
    /// Reads as zeroes; a host cluster is preallocated.
    ZeroAllocated {
        /// The preallocated host cluster.
        host: HostOffset,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// Data in a host cluster.
    Data {
        /// The host cluster.
        host: HostOffset,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// A compressed cluster.
    Compressed(CompressedExtent),
}

impl L2Entry {
    /// Decodes a standard (8-byte) entry.
    ///
    /// COPIED without an offset says nothing: the cluster is not allocated, as QEMU has it. The zero flag, which
    /// version 2 does not define, means zeroes there too: the one thing that its writer can have meant, and it
    /// never shows what a host cluster holds.
    ///
    /// # Errors
    /// Reserved bits, an unaligned offset.
    pub fn decode(raw: L2Raw, geometry: &Geometry) -> Result<Self, EntryError> {
        let raw = raw.entry;
        if raw & COMPRESSED != 0 {
            // COPIED must not be set on a compressed cluster, but readers accept it.
            let x = compressed_offset_bits(geometry);
            let offset = raw & ((1 << x) - 1);
            let additional_sectors = (raw & (COMPRESSED - 1)) >> x;
            let bytes = (additional_sectors + 1) * 512 - offset % 512;
            return Ok(Self::Compressed(CompressedExtent {
                offset: HostOffset(offset),
                bytes,
            }));
        }
        if raw & L2_RESERVED != 0 {
            return Err(EntryError::ReservedBits(raw));
        }
        let zero = raw & ZERO != 0;
        let host = HostOffset(raw & OFFSET_MASK);
        if geometry.in_cluster(host.0) != 0 {
            return Err(EntryError::Unaligned(raw));
        }
        let copied = raw & COPIED != 0;
        match (zero, host.0) {
            (false, 0) => Ok(Self::Unallocated),
            (true, 0) => Ok(Self::Zero),
            (false, _) => Ok(Self::Data { host, copied }),
            (true, _) => Ok(Self::ZeroAllocated { host, copied }),
        }
    }

    /// The standard (8-byte) entry as it stands on disk, in host byte order. A compressed extent must be
    /// [encodable](CompressedExtent::is_encodable).
    #[must_use]
    pub fn encode(self, geometry: &Geometry) -> L2Raw {
        let copied_bit = |copied: bool| if copied { COPIED } else { 0 };
        let entry = match self {
            Self::Unallocated => 0,
            Self::Zero => ZERO,
            Self::ZeroAllocated { host, copied } => host.0 | copied_bit(copied) | ZERO,
            Self::Data { host, copied } => host.0 | copied_bit(copied),
            Self::Compressed(extent) => {
                debug_assert!(extent.is_encodable(geometry), "{extent:?}");
                let x = compressed_offset_bits(geometry);
                let last = extent.offset.0 + extent.bytes - 1;
                let additional_sectors = last / 512 - extent.offset.0 / 512;
                COMPRESSED | (additional_sectors << x) | extent.offset.0
            }
        };
        L2Raw {
            entry,
            subclusters: 0,
        }
    }
}
