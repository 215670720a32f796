//! Headers and snapshot tables as programs other than QEMU lay them out. The format allows all of it, and whoever
//! changes such an image has to leave alone what it does not change (O28).

use urus_format::Header;
use urus_format::snapshot::Snapshot;

/// How another program lays a header out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// The backing file's name lies 8 bytes further back than QEMU puts it.
    NameFurtherBack,
    /// The name follows the last extension: nothing else marks their end.
    NoEndMarker,
    /// An extension that nobody knows comes first, behind a header of 104 bytes in version 3.
    UnknownFirst,
    /// No extensions, and a name that ends beyond the first sector. For clusters of 1 KiB and more.
    LongName,
}

const BACKING_FORMAT: u32 = 0xe279_2aca;
const UNKNOWN: u32 = 0x7572_7573;
/// Fills gaps, and what lies behind the name: bytes that mean nothing, and that no other program has to lose.
const FILLING: u8 = 0x77;
const LONG_NAME_BYTES: usize = 450;

fn extension(out: &mut Vec<u8>, kind: u32, value: &[u8]) {
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len32(value.len()).to_be_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(8), 0);
}

fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("short")
}

/// Cluster 0 with this header. It names a backing file.
///
/// # Panics
/// Where it makes no header.
#[must_use]
pub fn lay_out(header: &Header, foreign: Foreign) -> Vec<u8> {
    let own = header.encode().expect("a valid header");
    let backing = header.backing.as_ref().expect("it has a backing file");
    let v3 = header.version == 3;
    let header_bytes = match (v3, foreign) {
        (false, _) => 72,
        (true, Foreign::UnknownFirst) => 104,
        (true, _) => 112,
    };
    let mut out = own[..header_bytes].to_vec();
    if v3 {
        out[100..104].copy_from_slice(&len32(header_bytes).to_be_bytes());
    }
    if foreign == Foreign::UnknownFirst {
        extension(&mut out, UNKNOWN, b"as it was");
    }
    if foreign != Foreign::LongName {
        let format = backing.format.as_deref().expect("it has a format");
        extension(&mut out, BACKING_FORMAT, format.as_bytes());
    }
    if !matches!(foreign, Foreign::NoEndMarker | Foreign::LongName) {
        extension(&mut out, 0, &[]);
    }
    if foreign == Foreign::NameFurtherBack {
        out.extend_from_slice(&[FILLING; 8]);
    }
    let mut name = backing.name.clone();
    while foreign == Foreign::LongName && name.len() < LONG_NAME_BYTES {
        name.splice(0..0, *b"./");
    }
    let at = out.len() as u64;
    out[8..16].copy_from_slice(&at.to_be_bytes());
    out[16..20].copy_from_slice(&len32(name.len()).to_be_bytes());
    out.extend_from_slice(&name);
    assert!(out.len() < own.len(), "it fits into cluster 0");
    out.resize(own.len(), FILLING);
    out
}

/// A snapshot table of one entry with 16 bytes of extra data, as programs before icount wrote it, and a name that makes
/// it fill a cluster to the last byte.
///
/// # Panics
/// Where the cluster is larger than a name can be.
#[must_use]
pub fn snapshot_table(snapshot: &Snapshot, cluster_bytes: u64) -> Vec<u8> {
    let mut name = snapshot.name.clone();
    let len = usize::try_from(cluster_bytes).expect("small");
    name.resize(len - 40 - 16 - snapshot.id.len(), b'x');
    let len16 = |len: usize| u16::try_from(len).expect("a name has up to 65535 bytes");
    let mut out = Vec::with_capacity(len);
    out.extend_from_slice(&snapshot.l1_table.0.to_be_bytes());
    out.extend_from_slice(&snapshot.l1_entries.to_be_bytes());
    out.extend_from_slice(&len16(snapshot.id.len()).to_be_bytes());
    out.extend_from_slice(&len16(name.len()).to_be_bytes());
    out.extend_from_slice(&snapshot.date_seconds.to_be_bytes());
    out.extend_from_slice(&snapshot.date_nanoseconds.to_be_bytes());
    out.extend_from_slice(&snapshot.vm_clock_nanoseconds.to_be_bytes());
    out.extend_from_slice(&0u32.to_be_bytes());
    out.extend_from_slice(&16u32.to_be_bytes());
    out.extend_from_slice(&snapshot.vm_state_bytes.to_be_bytes());
    let disk_bytes = snapshot.disk_bytes.expect("it has a size");
    out.extend_from_slice(&disk_bytes.to_be_bytes());
    out.extend_from_slice(&snapshot.id);
    out.extend_from_slice(&name);
    assert_eq!(out.len(), len);
    out
}
