//! Follows what most images do not have: snapshots and bitmaps.

use std::collections::BTreeMap;

use urus_format::bitmap::{self, Bitmap};
use urus_format::snapshot::{self, Snapshot, TableBytes};
use urus_format::{BitmapsExtension, Header};

use super::CheckIo;
use super::entries::OFFSET_MASK;
use super::walk::{L1Owner, L1Use, Role, Walked};

/// Bits of a bitmap table entry that must be 0 where there is an offset, and where there is none.
const ENTRY_RESERVED: u64 = 0xff00_0000_0000_01ff;
const EMPTY_ENTRY_RESERVED: u64 = ENTRY_RESERVED & !1;
/// Bytes of the snapshot table read at first.
const FIRST_READ_BYTES: u64 = 4096;

impl Walked {
    /// The L1 tables of the snapshots. Those of several snapshots that have the very same one come once.
    pub(super) async fn snapshots<I: CheckIo>(&mut self, io: &I, header: &Header) -> Vec<L1Use> {
        if header.snapshot_count == 0 {
            return Vec::new();
        }
        if self.data_file {
            self.report.corruption(1, || {
                "there are snapshots, which cannot be with a data file".into()
            });
        }
        let Some(snapshots) = self.snapshot_table(io, header).await else {
            return Vec::new();
        };
        let mut tables: BTreeMap<(u64, u64), (u32, u64)> = BTreeMap::new();
        for (number, snapshot) in (0..).zip(&snapshots) {
            let name = || format!("snapshot number {number} ({:?})", snapshot.name_text());
            if header.version >= 3 && snapshot.disk_bytes.is_none() {
                self.report
                    .corruption(1, || format!("{}: its entry lacks the disk size", name()));
            }
            if let Err(error) = snapshot.check_l1(&self.geometry) {
                self.lose(1, || format!("{}: {error}", name()));
                continue;
            }
            let key = (snapshot.l1_table.0, u64::from(snapshot.l1_entries));
            tables.entry(key).or_insert((number, 0)).1 += 1;
        }
        tables
            .into_iter()
            .map(|((offset, entries), (number, references))| L1Use {
                owner: L1Owner::Snapshot(number),
                offset,
                entries,
                references,
            })
            .collect()
    }

    async fn snapshot_table<I: CheckIo>(
        &mut self,
        io: &I,
        header: &Header,
    ) -> Option<Vec<Snapshot>> {
        let offset = header.snapshot_table.0;
        let mut bytes = FIRST_READ_BYTES;
        loop {
            let prefix = self.read(io, offset, bytes, "the snapshot table").await?;
            let length = match snapshot::table_bytes(&prefix, header.snapshot_count) {
                Ok(TableBytes::Exactly(length)) => length,
                Ok(TableBytes::AtLeast(length)) => {
                    bytes = length.max(bytes * 2);
                    continue;
                }
                Err(error) => {
                    self.lose(1, || format!("the snapshot table: {error}"));
                    return None;
                }
            };
            self.claim(Role::SnapshotTable, offset, length, 1);
            // What follows the table in its last sectors is not the table's.
            return snapshot::parse_table(&prefix, header.snapshot_count).ok();
        }
    }

    /// The bitmaps, where the header vouches for them. Others' clusters are leaks.
    pub(super) async fn bitmaps<I: CheckIo>(&mut self, io: &I, header: &Header) {
        let Some(BitmapsExtension {
            count,
            directory_bytes,
            directory,
        }) = header.bitmaps
        else {
            return;
        };
        let what = "the bitmap directory";
        if !self.charge(directory.0, directory_bytes, || what.into())
            || !self.claim(Role::BitmapDirectory, directory.0, directory_bytes, 1)
        {
            return;
        }
        let Some(bytes) = self.read(io, directory.0, directory_bytes, what).await else {
            return;
        };
        match bitmap::parse_directory(&bytes, count, &self.geometry) {
            Ok(bitmaps) => {
                for bitmap in &bitmaps {
                    self.bitmap(io, bitmap).await;
                }
            }
            Err(error) => self.lose(1, || format!("{what}: {error}")),
        }
    }

    async fn bitmap<I: CheckIo>(&mut self, io: &I, bitmap: &Bitmap) {
        let (offset, entries) = (bitmap.table.0, u64::from(bitmap.table_entries));
        let what = format!("the table of bitmap {:?}", bitmap.name_text());
        if !self.charge(offset, entries * 8, || what.clone())
            || !self.claim(Role::BitmapTable, offset, entries * 8, 1)
        {
            return;
        }
        let bytes = self.geometry.cluster_bytes();
        self.each_entry(io, offset, entries, &what, |walked, index, entry| {
            let data = entry & OFFSET_MASK;
            let reserved = if data == 0 {
                EMPTY_ENTRY_RESERVED
            } else {
                ENTRY_RESERVED
            };
            if entry & reserved != 0 || walked.geometry.in_cluster(data) != 0 {
                walked.lose(1, || {
                    format!("{what}, entry {index}: {entry:#018x} is no valid entry")
                });
            } else if data != 0 {
                walked.claim(Role::Bitmap, data, bytes, 1);
            }
        })
        .await;
    }
}
