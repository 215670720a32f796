//! Images as large as one likes that take little: no data, and in each part of the disk that one slice of the mapping cache covers one cluster
//! that is zero. So every L2 table and every slice is there. What else is read comes from a raw backing file, which is one hole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use urus::{CreateOptions, Format, OpenOptions, Queue, Request};

use super::images::{Images, Missing, run_qemu_img};
use crate::failure::Failure;

/// Bytes of the disk that a slice of 4 KiB maps, with clusters of 64 KiB.
pub(super) const SLICE_SPAN: u64 = 32 << 20;
const CLUSTER_BYTES: u64 = 64 << 10;
/// What ext4 takes.
const LARGEST_FILE: u64 = (16 << 40) - 4096;
/// Requests in flight while such an image is made.
const DEPTH: u32 = 32;

/// How many slices the disk has.
pub(super) fn slices(size: u64) -> u64 {
    size / SLICE_SPAN
}

/// What the tables of a disk of that size take, in whole: an L2 entry and a refcount for each cluster of 64 KiB, and some room.
pub(super) fn metadata_bytes(size: u64) -> u64 {
    (size >> 16) * 10 + (64 << 20)
}

/// The path of such an image, which is made unless it is there.
pub(super) fn over_hole(images: &Images, size: u64) -> Result<PathBuf, Missing> {
    let hole = hole(images, size)?;
    images.made(
        &format!("wide-{size}.qcow2"),
        metadata_bytes(size),
        |path| Ok(make(path, size, &hole)?),
    )
}

/// The same without the backing file, so that its map has the whole cache. (Zeroes over nothing would not be recorded, and so there
/// would be no map: QEMU's program takes the backing file away.)
pub(super) fn alone(images: &Images, name: &str, size: u64) -> Result<PathBuf, Missing> {
    let hole = hole(images, size)?;
    images.made(name, metadata_bytes(size), |path| {
        make(path, size, &hole)?;
        let mut command = Command::new("qemu-img");
        command.args(["rebase", "-q", "-u", "-f", "qcow2", "-b", ""]);
        run_qemu_img(command.arg(path), path)
    })
}

fn hole(images: &Images, size: u64) -> Result<PathBuf, Missing> {
    images.made(&format!("hole-{size}.raw"), 0, |path| {
        let told = |error| Failure::new(format!("cannot make {}: {error}", path.display()));
        let file = File::create(path).map_err(told)?;
        Ok(file.set_len(size.min(LARGEST_FILE)).map_err(told)?)
    })
}

/// In each slice the last cluster is the zero one.
fn make(path: &Path, size: u64, hole: &Path) -> Result<(), Failure> {
    let name = hole.file_name().expect("we named it");
    let mut options = CreateOptions::new();
    options.size(size).backing(name, Format::Raw);
    urus::create(path, &options)?;
    let image = OpenOptions::new().queue_depth(DEPTH).open(path)?;
    let mut queue = image.queue()?.activate()?;
    for slice in 0..slices(size) {
        while queue.in_flight() >= queue.depth() {
            queue.wait(None);
            take(&mut queue)?;
        }
        let last = (slice + 1) * SLICE_SPAN - CLUSTER_BYTES;
        let request = Request::write_zeroes(slice, last, CLUSTER_BYTES);
        queue.submit(request).expect("there is room");
    }
    while queue.in_flight() > 0 {
        queue.wait(None);
        take(&mut queue)?;
    }
    drop(queue);
    Ok(image.close()?)
}

fn take(queue: &mut Queue) -> Result<(), Failure> {
    while let Some(completion) = queue.completion() {
        completion.result?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Guards the images: were a slice not there, nothing of it would ever be loaded, and measured.
    use super::*;

    #[test]
    fn every_slice_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let size = 40 * SLICE_SPAN;
        let images = Images::in_dir(dir.path(), size).expect("made");
        let paths = [
            over_hole(&images, size),
            alone(&images, "alone.qcow2", size),
        ];
        for (path, layers) in paths.into_iter().zip([2, 1]) {
            let mut options = OpenOptions::new();
            let image = options
                .read_only(true)
                .open(path.expect("made"))
                .expect("opens");
            assert_eq!(image.layers().len(), layers);
            let mut io = image.blocking().expect("a queue");
            for slice in 0..slices(size) {
                let mut block = [1; 512];
                io.read_at(&mut block, slice * SLICE_SPAN).expect("read");
                assert_eq!(block, [0; 512]);
            }
            assert_eq!(image.counters().slice_loads, slices(size));
        }
    }
}
