//! Checking an image's metadata, and repairing it.
//!
//! - `walk` follows every table and counts who refers to which cluster (`counts`); `entries` judges the entries
//!   of L1 and L2 tables, `side_tables` snapshots and bitmaps.
//! - `refcounts` reads the refcount structures and sets them against the counts.
//! - `repair` makes refcounts and COPIED flags right. `relocate` plans new refcount structures where the old
//!   ones cannot be mended in place.
//!
//! What it finds is counted as `qemu-img check` counts it ([`CheckReport`]), with two additions: an
//! L1 entry of COPIED alone, and metadata clusters that something else uses too (or the active L1
//! table twice), even where their refcount agrees. Flags of L2 entries that mean nothing (COPIED
//! without an offset) or are not defined (the zero flag in version 2) are no corruption: such
//! clusters read as not allocated, and as zeroes.
//!
//! A repair never makes the image worse, wherever it is cut off: the worst that it leaves behind is one leak
//! more. It changes refcounts, COPIED flags and the header's refcount table and bits, and nothing else: what a
//! broken entry pointed at stays lost, and as long as there is one no cluster is freed, because it may be one
//! of those.
//!
//! Work and memory follow what the file holds. Each table is read once however often it is referred to; tables
//! that overlap are noticed because together they are longer than the file.

mod counts;
mod entries;
mod refcounts;
mod relocate;
mod repair;
mod report;
mod side_tables;
#[cfg(test)]
mod tests;
mod walk;

use urus_format::{Error as FormatError, Header, incompatible};

use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::worker::Worker;

pub use report::{CheckReport, Finding, Severity};

/// What to repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: nothing is written.
    #[default]
    None,
    /// Refcounts that are too high.
    Leaks,
    /// Refcounts and COPIED flags, where need be with new refcount structures.
    All,
}

/// What a check may use.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Memory. The default lasts for 30 TiB of 64 KiB clusters.
    memory_bytes: u64,
    /// Bytes of tables read, holes in sparse files included: the L2 tables of 2 PiB of 64 KiB clusters.
    tables_bytes: u64,
    /// Bytes of new refcount structures: 100 TiB of 64 KiB clusters. A sparse file may pretend to need more.
    relocation_bytes: u64,
}

const LIMITS: Limits = Limits {
    memory_bytes: 1 << 30,
    tables_bytes: 512 << 30,
    relocation_bytes: 4 << 30,
};

/// What a check may use that nobody has asked for, at opening: some milliseconds.
const FEW: Limits = Limits {
    memory_bytes: 64 << 20,
    tables_bytes: 8 << 20,
    relocation_bytes: 0,
};
/// The largest file, in clusters, of such a check: it reads their refcounts.
const FEW_CLUSTERS: u64 = 1 << 20;

/// Tables are read in pieces of at most so many bytes (at least one cluster).
const READ_BYTES: u64 = 1 << 20;
/// What storage writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// The image file, as far as a check needs it. Nobody else uses it meanwhile.
pub(crate) trait CheckIo {
    /// Reads; what lies past the end of the file reads as zeroes.
    async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>>;
    /// Writes; grows the file where need be.
    async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Makes what was written durable.
    async fn barrier(&self) -> Result<()>;
    /// Length of the file in bytes.
    fn file_len(&self) -> Result<u64>;
    /// The file's name, for messages.
    fn name(&self) -> &str;
}

impl<S: Storage> CheckIo for Worker<S> {
    async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.files.read_bytes(self.image.file(), offset, len).await
    }

    async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        // O18: sectors smaller than the file's alignment are written with their neighbours. Nobody else writes.
        let align = u64::from(self.files.properties(self.image.file()).alignment);
        let end = offset + bytes.len() as u64;
        let (start, padded_end) = (offset - offset % align, end.next_multiple_of(align));
        if (start, padded_end) == (offset, end) {
            return self
                .files
                .write_bytes(self.image.file(), offset, bytes)
                .await;
        }
        let mut block = self
            .files
            .read_bytes(self.image.file(), start, padded_end - start)
            .await?;
        let from = crate::to_usize(offset - start);
        block[from..from + bytes.len()].copy_from_slice(bytes);
        self.files
            .write_bytes(self.image.file(), start, &block)
            .await
    }

    async fn barrier(&self) -> Result<()> {
        Self::barrier(self).await
    }

    fn file_len(&self) -> Result<u64> {
        self.files.length(self.image.file())
    }

    fn name(&self) -> &str {
        self.shared.image_name()
    }
}

/// Checks the image, and repairs it as told. Nobody else may use the image meanwhile.
///
/// `header` is the header on disk, before and after: a repair changes it where it moves the refcount table or
/// clears feature bits. Read-only images are checked with [`Repair::None`].
///
/// # Errors
/// Features that the check does not know; a failed write or barrier of the repair: what was wrong is then
/// still marked as wrong. (What cannot be read counts in [`CheckReport::check_errors`].)
pub(crate) async fn check<S: Storage>(
    worker: &Worker<S>,
    header: &mut Header,
    repair: Repair,
) -> Result<CheckReport> {
    run(worker, header, repair, LIMITS).await
}

/// Checks an image that has few tables, and changes nothing. `None` where it has more, or something cannot be checked.
pub(crate) async fn check_few_tables<S: Storage>(
    worker: &Worker<S>,
    header: &Header,
) -> Option<CheckReport> {
    let clusters = header
        .geometry()
        .clusters_for(CheckIo::file_len(worker).ok()?);
    // A dirty image's refcounts are allowed to be wrong.
    if clusters > FEW_CLUSTERS || header.incompatible & incompatible::DIRTY != 0 {
        return None;
    }
    let report = run(worker, &mut header.clone(), Repair::None, FEW)
        .await
        .ok()?;
    (report.check_errors == 0).then_some(report)
}

/// Repairs an image that was not closed cleanly, before its first allocation (O22). Does nothing where the
/// dirty bit is clear.
///
/// # Errors
/// As [`check`]; [`Error::Corrupt`] where the repair leaves something wrong. The dirty bit stays set then.
pub(crate) async fn repair_dirty<S: Storage>(
    worker: &Worker<S>,
    header: &mut Header,
) -> Result<CheckReport> {
    if header.incompatible & incompatible::DIRTY == 0 {
        return Ok(CheckReport::default());
    }
    let report = check(worker, header, Repair::All).await?;
    if report.is_sound() {
        return Ok(report);
    }
    if let Some(error) = report.unread {
        // The device has failed: nothing was repaired, and nothing says that it could not be.
        return Err(error);
    }
    let worst = [Severity::Error, Severity::Corruption]
        .into_iter()
        .find_map(|severity| {
            report
                .messages
                .iter()
                .find(|finding| finding.severity == severity && !finding.repaired)
        });
    Err(Error::Corrupt {
        file: CheckIo::name(worker).to_owned(),
        what: format!(
            "it was not closed cleanly, and the repair leaves {} corruptions and {} check errors",
            report.corruptions, report.check_errors
        ),
        place: worst.map_or_else(|| "its metadata".to_owned(), |finding| finding.text.clone()),
    })
}

async fn run<I: CheckIo>(
    io: &I,
    header: &mut Header,
    repair: Repair,
    limits: Limits,
) -> Result<CheckReport> {
    refuse_unknown(io, header)?;
    let mut walked = walk::walk(io, header, limits).await?;
    if repair == Repair::None {
        return Ok(walked.report);
    }
    if walked.incomplete {
        // Whatever was not seen may refer to any cluster.
        walked
            .report
            .note(|| "nothing was repaired, because not everything could be checked".into());
        return Ok(walked.report);
    }
    let mended = repair::repair(io, header, &mut walked, repair == Repair::All).await?;
    let mut report = walked.report;
    if mended.wrote {
        let mut after = walk::walk(io, header, limits).await?;
        after.report.leaks_fixed = report.leaks.saturating_sub(after.report.leaks);
        // COPIED flags are judged by the refcounts that are on disk: the first check's verdict on them does
        // not outlive the repair of the refcounts. So those changed are counted instead.
        let before = report.corruptions.saturating_sub(walked.copied_findings);
        let remaining = after
            .report
            .corruptions
            .saturating_sub(after.copied_findings);
        after.report.corruptions_fixed = before
            .saturating_sub(remaining)
            .saturating_add(mended.copied_changed);
        report = after.report.after(report);
    }
    let bits = header.incompatible & (incompatible::DIRTY | incompatible::CORRUPT);
    if report.is_sound() && bits != 0 {
        if !mended.wrote {
            repair::trust(io).await?;
        }
        // O12: last, and only now that everything else is known to be durable.
        repair::clear_bits(io, header).await?;
    }
    Ok(report)
}

/// Refuses incompatible features that nobody knows: refcounts may have another meaning with them.
fn refuse_unknown<I: CheckIo>(io: &I, header: &Header) -> Result<()> {
    if header.incompatible & !incompatible::KNOWN == 0 {
        return Ok(());
    }
    let source = header
        .check_supported(false)
        .err()
        .unwrap_or_else(|| FormatError::Unsupported {
            feature: "an unknown incompatible feature".into(),
        });
    Err(Error::Format {
        file: io.name().to_owned(),
        source,
    })
}
