//! Images as other programs leave them: with data, compressed clusters, zero clusters and an internal snapshot,
//! with holes of old garbage between the clusters.

use std::collections::BTreeMap;

use urus_format::snapshot::{Snapshot, encode_table};
use urus_format::{
    BackingName, CompressedExtent, Compression, Geometry, Header, HostOffset, L1Entry, L2Entry,
    compressed, create, incompatible, refcount,
};

use crate::cipher::Xor;
use crate::contents::index;
use crate::foreign::{self, Foreign};
use crate::rng::Rng;
use crate::stamp::{Content, stamp, stamp_until};

/// What to build.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The empty image.
    pub options: create::CreateOptions,
    /// So many in 256 clusters hold something.
    pub fill: u32,
    /// Some of them are compressed.
    pub compressed: bool,
    /// There is an internal snapshot; some clusters and tables are shared with it.
    pub snapshot: bool,
    /// The last clusters lie here, far behind the others, with no refcount blocks between.
    pub far: Option<u64>,
    /// It is marked as not closed, and has an autoclear bit that nobody knows.
    pub left_open: bool,
    /// Its refcounts are wrong: whoever wrote it meant to count again.
    pub miscounted: bool,
    /// Another program than QEMU laid out its header and its snapshot table.
    pub foreign: Option<Foreign>,
    /// Its data passes the [`cipher`](crate::cipher).
    pub ciphered: bool,
    /// Stamps have versions from here on.
    pub first_version: u64,
    /// Guest sectors as the backing file shows them.
    pub backing: Option<Vec<Content>>,
}

/// An image and what a guest reads from it.
#[derive(Clone, Debug)]
pub struct Built {
    /// The file.
    pub bytes: Vec<u8>,
    /// The active state.
    pub active: Vec<Content>,
    /// The snapshot.
    pub snapshot: Option<Vec<Content>>,
}

/// A guest cluster as one of the two states sees it.
#[derive(Clone)]
struct Cell {
    entry: L2Entry,
    contents: Vec<Content>,
}

struct Builder<'a> {
    plan: &'a Plan,
    rng: &'a mut Rng,
    geometry: Geometry,
    bytes: Vec<u8>,
    next: u64,
    counts: BTreeMap<u64, u64>,
    version: u64,
    /// Where the next compressed stream may go: offset, and the end of its cluster.
    stream: Option<(u64, u64)>,
    streams: u64,
}

/// Builds an image.
///
/// # Panics
/// When the plan makes no image.
#[must_use]
pub fn build(plan: &Plan, rng: &mut Rng) -> Built {
    let options = &plan.options;
    let geometry = Geometry::new(
        options.cluster_bits,
        options.refcount_order,
        8,
        options.version,
    );
    let header = create::layout(options).expect("a valid plan").header;
    let builder = Builder {
        plan,
        rng,
        geometry,
        bytes: Vec::new(),
        next: 1,
        counts: BTreeMap::from([(0, 1)]),
        version: plan.first_version,
        stream: None,
        streams: 0,
    };
    builder.build(header)
}

impl Builder<'_> {
    fn cluster(&self) -> u64 {
        self.geometry.cluster_bytes()
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let end = index(offset) + bytes.len();
        while self.bytes.len() < end {
            // Garbage that looks like somebody's data.
            let mut sector = [0; 512];
            let at = self.bytes.len() as u64 / 512;
            stamp(&mut sector, at + (1 << 40), 0xdead);
            self.bytes.extend_from_slice(&sector);
        }
        self.bytes[index(offset)..end].copy_from_slice(bytes);
    }

    /// `count` adjacent clusters, now and then behind a hole. They are not counted yet.
    fn take(&mut self, count: u64) -> HostOffset {
        if self.rng.chance(24) {
            self.next += 1 + self.rng.below(4);
        }
        let first = self.next;
        self.next += count;
        HostOffset(first << self.geometry.cluster_bits())
    }

    fn count(&mut self, offset: HostOffset, bytes: u64, references: u64) {
        let bits = self.geometry.cluster_bits();
        for cluster in offset.0 >> bits..=(offset.0 + bytes.max(1) - 1) >> bits {
            *self.counts.entry(cluster).or_default() += references;
        }
    }

    fn build(mut self, mut header: Header) -> Built {
        let clusters = self.plan.options.size.div_ceil(self.cluster());
        let per_table = self.geometry.l2_entries();
        let shared = self.plan.snapshot;
        let mut active = Vec::new();
        let mut snapshot = Vec::new();
        let mut tables = [Vec::new(), Vec::new()];
        for first in (0..clusters).step_by(index(per_table)) {
            if self.plan.far.is_some() && first + per_table >= clusters {
                self.next = self.next.max(self.plan.far.unwrap_or(0));
            }
            let here = per_table.min(clusters - first);
            let fill = if self.rng.chance(32) {
                0
            } else {
                self.plan.fill
            };
            let diverged = self.rng.chance(128);
            let mut cells: [Vec<Cell>; 2] = [Vec::new(), Vec::new()];
            for cluster in first..first + here {
                let old = self.cell(cluster, fill, shared);
                let new = if shared && diverged && self.rng.chance(128) {
                    self.release(&old);
                    self.cell(cluster, fill, false)
                } else {
                    old.clone()
                };
                active.extend_from_slice(&new.contents);
                snapshot.extend_from_slice(&old.contents);
                cells[0].push(new);
                cells[1].push(old);
            }
            self.tables(&cells, shared, diverged, &mut tables);
        }
        let l1_bytes = header.l1_entries.max(1) * 8;
        let sectors = index(self.plan.options.size / 512);
        active.truncate(sectors);
        snapshot.truncate(sectors);
        if shared {
            let place = self.put_l1(&tables[1], u64::from(l1_bytes));
            self.put_snapshot(&mut header, place);
        }
        header.l1_table = self.put_l1(&tables[0], u64::from(l1_bytes));
        self.put_refcounts(&mut header);
        if self.plan.left_open {
            header.incompatible |= incompatible::DIRTY;
            header.autoclear |= 1 << 40;
        }
        let bytes = match self.plan.foreign {
            None => header.encode().expect("a valid header"),
            Some(foreign) => foreign::lay_out(&header, foreign),
        };
        // Stale bytes behind the header would be taken for its extensions.
        self.put(0, &vec![0; index(self.cluster())]);
        self.put(0, &bytes);
        let end = index(self.next << self.geometry.cluster_bits());
        if self.bytes.len() < end && self.rng.chance(128) {
            let len = index(self.cluster());
            self.put((end - len) as u64, &vec![0; len]);
        }
        Built {
            bytes: self.bytes,
            active,
            snapshot: shared.then_some(snapshot),
        }
    }

    /// What shows where nothing is allocated.
    fn behind(&self, cluster: u64) -> Vec<Content> {
        let sectors = self.cluster() / 512;
        let backing = self.plan.backing.as_deref().unwrap_or_default();
        (cluster * sectors..(cluster + 1) * sectors)
            .map(|lba| backing.get(index(lba)).copied().unwrap_or(Content::Zero))
            .collect()
    }

    /// A guest cluster with new content, referred to once, or twice.
    fn cell(&mut self, cluster: u64, fill: u32, twice: bool) -> Cell {
        let sectors = self.cluster() / 512;
        let zeroes = vec![Content::Zero; index(sectors)];
        let references = 1 + u64::from(twice);
        let copied = !twice;
        if !self.rng.chance(fill) {
            let contents = self.behind(cluster);
            return Cell {
                entry: L2Entry::Unallocated,
                contents,
            };
        }
        let kind = self.rng.index(8);
        if kind == 0 && self.geometry.has_zero_flag() {
            return Cell {
                entry: L2Entry::Zero,
                contents: zeroes,
            };
        }
        if kind == 1 && self.geometry.has_zero_flag() {
            let host = self.take(1);
            self.count(host, 1, references);
            // What a preallocated zero cluster holds must never show.
            let entry = L2Entry::ZeroAllocated { host, copied };
            return Cell {
                entry,
                contents: zeroes,
            };
        }
        let version = self.version;
        self.version += 1;
        let mut data = vec![0; index(self.cluster())];
        for (lba, sector) in (cluster * sectors..).zip(data.chunks_exact_mut(512)) {
            stamp(sector, lba, version);
        }
        let contents = vec![Content::Version(version); index(sectors)];
        let wanted = self.plan.compressed && kind < 5;
        if let Some(entry) = wanted.then(|| self.compress(&data, references)).flatten() {
            return Cell { entry, contents };
        }
        let host = self.take(1);
        self.count(host, 1, references);
        if self.plan.ciphered {
            Xor::apply(host.0, &mut data);
        }
        self.put(host.0, &data);
        Cell {
            entry: L2Entry::Data { host, copied },
            contents,
        }
    }

    fn compress(&mut self, data: &[u8], references: u64) -> Option<L2Entry> {
        let cluster = self.cluster();
        let stream = compressed::encode(self.plan.options.compression, data, data.len())?;
        // Streams that share a cluster may each belong to both states.
        let most = if self.plan.snapshot { 2 } else { 1 };
        let max = self.geometry.refcount_max().min(200) / most;
        if max == 0 {
            return None;
        }
        let len = stream.len() as u64;
        let fits = self
            .stream
            .filter(|(at, end)| at + len <= *end && self.streams < max);
        let at = match fits {
            Some((at, _)) => at,
            None => {
                self.streams = 0;
                // Two clusters: streams may cross the boundary.
                let clusters = 1 + self.rng.below(2);
                let start = self.take(clusters).0;
                self.stream = Some((start, start + clusters * cluster));
                start
            }
        };
        self.streams += 1;
        let end = self.stream?.1;
        let offset = HostOffset(at);
        let bytes = (at + len).next_multiple_of(512) - at;
        self.stream = Some((at + len, end));
        self.put(at, &stream);
        self.count(offset, bytes, references);
        Some(L2Entry::Compressed(CompressedExtent { offset, bytes }))
    }

    /// The active state gives its reference up.
    fn release(&mut self, cell: &Cell) {
        let bits = self.geometry.cluster_bits();
        let (offset, bytes) = match cell.entry {
            L2Entry::Data { host, .. } | L2Entry::ZeroAllocated { host, .. } => (host, 1),
            L2Entry::Compressed(extent) => (extent.offset, extent.bytes),
            L2Entry::Unallocated | L2Entry::Zero => return,
        };
        for cluster in offset.0 >> bits..=(offset.0 + bytes - 1) >> bits {
            *self.counts.get_mut(&cluster).expect("counted before") -= 1;
        }
    }

    /// Puts the L2 tables of one range: one for both states, or one each.
    fn tables(
        &mut self,
        cells: &[Vec<Cell>; 2],
        shared: bool,
        diverged: bool,
        tables: &mut [Vec<u64>; 2],
    ) {
        let empty = |cells: &[Cell]| cells.iter().all(|cell| cell.entry == L2Entry::Unallocated);
        if cells.iter().all(|cells| empty(cells)) {
            tables.iter_mut().for_each(|table| table.push(0));
            return;
        }
        let states = if shared && diverged { 2 } else { 1 };
        for state in 0..states {
            let table = self.take(1);
            self.count(table, 1, if shared && !diverged { 2 } else { 1 });
            let mut bytes = vec![0; index(self.cluster())];
            for (entry, cell) in bytes.chunks_exact_mut(8).zip(&cells[state]) {
                entry.copy_from_slice(&cell.entry.encode(&self.geometry).entry.to_be_bytes());
            }
            self.put(table.0, &bytes);
            // A flag that says too much is repaired with the refcount that it is about.
            let wrong = self.plan.miscounted && self.rng.chance(96);
            let copied = state == 0 && (diverged || !shared || wrong);
            tables[state].push(L1Entry { table, copied }.encode());
        }
        if states == 1 {
            let entry = tables[0].last().copied().unwrap_or(0);
            tables[1].push(entry);
        }
    }

    fn put_l1(&mut self, table: &[u64], bytes: u64) -> HostOffset {
        let place = self.take(self.geometry.clusters_for(bytes));
        self.count(place, bytes, 1);
        let mut encoded: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        encoded.resize(index(self.geometry.clusters_for(bytes) * self.cluster()), 0);
        self.put(place.0, &encoded);
        place
    }

    fn put_snapshot(&mut self, header: &mut Header, l1_table: HostOffset) {
        let snapshot = Snapshot {
            id: b"1".to_vec(),
            name: b"before".to_vec(),
            l1_table,
            l1_entries: header.l1_entries,
            date_seconds: 1,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            vm_state_bytes: 0,
            disk_bytes: Some(header.size),
            icount: None,
            unknown_extra: Vec::new(),
        };
        let table = match self.plan.foreign {
            None => encode_table(&[snapshot]).expect("one short snapshot"),
            Some(_) => foreign::snapshot_table(&snapshot, self.cluster()),
        };
        let bytes = table.len() as u64;
        let place = self.take(self.geometry.clusters_for(bytes));
        self.count(place, bytes, 1);
        self.put(
            place.0,
            &vec![0; index(self.geometry.clusters_for(bytes) * self.cluster())],
        );
        self.put(place.0, &table);
        header.snapshot_count = 1;
        header.snapshot_table = place;
    }

    /// Some clusters that are in use count as free, or for less than they are; some that nobody uses, or too few, count as used.
    fn miscount(&mut self) {
        let most = self.geometry.refcount_max();
        for cluster in 1..self.next {
            let counted = self.counts.get(&cluster).copied().unwrap_or(0);
            let wrong = match self.rng.index(12) {
                0 => 0,
                1 => counted / 2,
                2 => (counted + 1).min(most),
                _ => continue,
            };
            self.counts.insert(cluster, wrong);
        }
    }

    /// Refcounts come last and count themselves.
    fn put_refcounts(&mut self, header: &mut Header) {
        let bits = self.geometry.refcount_block_bits();
        let start = self.next;
        let mut blocks: Vec<u64> = Vec::new();
        let mut table_clusters = 1;
        loop {
            let mut wanted: Vec<u64> = self.counts.keys().map(|cluster| cluster >> bits).collect();
            let end = start + blocks.len() as u64 + table_clusters;
            wanted.extend(start >> bits..=(end - 1) >> bits);
            wanted.sort_unstable();
            wanted.dedup();
            let last = wanted.last().copied().unwrap_or(0);
            let need = self.geometry.clusters_for((last + 1) * 8);
            if wanted.len() == blocks.len() && need == table_clusters {
                blocks = wanted;
                break;
            }
            blocks = wanted;
            table_clusters = need;
        }
        self.next = start + table_clusters + blocks.len() as u64;
        for cluster in start..self.next {
            self.counts.insert(cluster, 1);
        }
        if self.plan.miscounted {
            self.miscount();
        }
        let cluster = self.cluster();
        let mut table = vec![0; index(table_clusters * cluster)];
        for (number, block) in (0..).zip(&blocks) {
            let offset = (start + table_clusters + number) * cluster;
            table[index(block * 8)..][..8].copy_from_slice(&offset.to_be_bytes());
            let mut bytes = vec![0; index(cluster)];
            let range = block << bits..(block + 1) << bits;
            for (counted, references) in self.counts.range(range) {
                let at = counted & ((1 << bits) - 1);
                refcount::set(&mut bytes, at, self.geometry.refcount_order(), *references);
            }
            self.put(offset, &bytes);
        }
        self.put(start * cluster, &table);
        header.refcount_table = HostOffset(start * cluster);
        header.refcount_table_clusters = u32::try_from(table_clusters).expect("small");
    }
}

/// A name for a backing file, short enough for clusters of 512 bytes.
#[must_use]
pub fn backing_name(name: &str, format: &str) -> BackingName {
    BackingName {
        name: name.into(),
        format: Some(format.to_owned()),
    }
}

/// The bytes that show these contents.
#[must_use]
pub fn bytes_of(contents: &[Content]) -> Vec<u8> {
    let mut bytes = vec![0; contents.len() * 512];
    for ((lba, content), sector) in (0..).zip(contents).zip(bytes.chunks_exact_mut(512)) {
        match content {
            Content::Version(version) => stamp(sector, lba, *version),
            Content::Cut(version, end) => stamp_until(sector, lba, *version, usize::from(*end)),
            Content::Zero | Content::Foreign => {}
        }
    }
    bytes
}

/// The plan of an empty image.
#[must_use]
pub fn plan(size: u64, cluster_bits: u32, version: u32, refcount_order: u32) -> Plan {
    Plan {
        options: create::CreateOptions {
            cluster_bits,
            version,
            refcount_order,
            compression: Compression::Deflate,
            ..create::CreateOptions::new(size)
        },
        ciphered: false,
        fill: 0,
        compressed: false,
        snapshot: false,
        far: None,
        left_open: false,
        miscounted: false,
        foreign: None,
        first_version: 1,
        backing: None,
    }
}
