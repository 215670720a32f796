//! Making new images.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use urus_format::{BackingName, names};
use urus_ring::{LockMode, OpenFile};

use crate::place::directory_of;
use crate::{Compression, Error, Format, Result, chain};

/// Sizes of disks are multiples of this.
const SECTOR_BYTES: u64 = 512;

/// What [`create`] makes. The defaults are qemu-img's: qcow2 version 3, 64 KiB clusters, 16-bit refcounts, zlib.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    pub(crate) format: Format,
    pub(crate) size: Option<u64>,
    pub(crate) version: u32,
    pub(crate) cluster_bytes: u64,
    pub(crate) refcount_bits: u32,
    pub(crate) lazy_refcounts: bool,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<(PathBuf, Format)>,
    pub(crate) open_backing: bool,
    pub(crate) overwrite: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            size: None,
            version: 3,
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Compression::default(),
            backing: None,
            open_backing: true,
            overwrite: false,
        }
    }
}

impl CreateOptions {
    /// A qcow2 image of QEMU's defaults. The size must be given, or a backing file to take it from.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// qcow2 (unless stated) or raw.
    pub fn format(&mut self, format: Format) -> &mut Self {
        self.format = format;
        self
    }

    /// Size of the virtual disk in bytes; rounded up to a multiple of 512.
    pub fn size(&mut self, bytes: u64) -> &mut Self {
        self.size = Some(bytes);
        self
    }

    /// Version of the format: 2 (compat 0.10) or 3 (compat 1.1).
    pub fn version(&mut self, version: u32) -> &mut Self {
        self.version = version;
        self
    }

    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub fn cluster_bytes(&mut self, bytes: u64) -> &mut Self {
        self.cluster_bytes = bytes;
        self
    }

    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub fn refcount_bits(&mut self, bits: u32) -> &mut Self {
        self.refcount_bits = bits;
        self
    }

    /// Set the lazy-refcounts flag.
    pub fn lazy_refcounts(&mut self, lazy: bool) -> &mut Self {
        self.lazy_refcounts = lazy;
        self
    }

    /// How compressed clusters will be compressed.
    pub fn compression(&mut self, compression: Compression) -> &mut Self {
        self.compression = compression;
        self
    }

    /// A backing file, by the name to record (a relative one is relative to the directory of the new image),
    /// and its format.
    pub fn backing(&mut self, name: impl Into<PathBuf>, format: Format) -> &mut Self {
        self.backing = Some((name.into(), format));
        self
    }

    /// Open the backing file, to see that it is one and to take its size where none is given (default). Without, as
    /// `qemu-img create -u`, the name is recorded unseen.
    pub fn open_backing(&mut self, open: bool) -> &mut Self {
        self.open_backing = open;
        self
    }

    /// Replace a file that exists. By default it is left alone and the call fails.
    pub fn overwrite(&mut self, overwrite: bool) -> &mut Self {
        self.overwrite = overwrite;
        self
    }
}

/// Makes a new image file. Durable on return. Where it fails, no new file is left behind; a file to be overwritten is
/// touched only after everything that can be checked beforehand was.
///
/// # Errors
/// A file that exists (unless [`CreateOptions::overwrite`]), options that do not go together, a backing file
/// that cannot be opened, or what the operating system says.
pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<()> {
    let path = path.as_ref();
    let plan = plan(path, options)?;
    let (file, is_new) = open_target(path, options)?;
    let result = file
        .lock(LockMode::Write)
        .map_err(Error::lock(path))
        .and_then(|()| write(&file, path, &plan))
        .and_then(|()| if is_new { sync_directory(path) } else { Ok(()) });
    if result.is_err() && is_new {
        // The first error is the one to tell.
        let _ = fs::remove_file(path);
    }
    result
}

/// What a new image consists of.
struct Plan {
    /// Offsets and bytes, in the order in which they are to be written.
    writes: Vec<(u64, Vec<u8>)>,
    /// Offset and bytes of what must read as zeroes.
    zeroes: (u64, u64),
    file_bytes: u64,
}

fn plan(path: &Path, options: &CreateOptions) -> Result<Plan> {
    let backing_size = match &options.backing {
        Some((name, format)) => check_backing(path, name, *format, options.open_backing)?,
        None => None,
    };
    let size = options.size.or(backing_size).ok_or_else(|| {
        Error::invalid(format!(
            "{}: the size of the new image is neither given nor known from a backing file",
            path.display()
        ))
    })?;
    match options.format {
        Format::Raw => plan_raw(path, options, size),
        Format::Qcow2 => plan_qcow2(path, options, size),
    }
}

fn plan_raw(path: &Path, options: &CreateOptions, size: u64) -> Result<Plan> {
    if options.backing.is_some() {
        return Err(Error::invalid(format!(
            "{}: a raw image cannot have a backing file",
            path.display()
        )));
    }
    let file_bytes = size
        .checked_next_multiple_of(SECTOR_BYTES)
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| {
            Error::invalid(format!(
                "{}: a size of {size} bytes is too large",
                path.display()
            ))
        })?;
    Ok(Plan {
        writes: Vec::new(),
        zeroes: (0, file_bytes),
        file_bytes,
    })
}

fn plan_qcow2(path: &Path, options: &CreateOptions, size: u64) -> Result<Plan> {
    let log2 = |what: &str, value: u64| {
        if value.is_power_of_two() {
            Ok(value.trailing_zeros())
        } else {
            Err(Error::invalid(format!(
                "{}: {what} of {value} is not a power of two",
                path.display()
            )))
        }
    };
    let layout = urus_format::create::layout(&urus_format::create::CreateOptions {
        size,
        cluster_bits: log2("a cluster size", options.cluster_bytes)?,
        version: options.version,
        refcount_order: log2("a refcount width", options.refcount_bits.into())?,
        compression: options.compression,
        lazy_refcounts: options.lazy_refcounts,
        backing: options.backing.as_ref().map(|(name, format)| BackingName {
            name: name.as_os_str().as_bytes().to_vec(),
            format: Some(format.name().to_owned()),
        }),
    })
    .map_err(Error::format(path))?;
    Ok(Plan {
        writes: layout.writes,
        zeroes: layout.zeroes,
        file_bytes: layout.file_bytes,
    })
}

/// Judges a backing file's name, and opens the file where asked to; returns its virtual size then.
///
/// The caller names it here, not an image from somewhere, so no policy is asked. The format is still not guessed.
fn check_backing(image: &Path, name: &Path, format: Format, open: bool) -> Result<Option<u64>> {
    let backing = || name.display().to_string();
    names::judge(name.as_os_str().as_bytes()).map_err(|fault| Error::BackingName {
        image: image.to_owned(),
        backing: backing(),
        why: fault.to_string(),
    })?;
    if !open {
        return Ok(None);
    }
    let dir = directory_of(image);
    let path = dir.join(name);
    let file = OpenFile::open_image(&path, true, false).map_err(|source| Error::BackingOpen {
        image: image.to_owned(),
        backing: backing(),
        dir: dir.to_owned(),
        source,
    })?;
    Ok(Some(match format {
        Format::Raw => chain::raw_size(&file, &path)?,
        Format::Qcow2 => {
            let header = chain::read_header(&file, &path)?;
            header
                .check_supported(false)
                .map_err(Error::format(&path))?;
            header.disk_bytes()
        }
    }))
}

/// Opens the file to write; also returns whether it was made just now.
fn open_target(path: &Path, options: &CreateOptions) -> Result<(OpenFile, bool)> {
    let (file, is_new) = match OpenFile::create_image(path, false) {
        Ok(file) => (file, true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && options.overwrite => (
            OpenFile::open_image(path, false, false).map_err(Error::io("open", path))?,
            false,
        ),
        Err(error) => return Err(Error::io("create", path)(error)),
    };
    Ok((file, is_new))
}

fn write(file: &OpenFile, path: &Path, plan: &Plan) -> Result<()> {
    let target = file.try_clone_file().map_err(Error::io("write", path))?;
    if file.is_block_device() {
        let there = file.file_len().map_err(Error::io("measure", path))?;
        if there < plan.file_bytes {
            return Err(Error::invalid(format!(
                "{}: the device has {there} bytes, and the new image needs {}",
                path.display(),
                plan.file_bytes
            )));
        }
        clear(&target, plan).map_err(Error::io("clear", path))?;
    } else {
        // Through zero, so that nothing of a file that is overwritten stays.
        target.set_len(0).map_err(Error::io("truncate", path))?;
        target
            .set_len(plan.file_bytes)
            .map_err(Error::io("set the length of", path))?;
    }
    for (offset, bytes) in &plan.writes {
        // Whatever a crash leaves of this is no image until its header, the last of them, is there.
        target
            .write_all_at(bytes, *offset)
            .map_err(Error::io("write", path))?;
    }
    target.sync_all().map_err(Error::io("sync", path))
}

/// Zeroes what must read as zeroes. Of a raw image on a device that is nothing: its content stays, as with qemu-img.
fn clear(target: &fs::File, plan: &Plan) -> io::Result<()> {
    if plan.writes.is_empty() {
        return Ok(());
    }
    let zeroes = vec![0; 1 << 20];
    let (mut offset, mut left) = plan.zeroes;
    while left > 0 {
        let step = left.min(zeroes.len() as u64);
        target.write_all_at(
            &zeroes[..usize::try_from(step).expect("at most a MiB")],
            offset,
        )?;
        offset += step;
        left -= step;
    }
    Ok(())
}

/// Makes the new file's name durable.
fn sync_directory(path: &Path) -> Result<()> {
    let dir = directory_of(path);
    fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("sync", dir))
}
