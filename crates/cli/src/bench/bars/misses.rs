//! Reads whose mapping is not in the cache, beside `qemu-img bench` with a cache of the same size.

use urus::{CacheMode, Format, OpenOptions};

use super::super::Mode;
use super::super::images::{Kind, Missing};
use super::report::Measured;
use super::{Bench, Pages, qemu_reads, ratio_of};

const BLOCK_BYTES: u64 = 4 << 10;
const DEPTH: u32 = 32;
/// With clusters of 64 KiB, 8 bytes of the map stand for 64 KiB of the disk: an eighth of them is cached.
const MAP_BYTES_PER_CACHE: u64 = 8;
/// Each of eight reads has seven misses: QEMU falls most there.
pub(super) const BAR: f64 = 5.0;

/// Random reads all over.
pub(super) fn random(bench: &mut Bench<'_>, cache: CacheMode) -> Result<Measured, Missing> {
    let path = bench.images.get(Kind::Qcow2)?;
    let cache_bytes = bench.size / (64 << 10) * 8 / MAP_BYTES_PER_CACHE;
    let image = OpenOptions::new()
        .format(Format::Qcow2)
        .cache(cache)
        .io(bench.args.io.into())
        .queue_depth(bench.args.depth.max(DEPTH))
        .l2_cache_bytes(cache_bytes)
        .read_only(true)
        .open(&path)
        .map_err(crate::failure::Failure::from)?;
    let (pages, direct) = match cache {
        CacheMode::Writeback => (Pages::Large, ""),
        _ => (Pages::None, ",file.file.cache.direct=on"),
    };
    bench.settle(&[&image], pages, bench.size)?;
    let plan = bench.plan(Mode::Randread, BLOCK_BYTES, bench.size, DEPTH);
    let options = format!(",file.l2-cache-size={cache_bytes}{direct}");
    let pairs = qemu_reads::pairs(bench, plan, &image, &path, &options)?;
    Ok(ratio_of(
        "qcow2, an eighth of its map cached",
        "qemu-img bench, likewise",
        &pairs,
    ))
}
