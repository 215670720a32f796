//! Opening an image and what it stands on: files, locks, headers, and the rules for backing files
//! (untrusted images: nothing is guessed, nothing is opened that was not allowed).

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use urus_format::{BackingName, Header, HeaderFault, names};
use urus_ring::{LockMode, OpenFile};

use crate::place::{self, Place, Refusal};
use crate::{CacheMode, Error, Format, Layer, OpenOptions, Result, foreign, limits, temporary};
use urus_engine::storage::FileId;
use urus_engine::{LayerFormat, LayerSpec};

/// The image's own file in a set of files: its backing files follow.
pub(crate) const IMAGE: FileId = FileId(0);

/// A file of the chain, open, locked, and known to be usable.
pub(crate) struct ChainFile {
    pub(crate) file: OpenFile,
    pub(crate) path: PathBuf,
    /// `None` for raw.
    pub(crate) header: Option<Box<Header>>,
    identity: (u64, u64),
}

impl ChainFile {
    fn backing(&self) -> Option<&BackingName> {
        self.header.as_ref()?.backing.as_ref()
    }

    /// What callers are told of it.
    pub(crate) fn describe(&self) -> Result<Layer> {
        let (format, size) = match &self.header {
            Some(header) => (Format::Qcow2, header.disk_bytes()),
            None => (Format::Raw, raw_size(&self.file, &self.path)?),
        };
        Ok(Layer {
            path: self.path.clone(),
            format,
            size,
        })
    }

    /// What the engine is told of it, and the file for the drivers.
    pub(crate) fn into_parts(self, index: usize, name: String) -> (OpenFile, LayerSpec) {
        let file = FileId(u16::try_from(index).expect("chains are shorter than MAX_CHAIN_LAYERS"));
        let format = self.header.map_or(LayerFormat::Raw, LayerFormat::Qcow2);
        (self.file, LayerSpec { file, name, format })
    }
}

/// Opens the image at `path` and its backing files, beneath a temporary overlay where one is wanted.
pub(crate) fn open_path(options: &OpenOptions, path: &Path) -> Result<Vec<ChainFile>> {
    with_overlay(options, |options| open_path_itself(options, path))
}

/// Takes the image and its backing files as descriptors, as [`open_path`].
pub(crate) fn open_fds(
    options: &OpenOptions,
    image: OwnedFd,
    backing: Vec<OwnedFd>,
) -> Result<Vec<ChainFile>> {
    with_overlay(options, |options| {
        open_fds_themselves(options, image, backing)
    })
}

/// Beneath a temporary overlay the image itself is only read.
fn with_overlay(
    options: &OpenOptions,
    open: impl FnOnce(&OpenOptions) -> Result<Vec<ChainFile>>,
) -> Result<Vec<ChainFile>> {
    let Some(directory) = &options.snapshot else {
        return open(options);
    };
    if options.read_only {
        return Err(Error::invalid(
            "a snapshot that is read-only makes no sense: open the image read-only without one",
        ));
    }
    let mut below = options.clone();
    below.read_only = true;
    let mut chain = open(&below)?;
    if chain.len() >= limits::MAX_CHAIN_LAYERS {
        return Err(Error::ChainTooDeep {
            image: chain[0].path.clone(),
            limit: limits::MAX_CHAIN_LAYERS,
        });
    }
    let image = chain[0].describe()?;
    let (file, path) = temporary::overlay(directory, &image)?;
    let header = Box::new(read_header(&file, &path)?);
    let identity = identity(&file).map_err(Error::io("inspect", &path))?;
    let overlay = ChainFile {
        file,
        path,
        header: Some(header),
        identity,
    };
    chain.insert(0, overlay);
    Ok(chain)
}

fn open_path_itself(options: &OpenOptions, path: &Path) -> Result<Vec<ChainFile>> {
    let direct = options.cache == CacheMode::None;
    let image =
        OpenFile::open_image(path, options.read_only, direct).map_err(Error::io("open", path))?;
    let mut chain = vec![admit(options, &[], image, path.to_owned(), options.format)?];
    let Some(backing) = chain[0].backing() else {
        return Ok(chain);
    };
    let place = Place::new(path, &options.backing).map_err(|(dir, source)| Error::Io {
        operation: "look for backing files in",
        path: dir,
        source,
    })?;
    let Some(mut place) = place else {
        return Err(Error::BackingForbidden {
            image: path.to_owned(),
            backing: name_text(&backing.name),
        });
    };
    while let Some((name, format)) = next_backing(options, &chain)? {
        let image = chain.last().expect("the image itself").path.clone();
        let backing = name.display().to_string();
        let root = place.root().to_owned();
        let others = chain[1..].iter().map(|file| file.path.as_path());
        let (file, path, below) = place.open(&name, direct).map_err(|refusal| match refusal {
            Refusal::Outside => Error::BackingOutside {
                needed: place::directory_for(&image, &name, others),
                image,
                backing,
                allowed: root,
            },
            Refusal::Io(source) => Error::BackingOpen {
                image,
                backing,
                dir: root,
                source,
            },
        })?;
        chain.push(admit(options, &chain, file, path, format)?);
        place = below;
    }
    Ok(chain)
}

fn open_fds_themselves(
    options: &OpenOptions,
    image: OwnedFd,
    backing: Vec<OwnedFd>,
) -> Result<Vec<ChainFile>> {
    let given = backing.len();
    let (image, path) = from_fd(options, image)?;
    if !options.read_only && !image.is_writable() {
        return Err(Error::invalid(format!(
            "{}: the descriptor is not open for writing; open it so, or open the device read-only",
            path.display()
        )));
    }
    let mut chain = vec![admit(options, &[], image, path, options.format)?];
    let mut backing = backing.into_iter();
    while let Some((_, format)) = next_backing(options, &chain)? {
        let Some(fd) = backing.next() else {
            let image = chain[0].path.clone();
            return Err(Error::BackingCount {
                image,
                given,
                needed: chain.len(),
                at_least: true,
            });
        };
        let (file, path) = from_fd(options, fd)?;
        chain.push(admit(options, &chain, file, path, format)?);
    }
    if backing.next().is_some() {
        let image = chain[0].path.clone();
        return Err(Error::BackingCount {
            image,
            given,
            needed: chain.len() - 1,
            at_least: false,
        });
    }
    Ok(chain)
}

/// Bytes of the disk that a raw file is: whole sectors, as QEMU has it.
pub(crate) fn raw_size(file: &OpenFile, path: &Path) -> Result<u64> {
    let bytes = file.file_len().map_err(Error::io("measure", path))?;
    Ok(bytes.checked_next_multiple_of(512).unwrap_or(bytes))
}

/// Reads and parses a header.
pub(crate) fn read_header(file: &OpenFile, path: &Path) -> Result<Header> {
    let (start, file_bytes) = read_start(file, path)?;
    Header::parse(&start, file_bytes).map_err(refused(file, path))
}

/// The same of an image that is only looked at: with what is wrong, where it can be understood all
/// the same.
pub(crate) fn read_header_leniently(
    file: &OpenFile,
    path: &Path,
) -> Result<(Header, Vec<HeaderFault>)> {
    let (start, file_bytes) = read_start(file, path)?;
    Header::parse_leniently(&start, file_bytes).map_err(refused(file, path))
}

/// Why a header is refused: a file of another format is named.
fn refused(file: &OpenFile, path: &Path) -> impl FnOnce(urus_format::Error) -> Error {
    move |error| match error {
        // Version 1 is another format, though its magic number is the same.
        urus_format::Error::NotQcow2
        | urus_format::Error::Invalid {
            field: "version",
            value: 1,
            ..
        } => Error::NotQcow2 {
            path: path.to_owned(),
            found: foreign::recognise(file),
        },
        error => Error::format(path)(error),
    }
}

/// The first cluster at least, and the file's length.
fn read_start(file: &OpenFile, path: &Path) -> Result<(Vec<u8>, u64)> {
    let read = |bytes| {
        file.read_prefix(bytes)
            .map_err(Error::io("read the header", path))
    };
    let file_bytes = file.file_len().map_err(Error::io("measure", path))?;
    let mut start = read(limits::HEADER_READ_BYTES)?;
    if let Some(cluster_bytes) = stated_cluster_bytes(&start)
        && cluster_bytes > start.len()
    {
        start = read(cluster_bytes)?;
    }
    Ok((start, file_bytes))
}

/// The cluster size that a header states, as far as it is legal: only to know how much to read.
fn stated_cluster_bytes(start: &[u8]) -> Option<usize> {
    let bits = u32::from_be_bytes(start.get(20..24)?.try_into().ok()?);
    (urus_format::MIN_CLUSTER_BITS..=urus_format::MAX_CLUSTER_BITS)
        .contains(&bits)
        .then(|| 1 << bits)
}

/// Locks the next file of the chain, reads its header, and decides whether it can be used.
fn admit(
    options: &OpenOptions,
    above: &[ChainFile],
    file: OpenFile,
    path: PathBuf,
    format: Format,
) -> Result<ChainFile> {
    let identity = identity(&file).map_err(Error::io("inspect", &path))?;
    // Before the lock: a file of the chain above would refuse it, and say the wrong thing.
    if let Some(image) = above.last()
        && above.iter().any(|other| other.identity == identity)
    {
        return Err(Error::BackingLoop {
            image: image.path.clone(),
            backing: path.display().to_string(),
        });
    }
    let write = above.is_empty() && !options.read_only;
    let file = lock(options, file, &path, write)?;
    let header = read_if_qcow2(&file, &path, format)?;
    let alignment = u64::from(file.properties().alignment);
    if let Some(header) = &header
        && alignment > header.geometry().cluster_bytes()
    {
        tracing::warn!(
            image = %path.display(),
            alignment,
            cluster_bytes = header.geometry().cluster_bytes(),
            "O_DIRECT needs larger blocks than a cluster: the page cache is used instead"
        );
        // The lock is let go for a moment, so what the header says is asked again.
        let file = lock(
            options,
            buffered(file).map_err(Error::io("open", &path))?,
            &path,
            write,
        )?;
        let header = read_if_qcow2(&file, &path, format)?;
        return finish(file, path, header, identity, write);
    }
    finish(file, path, header, identity, write)
}

fn finish(
    file: OpenFile,
    path: PathBuf,
    header: Option<Box<Header>>,
    identity: (u64, u64),
    write: bool,
) -> Result<ChainFile> {
    if let Some(header) = &header {
        header
            .check_supported(write)
            .map_err(Error::format(&path))?;
    } else {
        foreign::warn_if_no_disk(&file, &path);
    }
    Ok(ChainFile {
        file,
        path,
        header,
        identity,
    })
}

fn read_if_qcow2(file: &OpenFile, path: &Path, format: Format) -> Result<Option<Box<Header>>> {
    match format {
        Format::Qcow2 => Ok(Some(Box::new(read_header(file, path)?))),
        Format::Raw => Ok(None),
    }
}

fn lock(options: &OpenOptions, file: OpenFile, path: &Path, write: bool) -> Result<OpenFile> {
    if options.lock {
        let mode = if write {
            LockMode::Write
        } else {
            LockMode::Read
        };
        file.lock(mode).map_err(Error::lock(path))?;
    }
    Ok(file)
}

/// The same open file, through the page cache.
fn buffered(file: OpenFile) -> io::Result<OpenFile> {
    let name = file.name().to_owned();
    let fd = OwnedFd::from(file.try_clone_file()?);
    drop(file);
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags - OFlags::DIRECT)?;
    OpenFile::from_fd(fd, name)
}

/// A descriptor's file, past the page cache where that is asked for, and its path as far as `/proc` knows it.
fn from_fd(options: &OpenOptions, fd: OwnedFd) -> Result<(OpenFile, PathBuf)> {
    let number = fd.as_raw_fd();
    let path = fs::read_link(format!("/proc/self/fd/{number}"))
        .unwrap_or_else(|_| PathBuf::from(format!("descriptor {number}")));
    if options.cache == CacheMode::None {
        rustix::fs::fcntl_getfl(&fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | OFlags::DIRECT))
            .map_err(|error| Error::io("use O_DIRECT on", &path)(error.into()))?;
    }
    let file = OpenFile::from_fd(fd, path.display().to_string())
        .map_err(Error::io("use the descriptor of", &path))?;
    Ok((file, path))
}

/// The name and format of the file below the chain so far, if there is one.
fn next_backing(options: &OpenOptions, chain: &[ChainFile]) -> Result<Option<(PathBuf, Format)>> {
    let last = chain.last().expect("the image itself");
    let Some(BackingName { name, format }) = last.backing() else {
        return Ok(None);
    };
    let image = || last.path.clone();
    let backing = || name_text(name);
    if chain.len() >= limits::MAX_CHAIN_LAYERS {
        return Err(Error::ChainTooDeep {
            image: chain[0].path.clone(),
            limit: limits::MAX_CHAIN_LAYERS,
        });
    }
    names::judge(name).map_err(|fault| Error::BackingName {
        image: image(),
        backing: backing(),
        why: fault.to_string(),
    })?;
    let format = match format {
        Some(format) => {
            Format::from_name(format).ok_or_else(|| Error::BackingFormatUnsupported {
                image: image(),
                backing: backing(),
                format: format.clone(),
            })?
        }
        None => options
            .backing_format
            .ok_or_else(|| Error::BackingFormatMissing {
                image: image(),
                backing: backing(),
            })?,
    };
    Ok(Some((PathBuf::from(OsStr::from_bytes(name)), format)))
}

/// A recorded name, for messages.
pub(crate) fn name_text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// What makes two descriptors the same file.
fn identity(file: &OpenFile) -> io::Result<(u64, u64)> {
    let status = rustix::fs::fstat(file)?;
    // A block device is one whatever node it was opened by.
    Ok(if file.is_block_device() {
        (u64::MAX, status.st_rdev)
    } else {
        (status.st_dev, status.st_ino)
    })
}
