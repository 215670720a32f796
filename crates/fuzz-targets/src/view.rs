//! What an image shows, by the simulator's own checker and reader: nothing of the engine takes part.

use std::cell::Cell;

use urus_sim::checker::{self, GuestReader, Owner, Report, Table};

/// Disks and snapshots larger than this are not compared byte by byte.
const MOST_GUEST_BYTES: u64 = 8 << 20;
/// Snapshots that are looked at.
const MOST_SNAPSHOTS: u32 = 4;

/// What an image shows.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) report: Report,
    /// What the guest reads, where all of it can be read.
    pub(crate) guest: Option<Vec<u8>>,
    /// What its snapshots show, each where it can be read.
    pub(crate) snapshots: Vec<Option<Vec<u8>>>,
    /// Something cannot be read (what is too large to be looked at counts as readable).
    pub(crate) unreadable: bool,
}

/// Looks at an image whose backing file shows `behind`.
pub(crate) fn look(image: &[u8], behind: Option<&[u8]>) -> View {
    let report = checker::check(image);
    let show = |offset: u64, len: usize| -> Vec<u8> {
        let bytes = behind.unwrap_or_default();
        let start = usize::try_from(offset).map_or(bytes.len(), |start| start.min(bytes.len()));
        bytes[start..bytes.len().min(start.saturating_add(len))].to_vec()
    };
    let unreadable = Cell::new(false);
    let read = |reader: &GuestReader<'_>| {
        let fits = reader.size() <= MOST_GUEST_BYTES;
        let size = usize::try_from(reader.size()).ok().filter(|_| fits)?;
        let bytes = reader.read(0, size).ok();
        unreadable.set(unreadable.get() || bytes.is_none());
        bytes
    };
    let Ok(reader) = GuestReader::open(image, behind.is_some().then_some(&show)) else {
        return View {
            report,
            guest: None,
            snapshots: Vec::new(),
            unreadable: true,
        };
    };
    let snapshots = (0..reader.snapshot_count().min(MOST_SNAPSHOTS))
        .map(|number| {
            let reader = reader.clone().snapshot(number).ok();
            unreadable.set(unreadable.get() || reader.is_none());
            read(&reader?)
        })
        .collect();
    let guest = read(&reader);
    View {
        report,
        guest,
        snapshots,
        unreadable: unreadable.get(),
    }
}

impl View {
    /// Nothing is wrong with the structure, nothing is marked, and everything can be read.
    pub(crate) fn is_sound(&self) -> bool {
        self.report.is_sound() && !self.report.dirty && !self.report.corrupt && !self.unreadable
    }
}

/// Host clusters of metadata that nobody may put data into: of the active state, and what leads to snapshots.
pub(crate) fn protected(image: &[u8], report: &Report, cluster_bytes: usize) -> Vec<usize> {
    (0..image.len())
        .step_by(cluster_bytes)
        .filter(|at| {
            matches!(
                report.owners.at(*at as u64),
                Some(
                    Owner::Header
                        | Owner::RefcountTable
                        | Owner::RefcountBlock(_)
                        | Owner::L1(_)
                        | Owner::L2(Table::Active, _)
                        | Owner::SnapshotTable
                )
            )
        })
        .collect()
}
