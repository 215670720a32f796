//! Inspecting images: also those that cannot be opened. Never repairs, never writes, never opens another file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use urus_format::header::MAGIC;
use urus_format::snapshot::{Snapshot, TableBytes};
use urus_format::{
    BackingName, Header, autoclear, bitmap, compatible, incompatible, names, snapshot,
};
use urus_ring::{LockMode, OpenFile};

use crate::chain::{self, name_text};
use crate::{Compression, Error, ForeignFormat, Format, Result, foreign, limits};

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

    /// The format, where it is known. Otherwise a file is qcow2 when it begins as one, and else raw: good
    /// enough to show, never good enough to open.
    pub fn format(&mut self, format: Format) -> &mut Self {
        self.format = Some(format);
        self
    }

    /// Refuse an image that another process writes (default). Without, as `qemu-img info -U`, what is shown may
    /// be stale.
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
    pub qcow2: Option<Box<Qcow2Info>>,
    /// Where the format was detected and is raw: what the file looks like, if not like a disk. For messages.
    pub foreign: Option<ForeignFormat>,
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
    /// Guest data lies in another file.
    pub external_data: bool,
    /// That file's name, as recorded; never opened here.
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
    /// What is wrong with it, as far as was looked: names that no file may have, tables that are
    /// not there or cannot be read. The rest of what is said here holds all the same; snapshots or
    /// bitmaps that cannot be read are left out.
    pub faults: Vec<String>,
}

impl ImageInfo {
    /// What [`foreign`](Self::foreign) is, and what to do about it, for people.
    #[must_use]
    pub fn foreign_text(&self) -> Option<String> {
        Some(foreign::explain(&self.path, Some(self.foreign?)))
    }
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
    /// A method that the specification does not define, by its number.
    Unknown(u32),
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
/// # Errors A file that cannot be read, that is not of the stated format, or whose header no
/// program can understand. (Damage elsewhere is in [`Qcow2Info::faults`].) [`Error::InUse`] where
/// somebody writes it, unless [`InfoOptions::lock`] says not to care.
pub fn info(path: impl AsRef<Path>, options: &InfoOptions) -> Result<ImageInfo> {
    let path = path.as_ref();
    let file = OpenFile::open_image(path, true, false).map_err(Error::io("open", path))?;
    if options.lock {
        file.lock(LockMode::Read).map_err(Error::lock(path))?;
    }
    let status =
        rustix::fs::fstat(&file).map_err(|error| Error::io("inspect", path)(error.into()))?;
    let file_size = file.file_len().map_err(Error::io("measure", path))?;
    let format = match options.format {
        Some(format) => format,
        None => detect(&file, path)?,
    };
    let (virtual_size, qcow2) = match format {
        Format::Raw => (chain::raw_size(&file, path)?, None),
        Format::Qcow2 => {
            let (header, faults) = chain::read_header_leniently(&file, path)?;
            let faults = faults.iter().map(|fault| fault.error.to_string());
            let info = qcow2_info(&file, path, &header, faults.collect());
            (header.disk_bytes(), Some(Box::new(info)))
        }
    };
    let foreign = match options.format {
        None if format == Format::Raw => {
            foreign::recognise(&file).filter(|found| !foreign::is_disk(*found))
        }
        _ => None,
    };
    Ok(ImageInfo {
        path: path.to_owned(),
        format,
        virtual_size,
        file_size,
        actual_size: u64::try_from(status.st_blocks).unwrap_or(0) * STAT_BLOCK_BYTES,
        qcow2,
        foreign,
    })
}

/// The unit of `st_blocks`, whatever the file system's block size.
const STAT_BLOCK_BYTES: u64 = 512;

fn detect(file: &OpenFile, path: &Path) -> Result<Format> {
    let start = file
        .read_prefix(MAGIC.len())
        .map_err(Error::io("read the header", path))?;
    Ok(if start == MAGIC {
        Format::Qcow2
    } else {
        Format::Raw
    })
}

fn qcow2_info(file: &OpenFile, path: &Path, header: &Header, mut faults: Vec<String>) -> Qcow2Info {
    let geometry = header.geometry();
    let has = |bit| header.incompatible & bit != 0;
    let unsupported = header.check_supported(false).err();
    let unsupported = faults
        .first()
        .cloned()
        .or_else(|| unsupported.map(|error| error.to_string()));
    let mut told = |error: String| faults.push(error);
    let snapshots = read_snapshots(file, header).unwrap_or_else(|error| {
        told(format!("snapshots are not shown: {error}"));
        Vec::new()
    });
    let bitmaps = read_bitmaps(file, header).unwrap_or_else(|error| {
        told(format!("bitmaps are not shown: {error}"));
        Vec::new()
    });
    Qcow2Info {
        version: header.version,
        cluster_bytes: geometry.cluster_bytes(),
        refcount_bits: 1 << geometry.refcount_order(),
        compression: header.compression,
        lazy_refcounts: header.compatible & compatible::LAZY_REFCOUNTS != 0,
        dirty: has(incompatible::DIRTY),
        corrupt: has(incompatible::CORRUPT),
        extended_l2: has(incompatible::EXTENDED_L2),
        encryption: match header.crypt_method {
            0 => None,
            1 => Some(Encryption::Aes),
            2 => Some(Encryption::Luks),
            other => Some(Encryption::Unknown(other)),
        },
        external_data: has(incompatible::DATA_FILE),
        data_file: header.data_file.as_deref().map(name_text),
        data_file_raw: header.autoclear & autoclear::RAW_EXTERNAL != 0,
        backing: header
            .backing
            .as_ref()
            .map(|backing| backing_info(path, backing)),
        snapshots,
        bitmaps,
        unsupported,
        faults,
    }
}

fn backing_info(image: &Path, backing: &BackingName) -> BackingInfo {
    let is_path = names::judge(&backing.name).is_ok();
    let name = Path::new(OsStr::from_bytes(&backing.name));
    BackingInfo {
        name: name_text(&backing.name),
        format: backing.format.clone(),
        // As QEMU combines them: without resolving anything.
        path: is_path.then(|| match image.parent() {
            Some(dir) => dir.join(name),
            None => name.to_owned(),
        }),
    }
}

/// What keeps a table from being read; only its text matters.
type TableError = Box<dyn std::error::Error>;

fn read_snapshots(file: &OpenFile, header: &Header) -> Result<Vec<SnapshotInfo>, TableError> {
    let count = header.snapshot_count;
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut want = limits::SNAPSHOT_READ_BYTES;
    let table = loop {
        let bytes = file.read_at(header.snapshot_table.0, want)?;
        match snapshot::table_bytes(&bytes, count)? {
            // At the end of file there is no more: parsing says what is missing.
            TableBytes::AtLeast(_) if bytes.len() < want => break bytes,
            TableBytes::AtLeast(more) => {
                want = usize::try_from(more)
                    .unwrap_or(usize::MAX)
                    .max(want.saturating_mul(2));
            }
            TableBytes::Exactly(_) => break bytes,
        }
    };
    let snapshots = snapshot::parse_table(&table, count)?;
    Ok(snapshots
        .iter()
        .map(|snapshot| snapshot_info(snapshot, header))
        .collect())
}

fn snapshot_info(snapshot: &Snapshot, header: &Header) -> SnapshotInfo {
    SnapshotInfo {
        id: snapshot.id_text(),
        name: snapshot.name_text(),
        vm_state_bytes: snapshot.vm_state_bytes,
        date_seconds: snapshot.date_seconds,
        date_nanoseconds: snapshot.date_nanoseconds,
        vm_clock_nanoseconds: snapshot.vm_clock_nanoseconds,
        icount: snapshot.icount,
        virtual_size: snapshot.disk_bytes.unwrap_or(header.disk_bytes()),
    }
}

fn read_bitmaps(file: &OpenFile, header: &Header) -> Result<Vec<BitmapInfo>, TableError> {
    let Some(extension) = &header.bitmaps else {
        return Ok(Vec::new());
    };
    // At most 64 MiB, by the header's limits; a shorter file gives less, and parsing says so.
    let bytes = usize::try_from(extension.directory_bytes).unwrap_or(usize::MAX);
    let there = file.file_len()?.saturating_sub(extension.directory.0);
    let there = usize::try_from(there).unwrap_or(usize::MAX);
    let directory = file.read_at(extension.directory.0, bytes.min(there))?;
    let bitmaps = bitmap::parse_directory(&directory, extension.count, &header.geometry())?;
    Ok(bitmaps
        .iter()
        .map(|bitmap| BitmapInfo {
            name: bitmap.name_text(),
            granularity_bytes: 1 << bitmap.granularity_bits,
            in_use: bitmap.flags & bitmap::flags::IN_USE != 0,
            auto: bitmap.flags & bitmap::flags::AUTO != 0,
        })
        .collect())
}
