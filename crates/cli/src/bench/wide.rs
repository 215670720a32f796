//! Images as large as one likes that take little: no data, and in each part of the disk that one slice of the mapping cache covers one cluster
//! that is zero. So every L2 table and every slice is there. What else is read comes from a backing file, if there is one.

use std::path::Path;

use urus::{CreateOptions, Format, OpenOptions, Queue, Request};

use crate::failure::Failure;

/// Bytes of the disk that a slice of 4 KiB maps, with clusters of 64 KiB.
pub(super) const SLICE_SPAN: u64 = 32 << 20;
const CLUSTER_BYTES: u64 = 64 << 10;
/// Requests in flight while such an image is made.
const DEPTH: u32 = 32;

/// How many slices the disk has.
pub(super) fn slices(size: u64) -> u64 {
    size / SLICE_SPAN
}

/// Makes it, over a raw file beside it or over nothing. In each slice the last cluster is the zero one.
pub(super) fn make(path: &Path, size: u64, backing: Option<&Path>) -> Result<(), Failure> {
    let mut options = CreateOptions::new();
    options.size(size);
    if let Some(backing) = backing {
        let name = backing.file_name().expect("it is a file");
        options.backing(name, Format::Raw);
    }
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
