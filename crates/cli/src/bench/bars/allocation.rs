//! P7 and P8: writes that change the mapping. The writes themselves are those of the suite `writes`.

use urus::CacheMode;

use super::super::images::{Kind, Missing};
use super::super::raw_writes;
use super::super::report::Pair;
use super::super::writes::{self, STRIDE_BYTES, Test, in_turn};
use super::report::Measured;
use super::{Bench, ratio_of};

/// Writes of one run: fewer than in the suite `writes`, which has more time.
const WRITES_MAX: u64 = 4096;

fn count(bench: &Bench<'_>) -> u64 {
    (bench.written_size / STRIDE_BYTES).min(WRITES_MAX)
}

fn whole(pairs: Option<Vec<Pair>>) -> Result<Vec<Pair>, Missing> {
    Ok(pairs.ok_or_else(super::interruption)?)
}

/// Beside QEMU.
pub(super) fn beside_qemu(bench: &mut Bench<'_>, test: Test) -> Result<Measured, Missing> {
    let writes = count(bench);
    let pairs = writes::pairs(bench.args, test, &bench.written, writes, bench.stop)?;
    Ok(ratio_of(
        "qcow2",
        "qemu-img bench, io_uring",
        &whole(pairs)?,
    ))
}

/// Beside what a raw file takes, which has no mapping to make durable but the file system's.
pub(super) fn beside_raw(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let (writes, args, images) = (count(bench), bench.args, &bench.written);
    let cache = CacheMode::Writeback;
    let urus = || {
        Ok(writes::by_urus(
            args,
            cache,
            &images.fresh(None)?,
            writes,
            1,
        )?)
    };
    let raw = || Ok(raw_writes::into_holes(args, images.dir(), writes)?);
    let pairs = in_turn(args.pairs, bench.stop, urus, raw)?;
    Ok(ratio_of(
        "qcow2",
        "sparse raw file, pwrite, two fdatasyncs a flush",
        &whole(pairs)?,
    ))
}

/// Copying on write beside the copying alone.
pub(super) fn beside_raw_copies(
    bench: &mut Bench<'_>,
    cache: CacheMode,
) -> Result<Measured, Missing> {
    let (writes, args, images) = (count(bench), bench.args, &bench.written);
    let from = images.get(Kind::Qcow2)?;
    let urus = || {
        let overlay = images.fresh(Some(Kind::Qcow2))?;
        Ok(writes::by_urus(args, cache, &overlay, writes, 1)?)
    };
    let raw = || {
        Ok(raw_writes::copies(
            args,
            &from,
            images.dir(),
            cache,
            writes,
        )?)
    };
    let pairs = in_turn(args.pairs, bench.stop, urus, raw)?;
    Ok(ratio_of(
        "qcow2 overlay",
        "clusters read from one file and written to another, two fdatasyncs a flush",
        &whole(pairs)?,
    ))
}

/// The same writes on two queues.
pub(super) fn two_queues(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let (writes, args, images) = (count(bench), bench.args, &bench.written);
    let run = |queues| {
        let path = images.fresh(None)?;
        Ok(writes::by_urus(
            args,
            CacheMode::Writeback,
            &path,
            writes,
            queues,
        )?)
    };
    let pairs = in_turn(args.pairs, bench.stop, || run(2), || run(1))?;
    Ok(ratio_of(
        "qcow2, two queues",
        "qcow2, one queue",
        &whole(pairs)?,
    ))
}
