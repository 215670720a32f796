//! Making new images.

mod naming;

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use urus_engine::create::{Found, New};
use urus_format::{BackingName, names};
use urus_ring::{Driver, DriverKind, FileSet, LockMode, OpenFile};

use self::naming::{Staged, Staging};
use crate::place::directory_of;
use crate::{Compression, Error, Format, Result, chain};

/// Sizes of disks are multiples of this.
const SECTOR_BYTES: u64 = 512;
/// Operations in flight while an image is written.
const DEPTH: u32 = 8;

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
    replace: Replace,
}

/// Which file may be replaced by the new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replace {
    Nothing,
    Empty,
    Any,
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
            replace: Replace::Nothing,
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
        self.replace = if overwrite {
            Replace::Any
        } else {
            Replace::Nothing
        };
        self
    }

    /// Replace a file that exists only if it is a regular file of 0 bytes, such as mktemp(1) makes.
    pub fn replace_empty(&mut self) -> &mut Self {
        self.replace = Replace::Empty;
        self
    }
}

/// Makes a new image file. It appears under its name whole and durable, or not at all, also where the process is killed or the power
/// fails. A file to be overwritten is replaced at once by the new image, with the same owner, mode and attributes; where that cannot be
/// (block devices, files with several names, directories that take no new file) it is overwritten in place, header last.
/// Symbolic links stay, and lead to the new image.
///
/// # Errors
/// A file that exists (unless [`CreateOptions::overwrite`]), options that do not go together, a backing file
/// that cannot be opened, or what the operating system says. No new file is left behind then, and a file to be overwritten
/// is touched only after everything that can be checked beforehand was.
pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<()> {
    /// How often others may make or replace the file meanwhile.
    const ATTEMPTS: usize = 16;
    let path = path.as_ref();
    let plan = plan(path, options)?;
    for _ in 0..ATTEMPTS {
        let done = match existing(path, options)? {
            Existing::Nothing => make_new(path, &plan),
            Existing::File(old) => replace(path, &old, &plan, options),
        };
        match done {
            Ok(true) => return Ok(()),
            // Another file has the name now: it is judged anew.
            Ok(false) => {}
            Err(error) => return Err(error),
        }
    }
    let busy = io::Error::other("other processes keep replacing this file");
    Err(Error::io("create", path)(busy))
}

/// What has the name already.
enum Existing {
    Nothing,
    File(OpenFile),
}

/// # Errors
/// A file that must stay.
fn existing(path: &Path, options: &CreateOptions) -> Result<Existing> {
    let exists = || Error::io("create", path)(rustix::io::Errno::EXIST.into());
    if options.replace == Replace::Nothing {
        return match path.metadata() {
            Ok(_) => Err(exists()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Existing::Nothing),
            // Links that the kernel does not follow (fs.protected_symlinks) are not followed here either.
            Err(error) => Err(Error::io("create", path)(error)),
        };
    }
    match OpenFile::open_image(path, false, false) {
        Ok(file) if options.replace == Replace::Empty && !is_empty(&file, path)? => Err(exists()),
        Ok(file) => Ok(Existing::File(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Existing::Nothing),
        Err(error) => Err(Error::io("open", path)(error)),
    }
}

fn is_empty(file: &OpenFile, path: &Path) -> Result<bool> {
    let len = file.file_len().map_err(Error::io("measure", path))?;
    Ok(len == 0 && !file.is_block_device())
}

/// Makes the image where nothing has its name; false where something has it by now.
fn make_new(path: &Path, plan: &Plan) -> Result<bool> {
    let to = naming::destination(path).map_err(Error::io("create", path))?;
    let named = staged(&to, path, plan, |staged| staged.name_new(&to))?;
    match named {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        named => named.map(|()| true).map_err(Error::io("create", path)),
    }
}

/// Puts the image in the place of another; false where the name is another file's by now.
fn replace(path: &Path, old: &OpenFile, plan: &Plan, options: &CreateOptions) -> Result<bool> {
    old.lock(LockMode::Write).map_err(Error::lock(path))?;
    // Whoever replaces it has it locked: from here on it stays what it is.
    let same = naming::leads_to(path, old).map_err(Error::io("find", path))?;
    if !same || (options.replace == Replace::Empty && !is_empty(old, path)?) {
        return Ok(false);
    }
    if !old.is_block_device() && replace_at_once(path, old, plan)? {
        return Ok(true);
    }
    let file = old.try_clone_file().map_err(Error::io("write", path))?;
    write(file, path, plan, Some(old))?;
    Ok(true)
}

/// Replaces the file by one rename; false where that cannot be done, and nothing has changed.
fn replace_at_once(path: &Path, old: &OpenFile, plan: &Plan) -> Result<bool> {
    let Ok(to) = fs::canonicalize(path) else {
        return Ok(false);
    };
    if !naming::leads_to(&to, old).map_err(Error::io("find", path))? {
        return Ok(false);
    }
    let named = staged(&to, path, plan, |staged| {
        if naming::take_after(staged.file(), old) {
            staged.name_over(&to)
        } else {
            Err(io::ErrorKind::Other.into())
        }
    })?;
    Ok(named.is_ok())
}

/// Writes the image to a file without its name, and has it named; by whichever staging the file system has.
fn staged(
    to: &Path,
    path: &Path,
    plan: &Plan,
    name: impl Fn(Staged) -> io::Result<()>,
) -> Result<io::Result<()>> {
    let unsupported = |error: &io::Error| error.kind() == io::ErrorKind::Unsupported;
    match Staged::new(directory_of(to), Staging::Nameless) {
        Ok(staged) => {
            write_staged(&staged, path, plan)?;
            match name(staged) {
                Err(error) if unsupported(&error) => {}
                named => return Ok(named),
            }
        }
        Err(error) if unsupported(&error) => {}
        Err(error) => return Ok(Err(error)),
    }
    match Staged::new(directory_of(to), Staging::Hidden) {
        Ok(staged) => {
            write_staged(&staged, path, plan)?;
            Ok(name(staged))
        }
        Err(error) => Ok(Err(error)),
    }
}

fn write_staged(staged: &Staged, path: &Path, plan: &Plan) -> Result<()> {
    let file = staged.file().try_clone();
    write(file.map_err(Error::io("write", path))?, path, plan, None)
}

/// What a new image is, and how much room it needs.
struct Plan {
    new: New,
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
        new: New::Raw(file_bytes),
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
        file_bytes: layout.file_bytes,
        new: New::Qcow2(Rc::new(layout)),
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

/// Writes the image into a file: an empty one that nobody can find, or `old`, which may be a device.
fn write(target: fs::File, path: &Path, plan: &Plan, old: Option<&OpenFile>) -> Result<()> {
    if let Some(device) = old.filter(|old| old.is_block_device()) {
        let there = device.file_len().map_err(Error::io("measure", path))?;
        if there < plan.file_bytes {
            return Err(Error::invalid(format!(
                "{}: the device has {there} bytes, and the new image needs {}",
                path.display(),
                plan.file_bytes
            )));
        }
    }
    let name = path.display().to_string();
    let file = OpenFile::from_fd(target.into(), name.clone()).map_err(Error::io("open", path))?;
    let driver = Driver::open(FileSet::new(vec![file]), DriverKind::Blocking, DEPTH)
        .map_err(Error::io("open a driver for", path))?;
    let found = if old.is_some() {
        Found::Now
    } else {
        Found::Later
    };
    Ok(urus_engine::create::create(
        driver,
        chain::IMAGE,
        name,
        plan.new.clone(),
        found,
    )?)
}
