//! Reads of an image, and the same by `qemu-img bench`.
//!
//! qemu-img knows no random order: it is told to step widely, so that no two reads near in time lie in one cluster.

use std::path::Path;

use urus::Device;

use super::super::client::Target;
use super::super::images::Missing;
use super::super::report::{Pair, Slice};
use super::super::slices::{Plan, Slices};
use super::super::writes::in_turn;
use super::super::{Mode, qemu};
use super::Bench;

/// Requests of QEMU's first run, which tells how many fill a slice.
const FIRST_COUNT: u64 = 256;

/// The reads of the plan in turn; `qcow2` is what QEMU is told besides of the format, each as `,file.OPTION=VALUE`.
pub(super) fn pairs(
    bench: &mut Bench<'_>,
    plan: Plan,
    image: &Device,
    path: &Path,
    qcow2: &str,
) -> Result<Vec<Pair>, Missing> {
    let arguments = arguments(plan, &path.to_string_lossy(), qcow2);
    // Its start takes CPU time too, which is none of the requests'.
    let start = qemu::start_cpu_time(&arguments)?;
    let first = qemu::bench(&arguments, FIRST_COUNT)?;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive count far below 2^52"
    )]
    let count = ((first.iops * plan.slice.as_secs_f64()) as u64).max(16);
    let (number, stop) = (bench.args.pairs, &mut *bench.stop);
    let outcome = Slices::with(plan, &[Target::Device(image)], |slices| {
        // One that does not count: rings, threads, decoded clusters.
        slices.slice(0, 0, usize::MAX)?;
        let mut seed = 0;
        let urus = || {
            seed += 1;
            Ok(slices.slice(0, seed, usize::MAX)?)
        };
        let qemu = || {
            let slice = qemu::bench(&arguments, count)?;
            Ok(Slice {
                cpu: slice.cpu.saturating_sub(start),
                ..slice
            })
        };
        Ok(in_turn(number, stop, urus, qemu))
    })?;
    Ok(outcome?.ok_or_else(super::interruption)?)
}

/// QEMU's arguments for the same requests.
fn arguments(plan: Plan, path: &str, qcow2: &str) -> Vec<String> {
    let blocks = plan.span / plan.block_bytes;
    let step = match plan.mode {
        Mode::Randread => qemu::scattered_step(blocks, plan.block_bytes) * plan.block_bytes,
        _ => plan.block_bytes,
    };
    // A comma is the end of a value, unless doubled.
    let path = path.replace(',', ",,");
    let image = format!(
        "driver=raw,size={},file.driver=qcow2{qcow2},file.file.driver=file,file.file.aio=io_uring,file.file.filename={path}",
        plan.span
    );
    let numbers = [
        ("-d", u64::from(plan.depth)),
        ("-s", plan.block_bytes),
        ("-S", step),
    ];
    let mut arguments: Vec<String> = numbers
        .into_iter()
        .flat_map(|(flag, number)| [flag.to_owned(), number.to_string()])
        .collect();
    arguments.extend(["--image-opts".to_owned(), image]);
    arguments
}

#[cfg(test)]
mod tests {
    //! Guards what QEMU is asked for: the same span of the same image, scattered.
    use std::time::Duration;

    use super::*;

    #[test]
    fn qemu_reads_the_same_span() {
        let plan = Plan {
            block_bytes: 4096,
            span: 4096 * 100,
            depth: 32,
            queues: 1,
            mode: Mode::Randread,
            slice: Duration::from_millis(1),
            cold: false,
            writer: false,
            registered: false,
        };
        let arguments = arguments(plan, "a,b.qcow2", "");
        let value = |flag: &str| {
            let at = arguments.iter().position(|argument| argument == flag);
            arguments[at.expect(flag) + 1].as_str()
        };
        assert_eq!((value("-d"), value("-s")), ("32", "4096"));
        let image = value("--image-opts");
        assert!(image.contains(",size=409600,"), "{image}");
        assert!(image.ends_with("=a,,b.qcow2"), "{image}");
        let step: u64 = value("-S").parse().expect("a number");
        assert!(step > plan.span / 3, "scattered");
    }
}
