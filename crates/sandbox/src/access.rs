//! Landlock: no files but those that are open, no network but what is listened to.

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::Error;

/// What a process may still do with paths: nothing, but for what is named here. Open descriptors are not affected.
#[derive(Clone, Debug, Default)]
pub struct FileAccess {
    sockets_in: Vec<PathBuf>,
    removed_in: Vec<PathBuf>,
}

/// How much of it this kernel keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// All of it (Linux 6.12 or later).
    Fully,
    /// Access to files; some of the rest (TCP, abstract sockets, signals) is for newer kernels.
    Partly,
    /// None: this kernel has no Landlock, or it is not switched on.
    Not,
}

impl FileAccess {
    /// No access at all.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Unix sockets may be made and files removed in this directory and beneath it. One that cannot be opened gives nothing: whoever wants to use it is told.
    #[must_use]
    pub fn sockets_in(mut self, directory: impl Into<PathBuf>) -> Self {
        self.sockets_in.push(directory.into());
        self
    }

    /// Files may be removed in this directory and beneath it: what the process has made before and takes away when it ends.
    #[must_use]
    pub fn removed_in(mut self, directory: impl Into<PathBuf>) -> Self {
        self.removed_in.push(directory.into());
        self
    }

    /// Restricts the calling thread and all that it starts from now on, for good. TCP can be neither bound nor connected then, abstract unix
    /// sockets of others not connected, and no other process be signalled, where the kernel has that.
    ///
    /// A kernel without Landlock is said in the log as a warning, and is no error.
    ///
    /// # Errors
    /// A kernel that has Landlock and refuses.
    pub fn restrict(&self) -> Result<Enforced, Error> {
        /// Linux 6.12. Older kernels keep what they know of it.
        const WANTED: ABI = ABI::V6;
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(WANTED))?
            .handle_access(AccessNet::from_all(WANTED))?
            .scope(Scope::from_all(WANTED))?
            .create()?;
        let remove = AccessFs::RemoveFile;
        let granted = [
            (&self.sockets_in, remove | AccessFs::MakeSock),
            (&self.removed_in, remove.into()),
        ];
        for (directories, access) in granted {
            for directory in directories {
                if let Ok(directory) = PathFd::new(directory) {
                    ruleset = ruleset.add_rule(PathBeneath::new(directory, access))?;
                }
            }
        }
        // Sets no_new_privs as well.
        let enforced = match ruleset.restrict_self()?.ruleset {
            RulesetStatus::FullyEnforced => Enforced::Fully,
            RulesetStatus::PartiallyEnforced => Enforced::Partly,
            RulesetStatus::NotEnforced => Enforced::Not,
        };
        match enforced {
            Enforced::Not => tracing::warn!(
                "this kernel has no Landlock, or it is not switched on: access to files is restricted by the list of system calls alone"
            ),
            Enforced::Partly => tracing::info!(
                "this kernel's Landlock is older than Linux 6.12: access to files is restricted, the network perhaps not"
            ),
            Enforced::Fully => tracing::debug!("access to files and network is restricted"),
        }
        Ok(enforced)
    }
}
