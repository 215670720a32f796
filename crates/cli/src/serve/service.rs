//! What a service manager is told: that the server is ready, that it ends, which process it is.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
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

/// The file with the process's number, removed at the end.
pub(super) struct PidFile(Option<PathBuf>);

impl PidFile {
    /// Replaces what is there: a process that was killed may have left it.
    pub(super) fn write(path: Option<&Path>) -> Result<Self, Failure> {
        if let Some(path) = path {
            fs::write(path, format!("{}\n", std::process::id())).map_err(|error| {
                Failure::new(format!(
                    "{}: the process's number cannot be written: {error}",
                    path.display()
                ))
            })?;
        }
        Ok(Self(path.map(Path::to_owned)))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "the pid file stays");
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
