//! `qemu-img bench` as the peer: how it is run, and what it says.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::images::Missing;
use super::latency::Percentiles;
use super::report::Slice;
use crate::failure::Failure;

/// Runs `qemu-img bench` with these arguments for `count` requests. The CPU time is that of the whole process, its start included.
pub(super) fn bench(arguments: &[String], count: u64) -> Result<Slice, Missing> {
    let (text, cpu) = run(arguments, count)?;
    let seconds = seconds(&text)
        .ok_or_else(|| Failure::new(format!("qemu-img bench told no time: {text}")))?;
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let iops = count as f64 / seconds;
    Ok(Slice {
        operations: count,
        iops,
        cpu,
        // It tells none.
        latency: Percentiles::default(),
    })
}

/// CPU time that is not the requests'.
pub(super) fn start_cpu_time(arguments: &[String]) -> Result<Duration, Missing> {
    Ok(run(arguments, 1)?.1)
}

/// What it prints, and its CPU time.
fn run(arguments: &[String], count: u64) -> Result<(String, Duration), Missing> {
    let before = children_cpu_time();
    let output = Command::new("qemu-img")
        .arg("bench")
        .args(["-c", &count.to_string()])
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Missing::Program(format!("qemu-img cannot be run: {error}")))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("qemu-img bench: {text}{}", errors.trim())).into());
    }
    Ok((text, children_cpu_time().saturating_sub(before)))
}

/// By how many of so many blocks, of so many bytes each, to step, as `qemu-img bench` knows no random order: by 0.382 of them, which scatters as
/// evenly as 0.618, and so that each is met; by less where the program would not take it.
pub(super) fn scattered_step(blocks: u64, block_bytes: u64) -> u64 {
    /// The most that it takes.
    const STEP_BYTES_MAX: u64 = i32::MAX.unsigned_abs() as u64;
    let mut step = (blocks * 382 / 1000).min(STEP_BYTES_MAX / block_bytes);
    while step > 1 && common_divisor(step, blocks) != 1 {
        step -= 1;
    }
    step.max(1)
}

fn common_divisor(one: u64, other: u64) -> u64 {
    match other {
        0 => one,
        _ => common_divisor(other, one % other),
    }
}

/// From "Run completed in 0.512 seconds."
fn seconds(text: &str) -> Option<f64> {
    let (_, rest) = text.split_once("Run completed in ")?;
    rest.split_whitespace()
        .next()?
        .parse()
        .ok()
        .filter(|seconds| *seconds > 0.0)
}

/// Of the children that were waited for, to a hundredth of a second.
fn children_cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // cutime and cstime, fields 16 and 17.
    cpu_time(&stat, 16)
}

/// Of another process, to a hundredth of a second.
pub(super) fn process_cpu_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // utime and stime, fields 14 and 15.
    cpu_time(&stat, 14)
}

/// The sum of two fields of /proc/PID/stat, counted from 1.
fn cpu_time(stat: &str, field: usize) -> Duration {
    // The name, field 2, may hold anything.
    let after_name = stat.rsplit(')').next().unwrap_or("");
    let ticks: u64 = after_name
        .split_whitespace()
        .skip(field - 3)
        .take(2)
        .filter_map(|ticks| ticks.parse::<u64>().ok())
        .sum();
    // USER_HZ, which is 100 wherever urus runs.
    Duration::from_millis(ticks.saturating_mul(10))
}

#[cfg(test)]
mod tests {
    //! Guards what QEMU's rate and the processes' CPU time are taken from.
    use super::*;

    #[test]
    fn times_are_read_from_what_qemu_says() {
        let text = "Sending 9 write requests\nRun completed in 0.512 seconds.\n";
        assert_eq!(seconds(text), Some(0.512));
        assert_eq!(seconds("Run completed in a while"), None);
        assert_eq!(seconds("Run completed in 0.000 seconds."), None);
    }

    #[test]
    fn cpu_times_are_read_from_their_fields() {
        let stat = "7 (a) b) S 4 5 6 7 8 9 10 11 12 13 14 15 1600 170 18 19";
        assert_eq!(cpu_time(stat, 14), Duration::from_millis(290));
        assert_eq!(cpu_time(stat, 16), Duration::from_millis(17_700));
    }

    #[test]
    fn steps_reach_every_block() {
        for blocks in [1, 2, 3, 7, 100, 309, 4096, 618 * 3] {
            let step = scattered_step(blocks, 4096);
            let mut places: Vec<_> = (0..blocks).map(|turn| turn * step % blocks).collect();
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len() as u64, blocks);
        }
        // As much as a signed number of 32 bits holds.
        for blocks in [1 << 20, 1 << 22, 1 << 30] {
            let bytes = scattered_step(blocks, 4096) * 4096;
            assert!(((1 << 30)..1 << 31).contains(&bytes), "{bytes}");
        }
    }
}
