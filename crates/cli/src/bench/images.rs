//! The images that suites measure: made once, with content, in a directory of the bench's, and told apart by their size.
//!
//! A marker file there lists what was made; nothing else is ever replaced or removed.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use urus::{BlockingIo, CreateOptions, Format};

use crate::failure::Failure;

/// Lists the names of what was made, one a line.
const MARKER: &str = "made-by-urus-bench";

/// What the name of a file ends with until it is complete.
const PART: &str = ".part";

const CLUSTER_BYTES: u64 = 64 << 10;

/// What an image without content takes at most.
const SMALL_BYTES: u64 = 1 << 20;

/// Bytes written at once.
const STEP_BYTES: usize = 1 << 20;

/// The kinds of image of the proposal's tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Qcow2,
    Zlib,
    Zstd,
    BackingQcow2,
    BackingRaw,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [
        Self::Qcow2,
        Self::Zlib,
        Self::Zstd,
        Self::BackingQcow2,
        Self::BackingRaw,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
            Self::BackingQcow2 => "backing_qcow2",
            Self::BackingRaw => "backing_raw",
        }
    }
}

/// Why there is no image, or no measurement.
#[derive(Debug)]
pub(super) enum Missing {
    /// It takes a program that is not there.
    Program(String),
    Failed(Failure),
}

impl From<Failure> for Missing {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<urus::Error> for Missing {
    fn from(error: urus::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// The directory.
pub(super) struct Images {
    dir: PathBuf,
    size: u64,
}

impl Images {
    pub(super) fn in_dir(dir: &Path, size: u64) -> Result<Self, Failure> {
        fs::create_dir_all(dir).map_err(|error| failed("make", dir, &error))?;
        Ok(Self {
            dir: dir.to_owned(),
            size,
        })
    }

    /// The path of the image of that kind, which is made unless it is there.
    pub(super) fn get(&self, kind: Kind) -> Result<PathBuf, Missing> {
        let name = format!("{}-{}.qcow2", kind.name(), self.size);
        match kind {
            Kind::Qcow2 => self.made(&name, self.size, |path| self.fill_qcow2(path)),
            Kind::Zlib | Kind::Zstd => {
                let raw = self.raw()?;
                self.made(&name, self.size, |path| compress(&raw, path, kind.name()))
            }
            Kind::BackingQcow2 => {
                let backing = self.get(Kind::Qcow2)?;
                self.made(&name, SMALL_BYTES, |path| {
                    overlay(&backing, Format::Qcow2, path)
                })
            }
            Kind::BackingRaw => {
                let backing = self.raw()?;
                self.made(&name, SMALL_BYTES, |path| {
                    overlay(&backing, Format::Raw, path)
                })
            }
        }
    }

    /// A new image for writing, in place of the last one: empty, or over the image of that kind.
    pub(super) fn fresh(&self, backing: Option<Kind>) -> Result<PathBuf, Missing> {
        let backing = backing.map(|kind| self.get(kind)).transpose()?;
        let name = format!("written-{}.qcow2", self.size);
        if listed(&self.dir)?.contains(&name) {
            remove(&self.dir.join(&name))?;
        }
        self.made(&name, SMALL_BYTES, |path| match &backing {
            Some(backing) => overlay(backing, Format::Qcow2, path),
            None => {
                urus::create(path, CreateOptions::new().size(self.size)).map_err(Failure::from)?;
                Ok(())
            }
        })
    }

    /// An image of `layers` layers, over each other, each with its share of the content.
    pub(super) fn chain(&self, layers: u64) -> Result<PathBuf, Missing> {
        let name = |layer| format!("chain{layer}of{layers}-{}.qcow2", self.size);
        let mut below = self.get(Kind::Qcow2)?;
        for layer in 1..layers {
            below = self.made(&name(layer), self.size / layers, |path| {
                overlay(&below, Format::Qcow2, path)?;
                Ok(self.fill_share(path, layer, layers)?)
            })?;
        }
        Ok(below)
    }

    /// Every `layers`th cluster, from the one with the layer's number on.
    fn fill_share(&self, path: &Path, layer: u64, layers: u64) -> Result<(), Failure> {
        let image = urus::OpenOptions::new().open(path)?;
        let mut io = image.blocking()?;
        let bytes = vec![b'c'; usize::try_from(CLUSTER_BYTES).expect("fits")];
        let clusters = self.size / CLUSTER_BYTES;
        for cluster in (layer..clusters).step_by(usize::try_from(layers).unwrap_or(usize::MAX)) {
            io.write_at(&bytes, cluster * CLUSTER_BYTES)?;
        }
        drop(io);
        Ok(image.close()?)
    }

    /// Images that tests may write over: qcow2 and raw, of the same content.
    pub(super) fn written_over(&self) -> Result<[PathBuf; 2], Missing> {
        let name = |suffix| format!("overwritten-{}.{suffix}", self.size);
        Ok([
            self.made(&name("qcow2"), self.size, |path| self.fill_qcow2(path))?,
            self.made(&name("raw"), self.size, |path| Ok(self.fill_raw(path)?))?,
        ])
    }

    /// An image without any cluster, of any size.
    pub(super) fn empty(&self, size: u64) -> Result<PathBuf, Missing> {
        self.made(&format!("empty-{size}.qcow2"), SMALL_BYTES, |path| {
            Ok(urus::create(path, CreateOptions::new().size(size)).map_err(Failure::from)?)
        })
    }

    /// An image with a mapping for each cluster, all of them zeroes.
    pub(super) fn zeroed(&self) -> Result<PathBuf, Missing> {
        self.made(
            &format!("zeroed-{}.qcow2", self.size),
            SMALL_BYTES,
            |path| {
                let zero = || -> Result<(), Failure> {
                    urus::create(path, CreateOptions::new().size(self.size))?;
                    let image = urus::OpenOptions::new().open(path)?;
                    let mut io = image.blocking()?;
                    io.write_zeroes(0, self.size, false)?;
                    drop(io);
                    Ok(image.close()?)
                };
                Ok(zero()?)
            },
        )
    }

    /// An image of any size with all its metadata, and holes for data.
    pub(super) fn metadata_only(&self, size: u64) -> Result<PathBuf, Missing> {
        // 8 bytes for each cluster, and 2 of a refcount.
        let bytes = size / CLUSTER_BYTES * 10;
        self.made(&format!("metadata-{size}.qcow2"), bytes, |path| {
            let mut command = Command::new("qemu-img");
            command
                .args([
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-o",
                    "preallocation=metadata",
                ])
                .arg(path)
                .arg(size.to_string());
            run_qemu_img(&mut command, path)
        })
    }

    /// The directory, for files without names.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The raw file of the suite's content.
    pub(super) fn raw(&self) -> Result<PathBuf, Missing> {
        self.made(&format!("raw-{}.raw", self.size), self.size, |path| {
            Ok(self.fill_raw(path)?)
        })
    }

    fn fill_raw(&self, path: &Path) -> Result<(), Failure> {
        let file = File::create(path).map_err(|error| failed("create", path, &error))?;
        self.fill(|bytes, at| {
            file.write_all_at(bytes, at)
                .map_err(|error| failed("write", path, &error))
        })?;
        file.sync_all()
            .map_err(|error| failed("sync", path, &error))
    }

    fn fill_qcow2(&self, path: &Path) -> Result<(), Missing> {
        let fill = || -> Result<(), Failure> {
            urus::create(path, CreateOptions::new().size(self.size))?;
            let image = urus::OpenOptions::new().open(path)?;
            let mut io: BlockingIo = image.blocking()?;
            self.fill(|bytes, at| Ok(io.write_at(bytes, at)?))?;
            drop(io);
            Ok(image.close()?)
        };
        Ok(fill()?)
    }

    /// The same content each time: of each 512 bytes one half noise, the other text, so that compressors have work and success.
    fn fill(
        &self,
        mut write: impl FnMut(&[u8], u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut bytes = vec![0; STEP_BYTES];
        let mut state = 1_u64;
        let mut at = 0;
        while at < self.size {
            for sector in bytes.chunks_mut(512) {
                let (noise, text) = sector.split_at_mut(256);
                for word in noise.chunks_mut(8) {
                    // Xorshift.
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    word.copy_from_slice(&state.to_le_bytes());
                }
                for (byte, letter) in text.iter_mut().zip(b"content of a disk ".iter().cycle()) {
                    *byte = *letter;
                }
            }
            let len = usize::try_from(self.size - at)
                .unwrap_or(STEP_BYTES)
                .min(STEP_BYTES);
            write(&bytes[..len], at)?;
            at += u64::try_from(len).expect("a MiB");
        }
        Ok(())
    }

    /// Makes the file of up to so many bytes under another name and renames it when it is complete, unless it is there.
    pub(super) fn made(
        &self,
        name: &str,
        bytes: u64,
        make: impl FnOnce(&Path) -> Result<(), Missing>,
    ) -> Result<PathBuf, Missing> {
        let path = self.dir.join(name);
        let is_ours = listed(&self.dir)?.iter().any(|listed| listed == name);
        let exists = path.symlink_metadata().is_ok();
        if exists && is_ours {
            return Ok(path);
        }
        let part = part_of(&path);
        if exists || (!is_ours && part.symlink_metadata().is_ok()) {
            return Err(Failure::new(format!(
                "{} is there and was not made by urus bench; choose another --dir",
                path.display()
            ))
            .into());
        }
        check_space(&self.dir, name, bytes)?;
        if !is_ours {
            // Before the file: whatever happens, --clean finds it.
            self.list(name)?;
        }
        remove(&part)?;
        if let Err(missing) = make(&part) {
            remove(&part)?;
            return Err(missing);
        }
        fs::rename(&part, &path).map_err(|error| failed("rename", &part, &error))?;
        Ok(path)
    }

    fn list(&self, name: &str) -> Result<(), Failure> {
        let marker = self.dir.join(MARKER);
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&marker)
            .and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()))
            .map_err(|error| failed("write", &marker, &error))
    }
}

fn compress(raw: &Path, path: &Path, compression: &str) -> Result<(), Missing> {
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2", "-c", "-o"])
        .arg(format!("compression_type={compression}"))
        .args([raw, path]);
    run_qemu_img(&mut command, path)
}

/// Runs qemu-img where it makes or changes an image.
pub(super) fn run_qemu_img(command: &mut Command, path: &Path) -> Result<(), Missing> {
    match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(Failure::new(format!(
            "qemu-img could not make {}: {}",
            path.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        ))
        .into()),
        Err(error) => Err(Missing::Program(format!(
            "qemu-img, which makes the image, cannot be run: {error}"
        ))),
    }
}

/// A benchmark must not fill the disk of others: an eighth more than the file takes has to be free.
fn check_space(dir: &Path, name: &str, bytes: u64) -> Result<(), Failure> {
    let needed = bytes.saturating_add(bytes / 8);
    match super::control::free_bytes(dir) {
        Some(free) if free < needed => Err(Failure::new(format!(
            "{name} takes up to {bytes} bytes, and {} has {free} bytes free; --size makes it smaller, --dir puts it elsewhere",
            dir.display()
        ))),
        _ => Ok(()),
    }
}

/// An image without anything of its own.
fn overlay(backing: &Path, format: Format, path: &Path) -> Result<(), Missing> {
    let name = backing.file_name().expect("we named it");
    urus::create(path, CreateOptions::new().backing(name, format)).map_err(Failure::from)?;
    Ok(())
}

/// Removes what the bench made in the directory, and the directory if nothing else is in it.
pub(super) fn clean(dir: &Path) -> Result<(), Failure> {
    let names = listed(dir)?;
    for name in &names {
        let path = dir.join(name);
        remove(&path)?;
        remove(&part_of(&path))?;
    }
    remove(&dir.join(MARKER))?;
    if !names.is_empty() {
        // Somebody else's files keep it.
        let _ = fs::remove_dir(dir);
    }
    Ok(())
}

/// The names in the marker: only such as the bench gives, whatever somebody wrote into it.
fn listed(dir: &Path) -> Result<Vec<String>, Failure> {
    let marker = dir.join(MARKER);
    let text = match fs::read_to_string(&marker) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(failed("read", &marker, &error)),
    };
    let is_name = |name: &&str| {
        let stem = name.strip_suffix(".qcow2").or(name.strip_suffix(".raw"));
        !name.contains('/') && stem.is_some_and(|stem| !stem.is_empty())
    };
    Ok(text.lines().filter(is_name).map(str::to_owned).collect())
}

fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PART);
    name.into()
}

fn remove(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path, &error)),
        _ => Ok(()),
    }
}

fn failed(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    //! Guards other people's files in the bench's directory.
    use super::*;

    #[test]
    fn clean_removes_what_was_made_and_nothing_else() {
        let scratch = tempfile::tempdir().expect("a directory");
        let dir = scratch.path().join("images");
        let images = Images::in_dir(&dir, 1 << 20).expect("made");
        let overlay = images.get(Kind::BackingQcow2).expect("made");
        assert!(overlay.exists() && dir.join("qcow2-1048576.qcow2").exists());
        let made = fs::metadata(&overlay).expect("there").modified().ok();
        images.get(Kind::BackingQcow2).expect("kept");
        assert_eq!(fs::metadata(&overlay).expect("there").modified().ok(), made);

        fs::write(dir.join("raw-1048576.raw"), "mine").expect("written");
        let Err(Missing::Failed(failure)) = images.get(Kind::BackingRaw) else {
            panic!("somebody's file was used");
        };
        assert!(format!("{failure:?}").contains("not made by urus bench"));
        fs::write(scratch.path().join("outside.raw"), "mine").expect("written");
        images.list("../outside.raw").expect("listed");
        clean(&dir).expect("cleaned");
        let left: Vec<_> = fs::read_dir(&dir).expect("there").collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert!(scratch.path().join("outside.raw").exists());

        fs::remove_file(dir.join("raw-1048576.raw")).expect("mine");
        images.get(Kind::Qcow2).expect("made");
        clean(&dir).expect("cleaned");
        assert!(!dir.exists());
        clean(&dir).expect("nothing to do");
    }
}
