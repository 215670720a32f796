//! From a [`Header`] to the bytes of cluster 0.

use super::{
    Compression, FEATURE_NAME_BYTES, FeatureKind, HEADER_BYTES_V3_MIN, Header, MAGIC, extension,
};
use crate::Error;

impl Header {
    /// The whole of cluster 0, exactly one cluster long: header, extensions, backing file name, zeroes.
    ///
    /// Unknown fields and extensions are written back as they were read; `parse` of the result equals `self`.
    /// (An entry of [`unknown_extensions`](Self::unknown_extensions) is left out where a field of the same type
    /// replaces it.) It must be written in one write: a mixture of an old and a new header is no header.
    ///
    /// # Errors
    /// [`Error::NoSpace`] where it does not fit; the errors of [`parse`](Self::parse) where a field was set to
    /// what the format does not allow.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        self.check_limits()?;
        let mut out = self.encode_fields();
        self.encode_extensions(&mut out)?;
        if let Some(backing) = &self.backing {
            let offset = out.len() as u64;
            out[8..16].copy_from_slice(&offset.to_be_bytes());
            out[16..20].copy_from_slice(&length32(&backing.name)?.to_be_bytes());
            out.extend_from_slice(&backing.name);
        }
        let cluster_bytes = 1usize << self.cluster_bits;
        if out.len() > cluster_bytes {
            let (need_bytes, cluster_bytes) = (out.len() as u64, cluster_bytes as u64);
            return Err(Error::NoSpace {
                need_bytes,
                cluster_bytes,
            });
        }
        out.resize(cluster_bytes, 0);
        Ok(out)
    }

    fn encode_fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 << self.cluster_bits);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.version.to_be_bytes());
        // Filled in once the backing file name's place is known.
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&self.cluster_bits.to_be_bytes());
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.crypt_method.to_be_bytes());
        out.extend_from_slice(&self.l1_entries.to_be_bytes());
        out.extend_from_slice(&self.l1_table.0.to_be_bytes());
        out.extend_from_slice(&self.refcount_table.0.to_be_bytes());
        out.extend_from_slice(&self.refcount_table_clusters.to_be_bytes());
        out.extend_from_slice(&self.snapshot_count.to_be_bytes());
        out.extend_from_slice(&self.snapshot_table.0.to_be_bytes());
        if self.version >= 3 {
            out.extend_from_slice(&self.incompatible.to_be_bytes());
            out.extend_from_slice(&self.compatible.to_be_bytes());
            out.extend_from_slice(&self.autoclear.to_be_bytes());
            out.extend_from_slice(&self.refcount_order.to_be_bytes());
            out.extend_from_slice(&self.header_bytes.to_be_bytes());
            if self.header_bytes > HEADER_BYTES_V3_MIN {
                out.push(match self.compression {
                    Compression::Deflate => 0,
                    Compression::Zstd => 1,
                });
                out.extend_from_slice(&self.unknown_header_bytes);
            }
        }
        out.resize(self.header_bytes as usize, 0);
        out
    }

    /// In the order in which QEMU writes them, then those kept.
    fn encode_extensions(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        let backing_format = self
            .backing
            .as_ref()
            .and_then(|backing| backing.format.as_ref());
        if let Some(format) = backing_format {
            push_extension(out, extension::BACKING_FORMAT, format.as_bytes())?;
        }
        if let Some(name) = &self.data_file {
            push_extension(out, extension::DATA_FILE, name)?;
        }
        if let Some((offset, bytes)) = self.luks {
            let value = [offset.0.to_be_bytes(), bytes.to_be_bytes()].concat();
            push_extension(out, extension::LUKS, &value)?;
        }
        if !self.feature_names.is_empty() {
            push_extension(out, extension::FEATURE_NAMES, &self.encode_feature_names())?;
        }
        if let Some(bitmaps) = &self.bitmaps {
            let mut value = [0; 24];
            value[0..4].copy_from_slice(&bitmaps.count.to_be_bytes());
            value[8..16].copy_from_slice(&bitmaps.directory_bytes.to_be_bytes());
            value[16..24].copy_from_slice(&bitmaps.directory.0.to_be_bytes());
            push_extension(out, extension::BITMAPS, &value)?;
        }
        for (kind, value) in &self.unknown_extensions {
            let replaced = match *kind {
                extension::BACKING_FORMAT => self.backing.is_some(),
                extension::DATA_FILE => self.data_file.is_some(),
                extension::LUKS => self.luks.is_some(),
                extension::FEATURE_NAMES => !self.feature_names.is_empty(),
                extension::BITMAPS => self.bitmaps.is_some(),
                _ => false,
            };
            if !replaced {
                push_extension(out, *kind, value)?;
            }
        }
        // The end marker may be left out only where the cluster's end takes its place.
        let cluster_bytes = 1usize << self.cluster_bits;
        if self.backing.is_some() || out.len() < cluster_bytes {
            push_extension(out, extension::END, &[])?;
        }
        Ok(())
    }

    fn encode_feature_names(&self) -> Vec<u8> {
        let mut table = Vec::with_capacity(self.feature_names.len() * FEATURE_NAME_BYTES);
        for entry in &self.feature_names {
            let start = table.len();
            table.push(match entry.kind {
                FeatureKind::Incompatible => 0,
                FeatureKind::Compatible => 1,
                FeatureKind::Autoclear => 2,
                FeatureKind::Other(other) => other,
            });
            table.push(entry.bit);
            table.extend_from_slice(&entry.name);
            table.resize(start + FEATURE_NAME_BYTES, 0);
        }
        table
    }
}

fn push_extension(out: &mut Vec<u8>, kind: u32, value: &[u8]) -> Result<(), Error> {
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length32(value)?.to_be_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(8), 0);
    Ok(())
}

fn length32(value: &[u8]) -> Result<u32, Error> {
    let length = value.len() as u64;
    u32::try_from(length)
        .map_err(|_| Error::invalid("header extension length", length, "less than 4 GiB"))
}
