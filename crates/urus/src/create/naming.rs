//! How a new image gets its name: whole and durable, or not at all, whenever the process is killed.
//!
//! The image is written to a file without a name ([`Staged`]) and synced before the name is made. Where a file system has no
//! such files, the file has a hidden name beside the image's until then: that name is all that a kill can leave.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{
    AtFlags, CWD, Gid, IFlags, Mode, OFlags, RenameFlags, Stat, Uid, XattrFlags, fchmod, fchown,
    fgetxattr, flistxattr, fsetxattr, fstat, ioctl_getflags, linkat, openat, renameat_with,
};
use rustix::io::Errno;

use crate::place::directory_of;

/// Where a file has its name until it is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Staging {
    /// It has none (O_TMPFILE).
    Nameless,
    /// A hidden one, in the same directory.
    Hidden,
}

/// A file that is being written and does not have its name yet. Dropped, it is gone.
pub(super) struct Staged {
    file: File,
    /// The directory of the name that it will get.
    dir: PathBuf,
    hidden: Option<PathBuf>,
}

impl Staged {
    /// A new file, to be named in that directory: readable and writable, mode 0644 less the umask.
    ///
    /// # Errors
    /// As open(2); `Unsupported` where there are no files without names.
    pub(super) fn new(dir: &Path, staging: Staging) -> io::Result<Self> {
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let (fd, hidden) = match staging {
            Staging::Nameless => {
                let opened = openat(CWD, dir, flags | OFlags::TMPFILE, mode);
                (opened.map_err(nameless)?, None)
            }
            Staging::Hidden => {
                let path = hidden_name(dir);
                let flags = flags | OFlags::CREATE | OFlags::EXCL;
                (openat(CWD, &path, flags, mode)?, Some(path))
            }
        };
        Ok(Self {
            file: File::from(fd),
            dir: dir.to_owned(),
            hidden,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Names the file, which is whole and durable, where nothing has that name; durably.
    ///
    /// # Errors
    /// `AlreadyExists`; `Unsupported` where a file without a name cannot be given one.
    pub(super) fn name_new(mut self, path: &Path) -> io::Result<()> {
        match &self.hidden {
            None => self.link(path)?,
            Some(hidden) => {
                rename_to_new(hidden, path)?;
                self.hidden = None;
            }
        }
        self.sync_directory()
    }

    /// Gives the file, which is whole and durable, the name of another, which loses it; durably.
    ///
    /// # Errors
    /// As rename(2); `Unsupported` where a file without a name cannot be given one.
    pub(super) fn name_over(mut self, path: &Path) -> io::Result<()> {
        if self.hidden.is_none() {
            let hidden = hidden_name(&self.dir);
            self.link(&hidden)?;
            self.hidden = Some(hidden);
        }
        let hidden = self.hidden.as_ref().expect("just made");
        fs::rename(hidden, path)?;
        self.hidden = None;
        self.sync_directory()
    }

    fn link(&self, path: &Path) -> io::Result<()> {
        match linkat(&self.file, "", CWD, path, AtFlags::EMPTY_PATH) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => return Err(Errno::EXIST.into()),
            // Before Linux 6.10 that took CAP_DAC_READ_SEARCH.
            Err(_) => {}
        }
        let ours = format!("/proc/self/fd/{}", self.file.as_fd().as_raw_fd());
        match linkat(CWD, ours, CWD, path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => Ok(()),
            Err(error @ (Errno::EXIST | Errno::NOSPC | Errno::DQUOT)) => Err(error.into()),
            // No /proc, or a file system that links no such file: there is another way.
            Err(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Makes the new name durable.
    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            // The error that led here is the one to tell.
            let _ = fs::remove_file(hidden);
        }
    }
}

/// What open(2) says where there are no files without names: it differs from one file system and kernel to the other.
fn nameless(error: Errno) -> io::Error {
    match error {
        Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL => io::ErrorKind::Unsupported.into(),
        error => error.into(),
    }
}

fn hidden_name(dir: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    dir.join(format!(".urus-new-{}-{number}", std::process::id()))
}

/// Renames, and never over something.
fn rename_to_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        result => return Ok(result?),
    }
    match fs::hard_link(from, to) {
        Ok(()) => return fs::remove_file(from),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error),
        Err(_) => {}
    }
    // No file system is known that has neither. The name is taken by an empty file, which nobody can miss.
    File::create_new(to)?;
    fs::rename(from, to)
}

/// Where the path leads, through symbolic links, the last of which may lead to nothing. The kernel has followed them before, and may have
/// refused to (fs.protected_symlinks): this is not asked of links that it would not follow.
pub(super) fn destination(path: &Path) -> io::Result<PathBuf> {
    const LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = directory_of(&path).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(Errno::LOOP.into())
}

/// Whether the path leads to that open file.
pub(super) fn leads_to(path: &Path, file: impl AsFd) -> io::Result<bool> {
    let open = fstat(file)?;
    match rustix::fs::stat(path) {
        Ok(there) => Ok((there.st_dev, there.st_ino) == (open.st_dev, open.st_ino)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether the file that replaces `old` can be made to look like it: owner, mode, attributes. One that has other names too is not
/// to be replaced, since those would go on naming the old one.
pub(super) fn take_after(new: &File, old: impl AsFd) -> bool {
    let old = old.as_fd();
    let try_to = || -> rustix::io::Result<bool> {
        let (theirs, ours) = (fstat(old)?, fstat(new)?);
        if theirs.st_nlink != 1 {
            return Ok(false);
        }
        take_owner(new, &theirs, &ours)?;
        fchmod(new, Mode::from_raw_mode(theirs.st_mode & 0o7777))?;
        // Last: an access control list is one of them.
        take_attributes(new, old)?;
        Ok(inode_flags(old) == inode_flags(new.as_fd()))
    };
    matches!(try_to(), Ok(true))
}

fn take_owner(new: &File, theirs: &Stat, ours: &Stat) -> rustix::io::Result<()> {
    if (theirs.st_uid, theirs.st_gid) == (ours.st_uid, ours.st_gid) {
        return Ok(());
    }
    let owner = Uid::from_raw(theirs.st_uid);
    fchown(new, Some(owner), Some(Gid::from_raw(theirs.st_gid)))
}

fn take_attributes(new: &File, old: impl AsFd) -> rustix::io::Result<()> {
    let old = old.as_fd();
    // The kernel's own limits, of the list and of a value.
    let mut names = vec![0_u8; 64 << 10];
    let bytes = match flistxattr(old, &mut names[..]) {
        Err(Errno::OPNOTSUPP) => return Ok(()),
        result => result?,
    };
    let mut value = vec![0_u8; 64 << 10];
    for name in names[..bytes].split(|&byte| byte == 0) {
        if !name.is_empty() {
            let len = fgetxattr(old, name, &mut value[..])?;
            fsetxattr(new, name, &value[..len], XattrFlags::empty())?;
        }
    }
    Ok(())
}

/// The flags that somebody may have set on purpose (chattr(1)).
fn inode_flags(file: std::os::fd::BorrowedFd<'_>) -> IFlags {
    let chosen = IFlags::NOCOW
        | IFlags::COMPRESSED
        | IFlags::NOATIME
        | IFlags::JOURNALING
        | IFlags::SYNC
        | IFlags::NODUMP;
    ioctl_getflags(file).unwrap_or(IFlags::empty()) & chosen
}
