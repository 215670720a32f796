//! What other programs have written, or write meanwhile; what a block status says; file systems that cannot do everything.

use urus_format::Compression;

use crate::config::{Backing, Behaviour, Config};
use crate::configurations::TINY;
use crate::foreign::Foreign;
use crate::workload::Load;

/// The image's data passes a cipher: no zero of the file is a zero of the disk, and no byte goes past it.
pub(super) fn ciphered() -> Vec<Config> {
    let c = |name| Config {
        ciphered: true,
        fill: 128,
        queues: 2,
        ..Config::small(name)
    };
    vec![
        Config {
            cluster_bits: 10,
            ..c("ciphered")
        },
        Config {
            compressed: Some(Compression::Deflate),
            snapshot: true,
            backing: Backing::Qcow2(80),
            fill: 96,
            ..c("ciphered, compressed, snapshot, backed")
        },
        Config {
            alignment: 4096,
            cluster_bits: 13,
            sectors: 1024,
            backing: Backing::Raw(60),
            ..c("ciphered, direct I/O, 4096, backed")
        },
        Config {
            cluster_bits: 12,
            sectors: 777,
            grows: 300,
            load: Load::Churn,
            sizes: TINY,
            ..c("ciphered, small steps, churn, grows")
        },
    ]
}

/// What a block status says: much is asked of images that hold all kinds of clusters.
pub(super) fn asked() -> Vec<Config> {
    let c = |name| Config {
        load: Load::Asked,
        fill: 128,
        queues: 2,
        ..Config::small(name)
    };
    let (deflate, zstd) = (Some(Compression::Deflate), Some(Compression::Zstd));
    vec![
        Config {
            compressed: deflate,
            snapshot: true,
            ..c("asked")
        },
        Config {
            backing: Backing::Raw(60),
            fill: 64,
            ..c("asked, short raw backing")
        },
        Config {
            backing: Backing::Qcow2(70),
            version: 2,
            fill: 48,
            ..c("asked, version 2, backed")
        },
        Config {
            backing: Backing::Chain(71, 130),
            fill: 48,
            compressed: zstd,
            cluster_bits: 11,
            sectors: 512,
            ..c("asked, chain")
        },
        Config {
            backing: Backing::Qcow2(80),
            fill: 32,
            cache_bytes: 0,
            sectors: 1600,
            grows: 300,
            ..c("asked, tiny cache, grows")
        },
        Config {
            raw: true,
            ..c("asked, raw")
        },
    ]
}

/// Another process puts another image in the place of this one while the device is paused.
pub(super) fn swapped() -> Vec<Config> {
    let c = |name| Config {
        swaps: true,
        fill: 128,
        queues: 2,
        ..Config::small(name)
    };
    let (deflate, zstd) = (Some(Compression::Deflate), Some(Compression::Zstd));
    vec![
        Config {
            compressed: deflate,
            ..c("swapped")
        },
        Config {
            compressed: zstd,
            snapshot: true,
            fill: 200,
            backing: Backing::Raw(80),
            ..c("swapped, snapshot, zstd, backed")
        },
        // Reads of parts of clusters, which are decoded for later.
        Config {
            compressed: deflate,
            fill: 220,
            cluster_bits: 12,
            sectors: 512,
            load: Load::Scattered,
            ..c("swapped, compressed, 4K")
        },
        Config {
            backing: Backing::Chain(71, 130),
            compressed: deflate,
            fill: 64,
            cluster_bits: 10,
            sectors: 512,
            ..c("swapped, chain")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 64,
            refcount_order: 6,
            grows: 400,
            queues: 3,
            ..c("swapped, tiny cache, grows")
        },
        Config {
            left_open: true,
            miscounted: true,
            ..c("swapped, miscounted")
        },
        Config {
            device: true,
            fill: 64,
            ..c("swapped, block device")
        },
    ]
}

/// The process is killed, and another goes on with what it wrote, which need not be durable yet.
pub(super) fn killed() -> Vec<Config> {
    let c = |name| Config {
        dies: true,
        fill: 128,
        queues: 2,
        ..Config::small(name)
    };
    vec![
        c("killed"),
        Config {
            load: Load::Churn,
            behaviour: Behaviour::Slow,
            sectors: 64,
            queues: 3,
            ..c("killed, churn, slow, 64 sectors")
        },
        Config {
            compressed: Some(Compression::Deflate),
            snapshot: true,
            backing: Backing::Raw(80),
            ..c("killed, snapshot, compressed, backed")
        },
        Config {
            outlives: true,
            grows: 300,
            cluster_bits: 10,
            ..c("killed, outlives, grows")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 64,
            refcount_order: 6,
            ..c("killed, tiny cache, 64-bit refcounts")
        },
    ]
}

/// What few of the other workloads meet.
pub(super) fn rare() -> Vec<Config> {
    let c = Config::small;
    vec![
        Config {
            raw: true,
            fill: 128,
            alignment: 4096,
            sectors: 320,
            queues: 3,
            sizes: TINY,
            ..c("raw, direct I/O, small locks")
        },
        // Only the ends of write-zeroes need a block to be read first.
        Config {
            fill: 256,
            alignment: 4096,
            cluster_bits: 13,
            sectors: 512,
            queues: 3,
            load: Load::Ends,
            behaviour: Behaviour::Slow,
            ..c("direct I/O, 4096, ends of zeroes")
        },
        Config {
            raw: true,
            fill: 256,
            alignment: 4096,
            sectors: 512,
            queues: 3,
            load: Load::Ends,
            behaviour: Behaviour::Slow,
            ..c("raw, direct I/O, ends of zeroes")
        },
        // What grows shows the end of the middle layer, whose own backing file is long over.
        Config {
            backing: Backing::Chain(160, 40),
            fill: 32,
            grows: 400,
            queues: 2,
            ..c("chain, grows, short bottom")
        },
        // The larger table needs several clusters side by side, among clusters in use and free ones.
        Config {
            device: true,
            sectors: 3900,
            grows: 9000,
            fill: 24,
            queues: 2,
            load: Load::Scattered,
            ..c("block device, grows, several clusters of L1")
        },
    ]
}

/// A file system that cannot do what its files were said to be able to, or not always.
pub(super) fn unsupported() -> Vec<Config> {
    let c = |name| Config {
        unsupported: 256,
        fill: 128,
        cluster_bits: 10,
        ..Config::small(name)
    };
    vec![
        c("nothing supported"),
        Config {
            unsupported: 100,
            load: Load::Churn,
            queues: 2,
            cluster_bits: 11,
            ..c("sometimes supported, churn")
        },
        Config {
            raw: true,
            ..c("raw, nothing supported")
        },
    ]
}

/// Whoever wrote the image before did not keep its refcounts, and was stopped: it is repaired when it opens.
pub(super) fn miscounted() -> Vec<Config> {
    let c = |name| Config {
        left_open: true,
        miscounted: true,
        fill: 128,
        ..Config::small(name)
    };
    let deflate = Some(Compression::Deflate);
    vec![
        c("miscounted"),
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 64,
            refcount_order: 6,
            queues: 3,
            load: Load::Churn,
            ..c("miscounted, tiny cache, 64-bit refcounts")
        },
        Config {
            compressed: deflate,
            snapshot: true,
            fill: 160,
            ..c("miscounted, compressed, snapshot")
        },
        Config {
            refcount_order: 0,
            fill: 96,
            ..c("miscounted, 1-bit refcounts")
        },
    ]
}

/// Headers of other programs: every byte but the changed fields has to stay (O28).
pub(super) fn foreign() -> Vec<Config> {
    let c = Config::small;
    vec![
        Config {
            foreign: Some(Foreign::NameFurtherBack),
            backing: Backing::Raw(100),
            grows: 400,
            fill: 64,
            queues: 2,
            ..c("foreign, name further back, grows")
        },
        Config {
            foreign: Some(Foreign::NoEndMarker),
            version: 2,
            backing: Backing::Qcow2(100),
            grows: 300,
            fill: 64,
            ..c("foreign, no end marker, version 2, grows")
        },
        Config {
            foreign: Some(Foreign::UnknownFirst),
            left_open: true,
            backing: Backing::Raw(100),
            grows: 300,
            fill: 128,
            ..c("foreign, unknown extension, left open, grows")
        },
        Config {
            foreign: Some(Foreign::LongName),
            cluster_bits: 10,
            sectors: 333,
            snapshot: true,
            backing: Backing::Qcow2(150),
            grows: 300,
            fill: 128,
            ..c("foreign, long name, snapshot, 1K, grows")
        },
        Config {
            foreign: Some(Foreign::NameFurtherBack),
            refcount_order: 6,
            far: Some(64 * 63),
            backing: Backing::Raw(100),
            grows: 300,
            fill: 48,
            ..c("foreign, refcount table grows")
        },
        Config {
            foreign: Some(Foreign::NoEndMarker),
            snapshot: true,
            backing: Backing::Raw(70),
            fill: 160,
            ..c("foreign, snapshot")
        },
        Config {
            foreign: Some(Foreign::UnknownFirst),
            alignment: 4096,
            cluster_bits: 12,
            sectors: 512,
            backing: Backing::Raw(90),
            grows: 12_000,
            fill: 64,
            ..c("foreign, direct I/O, 4096, grows")
        },
    ]
}
