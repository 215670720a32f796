//! The header: everything that cluster 0 holds (specification: "Header", "Header extensions").
//!
//! [`Header::parse`] turns the bytes of cluster 0 into a [`Header`] whose fields keep the format's
//! limits, and [`Header::encode`] makes the cluster 0 of a new image. What is on disk is changed by
//! [`Header::patch`], which leaves alone all that it is not about. Parsing refuses what no program
//! may accept; [`Header::parse_leniently`] tells what is wrong and goes on where the header can
//! still be shown. Whether urus can *use* an image is a second question, answered by
//! [`Header::check_supported`]: so that an image with unsupported features can still be shown.

mod change;
mod decode;
mod encode;
pub(crate) mod limits;

use std::fmt;

use crate::{Error, Geometry, HostOffset};

pub use change::HeaderChange;
pub use decode::{FaultKind, HeaderFault};
pub use limits::{
    MAX_BACKING_FORMAT_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS,
};

/// First four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of the header of version 2, in bytes.
pub const HEADER_BYTES_V2: u32 = 72;
/// Shortest header of version 3, in bytes.
pub const HEADER_BYTES_V3_MIN: u32 = 104;
/// Length of the header of a new image of version 3, in bytes.
pub const HEADER_BYTES_V3: u32 = 112;

/// Incompatible feature bits: who does not know a set one must not open the image.
pub mod incompatible {
    /// Refcounts may be wrong (too low, or leaked): repair before the first write.
    pub const DIRTY: u64 = 1 << 0;
    /// Metadata is known to be corrupt: not writable until repaired.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 16 bytes and subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All bits that the specification defines.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature bits: who does not know one may ignore it.
pub mod compatible {
    /// Refcounts may be updated late, with the dirty bit set meanwhile.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Autoclear feature bits: who does not know one clears it when writing.
pub mod autoclear {
    /// The bitmaps extension is consistent with the data.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a consistent raw image.
    pub const RAW_EXTERNAL: u64 = 1 << 1;
    /// All bits that the specification defines.
    pub const KNOWN: u64 = BITMAPS | RAW_EXTERNAL;
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Raw deflate, without a zlib header.
    #[default]
    Deflate,
    /// Zstandard frames.
    Zstd,
}

impl fmt::Display for Compression {
    /// `zlib` or `zstd`, as tools call them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// The backing file as the image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name's bytes: 1 to 1023, without NUL. Not judged otherwise: see [`names::judge`](crate::names::judge).
    pub name: Vec<u8>,
    /// The backing file's format (`raw`, `qcow2`): 1 to 15 bytes without NUL. NULs that pad it on
    /// disk are not part of it.
    pub format: Option<String>,
}

/// The bitmaps extension of an image whose bitmaps are consistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps: 1 to 65535.
    pub count: u32,
    /// Bytes of the bitmap directory.
    pub directory_bytes: u64,
    /// Where the directory lies, cluster-aligned.
    pub directory: HostOffset,
}

/// Which feature field a name belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureKind {
    /// [`incompatible`].
    Incompatible,
    /// [`compatible`].
    Compatible,
    /// [`autoclear`].
    Autoclear,
    /// A number that the specification does not define; kept. Never 0 to 2.
    Other(u8),
}

/// An entry of the feature-name table: what the image's writer calls a feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// The field.
    pub kind: FeatureKind,
    /// The bit's number.
    pub bit: u8,
    /// Its name: at most 46 bytes, without NUL, not necessarily UTF-8.
    pub name: Vec<u8>,
}

/// The content of cluster 0.
///
/// A parsed header keeps every limit of the format. Fields may be changed; [`encode`](Self::encode) checks the
/// limits again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Length of the header structure in bytes: 72 in version 2, else at least 104 and a multiple of 8.
    pub header_bytes: u32,
    /// log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// Virtual size in bytes, as stored: it need not be a multiple of anything. The disk is as long
    /// as [`disk_bytes`](Self::disk_bytes) says.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table lies, cluster-aligned.
    pub l1_table: HostOffset,
    /// Where the refcount table lies, cluster-aligned.
    pub refcount_table: HostOffset,
    /// Clusters of the refcount table. Zero is for repair only: [`check_supported`](Self::check_supported)
    /// refuses it.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots: at most 65536.
    pub snapshot_count: u32,
    /// Where the snapshot table lies, cluster-aligned.
    pub snapshot_table: HostOffset,
    /// Incompatible feature bits ([`incompatible`]), unknown ones included. 0 in version 2.
    pub incompatible: u64,
    /// Compatible feature bits ([`compatible`]). 0 in version 2.
    pub compatible: u64,
    /// Autoclear feature bits ([`autoclear`]). 0 in version 2.
    pub autoclear: u64,
    /// log2 of the refcount width in bits: 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// How compressed clusters are compressed; [`Compression::Zstd`] exactly when
    /// [`incompatible::COMPRESSION`] is set.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<BackingName>,
    /// Name of the external data file, as the extension gives it: 1 to 1023 bytes without NUL. It may stand
    /// without [`incompatible::DATA_FILE`].
    pub data_file: Option<Vec<u8>>,
    /// The bitmaps extension, where [`autoclear::BITMAPS`] vouches for it. A stale one stays among
    /// [`unknown_extensions`](Self::unknown_extensions).
    pub bitmaps: Option<BitmapsExtension>,
    /// Offset and bytes of the LUKS header.
    pub luks: Option<(HostOffset, u64)>,
    /// The feature-name table; empty where there is none.
    pub feature_names: Vec<FeatureName>,
    /// Extensions that urus does not interpret: type and data, in order.
    pub unknown_extensions: Vec<(u32, Vec<u8>)>,
    /// What the header structure holds beyond the fields known here (from byte 105 on), without trailing
    /// zeroes.
    pub unknown_header_bytes: Vec<u8>,
}

impl Header {
    /// Bytes of the virtual disk as programs use it: whole sectors of 512, as QEMU rounds.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.size & !511
    }

    /// The sizes that follow from this header.
    ///
    /// # Panics
    /// When `cluster_bits`, `refcount_order` or `version` was set to a value out of its range. A parsed
    /// header never has one.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        let l2_entry_bytes = if self.incompatible & incompatible::EXTENDED_L2 != 0 {
            16
        } else {
            8
        };
        Geometry::new(
            self.cluster_bits,
            self.refcount_order,
            l2_entry_bytes,
            self.version,
        )
    }

    /// Whether urus can open this image: for reading, or with `write` for writing too.
    ///
    /// Dirty images are accepted: whoever writes repairs them first.
    ///
    /// # Errors
    /// The first unsupported feature: encryption, extended L2, an external data file (bit or extension),
    /// unknown incompatible bits (named as the image names them), a missing refcount table; for writing also
    /// bitmaps and the corrupt bit.
    pub fn check_supported(&self, write: bool) -> Result<(), Error> {
        let unsupported = |feature: String| Err(Error::Unsupported { feature });
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            return unsupported(format!(
                "{}; {WITH_ITS_PROGRAM}",
                self.describe_incompatible(unknown)
            ));
        }
        match self.crypt_method {
            0 => {}
            1 => return unsupported(format!("encryption (legacy AES); {}", decrypt("aes"))),
            2 => return unsupported(format!("encryption (LUKS); {}", decrypt("luks"))),
            other => {
                let method = format!("encryption (unknown method {other}); {WITH_ITS_PROGRAM}");
                return unsupported(method);
            }
        }
        if self.incompatible & incompatible::EXTENDED_L2 != 0 {
            return unsupported(format!("extended L2 entries (subclusters); {CONVERT}"));
        }
        if self.incompatible & incompatible::DATA_FILE != 0 {
            return unsupported(format!(
                "an external data file (incompatible bit 2); {CONVERT}"
            ));
        }
        if self.data_file.is_some() {
            return unsupported(format!(
                "an external data file (named by a header extension); {CONVERT}"
            ));
        }
        if self.refcount_table_clusters == 0 {
            return Err(Error::invalid(
                "refcount_table_clusters",
                0u32,
                "at least 1 (only a repair opens such an image)",
            ));
        }
        if write && self.bitmaps.is_some() {
            return unsupported(
                "writing to an image with persistent bitmaps; open it read-only, or remove each bitmap: \
                 qemu-img bitmap --remove IMAGE NAME (qemu-img info lists them)"
                    .into(),
            );
        }
        if write && self.incompatible & incompatible::CORRUPT != 0 {
            return unsupported(
                "writing to an image that is marked corrupt; repair it (urus check -r all IMAGE), or open it read-only"
                    .into(),
            );
        }
        Ok(())
    }

    /// The name that the image gives to a feature bit, made printable.
    #[must_use]
    pub fn feature_name(&self, kind: FeatureKind, bit: u8) -> Option<String> {
        let entry = self
            .feature_names
            .iter()
            .find(|entry| entry.kind == kind && entry.bit == bit)?;
        Some(
            String::from_utf8_lossy(&entry.name)
                .escape_debug()
                .to_string(),
        )
    }

    fn describe_incompatible(&self, bits: u64) -> String {
        let mut names = Vec::new();
        for bit in (0..64u8).filter(|bit| bits & (1 << bit) != 0) {
            names.push(match self.feature_name(FeatureKind::Incompatible, bit) {
                Some(name) => format!("'{name}' (incompatible bit {bit})"),
                None => format!("an unknown feature (incompatible bit {bit})"),
            });
        }
        names.join(", ")
    }
}

/// The way out where QEMU can read the image: a new one has none of what is not supported.
const CONVERT: &str = "make an image without it: qemu-img convert -p -O qcow2 IMAGE NEW-IMAGE";

/// The way out where nobody else is known to read the image.
const WITH_ITS_PROGRAM: &str =
    "a newer version of the program that made the image may convert it to one without";

fn decrypt(format: &str) -> String {
    format!(
        "make an image without it, with the passphrase in a file: qemu-img convert -p --object secret,id=key,file=PASSPHRASE-FILE \
         --image-opts driver=qcow2,encrypt.format={format},encrypt.key-secret=key,file.filename=IMAGE -O qcow2 NEW-IMAGE"
    )
}

/// Header extension types.
pub(crate) mod extension {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    pub(crate) const LUKS: u32 = 0x0537_be77;
    pub(crate) const DATA_FILE: u32 = 0x4441_5441;
}

/// Bytes of an entry of the feature-name table.
const FEATURE_NAME_BYTES: usize = 48;

/// The feature-name table of a new image: what QEMU writes, because tools compare it.
#[must_use]
pub fn default_feature_names() -> Vec<FeatureName> {
    use FeatureKind::{Autoclear, Compatible, Incompatible};
    [
        (Incompatible, 0, "dirty bit"),
        (Incompatible, 1, "corrupt bit"),
        (Incompatible, 2, "external data file"),
        (Incompatible, 3, "compression type"),
        (Incompatible, 4, "extended L2 entries"),
        (Compatible, 0, "lazy refcounts"),
        (Autoclear, 0, "bitmaps"),
        (Autoclear, 1, "raw external data"),
    ]
    .map(|(kind, bit, name)| FeatureName {
        kind,
        bit,
        name: name.into(),
    })
    .into()
}
