//! P14: look-ups, as far as they can be seen from outside the engine.
//!
//! A read of a cluster of zeroes is answered in place, without I/O, after a look-up of its L2 entry; one below an L1 entry of zero is
//! answered alike without that. What the first takes more is the look-up.

use urus::{CacheMode, Device, Format};

use super::super::Mode;
use super::super::client::Target;
use super::super::images::Missing;
use super::super::slices::Plan;
use super::super::spread::Spread;
use super::report::Measured;
use super::{Bench, control, ratio_of};

/// A sector: filling it takes little.
const BLOCK_BYTES: u64 = 512;
const DEPTH: u32 = 32;

fn plan(bench: &Bench<'_>) -> Plan {
    bench.plan(Mode::Randread, BLOCK_BYTES, bench.size, DEPTH)
}

/// An image of zeroes with a mapping, all of it cached.
fn zeroed(bench: &Bench<'_>) -> Result<Device, Missing> {
    let path = bench.images.zeroed()?;
    open_warm(bench, &path)
}

fn open_warm(bench: &Bench<'_>, path: &std::path::Path) -> Result<Device, Missing> {
    let image = bench.open(path, Format::Qcow2, CacheMode::Writeback, false)?;
    control::warm(&image, bench.size)?;
    Ok(image)
}

/// What a look-up adds to a request, in nanoseconds of CPU time: all of it is the queue's own thread's, and what else runs on the machine
/// does not count.
pub(super) fn added(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let zeroed = zeroed(bench)?;
    let empty = bench.images.empty(bench.size)?;
    let empty = open_warm(bench, &empty)?;
    let plan = plan(bench);
    let pairs = bench.pairs(plan, [Target::Device(&zeroed), Target::Device(&empty)])?;
    let nanoseconds = pairs
        .iter()
        .map(|pair| (pair.subject.cpu_microseconds() - pair.control.cpu_microseconds()) * 1e3);
    let value = Spread::of(nanoseconds);
    let subject = "zeroes with a mapping".to_owned();
    let control = "zeroes without; CPU time more, in ns".to_owned();
    let mut measured = Measured::with_figures(subject, control, &pairs, value);
    measured.unit = "ns";
    Ok(measured)
}

/// Two queues of one device beside a device for each.
pub(super) fn sharing(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let shared = zeroed(bench)?;
    let apart = [zeroed(bench)?, zeroed(bench)?];
    let plan = Plan {
        queues: 2,
        ..plan(bench)
    };
    let pairs = bench.pairs(plan, [Target::Device(&shared), Target::Devices(&apart)])?;
    for device in &apart {
        device.close()?;
    }
    Ok(ratio_of(
        "two queues of one device",
        "a device for each queue",
        &pairs,
    ))
}
