//! Images that are large for the engine, whose sizes are made small, and images that end at odd places.

use urus_engine::limits::Sizes;
use urus_format::Compression;

use crate::config::{Backing, Behaviour, Config};
use crate::workload::Load;

/// Those in which an image is as large for the engine as any, and those that end where nobody expects it.
#[must_use]
pub fn small_sizes() -> Vec<Config> {
    large_in_small().into_iter().chain(odd_sizes()).collect()
}

/// Every size of the engine so small that a small disk is as large for it as any.
pub const TINY: Sizes = Sizes {
    slice_bytes: 128,
    refcount_slice_bytes: 128,
    min_frames: 8,
    near_tables: 2,
    scan_slices: 3,
    run_clusters: 6,
    run_bytes: 1 << 20,
    grow_bytes_min: 2048,
    grow_bytes_max: 8192,
    pending_frees: 6,
    decoded_bytes: 1536,
    zero_step_clusters: 5,
    write_step_clusters: 4,
    zero_buffer_bytes: 1024,
    zero_range_from_bytes: 512,
    status_extents: 3,
    skips: 8,
    table_unit_bytes: 64,
    dirty_slices: 12,
    pending_changes: 16,
    parts_at_once: 3,
    commit_window_bytes: 4096,
    joined_bytes: 256,
    settle_step_clusters: 3,
    raw_lock_bits: 12,
};

/// What only large images have: tables of many slices, L1 tables of many sectors, refcount blocks larger than their cache, caches that have
/// grown past their bound.
fn large_in_small() -> Vec<Config> {
    let c = |name| Config {
        sizes: TINY,
        cache_bytes: 8192,
        refcount_slices: Some(3),
        ..Config::small(name)
    };
    let slices = |bytes, refcounts| Sizes {
        slice_bytes: bytes,
        refcount_slice_bytes: refcounts,
        ..Sizes::default()
    };
    vec![
        // What found fastest when bugs were planted by hand.
        Config {
            load: Load::Churn,
            behaviour: Behaviour::Slow,
            queues: 3,
            sectors: 24,
            ..Config::small("churn, slow, three queues, 24 sectors")
        },
        Config {
            load: Load::Churn,
            behaviour: Behaviour::Slow,
            queues: 3,
            sectors: 40,
            sizes: slices(64, 64),
            ..c("slices, churn, 40 sectors")
        },
        Config {
            fill: 96,
            queues: 2,
            sizes: slices(128, 128),
            ..c("slices")
        },
        Config {
            fill: 64,
            queues: 3,
            depth: 16,
            sectors: 640,
            cache_bytes: 0,
            refcount_slices: Some(1),
            behaviour: Behaviour::Slow,
            load: Load::Scattered,
            ..c("slices, tiny cache, scattered")
        },
        Config {
            fill: 160,
            snapshot: true,
            queues: 2,
            cache_bytes: 0,
            ..c("slices, snapshot")
        },
        Config {
            fill: 100,
            queues: 2,
            refcount_order: 6,
            refcount_slices: Some(1),
            far: Some(64 * 8 - 12),
            sectors: 640,
            sizes: Sizes {
                slice_bytes: 64,
                refcount_slice_bytes: 64,
                ..TINY
            },
            ..c("slices of 64 bytes, 64-bit refcounts")
        },
        // Each write reserves, and each frees: so the allocator, the settler and commits want slices of refcounts at once.
        Config {
            fill: 200,
            queues: 3,
            refcount_order: 6,
            refcount_slices: Some(1),
            sectors: 96,
            sizes: Sizes {
                run_clusters: 1,
                pending_frees: 3,
                ..slices(512, 64)
            },
            behaviour: Behaviour::Slow,
            load: Load::Churn,
            ..c("refcount blocks larger than their cache")
        },
        Config {
            fill: 128,
            queues: 3,
            depth: 16,
            refcount_order: 6,
            refcount_slices: Some(1),
            sectors: 256,
            sizes: Sizes {
                run_clusters: 1,
                pending_frees: 2,
                ..slices(512, 64)
            },
            behaviour: Behaviour::Slow,
            load: Load::Scattered,
            ..c("refcount blocks larger than their cache, scattered")
        },
        Config {
            fill: 6,
            queues: 2,
            sectors: 1280,
            load: Load::Scattered,
            cache_bytes: 1 << 20,
            sizes: Sizes {
                table_unit_bytes: 64,
                ..slices(128, 4096)
            },
            ..c("small units of L1")
        },
        Config {
            fill: 3,
            queues: 2,
            sectors: 66 * 64,
            load: Load::Scattered,
            ..Config::small("two sectors of L1")
        },
        Config {
            fill: 12,
            sectors: 65 * 64 + 10,
            grows: 300,
            cache_bytes: 0,
            sizes: slices(128, 128),
            ..c("grows beyond a sector of L1")
        },
        Config {
            fill: 64,
            queues: 2,
            grows: 300,
            ..c("slices, grows")
        },
        Config {
            fill: 64,
            queues: 2,
            outlives: true,
            ..c("slices, outlives")
        },
        Config {
            fill: 220,
            queues: 2,
            compressed: Some(Compression::Zstd),
            ..c("small steps, compressed")
        },
        Config {
            fill: 128,
            cluster_bits: 12,
            sectors: 1024,
            queues: 2,
            sizes: Sizes {
                slice_bytes: 512,
                refcount_slice_bytes: 512,
                run_bytes: 16 << 10,
                ..TINY
            },
            alignment: 512,
            ..c("slices, 4K, direct I/O")
        },
        Config {
            fill: 48,
            queues: 2,
            cache_bytes: 0,
            backing: Backing::Chain(100, 70),
            ..c("slices, chain")
        },
        Config {
            fill: 64,
            queues: 2,
            device: true,
            discard: false,
            ..c("slices, block device")
        },
        Config {
            fill: 96,
            version: 2,
            snapshot: true,
            compressed: Some(Compression::Deflate),
            refcount_slices: Some(1),
            ..c("slices, version 2")
        },
    ]
}

/// Disks and raw files that end where nobody expects it: just before or behind the border of a slice, a table, a cluster or a sector.
fn odd_sizes() -> Vec<Config> {
    let c = |name| Config {
        around: true,
        ..Config::small(name)
    };
    let slices = Sizes {
        slice_bytes: 128,
        refcount_slice_bytes: 128,
        ..Sizes::default()
    };
    vec![
        Config {
            fill: 96,
            queues: 2,
            sizes: slices,
            ..c("ends at borders")
        },
        Config {
            fill: 96,
            cluster_bits: 10,
            sectors: 256,
            queues: 2,
            sizes: slices,
            backing: Backing::Qcow2(130),
            ..c("ends at borders, 1K, backed")
        },
        Config {
            fill: 96,
            cluster_bits: 12,
            sectors: 384,
            sizes: Sizes {
                slice_bytes: 64,
                ..slices
            },
            snapshot: true,
            ..c("ends at borders, 4K, snapshot")
        },
        Config {
            fill: 64,
            cluster_bits: 12,
            sectors: 512,
            alignment: 512,
            sizes: Sizes {
                slice_bytes: 512,
                ..slices
            },
            backing: Backing::Raw(73),
            odd: 488,
            ..c("ends in a cluster, odd raw backing, direct I/O")
        },
        Config {
            fill: 48,
            cluster_bits: 11,
            backing: Backing::Raw(90),
            odd: 100,
            queues: 2,
            sizes: slices,
            ..c("ends in a cluster, odd raw backing")
        },
        Config {
            fill: 64,
            cluster_bits: 12,
            compressed: Some(Compression::Deflate),
            version: 2,
            sizes: slices,
            ..c("ends in a cluster, version 2")
        },
        Config {
            fill: 128,
            raw: true,
            odd: 300,
            queues: 2,
            ..Config::small("raw, odd")
        },
        Config {
            fill: 128,
            raw: true,
            odd: 300,
            alignment: 512,
            ..Config::small("raw, odd, direct I/O")
        },
        Config {
            fill: 64,
            cluster_bits: 12,
            sectors: 335,
            grows: 150,
            backing: Backing::Raw(80),
            odd: 24,
            sizes: slices,
            ..Config::small("grows in a cluster over odd raw backing")
        },
    ]
}
