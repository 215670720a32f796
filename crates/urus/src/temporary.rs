//! A temporary overlay: an image without a name, for writes that nobody is to keep.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use urus_format::{BackingName, create};
use urus_ring::OpenFile;

use crate::{Error, Layer, Result};

/// The size of its clusters: qemu-img's default.
const CLUSTER_BITS: u32 = 16;
const REFCOUNT_ORDER: u32 = 4;

/// What the overlay records as its backing file's name. Nobody looks it up: the backing file is open already.
const BACKING_NAME: &[u8] = b"the image";

/// Makes an overlay over `image` in `directory`; returns it with what messages call it.
pub(crate) fn overlay(directory: &Path, image: &Layer) -> Result<(OpenFile, PathBuf)> {
    let name = image.path.file_name().unwrap_or(OsStr::new("an image"));
    let path = directory.join(format!("(temporary overlay of {})", name.display()));
    let layout = create::layout(&create::CreateOptions {
        size: image.size,
        cluster_bits: CLUSTER_BITS,
        version: 3,
        refcount_order: REFCOUNT_ORDER,
        compression: crate::Compression::default(),
        lazy_refcounts: false,
        backing: Some(BackingName {
            name: BACKING_NAME.to_vec(),
            format: Some(image.format.name().to_owned()),
        }),
    })
    .map_err(Error::format(&path))?;
    let failed = |error| Error::io("make", &path)(error);
    let file = File::from(nameless(directory).map_err(failed)?);
    file.set_len(layout.file_bytes).map_err(failed)?;
    for (offset, bytes) in &layout.writes {
        file.write_all_at(bytes, *offset).map_err(failed)?;
    }
    // Not synced: nobody sees it after a crash.
    let file = OpenFile::from_fd(file.into(), path.display().to_string()).map_err(failed)?;
    Ok((file, path))
}

/// A file without a name, for the process's user only.
fn nameless(directory: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        // A file system without such files, or a kernel that takes it for opening the directory.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        result => return Ok(result?),
    }
    for number in 0..u32::MAX {
        let path = directory.join(format!(".urus-{}-{number}", std::process::id()));
        match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Err(Errno::EXIST) => {}
            Ok(file) => {
                rustix::fs::unlinkat(CWD, &path, AtFlags::empty())?;
                return Ok(file);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
