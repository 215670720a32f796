//! P1 to P5: reads, beside raw files, beside fio, and through backing files.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use urus::{CacheMode, Format};

use super::super::Mode;
use super::super::client::Target;
use super::super::images::{Kind, Missing};
use super::super::latency::Percentiles;
use super::super::report::Slice;
use super::super::slices::{Plan, Side, Slices};
use super::super::spread::Spread;
use super::super::writes::in_turn;
use super::report::Measured;
use super::{Bench, Pages, best_raw, cache_name, ratio_of};
use crate::failure::Failure;

/// How it is read.
#[derive(Clone, Copy)]
pub(super) struct Access {
    mode: Mode,
    block_bytes: u64,
    depth: u32,
}

pub(super) const RANDOM: Access = Access {
    mode: Mode::Randread,
    block_bytes: 4 << 10,
    depth: 32,
};
pub(super) const SEQUENTIAL: Access = Access {
    mode: Mode::Read,
    block_bytes: 1 << 20,
    depth: 4,
};

fn plan(bench: &Bench<'_>, access: Access) -> Plan {
    bench.plan(access.mode, access.block_bytes, bench.size, access.depth)
}

/// The image beside the raw file, through the same driver.
pub(super) fn beside_raw(
    bench: &mut Bench<'_>,
    cache: CacheMode,
    access: Access,
) -> Result<Measured, Missing> {
    let (path, raw) = (bench.images.get(Kind::Qcow2)?, bench.images.raw()?);
    let image = bench.open(&path, Format::Qcow2, cache, false)?;
    let raw = bench.open(&raw, Format::Raw, cache, false)?;
    bench.settle(&[&image, &raw], Pages::of(cache), bench.size)?;
    let plan = plan(bench, access);
    let pairs = bench.pairs(plan, [Target::Device(&image), Target::Device(&raw)])?;
    Ok(ratio_of(
        format!("qcow2, {}", cache_name(cache)),
        format!("raw, {}, {}", cache_name(cache), raw.driver()),
        &pairs,
    ))
}

/// P3: both from the page cache.
pub(super) fn beside_best_raw(bench: &mut Bench<'_>, depth: u32) -> Result<Measured, Missing> {
    let (path, raw) = (bench.images.get(Kind::Qcow2)?, bench.images.raw()?);
    let cache = CacheMode::Writeback;
    let image = bench.open(&path, Format::Qcow2, cache, false)?;
    let raw_device = bench.open(&raw, Format::Raw, cache, false)?;
    bench.settle(&[&image, &raw_device], Pages::of(cache), bench.size)?;
    let plan = plan(bench, Access { depth, ..RANDOM });
    let best = best_raw::choose(bench, &raw, cache, plan)?;
    let pairs = bench.pairs(plan, [Target::Device(&image), Target::Raw(&best)])?;
    Ok(ratio_of(
        "qcow2, page cache",
        format!("raw, {}", best.method.name()),
        &pairs,
    ))
}

/// P4: how much more two queues do than one, beside how much more they do on the raw file.
pub(super) fn second_queue(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let (path, raw) = (bench.images.get(Kind::Qcow2)?, bench.images.raw()?);
    let cache = CacheMode::Writeback;
    let image = bench.open(&path, Format::Qcow2, cache, false)?;
    let raw_device = bench.open(&raw, Format::Raw, cache, false)?;
    bench.settle(&[&image, &raw_device], Pages::of(cache), bench.size)?;
    let plan = plan(bench, RANDOM);
    let best = best_raw::choose(bench, &raw, cache, plan)?;
    let plan = Plan { queues: 2, ..plan };
    let (mut gains, mut pairs) = (Vec::new(), Vec::new());
    Slices::with(
        plan,
        &[Target::Device(&image), Target::Raw(&best)],
        |slices| {
            // One that does not count: rings, threads, processor clocks.
            slices.pair(0, Side::Control)?;
            for number in 1..=bench.args.pairs {
                bench.check_stop()?;
                let first = Side::first(number);
                let one = slices.pair_of(number.into(), first, 1)?;
                let two = slices.pair_of(number.into(), first, 2)?;
                let subject = two.subject.iops / one.subject.iops;
                gains.push(subject / (two.control.iops / one.control.iops));
                pairs.push(two);
            }
            Ok(())
        },
    )?;
    let mut measured = Measured::with_figures(
        "qcow2, page cache, two queues over one".to_owned(),
        format!("raw, {}, likewise", best.method.name()),
        &pairs,
        Spread::of(gains.into_iter()),
    );
    measured.unit = "ratio";
    Ok(measured)
}

/// What lies below.
#[derive(Clone, Copy)]
pub(super) enum Backing {
    Kind(Kind),
    Chain,
}

/// P5: with backing files beside the same content without.
pub(super) fn beside_flat(
    bench: &mut Bench<'_>,
    cache: CacheMode,
    backing: Backing,
) -> Result<Measured, Missing> {
    let path = match backing {
        Backing::Kind(kind) => bench.images.get(kind)?,
        Backing::Chain => bench.images.chain(10)?,
    };
    let flat = bench.images.get(Kind::Qcow2)?;
    let image = bench.open(&path, Format::Qcow2, cache, false)?;
    let flat = bench.open(&flat, Format::Qcow2, cache, false)?;
    bench.settle(&[&image, &flat], Pages::of(cache), bench.size)?;
    let plan = plan(bench, RANDOM);
    let pairs = bench.pairs(plan, [Target::Device(&image), Target::Device(&flat)])?;
    Ok(ratio_of(
        format!(
            "qcow2 of {} layers, {}",
            image.layers().len(),
            cache_name(cache)
        ),
        format!("qcow2 without backing, {}", cache_name(cache)),
        &pairs,
    ))
}

/// P1: beside fio on the raw file.
pub(super) fn beside_fio(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let (path, raw) = (bench.images.get(Kind::Qcow2)?, bench.images.raw()?);
    let cache = CacheMode::None;
    let image = bench.open(&path, Format::Qcow2, cache, false)?;
    let raw_device = bench.open(&raw, Format::Raw, cache, false)?;
    bench.settle(&[&image, &raw_device], Pages::of(cache), bench.size)?;
    drop(raw_device);
    let plan = plan(bench, RANDOM);
    let (pairs, stop) = (bench.args.pairs, &mut *bench.stop);
    // What stands against fio comes as its own kind of error through the slices'.
    let outcome = Slices::with(plan, &[Target::Device(&image)], |slices| {
        let mut seed = 0;
        let urus = || {
            seed += 1;
            Ok(slices.slice(0, seed, 1)?)
        };
        Ok(in_turn(pairs, stop, urus, || fio(&raw, plan)))
    })?;
    let pairs = outcome?.ok_or_else(super::interruption)?;
    Ok(ratio_of(
        "qcow2, O_DIRECT",
        "fio io_uring, raw, O_DIRECT",
        &pairs,
    ))
}

/// One slice by fio.
fn fio(raw: &Path, plan: Plan) -> Result<Slice, Missing> {
    let output = Command::new("fio")
        .args(["--name=raw", "--rw=randread", "--ioengine=io_uring"])
        .args([
            "--direct=1",
            "--readonly",
            "--time_based",
            "--output-format=json",
        ])
        .arg(format!("--bs={}", plan.block_bytes))
        .arg(format!("--iodepth={}", plan.depth))
        .arg(format!("--size={}", plan.span))
        .arg(format!("--runtime={}ms", plan.slice.as_millis().max(1)))
        .arg(format!("--filename={}", raw.display()))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Missing::Program(format!("fio cannot be run: {error}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let result = fio_slice(&text).filter(|_| output.status.success());
    result.ok_or_else(|| {
        let errors = String::from_utf8_lossy(&output.stderr);
        Failure::new(format!("fio: {text}{}", errors.trim())).into()
    })
}

/// From fio's JSON, which may come after warnings.
fn fio_slice(text: &str) -> Option<Slice> {
    let json = text.get(text.find('{')?..)?;
    let report: Value = serde_json::from_str(json).ok()?;
    let job = report.get("jobs")?.get(0)?;
    let read = job.get("read")?;
    let percentile = |name: &str| {
        let value = read.pointer(&format!("/clat_ns/percentile/{name}"));
        value.and_then(Value::as_f64).unwrap_or_default() / 1e3
    };
    let milliseconds = job.get("job_runtime")?.as_f64()?;
    let percent = job.get("usr_cpu")?.as_f64()? + job.get("sys_cpu")?.as_f64()?;
    Some(Slice {
        operations: read.get("total_ios")?.as_u64()?,
        iops: read.get("iops")?.as_f64()?,
        cpu: Duration::try_from_secs_f64(milliseconds / 1e3 * percent / 100.0).ok()?,
        latency: Percentiles {
            p50: percentile("50.000000"),
            p99: percentile("99.000000"),
            p999: percentile("99.900000"),
        },
    })
}

#[cfg(test)]
mod tests {
    //! Guards what is read of fio's report.
    use super::*;

    #[test]
    fn fio_tells_rate_cpu_time_and_latencies() {
        let text = r#"fio: a warning
{"jobs": [{"job_runtime": 500, "usr_cpu": 10.0, "sys_cpu": 30.0, "read": {"total_ios": 1000,
 "iops": 2000.0, "clat_ns": {"percentile": {"50.000000": 1500, "99.000000": 2500, "99.900000": 3500}}}}]}"#;
        let slice = fio_slice(text).expect("a report");
        assert_eq!((slice.operations, slice.iops), (1000, 2000.0));
        assert_eq!(slice.cpu, Duration::from_millis(200));
        assert_eq!((slice.latency.p50, slice.latency.p99), (1.5, 2.5));
        assert!(fio_slice("fio: nothing").is_none());
    }
}
