//! Growing the virtual disk (O8 for the L1 table, O20 for what becomes visible).

use urus_format::{HeaderChange, HostOffset};

use crate::chain::{Layer, Owner};
use crate::error::{Error, Result};
use crate::limits;
use crate::maintenance::Device;
use crate::open;
use crate::planted::{self, Bug};
use crate::shared::{Run, Shared};
use crate::storage::{OpKind, Storage};
use crate::sync::Ordering;

impl<S: Storage> Device<S> {
    /// Changes the size, rounded up to whole sectors, as every program has it; the gate stays
    /// closed.
    pub(crate) async fn resize(&self, size: u64) -> Result<()> {
        self.shared().check_writable()?;
        let size = size
            .checked_next_multiple_of(limits::SECTOR_BYTES)
            .unwrap_or(size);
        let old = self.shared().size();
        if size < old {
            return Err(Error::Unsupported {
                what: format!(
                    "{} cannot shrink (from {old} to {size} bytes) while it is served",
                    self.shared().image_name()
                ),
            });
        }
        if size == old {
            return Ok(());
        }
        self.quiesce().await;
        self.flush().await?;
        if planted::is(Bug::EarlySize) {
            self.worker.image.layer.size.store(size, Ordering::Release);
        }
        if self.is_raw() {
            self.resize_raw(size).await?;
        } else {
            self.resize_mapped(old, size).await?;
        }
        self.worker.image.layer.size.store(size, Ordering::Release);
        Ok(())
    }

    /// A file becomes longer. A block device has its length from elsewhere: the disk follows it.
    async fn resize_raw(&self, size: u64) -> Result<()> {
        if self
            .worker
            .files
            .properties(self.worker.image.file())
            .regular
        {
            self.worker
                .files
                .simple("resize", self.worker.image.file(), size, 0, || {
                    OpKind::SetLen { len: size }
                })
                .await?;
            return self.data_barrier().await;
        }
        let len = self.worker.files.length(self.worker.image.file())?;
        if len == size {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!(
                "{} is a block device of {len} bytes: a raw disk on it can take no other size (asked: {size} \
                 bytes); enlarge the device first",
                self.shared().image_name()
            ),
        })
    }

    async fn resize_mapped(&self, old: u64, size: u64) -> Result<()> {
        let geometry = self.worker.image.qcow2().geometry;
        let entries = geometry.l1_entries_for(size);
        if entries * 8 > limits::L1_TABLE_BYTES || size > i64::MAX as u64 {
            let most = (limits::L1_TABLE_BYTES / 8)
                .saturating_mul(geometry.l2_coverage_bytes())
                .min(i64::MAX as u64);
            return Err(Error::Unsupported {
                what: format!(
                    "{} cannot grow to {size} bytes: with clusters of {} bytes it ends at {most}",
                    self.shared().image_name(),
                    geometry.cluster_bytes()
                ),
            });
        }
        self.check_snapshots().await?;
        if planted::is(Bug::StaleHeader) {
            planted::keep(Some(self.worker.read_header_sector().await?));
        }
        if entries > self.with_header(|header| u64::from(header.l1_entries)) {
            self.grow_l1(entries).await?;
        }
        // O20: what becomes visible is zero, durably, before the size changes.
        let beneath = self.worker.beneath();
        let backing_end = beneath.map_or(0, Layer::size);
        let cluster_end = old.next_multiple_of(geometry.cluster_bytes());
        // What another program left in the tables beyond the old end is cleared too.
        let mapped_end = self
            .with_header(|header| u64::from(header.l1_entries))
            .saturating_mul(geometry.l2_coverage_bytes());
        let backed_to = backing_end.min(size).max(cluster_end);
        let clear_to = mapped_end.min(size).max(backed_to);
        if clear_to > old && !planted::is(Bug::GrowthShowsBacking) {
            self.worker.clear_beyond_size(old, backed_to).await?;
            self.worker.clear_unbacked(backed_to, clear_to).await?;
            self.flush().await?;
        }
        let switched = self.switch_header(&[HeaderChange::Size(size)]).await;
        planted::keep(None);
        switched
    }

    /// A snapshot that does not say how large the disk was is taken to be as large as the disk is
    /// now: once the disk has grown, no program can apply it. Version 2 never says so.
    async fn check_snapshots(&self) -> Result<()> {
        let image = self.image();
        let header = image.header.borrow().clone();
        if header.snapshot_count == 0 {
            return Ok(());
        }
        let name = self.shared().image_name();
        if header.version < 3 {
            return Err(Error::Unsupported {
                what: format!(
                    "{name} cannot grow: it is a version 2 image with internal snapshots, which \
                     could not be applied any more; delete them first, or upgrade it \
                     (qemu-img amend -o compat=1.1)"
                ),
            });
        }
        let table = open::read_snapshots(&self.worker, &header).await?;
        let without = table
            .snapshots
            .iter()
            .find(|snapshot| snapshot.disk_bytes.is_none());
        match without {
            None => Ok(()),
            Some(snapshot) => Err(Error::Unsupported {
                what: format!(
                    "{name} cannot grow: its internal snapshot {:?} does not record the size of \
                     the disk, and could not be applied any more; delete it first",
                    snapshot.name_text()
                ),
            }),
        }
    }

    /// Gives the L1 table a larger place: the new table durable, one header write, then the old one is free.
    async fn grow_l1(&self, entries: u64) -> Result<()> {
        let image = self.image();
        let geometry = self.worker.image.qcow2().geometry;
        let clusters = geometry.clusters_for(entries * 8);
        let first = image
            .allocator
            .take_contiguous(&self.worker, clusters)
            .await?;
        let (old_table, old_entries) =
            self.with_header(|header| (header.l1_table, u64::from(header.l1_entries)));
        let old = (
            geometry.host_cluster(old_table).0,
            geometry.clusters_for(old_entries * 8),
        );
        self.reference_all(first, clusters).await?;
        let moved = self.move_l1(first, clusters, entries, old_entries).await;
        if moved.is_err() && self.shared().is_poisoned() {
            // Nobody knows which place the header names.
            return moved;
        }
        // O11: whichever place is not the table's is free.
        let (first, count) = if moved.is_ok() {
            old
        } else {
            (first, clusters)
        };
        self.metadata_removed(first, count);
        moved
    }

    /// Counts clusters that were reserved; all of them, or those that were come to be free again.
    async fn reference_all(&self, first: u64, count: u64) -> Result<()> {
        let image = self.image();
        for done in 0..count {
            let result = image.allocator.reference(&self.worker, first + done).await;
            if result.is_err() {
                image.allocator.give_back(Run {
                    first: first + done,
                    count: count - done,
                    zero: false,
                });
                self.metadata_removed(first, done);
                return result;
            }
        }
        Shared::count(&self.shared().stats.allocated_clusters, count);
        Ok(())
    }

    /// Writes the L1 table to a new place, and makes the header name it.
    async fn move_l1(
        &self,
        first: u64,
        clusters: u64,
        entries: u64,
        old_entries: u64,
    ) -> Result<()> {
        let geometry = self.worker.image.qcow2().geometry;
        let mut bytes: Vec<u8> = (0..old_entries)
            .flat_map(|index| self.worker.image.qcow2().map.l1(index).to_be_bytes())
            .collect();
        bytes.resize(crate::to_usize(clusters << geometry.cluster_bits()), 0);
        {
            let mut meta = self.worker.image.qcow2().meta.lock();
            for cluster in first..first + clusters {
                meta.owners.insert(cluster, Owner::L1Table);
            }
        }
        let offset = first << geometry.cluster_bits();
        self.write_metadata(offset, &bytes, Owner::L1Table).await?;
        // O8: the flush makes the refcounts of the new table, and the table itself, durable.
        if !planted::is(Bug::EarlyL1Table) {
            self.flush().await?;
        }
        let entries = u32::try_from(entries).expect("checked against the largest table");
        self.switch_header(&[HeaderChange::L1Table(HostOffset(offset), entries)])
            .await
    }
}
