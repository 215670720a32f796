//! Bytes of a qcow2 file, read and changed in place. Offsets are those of the QCOW2 specification.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Version of the format, 2 or 3.
pub const VERSION: u64 = 4;
/// Offset of the backing file's name.
pub const BACKING_FILE_OFFSET: u64 = 8;
/// Length of the backing file's name.
pub const BACKING_FILE_SIZE: u64 = 16;
/// log2 of the cluster size.
pub const CLUSTER_BITS: u64 = 20;
/// Virtual size in bytes.
pub const SIZE: u64 = 24;
/// Encryption method.
pub const CRYPT_METHOD: u64 = 32;
/// Entries of the active L1 table.
pub const L1_SIZE: u64 = 36;
/// Offset of the active L1 table.
pub const L1_TABLE_OFFSET: u64 = 40;
/// Offset of the refcount table.
pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
/// Length of the refcount table in clusters.
pub const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
/// Number of internal snapshots.
pub const NB_SNAPSHOTS: u64 = 60;
/// Offset of the snapshot table.
pub const SNAPSHOTS_OFFSET: u64 = 64;
/// Incompatible feature bits.
pub const INCOMPATIBLE: u64 = 72;
/// Compatible feature bits.
pub const COMPATIBLE: u64 = 80;
/// Autoclear feature bits.
pub const AUTOCLEAR: u64 = 88;
/// log2 of the refcount width.
pub const REFCOUNT_ORDER: u64 = 96;
/// Length of the header.
pub const HEADER_LENGTH: u64 = 100;
/// Compression type.
pub const COMPRESSION_TYPE: u64 = 104;

/// Incompatible bit: refcounts may be wrong.
pub const DIRTY: u64 = 1;
/// Incompatible bit: metadata may be damaged.
pub const CORRUPT: u64 = 2;
/// Compatible bit: refcounts may lag.
pub const LAZY_REFCOUNTS: u64 = 1;

/// The offset that an L1 or L2 entry holds.
const ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The L1 or L2 entry is the only reference.
pub const COPIED: u64 = 1 << 63;

/// A 32-bit field.
#[must_use]
pub fn u32_at(image: &Path, offset: u64) -> u32 {
    u32::from_be_bytes(read(image, offset))
}

/// A 64-bit field.
#[must_use]
pub fn u64_at(image: &Path, offset: u64) -> u64 {
    u64::from_be_bytes(read(image, offset))
}

/// Bytes from somewhere in the file.
///
/// # Panics
/// When the file is shorter.
#[must_use]
pub fn read<const N: usize>(image: &Path, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    let file = File::open(image).expect("opening an image");
    file.read_exact_at(&mut bytes, offset)
        .expect("reading an image");
    bytes
}

/// Overwrites bytes anywhere in the file.
///
/// # Panics
/// When that fails.
pub fn patch(image: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new()
        .write(true)
        .open(image)
        .expect("opening an image");
    file.write_all_at(bytes, offset).expect("writing an image");
}

/// Overwrites a 32-bit field.
pub fn set_u32(image: &Path, offset: u64, value: u32) {
    patch(image, offset, &value.to_be_bytes());
}

/// Overwrites a 64-bit field.
pub fn set_u64(image: &Path, offset: u64, value: u64) {
    patch(image, offset, &value.to_be_bytes());
}

/// Sets bits of a 64-bit field.
pub fn set_bits(image: &Path, offset: u64, bits: u64) {
    set_u64(image, offset, u64_at(image, offset) | bits);
}

/// Where the first L2 table lies.
#[must_use]
pub fn first_l2(image: &Path) -> u64 {
    u64_at(image, u64_at(image, L1_TABLE_OFFSET)) & ENTRY_OFFSET
}

/// Where the first guest cluster's data lies.
#[must_use]
pub fn first_data(image: &Path) -> u64 {
    u64_at(image, first_l2(image)) & ENTRY_OFFSET
}

/// Turns a version 3 header of 112 bytes into one of 104, as other programs write it: no compression type, the
/// extensions eight bytes earlier.
///
/// # Panics
/// When the image has no such header.
pub fn shorten_to_104(image: &Path) {
    assert_eq!(
        u32_at(image, HEADER_LENGTH),
        112,
        "a header as QEMU writes it"
    );
    let name = u64_at(image, BACKING_FILE_OFFSET);
    let end = usize::try_from(if name == 0 { 512 } else { name }).expect("an offset in cluster 0");
    let mut start = std::fs::read(image).expect("reading an image");
    start.truncate(end);
    let moved = [&start[112..end], &[0; 8]].concat();
    patch(image, 104, &moved);
    set_u32(image, HEADER_LENGTH, 104);
}
