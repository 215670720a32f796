//! How a range is allocated: the answer to a block-status request.

use urus_format::L2Entry;

use crate::chain::{LayerEntry, LayerKind};
use crate::error::Result;
use crate::planted::{self, Bug};
use crate::request::Extent;
use crate::seen::{Way, note};
use crate::storage::Storage;
use crate::worker::Worker;

impl<S: Storage> Worker<S> {
    /// Extents from `offset` on, adjacent and merged; they may end before `offset + len`, but cover a byte at least.
    pub(crate) async fn block_status(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut done = 0;
        while done < len {
            let extent = self.extent_at(offset + done, len - done).await?;
            done += extent.len;
            let full = extents.len() >= self.shared.options.sizes.status_extents;
            match extents.last_mut() {
                Some(last) if continues(last, &extent) => last.len += extent.len,
                _ if full => {
                    note(Way::StatusFull, || true);
                    break;
                }
                _ => extents.push(extent),
            }
        }
        Ok(extents)
    }

    async fn extent_at(&self, offset: u64, len: u64) -> Result<Extent> {
        let mut extent = Extent {
            start: offset,
            len,
            depth: 0,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            host: None,
        };
        for (depth, layer) in self.chain.layers().enumerate() {
            extent.depth = u32::try_from(depth).expect("chains are short");
            let size = layer.size();
            if offset >= size {
                // Past the end of a backing file. As QEMU counts, the layer above has these zeroes, without saying so.
                if !planted::is(Bug::StatusBelowTheEnd) {
                    extent.depth = extent.depth.saturating_sub(1);
                }
                return Ok(extent);
            }
            extent.len = extent.len.min(size - offset);
            let qcow2 = match &layer.kind {
                LayerKind::Raw => {
                    let found = self
                        .reactor()
                        .with_storage(|storage| storage.extent(layer.file, offset, extent.len));
                    extent.present = true;
                    extent.zero = !found.data;
                    extent.data = found.data;
                    extent.host = Some(offset);
                    // Whatever the file system says, the answer goes on.
                    extent.len = found.len.clamp(1, extent.len);
                    return Ok(extent);
                }
                LayerKind::Qcow2(qcow2) => qcow2,
            };
            let geometry = &qcow2.geometry;
            // A whole missing L2 table is one answer, so that an empty terabyte is not asked by the cluster.
            let l1_index =
                geometry.l1_index(geometry.guest_cluster(urus_format::GuestOffset(offset)));
            if qcow2.map.l1(l1_index) == 0 {
                extent.len = extent
                    .len
                    .min(geometry.l2_coverage_bytes() - offset % geometry.l2_coverage_bytes());
                continue;
            }
            let within = geometry.in_cluster(offset);
            extent.len = extent.len.min(geometry.cluster_bytes() - within);
            let entry = loop {
                match self.layer_entry(layer, offset) {
                    LayerEntry::Entry(entry) => break entry,
                    LayerEntry::Miss(slice) => self.load(layer, slice).await?,
                    LayerEntry::Bad(error) => return Err(*error),
                }
            };
            match entry {
                L2Entry::Unallocated if planted::is(Bug::StatusHidesBacking) => {}
                L2Entry::Unallocated => continue,
                L2Entry::Zero => {}
                L2Entry::ZeroAllocated { host, .. } => extent.host = Some(host.0 + within),
                L2Entry::Data { host, .. } => {
                    extent.zero = false;
                    extent.data = true;
                    extent.host = Some(host.0 + within);
                }
                L2Entry::Compressed(_) => {
                    extent.zero = false;
                    extent.data = true;
                    extent.compressed = true;
                }
            }
            extent.present = true;
            return Ok(extent);
        }
        Ok(extent)
    }
}

fn continues(last: &Extent, next: &Extent) -> bool {
    last.depth == next.depth
        && last.present == next.present
        && last.zero == next.zero
        && last.data == next.data
        && last.compressed == next.compressed
        && match (last.host, next.host) {
            (None, None) => true,
            (Some(a), Some(b)) => a + last.len == b,
            _ => false,
        }
}
