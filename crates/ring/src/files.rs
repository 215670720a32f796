//! The open files of a device, shared by the drivers of all its queues.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, SeekFrom};
use rustix::io::Errno;
use urus_engine::storage::{FileExtent, FileId, FileProperties};
use urus_engine::sync::{Arc, AtomicBool, AtomicU32, Ordering};

use crate::memory::Buffer;
use crate::offload;
use crate::probe::{self, FileKind};
use crate::refusal;

/// An open regular file or block device, with what it can do. Closing it releases its image locks.
pub struct OpenFile {
    fd: OwnedFd,
    name: String,
    kind: FileKind,
    writable: bool,
    /// When it was opened. A memfd has none, nor has a temporary file.
    had_name: bool,
    alignment: u32,
    can_punch: AtomicBool,
    can_zero_range: AtomicBool,
    /// A [`WritesWithoutBlocking`].
    writes_without_blocking: AtomicU32,
    /// Whether [`lock`](Self::lock) took locks that closing must release.
    pub(crate) locked: AtomicBool,
}

impl OpenFile {
    /// Opens an image by path. `direct` bypasses the page cache (O_DIRECT).
    ///
    /// # Errors
    /// As open(2); `InvalidInput` for anything but a regular file or a block device (a FIFO cannot make it hang);
    /// `Unsupported` when O_DIRECT is refused.
    pub fn open_image(path: &Path, read_only: bool, direct: bool) -> io::Result<Self> {
        let access = if read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let fd = refused(
            rustix::fs::open(path, access | open_flags(direct), Mode::empty()),
            direct,
        )?;
        Self::probe(fd, path.display().to_string())
    }

    /// Creates an image that must not exist yet, readable and writable, mode 0644 less the umask.
    ///
    /// # Errors
    /// `AlreadyExists`; else as [`open_image`](Self::open_image).
    pub fn create_image(path: &Path, direct: bool) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | open_flags(direct);
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let fd = refused(rustix::fs::open(path, flags, mode), direct)?;
        Self::probe(fd, path.display().to_string())
    }

    /// Opens a file under a directory, read-only, such as a backing file that an image names. Neither `..` nor
    /// symbolic links get out of the directory, whatever happens to it meanwhile (openat2, RESOLVE_BENEATH).
    ///
    /// # Errors
    /// `CrossesDevices` (EXDEV) when the path would leave the directory; else as [`open_image`](Self::open_image).
    pub fn open_beneath(dir: &OwnedFd, relative: &Path, direct: bool) -> io::Result<Self> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let fd = loop {
            // EAGAIN: a rename raced with the look-up of "..".
            match rustix::fs::openat2(
                dir,
                relative,
                OFlags::RDONLY | open_flags(direct),
                Mode::empty(),
                resolve,
            ) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => break refused(result, direct)?,
            }
        };
        Self::probe(fd, relative.display().to_string())
    }

    /// Takes a descriptor that is already open, such as one passed by a manager process. `name` is for messages.
    ///
    /// # Errors
    /// `InvalidInput` for anything but a regular file or a block device, for one that is not open for reading, or
    /// one open for appending (there the kernel ignores the offset of a write).
    pub fn from_fd(fd: OwnedFd, name: String) -> io::Result<Self> {
        Self::probe(fd, name)
    }

    fn probe(fd: OwnedFd, name: String) -> io::Result<Self> {
        offload::threads_max();
        refusal::look();
        let kind = probe::kind(fd.as_fd())?;
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        let invalid = |message: &str| {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                message.to_owned(),
            ))
        };
        if flags.contains(OFlags::APPEND) {
            return invalid("open for appending, where the kernel ignores the offset of a write");
        }
        if flags.contains(OFlags::PATH) || flags & OFlags::ACCMODE == OFlags::WRONLY {
            return invalid("not open for reading");
        }
        // Opened so that a FIFO could not make open(2) wait.
        rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK)?;
        let (can_punch, can_zero_range) = probe::fallocate_abilities(fd.as_fd(), kind);
        Ok(Self {
            alignment: probe::alignment(fd.as_fd(), kind)?,
            can_punch: AtomicBool::new(can_punch),
            can_zero_range: AtomicBool::new(can_zero_range),
            writes_without_blocking: AtomicU32::new(0),
            locked: AtomicBool::new(false),
            had_name: rustix::fs::fstat(&fd)?.st_nlink > 0,
            writable: flags & OFlags::ACCMODE == OFlags::RDWR,
            fd,
            name,
            kind,
        })
    }

    /// What messages call the file: its path, as given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is open for writing.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it is a block device, of fixed size.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.kind == FileKind::BlockDevice
    }

    /// Whether it has no name any more: it was deleted, or another file has taken its name.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.had_name && rustix::fs::fstat(&self.fd).is_ok_and(|status| status.st_nlink == 0)
    }

    /// What it can do, as far as known by now.
    #[must_use]
    pub fn properties(&self) -> FileProperties {
        FileProperties {
            alignment: self.alignment,
            memory_alignment: self.alignment,
            regular: self.kind == FileKind::Regular,
            can_punch: self.can_punch.load(Ordering::Relaxed),
            can_zero_range: self.can_zero_range.load(Ordering::Relaxed),
        }
    }

    /// Length in bytes, now; for a block device its size.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn file_len(&self) -> io::Result<u64> {
        probe::len(&self.fd, self.kind)
    }

    /// Whether there is data at `offset` or a hole, and for how long, `len` bytes at most (SEEK_DATA, SEEK_HOLE). Where the file system does not
    /// know, it is data.
    #[must_use]
    pub fn extent(&self, offset: u64, len: u64) -> FileExtent {
        let next = offset.saturating_add(1);
        let end = offset.saturating_add(len).max(next);
        // The descriptor's position is nobody's: all I/O says where.
        let seek = |from| rustix::fs::seek(&self.fd, from);
        let (data, until) = match seek(SeekFrom::Data(offset)) {
            Ok(start) if start > offset => (false, start),
            Ok(_) => (true, seek(SeekFrom::Hole(offset)).unwrap_or(end)),
            // Nothing but a hole up to the end, or nothing at all.
            Err(Errno::NXIO) => (false, end),
            Err(_) => (true, end),
        };
        FileExtent {
            data,
            len: until.clamp(next, end) - offset,
        }
    }

    /// Reads up to `len` bytes at `offset`, blocking; fewer only at the end of file. For looking at headers: any
    /// offset and length will do, O_DIRECT's alignment is seen to.
    ///
    /// # Errors
    /// As pread(2).
    pub fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let align = u64::from(self.alignment);
        let skip = usize::try_from(offset % align).expect("less than the alignment");
        let start = offset - offset % align;
        let total =
            (skip + len).next_multiple_of(usize::try_from(align).expect("32 bits fit a usize"));
        let mut buffer = Buffer::new(total);
        let mut done = 0;
        while done < total {
            let position = start + u64::try_from(done).expect("a length fits 64 bits");
            match rustix::io::pread(&self.fd, &mut buffer.as_mut_slice()[done..], position) {
                Ok(0) => break,
                // A short read that ends between blocks is the end of file under O_DIRECT; it could not go on anyway.
                Ok(read)
                    if !(done + read).is_multiple_of(usize::try_from(align).expect("fits")) =>
                {
                    done += read;
                    break;
                }
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let end = done.min(skip + len);
        Ok(buffer.as_slice()[skip.min(end)..end].to_vec())
    }

    /// Reads up to the first `len` bytes; fewer where the file is shorter.
    ///
    /// # Errors
    /// As pread(2).
    pub fn read_prefix(&self, len: usize) -> io::Result<Vec<u8>> {
        self.read_at(0, len)
    }

    /// Reads exactly `len` bytes at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` where the file ends before that; else as pread(2).
    pub fn read_exact_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let bytes = self.read_at(offset, len)?;
        if bytes.len() < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes)
    }

    /// Notes that the file system turned out not to do it.
    pub(crate) fn learn_no_punch(&self) {
        self.can_punch.store(false, Ordering::Relaxed);
    }

    /// Notes that it worked. Stores only on a change, so that the line stays shared between queues.
    pub(crate) fn learn_punch(&self) {
        if !self.can_punch.load(Ordering::Relaxed) {
            self.can_punch.store(true, Ordering::Relaxed);
        }
    }

    /// Notes that the file system turned out not to do it.
    pub(crate) fn learn_no_zero_range(&self) {
        self.can_zero_range.store(false, Ordering::Relaxed);
    }

    /// Whether its data goes past the page cache.
    #[inline]
    pub(crate) fn is_direct(&self) -> bool {
        self.alignment > 1
    }

    /// Whether it is a regular file whose data goes through the page cache.
    pub(crate) fn is_buffered_regular(&self) -> bool {
        self.alignment == 1 && self.kind == FileKind::Regular
    }

    /// What is known of buffered writes that do not block.
    pub(crate) fn writes_without_blocking(&self) -> WritesWithoutBlocking {
        match self.writes_without_blocking.load(Ordering::Relaxed) {
            0 => WritesWithoutBlocking::Unknown,
            1 => WritesWithoutBlocking::No,
            _ => WritesWithoutBlocking::Yes,
        }
    }

    /// Notes what the first one has shown.
    pub(crate) fn learn_writes_without_blocking(&self, can: bool) {
        self.writes_without_blocking
            .store(1 + u32::from(can), Ordering::Relaxed);
    }

    /// A second handle of the same open file, for callers that want std's.
    ///
    /// # Errors
    /// As dup(2).
    pub fn try_clone_file(&self) -> io::Result<File> {
        Ok(File::from(self.fd.try_clone()?))
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenFile")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("writable", &self.writable)
            .field("alignment", &self.alignment)
            .finish_non_exhaustive()
    }
}

/// Whether a file system takes buffered writes with RWF_NOWAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WritesWithoutBlocking {
    /// No write was tried yet.
    Unknown,
    /// io_uring hands each to a worker.
    No,
    Yes,
}

/// Flags for every open: nothing inherited by children, nothing that waits.
fn open_flags(direct: bool) -> OFlags {
    let base = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    if direct { base | OFlags::DIRECT } else { base }
}

/// Says it where O_DIRECT may be what open(2) refused.
fn refused(result: rustix::io::Result<OwnedFd>, direct: bool) -> io::Result<OwnedFd> {
    result.map_err(|error| {
        if direct && error == Errno::INVAL {
            probe::direct_refused()
        } else {
            error.into()
        }
    })
}

/// The open files of a device: [`FileId`] is the index. Shared by the drivers of all queues; never changes.
#[derive(Debug)]
pub struct FileSet {
    files: Vec<OpenFile>,
}

impl FileSet {
    /// The image first, then its backing files, nearest first (and wherever the engine puts a data file).
    ///
    /// # Panics
    /// With more files than [`FileId`] can name.
    #[must_use]
    pub fn new(files: Vec<OpenFile>) -> Arc<Self> {
        assert!(
            files.len() <= usize::from(u16::MAX) + 1,
            "a file id has 16 bits"
        );
        Arc::new(Self { files })
    }

    /// A file of the set.
    ///
    /// # Panics
    /// When there is no such file.
    #[must_use]
    pub fn file(&self, id: FileId) -> &OpenFile {
        &self.files[usize::from(id.0)]
    }

    /// How many files.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// All files, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &OpenFile> {
        self.files.iter()
    }

    pub(crate) fn raw_fd(&self, id: FileId) -> RawFd {
        self.file(id).fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    //! Guards against holes that are told as data, and the other way round.
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_found_between_data() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 65_536], 256 << 10).unwrap();
        let file = OpenFile::from_fd(file.into(), "a file".into()).unwrap();
        let at = |offset: u64, len: u64| {
            let FileExtent { data, len } = file.extent(offset, len);
            (data, len)
        };
        assert_eq!(at(0, 1 << 20), (false, 256 << 10));
        assert_eq!(at(1000, 100), (false, 100));
        assert_eq!(at(256 << 10, 1 << 20), (true, 64 << 10));
        assert_eq!(at((256 << 10) + 1, 7), (true, 7));
        assert_eq!(at(320 << 10, 1 << 30), (false, 1 << 30));
        assert_eq!(at(1 << 30, 1), (false, 1));
        assert_eq!(at(u64::MAX, u64::MAX).1, 0, "no overflow");
    }
}
