//! Where tests put their files: a directory of their own on the disk that holds the target directory.
//!
//! Not the system's temporary directory, which may be a tmpfs: that accepts O_DIRECT of any alignment and so hides
//! mistakes. Sockets are the exception; their paths are limited to 107 bytes, so they live in the temporary directory.

use std::path::{Path, PathBuf};

/// A directory that goes away with its owner.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    /// A new empty directory.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let parent = shared_directory("urus-scratch");
        let directory = tempfile::Builder::new()
            .prefix("t")
            .tempdir_in(&parent)
            .unwrap_or_else(|error| {
                panic!("no scratch directory in {}: {error}", parent.display())
            });
        Self { directory }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A file in it, which need not exist.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// `<target>/<name>`, made when it is missing.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn shared_directory(name: &str) -> PathBuf {
    let directory = profile_directory()
        .parent()
        .expect("a profile directory has a parent")
        .join(name);
    std::fs::create_dir_all(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    directory
}

/// `<target>/<profile>`: the directory that the running program was built into, or, if it is a test, the one above.
///
/// # Panics
/// When the running program was not built by Cargo.
#[must_use]
pub fn profile_directory() -> PathBuf {
    let this = std::env::current_exe().expect("the path of the running test");
    let directory = this.parent().expect("a program lies in a directory");
    let profile = if directory.ends_with("deps") {
        directory
            .parent()
            .expect("deps lies in a profile directory")
    } else {
        directory
    };
    assert!(
        profile.join("deps").is_dir(),
        "{} is not where Cargo puts programs",
        this.display()
    );
    profile.to_owned()
}
