//! Structure-aware damage: a valid image, and a list of changes to header fields, table entries, refcounts, lengths.

use std::rc::Rc;

use urus_format::{Geometry, Header};

use crate::bases::{Base, base};
use crate::input::Input;

/// Changes to one image, at most.
const MOST_CHANGES: u8 = 16;
/// No change makes a file longer than this.
const MOST_BYTES: usize = 16 << 20;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Offset and width of the header's fields.
const HEADER_FIELDS: [(usize, usize); 22] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    // The first extension: type, length, data.
    (112, 4),
    (116, 4),
    (120, 8),
];

/// A damaged image.
#[derive(Clone, Debug)]
pub struct Mutated {
    /// What it was made from.
    pub base: Rc<Base>,
    /// The image file.
    pub bytes: Vec<u8>,
    /// How many changes were made; without any it is valid.
    pub changes: u8,
}

/// Where the parts of the undamaged image lie.
struct Parts {
    geometry: Geometry,
    l1: usize,
    l1_entries: usize,
    /// Offsets of the L2 tables, those of snapshots included.
    l2: Vec<usize>,
    refcount_table: usize,
    blocks: Vec<usize>,
    snapshots: Option<usize>,
    snapshot_l1: Option<usize>,
    directory: Option<usize>,
}

fn get(bytes: &[u8], at: usize, width: usize) -> u64 {
    let end = (at + width).min(bytes.len());
    bytes[at.min(end)..end]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn put(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    let value = value.to_be_bytes();
    let end = (at + width).min(bytes.len());
    if at < end {
        bytes[at..end].copy_from_slice(&value[8 - width..8 - width + (end - at)]);
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

impl Parts {
    fn of(bytes: &[u8]) -> Self {
        let header = Header::parse(bytes, bytes.len() as u64).expect("bases are valid");
        let geometry = header.geometry();
        let entries = |at: usize, count: usize| -> Vec<usize> {
            (0..count)
                .map(|index| to_usize(get(bytes, at + index * 8, 8) & OFFSET_MASK))
                .filter(|offset| *offset != 0)
                .collect()
        };
        let l1 = to_usize(header.l1_table.0);
        // A large disk has a long and empty table.
        let l1_entries = (header.l1_entries as usize).min(4096);
        let refcount_table = to_usize(header.refcount_table.0);
        let table_bytes =
            to_usize(u64::from(header.refcount_table_clusters) << header.cluster_bits);
        let snapshots = (header.snapshot_count > 0).then(|| to_usize(header.snapshot_table.0));
        let snapshot_l1 = snapshots.map(|at| to_usize(get(bytes, at, 8)));
        let mut l2 = entries(l1, l1_entries);
        l2.extend(
            snapshot_l1
                .map(|at| entries(at, l1_entries))
                .unwrap_or_default(),
        );
        Self {
            geometry,
            l1,
            l1_entries,
            l2,
            refcount_table,
            blocks: entries(refcount_table, table_bytes / 8),
            snapshots,
            snapshot_l1,
            directory: header.bitmaps.map(|bitmaps| to_usize(bitmaps.directory.0)),
        }
    }
}

/// Reads the number of a base and a list of changes from the input, and makes the image.
#[must_use]
pub fn mutated(input: &mut Input<'_>) -> Mutated {
    let base = base(input.u8());
    let mut bytes = base.files[0].contents.clone();
    let changes = input.u8() % (MOST_CHANGES + 1);
    if changes > 0 {
        let parts = Parts::of(&bytes);
        for _ in 0..changes {
            change(&mut bytes, &parts, input);
        }
    }
    if !base.files[0].properties.regular {
        // A block device keeps its length.
        bytes.resize(base.files[0].contents.len(), 0);
    }
    Mutated {
        base,
        bytes,
        changes,
    }
}

fn pick(list: &[usize], input: &mut Input<'_>) -> usize {
    list.get(input.index(list.len())).copied().unwrap_or(0)
}

fn change(bytes: &mut Vec<u8>, parts: &Parts, input: &mut Input<'_>) {
    let cluster = to_usize(parts.geometry.cluster_bytes());
    let l2_entries = to_usize(parts.geometry.l2_entries());
    match input.u8() % 16 {
        0 | 1 => {
            let (at, width) = HEADER_FIELDS[usize::from(input.u8()) % HEADER_FIELDS.len()];
            field(bytes, at, width, parts, input);
        }
        2 => {
            let at = parts.l1 + input.index(parts.l1_entries) * 8;
            field(bytes, at, 8, parts, input);
        }
        3..=5 => {
            let at = pick(&parts.l2, input) + input.index(l2_entries) * 8;
            field(bytes, at, 8, parts, input);
        }
        6 => {
            let at = parts.refcount_table + input.index(parts.blocks.len() + 2) * 8;
            field(bytes, at, 8, parts, input);
        }
        7 | 8 => {
            let block = pick(&parts.blocks, input);
            let at = block + input.index(cluster);
            let value = input.u8();
            put(bytes, at, 1, u64::from(value));
        }
        9 => {
            let Some(at) = parts.snapshots else { return };
            // Fixed part and extra data of the first entry.
            let (at, width) = [
                (at, 8),
                (at + 8, 4),
                (at + 12, 2),
                (at + 14, 2),
                (at + 32, 4),
                (at + 36, 4),
                (at + 48, 8),
            ][usize::from(input.u8()) % 7];
            field(bytes, at, width, parts, input);
        }
        10 => {
            let at = input.position(bytes.len());
            let len = usize::from(input.u8() % 33);
            let patch = input.take(len);
            let end = (at + patch.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&patch[..end - at]);
        }
        11 => {
            let len = input.position((bytes.len() * 2).min(MOST_BYTES));
            bytes.resize(len, 0);
        }
        12 => {
            // A cluster over another.
            let clusters = bytes.len() / cluster;
            let (from, to) = (input.index(clusters), input.index(clusters));
            if clusters > 0 {
                bytes.copy_within(from * cluster..(from + 1) * cluster, to * cluster);
            }
        }
        13 => {
            // An entry over another: two references to one cluster.
            let from = pick(&parts.l2, input) + input.index(l2_entries) * 8;
            let to = pick(&parts.l2, input) + input.index(l2_entries) * 8;
            let value = get(bytes, from, 8);
            put(bytes, to, 8, value);
        }
        14 => {
            let at = match (parts.directory, parts.snapshot_l1) {
                (Some(at), _) => at + input.index(48),
                (_, Some(at)) => at + input.index(parts.l1_entries) * 8,
                _ => parts.l1,
            };
            field(bytes, at, 8, parts, input);
        }
        _ => {
            // Inside compressed data, where there is some.
            let table = pick(&parts.l2, input);
            let entries = (0..l2_entries).map(|index| get(bytes, table + index * 8, 8));
            let streams: Vec<usize> = entries
                .filter(|entry| entry & COMPRESSED != 0)
                .map(|entry| to_usize(entry & ((1 << (70 - parts.geometry.cluster_bits())) - 1)))
                .collect();
            let at = pick(&streams, input).saturating_add(usize::from(input.u8()));
            let value = input.u8();
            if at < bytes.len() {
                put(bytes, at, 1, u64::from(value));
            }
        }
    }
}

fn field(bytes: &mut [u8], at: usize, width: usize, parts: &Parts, input: &mut Input<'_>) {
    let old = get(bytes, at, width);
    let value = value(bytes, old, parts, input);
    put(bytes, at, width, value);
}

/// A value worth trying.
fn value(bytes: &[u8], old: u64, parts: &Parts, input: &mut Input<'_>) -> u64 {
    let bits = parts.geometry.cluster_bits();
    match input.u8() % 12 {
        0 => input.u64(),
        1 => old ^ 1 << (input.u8() % 64),
        2 => old.wrapping_add_signed(i64::from(input.u8().cast_signed())),
        3 | 4 => {
            let flags = input.u8();
            let flag = |bit: u8, value: u64| {
                if flags & 1 << bit != 0 { value } else { 0 }
            };
            u64::from(input.u16()) << bits
                | flag(0, COPIED)
                | flag(1, COMPRESSED)
                | flag(2, 1)
                | flag(3, 1 << 57)
                | flag(4, 1 << 8)
                | flag(5, 1 << 9)
        }
        5 => 0,
        6 => u64::MAX >> (input.u8() % 64),
        7 => {
            let clusters = (bytes.len() as u64) >> bits;
            let near = clusters.wrapping_add_signed(i64::from(input.u8().cast_signed()));
            near << bits | COPIED
        }
        8 => 1 << (input.u8() % 64),
        9 => {
            let offset = input.position(bytes.len()) as u64;
            let sectors = u64::from(input.u8());
            COMPRESSED | sectors << (70 - bits) | offset
        }
        10 => get(bytes, input.position(bytes.len()) & !7, 8),
        _ => u64::from(input.u8()),
    }
}
