//! The layout of a new image: header, refcount table, refcount blocks, L1 table, in this order from cluster 0 on.
//!
//! It is QEMU's layout, because tools dump and poke those bytes: wherever one refcount block covers the
//! metadata (any ordinary size) the bytes are the same.

use crate::header::limits::{check_cluster_bits, check_refcount_order, check_version};
use crate::header::{HEADER_BYTES_V2, HEADER_BYTES_V3, MAX_L1_BYTES, default_feature_names};
use crate::{
    BackingName, Compression, Error, Geometry, Header, HostOffset, compatible, incompatible,
    refcount,
};

/// Virtual sizes are a multiple of this.
const SECTOR_BYTES: u64 = 512;
/// Smallest clusters whose header gets a feature-name table: smaller ones keep the room for other extensions.
const FEATURE_NAMES_MIN_CLUSTER_BITS: u32 = 13;

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to 512.
    pub size: u64,
    /// log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the refcount width in bits: 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// How compressed clusters will be compressed; version 2 knows only deflate.
    pub compression: Compression,
    /// Lets refcounts be updated late; version 3 only.
    pub lazy_refcounts: bool,
    /// The backing file's name and format, stored as given.
    pub backing: Option<BackingName>,
}

impl CreateOptions {
    /// A version 3 image of `size` bytes with clusters of 64 KiB and refcounts of 16 bits: `qemu-img`'s defaults.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_bits: 16,
            version: 3,
            refcount_order: 4,
            compression: Compression::Deflate,
            lazy_refcounts: false,
            backing: None,
        }
    }
}

/// What to write to make an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// The header, as [`writes`](Self::writes) holds it encoded.
    pub header: Header,
    /// Offsets and bytes to write. The header comes last: until it is written the file is no image.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// Offset and bytes of the L1 table, which must read as zeroes: a new file's does already, a used device's does not.
    pub zeroes: (u64, u64),
    /// The file's length in bytes.
    pub file_bytes: u64,
}

/// Where the parts lie, in clusters.
struct Parts {
    table_clusters: u64,
    blocks: u64,
    l1_clusters: u64,
}

impl Parts {
    /// Refcounts count themselves, so their number is a fixpoint. Each step only grows, and by less than it
    /// adds coverage, so it ends.
    fn new(l1_entries: u64, geometry: &Geometry) -> Self {
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        let mut parts = Self {
            table_clusters: 1,
            blocks: 1,
            l1_clusters,
        };
        loop {
            let blocks = parts.total().div_ceil(1 << geometry.refcount_block_bits());
            let table_clusters = geometry.clusters_for(blocks * 8);
            if blocks == parts.blocks && table_clusters == parts.table_clusters {
                return parts;
            }
            parts = Self {
                table_clusters,
                blocks,
                l1_clusters,
            };
        }
    }

    fn first_block(&self) -> u64 {
        1 + self.table_clusters
    }

    fn l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    fn total(&self) -> u64 {
        self.l1() + self.l1_clusters
    }
}

/// Plans a new image.
///
/// # Errors
/// [`Error::Invalid`] where an option is out of its range or does not go with the version, or the size is too
/// large for the cluster size; [`Error::NoSpace`] where the backing file's name does not fit into cluster 0.
pub fn layout(options: &CreateOptions) -> Result<NewImage, Error> {
    let geometry = check(options)?;
    let size = round_size(options.size, &geometry)?;
    let l1_entries = geometry.l1_entries_for(size);
    let parts = Parts::new(l1_entries, &geometry);
    let cluster_bits = geometry.cluster_bits();
    // An empty table has no place.
    let l1_offset = if l1_entries == 0 {
        0
    } else {
        parts.l1() << cluster_bits
    };

    let header = Header {
        size,
        l1_entries: count32(l1_entries),
        l1_table: HostOffset(l1_offset),
        refcount_table: HostOffset(1 << cluster_bits),
        refcount_table_clusters: count32(parts.table_clusters),
        ..empty_header(options)
    };
    let writes = vec![
        (1 << cluster_bits, refcount_table(&parts, &geometry)),
        (
            parts.first_block() << cluster_bits,
            refcount_blocks(&parts, &geometry),
        ),
        (0, header.encode()?),
    ];
    let file_bytes = (parts.l1() << cluster_bits) + l1_entries * 8;
    Ok(NewImage {
        header,
        writes,
        zeroes: (l1_offset, l1_entries * 8),
        file_bytes,
    })
}

fn check(options: &CreateOptions) -> Result<Geometry, Error> {
    check_version(options.version)?;
    check_cluster_bits(options.cluster_bits)?;
    check_refcount_order(options.version, options.refcount_order)?;
    if options.version == 2 {
        if options.compression != Compression::Deflate {
            return Err(Error::invalid(
                "version",
                options.version,
                "3 for compression with zstd",
            ));
        }
        if options.lazy_refcounts {
            return Err(Error::invalid(
                "version",
                options.version,
                "3 for lazy refcounts",
            ));
        }
    }
    Ok(Geometry::new(
        options.cluster_bits,
        options.refcount_order,
        8,
        options.version,
    ))
}

/// The size in whole sectors, known to be mappable.
fn round_size(size: u64, geometry: &Geometry) -> Result<u64, Error> {
    let largest = MAX_L1_BYTES / 8 * geometry.l2_coverage_bytes();
    match size.checked_next_multiple_of(SECTOR_BYTES) {
        Some(rounded) if rounded <= largest => Ok(rounded),
        _ => {
            let expected = format!(
                "at most {largest} with clusters of {} bytes",
                geometry.cluster_bytes()
            );
            Err(Error::invalid("size", size, expected))
        }
    }
}

fn empty_header(options: &CreateOptions) -> Header {
    let v3 = options.version >= 3;
    let with_names = v3 && options.cluster_bits >= FEATURE_NAMES_MIN_CLUSTER_BITS;
    let zstd = options.compression == Compression::Zstd;
    Header {
        version: options.version,
        header_bytes: if v3 { HEADER_BYTES_V3 } else { HEADER_BYTES_V2 },
        cluster_bits: options.cluster_bits,
        size: 0,
        crypt_method: 0,
        l1_entries: 0,
        l1_table: HostOffset(0),
        refcount_table: HostOffset(0),
        refcount_table_clusters: 0,
        snapshot_count: 0,
        snapshot_table: HostOffset(0),
        incompatible: if zstd { incompatible::COMPRESSION } else { 0 },
        compatible: if options.lazy_refcounts {
            compatible::LAZY_REFCOUNTS
        } else {
            0
        },
        autoclear: 0,
        refcount_order: options.refcount_order,
        compression: options.compression,
        backing: options.backing.clone(),
        data_file: None,
        bitmaps: None,
        luks: None,
        feature_names: if with_names {
            default_feature_names()
        } else {
            Vec::new()
        },
        unknown_extensions: Vec::new(),
        unknown_header_bytes: Vec::new(),
    }
}

fn refcount_table(parts: &Parts, geometry: &Geometry) -> Vec<u8> {
    let mut table = Vec::new();
    for block in 0..parts.blocks {
        let offset = (parts.first_block() + block) << geometry.cluster_bits();
        table.extend_from_slice(&offset.to_be_bytes());
    }
    table.resize(buffer_bytes(parts.table_clusters, geometry), 0);
    table
}

fn refcount_blocks(parts: &Parts, geometry: &Geometry) -> Vec<u8> {
    let mut blocks = vec![0; buffer_bytes(parts.blocks, geometry)];
    let order = geometry.refcount_order();
    let mut left = parts.total();
    for block in blocks.chunks_exact_mut(buffer_bytes(1, geometry)) {
        let here = left.min(1 << geometry.refcount_block_bits());
        (0..here).for_each(|index| refcount::set(block, index, order, 1));
        left -= here;
    }
    blocks
}

/// Bytes of so many clusters of refcount structures: a few MiB at most, as the L1 table has at most 32.
fn buffer_bytes(clusters: u64, geometry: &Geometry) -> usize {
    usize::try_from(clusters << geometry.cluster_bits())
        .expect("refcounts of a new image have a few MiB")
}

/// A count bounded by the largest L1 table.
fn count32(count: u64) -> u32 {
    u32::try_from(count).expect("the size has been checked: a new image's tables are short")
}
