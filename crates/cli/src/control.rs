//! The control socket of a server: how an image is reached while a process holds it (docs/CONTROL.md). `protocol` is what is said, `server` the
//! side of the process that has the image, [`crate::ctl`] the other.

pub(crate) mod protocol;
mod server;

use std::path::{Path, PathBuf};

use urus_listen::Listener;

pub(crate) use server::{Control, Controlled};

use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct ControlArgs {
    /// Take commands here (unix:PATH, for the same user only): see `urus ctl --help`. A socket that a killed server has left is replaced
    #[arg(long, value_name = "ADDRESS", value_parser = path)]
    control: Option<PathBuf>,
}

impl ControlArgs {
    /// The socket's path, if one is wanted.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.control.as_deref()
    }

    /// Listens, so that an address that is taken costs nothing. Commands wait until the server starts.
    pub(crate) fn bind(&self) -> Result<Option<Listener>, Failure> {
        let bind = |path: &PathBuf| Listener::bind_private(path);
        Ok(self.control.as_ref().map(bind).transpose()?)
    }
}

/// The path of a control socket: `unix:PATH`.
fn path(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        None if text.contains('/') => Ok(text.into()),
        _ => Err("give unix:PATH: commands are taken from this machine only".into()),
    }
}

/// The same, where a bare path is clear enough.
pub(crate) fn path_or_address(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:").unwrap_or(text) {
        "" => Err("give unix:PATH or PATH".into()),
        path => Ok(path.into()),
    }
}
