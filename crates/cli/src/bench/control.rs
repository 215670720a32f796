//! The raw file that an image is measured against: same size, same content, fully allocated.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use urus::{Device, Extent, Format};

use super::Args;
use crate::failure::Failure;
use crate::signals::Stop;

/// How much is copied at once.
const STEP_BYTES: u64 = 4 << 20;

/// Copies the first `span` bytes of the image into a file without a name and opens that. Also returns how many bytes of the span the
/// image stores as data. None when a signal came.
pub(super) fn raw_copy(
    args: &Args,
    path: &Path,
    image: &Device,
    span: u64,
    stop: &mut Stop,
) -> Result<Option<(Device, u64)>, Failure> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let fail = |what: &str| {
        let text = format!(
            "cannot {what} a raw file of {span} bytes in {}",
            dir.display()
        );
        move |error: std::io::Error| {
            Failure::new(format!("{text}: {error}; --span makes it smaller"))
        }
    };
    check_space(dir, span)?;
    // Without a name: nothing is left, whatever happens.
    let file = tempfile::tempfile_in(dir).map_err(fail("create"))?;
    let mut io = image.blocking()?;
    let mut bytes = vec![0; usize::try_from(STEP_BYTES.min(span)).expect("a few MiB")];
    let (mut at, mut data_bytes) = (0, 0);
    while at < span {
        if stop.has_come() {
            return Ok(None);
        }
        let len = STEP_BYTES.min(span - at);
        let part = &mut bytes[..usize::try_from(len).expect("a few MiB")];
        io.read_at(part, at)?;
        // Zeroes too: holes would make reads of the raw file cheaper than reads are.
        file.write_all_at(part, at).map_err(fail("write"))?;
        data_bytes += stored(&io.block_status(at, len)?, at + len);
        at += len;
    }
    drop(io);
    // Nothing of it is to be written back while slices run.
    file.sync_all().map_err(fail("sync"))?;
    evict(&file);
    for layer in image.layers() {
        if let Ok(file) = File::open(&layer.path) {
            // A disk that cannot be synced shows in the figures.
            let _ = file.sync_all();
            evict(&file);
        }
    }
    let raw = super::options(args)
        .format(Format::Raw)
        .read_only(!args.mode.writes())
        .name("raw control")
        .open_fds(file.into(), Vec::new())?;
    warm(image, span)?;
    warm(&raw, span)?;
    Ok(Some((raw, data_bytes)))
}

/// Drops the file from the page cache. What a file's pages are like depends on how they got there: a large write makes large folios, in
/// which a small write can cost eight times as much as in small ones. Both files have to be read the same way.
pub(super) fn evict(file: &File) {
    // Advice: what is not dropped is measured as it is.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

/// Reads everything: fills the page cache, unless O_DIRECT passes it by, and the engine's own caches.
pub(super) fn warm(device: &Device, span: u64) -> Result<(), Failure> {
    let mut io = device.blocking()?;
    let mut bytes = vec![0; usize::try_from(STEP_BYTES.min(span)).expect("a few MiB")];
    let mut at = 0;
    while at < span {
        let len = STEP_BYTES.min(span - at);
        io.read_at(&mut bytes[..usize::try_from(len).expect("a few MiB")], at)?;
        at += len;
    }
    Ok(())
}

/// Reads a file into the page cache in pieces of 4 KiB.
pub(super) fn read_in_small_pages(path: &Path) -> Result<(), Failure> {
    let fail =
        |error: std::io::Error| Failure::new(format!("cannot read {}: {error}", path.display()));
    let mut file = File::open(path).map_err(fail)?;
    // Without read-ahead the kernel makes no large ones.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)
        .map_err(|error| fail(error.into()))?;
    let mut bytes = vec![0; usize::try_from(STEP_BYTES).expect("a few MiB")];
    while file.read(&mut bytes).map_err(fail)? > 0 {}
    Ok(())
}

/// Makes the engine load the whole mapping of the span, and little else.
pub(super) fn map(device: &Device, span: u64) -> Result<(), Failure> {
    /// A loaded part of a mapping covers this much at least, with clusters of 64 KiB.
    const STEP_BYTES: u64 = 16 << 20;
    let mut io = device.blocking()?;
    let mut block = [0; 4096];
    let mut at = 0;
    while at + 4096 <= span {
        io.read_at(&mut block, at)?;
        at += STEP_BYTES;
    }
    Ok(())
}

/// Bytes before `end` that are stored as data, in whichever layer.
fn stored(extents: &[Extent], end: u64) -> u64 {
    extents
        .iter()
        .filter(|extent| extent.data && !extent.zero)
        .map(|extent| extent.len.min(end.saturating_sub(extent.start)))
        .sum()
}

fn check_space(dir: &Path, span: u64) -> Result<(), Failure> {
    match free_bytes(dir) {
        Some(free) if free < span => Err(Failure::new(format!(
            "a raw file of {span} bytes is needed beside the image, and {} has {free} bytes free; --span SIZE measures a part",
            dir.display()
        ))),
        _ => Ok(()),
    }
}

/// What the directory's file system has left for us, where it says so.
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    let status = rustix::fs::statvfs(dir).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}
