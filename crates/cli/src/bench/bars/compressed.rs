//! P10: compressed clusters, beside `qemu-img bench`.

use urus::{CacheMode, Format};

use super::super::images::{Kind, Missing};
use super::super::report::{Pair, Slice};
use super::super::slices::Plan;
use super::super::{Mode, report};
use super::report::Measured;
use super::{Bench, Pages, qemu_reads, ratio_of};

const BLOCK_BYTES: u64 = 4 << 10;
const LARGE_BLOCK_BYTES: u64 = 1 << 20;
const WINDOW_BYTES: u64 = 64 << 20;
const DEPTH: u32 = 32;
const LARGE_DEPTH: u32 = 4;

/// Random reads of a window that fits the cache of decoded clusters.
pub(super) fn window(bench: &mut Bench<'_>, kind: Kind) -> Result<Measured, Missing> {
    let plan = bench.plan(
        Mode::Randread,
        BLOCK_BYTES,
        WINDOW_BYTES.min(bench.size),
        DEPTH,
    );
    let pairs = pairs(bench, kind, plan)?;
    Ok(ratio_of("qcow2", "qemu-img bench", &pairs))
}

/// Random reads all over.
pub(super) fn uniform(bench: &mut Bench<'_>, kind: Kind, queues: u16) -> Result<Measured, Missing> {
    let plan = Plan {
        queues,
        ..bench.plan(Mode::Randread, BLOCK_BYTES, bench.size, DEPTH)
    };
    let pairs = pairs(bench, kind, plan)?;
    Ok(ratio_of("qcow2", "qemu-img bench", &pairs))
}

/// Large reads: what a second of CPU time brings.
pub(super) fn sequential(bench: &mut Bench<'_>, kind: Kind) -> Result<Measured, Missing> {
    let plan = bench.plan(Mode::Read, LARGE_BLOCK_BYTES, bench.size, LARGE_DEPTH);
    let pairs = pairs(bench, kind, plan)?;
    let per_cpu_second = |slice: &Slice| 1.0 / slice.cpu_microseconds().max(1e-9);
    let value = report::ratios(&pairs, per_cpu_second);
    let control = "qemu-img bench; per second of CPU".to_owned();
    let mut measured = Measured::with_figures("qcow2".to_owned(), control, &pairs, value);
    measured.unit = "ratio";
    Ok(measured)
}

fn pairs(bench: &mut Bench<'_>, kind: Kind, plan: Plan) -> Result<Vec<Pair>, Missing> {
    let path = bench.images.get(kind)?;
    let image = bench.open(&path, Format::Qcow2, CacheMode::Writeback, false)?;
    bench.settle(&[&image], Pages::Large, bench.size)?;
    qemu_reads::pairs(bench, plan, &image, &path, "")
}
