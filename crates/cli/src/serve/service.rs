//! What a service manager is told: that the server is ready, that it ends, which process it is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(super) struct ServiceArgs {
    /// Write the process's number here while the image is served
    #[arg(long, value_name = "PATH")]
    pub(super) pid_file: Option<PathBuf>,
}

/// The service manager, if there is one (`NOTIFY_SOCKET`, sd_notify(3)). Its socket is opened early and kept: a confined process makes no
/// connections, which is why this is not left to a library that connects anew for each message.
pub(super) struct Manager(Option<UnixDatagram>);

impl Manager {
    /// Found by the environment. One that does not listen is told in the log: the image is served all the same.
    pub(super) fn find() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
            return Self(None);
        };
        match connect(&name) {
            Ok(socket) => Self(Some(socket)),
            Err(error) => {
                tracing::warn!(?name, %error, "the service manager of NOTIFY_SOCKET cannot be told anything");
                Self(None)
            }
        }
    }

    pub(super) fn ready(&self, image: &Path) {
        self.say(&format!("READY=1\nSTATUS=serving {}", image.display()));
    }

    pub(super) fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=finishing");
    }

    fn say(&self, message: &str) {
        let Some(socket) = &self.0 else { return };
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::warn!(%error, "the service manager does not listen");
        }
    }
}

/// The manager's socket: a path, or an abstract name behind '@'.
fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // A manager that does not read must not hold up the server.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The file with the process's number, removed at the end if it is still this one.
pub(super) struct PidFile(Option<Written>);

struct Written {
    path: PathBuf,
    /// Held open, so that no other file can get its inode number: then what has that number at the path is this one.
    file: File,
}

impl PidFile {
    /// Replaces what is there: a process that was killed may have left it.
    pub(super) fn write(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else {
            return Ok(Self(None));
        };
        write_number(path).map(Self).map_err(|error| {
            Failure::new(format!(
                "{}: the process's number cannot be written: {error}",
                path.display()
            ))
        })
    }
}

/// Writes a new file and gives it the name, so that nobody reads half a number, and the file of another server is not taken for this
/// one. What is no regular file (`/dev/stdout`) is written to, and stays.
fn write_number(path: &Path) -> io::Result<Option<Written>> {
    let number = format!("{}\n", std::process::id());
    if path.symlink_metadata().is_ok_and(|there| !there.is_file()) {
        return fs::write(path, number).map(|()| None);
    }
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}", std::process::id()));
    let new = PathBuf::from(new);
    // What a killed process of the same number has left.
    let _ = fs::remove_file(&new);
    let named = || -> io::Result<File> {
        let mut file = File::create_new(&new)?;
        file.write_all(number.as_bytes())?;
        fs::rename(&new, path)?;
        Ok(file)
    };
    let file = match named() {
        Ok(file) => file,
        // The directory takes no new file, but the one that is there may be written: it cannot be removed either.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && path.exists() => {
            return fs::write(path, number).map(|()| None);
        }
        Err(error) => {
            // The first error is the one to tell.
            let _ = fs::remove_file(&new);
            return Err(error);
        }
    };
    // The process may change its directory.
    let path = std::path::absolute(path)?;
    Ok(Some(Written { path, file }))
}

impl Written {
    /// Whether the path still leads to it, and not to what another process has put there.
    fn is_there(&self) -> io::Result<bool> {
        let there = match self.path.symlink_metadata() {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let ours = self.file.metadata()?;
        Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let Some(written) = &self.0 else { return };
        let removed = match written.is_there() {
            Ok(true) => fs::remove_file(&written.path),
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(path = %written.path.display(), %error, "the pid file stays");
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards the units in `dist/` against options that this program does not have.
    use clap::Parser;

    #[test]
    fn the_units_call_the_program_as_it_is() {
        let unit = include_str!("../../../../dist/urus@.service");
        let line = unit
            .lines()
            .find_map(|line| line.strip_prefix("ExecStart="))
            .expect("a command");
        let words = line
            .split_whitespace()
            .filter(|word| *word != "$URUS_OPTIONS")
            .map(|word| word.replace("%i", "disk").replace("%t", "/run"));
        let cli = crate::Cli::try_parse_from(words).expect("options that there are");
        let crate::Command::Serve(args) = cli.command else {
            panic!("the unit serves");
        };
        assert!(args.image.ends_with("disk.qcow2"));
    }
}
