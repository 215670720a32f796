//! Checking and repairing an image that nobody has open.

use std::path::Path;

use urus_engine::check::{CheckReport, Repair};
use urus_format::FaultKind;
use urus_ring::{Driver, DriverKind, FileSet, LockMode, OpenFile};

use crate::chain;
use crate::error::{Error, Result};

/// Operations that a check has in flight at most.
const DEPTH: u32 = 64;

/// Checks the metadata of the QCOW2 image at `path`, and repairs what `repair` says. Backing files are not
/// looked at. Without a repair nothing is changed, whatever is found.
///
/// # Errors
/// A file that is no QCOW2 image or has features that the check does not know; [`Error::InUse`] where somebody
/// has it open; a failed write of a repair, which leaves what was wrong marked as wrong.
pub fn check(path: impl AsRef<Path>, repair: Repair) -> Result<CheckReport> {
    check_with(path, CheckOptions::new().repair(repair))
}

/// How [`check_with`] checks.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    repair: Repair,
    lock: bool,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self {
            repair: Repair::None,
            lock: true,
        }
    }
}

impl CheckOptions {
    /// Nothing is repaired; the image is locked.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What to repair.
    pub fn repair(&mut self, repair: Repair) -> &mut Self {
        self.repair = repair;
        self
    }

    /// Take QEMU's image locks (default). Without them an image can be checked while another process writes it; what
    /// is found may be wrong then. A repair needs them.
    pub fn lock(&mut self, lock: bool) -> &mut Self {
        self.lock = lock;
        self
    }
}

/// As [`check`], with options.
///
/// # Errors
/// As [`check`], and [`Error::Invalid`] for a repair without locks.
pub fn check_with(path: impl AsRef<Path>, options: &CheckOptions) -> Result<CheckReport> {
    let path = path.as_ref();
    let repair = options.repair;
    let read_only = repair == Repair::None;
    if !read_only && !options.lock {
        return Err(Error::invalid(format!(
            "{}: a repair needs the image locked, or another process could write it meanwhile",
            path.display()
        )));
    }
    let file = OpenFile::open_image(path, read_only, false).map_err(Error::io("open", path))?;
    let mode = if read_only {
        LockMode::Read
    } else {
        LockMode::Write
    };
    if options.lock {
        file.lock(mode).map_err(Error::lock(path))?;
    }
    let (header, faults) = chain::read_header_leniently(&file, path)?;
    // Names are not the check's matter, and of a table that is not there it says what is lost.
    let fault = faults
        .into_iter()
        .find(|fault| fault.kind == FaultKind::Table);
    if let Some(fault) = fault {
        return Err(Error::format(path)(fault.error));
    }
    let name = path.display().to_string();
    let driver = Driver::open(FileSet::new(vec![file]), DriverKind::Auto, DEPTH)
        .map_err(Error::io("open a driver for", path))?;
    Ok(urus_engine::check_image(
        driver,
        chain::IMAGE,
        name,
        header,
        repair,
    )?)
}
