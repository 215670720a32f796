//! Changing fields of a header that is on disk, and nothing else in it.
//!
//! Other programs lay headers out in their own ways: gaps, the order of extensions, extensions that
//! nobody here knows, the place of the backing file's name. [`Header::encode`] makes the layout of a
//! new image, so it is not a way to change an old one. A [`HeaderChange`] is put into the bytes that
//! are there with [`Header::patch`].

use super::{HEADER_BYTES_V3_MIN, Header, MAGIC};
use crate::bytes::{be32, be64};
use crate::{Error, HostOffset};

/// A field of the header, or two that only make sense together, with the new value.
///
/// All of them lie in the header's first [`SECTOR_BYTES`](Self::SECTOR_BYTES), so several changes
/// reach the disk together with one write of that sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderChange {
    /// The virtual size in bytes.
    Size(u64),
    /// Where the active L1 table lies, and the number of its entries.
    L1Table(HostOffset, u32),
    /// Where the refcount table lies, and the number of its clusters.
    RefcountTable(HostOffset, u32),
    /// The incompatible feature bits. Version 3 only.
    Incompatible(u64),
    /// The autoclear feature bits. Version 3 only.
    Autoclear(u64),
}

const SIZE_AT: usize = 24;
const L1_ENTRIES_AT: usize = 36;
const L1_TABLE_AT: usize = 40;
const REFCOUNT_TABLE_AT: usize = 48;
const REFCOUNT_TABLE_CLUSTERS_AT: usize = 56;
const INCOMPATIBLE_AT: usize = 72;
const AUTOCLEAR_AT: usize = 88;

// One sector holds every field that can be changed: a power cut leaves all changes or none.
const _: () = assert!(AUTOCLEAR_AT + 8 <= HEADER_BYTES_V3_MIN as usize);
const _: () = assert!(HEADER_BYTES_V3_MIN as usize <= HeaderChange::SECTOR_BYTES);

impl HeaderChange {
    /// Bytes at the start of the image that hold all fields: what storage writes whole or not at all.
    pub const SECTOR_BYTES: usize = 512;

    fn name(self) -> &'static str {
        match self {
            Self::Size(_) => "size",
            Self::L1Table(..) => "l1_table_offset",
            Self::RefcountTable(..) => "refcount_table_offset",
            Self::Incompatible(_) => "incompatible_features",
            Self::Autoclear(_) => "autoclear_features",
        }
    }

    /// The same field as bytes of a header have it.
    fn read(self, bytes: &[u8]) -> Self {
        match self {
            Self::Size(_) => Self::Size(be64(bytes, SIZE_AT)),
            Self::L1Table(..) => Self::L1Table(
                HostOffset(be64(bytes, L1_TABLE_AT)),
                be32(bytes, L1_ENTRIES_AT),
            ),
            Self::RefcountTable(..) => Self::RefcountTable(
                HostOffset(be64(bytes, REFCOUNT_TABLE_AT)),
                be32(bytes, REFCOUNT_TABLE_CLUSTERS_AT),
            ),
            Self::Incompatible(_) => Self::Incompatible(be64(bytes, INCOMPATIBLE_AT)),
            Self::Autoclear(_) => Self::Autoclear(be64(bytes, AUTOCLEAR_AT)),
        }
    }

    fn write(self, bytes: &mut [u8]) {
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        match self {
            Self::Size(size) => put(SIZE_AT, &size.to_be_bytes()),
            Self::L1Table(table, entries) => {
                put(L1_ENTRIES_AT, &entries.to_be_bytes());
                put(L1_TABLE_AT, &table.0.to_be_bytes());
            }
            Self::RefcountTable(table, clusters) => {
                put(REFCOUNT_TABLE_AT, &table.0.to_be_bytes());
                put(REFCOUNT_TABLE_CLUSTERS_AT, &clusters.to_be_bytes());
            }
            Self::Incompatible(bits) => put(INCOMPATIBLE_AT, &bits.to_be_bytes()),
            Self::Autoclear(bits) => put(AUTOCLEAR_AT, &bits.to_be_bytes()),
        }
    }

    /// The same field as the header has it.
    fn of(self, header: &Header) -> Self {
        match self {
            Self::Size(_) => Self::Size(header.size),
            Self::L1Table(..) => Self::L1Table(header.l1_table, header.l1_entries),
            Self::RefcountTable(..) => {
                Self::RefcountTable(header.refcount_table, header.refcount_table_clusters)
            }
            Self::Incompatible(_) => Self::Incompatible(header.incompatible),
            Self::Autoclear(_) => Self::Autoclear(header.autoclear),
        }
    }

    fn apply(self, header: &mut Header) {
        match self {
            Self::Size(size) => header.size = size,
            Self::L1Table(table, entries) => {
                (header.l1_table, header.l1_entries) = (table, entries);
            }
            Self::RefcountTable(table, clusters) => {
                (header.refcount_table, header.refcount_table_clusters) = (table, clusters);
            }
            Self::Incompatible(bits) => header.incompatible = bits,
            Self::Autoclear(bits) => header.autoclear = bits,
        }
    }

    fn needs_version_3(self) -> bool {
        matches!(self, Self::Incompatible(_) | Self::Autoclear(_))
    }
}

impl Header {
    /// Changes fields in the bytes of this header on disk, and returns the header that they make. All
    /// other bytes stay as they are. `sector` holds the first bytes of the image, as they are on disk
    /// now: at least [`HeaderChange::SECTOR_BYTES`].
    ///
    /// # Errors
    /// [`Error::HeaderChanged`] where a field on disk is not what this header says: another program
    /// has written it, and what it meant is not to be overwritten. [`Error::Invalid`] where the result
    /// breaks a limit of the format, or version 2 lacks the field. `sector` is unchanged then.
    pub fn patch(&self, changes: &[HeaderChange], sector: &mut [u8]) -> Result<Self, Error> {
        if sector.len() < HeaderChange::SECTOR_BYTES {
            return Err(Error::Truncated {
                structure: "the header's sector",
                need_bytes: HeaderChange::SECTOR_BYTES as u64,
                have_bytes: sector.len() as u64,
            });
        }
        if !sector.starts_with(&MAGIC) || be32(sector, 4) != self.version {
            return Err(Error::HeaderChanged { field: "version" });
        }
        let mut header = self.clone();
        for change in changes {
            if change.needs_version_3() && self.version < 3 {
                let expected = "3, to have feature bits";
                return Err(Error::invalid("version", self.version, expected));
            }
            if change.read(sector) != change.of(self) {
                let field = change.name();
                return Err(Error::HeaderChanged { field });
            }
            change.apply(&mut header);
        }
        header.check_tables()?;
        for change in changes {
            change.write(sector);
        }
        Ok(header)
    }
}
