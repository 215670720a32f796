//! The configurations that are simulated, by what each group of them is to find.

mod others;
mod sizes;

use urus_format::Compression;

use crate::config::{Backing, Behaviour, Config};
use crate::workload::Load;
use others::{asked, ciphered, foreign, killed, miscounted, rare, swapped, unsupported};
pub use sizes::{TINY, small_sizes};

/// All configurations.
#[must_use]
#[allow(clippy::too_many_lines)]
pub fn all() -> Vec<Config> {
    let c = Config::small;
    let (deflate, zstd) = (Some(Compression::Deflate), Some(Compression::Zstd));
    vec![
        c("plain"),
        Config {
            queues: 2,
            ..c("two queues")
        },
        Config {
            queues: 4,
            ..c("four queues")
        },
        Config {
            queues: 3,
            fill: 200,
            behaviour: Behaviour::Slow,
            ..c("three queues, slow")
        },
        Config {
            fill: 160,
            ..c("half full")
        },
        Config {
            fill: 256,
            queues: 2,
            ..c("full")
        },
        Config {
            discard: false,
            fill: 128,
            ..c("no discard")
        },
        Config {
            punch: false,
            fill: 128,
            ..c("no punch")
        },
        Config {
            behaviour: Behaviour::Eager,
            ..c("eager")
        },
        Config {
            behaviour: Behaviour::Split,
            fill: 128,
            ..c("split")
        },
        Config {
            behaviour: Behaviour::Slow,
            fill: 128,
            ..c("slow")
        },
        Config {
            depth: 32,
            queues: 2,
            ..c("deep")
        },
        Config {
            load: Load::Churn,
            behaviour: Behaviour::Slow,
            queues: 2,
            ..c("churn")
        },
        Config {
            depth: 1,
            fill: 64,
            ..c("one at a time")
        },
        Config {
            refcount_order: 0,
            fill: 96,
            ..c("1-bit refcounts")
        },
        Config {
            refcount_order: 1,
            fill: 96,
            snapshot: true,
            ..c("2-bit, snapshot")
        },
        Config {
            refcount_order: 2,
            fill: 96,
            compressed: deflate,
            ..c("4-bit, compressed")
        },
        Config {
            refcount_order: 3,
            fill: 96,
            ..c("8-bit refcounts")
        },
        Config {
            refcount_order: 5,
            ..c("32-bit refcounts")
        },
        Config {
            refcount_order: 6,
            sectors: 512,
            ..c("64-bit refcounts")
        },
        Config {
            refcount_order: 6,
            far: Some(64 * 63),
            fill: 48,
            ..c("refcount table grows")
        },
        Config {
            refcount_order: 6,
            far: Some(64 * 62),
            fill: 16,
            queues: 2,
            sectors: 512,
            ..c("table grows, two queues")
        },
        Config {
            version: 2,
            ..c("version 2")
        },
        Config {
            version: 2,
            fill: 128,
            compressed: deflate,
            snapshot: true,
            ..c("version 2, snapshot")
        },
        Config {
            version: 2,
            fill: 64,
            backing: Backing::Raw(100),
            ..c("version 2, backed")
        },
        Config {
            snapshot: true,
            fill: 160,
            ..c("snapshot")
        },
        Config {
            snapshot: true,
            fill: 200,
            queues: 3,
            ..c("snapshot, three queues")
        },
        Config {
            snapshot: true,
            fill: 160,
            compressed: zstd,
            backing: Backing::Qcow2(100),
            ..c("snapshot, zstd, backed")
        },
        Config {
            compressed: deflate,
            fill: 200,
            ..c("compressed")
        },
        Config {
            compressed: zstd,
            fill: 200,
            queues: 2,
            ..c("zstd")
        },
        Config {
            compressed: deflate,
            fill: 220,
            cluster_bits: 12,
            sectors: 512,
            ..c("compressed, 4K")
        },
        Config {
            backing: Backing::Raw(100),
            fill: 64,
            ..c("raw backing")
        },
        Config {
            backing: Backing::Raw(60),
            fill: 32,
            queues: 2,
            ..c("short raw backing")
        },
        Config {
            backing: Backing::Qcow2(150),
            fill: 64,
            ..c("longer backing")
        },
        Config {
            backing: Backing::Qcow2(70),
            compressed: deflate,
            cluster_bits: 11,
            sectors: 512,
            ..c("compressed backing, 2K")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            ..c("tiny cache")
        },
        Config {
            cache_bytes: 0,
            sectors: 2048,
            fill: 24,
            queues: 3,
            depth: 16,
            ..c("tiny cache, three queues")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 24,
            queues: 3,
            depth: 16,
            behaviour: Behaviour::Slow,
            load: Load::Scattered,
            ..c("tiny cache, scattered")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 100,
            snapshot: true,
            ..c("tiny cache, snapshot")
        },
        Config {
            cluster_bits: 10,
            sectors: 400,
            fill: 64,
            queues: 2,
            ..c("1K")
        },
        Config {
            cluster_bits: 12,
            sectors: 1000,
            fill: 64,
            ..c("4K, odd size")
        },
        Config {
            cluster_bits: 12,
            sectors: 1024,
            backing: Backing::Qcow2(100),
            queues: 2,
            ..c("4K, backed")
        },
        Config {
            cluster_bits: 13,
            sectors: 1024,
            fill: 64,
            snapshot: true,
            ..c("8K, snapshot")
        },
        Config {
            cluster_bits: 14,
            sectors: 1024,
            fill: 64,
            ..c("16K")
        },
        Config {
            cluster_bits: 16,
            sectors: 1920,
            fill: 64,
            queues: 2,
            ..c("64K")
        },
        Config {
            alignment: 512,
            fill: 64,
            ..c("direct I/O, 512")
        },
        Config {
            alignment: 4096,
            cluster_bits: 12,
            sectors: 512,
            fill: 96,
            queues: 2,
            ..c("direct I/O, 4096")
        },
        Config {
            alignment: 4096,
            cluster_bits: 13,
            sectors: 512,
            fill: 96,
            snapshot: true,
            backing: Backing::Raw(90),
            ..c("direct I/O, 8K, backed")
        },
        Config {
            device: true,
            fill: 64,
            ..c("block device")
        },
        Config {
            device: true,
            fill: 64,
            alignment: 4096,
            cluster_bits: 12,
            sectors: 512,
            queues: 2,
            ..c("block device, direct I/O")
        },
        Config {
            outlives: true,
            fill: 64,
            queues: 2,
            ..c("outlives")
        },
        Config {
            outlives: true,
            fill: 64,
            behaviour: Behaviour::Slow,
            backing: Backing::Raw(100),
            ..c("outlives, backed, slow")
        },
        Config {
            outlives: true,
            cache_bytes: 0,
            sectors: 1600,
            fill: 100,
            snapshot: true,
            queues: 3,
            depth: 16,
            ..c("outlives, tiny cache, snapshot")
        },
        Config {
            raw: true,
            fill: 128,
            queues: 2,
            ..c("raw")
        },
        Config {
            raw: true,
            fill: 128,
            alignment: 4096,
            sectors: 512,
            ..c("raw, direct I/O")
        },
        // An L1 entry for every 64 sectors: its table moves.
        Config {
            grows: 400,
            fill: 64,
            queues: 2,
            ..c("grows")
        },
        Config {
            grows: 500,
            fill: 64,
            behaviour: Behaviour::Slow,
            backing: Backing::Raw(250),
            ..c("grows over a longer backing file")
        },
        Config {
            grows: 300,
            fill: 128,
            cluster_bits: 10,
            sectors: 333,
            snapshot: true,
            backing: Backing::Qcow2(150),
            ..c("grows, snapshot, backed, 1K")
        },
        Config {
            grows: 700,
            cache_bytes: 0,
            sectors: 1600,
            fill: 24,
            queues: 3,
            depth: 16,
            refcount_order: 6,
            ..c("grows, tiny cache, 64-bit refcounts")
        },
        Config {
            grows: 300,
            fill: 64,
            version: 2,
            ..c("grows, version 2")
        },
        Config {
            grows: 300,
            fill: 64,
            queues: 2,
            outlives: true,
            ..c("grows, outlives")
        },
        Config {
            grows: 300,
            raw: true,
            fill: 128,
            queues: 2,
            ..c("grows, raw")
        },
        // What compressed clusters leave behind is freed here, too, and not given back.
        Config {
            discard: false,
            fill: 200,
            compressed: deflate,
            ..c("no discard, compressed")
        },
        Config {
            backing: Backing::Chain(100, 130),
            fill: 48,
            queues: 2,
            ..c("chain")
        },
        Config {
            backing: Backing::Chain(55, 90),
            fill: 32,
            cache_bytes: 0,
            compressed: zstd,
            cluster_bits: 10,
            sectors: 512,
            ..c("chain, short middle, tiny cache")
        },
        Config {
            backing: Backing::Chain(71, 160),
            fill: 32,
            cluster_bits: 12,
            sectors: 512,
            grows: 200,
            ..c("chain, grows")
        },
        Config {
            left_open: true,
            fill: 128,
            queues: 2,
            ..c("left open")
        },
        // Counted to its end: a larger L1 table is put between what is in use.
        Config {
            device: true,
            grows: 400,
            fill: 64,
            queues: 2,
            ..c("block device, grows")
        },
    ]
    .into_iter()
    .chain(asked())
    .chain(swapped())
    .chain(miscounted())
    .chain(unsupported())
    .chain(small_sizes())
    .chain(foreign())
    .chain(ciphered())
    .chain(rare())
    .chain(killed())
    .collect()
}

/// Those in which planted bugs show first (`urus-sim --part plants --by-config`).
const FAST: &[&str] = &[
    "churn, slow, three queues, 24 sectors",
    "slices, churn, 40 sectors",
    "slices, snapshot",
    "slices of 64 bytes, 64-bit refcounts",
    "slices, grows",
    "slices, outlives",
    "slices, chain",
    "small units of L1",
    "table grows, two queues",
    "three queues, slow",
    "grows, snapshot, backed, 1K",
];

/// A round of `cuts`: those that find fastest first, and again with all the others.
#[must_use]
pub fn mix() -> Vec<Config> {
    let all = all();
    let is_fast = |config: &&Config| FAST.contains(&config.name);
    let fast: Vec<Config> = all.iter().filter(is_fast).cloned().collect();
    fast.into_iter().chain(all).collect()
}

/// The configuration with this name or number.
#[must_use]
pub fn find(name: &str) -> Option<Config> {
    let by_number = name.parse::<usize>().ok();
    (0..)
        .zip(all())
        .find(|(number, config)| config.name == name || Some(*number) == by_number)
        .map(|(_, config)| config)
}
