//! P16: fdatasyncs, counted: urus' by the device itself, QEMU's by strace.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use urus::{CacheMode, Format};

use super::super::images::Missing;
use super::super::spread::Spread;
use super::Bench;
use super::report::Measured;
use crate::failure::Failure;

const CLUSTER_BYTES: u64 = 64 << 10;

/// What the write finds.
#[derive(Clone, Copy)]
pub(super) enum Case {
    /// An empty image.
    NewTable,
    /// An L2 table, and no cluster.
    NewCluster,
    /// The cluster.
    Overwrite,
}

impl Case {
    /// Where is written before, and where what counts is written.
    fn offsets(self) -> (Option<u64>, u64) {
        match self {
            Self::NewTable => (None, 0),
            Self::NewCluster => (Some(0), CLUSTER_BYTES),
            Self::Overwrite => (Some(0), 0),
        }
    }
}

/// Both, once: what is counted does not vary.
pub(super) fn count(bench: &mut Bench<'_>, case: Case) -> Result<Measured, Missing> {
    let path = prepared(bench, case)?;
    let image = bench.open(&path, Format::Qcow2, CacheMode::Writeback, true)?;
    let mut io = image.blocking()?;
    let before = image.counters().barriers;
    io.write_at(&[b'w'; 4096], case.offsets().1)
        .and_then(|()| io.flush())?;
    let urus = image.counters().barriers - before;
    drop(io);
    image.close()?;
    let path = prepared(bench, case)?;
    let qemu = match by_qemu_io(&path, case) {
        Ok(count) => format!("qemu-io: {count}"),
        // A bar is not left out for want of who is compared.
        Err(Missing::Program(why)) => format!("qemu-io: {why}"),
        Err(failed) => return Err(failed),
    };
    #[allow(clippy::cast_precision_loss, reason = "a handful")]
    let value = Spread::of(std::iter::once(urus as f64));
    Ok(Measured::of_values(
        "counted by the device",
        qemu,
        "fdatasyncs",
        value,
    ))
}

/// A new image in the state that the case wants.
fn prepared(bench: &Bench<'_>, case: Case) -> Result<std::path::PathBuf, Missing> {
    let path = bench.written.fresh(None)?;
    if let (Some(offset), _) = case.offsets() {
        let image = bench.open(&path, Format::Qcow2, CacheMode::Writeback, true)?;
        let mut io = image.blocking()?;
        io.write_at(&[b'b'; 4096], offset)?;
        drop(io);
        image.close()?;
    }
    Ok(path)
}

/// qemu-io is killed after the flush: closing would sync once more.
fn by_qemu_io(path: &Path, case: Case) -> Result<usize, Missing> {
    let trace = tempfile::NamedTempFile::new()
        .map_err(|error| Failure::new(format!("cannot make a temporary file: {error}")))?;
    let output = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-e",
            "trace=fdatasync,fsync",
            "-e",
            "signal=none",
            "-o",
        ])
        .arg(trace.path())
        .args(["qemu-io", "-f", "qcow2", "-t", "writeback"])
        .args(["-c", &format!("write {} 4k", case.offsets().1)])
        .args(["-c", "flush", "-c", "sigraise 9"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Missing::Program(format!("strace cannot be run: {error}")))?;
    let trace = fs::read_to_string(trace.path()).unwrap_or_default();
    let count = syncs(&trace);
    if count == 0 {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(Missing::Program(format!(
            "not counted under strace: {}",
            errors.lines().next().unwrap_or("no fdatasync was seen")
        )));
    }
    Ok(count)
}

/// Calls begun. strace writes one that another thread interrupts on two lines, and the second does not begin with the call.
fn syncs(trace: &str) -> usize {
    let is_call = |line: &&str| {
        let call = line.split_whitespace().nth(1).unwrap_or_default();
        call.starts_with("fdatasync(") || call.starts_with("fsync(")
    };
    trace.lines().filter(is_call).count()
}

#[cfg(test)]
mod tests {
    //! Guards the count of QEMU's syncs.
    use super::*;

    #[test]
    fn each_call_is_counted_once() {
        let trace = "12 fdatasync(9 <unfinished ...>\n13 fdatasync(9) = 0\n12 <... fdatasync resumed>) = 0\n12 +++ killed by SIGKILL +++\n";
        assert_eq!(syncs(trace), 2);
    }
}
