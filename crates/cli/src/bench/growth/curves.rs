//! The curves, and the points of each.

use std::time::Duration;

use urus::{Device, OpenOptions};

use super::super::control::evict;
use super::super::wide::{SLICE_SPAN, slices};
use super::images::{CLUSTER_BYTES, GrowthImages};
use super::slice::{Slice, Work};
use crate::failure::Failure;
use crate::size::human;

/// Bytes of the map of one slice.
const SLICE_BYTES: u64 = 4 << 10;
/// More than any of these maps needs, where the budget is not what is looked at.
const AMPLE_BYTES: u64 = 256 << 20;
/// Of random requests.
const BLOCK_BYTES: u64 = 4 << 10;
/// Of requests one after the other.
const LARGE_BYTES: u64 = 1 << 20;
const LARGE_DEPTH: u32 = 4;
/// Writes into an empty image, and after how many of them it is flushed.
const ALLOCATIONS: u64 = 2048;
const FLUSH_EVERY: u64 = 256;

/// A curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Curve {
    QueuesRead,
    QueuesOverwrite,
    Chain,
    Size,
    Fragmentation,
    FragmentationLoaded,
    Cache,
    ClusterRead,
    ClusterAllocate,
    Preallocation,
}

impl Curve {
    pub(super) const ALL: [Self; 10] = [
        Self::QueuesRead,
        Self::QueuesOverwrite,
        Self::Chain,
        Self::Size,
        Self::Fragmentation,
        Self::FragmentationLoaded,
        Self::Cache,
        Self::ClusterRead,
        Self::ClusterAllocate,
        Self::Preallocation,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::QueuesRead => "queues_read",
            Self::QueuesOverwrite => "queues_overwrite",
            Self::Chain => "chain",
            Self::Size => "size",
            Self::Fragmentation => "fragmentation",
            Self::FragmentationLoaded => "fragmentation_loaded",
            Self::Cache => "cache",
            Self::ClusterRead => "cluster_read",
            Self::ClusterAllocate => "cluster_allocate",
            Self::Preallocation => "preallocation",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::QueuesRead => "random reads of 4 KiB",
            Self::QueuesOverwrite => "random writes of 4 KiB over data",
            Self::Chain => "random reads of 4 KiB from the lowest layer of a chain",
            Self::Size => "random reads of 4 KiB from all over the disk, default cache (64 MiB)",
            Self::Fragmentation => "reads of 1 MiB one after the other, 4 in flight",
            Self::FragmentationLoaded => {
                "the same, where the page cache was filled by reading the file from front to back"
            }
            Self::Cache => {
                "random reads of 4 KiB from all over a disk whose map is larger than the cache"
            }
            Self::ClusterRead => "random reads of 4 KiB",
            Self::ClusterAllocate | Self::Preallocation => {
                "2048 random writes of 4 KiB into an empty image, a flush every 256"
            }
        }
    }

    pub(super) fn axis(self) -> &'static str {
        match self {
            Self::QueuesRead | Self::QueuesOverwrite => "queues",
            Self::Chain => "layers",
            Self::Size => "size of the disk",
            Self::Fragmentation | Self::FragmentationLoaded => "side by side",
            Self::Cache => "part of the map",
            Self::ClusterRead | Self::ClusterAllocate => "cluster size",
            Self::Preallocation => "preallocation",
        }
    }

    /// The points, each with its device open. The first is what the others are relative to.
    pub(super) fn points<'a>(
        self,
        images: &'a GrowthImages,
        depth: u32,
    ) -> Result<Vec<Point<'a>>, Failure> {
        let random = Work {
            bytes: usize::try_from(BLOCK_BYTES).expect("4 KiB"),
            writes: false,
            stride: BLOCK_BYTES,
            count: images.size / BLOCK_BYTES,
            in_order: false,
            depth,
            queues: 1,
            flush_every: 0,
            most: u64::MAX,
        };
        let allocating = Work {
            writes: true,
            flush_every: FLUSH_EVERY,
            most: ALLOCATIONS,
            ..random
        };
        let open = |path: std::path::PathBuf, cache_bytes: u64, writes: bool| {
            OpenOptions::new()
                .read_only(!writes)
                .queue_depth(depth)
                .l2_cache_bytes(cache_bytes)
                .open(path)
                .map(Subject::Open)
                .map_err(Failure::from)
        };
        let mut points = Vec::new();
        let mut add = |name: String, subject: Subject<'a>, work: Work| {
            points.push(Point {
                name,
                subject,
                work,
                loaded: self == Self::FragmentationLoaded,
            });
        };
        match self {
            Self::QueuesRead | Self::QueuesOverwrite => {
                let writes = self == Self::QueuesOverwrite;
                let path = if writes {
                    images.overwritten()?
                } else {
                    images.in_order(CLUSTER_BYTES)?
                };
                let image = open(path, AMPLE_BYTES, writes)?;
                for queues in [1, 2, 4] {
                    let work = Work {
                        queues,
                        writes,
                        ..random
                    };
                    add(queues.to_string(), image.again(), work);
                }
            }
            Self::Chain => {
                for layers in [1, 2, 5, 10, 20, 30] {
                    let image = open(images.chain(layers)?, AMPLE_BYTES, false)?;
                    add(layers.to_string(), image, random);
                }
            }
            Self::Size => {
                for factor in [1, 16, 256, 1024, 4096, 16384] {
                    let size = images.size.max(SLICE_SPAN) * factor;
                    let image = open(images.wide(size)?, DEFAULT_CACHE_BYTES, false)?;
                    add(human(size), image, scattered(random, size));
                }
            }
            Self::Fragmentation | Self::FragmentationLoaded => {
                let large = Work {
                    bytes: usize::try_from(LARGE_BYTES).expect("1 MiB"),
                    stride: LARGE_BYTES,
                    count: images.size / LARGE_BYTES,
                    in_order: true,
                    depth: LARGE_DEPTH.min(depth),
                    ..random
                };
                let image = open(images.in_order(CLUSTER_BYTES)?, AMPLE_BYTES, false)?;
                add("all".to_owned(), image, large);
                for run_bytes in [16, 4, 2, 1].map(|clusters| clusters * CLUSTER_BYTES) {
                    let image = open(images.shuffled(run_bytes)?, AMPLE_BYTES, false)?;
                    add(human(run_bytes), image, large);
                }
            }
            Self::Cache => {
                let size = images.size.max(SLICE_SPAN) * 1024;
                for part in [1, 2, 4, 8, 16, 32] {
                    let budget = (slices(size) * SLICE_BYTES).div_ceil(part);
                    let image = open(images.wide(size)?, budget, false)?;
                    let name = if part == 1 {
                        "all".to_owned()
                    } else {
                        format!("1/{part}")
                    };
                    add(
                        format!("{name} ({})", human(budget)),
                        image,
                        scattered(random, size),
                    );
                }
            }
            Self::ClusterRead => {
                for cluster_bytes in CLUSTERS {
                    let image = open(images.in_order(cluster_bytes)?, AMPLE_BYTES, false)?;
                    add(human(cluster_bytes), image, random);
                }
            }
            Self::ClusterAllocate => {
                for cluster_bytes in CLUSTERS {
                    let made = Empty::OfClusters(cluster_bytes);
                    add(
                        human(cluster_bytes),
                        Subject::Empty(images, made),
                        allocating,
                    );
                }
            }
            Self::Preallocation => {
                for mode in ["off", "metadata", "falloc"] {
                    let made = Empty::Preallocated(mode);
                    add(mode.to_owned(), Subject::Empty(images, made), allocating);
                }
            }
        }
        Ok(points)
    }
}

/// The first is the usual one.
const CLUSTERS: [u64; 5] = [64 << 10, 4 << 10, 16 << 10, 256 << 10, 2 << 20];
const DEFAULT_CACHE_BYTES: u64 = 64 << 20;
/// Blocks of a wide image that are read: 512 MiB of the page cache, and eight times as many as the default cache holds slices.
const BLOCKS: u64 = 1 << 17;

/// Reads from all over the disk, of as many different blocks whatever its size: so the data costs the same at each point, and what is
/// left is the map's.
fn scattered(random: Work, size: u64) -> Work {
    let count = BLOCKS.min(size / BLOCK_BYTES);
    Work {
        stride: size / count,
        count,
        ..random
    }
}

/// What is under load.
enum Subject<'a> {
    Open(Device),
    /// An empty image, made anew for each slice.
    Empty(&'a GrowthImages, Empty),
}

/// How an empty image is made.
#[derive(Clone, Copy)]
enum Empty {
    /// By urus, with clusters of so many bytes.
    OfClusters(u64),
    /// By qemu-img, with so much set aside.
    Preallocated(&'static str),
}

impl Subject<'_> {
    /// The same device once more.
    fn again(&self) -> Self {
        match self {
            Self::Open(device) => Self::Open(device.clone()),
            Self::Empty(images, made) => Self::Empty(images, *made),
        }
    }
}

/// A point of a curve.
pub(super) struct Point<'a> {
    pub(super) name: String,
    subject: Subject<'a>,
    work: Work,
    /// The page cache has the files as they lie, not as the guest reads them.
    loaded: bool,
}

impl Point<'_> {
    /// Everything that slices will ask for, once: into the page cache, and as far as it goes into the engine's. What lies in the page cache
    /// from before goes first: its pages would be as somebody else's requests have made them.
    pub(super) fn warm(&self) -> Result<(), Failure> {
        let Subject::Open(device) = &self.subject else {
            return Ok(());
        };
        for layer in device.layers() {
            let fail = |error| Failure::new(format!("{}: {error}", layer.path.display()));
            let mut file = std::fs::File::open(&layer.path).map_err(fail)?;
            // A disk that cannot be synced shows in the figures.
            let _ = file.sync_all();
            evict(&file);
            if self.loaded {
                std::io::copy(&mut file, &mut std::io::sink()).map_err(fail)?;
            }
        }
        let all = Work {
            writes: false,
            in_order: true,
            most: self.work.count,
            queues: 1,
            ..self.work
        };
        all.run(device, 0, Duration::MAX)?;
        Ok(())
    }

    pub(super) fn slice(&self, seed: u64, time: Duration) -> Result<Slice, Failure> {
        match &self.subject {
            Subject::Open(device) => self.work.run(device, seed, time),
            Subject::Empty(images, made) => {
                let path = match made {
                    Empty::OfClusters(bytes) => images.empty(*bytes)?,
                    Empty::Preallocated(mode) => images.preallocated(mode)?,
                };
                let device = OpenOptions::new().queue_depth(self.work.depth).open(path)?;
                let slice = self.work.run(&device, seed, Duration::MAX)?;
                device.close()?;
                Ok(slice)
            }
        }
    }
}
