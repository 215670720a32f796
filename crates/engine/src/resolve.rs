//! Where a range of the virtual disk comes from: the walk down the chain, without waiting for anything.

use urus_format::{CompressedExtent, EntryError, GuestCluster, GuestOffset, L2Entry};

use crate::error::Error;
use crate::map::{Lookup, SliceId};
use crate::planted::{self, Bug};
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
    #[inline]
    pub(crate) fn resolve(&self, from_layer: usize, offset: u64, len: u64) -> (Piece, u64) {
        let mut len = len;
        if from_layer > 0 {
            return self.resolve_backing(from_layer, offset, len);
        }
        match self.look(0, &self.shared.layers[0], offset, &mut len) {
            Some(piece) => (piece, len),
            None => self.resolve_backing(1, offset, len),
        }
    }

    /// The same among the backing files.
    fn resolve_backing(&self, from_layer: usize, offset: u64, len: u64) -> (Piece, u64) {
        let mut len = len;
        let (mut index, mut end) = (from_layer, 0);
        let skips = self.shared.skips.as_ref().filter(|_| from_layer == 1);
        if let Some(skips) = skips {
            (index, end) = (skips.first(offset), skips.end_of(offset));
            len = len.min(end - offset);
        }
        // All layers from 1 up to this one have nothing for the whole part.
        let (first, mut known) = (index, index);
        let mut piece = Piece::Zero;
        while let Some(layer) = self.shared.layers.get(index) {
            if let Some(found) = self.look(index, layer, offset, &mut len) {
                piece = found;
                break;
            }
            // One that ends within the part shows zeroes from there on, whatever lies beneath it.
            let covers = layer.size() >= end || planted::is(Bug::SkipsShortLayer);
            known += usize::from(known == index && covers);
            index += 1;
        }
        if let Some(skips) = skips.filter(|_| known > first) {
            skips.learn(offset, known);
        }
        (piece, len)
    }

    /// What one layer has for the start of a range; `None` where that is for the layer below it to say. Makes the range shorter, to what the
    /// answer holds for.
    #[inline(always)]
    fn look(&self, index: usize, layer: &Layer, offset: u64, len: &mut u64) -> Option<Piece> {
        let size = layer.size();
        if offset >= size {
            // A shorter backing file reads as zeroes past its end, whatever lies beneath it.
            return Some(Piece::Zero);
        }
        *len = (*len).min(size - offset);
        let qcow2 = match &layer.kind {
            LayerKind::Raw => {
                return Some(Piece::Data {
                    file: layer.file,
                    offset,
                });
            }
            LayerKind::Qcow2(qcow2) => qcow2,
        };
        let within = qcow2.geometry.in_cluster(offset);
        *len = (*len).min(qcow2.geometry.cluster_bytes() - within);
        match self.entry(layer, qcow2, offset) {
            LayerEntry::Miss(slice) => Some(Piece::Miss {
                layer: index,
                slice,
            }),
            LayerEntry::Bad(error) => Some(Piece::Bad(error)),
            LayerEntry::Entry(L2Entry::Unallocated) => None,
            LayerEntry::Entry(L2Entry::Zero | L2Entry::ZeroAllocated { .. }) => Some(Piece::Zero),
            LayerEntry::Entry(L2Entry::Data { host, .. }) => Some(Piece::Data {
                file: layer.file,
                offset: host.0 + within,
            }),
            LayerEntry::Entry(L2Entry::Compressed(extent)) => Some(Piece::Compressed {
                layer: index,
                extent,
                within,
            }),
        }
    }
}
