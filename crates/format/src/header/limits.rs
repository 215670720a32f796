//! The limits of the header's fields, kept by parsing and by encoding alike.

use super::{
    BitmapsExtension, Compression, HEADER_BYTES_V2, HEADER_BYTES_V3_MIN, Header, autoclear,
    extension, incompatible,
};
use crate::{Error, HostOffset, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, names};

/// Largest L1 table, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Most bitmaps.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory, in bytes.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * 1024;
/// Longest name of a backing format, in bytes.
pub const MAX_BACKING_FORMAT_BYTES: usize = 15;

/// Fixed part of a snapshot table entry: bounds the table's length from below.
const SNAPSHOT_ENTRY_BYTES: u64 = 40;
const MAX_FILE_OFFSET: u64 = i64::MAX as u64;
/// Smallest cluster that has room for 32 subclusters of a sector.
const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;
/// `crypt_method` of LUKS, the only one with a header extension.
const CRYPT_LUKS: u32 = 2;

/// The fields that everything else is measured by.
pub(crate) fn check_version(version: u32) -> Result<(), Error> {
    if version != 2 && version != 3 {
        return Err(Error::invalid("version", version, "2 or 3"));
    }
    Ok(())
}

pub(crate) fn check_cluster_bits(cluster_bits: u32) -> Result<(), Error> {
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        let expected = format!("{MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}");
        return Err(Error::invalid("cluster_bits", cluster_bits, expected));
    }
    Ok(())
}

pub(crate) fn check_refcount_order(version: u32, refcount_order: u32) -> Result<(), Error> {
    if refcount_order > 6 {
        return Err(Error::invalid(
            "refcount_order",
            refcount_order,
            "0 to 6 (refcounts of 1 to 64 bits)",
        ));
    }
    if version == 2 && refcount_order != 4 {
        return Err(Error::invalid(
            "refcount_order",
            refcount_order,
            "4 in version 2",
        ));
    }
    Ok(())
}

pub(super) fn check_header_bytes(
    version: u32,
    header_bytes: u32,
    cluster_bits: u32,
) -> Result<(), Error> {
    if version == 2 {
        if header_bytes != HEADER_BYTES_V2 {
            return Err(Error::invalid(
                "header_length",
                header_bytes,
                "72 in version 2",
            ));
        }
        return Ok(());
    }
    let cluster_bytes = 1u32 << cluster_bits;
    if !(HEADER_BYTES_V3_MIN..=cluster_bytes).contains(&header_bytes)
        || !header_bytes.is_multiple_of(8)
    {
        let expected =
            format!("a multiple of 8, {HEADER_BYTES_V3_MIN} to the cluster size {cluster_bytes}");
        return Err(Error::invalid("header_length", header_bytes, expected));
    }
    Ok(())
}

impl Header {
    /// Checks every limit that does not depend on the file's length.
    pub(super) fn check_limits(&self) -> Result<(), Error> {
        check_version(self.version)?;
        check_cluster_bits(self.cluster_bits)?;
        check_header_bytes(self.version, self.header_bytes, self.cluster_bits)?;
        self.check_features()?;
        self.check_tables()?;
        self.check_names()?;
        self.check_extensions()
    }

    pub(super) fn check_features(&self) -> Result<(), Error> {
        check_refcount_order(self.version, self.refcount_order)?;
        let bits = self.incompatible | self.compatible | self.autoclear;
        if self.version == 2 && bits != 0 {
            return Err(Error::invalid("feature bits", bits, "none in version 2"));
        }
        let compression_bit = self.incompatible & incompatible::COMPRESSION != 0;
        if compression_bit != (self.compression != Compression::Deflate) {
            let expected = "non-zero exactly when incompatible bit 3 is set";
            let value = u64::from(self.compression != Compression::Deflate);
            return Err(Error::invalid("compression_type", value, expected));
        }
        let after_compression = self.header_bytes > HEADER_BYTES_V3_MIN;
        if !after_compression && (compression_bit || !self.unknown_header_bytes.is_empty()) {
            return Err(Error::invalid(
                "header_length",
                self.header_bytes,
                "more than 104 to hold the compression type",
            ));
        }
        if self.incompatible & incompatible::EXTENDED_L2 != 0
            && self.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS
        {
            let expected =
                format!("at least {MIN_EXTENDED_L2_CLUSTER_BITS} with extended L2 entries");
            return Err(Error::invalid("cluster_bits", self.cluster_bits, expected));
        }
        Ok(())
    }

    pub(super) fn check_tables(&self) -> Result<(), Error> {
        let cluster_bytes = 1u64 << self.cluster_bits;
        let table_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            let expected = format!(
                "at most {} (8 MiB)",
                MAX_REFCOUNT_TABLE_BYTES / cluster_bytes
            );
            return Err(Error::invalid(
                "refcount_table_clusters",
                self.refcount_table_clusters,
                expected,
            ));
        }
        self.check_table("refcount_table_offset", self.refcount_table, table_bytes)?;

        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::invalid(
                "nb_snapshots",
                self.snapshot_count,
                format!("at most {MAX_SNAPSHOTS}"),
            ));
        }
        let table_bytes = u64::from(self.snapshot_count) * SNAPSHOT_ENTRY_BYTES;
        self.check_table("snapshots_offset", self.snapshot_table, table_bytes)?;

        let table_bytes = u64::from(self.l1_entries) * 8;
        if table_bytes > MAX_L1_BYTES {
            let expected = format!("at most {} (32 MiB)", MAX_L1_BYTES / 8);
            return Err(Error::invalid("l1_size", self.l1_entries, expected));
        }
        self.check_table("l1_table_offset", self.l1_table, table_bytes)?;
        let needed = self.geometry().l1_entries_for(self.size);
        if needed > MAX_L1_BYTES / 8 {
            let most = (MAX_L1_BYTES / 8).saturating_mul(self.geometry().l2_coverage_bytes());
            return Err(Error::invalid(
                "size",
                self.size,
                format!("at most {most} with this cluster size"),
            ));
        }
        if u64::from(self.l1_entries) < needed {
            let expected = format!(
                "at least {needed} to map the virtual size of {} bytes",
                self.size
            );
            return Err(Error::invalid("l1_size", self.l1_entries, expected));
        }
        Ok(())
    }

    /// Alignment and upper bound of a table. An empty one may lie anywhere aligned, a full one not on the header.
    fn check_table(&self, field: &'static str, table: HostOffset, bytes: u64) -> Result<(), Error> {
        let cluster_bytes = 1u64 << self.cluster_bits;
        if !table.0.is_multiple_of(cluster_bytes) {
            return Err(Error::invalid(
                field,
                table.0,
                format!("a multiple of the cluster size {cluster_bytes}"),
            ));
        }
        if table.0 > MAX_FILE_OFFSET - bytes {
            let expected = format!(
                "at most {} for a table of {bytes} bytes",
                MAX_FILE_OFFSET - bytes
            );
            return Err(Error::invalid(field, table.0, expected));
        }
        if table.0 == 0 && bytes != 0 {
            return Err(Error::invalid(field, 0u32, "a cluster behind the header"));
        }
        Ok(())
    }

    pub(super) fn check_names(&self) -> Result<(), Error> {
        if let Some(backing) = &self.backing {
            names::judge_stored(&backing.name).map_err(|fault| Error::Name {
                field: "backing file name",
                fault,
            })?;
            if let Some(format) = &backing.format {
                check_backing_format(format.as_bytes())?;
            }
        }
        if let Some(name) = &self.data_file {
            names::judge_stored(name).map_err(|fault| Error::Name {
                field: "data file name",
                fault,
            })?;
        }
        Ok(())
    }

    pub(super) fn check_extensions(&self) -> Result<(), Error> {
        if let Some(bitmaps) = &self.bitmaps {
            self.check_bitmaps(bitmaps)?;
        }
        if let Some((offset, bytes)) = self.luks {
            if self.crypt_method != CRYPT_LUKS {
                let expected = "2 (LUKS), because there is a LUKS header extension";
                return Err(Error::invalid("crypt_method", self.crypt_method, expected));
            }
            if bytes > MAX_FILE_OFFSET {
                return Err(Error::invalid(
                    "LUKS header length",
                    bytes,
                    format!("at most {MAX_FILE_OFFSET}"),
                ));
            }
            self.check_table("LUKS header offset", offset, bytes)?;
        }
        for entry in &self.feature_names {
            let free_of_nul = !entry.name.contains(&0);
            if entry.name.len() > super::FEATURE_NAME_BYTES - 2 || !free_of_nul {
                let expected = "a name of at most 46 bytes without NUL";
                return Err(Error::invalid(
                    "feature name",
                    entry.name.len() as u64,
                    expected,
                ));
            }
        }
        if self
            .unknown_extensions
            .iter()
            .any(|(kind, _)| *kind == extension::END)
        {
            return Err(Error::invalid(
                "header extension type",
                extension::END,
                "anything but the end marker",
            ));
        }
        Ok(())
    }

    fn check_bitmaps(&self, bitmaps: &BitmapsExtension) -> Result<(), Error> {
        if self.autoclear & autoclear::BITMAPS == 0 {
            let expected = "bit 0 set, because there is a bitmaps extension";
            return Err(Error::invalid(
                "autoclear_features",
                self.autoclear,
                expected,
            ));
        }
        if bitmaps.count == 0 || bitmaps.count > MAX_BITMAPS {
            return Err(Error::invalid(
                "nb_bitmaps",
                bitmaps.count,
                format!("1 to {MAX_BITMAPS}"),
            ));
        }
        if bitmaps.directory_bytes == 0 || bitmaps.directory_bytes > MAX_BITMAP_DIRECTORY_BYTES {
            let expected = format!("1 to {MAX_BITMAP_DIRECTORY_BYTES}");
            return Err(Error::invalid(
                "bitmap_directory_size",
                bitmaps.directory_bytes,
                expected,
            ));
        }
        self.check_table(
            "bitmap_directory_offset",
            bitmaps.directory,
            bitmaps.directory_bytes,
        )
    }
}

/// The bytes of a backing format's name.
pub(super) fn check_backing_format(format: &[u8]) -> Result<(), Error> {
    if format.is_empty() || format.len() > MAX_BACKING_FORMAT_BYTES {
        let expected = format!("1 to {MAX_BACKING_FORMAT_BYTES} bytes");
        return Err(Error::invalid(
            "length of the backing format",
            format.len() as u64,
            expected,
        ));
    }
    names::judge_stored(format).map_err(|fault| Error::Name {
        field: "backing format",
        fault,
    })
}
