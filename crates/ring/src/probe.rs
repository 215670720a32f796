//! Finds out, once at open, what a file can do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, OFlags, StatxFlags};
use rustix::io::Errno;

use crate::memory::Buffer;

/// What kind of file is behind a descriptor; nothing else is accepted as an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    BlockDevice,
}

/// The kind of an open file.
///
/// # Errors
/// `InvalidInput` for anything but a regular file or a block device.
pub(crate) fn kind(fd: BorrowedFd<'_>) -> io::Result<FileKind> {
    match rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) {
        rustix::fs::FileType::RegularFile => Ok(FileKind::Regular),
        rustix::fs::FileType::BlockDevice => Ok(FileKind::BlockDevice),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "this is {}; an image is a regular file or a block device",
                describe(other)
            ),
        )),
    }
}

/// For people.
fn describe(kind: rustix::fs::FileType) -> &'static str {
    use rustix::fs::FileType;
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a named pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "a file of an unknown kind",
    }
}

/// The alignment in bytes that offsets, lengths and memory need: 1 for a buffered file.
///
/// # Errors
/// `Unsupported` when the file is open for O_DIRECT and its file system says that it cannot do it.
pub(crate) fn alignment(fd: BorrowedFd<'_>, kind: FileKind) -> io::Result<u32> {
    if !rustix::fs::fcntl_getfl(fd)?.contains(OFlags::DIRECT) {
        return Ok(1);
    }
    // Linux 6.1 and later say it. The memory alignment it reports may be as low as 4, but up to 6.17 each piece of a
    // vectored operation must also be a multiple of the offset alignment long: so the larger one serves for both.
    match rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(status) if status.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            return match status.stx_dio_offset_align.max(status.stx_dio_mem_align) {
                0 => Err(direct_refused()),
                align => Ok(align.max(512)),
            };
        }
        _ => {}
    }
    if kind == FileKind::BlockDevice
        && let Ok(sector) = rustix::fs::ioctl_blksszget(fd)
    {
        return Ok(sector);
    }
    // A read past the end of file may succeed with any alignment, so a short file proves nothing: take the larger.
    let mut block = Buffer::new(4096);
    if u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0) >= 4096 {
        match rustix::io::pread(fd, &mut block.as_mut_slice()[..512], 0) {
            Ok(_) => return Ok(512),
            Err(Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match rustix::io::pread(fd, block.as_mut_slice(), 0) {
        Ok(_) => Ok(4096),
        Err(Errno::INVAL) => Err(direct_refused()),
        Err(error) => Err(error.into()),
    }
}

/// The error for a file that cannot be opened with O_DIRECT.
pub(crate) fn direct_refused() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "the file system refuses O_DIRECT here; use the page cache instead",
    )
}

/// Whether (punch, zero range) can be expected to work. A guess from the file system's kind, because trying it would
/// change the file; the drivers correct it when the kernel answers EOPNOTSUPP.
pub(crate) fn fallocate_abilities(fd: BorrowedFd<'_>, kind: FileKind) -> (bool, bool) {
    /// `f_type` of file systems that do both: ext4, XFS, btrfs, f2fs.
    const BOTH: [u64; 4] = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010];
    const TMPFS: u64 = 0x0102_1994;
    if kind == FileKind::BlockDevice {
        // blkdev_fallocate does both, whatever the device; a device without them answers EOPNOTSUPP.
        return (true, true);
    }
    let magic = rustix::fs::fstatfs(fd).map_or(0, |status| {
        u64::try_from(status.f_type).unwrap_or(0) & 0xFFFF_FFFF
    });
    (
        BOTH.contains(&magic) || magic == TMPFS,
        BOTH.contains(&magic),
    )
}

/// Length in bytes, now.
///
/// # Errors
/// As the operating system says.
pub(crate) fn len(fd: impl AsFd, kind: FileKind) -> io::Result<u64> {
    match kind {
        FileKind::Regular => Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0)),
        // All our I/O is positioned, so moving the file position harms nobody.
        FileKind::BlockDevice => Ok(rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))?),
    }
}
