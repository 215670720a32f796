//! The file that the guest's changes go to.

use urus_format::GuestOffset;

use crate::chain::{Layer, Qcow2Layer};
use crate::cluster_locks::ClusterLocks;
use crate::map::SliceId;
use crate::storage::FileId;
use crate::sync::{Arc, AtomicBool, AtomicU64};

/// A qcow2 image or raw file that is written to, as all threads see it. It knows nothing of a place in a chain. (Also of a device that is opened
/// read-only: then nothing comes.)
pub(crate) struct Image {
    pub(crate) layer: Arc<Layer>,
    pub(crate) locks: Arc<ClusterLocks>,
    /// O11: a sync failed, and what is on disk is not known.
    pub(crate) poisoned: AtomicBool,
    /// O18: every write takes its cluster's lock, since one smaller than the file's alignment was seen.
    pub(crate) serialize_writes: AtomicBool,
    /// Moves on when the metadata is read again: what was reserved before is nobody's.
    pub(crate) generation: AtomicU64,
}

impl Image {
    pub(crate) fn new(layer: Arc<Layer>) -> Self {
        Self {
            layer,
            locks: Arc::new(ClusterLocks::new()),
            poisoned: AtomicBool::new(false),
            serialize_writes: AtomicBool::new(false),
            generation: AtomicU64::new(0),
        }
    }

    /// Where its data and its metadata lie.
    #[inline]
    pub(crate) fn file(&self) -> FileId {
        self.layer.file
    }

    /// Its mapping. Of a qcow2 image.
    #[inline]
    pub(crate) fn qcow2(&self) -> &Qcow2Layer {
        self.layer
            .qcow2()
            .expect("only qcow2 images have entries to change")
    }

    /// O23: whether the mapping of a range is durable as it is. Then what lies behind it needs no commit to be found again.
    pub(crate) fn is_settled(&self, offset: u64, len: u64) -> bool {
        let Some(image) = self.layer.qcow2() else {
            return true;
        };
        if len == 0 {
            return true;
        }
        let slice_at = |offset| {
            let cluster = image.geometry.guest_cluster(GuestOffset(offset));
            image.map.slice_of(cluster).0
        };
        let frames = &image.meta.lock().frames;
        (slice_at(offset)..=slice_at(offset + len - 1))
            .all(|slice| frames.is_settled(&image.map, SliceId(slice)))
    }
}
