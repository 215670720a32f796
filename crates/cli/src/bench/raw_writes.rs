//! What the same new data costs a file without a mapping: the least that any format could do.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, OFlags};
use urus::CacheMode;
use urus_ring::{RawDirection, RawFile, RawMethod};

use super::Args;
use super::report::Slice;
use super::slices::cpu_time;
use super::writes::{FLUSH_EVERY, STRIDE_BYTES, WRITE_BYTES, slice};
use crate::failure::Failure;

/// The same writes into a raw file's holes, with the two fdatasyncs for each flush that a mapping takes.
pub(super) fn into_holes(args: &Args, dir: &Path, writes: u64) -> Result<Slice, Failure> {
    let fail = failure(dir);
    let file = tempfile::tempfile_in(dir).map_err(&fail)?;
    file.set_len(writes * STRIDE_BYTES).map_err(&fail)?;
    // Through the page cache nothing is faster for a file that has to grow its extents.
    let raw = RawFile::open(file, RawMethod::Inline, args.depth, WRITE_BYTES).map_err(&fail)?;
    timed(writes, || burst(None, raw, args.depth, writes)).map_err(fail)
}

/// As many clusters read from a file and written into a new one: what copying on write copies, with the same fdatasyncs.
pub(super) fn copies(
    args: &Args,
    from: &Path,
    dir: &Path,
    cache: CacheMode,
    writes: u64,
) -> Result<Slice, Failure> {
    let fail = failure(dir);
    let direct = cache == CacheMode::None;
    let flags = if direct {
        OFlags::DIRECT
    } else {
        OFlags::empty()
    };
    let flags = i32::try_from(flags.bits()).expect("a flag of open(2)");
    let source = OpenOptions::new().read(true).custom_flags(flags).open(from);
    let target = tempfile::Builder::new()
        .tempfile_in(dir)
        .and_then(|named| {
            let options = OpenOptions::new().write(true).custom_flags(flags).clone();
            options.open(named.path())
        })
        .map_err(&fail)?;
    let len = writes * STRIDE_BYTES;
    let method = if direct {
        // As the engine does: the file grows ahead of the writes.
        rustix::fs::fallocate(&target, FallocateFlags::empty(), 0, len)
            .map_err(|error| fail(error.into()))?;
        RawMethod::RegisteredBuffers
    } else {
        target.set_len(len).map_err(&fail)?;
        RawMethod::Inline
    };
    let cluster = usize::try_from(STRIDE_BYTES).expect("a cluster");
    let open = |file| RawFile::open(file, method, args.depth, cluster);
    let source = source.and_then(open).map_err(&fail)?;
    let target = open(target).map_err(&fail)?;
    timed(writes, || burst(Some(source), target, args.depth, writes)).map_err(fail)
}

fn failure(dir: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| Failure::new(format!("a raw file in {}: {error}", dir.display()))
}

fn timed(writes: u64, run: impl FnOnce() -> io::Result<()>) -> io::Result<Slice> {
    let cpu = cpu_time();
    let begin = Instant::now();
    run()?;
    let time: Duration = begin.elapsed();
    Ok(slice(writes, time, cpu_time().saturating_sub(cpu)))
}

/// Up to `depth` at once: each is read, where there is something to read from, and written; everything is waited for and made durable
/// after each [`FLUSH_EVERY`].
fn burst(
    mut source: Option<RawFile>,
    mut target: RawFile,
    depth: u32,
    writes: u64,
) -> io::Result<()> {
    let mut free: Vec<usize> = (0..usize::try_from(depth).expect("32 bits fit")).collect();
    let mut offsets = vec![0; free.len()];
    let mut begun = 0;
    while begun < writes {
        let end = writes.min(begun + FLUSH_EVERY);
        while begun < end || target.in_flight() > 0 || is_busy(source.as_ref()) {
            while begun < end
                && let Some(slot) = free.pop()
            {
                offsets[slot] = begun * STRIDE_BYTES;
                begun += 1;
                match &mut source {
                    Some(source) => source.submit(slot, offsets[slot], RawDirection::Read),
                    None => target.submit(slot, offsets[slot], RawDirection::Write),
                }
            }
            if let Some(source) = &mut source {
                source.wait()?;
                while let Some((slot, result)) = source.completion() {
                    result?;
                    target.submit(slot, offsets[slot], RawDirection::Write);
                }
            }
            target.wait()?;
            while let Some((slot, result)) = target.completion() {
                result?;
                free.push(slot);
            }
        }
        target.sync_data()?;
        target.sync_data()?;
    }
    Ok(())
}

fn is_busy(source: Option<&RawFile>) -> bool {
    source.is_some_and(|source| source.in_flight() > 0)
}

#[cfg(test)]
mod tests {
    //! Guards against a floor that is none: everything that is to be copied has to be.
    use super::*;
    use std::fs::File;

    #[test]
    fn every_cluster_is_read_and_written() {
        let from = tempfile::NamedTempFile::new().expect("a directory for temporary files");
        let to = tempfile::NamedTempFile::new().expect("the same");
        let clusters = FLUSH_EVERY + 3;
        from.as_file()
            .set_len(clusters * STRIDE_BYTES)
            .expect("room");
        let cluster = usize::try_from(STRIDE_BYTES).expect("a cluster");
        for method in [RawMethod::Inline, RawMethod::Ring] {
            to.as_file().set_len(0).expect("room");
            let open = |path: &Path| {
                let file = File::options().read(true).write(true).open(path)?;
                RawFile::open(file, method, 4, cluster)
            };
            let source = open(from.path()).expect("a ring");
            let target = open(to.path()).expect("a ring");
            burst(Some(source), target, 4, clusters).expect("it copies");
            let written = std::fs::read(to.path()).expect("it is there");
            assert_eq!(written.len() as u64, clusters * STRIDE_BYTES);
            assert!(
                written.iter().all(|byte| *byte != 0),
                "a cluster was left out"
            );
        }
    }
}
