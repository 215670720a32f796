//! The images: made once by urus, with content, and kept.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use rustix::fs::Advice;
use urus::{CreateOptions, OpenOptions};

use crate::contender::Plan;

/// What is written over is smaller, so that the kernel does not throttle who dirties its pages.
const WRITTEN_BYTES: u64 = 1 << 30;
const STEP_BYTES: usize = 1 << 20;
const PREFIX: &str = "compare-";

pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) size: u64,
}

/// The image to be read, or the one to be written over.
pub(crate) fn get(dir: &Path, size: u64, writes: bool) -> Result<Image, String> {
    let (name, size) = if writes {
        ("written", size.min(WRITTEN_BYTES))
    } else {
        ("read", size)
    };
    let path = dir.join(format!("{PREFIX}{name}-{size}.qcow2"));
    if !path.exists() {
        fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        make(&path, size).map_err(|error| error.to_string())?;
    }
    Ok(Image { path, size })
}

/// Under another name until it is complete.
fn make(path: &Path, size: u64) -> Result<(), Box<dyn std::error::Error>> {
    let part = path.with_extension("part");
    urus::create(&part, CreateOptions::new().size(size).overwrite(true))?;
    let image = OpenOptions::new().open(&part)?;
    let mut io = image.blocking()?;
    let mut bytes = vec![0; STEP_BYTES];
    for at in (0..size).step_by(STEP_BYTES) {
        // No two clusters alike, and none of zeroes.
        for (word, number) in bytes.chunks_mut(8).zip(at..) {
            word.copy_from_slice(&(number | 1).to_le_bytes());
        }
        io.write_at(&bytes, at)?;
    }
    drop(io);
    image.close()?;
    fs::rename(&part, path)?;
    Ok(())
}

/// Everything in the page cache, read by the same calls each time, or, for O_DIRECT, nothing.
pub(crate) fn settle(plan: &Plan) -> Result<(), String> {
    let settle = || -> std::io::Result<()> {
        let mut file = File::open(&plan.path)?;
        // What is dirty cannot be dropped.
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
        if !plan.direct {
            // Without read-ahead the kernel makes no large folios, in which ext4 looks at every block to write one.
            rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
            let mut bytes = vec![0; STEP_BYTES];
            while file.read(&mut bytes)? > 0 {}
        }
        Ok(())
    };
    settle().map_err(|error| format!("{}: {error}", plan.path.display()))
}

/// Removes what was made here, and the directory if nothing else is in it.
pub(crate) fn clean(dir: &Path) -> Result<(), String> {
    let fail = |error: std::io::Error| format!("{}: {error}", dir.display());
    for entry in fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let suffixes = [".qcow2", ".part"];
        if name.starts_with(PREFIX) && suffixes.iter().any(|suffix| name.ends_with(suffix)) {
            fs::remove_file(entry.path()).map_err(fail)?;
        }
    }
    // Somebody else's files keep it.
    let _ = fs::remove_dir(dir);
    Ok(())
}
