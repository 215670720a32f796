//! Where a range of the virtual disk comes from: the walk down the chain, without waiting for anything.

use urus_format::{CompressedExtent, EntryError, GuestCluster, GuestOffset, L2Entry};

use crate::error::Error;
use crate::map::{Lookup, SliceId};
use crate::shared::{Layer, LayerKind, Qcow2Layer};
use crate::storage::{FileId, Storage};
use crate::worker::Worker;

/// The source of a range.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Bytes of a file, from here.
    Data { file: FileId, offset: u64 },
    /// Zeroes.
    Zero,
    /// Part of a compressed cluster.
    Compressed {
        layer: usize,
        extent: CompressedExtent,
        /// Bytes from the start of the cluster to the range.
        within: u64,
    },
    /// Not known until this slice is cached.
    Miss { layer: usize, slice: SliceId },
    /// The metadata is invalid here. (Apart, as this is moved with each look-up.)
    Bad(Box<Error>),
}

/// What a layer's own metadata says of a range inside one of its clusters.
pub(crate) enum LayerEntry {
    Entry(L2Entry),
    Miss(SliceId),
    Bad(Box<Error>),
}

#[cold]
fn bad_entry(layer: &Layer, cluster: GuestCluster, entry: EntryError) -> LayerEntry {
    LayerEntry::Bad(Box::new(Error::BadEntry {
        file: layer.name.clone(),
        table: "L2 entry of guest cluster",
        index: cluster.0,
        entry,
    }))
}

impl<S: Storage> Worker<S> {
    /// The entry of the cluster that holds `offset` in a qcow2 layer.
    pub(crate) fn layer_entry(&self, layer_index: usize, offset: u64) -> LayerEntry {
        let layer = &self.shared.layers[layer_index];
        let qcow2 = layer.qcow2().expect("only qcow2 layers have entries");
        self.entry(layer, qcow2, offset)
    }

    /// The same of a layer that is at hand.
    #[inline(always)]
    fn entry(&self, layer: &Layer, qcow2: &Qcow2Layer, offset: u64) -> LayerEntry {
        let cluster = qcow2.geometry.guest_cluster(GuestOffset(offset));
        match qcow2.map.lookup(cluster) {
            Lookup::NoTable => LayerEntry::Entry(L2Entry::Unallocated),
            Lookup::Miss(slice) => LayerEntry::Miss(slice),
            Lookup::Entry(raw) => {
                self.hits.add();
                match L2Entry::decode(raw, &qcow2.geometry) {
                    Ok(entry) => LayerEntry::Entry(entry),
                    Err(entry) => bad_entry(layer, cluster, entry),
                }
            }
        }
    }

    /// Resolves the start of `[offset, offset + len)`, from a layer downwards. The answer holds for the returned
    /// number of bytes, at least 1, at most one cluster of any layer that was asked.
    pub(crate) fn resolve(&self, from_layer: usize, offset: u64, len: u64) -> (Piece, u64) {
        let mut len = len;
        let mut index = from_layer;
        while let Some(layer) = self.shared.layers.get(index) {
            let size = layer.size();
            if offset >= size {
                // A shorter backing file reads as zeroes past its end, whatever lies beneath it.
                return (Piece::Zero, len);
            }
            len = len.min(size - offset);
            let qcow2 = match &layer.kind {
                LayerKind::Raw => {
                    return (
                        Piece::Data {
                            file: layer.file,
                            offset,
                        },
                        len,
                    );
                }
                LayerKind::Qcow2(qcow2) => qcow2,
            };
            let within = qcow2.geometry.in_cluster(offset);
            let rest = qcow2.geometry.cluster_bytes() - within;
            let entry = match self.entry(layer, qcow2, offset) {
                LayerEntry::Entry(entry) => entry,
                LayerEntry::Miss(slice) => {
                    return (
                        Piece::Miss {
                            layer: index,
                            slice,
                        },
                        len.min(rest),
                    );
                }
                LayerEntry::Bad(error) => return (Piece::Bad(error), len.min(rest)),
            };
            len = len.min(rest);
            match entry {
                L2Entry::Unallocated => index += 1,
                L2Entry::Zero | L2Entry::ZeroAllocated { .. } => return (Piece::Zero, len),
                L2Entry::Data { host, .. } => {
                    return (
                        Piece::Data {
                            file: layer.file,
                            offset: host.0 + within,
                        },
                        len,
                    );
                }
                L2Entry::Compressed(extent) => {
                    return (
                        Piece::Compressed {
                            layer: index,
                            extent,
                            within,
                        },
                        len,
                    );
                }
            }
        }
        (Piece::Zero, len)
    }
}
