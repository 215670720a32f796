//! Inspecting images: also those that cannot be opened. Never repairs, never writes, never opens another file.

use std::path::{Path, PathBuf};

use crate::device::pending;
use crate::{Compression, Format, Result};

/// How [`info`] looks at a file.
#[derive(Clone, Debug)]
pub struct InfoOptions {
    pub(crate) format: Option<Format>,
    pub(crate) lock: bool,
}

impl Default for InfoOptions {
    fn default() -> Self {
        Self {
            format: None,
            lock: true,
        }
    }
}

impl InfoOptions {
    /// The format detected, the locks respected.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The format, where it is known. Otherwise a file is qcow2 when it begins as one, and else raw: good enough to show, never
    /// good enough to open.
    pub fn format(&mut self, format: Format) -> &mut Self {
        self.format = Some(format);
        self
    }

    /// Refuse an image that another process writes (default). Without, as `qemu-img info -U`, what is shown may be stale.
    pub fn lock(&mut self, lock: bool) -> &mut Self {
        self.lock = lock;
        self
    }
}

/// What an image file says of itself.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImageInfo {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// Bytes that the file takes on its file system.
    pub actual_size: u64,
    /// What only a qcow2 image has.
    pub qcow2: Option<Qcow2Info>,
}

/// What a qcow2 image says of itself.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_bytes: u64,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Refcounts may lag while the image is in use.
    pub lazy_refcounts: bool,
    /// Was not closed cleanly, and is repaired when opened read-write.
    pub dirty: bool,
    /// Is marked as damaged.
    pub corrupt: bool,
    /// 16-byte L2 entries with subclusters.
    pub extended_l2: bool,
    /// How it is encrypted.
    pub encryption: Option<Encryption>,
    /// The external data file's name, as recorded; never opened here.
    pub data_file: Option<String>,
    /// The external data file is a raw image by itself.
    pub data_file_raw: bool,
    /// The backing file.
    pub backing: Option<BackingInfo>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Persistent dirty bitmaps.
    pub bitmaps: Vec<BitmapInfo>,
    /// Why urus cannot open it for reading, if so.
    pub unsupported: Option<String>,
}

impl Qcow2Info {
    /// The format's version as qemu-img names it: "0.10" or "1.1".
    #[must_use]
    pub fn compat(&self) -> &'static str {
        if self.version == 2 { "0.10" } else { "1.1" }
    }
}

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Encryption {
    /// The legacy AES method.
    Aes,
    /// LUKS.
    Luks,
}

/// The backing file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackingInfo {
    /// The name, as recorded.
    pub name: String,
    /// The format, as recorded.
    pub format: Option<String>,
    /// The name seen from here: a relative one follows the directory of the image. None where it is not a file name.
    pub path: Option<PathBuf>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// Its identifier, a string.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of saved machine state.
    pub vm_state_bytes: u64,
    /// When it was taken, in seconds since 1970.
    pub date_seconds: u32,
    /// The rest of that, in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Instructions executed, where they were counted.
    pub icount: Option<u64>,
    /// Size of the virtual disk then, in bytes.
    pub virtual_size: u64,
}

/// A persistent dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk per bit.
    pub granularity_bytes: u64,
    /// Was not saved properly, and cannot be trusted.
    pub in_use: bool,
    /// Follows writes.
    pub auto: bool,
}

/// Says what the image at `path` is. Reads the header and small tables; opens no other file and changes nothing.
///
/// # Errors
/// A file that cannot be read, that is not of the stated format, or whose header or tables no program may accept.
pub fn info(_path: impl AsRef<Path>, _options: &InfoOptions) -> Result<ImageInfo> {
    Err(pending())
}
