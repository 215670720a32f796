//! Follows every table and counts references.

use std::collections::BTreeMap;

use urus_format::{Geometry, Header, HostOffset, incompatible};

use super::counts::{ClusterSet, Counts, MAP_ENTRY_BYTES};
use super::refcounts::RefcountTable;
use super::report::CheckReport;
use super::{CheckIo, Limits, READ_BYTES};
use crate::error::Result;
use crate::to_usize;

/// Bytes of tables that every image may have, however short it is.
const SPARE_BYTES: u64 = 64 << 20;

/// What a cluster of metadata holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Header,
    ActiveL1,
    SnapshotL1,
    L2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    BitmapDirectory,
    BitmapTable,
    Bitmap,
    Luks,
}

impl Role {
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::ActiveL1 => "the active L1 table",
            Self::SnapshotL1 => "a snapshot's L1 table",
            Self::L2 => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::SnapshotTable => "the snapshot table",
            Self::BitmapDirectory => "the bitmap directory",
            Self::BitmapTable => "a bitmap table",
            Self::Bitmap => "a bitmap",
            Self::Luks => "the LUKS header",
        }
    }
}

/// A cluster of metadata.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owned {
    pub(super) role: Role,
    /// References that this role accounts for: more of them is an overlap.
    pub(super) references: u64,
    /// The second role that claimed it, if any.
    other: Option<Role>,
    /// The overlap is counted already, as a wrong refcount.
    pub(super) reported: bool,
}

/// How an L2 table is reached.
#[derive(Clone, Copy, Debug)]
pub(super) struct L2Use {
    /// Entries of L1 tables that refer to it.
    pub(super) references: u64,
    /// Of those, entries of the active L1 table.
    pub(super) active: u64,
    /// The first one: in the active L1 table, or in that of the snapshot with this place in the snapshot table.
    pub(super) first: (L1Owner, u64),
}

/// Whose L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum L1Owner {
    Active,
    Snapshot(u32),
}

/// An L1 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1Use {
    pub(super) owner: L1Owner,
    pub(super) offset: u64,
    pub(super) entries: u64,
    /// Snapshots that have the very same table; 1 in any sane image.
    pub(super) references: u64,
}

/// Everything that a walk has learnt.
pub(super) struct Walked {
    pub(super) geometry: Geometry,
    pub(super) limits: Limits,
    /// Length of the file, in whole sectors as QEMU counts it.
    pub(super) file_len: u64,
    pub(super) report: CheckReport,
    pub(super) counts: Counts,
    /// Clusters whose refcount on disk is 1.
    pub(super) singles: ClusterSet,
    pub(super) roles: BTreeMap<u64, Owned>,
    /// L2 tables, by offset.
    pub(super) l2: BTreeMap<u64, L2Use>,
    pub(super) refcounts: RefcountTable,
    /// Guest data lies in another file.
    pub(super) data_file: bool,
    /// Something refers to clusters that are not known.
    pub(super) lost: bool,
    /// Where the file may end at most for those past its end to stay so: what a repair puts there would be taken for them.
    pub(super) beyond: u64,
    /// Something was not looked at.
    pub(super) incomplete: bool,
    /// Corruptions that are wrong COPIED flags.
    pub(super) copied_findings: u64,
    /// Clusters whose refcount is lower than their references.
    pub(super) too_low: u64,
    /// Entries with the zero flag, where the version does not define it.
    pub(super) undefined_zeroes: u64,
    /// Bytes of tables that may still be read.
    budget: u64,
}

/// Walks the image. Reads only.
pub(super) async fn walk<I: CheckIo>(io: &I, header: &Header, limits: Limits) -> Result<Walked> {
    let mut walked = Walked::new(header, io.file_len()?, limits);
    walked.read_refcounts(io, header).await;
    walked.claim(Role::Header, 0, walked.geometry.cluster_bytes(), 1);
    walked.mappings(io, header).await;
    walked.bitmaps(io, header).await;
    if let Some((HostOffset(offset), bytes)) = header.luks {
        walked.claim(Role::Luks, offset, bytes, 1);
    }
    walked.claim_refcounts(header);
    walked.note_undefined_zeroes();
    if walked.counts.is_full() {
        walked.stop(|| {
            "the image refers to more clusters than fit into the memory for a check".into()
        });
    }
    if !walked.incomplete {
        // Counts that are known to be too low would only give false findings.
        walked.compare(io).await;
        walked.report_overlaps();
    }
    Ok(walked)
}

impl Walked {
    fn new(header: &Header, file_len: u64, limits: Limits) -> Self {
        let geometry = header.geometry();
        let mut report = CheckReport::default();
        report.total_clusters = geometry.clusters_for(header.size - header.size % 512);
        Self {
            geometry,
            limits,
            file_len: file_len.next_multiple_of(512),
            report,
            counts: Counts::new(limits.memory_bytes),
            singles: ClusterSet::default(),
            roles: BTreeMap::new(),
            l2: BTreeMap::new(),
            refcounts: RefcountTable::default(),
            data_file: header.incompatible & incompatible::DATA_FILE != 0,
            lost: false,
            beyond: u64::MAX,
            incomplete: false,
            copied_findings: 0,
            too_low: 0,
            undefined_zeroes: 0,
            // Tables that do not overlap are together no longer than the file; damage may add a few.
            budget: file_len
                .saturating_mul(2)
                .saturating_add(SPARE_BYTES)
                .min(limits.tables_bytes),
        }
    }

    /// Clusters that the file has, a partial one included.
    pub(super) fn file_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.file_len)
    }

    /// Something cannot be checked: nothing is repaired then.
    pub(super) fn stop(&mut self, text: impl FnOnce() -> String) {
        self.incomplete = true;
        self.report.error(text);
    }

    /// Something is wrong, and with it references are lost: nothing is freed then.
    pub(super) fn lose(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.lost = true;
        self.report.corruption(times, text);
    }

    /// Counts `references` to all clusters that a range touches. Ranges may pass the end of the file by less
    /// than a cluster, as the last cluster's end needs not be there. `false` where it is further out.
    pub(super) fn refer(
        &mut self,
        offset: u64,
        bytes: u64,
        references: u64,
        what: impl FnOnce() -> String,
    ) -> bool {
        if bytes == 0 {
            return true;
        }
        let end = offset.saturating_add(bytes);
        if end >= self.file_len.saturating_add(self.geometry.cluster_bytes()) {
            // A file that ended further on than this would have it, or more of it.
            let begins = offset.max(self.file_len);
            self.beyond = self
                .beyond
                .min(begins)
                .min(end - self.geometry.cluster_bytes());
            // Without the file's length, which the repair may change: the finding stays the same.
            self.lose(references, || {
                format!(
                    "{}: it lies past the end of the file (at {offset:#x}, {bytes} bytes)",
                    what()
                )
            });
            return false;
        }
        let bits = self.geometry.cluster_bits();
        let most = self.geometry.refcount_max();
        for cluster in offset >> bits..=(end - 1) >> bits {
            let count = self.counts.add(cluster, references);
            if self.counts.is_full() {
                return false;
            }
            if count > most {
                let excess = references.min(count - most);
                self.report.corruption(excess, || {
                    format!(
                        "cluster {cluster}: {count} references, more than a refcount can hold ({most}); \
                         copying the image to a new one gives each its own"
                    )
                });
            }
        }
        true
    }

    /// [`refer`](Self::refer) for metadata, which nothing else may use.
    pub(super) fn claim(&mut self, role: Role, offset: u64, bytes: u64, references: u64) -> bool {
        if !self.refer(offset, bytes, references, || role.describe().to_owned()) {
            return false;
        }
        self.own(role, offset, bytes, references);
        true
    }

    /// Notes the role of clusters already counted.
    pub(super) fn own(&mut self, role: Role, offset: u64, bytes: u64, references: u64) {
        if bytes == 0 {
            return;
        }
        let bits = self.geometry.cluster_bits();
        for cluster in offset >> bits..=(offset + bytes - 1) >> bits {
            let references = if role == Role::L2 { references } else { 1 };
            match self.roles.get_mut(&cluster) {
                None => {
                    let owned = Owned {
                        role,
                        references,
                        other: None,
                        reported: false,
                    };
                    self.roles.insert(cluster, owned);
                    self.counts.charge(MAP_ENTRY_BYTES);
                }
                // Snapshots share L2 tables.
                Some(owned) if owned.role == Role::L2 && role == Role::L2 => {
                    owned.references += references;
                }
                Some(owned) => {
                    owned.other.get_or_insert(role);
                }
            }
        }
    }

    /// Whether something else uses a cluster of metadata too.
    pub(super) fn overlaps(&self, cluster: u64) -> bool {
        self.roles
            .get(&cluster)
            .is_some_and(|owned| self.counts.get(cluster) > owned.references)
    }

    /// What a cluster holds, for messages.
    pub(super) fn describe(&self, cluster: u64) -> String {
        let Some(owned) = self.roles.get(&cluster) else {
            return "data".into();
        };
        let role = owned.role.describe();
        match owned.other {
            _ if !self.overlaps(cluster) => role.to_owned(),
            Some(other) => format!("{role}, and also {}", other.describe()),
            None => format!("{role}, and also data"),
        }
    }

    /// QEMU's check says nothing of them either, but QEMU does not read such clusters.
    fn note_undefined_zeroes(&mut self) {
        let entries = self.undefined_zeroes;
        if entries > 0 {
            self.report.note(|| {
                format!(
                    "{entries} L2 entries have the zero flag, which version 2 does not define: \
                     they read as zeroes here, and as errors in QEMU; copying the image to a new \
                     one makes them readable for all"
                )
            });
        }
    }

    fn report_overlaps(&mut self) {
        let clusters: Vec<u64> = self
            .roles
            .iter()
            .filter(|(cluster, owned)| {
                !owned.reported && self.counts.get(**cluster) > owned.references
            })
            .map(|(cluster, _)| *cluster)
            .collect();
        for cluster in clusters {
            let what = self.describe(cluster);
            self.report
                .corruption(1, || format!("cluster {cluster} has two uses: {what}"));
        }
        // Snapshots share L2 tables with the active state; within it a write through one entry would show in the other.
        let twice = self.l2.iter().filter(|(_, l2)| l2.active > 1);
        for (offset, l2) in twice {
            self.report.corruption(1, || {
                format!(
                    "the L2 table at {offset:#x} has {} entries of the active L1 table",
                    l2.active
                )
            });
        }
    }

    /// Takes what the file holds of a table off the budget.
    pub(super) fn charge(
        &mut self,
        offset: u64,
        bytes: u64,
        what: impl FnOnce() -> String,
    ) -> bool {
        let bytes = bytes.min(self.file_len.saturating_sub(offset));
        if bytes <= self.budget {
            self.budget -= bytes;
            return true;
        }
        if !self.incomplete {
            self.stop(|| format!("{}: all tables together are too long to be checked", what()));
        }
        false
    }

    /// Reads a piece of a table; what cannot be read is reported.
    pub(super) async fn read<I: CheckIo>(
        &mut self,
        io: &I,
        offset: u64,
        bytes: u64,
        what: &str,
    ) -> Option<Vec<u8>> {
        match io.read(offset, bytes).await {
            Ok(read) => Some(read),
            Err(error) => {
                self.stop(|| format!("{what}: {error}"));
                self.report.unread.get_or_insert(error);
                None
            }
        }
    }

    /// Hands the non-zero 8-byte entries of a table to `visit`. Those past the end of the file are zero.
    pub(super) async fn each_entry<I: CheckIo>(
        &mut self,
        io: &I,
        offset: u64,
        entries: u64,
        what: &str,
        mut visit: impl FnMut(&mut Self, u64, u64),
    ) {
        let bytes = (entries * 8).min(self.file_len.saturating_sub(offset));
        let mut done = 0;
        while done < bytes && !self.counts.is_full() {
            let step = READ_BYTES.min(bytes - done);
            let Some(piece) = self.read(io, offset + done, step, what).await else {
                return;
            };
            for (index, word) in (done / 8..).zip(words(&piece)) {
                if word != 0 {
                    visit(self, index, word);
                }
            }
            done += step;
        }
    }

    async fn mappings<I: CheckIo>(&mut self, io: &I, header: &Header) {
        let active = L1Use {
            owner: L1Owner::Active,
            offset: header.l1_table.0,
            entries: u64::from(header.l1_entries),
            references: 1,
        };
        self.l1_table(io, &active).await;
        for l1 in self.snapshots(io, header).await {
            self.l1_table(io, &l1).await;
        }
        self.l2_tables(io).await;
    }

    async fn l1_table<I: CheckIo>(&mut self, io: &I, l1: &L1Use) {
        let (role, what) = match l1.owner {
            L1Owner::Active => (Role::ActiveL1, "the active L1 table".to_owned()),
            L1Owner::Snapshot(number) => (
                Role::SnapshotL1,
                format!("the L1 table of snapshot number {number}"),
            ),
        };
        let bytes = l1.entries * 8;
        if !self.charge(l1.offset, bytes, || what.clone()) {
            return;
        }
        // A table that ends past the file is read as far as it is there.
        self.claim(role, l1.offset, bytes, l1.references);
        self.each_entry(io, l1.offset, l1.entries, &what, |walked, index, entry| {
            walked.l1_entry(l1, index, entry);
        })
        .await;
    }

    /// Reads each L2 table once, whoever refers to it; tables that are neighbours in one read.
    async fn l2_tables<I: CheckIo>(&mut self, io: &I) {
        let cluster_bytes = self.geometry.cluster_bytes();
        let most = to_usize((READ_BYTES / cluster_bytes).max(1));
        let mut next = 0;
        loop {
            let mut run: Vec<(u64, L2Use)> = Vec::new();
            for (offset, l2) in self.l2.range(next..).take(most) {
                if run
                    .last()
                    .is_some_and(|(last, _)| last + cluster_bytes != *offset)
                {
                    break;
                }
                run.push((*offset, *l2));
            }
            let Some((first, _)) = run.first() else {
                return;
            };
            let bytes = run.len() as u64 * cluster_bytes;
            if self.counts.is_full() || !self.charge(*first, bytes, || "the L2 tables".into()) {
                return;
            }
            let what = format!("the L2 table at {first:#x}");
            let Some(piece) = self.read(io, *first, bytes, &what).await else {
                return;
            };
            for ((offset, l2), table) in run.iter().zip(piece.chunks_exact(to_usize(cluster_bytes)))
            {
                self.l2_table(*offset, l2, table);
            }
            next = first + bytes;
        }
    }
}

/// The big-endian words of a table.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight")))
}
