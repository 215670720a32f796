//! Confining a server: no more files, no more system calls than serving takes (docs/SANDBOX.md).

use std::path::{Path, PathBuf};

use urus_sandbox::FileAccess;

use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct SandboxArgs {
    /// Do not confine the server: by default it can open no file and make no connection once it runs (Landlock, seccomp)
    #[arg(long)]
    no_sandbox: bool,
}

impl SandboxArgs {
    /// To be called when all files are open, and before the first thread. All that can be done with a path from now on is to make the
    /// unix sockets `to_make`, and to remove those and the files `made`: strictly, any in their directories.
    pub(crate) fn restrict_files<'a>(
        &self,
        to_make: impl IntoIterator<Item = &'a Path>,
        made: impl IntoIterator<Item = &'a Path>,
    ) -> Result<(), Failure> {
        if self.no_sandbox {
            return Ok(());
        }
        let mut access = FileAccess::none();
        for directory in to_make.into_iter().filter_map(directory) {
            access = access.sockets_in(directory);
        }
        for directory in made.into_iter().filter_map(directory) {
            access = access.removed_in(directory);
        }
        access.restrict().map(|_| ()).map_err(failure)
    }

    /// To be called when everything runs: system calls that only starting needs are refused from now on.
    pub(crate) fn restrict_calls(&self) -> Result<(), Failure> {
        if self.no_sandbox {
            return Ok(());
        }
        urus_sandbox::restrict_calls().map_err(failure)
    }
}

/// Where a file lies, whatever directory the process is in.
fn directory(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.parent().map(Path::to_owned)
}

fn failure(error: urus_sandbox::Error) -> Failure {
    Failure::new(format!("{error}; --no-sandbox serves without"))
}
