//! P6 and P9: writes over what is allocated, and reads beside them.

use urus::{CacheMode, Format};

use super::super::Mode;
use super::super::client::Target;
use super::super::images::Missing;
use super::super::slices::Plan;
use super::report::Measured;
use super::{Bench, Pages, best_raw, cache_name, ratio_of};

const BLOCK_BYTES: u64 = 4 << 10;
const DEPTH: u32 = 32;

/// P6: 4 KiB at random places.
pub(super) fn beside_best_raw(bench: &mut Bench<'_>, pages: Pages) -> Result<Measured, Missing> {
    let cache = match pages {
        Pages::None => CacheMode::None,
        Pages::Small | Pages::Large => CacheMode::Writeback,
    };
    let [path, raw] = bench.written.written_over()?;
    let image = bench.open(&path, Format::Qcow2, cache, true)?;
    let raw_device = bench.open(&raw, Format::Raw, cache, true)?;
    bench.settle(&[&image, &raw_device], pages, bench.written_size)?;
    // Its lock and its queues are in nobody's way from now on.
    raw_device.close()?;
    let plan = bench.plan(Mode::Randwrite, BLOCK_BYTES, bench.written_size, DEPTH);
    let best = best_raw::choose(bench, &raw, cache, plan)?;
    let pairs = bench.pairs(plan, [Target::Device(&image), Target::Raw(&best)])?;
    image.close()?;
    Ok(ratio_of(
        format!("qcow2, {}", cache_name(cache)),
        format!("raw, {}, {}", cache_name(cache), best.method.name()),
        &pairs,
    ))
}

/// P9: reads while another queue writes over the same disk and flushes.
pub(super) fn beside_writer(bench: &mut Bench<'_>, cache: CacheMode) -> Result<Measured, Missing> {
    let [path, raw] = bench.written.written_over()?;
    let image = bench.open(&path, Format::Qcow2, cache, true)?;
    let raw = bench.open(&raw, Format::Raw, cache, true)?;
    let pages = match cache {
        CacheMode::Writeback => Pages::Small,
        _ => Pages::None,
    };
    bench.settle(&[&image, &raw], pages, bench.written_size)?;
    let plan = Plan {
        writer: true,
        ..bench.plan(Mode::Randread, BLOCK_BYTES, bench.written_size, DEPTH)
    };
    let pairs = bench.pairs(plan, [Target::Device(&image), Target::Device(&raw)])?;
    image.close()?;
    raw.close()?;
    Ok(ratio_of(
        format!("qcow2, {}", cache_name(cache)),
        format!("raw, {}, same driver and writer", cache_name(cache)),
        &pairs,
    ))
}
