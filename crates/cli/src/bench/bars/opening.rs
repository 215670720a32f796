//! P13: how long opening takes, cold.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use urus::{CacheMode, Format};

use super::super::control::evict;
use super::super::images::Missing;
use super::super::spread::Spread;
use super::Bench;
use super::report::Measured;

/// An image of which each cluster has a mapping.
pub(super) fn with_all_metadata(bench: &mut Bench<'_>, size: u64) -> Result<Measured, Missing> {
    let path = bench.images.metadata_only(size)?;
    open(bench, &path)
}

/// An image without any.
pub(super) fn empty(bench: &mut Bench<'_>, size: u64) -> Result<Measured, Missing> {
    let path = bench.images.empty(size)?;
    open(bench, &path)
}

fn open(bench: &mut Bench<'_>, path: &Path) -> Result<Measured, Missing> {
    let mut times = Vec::new();
    for _ in 0..bench.args.pairs {
        bench.check_stop()?;
        if let Ok(file) = File::open(path) {
            // What is dirty cannot be dropped. A disk that cannot be synced shows in the figures.
            let _ = file.sync_all();
            evict(&file);
        }
        let begin = Instant::now();
        let image = bench.open(path, Format::Qcow2, CacheMode::Writeback, true)?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        image.close()?;
    }
    let value = Spread::of(times.into_iter());
    Ok(Measured::of_values(
        "opened for writing",
        String::new(),
        "ms",
        value,
    ))
}
