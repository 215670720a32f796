//! The files that unix sockets leave: whose they are, and when they may go.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::Error;

/// The file of a socket that we have made. Removed on drop if it is still the same.
#[derive(Debug)]
pub(crate) struct SocketFile {
    /// Absolute: the process may change its directory.
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let path = std::path::absolute(path).ok()?;
        let identity = identity(&path)?;
        Some(Self { path, identity })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = path.symlink_metadata().ok()?;
    found
        .file_type()
        .is_socket()
        .then(|| (found.dev(), found.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) != Some(self.identity) {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// What is at a path where a socket should be made.
pub(crate) fn in_the_way(path: PathBuf) -> Error {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Error::NotASocket { path };
    }
    match UnixStream::connect(&path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Error::SocketStale { path }
        }
        _ => Error::SocketInUse { path },
    }
}
