//! What the device says of itself: features, and the configuration space (virtio 1.2, 5.2.4 "Device configuration
//! layout").

use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::limits;
use crate::request::SECTOR_BYTES;

/// Where the cache mode is: the one field that a driver may write.
pub(crate) const WRITEBACK: usize = 32;

/// Bytes that this back end knows of; the rest of the space reads as zeroes.
const KNOWN_BYTES: usize = 60;

/// The block that urus would like to get: the page of the host. Smaller ones work.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// The features offered to the driver.
pub(crate) fn features(read_only: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    let offered: u64 = bits.into_iter().map(bit).sum();
    offered
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
        | VhostUserVirtioFeatures::LOG_ALL.bits()
}

/// A feature as a bit.
pub(crate) fn bit(feature: u32) -> u64 {
    1 << feature
}

/// The features of the protocol offered to the front end.
pub(crate) fn protocol_features() -> Protocol {
    Protocol::MQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::RESET_DEVICE
        | Protocol::LOG_SHMFD
        | Protocol::BACKEND_REQ
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Of the disk, in bytes.
    pub(crate) size: u64,
    pub(crate) cluster_bytes: Option<u64>,
    pub(crate) queues: u16,
    pub(crate) writeback: bool,
}

impl Shape {
    /// Bytes of the configuration space, in the order of the specification.
    fn space(&self) -> [u8; KNOWN_BYTES] {
        let cluster_sectors = self.cluster_bytes.unwrap_or(4096) / SECTOR_BYTES;
        let cluster_sectors = u32::try_from(cluster_sectors).unwrap_or(1);
        let min_io_blocks = 1_u16 << PHYSICAL_BLOCK_EXPONENT;
        let mut space = Vec::with_capacity(KNOWN_BYTES);
        let mut put = |bytes: &[u8]| space.extend_from_slice(bytes);
        put(&(self.size / SECTOR_BYTES).to_le_bytes());
        put(&limits::SEGMENT_BYTES.to_le_bytes());
        put(&limits::SEG_MAX.to_le_bytes());
        // Cylinders, heads and sectors, which are not offered.
        put(&[0; 4]);
        put(&512_u32.to_le_bytes());
        // Topology: exponent of the physical block, offset of its first, least and best size of I/O in blocks.
        put(&[PHYSICAL_BLOCK_EXPONENT, 0]);
        put(&min_io_blocks.to_le_bytes());
        put(&cluster_sectors.to_le_bytes());
        put(&[u8::from(self.writeback), 0]);
        put(&self.queues.to_le_bytes());
        put(&limits::CLEAR_SECTORS.to_le_bytes());
        put(&limits::CLEAR_SEGMENTS.to_le_bytes());
        // What a discard gives back is whole clusters.
        put(&cluster_sectors.to_le_bytes());
        put(&limits::CLEAR_SECTORS.to_le_bytes());
        put(&limits::CLEAR_SEGMENTS.to_le_bytes());
        // Write-zeroes may unmap; three bytes unused.
        put(&[1, 0, 0, 0]);
        space.try_into().expect("the fields above are 60 bytes")
    }

    /// A part of the space.
    pub(crate) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let space = self.space();
        (offset..offset.saturating_add(len))
            .map(|at| space.get(at).copied().unwrap_or(0))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    //! Guards the layout that drivers read, against the one of the kernel's header.
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_blk::virtio_blk_config as Layout;

    #[test]
    fn the_space_is_laid_out_as_the_kernel_has_it() {
        let shape = Shape {
            size: 1 << 40,
            cluster_bytes: Some(65_536),
            queues: 0x102,
            writeback: true,
        };
        let number = |at, len| {
            let mut wide = [0; 8];
            wide[..len].copy_from_slice(&shape.read(at, len));
            u64::from_le_bytes(wide)
        };
        for (at, len, value) in [
            (offset_of!(Layout, capacity), 8, 1 << 31),
            (offset_of!(Layout, size_max), 4, 16 << 20),
            (offset_of!(Layout, seg_max), 4, 126),
            (offset_of!(Layout, blk_size), 4, 512),
            (offset_of!(Layout, physical_block_exp), 1, 3),
            (offset_of!(Layout, alignment_offset), 1, 0),
            (offset_of!(Layout, min_io_size), 2, 8),
            (offset_of!(Layout, opt_io_size), 4, 128),
            (offset_of!(Layout, wce), 1, 1),
            (offset_of!(Layout, num_queues), 2, 0x102),
            (offset_of!(Layout, max_discard_sectors), 4, 8 << 20),
            (offset_of!(Layout, max_discard_seg), 4, 32),
            (offset_of!(Layout, discard_sector_alignment), 4, 128),
            (offset_of!(Layout, max_write_zeroes_sectors), 4, 8 << 20),
            (offset_of!(Layout, max_write_zeroes_seg), 4, 32),
            (offset_of!(Layout, write_zeroes_may_unmap), 1, 1),
        ] {
            assert_eq!(number(at, len), value, "at {at}");
        }
        assert_eq!(offset_of!(Layout, wce), WRITEBACK);
        assert_eq!(shape.read(58, 4), [0; 4]);
        assert_eq!(shape.read(usize::MAX, 4), Vec::<u8>::new());
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let writes = bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
        assert_eq!(features(true) & writes, 0);
        assert_eq!(features(true) & bit(VIRTIO_BLK_F_RO), bit(VIRTIO_BLK_F_RO));
        assert_eq!(features(false) & writes, writes);
        assert_eq!(features(false) & bit(VIRTIO_BLK_F_RO), 0);
    }
}
