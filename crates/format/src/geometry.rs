//! The sizes that follow from the header: clusters, table entries, refcounts.

use crate::{ClusterIndex, GuestCluster, GuestOffset, HostOffset};

/// Smallest legal `cluster_bits`: 512-byte clusters.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest legal `cluster_bits`: 2 MiB clusters.
pub const MAX_CLUSTER_BITS: u32 = 21;

/// Sizes of one image. Cheap to copy; all arithmetic on clusters and tables goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    l2_entry_shift: u32,
    zero_flag: bool,
}

impl Geometry {
    /// A geometry of valid parts.
    ///
    /// `l2_entry_bytes` is 8, or 16 with extended L2; `version` is 2 or 3.
    ///
    /// # Panics
    /// When a part is out of its legal range: the header codec has checked them before.
    #[must_use]
    pub fn new(cluster_bits: u32, refcount_order: u32, l2_entry_bytes: u32, version: u32) -> Self {
        assert!((MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits));
        assert!(refcount_order <= 6);
        assert!(l2_entry_bytes == 8 || l2_entry_bytes == 16);
        assert!(version == 2 || version == 3);
        Self {
            cluster_bits,
            refcount_order,
            l2_entry_shift: l2_entry_bytes.trailing_zeros(),
            zero_flag: version >= 3 && l2_entry_bytes == 8,
        }
    }

    /// log2 of the cluster size.
    #[must_use]
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Bytes of a cluster: 512 to 2 MiB.
    #[must_use]
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the refcount width in bits: 0 to 6.
    #[must_use]
    pub fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Largest refcount that an entry can hold.
    #[must_use]
    pub fn refcount_max(&self) -> u64 {
        if self.refcount_order == 6 {
            u64::MAX
        } else {
            (1 << (1u32 << self.refcount_order)) - 1
        }
    }

    /// Bytes of an L2 entry: 8, or 16 with extended L2.
    #[must_use]
    pub fn l2_entry_bytes(&self) -> u64 {
        1 << self.l2_entry_shift
    }

    /// Whether bit 0 of an L2 entry means "reads as zeroes" (version 3 without extended L2).
    #[must_use]
    pub fn has_zero_flag(&self) -> bool {
        self.zero_flag
    }

    /// log2 of the number of entries in an L2 table.
    #[must_use]
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_shift
    }

    /// Entries in an L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table maps.
    #[must_use]
    pub fn l2_coverage_bytes(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// log2 of the refcounts in one refcount block.
    #[must_use]
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// L1 entries needed to map `size` guest bytes.
    #[must_use]
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage_bytes())
    }

    /// Clusters needed to hold `bytes`.
    #[must_use]
    pub fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_bytes())
    }

    /// The cluster that holds a guest offset.
    #[must_use]
    pub fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// Start of a guest cluster.
    #[must_use]
    pub fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The cluster that holds a host offset.
    #[must_use]
    pub fn host_cluster(&self, offset: HostOffset) -> ClusterIndex {
        ClusterIndex(offset.0 >> self.cluster_bits)
    }

    /// Start of a host cluster.
    #[must_use]
    pub fn host_offset(&self, cluster: ClusterIndex) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Offset inside a cluster.
    #[must_use]
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// L1 index of a guest cluster.
    #[must_use]
    pub fn l1_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.l2_bits()
    }

    /// Index of a guest cluster inside its L2 table.
    #[must_use]
    pub fn l2_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 & (self.l2_entries() - 1)
    }
}
