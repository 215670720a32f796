//! Confining a server: no more files, no more system calls than serving takes (docs/SANDBOX.md).

use std::path::Path;

use urus_sandbox::FileAccess;

use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct SandboxArgs {
    /// Do not confine the server: by default it can open no file and make no connection once it runs (Landlock, seccomp)
    #[arg(long)]
    no_sandbox: bool,
}

impl SandboxArgs {
    /// To be called when all files are open, and before the first thread: from now on unix sockets can be made and removed in the
    /// directories of these paths, and that is all that can be done with a path.
    pub(crate) fn restrict_files<'a>(
        &self,
        sockets: impl IntoIterator<Item = &'a Path>,
    ) -> Result<(), Failure> {
        if self.no_sandbox {
            return Ok(());
        }
        let mut access = FileAccess::none();
        for socket in sockets {
            if let Ok(path) = std::path::absolute(socket)
                && let Some(directory) = path.parent()
            {
                access = access.sockets_in(directory);
            }
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

fn failure(error: urus_sandbox::Error) -> Failure {
    Failure::new(format!("{error}; --no-sandbox serves without"))
}
