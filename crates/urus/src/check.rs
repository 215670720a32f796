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
    let path = path.as_ref();
    let read_only = repair == Repair::None;
    let file = OpenFile::open_image(path, read_only, false).map_err(Error::io("open", path))?;
    let mode = if read_only {
        LockMode::Read
    } else {
        LockMode::Write
    };
    file.lock(mode).map_err(Error::lock(path))?;
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
    Ok(urus_engine::check_image(driver, name, header, repair)?)
}
