//! Where a range of the virtual disk comes from: the walk down the chain, without waiting for anything.

use urus_format::{CompressedExtent, EntryError, GuestCluster, GuestOffset, L2Entry};

use crate::chain::{Layer, LayerKind, Qcow2Layer};
use crate::error::{Error, Result};
use crate::map::{Lookup, SliceId};
use crate::planted::{self, Bug};

use crate::storage::{FileId, Storage};
use crate::worker::Worker;

/// The source of a range.
pub(crate) enum Piece<'a> {
    /// Bytes of a file, from here.
    Data { file: FileId, offset: u64 },
    /// Zeroes.
    Zero,
    /// Part of a compressed cluster.
    Compressed {
        layer: &'a Layer,
        extent: CompressedExtent,
        /// Bytes from the start of the cluster to the range.
        within: u64,
    },
    /// Not known until this slice is cached.
    Miss { layer: &'a Layer, slice: SliceId },
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
    pub(crate) fn layer_entry(&self, layer: &Layer, offset: u64) -> LayerEntry {
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

    #[inline]
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.chain.top().size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }

    /// What lies below the image.
    pub(crate) fn beneath(&self) -> Option<&Layer> {
        self.chain.beneath(self.image.layer.id)
    }

    /// Resolves the start of `[offset, offset + len)`, as the guest sees it. The answer holds for the returned number of
    /// bytes, at least 1, at most one cluster of any layer that was asked.
    #[inline]
    pub(crate) fn resolve(&self, offset: u64, len: u64) -> (Piece<'_>, u64) {
        let mut len = len;
        match self.look(self.chain.top(), offset, &mut len) {
            Some(piece) => (piece, len),
            None => self.resolve_backing(offset, len),
        }
    }

    /// The same among the backing files.
    fn resolve_backing(&self, offset: u64, len: u64) -> (Piece<'_>, u64) {
        let mut len = len;
        let (mut index, mut end) = (0, 0);
        let skips = self.chain.skips.as_ref();
        if let Some(skips) = skips {
            (index, end) = (skips.first(offset), skips.end_of(offset));
            len = len.min(end - offset);
        }
        // All layers below the top, up to this one, have nothing for the whole part.
        let (first, mut known) = (index, index);
        let mut piece = Piece::Zero;
        while let Some(layer) = self.chain.below().get(index) {
            if let Some(found) = self.look(layer, offset, &mut len) {
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
    fn look<'a>(&self, layer: &'a Layer, offset: u64, len: &mut u64) -> Option<Piece<'a>> {
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
            LayerEntry::Miss(slice) => Some(Piece::Miss { layer, slice }),
            LayerEntry::Bad(error) => Some(Piece::Bad(error)),
            LayerEntry::Entry(L2Entry::Unallocated) => None,
            LayerEntry::Entry(L2Entry::Zero | L2Entry::ZeroAllocated { .. }) => Some(Piece::Zero),
            LayerEntry::Entry(L2Entry::Data { host, .. }) => Some(Piece::Data {
                file: layer.file,
                offset: host.0 + within,
            }),
            LayerEntry::Entry(L2Entry::Compressed(extent)) => Some(Piece::Compressed {
                layer,
                extent,
                within,
            }),
        }
    }
}
