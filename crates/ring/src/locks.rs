//! Image locks, as QEMU's file-posix driver takes them, so that urus and QEMU keep out of one another's images.
//!
//! A user of an image holds a read lock (OFD, one byte each) on byte `100 + bit` for each permission it uses, and on
//! byte `200 + bit` for each permission it does not share. After taking them it looks for conflicts: another's read
//! lock on `200 + bit` of a permission it uses, or on `100 + bit` of one it does not share. Both sides lock before they
//! look, so of two that race at least one notices.
//!
//! Seen with qemu-io 10.0.2 in /proc/locks: a writer holds 100, 101, 103, 201, 203; a reader, and the opener of a
//! backing file (the overlay writable or not), holds 100, 201, 203. Bit 4 (graph-mod) is never taken any more.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use urus_engine::sync::Ordering;

use crate::files::OpenFile;

/// First of the bytes for permissions in use.
const USED_BASE: i64 = 100;
/// First of the bytes for permissions that are not shared.
const UNSHARED_BASE: i64 = 200;
/// Permissions that exist: consistent read, write, write unchanged, resize, and the historical graph-mod.
const NAMES: [&str; 5] = [
    "consistent read",
    "write",
    "write unchanged",
    "resize",
    "change children",
];

const CONSISTENT_READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// As whom to lock an image. Neither lets anyone else write it meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Reads it, as does the owner of an overlay with its backing files. Others may read too.
    Read,
    /// Reads, writes and resizes it.
    Write,
}

impl LockMode {
    /// Permissions used and permissions not shared, as bits.
    fn permissions(self) -> (u8, u8) {
        match self {
            Self::Read => (CONSISTENT_READ, WRITE | RESIZE),
            Self::Write => (CONSISTENT_READ | WRITE | RESIZE, WRITE | RESIZE),
        }
    }
}

/// Why an image was not locked.
#[derive(Debug)]
#[non_exhaustive]
pub enum LockError {
    /// Another process (or another device of this one) holds it.
    Held {
        /// The image.
        name: String,
        /// What both cannot have, such as "write".
        permission: &'static str,
        /// The other one writes the image; else it reads it, and shares that with readers only.
        by_writer: bool,
    },
    /// Locking does not work there, such as on a network file system without locks.
    Io {
        /// The image.
        name: String,
        /// What fcntl(2) said.
        source: io::Error,
    },
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held {
                name, permission, ..
            } => {
                write!(
                    f,
                    "cannot lock {name}: locked by another process (conflicting lock: {permission})"
                )
            }
            Self::Io { name, source } => write!(f, "cannot lock {name}: {source}"),
        }
    }
}

impl std::error::Error for LockError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Held { .. } => None,
        }
    }
}

impl OpenFile {
    /// Takes the image locks, or changes those held to `mode`. Never waits. They are held until [`unlock`](Self::unlock)
    /// or until the file is closed. When it fails, no locks are held.
    ///
    /// # Errors
    /// [`LockError::Held`] when another user is in the way.
    pub fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        let (used, unshared) = mode.permissions();
        let result = self
            .lock_bytes(used, unshared)
            .and_then(|()| self.find_conflict(used, unshared));
        let error = match result {
            Ok(None) => {
                self.locked.store(true, Ordering::Relaxed);
                return Ok(());
            }
            Ok(Some(bit)) => LockError::Held {
                name: self.name().to_owned(),
                permission: NAMES[bit],
                by_writer: self.has_writer(),
            },
            Err(source) => match source.raw_os_error() {
                // Someone holds a write lock on one of the bytes: not QEMU's way, but a conflict all the same.
                Some(libc::EAGAIN | libc::EACCES) => LockError::Held {
                    name: self.name().to_owned(),
                    permission: "lock bytes",
                    by_writer: true,
                },
                _ => LockError::Io {
                    name: self.name().to_owned(),
                    source,
                },
            },
        };
        let _ = self.unlock();
        Err(error)
    }

    /// Releases the image locks, such as for a migration. [`lock`](Self::lock) takes them again.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn unlock(&self) -> io::Result<()> {
        self.locked.store(false, Ordering::Relaxed);
        let len = i64::try_from(NAMES.len()).expect("a handful");
        self.set_lock(libc::F_UNLCK, USED_BASE, len)?;
        self.set_lock(libc::F_UNLCK, UNSHARED_BASE, len)
    }

    /// Read-locks the bytes of these bits, and lets go of the others.
    fn lock_bytes(&self, used: u8, unshared: u8) -> io::Result<()> {
        for (base, bits) in [(USED_BASE, used), (UNSHARED_BASE, unshared)] {
            for (bit, byte) in (0..NAMES.len()).zip(base..) {
                let kind = if bits & (1 << bit) != 0 {
                    libc::F_RDLCK
                } else {
                    libc::F_UNLCK
                };
                self.set_lock(kind, byte, 1)?;
            }
        }
        Ok(())
    }

    /// The first permission that another holder stands in the way of.
    fn find_conflict(&self, used: u8, unshared: u8) -> io::Result<Option<usize>> {
        for (base, bits) in [(UNSHARED_BASE, used), (USED_BASE, unshared)] {
            for (bit, byte) in (0..NAMES.len()).zip(base..) {
                if bits & (1 << bit) != 0 && self.is_locked_by_others(byte)? {
                    return Ok(Some(bit));
                }
            }
        }
        Ok(None)
    }

    /// Whether another holder writes the image. Only to say so: where it cannot be known, nobody does.
    fn has_writer(&self) -> bool {
        const WRITE_BYTE: i64 = USED_BASE + WRITE.trailing_zeros() as i64;
        self.is_locked_by_others(WRITE_BYTE).unwrap_or(false)
    }

    fn set_lock(&self, kind: libc::c_int, start: i64, len: i64) -> io::Result<()> {
        fcntl_lock(self, libc::F_OFD_SETLK, kind, start, len).map(|_| ())
    }

    fn is_locked_by_others(&self, byte: i64) -> io::Result<bool> {
        Ok(fcntl_lock(self, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)? != libc::F_UNLCK)
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // Closing would do it too, but not at once: a ring that is going away can hold on to the open file a little
        // longer, and whoever opens the image next would find it locked.
        if self.locked.load(Ordering::Relaxed) {
            let _ = self.unlock();
        }
    }
}

/// One fcntl(2) on `[start, start + len)`; returns the kind of lock it reports.
fn fcntl_lock(
    file: &OpenFile,
    command: libc::c_int,
    kind: libc::c_int,
    start: i64,
    len: i64,
) -> io::Result<libc::c_int> {
    let mut lock = libc::flock {
        l_type: libc::c_short::try_from(kind).expect("lock kinds are small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("zero"),
        l_start: start,
        l_len: len,
        l_pid: 0, // OFD locks want it zero
    };
    loop {
        // SAFETY: these commands want a pointer to a `struct flock` to read and write: a local that outlives the call.
        if unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) } == 0 {
            return Ok(libc::c_int::from(lock.l_type));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
