//! The images of the curves: filled in an order of clusters, stacked, or wide.

use std::path::{Path, PathBuf};
use std::process::Command;

use urus::{CreateOptions, Format, OpenOptions};

use super::super::images::{Images, Missing, run_qemu_img};
use super::super::wide::{self, SLICE_SPAN};
use crate::failure::Failure;

/// Bytes written at once where clusters are smaller.
const STEP_BYTES: u64 = 1 << 20;
pub(super) const CLUSTER_BYTES: u64 = 64 << 10;

/// The directory with them.
pub(super) struct GrowthImages {
    images: Images,
    pub(super) size: u64,
}

impl GrowthImages {
    pub(super) fn in_dir(dir: &Path, size: u64) -> Result<Self, Failure> {
        let images = Images::in_dir(dir, size)?;
        Ok(Self { images, size })
    }

    /// A full image whose clusters lie in the file in the order of the disk.
    pub(super) fn in_order(&self, cluster_bytes: u64) -> Result<PathBuf, Failure> {
        let name = format!("order-{cluster_bytes}-{}.qcow2", self.size);
        self.made(&name, |path| {
            self.fill(path, cluster_bytes, STEP_BYTES.max(cluster_bytes), |n, _| n)
        })
    }

    /// The same for tests that write over it.
    pub(super) fn overwritten(&self) -> Result<PathBuf, Failure> {
        let name = format!("overwritten-growth-{}.qcow2", self.size);
        self.made(&name, |path| {
            self.fill(path, CLUSTER_BYTES, STEP_BYTES, |n, _| n)
        })
    }

    /// The same with runs of so many bytes that lie side by side, each run somewhere else.
    pub(super) fn shuffled(&self, run_bytes: u64) -> Result<PathBuf, Failure> {
        let name = format!("shuffled-{run_bytes}-{}.qcow2", self.size);
        self.made(&name, |path| {
            // Odd, so that it meets all of a power of two.
            let step = |count: u64| (count * 5 / 8) | 1;
            self.fill(path, CLUSTER_BYTES, run_bytes, |number, count| {
                number * step(count) % count
            })
        })
    }

    /// The top of so many layers. All data lies in the lowest; each of the others has one cluster in each slice, so that each is asked.
    pub(super) fn chain(&self, layers: u64) -> Result<PathBuf, Failure> {
        let mut below = self.in_order(CLUSTER_BYTES)?;
        for layer in 1..layers {
            let name = format!("layer{layer}-{}.qcow2", self.size);
            below = self.made(&name, |path| {
                let name = below.file_name().expect("we named it");
                urus::create(path, CreateOptions::new().backing(name, Format::Qcow2))?;
                let image = OpenOptions::new().open(path)?;
                let mut io = image.blocking()?;
                let cluster = vec![b'l'; usize::try_from(CLUSTER_BYTES).expect("64 KiB")];
                for place in 0..self.size.div_ceil(SLICE_SPAN) {
                    io.write_at(&cluster, place * SLICE_SPAN + layer * CLUSTER_BYTES)?;
                }
                drop(io);
                Ok(image.close()?)
            })?;
        }
        Ok(below)
    }

    /// A disk of any size with every slice of its map, over a raw file that is one hole: so each read asks the map, and then reads from
    /// a file.
    pub(super) fn wide(&self, size: u64) -> Result<PathBuf, Failure> {
        wide::over_hole(&self.images, size).map_err(reason)
    }

    /// A new and empty image, in place of the last one.
    pub(super) fn empty(&self, cluster_bytes: u64) -> Result<PathBuf, Failure> {
        let path = self.made(&format!("grown-{}.qcow2", self.size), |path| {
            Ok(urus::create(path, CreateOptions::new().size(self.size))?)
        })?;
        let mut options = CreateOptions::new();
        options
            .size(self.size)
            .cluster_bytes(cluster_bytes)
            .overwrite(true);
        urus::create(&path, &options)?;
        Ok(path)
    }

    /// The same, made by qemu-img with some of it set aside; on disk before it is used.
    pub(super) fn preallocated(&self, mode: &str) -> Result<PathBuf, Failure> {
        let path = self.empty(CLUSTER_BYTES)?;
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-o"]);
        command
            .arg(format!("preallocation={mode}"))
            .arg(&path)
            .arg(self.size.to_string());
        run_qemu_img(&mut command, &path).map_err(reason)?;
        let synced = std::fs::File::open(&path).and_then(|file| file.sync_all());
        synced.map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        Ok(path)
    }

    /// Fills an image by pieces, of which the `n`th that is written is number `order(n, count)` of the disk.
    fn fill(
        &self,
        path: &Path,
        cluster_bytes: u64,
        piece_bytes: u64,
        order: impl Fn(u64, u64) -> u64,
    ) -> Result<(), Failure> {
        let mut options = CreateOptions::new();
        options.size(self.size).cluster_bytes(cluster_bytes);
        urus::create(path, &options)?;
        let image = OpenOptions::new().open(path)?;
        let mut io = image.blocking()?;
        let piece = vec![b'f'; usize::try_from(piece_bytes).expect("a few MiB")];
        let count = self.size / piece_bytes;
        for number in 0..count {
            io.write_at(&piece, order(number, count) * piece_bytes)?;
        }
        drop(io);
        Ok(image.close()?)
    }

    fn made(
        &self,
        name: &str,
        make: impl FnOnce(&Path) -> Result<(), Failure>,
    ) -> Result<PathBuf, Failure> {
        let made = self.images.made(name, self.size, |path| Ok(make(path)?));
        made.map_err(reason)
    }
}

/// A program that is missing is a failure, too.
fn reason(missing: Missing) -> Failure {
    match missing {
        Missing::Failed(failure) => failure,
        Missing::Program(why) => Failure::new(why),
    }
}

#[cfg(test)]
mod tests {
    //! Guards the images: that what is called shuffled is, and that every place of them holds data.
    use super::*;

    const SIZE: u64 = 16 << 20;

    fn host_of(path: &Path) -> Vec<u64> {
        let image = OpenOptions::new()
            .read_only(true)
            .open(path)
            .expect("opens");
        let mut io = image.blocking().expect("a queue");
        let host = |cluster| {
            let extents = io.block_status(cluster * CLUSTER_BYTES, CLUSTER_BYTES);
            extents.expect("told")[0].host.expect("data")
        };
        (0..SIZE / CLUSTER_BYTES).map(host).collect()
    }

    #[test]
    fn images_lie_in_the_order_that_they_are_named_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let images = GrowthImages::in_dir(&dir.path().join("images"), SIZE).expect("made");
        let neighbours = |hosts: &[u64]| {
            let side_by_side = |pair: &&[u64]| pair[0] + CLUSTER_BYTES == pair[1];
            hosts.windows(2).filter(side_by_side).count()
        };
        let ordered = host_of(&images.in_order(CLUSTER_BYTES).expect("made"));
        assert!(neighbours(&ordered) >= ordered.len() - 8);
        let shuffled = host_of(&images.shuffled(CLUSTER_BYTES).expect("made"));
        assert!(neighbours(&shuffled) < 8, "{}", neighbours(&shuffled));
        let runs = host_of(&images.shuffled(4 * CLUSTER_BYTES).expect("made"));
        let share = neighbours(&runs) * 4 / runs.len();
        assert!((2..=3).contains(&share), "{}", neighbours(&runs));
    }

    #[test]
    fn chains_are_as_deep_as_they_are_named_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let images = GrowthImages::in_dir(&dir.path().join("images"), SIZE).expect("made");
        let top = images.chain(4).expect("made");
        let image = OpenOptions::new().read_only(true).open(top).expect("opens");
        assert_eq!(image.layers().len(), 4);
        let mut io = image.blocking().expect("a queue");
        let depth = |cluster: u64, io: &mut urus::BlockingIo| {
            let extents = io.block_status(cluster * CLUSTER_BYTES, CLUSTER_BYTES);
            extents.expect("told")[0].depth
        };
        let depths: Vec<u32> = (0..5).map(|cluster| depth(cluster, &mut io)).collect();
        assert_eq!(depths, [3, 2, 1, 0, 3]);
    }
}
