//! Images of real files, built once and kept in the target directory (`cargo clean` takes them away).
//!
//! An ext4 file system holds at least 1 GiB of what this machine has under /usr, and of the Rust toolchain where /usr
//! is small. From it qemu-img makes the qcow2 images. A lock keeps tests in other processes from building at the same
//! time, and a file appears under its name only when it is whole.

use crate::program::program;
use crate::{GIB, KIB, MIB, qemu, scratch};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Changes whenever the way of building changes, so that an old directory is not taken for a new one.
const VERSION: &str = "urus-fixtures/v2";
/// The least that the file system must hold.
const ENOUGH: u64 = GIB;
/// A directory that would lead past this is left out.
const TOO_MUCH: u64 = GIB + 80 * MIB;
/// Room that the file system keeps free, for tests that unpack something into it.
const FREE: u64 = 400 * MIB;

/// The least mean size of a directory's files. mke2fs needs most of its time for the number of files, and tens of
/// thousands of links to manual pages would teach nothing that some thousand files do not.
const WORTHWHILE: u64 = 16 * KIB;

/// For one step of building, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(500);

/// How the clusters of a qcow2 fixture are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// As they are.
    Plain,
    /// Compressed with zlib.
    Zlib,
    /// Compressed with zstd.
    Zstd,
}

/// The ext4 file system as a raw image. Read-only by agreement: copy it or lay an overlay over it.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn ext4() -> PathBuf {
    let (directory, _lock) = locked();
    ext4_in(&directory)
}

/// The same file system as a qcow2 image.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn image(stored: Stored) -> PathBuf {
    let (directory, _lock) = locked();
    let raw = ext4_in(&directory);
    let (name, options) = match stored {
        Stored::Plain => ("plain.qcow2", ""),
        Stored::Zlib => ("zlib.qcow2", "-c"),
        Stored::Zstd => ("zstd.qcow2", "-c -o compression_type=zstd"),
    };
    built(&directory, name, |partial| {
        let convert = qemu::img("convert -f raw -O qcow2 -m 4 -W").words(options);
        convert.arg(&raw).arg(partial).limit(PATIENCE).ok();
    })
}

/// A second name for a fixture, beside the images that are to use it as their backing file.
///
/// # Panics
/// When the scratch directory lies on another disk than the fixtures.
pub fn link(fixture: &Path, name: &Path) {
    std::fs::hard_link(fixture, name)
        .unwrap_or_else(|error| panic!("linking {}: {error}", name.display()));
}

/// Directories and files of altogether about `bytes`, for unpacking somewhere.
///
/// # Panics
/// When there is too little.
#[must_use]
pub fn some_directories(bytes: u64) -> Vec<PathBuf> {
    let (chosen, total) = choose(&sources(), bytes, bytes + bytes / 2);
    assert!(
        total >= bytes,
        "this machine has only {total} bytes of suitable files"
    );
    chosen
}

fn locked() -> (PathBuf, File) {
    let directory = scratch::shared_directory(VERSION);
    let lock = File::create(directory.join("lock")).expect("a lock file");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .expect("locking the fixtures");
    (directory, lock)
}

fn built(directory: &Path, name: &str, build: impl FnOnce(&Path)) -> PathBuf {
    let whole = directory.join(name);
    if !whole.exists() {
        let partial = directory.join(format!("{name}.partial"));
        let _ = std::fs::remove_file(&partial);
        build(&partial);
        std::fs::rename(&partial, &whole).expect("renaming a fixture");
    }
    whole
}

fn ext4_in(directory: &Path) -> PathBuf {
    built(directory, "ext4.raw", |partial| {
        for made_from_another in ["plain.qcow2", "zlib.qcow2", "zstd.qcow2"] {
            let _ = std::fs::remove_file(directory.join(made_from_another));
        }
        let (chosen, total) = choose(&sources(), ENOUGH, TOO_MUCH);
        assert!(
            total >= ENOUGH,
            "this machine has only {total} bytes of files to build a test image from"
        );
        let tree = directory.join("tree");
        let _ = std::fs::remove_dir_all(&tree);
        std::fs::create_dir(&tree).expect("a directory for copies");
        for some in chosen.chunks(500) {
            // From the root by relative names: with absolute ones --parents stumbles over its own directories.
            let names = some
                .iter()
                .map(|path| path.strip_prefix("/").unwrap_or(path));
            let copy = program("cp")
                .words("-a --parents --reflink=auto")
                .args(names);
            copy.arg(&tree)
                .current_dir(Path::new("/"))
                .limit(PATIENCE)
                .ok();
        }
        let size = (total + total / 16 + FREE).next_multiple_of(MIB);
        let mke2fs = program("mke2fs")
            .words("-q -t ext4 -L urus -d")
            .arg(&tree)
            .arg(partial);
        mke2fs.arg(format!("{}k", size / 1024)).limit(PATIENCE).ok();
        std::fs::remove_dir_all(&tree).expect("removing the copies");
    })
}

fn sources() -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = ["/usr/share", "/usr/bin", "/usr/lib"]
        .map(PathBuf::from)
        .into();
    if let Some(cargo) = std::env::var_os("CARGO") {
        let toolchain = Path::new(&cargo).ancestors().nth(2);
        sources.extend(toolchain.map(|toolchain| toolchain.join("lib")));
        sources.extend(toolchain.map(|toolchain| toolchain.join("share")));
    }
    sources
}

/// Takes entries of the directories `from`, in order of name, until there are `enough` bytes; of a directory that
/// would lead past `too_much`, only a part.
fn choose(from: &[PathBuf], enough: u64, too_much: u64) -> (Vec<PathBuf>, u64) {
    let mut chosen = Vec::new();
    let mut total = 0;
    // A stack, the next one last.
    let mut ahead: Vec<PathBuf> = from
        .iter()
        .rev()
        .flat_map(|directory| reversed_entries(directory))
        .collect();
    while total < enough {
        let Some(entry) = ahead.pop() else { break };
        let (size, files) = size_of(&entry, too_much);
        if total + size > too_much {
            if entry.is_dir() && !entry.is_symlink() {
                ahead.extend(reversed_entries(&entry));
            }
        } else if size > 0 && size / files >= WORTHWHILE {
            total += size;
            chosen.push(entry);
        }
    }
    (chosen, total)
}

fn reversed_entries(directory: &Path) -> Vec<PathBuf> {
    let mut entries = entries(directory);
    entries.reverse();
    entries
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(read) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut entries: Vec<PathBuf> = read.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    entries
}

/// Bytes in regular files at and below `path`, and how many files there are; stops counting past `limit` bytes.
fn size_of(path: &Path, limit: u64) -> (u64, u64) {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return (0, 1);
    };
    if !metadata.is_dir() {
        return (
            if metadata.is_file() {
                metadata.len()
            } else {
                0
            },
            1,
        );
    }
    let mut total = (0, 1);
    for entry in entries(path) {
        let (bytes, files) = size_of(&entry, limit);
        total = (total.0 + bytes, total.1 + files);
        if total.0 > limit {
            break;
        }
    }
    total
}
