//! What is simulated: the image, the chain, the device's options and the machine's behaviour.

use urus_engine::limits::Sizes;
use urus_engine::storage::FileId;
use urus_engine::{LayerFormat, LayerSpec, Options};
use urus_format::{Compression, Header};

use crate::contents::index;
use crate::foreign::Foreign;
use crate::image;
use crate::rng::Rng;
use crate::stamp::{Content, content, stamp_until};
use crate::workload::Load;
use crate::world::{FileSpec, SimConfig};

/// The file behind the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// None.
    None,
    /// Raw, of so many percent of the image's size.
    Raw(u64),
    /// QCOW2, of so many percent of the image's size.
    Qcow2(u64),
    /// Two of them: QCOW2 with clusters of twice the size, and QCOW2 behind that, each of so many percent of the image's size.
    Chain(u64, u64),
}

/// What the machine is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Drawn by lot for each workload.
    Any,
    /// Operations may start at once.
    Eager,
    /// Many operations are overtaken.
    Slow,
    /// Many operations take effect in two parts.
    Split,
}

/// One configuration. Everything else of a run comes from its seed.
#[derive(Clone, Debug)]
pub struct Config {
    /// For the tables.
    pub name: &'static str,
    /// The image is raw.
    pub raw: bool,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the refcount width.
    pub refcount_order: u32,
    /// Size of the virtual disk in sectors.
    pub sectors: u64,
    /// By so many sectors it may grow while it is used.
    pub grows: u64,
    /// So many in 256 clusters hold something at first.
    pub fill: u32,
    /// Some of them are compressed, so.
    pub compressed: Option<Compression>,
    /// There is an internal snapshot.
    pub snapshot: bool,
    /// The last clusters lie at this host cluster.
    pub far: Option<u64>,
    /// Who wrote it before has not closed it, and promised something that this engine does not know.
    pub left_open: bool,
    /// …and has not kept its refcounts.
    pub miscounted: bool,
    /// Another process may put another image in its place while the device is paused.
    pub swaps: bool,
    /// Another program than QEMU laid out its header and its snapshot table.
    pub foreign: Option<Foreign>,
    /// The file behind it.
    pub backing: Backing,
    /// Queues.
    pub queues: usize,
    /// Requests in flight on each, at most; drawn by lot below that.
    pub depth: usize,
    /// Budget of the mapping cache; 0: of refcounts, too, hardly anything is kept.
    pub cache_bytes: u64,
    /// Freed clusters are given back.
    pub discard: bool,
    /// The image lies on a block device.
    pub device: bool,
    /// What reads and writes have to be aligned to.
    pub alignment: u32,
    /// The file system can punch holes.
    pub punch: bool,
    /// So many in 256 times it cannot do what it said it could.
    pub unsupported: u32,
    /// What the machine is like.
    pub behaviour: Behaviour,
    /// What the guest does.
    pub load: Load,
    /// Completed writes outlive the process; it is also killed.
    pub outlives: bool,
    /// What else small images never reach.
    pub sizes: Sizes,
    /// Slices of refcounts that are kept though they are clean; none: as many as the engine keeps.
    pub refcount_slices: Option<usize>,
    /// The disk's size is drawn by lot: as said, or a sector or a cluster more or less, or some slices less.
    pub around: bool,
    /// So many bytes more than whole sectors have the raw files (24 at least, so that a stamp says whose they are, or none).
    pub odd: usize,
}

/// Versions of stamps in backing files.
const BACKING_VERSIONS: u64 = 1 << 20;
/// Versions of stamps in images that take another's place, for each.
const SWAPPED_VERSIONS: u64 = 1 << 24;
/// What stands behind the last whole sector of a raw image that has a part of one.
pub const ODD: u8 = 0x6f;
/// Versions of stamps that the workload writes.
pub const FIRST_VERSION: u64 = 1 << 32;

/// A device's files before the first request.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// The image first, then its backing files.
    pub files: Vec<FileSpec>,
    /// Which of them are raw.
    pub raw: Vec<bool>,
    /// What the guest reads.
    pub initial: Vec<Content>,
    /// What the backing file shows to the image, byte by byte.
    pub behind: Option<Vec<u8>>,
    /// The same, sector by sector.
    pub behind_contents: Option<Vec<Content>>,
    /// What the internal snapshot shows, byte by byte.
    pub snapshot: Option<Vec<u8>>,
}

impl Config {
    /// Version 3, clusters of 512 bytes, 128 KiB, everything else plain.
    #[must_use]
    pub fn small(name: &'static str) -> Self {
        Self {
            name,
            raw: false,
            cluster_bits: 9,
            version: 3,
            refcount_order: 4,
            sectors: 256,
            grows: 0,
            fill: 0,
            compressed: None,
            snapshot: false,
            far: None,
            left_open: false,
            miscounted: false,
            swaps: false,
            foreign: None,
            backing: Backing::None,
            queues: 1,
            depth: 8,
            cache_bytes: 64 << 20,
            discard: true,
            device: false,
            alignment: 1,
            punch: true,
            unsupported: 0,
            behaviour: Behaviour::Any,
            load: Load::Mixed,
            outlives: false,
            sizes: Sizes::default(),
            refcount_slices: None,
            around: false,
            odd: 0,
        }
    }

    /// What is drawn by lot for each workload, drawn.
    #[must_use]
    pub fn settled(&self, rng: &mut Rng) -> Self {
        let mut config = self.clone();
        if self.around {
            let cluster = self.cluster_sectors();
            let slice = self.sizes.slice_bytes / 8 * cluster;
            let most = (self.sectors / 2 / slice).min(2);
            let sectors = self.sectors - slice * rng.below(most + 1);
            let more = [0, 1, cluster, cluster + 1];
            let less = [1, cluster, cluster + 1];
            config.sectors = match rng.index(more.len() + less.len()) {
                drawn if drawn < more.len() => sectors + more[drawn],
                drawn => sectors - less[drawn - more.len()],
            };
        }
        config
    }

    /// Sectors of a cluster.
    #[must_use]
    pub fn cluster_sectors(&self) -> u64 {
        (1 << self.cluster_bits) / 512
    }

    fn plan(&self, size: u64) -> image::Plan {
        let mut plan = image::plan(size, self.cluster_bits, self.version, self.refcount_order);
        plan.options.compression = self.compressed.unwrap_or_default();
        plan
    }

    /// Makes the files.
    #[must_use]
    pub fn fixture(&self, rng: &mut Rng) -> Fixture {
        let (behind, backing) = self.backing(rng);
        let mut files = Vec::new();
        let mut raw = vec![self.raw];
        let contents: Vec<Content> = behind.iter().flatten().copied().collect();
        let (bytes, initial, snapshot) = if self.raw {
            let contents: Vec<Content> = (0..self.sectors)
                .map(|_| {
                    if rng.chance(self.fill) {
                        Content::Version(1)
                    } else {
                        Content::Zero
                    }
                })
                .collect();
            let mut bytes = image::bytes_of(&contents);
            bytes.extend(std::iter::repeat_n(ODD, self.odd));
            (bytes, contents, None)
        } else {
            let built = self.image(behind.as_deref(), self.sectors, 0, rng);
            let snapshot = built.snapshot.map(|contents| image::bytes_of(&contents));
            (built.bytes, built.active, snapshot)
        };
        let mut file = FileSpec::new(bytes);
        if self.device {
            // Room for what waits to be freed, and for what each queue has reserved.
            let reserved = self.queues << (self.cluster_bits + 6);
            let len = file.contents.len() + index(self.sectors * 512) * 2 + reserved;
            file = file.block_device(len.next_multiple_of(4096), 7);
        }
        if self.alignment > 1 {
            file = file.direct(self.alignment);
        }
        file.properties.can_punch &= self.punch;
        files.push(file);
        for (bytes, is_raw) in backing {
            let mut file = FileSpec::new(bytes).read_only();
            if self.alignment > 1 {
                file = file.direct(self.alignment);
            }
            files.push(file);
            raw.push(is_raw);
        }
        Fixture {
            files,
            raw,
            initial,
            behind: behind.is_some().then(|| image::bytes_of(&contents)),
            behind_contents: behind,
            snapshot,
        }
    }

    /// An image over what its backing file shows. Of several for one device each has stamps of its own.
    pub(crate) fn image(
        &self,
        behind: Option<&[Content]>,
        sectors: u64,
        number: u64,
        rng: &mut Rng,
    ) -> image::Built {
        let mut plan = self.plan(sectors * 512);
        plan.fill = self.fill;
        plan.compressed = self.compressed.is_some();
        plan.snapshot = self.snapshot;
        plan.far = self.far;
        plan.left_open = self.left_open;
        plan.foreign = self.foreign;
        plan.miscounted = self.miscounted;
        plan.first_version += number * SWAPPED_VERSIONS;
        plan.backing = behind.map(<[Content]>::to_vec);
        plan.options.backing = match self.backing {
            Backing::None => None,
            Backing::Raw(_) => Some(image::backing_name("base", "raw")),
            Backing::Qcow2(_) | Backing::Chain(..) => Some(image::backing_name("base", "qcow2")),
        };
        image::build(&plan, rng)
    }

    /// What the backing file shows, and the bytes of all that lie behind the image, each with whether it is raw.
    #[allow(clippy::type_complexity)]
    fn backing(&self, rng: &mut Rng) -> (Option<Vec<Content>>, Vec<(Vec<u8>, bool)>) {
        match self.backing {
            Backing::None => (None, Vec::new()),
            Backing::Raw(percent) => {
                let sectors = self.sectors * percent / 100;
                let contents: Vec<Content> = (0..sectors)
                    .map(|lba| {
                        if rng.chance(160) {
                            Content::Version(BACKING_VERSIONS + lba % 3)
                        } else {
                            Content::Zero
                        }
                    })
                    .collect();
                let mut bytes = image::bytes_of(&contents);
                let mut contents = contents;
                if self.odd > 0 {
                    let mut sector = vec![0; 512];
                    stamp_until(&mut sector, sectors, BACKING_VERSIONS, self.odd);
                    contents.push(content(&sector, sectors));
                    bytes.extend_from_slice(&sector[..self.odd]);
                }
                (Some(contents), vec![(bytes, true)])
            }
            Backing::Qcow2(percent) => {
                let built = self.bottom(percent, rng);
                (Some(built.active), vec![(built.bytes, false)])
            }
            Backing::Chain(middle, bottom) => {
                let bottom = self.bottom(bottom, rng);
                let mut plan = self.plan(self.sectors * middle / 100 * 512);
                plan.options.cluster_bits = (self.cluster_bits + 1).min(21);
                plan.options.backing = Some(image::backing_name("bottom", "qcow2"));
                plan.fill = 64;
                plan.first_version = 2 * BACKING_VERSIONS;
                plan.backing = Some(bottom.active);
                let middle = image::build(&plan, rng);
                let files = vec![(middle.bytes, false), (bottom.bytes, false)];
                (Some(middle.active), files)
            }
        }
    }

    fn bottom(&self, percent: u64, rng: &mut Rng) -> image::Built {
        let mut plan = self.plan(self.sectors * percent / 100 * 512);
        plan.fill = 160;
        plan.compressed = self.compressed.is_some();
        plan.first_version = BACKING_VERSIONS;
        image::build(&plan, rng)
    }

    /// The engine's options.
    #[must_use]
    pub fn options(&self) -> Options {
        let mut options = Options::default();
        options.l2_cache_bytes = self.cache_bytes;
        if self.cache_bytes == 0 {
            options.refcount_cache_slices = 2;
        }
        if let Some(slices) = self.refcount_slices {
            options.refcount_cache_slices = slices;
        }
        options.sizes = self.sizes;
        options.discard = self.discard;
        options
    }

    /// How the machine behaves.
    #[must_use]
    pub fn machine(&self, rng: &mut Rng) -> SimConfig {
        let mut config = SimConfig::random(rng);
        config.gives_back = self.discard;
        config.unsupported = self.unsupported;
        match self.behaviour {
            Behaviour::Any => {}
            Behaviour::Eager => config.eager = true,
            Behaviour::Slow => (config.slow, config.stuck) = (160, 32),
            Behaviour::Split => config.split = 200,
        }
        config
    }
}

/// The chain, from the files' bytes.
///
/// # Errors
/// What is wrong with the header.
pub fn layers(files: &[impl AsRef<[u8]>], raw: &[bool]) -> Result<Vec<LayerSpec>, String> {
    let mut layers = Vec::new();
    for ((number, bytes), raw) in (0..).zip(files).zip(raw) {
        let bytes = bytes.as_ref();
        let format = if *raw {
            LayerFormat::Raw
        } else {
            let header = Header::parse(bytes, bytes.len() as u64)
                .map_err(|error| format!("the header does not parse: {error}"))?;
            LayerFormat::Qcow2(Box::new(header))
        };
        layers.push(LayerSpec {
            file: FileId(number),
            name: format!("file {number}"),
            format,
        });
    }
    Ok(layers)
}

/// All configurations.
#[must_use]
#[allow(clippy::too_many_lines)]
pub fn all() -> Vec<Config> {
    let c = Config::small;
    let (deflate, zstd) = (Some(Compression::Deflate), Some(Compression::Zstd));
    vec![
        c("plain"),
        Config {
            queues: 2,
            ..c("two queues")
        },
        Config {
            queues: 4,
            ..c("four queues")
        },
        Config {
            queues: 3,
            fill: 200,
            behaviour: Behaviour::Slow,
            ..c("three queues, slow")
        },
        Config {
            fill: 160,
            ..c("half full")
        },
        Config {
            fill: 256,
            queues: 2,
            ..c("full")
        },
        Config {
            discard: false,
            fill: 128,
            ..c("no discard")
        },
        Config {
            punch: false,
            fill: 128,
            ..c("no punch")
        },
        Config {
            behaviour: Behaviour::Eager,
            ..c("eager")
        },
        Config {
            behaviour: Behaviour::Split,
            fill: 128,
            ..c("split")
        },
        Config {
            behaviour: Behaviour::Slow,
            fill: 128,
            ..c("slow")
        },
        Config {
            depth: 32,
            queues: 2,
            ..c("deep")
        },
        Config {
            load: Load::Churn,
            behaviour: Behaviour::Slow,
            queues: 2,
            ..c("churn")
        },
        Config {
            depth: 1,
            fill: 64,
            ..c("one at a time")
        },
        Config {
            refcount_order: 0,
            fill: 96,
            ..c("1-bit refcounts")
        },
        Config {
            refcount_order: 1,
            fill: 96,
            snapshot: true,
            ..c("2-bit, snapshot")
        },
        Config {
            refcount_order: 2,
            fill: 96,
            compressed: deflate,
            ..c("4-bit, compressed")
        },
        Config {
            refcount_order: 3,
            fill: 96,
            ..c("8-bit refcounts")
        },
        Config {
            refcount_order: 5,
            ..c("32-bit refcounts")
        },
        Config {
            refcount_order: 6,
            sectors: 512,
            ..c("64-bit refcounts")
        },
        Config {
            refcount_order: 6,
            far: Some(64 * 63),
            fill: 48,
            ..c("refcount table grows")
        },
        Config {
            refcount_order: 6,
            far: Some(64 * 62),
            fill: 16,
            queues: 2,
            sectors: 512,
            ..c("table grows, two queues")
        },
        Config {
            version: 2,
            ..c("version 2")
        },
        Config {
            version: 2,
            fill: 128,
            compressed: deflate,
            snapshot: true,
            ..c("version 2, snapshot")
        },
        Config {
            version: 2,
            fill: 64,
            backing: Backing::Raw(100),
            ..c("version 2, backed")
        },
        Config {
            snapshot: true,
            fill: 160,
            ..c("snapshot")
        },
        Config {
            snapshot: true,
            fill: 200,
            queues: 3,
            ..c("snapshot, three queues")
        },
        Config {
            snapshot: true,
            fill: 160,
            compressed: zstd,
            backing: Backing::Qcow2(100),
            ..c("snapshot, zstd, backed")
        },
        Config {
            compressed: deflate,
            fill: 200,
            ..c("compressed")
        },
        Config {
            compressed: zstd,
            fill: 200,
            queues: 2,
            ..c("zstd")
        },
        Config {
            compressed: deflate,
            fill: 220,
            cluster_bits: 12,
            sectors: 512,
            ..c("compressed, 4K")
        },
        Config {
            backing: Backing::Raw(100),
            fill: 64,
            ..c("raw backing")
        },
        Config {
            backing: Backing::Raw(60),
            fill: 32,
            queues: 2,
            ..c("short raw backing")
        },
        Config {
            backing: Backing::Qcow2(150),
            fill: 64,
            ..c("longer backing")
        },
        Config {
            backing: Backing::Qcow2(70),
            compressed: deflate,
            cluster_bits: 11,
            sectors: 512,
            ..c("compressed backing, 2K")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            ..c("tiny cache")
        },
        Config {
            cache_bytes: 0,
            sectors: 2048,
            fill: 24,
            queues: 3,
            depth: 16,
            ..c("tiny cache, three queues")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 24,
            queues: 3,
            depth: 16,
            behaviour: Behaviour::Slow,
            load: Load::Scattered,
            ..c("tiny cache, scattered")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 100,
            snapshot: true,
            ..c("tiny cache, snapshot")
        },
        Config {
            cluster_bits: 10,
            sectors: 400,
            fill: 64,
            queues: 2,
            ..c("1K")
        },
        Config {
            cluster_bits: 12,
            sectors: 1000,
            fill: 64,
            ..c("4K, odd size")
        },
        Config {
            cluster_bits: 12,
            sectors: 1024,
            backing: Backing::Qcow2(100),
            queues: 2,
            ..c("4K, backed")
        },
        Config {
            cluster_bits: 13,
            sectors: 1024,
            fill: 64,
            snapshot: true,
            ..c("8K, snapshot")
        },
        Config {
            cluster_bits: 14,
            sectors: 1024,
            fill: 64,
            ..c("16K")
        },
        Config {
            cluster_bits: 16,
            sectors: 1920,
            fill: 64,
            queues: 2,
            ..c("64K")
        },
        Config {
            alignment: 512,
            fill: 64,
            ..c("direct I/O, 512")
        },
        Config {
            alignment: 4096,
            cluster_bits: 12,
            sectors: 512,
            fill: 96,
            queues: 2,
            ..c("direct I/O, 4096")
        },
        Config {
            alignment: 4096,
            cluster_bits: 13,
            sectors: 512,
            fill: 96,
            snapshot: true,
            backing: Backing::Raw(90),
            ..c("direct I/O, 8K, backed")
        },
        Config {
            device: true,
            fill: 64,
            ..c("block device")
        },
        Config {
            device: true,
            fill: 64,
            alignment: 4096,
            cluster_bits: 12,
            sectors: 512,
            queues: 2,
            ..c("block device, direct I/O")
        },
        Config {
            outlives: true,
            fill: 64,
            queues: 2,
            ..c("outlives")
        },
        Config {
            outlives: true,
            fill: 64,
            behaviour: Behaviour::Slow,
            backing: Backing::Raw(100),
            ..c("outlives, backed, slow")
        },
        Config {
            outlives: true,
            cache_bytes: 0,
            sectors: 1600,
            fill: 100,
            snapshot: true,
            queues: 3,
            depth: 16,
            ..c("outlives, tiny cache, snapshot")
        },
        Config {
            raw: true,
            fill: 128,
            queues: 2,
            ..c("raw")
        },
        Config {
            raw: true,
            fill: 128,
            alignment: 4096,
            sectors: 512,
            ..c("raw, direct I/O")
        },
        // An L1 entry for every 64 sectors: its table moves.
        Config {
            grows: 400,
            fill: 64,
            queues: 2,
            ..c("grows")
        },
        Config {
            grows: 500,
            fill: 64,
            behaviour: Behaviour::Slow,
            backing: Backing::Raw(250),
            ..c("grows over a longer backing file")
        },
        Config {
            grows: 300,
            fill: 128,
            cluster_bits: 10,
            sectors: 333,
            snapshot: true,
            backing: Backing::Qcow2(150),
            ..c("grows, snapshot, backed, 1K")
        },
        Config {
            grows: 700,
            cache_bytes: 0,
            sectors: 1600,
            fill: 24,
            queues: 3,
            depth: 16,
            refcount_order: 6,
            ..c("grows, tiny cache, 64-bit refcounts")
        },
        Config {
            grows: 300,
            fill: 64,
            version: 2,
            ..c("grows, version 2")
        },
        Config {
            grows: 300,
            fill: 64,
            queues: 2,
            outlives: true,
            ..c("grows, outlives")
        },
        Config {
            grows: 300,
            raw: true,
            fill: 128,
            queues: 2,
            ..c("grows, raw")
        },
        // What compressed clusters leave behind is freed here, too, and not given back.
        Config {
            discard: false,
            fill: 200,
            compressed: deflate,
            ..c("no discard, compressed")
        },
        Config {
            backing: Backing::Chain(100, 130),
            fill: 48,
            queues: 2,
            ..c("chain")
        },
        Config {
            backing: Backing::Chain(55, 90),
            fill: 32,
            cache_bytes: 0,
            compressed: zstd,
            cluster_bits: 10,
            sectors: 512,
            ..c("chain, short middle, tiny cache")
        },
        Config {
            backing: Backing::Chain(71, 160),
            fill: 32,
            cluster_bits: 12,
            sectors: 512,
            grows: 200,
            ..c("chain, grows")
        },
        Config {
            left_open: true,
            fill: 128,
            queues: 2,
            ..c("left open")
        },
        // Counted to its end: a larger L1 table is put between what is in use.
        Config {
            device: true,
            grows: 400,
            fill: 64,
            queues: 2,
            ..c("block device, grows")
        },
    ]
    .into_iter()
    .chain(asked())
    .chain(swapped())
    .chain(miscounted())
    .chain(unsupported())
    .chain(large_in_small())
    .chain(odd_sizes())
    .chain(foreign())
    .collect()
}

/// What a block status says: much is asked of images that hold all kinds of clusters.
fn asked() -> Vec<Config> {
    let c = |name| Config {
        load: Load::Asked,
        fill: 128,
        queues: 2,
        ..Config::small(name)
    };
    let (deflate, zstd) = (Some(Compression::Deflate), Some(Compression::Zstd));
    vec![
        Config {
            compressed: deflate,
            snapshot: true,
            ..c("asked")
        },
        Config {
            backing: Backing::Raw(60),
            fill: 64,
            ..c("asked, short raw backing")
        },
        Config {
            backing: Backing::Qcow2(70),
            version: 2,
            fill: 48,
            ..c("asked, version 2, backed")
        },
        Config {
            backing: Backing::Chain(71, 130),
            fill: 48,
            compressed: zstd,
            cluster_bits: 11,
            sectors: 512,
            ..c("asked, chain")
        },
        Config {
            backing: Backing::Qcow2(80),
            fill: 32,
            cache_bytes: 0,
            sectors: 1600,
            grows: 300,
            ..c("asked, tiny cache, grows")
        },
        Config {
            raw: true,
            ..c("asked, raw")
        },
    ]
}

/// Another process puts another image in the place of this one while the device is paused.
fn swapped() -> Vec<Config> {
    let c = |name| Config {
        swaps: true,
        fill: 128,
        queues: 2,
        ..Config::small(name)
    };
    let (deflate, zstd) = (Some(Compression::Deflate), Some(Compression::Zstd));
    vec![
        Config {
            compressed: deflate,
            ..c("swapped")
        },
        Config {
            compressed: zstd,
            snapshot: true,
            fill: 200,
            backing: Backing::Raw(80),
            ..c("swapped, snapshot, zstd, backed")
        },
        // Reads of parts of clusters, which are decoded for later.
        Config {
            compressed: deflate,
            fill: 220,
            cluster_bits: 12,
            sectors: 512,
            load: Load::Scattered,
            ..c("swapped, compressed, 4K")
        },
        Config {
            backing: Backing::Chain(71, 130),
            compressed: deflate,
            fill: 64,
            cluster_bits: 10,
            sectors: 512,
            ..c("swapped, chain")
        },
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 64,
            refcount_order: 6,
            grows: 400,
            queues: 3,
            ..c("swapped, tiny cache, grows")
        },
        Config {
            left_open: true,
            miscounted: true,
            ..c("swapped, miscounted")
        },
        Config {
            device: true,
            fill: 64,
            ..c("swapped, block device")
        },
    ]
}

/// A file system that cannot do what its files were said to be able to, or not always.
fn unsupported() -> Vec<Config> {
    let c = |name| Config {
        unsupported: 256,
        fill: 128,
        cluster_bits: 10,
        ..Config::small(name)
    };
    vec![
        c("nothing supported"),
        Config {
            unsupported: 100,
            load: Load::Churn,
            queues: 2,
            cluster_bits: 11,
            ..c("sometimes supported, churn")
        },
        Config {
            raw: true,
            ..c("raw, nothing supported")
        },
    ]
}

/// Whoever wrote the image before did not keep its refcounts, and was stopped: it is repaired when it opens.
fn miscounted() -> Vec<Config> {
    let c = |name| Config {
        left_open: true,
        miscounted: true,
        fill: 128,
        ..Config::small(name)
    };
    let deflate = Some(Compression::Deflate);
    vec![
        c("miscounted"),
        Config {
            cache_bytes: 0,
            sectors: 1600,
            fill: 64,
            refcount_order: 6,
            queues: 3,
            load: Load::Churn,
            ..c("miscounted, tiny cache, 64-bit refcounts")
        },
        Config {
            compressed: deflate,
            snapshot: true,
            fill: 160,
            ..c("miscounted, compressed, snapshot")
        },
        Config {
            refcount_order: 0,
            fill: 96,
            ..c("miscounted, 1-bit refcounts")
        },
    ]
}

/// Every size of the engine so small that a small disk is as large for it as any.
pub const TINY: Sizes = Sizes {
    slice_bytes: 128,
    refcount_slice_bytes: 128,
    min_frames: 8,
    near_tables: 2,
    scan_slices: 3,
    run_clusters: 6,
    run_bytes: 1 << 20,
    grow_bytes_min: 2048,
    grow_bytes_max: 8192,
    pending_frees: 6,
    decoded_bytes: 1536,
    zero_step_clusters: 5,
    write_step_clusters: 4,
    zero_buffer_bytes: 1024,
    zero_range_from_bytes: 512,
    status_extents: 3,
    skips: 8,
    table_unit_bytes: 64,
    dirty_slices: 12,
    pending_changes: 16,
    parts_at_once: 3,
    commit_window_bytes: 4096,
    joined_bytes: 256,
    settle_step_clusters: 3,
};

/// What only large images have: tables of many slices, L1 tables of many sectors, refcount blocks larger than their cache, caches that have
/// grown past their bound.
fn large_in_small() -> Vec<Config> {
    let c = |name| Config {
        sizes: TINY,
        cache_bytes: 8192,
        refcount_slices: Some(3),
        ..Config::small(name)
    };
    let slices = |bytes, refcounts| Sizes {
        slice_bytes: bytes,
        refcount_slice_bytes: refcounts,
        ..Sizes::default()
    };
    vec![
        // What found fastest when bugs were planted by hand.
        Config {
            load: Load::Churn,
            behaviour: Behaviour::Slow,
            queues: 3,
            sectors: 24,
            ..Config::small("churn, slow, three queues, 24 sectors")
        },
        Config {
            load: Load::Churn,
            behaviour: Behaviour::Slow,
            queues: 3,
            sectors: 40,
            sizes: slices(64, 64),
            ..c("slices, churn, 40 sectors")
        },
        Config {
            fill: 96,
            queues: 2,
            sizes: slices(128, 128),
            ..c("slices")
        },
        Config {
            fill: 64,
            queues: 3,
            depth: 16,
            sectors: 640,
            cache_bytes: 0,
            refcount_slices: Some(1),
            behaviour: Behaviour::Slow,
            load: Load::Scattered,
            ..c("slices, tiny cache, scattered")
        },
        Config {
            fill: 160,
            snapshot: true,
            queues: 2,
            cache_bytes: 0,
            ..c("slices, snapshot")
        },
        Config {
            fill: 100,
            queues: 2,
            refcount_order: 6,
            refcount_slices: Some(1),
            far: Some(64 * 8 - 12),
            sectors: 640,
            sizes: Sizes {
                slice_bytes: 64,
                refcount_slice_bytes: 64,
                ..TINY
            },
            ..c("slices of 64 bytes, 64-bit refcounts")
        },
        // Each write reserves, and each frees: so the allocator, the settler and commits want slices of refcounts at once.
        Config {
            fill: 200,
            queues: 3,
            refcount_order: 6,
            refcount_slices: Some(1),
            sectors: 96,
            sizes: Sizes {
                run_clusters: 1,
                pending_frees: 3,
                ..slices(512, 64)
            },
            behaviour: Behaviour::Slow,
            load: Load::Churn,
            ..c("refcount blocks larger than their cache")
        },
        Config {
            fill: 128,
            queues: 3,
            depth: 16,
            refcount_order: 6,
            refcount_slices: Some(1),
            sectors: 256,
            sizes: Sizes {
                run_clusters: 1,
                pending_frees: 2,
                ..slices(512, 64)
            },
            behaviour: Behaviour::Slow,
            load: Load::Scattered,
            ..c("refcount blocks larger than their cache, scattered")
        },
        Config {
            fill: 6,
            queues: 2,
            sectors: 1280,
            load: Load::Scattered,
            cache_bytes: 1 << 20,
            sizes: Sizes {
                table_unit_bytes: 64,
                ..slices(128, 4096)
            },
            ..c("small units of L1")
        },
        Config {
            fill: 3,
            queues: 2,
            sectors: 66 * 64,
            load: Load::Scattered,
            ..Config::small("two sectors of L1")
        },
        Config {
            fill: 12,
            sectors: 65 * 64 + 10,
            grows: 300,
            cache_bytes: 0,
            sizes: slices(128, 128),
            ..c("grows beyond a sector of L1")
        },
        Config {
            fill: 64,
            queues: 2,
            grows: 300,
            ..c("slices, grows")
        },
        Config {
            fill: 64,
            queues: 2,
            outlives: true,
            ..c("slices, outlives")
        },
        Config {
            fill: 220,
            queues: 2,
            compressed: Some(Compression::Zstd),
            ..c("small steps, compressed")
        },
        Config {
            fill: 128,
            cluster_bits: 12,
            sectors: 1024,
            queues: 2,
            sizes: Sizes {
                slice_bytes: 512,
                refcount_slice_bytes: 512,
                run_bytes: 16 << 10,
                ..TINY
            },
            alignment: 512,
            ..c("slices, 4K, direct I/O")
        },
        Config {
            fill: 48,
            queues: 2,
            cache_bytes: 0,
            backing: Backing::Chain(100, 70),
            ..c("slices, chain")
        },
        Config {
            fill: 64,
            queues: 2,
            device: true,
            discard: false,
            ..c("slices, block device")
        },
        Config {
            fill: 96,
            version: 2,
            snapshot: true,
            compressed: Some(Compression::Deflate),
            refcount_slices: Some(1),
            ..c("slices, version 2")
        },
    ]
}

/// Disks and raw files that end where nobody expects it: just before or behind the border of a slice, a table, a cluster or a sector.
fn odd_sizes() -> Vec<Config> {
    let c = |name| Config {
        around: true,
        ..Config::small(name)
    };
    let slices = Sizes {
        slice_bytes: 128,
        refcount_slice_bytes: 128,
        ..Sizes::default()
    };
    vec![
        Config {
            fill: 96,
            queues: 2,
            sizes: slices,
            ..c("ends at borders")
        },
        Config {
            fill: 96,
            cluster_bits: 10,
            sectors: 256,
            queues: 2,
            sizes: slices,
            backing: Backing::Qcow2(130),
            ..c("ends at borders, 1K, backed")
        },
        Config {
            fill: 96,
            cluster_bits: 12,
            sectors: 384,
            sizes: Sizes {
                slice_bytes: 64,
                ..slices
            },
            snapshot: true,
            ..c("ends at borders, 4K, snapshot")
        },
        Config {
            fill: 64,
            cluster_bits: 12,
            sectors: 512,
            alignment: 512,
            sizes: Sizes {
                slice_bytes: 512,
                ..slices
            },
            backing: Backing::Raw(73),
            odd: 488,
            ..c("ends in a cluster, odd raw backing, direct I/O")
        },
        Config {
            fill: 48,
            cluster_bits: 11,
            backing: Backing::Raw(90),
            odd: 100,
            queues: 2,
            sizes: slices,
            ..c("ends in a cluster, odd raw backing")
        },
        Config {
            fill: 64,
            cluster_bits: 12,
            compressed: Some(Compression::Deflate),
            version: 2,
            sizes: slices,
            ..c("ends in a cluster, version 2")
        },
        Config {
            fill: 128,
            raw: true,
            odd: 300,
            queues: 2,
            ..Config::small("raw, odd")
        },
        Config {
            fill: 128,
            raw: true,
            odd: 300,
            alignment: 512,
            ..Config::small("raw, odd, direct I/O")
        },
        Config {
            fill: 64,
            cluster_bits: 12,
            sectors: 335,
            grows: 150,
            backing: Backing::Raw(80),
            odd: 24,
            sizes: slices,
            ..Config::small("grows in a cluster over odd raw backing")
        },
    ]
}

/// Headers of other programs: every byte but the changed fields has to stay (O28).
fn foreign() -> Vec<Config> {
    let c = Config::small;
    vec![
        Config {
            foreign: Some(Foreign::NameFurtherBack),
            backing: Backing::Raw(100),
            grows: 400,
            fill: 64,
            queues: 2,
            ..c("foreign, name further back, grows")
        },
        Config {
            foreign: Some(Foreign::NoEndMarker),
            version: 2,
            backing: Backing::Qcow2(100),
            grows: 300,
            fill: 64,
            ..c("foreign, no end marker, version 2, grows")
        },
        Config {
            foreign: Some(Foreign::UnknownFirst),
            left_open: true,
            backing: Backing::Raw(100),
            grows: 300,
            fill: 128,
            ..c("foreign, unknown extension, left open, grows")
        },
        Config {
            foreign: Some(Foreign::LongName),
            cluster_bits: 10,
            sectors: 333,
            snapshot: true,
            backing: Backing::Qcow2(150),
            grows: 300,
            fill: 128,
            ..c("foreign, long name, snapshot, 1K, grows")
        },
        Config {
            foreign: Some(Foreign::NameFurtherBack),
            refcount_order: 6,
            far: Some(64 * 63),
            backing: Backing::Raw(100),
            grows: 300,
            fill: 48,
            ..c("foreign, refcount table grows")
        },
        Config {
            foreign: Some(Foreign::NoEndMarker),
            snapshot: true,
            backing: Backing::Raw(70),
            fill: 160,
            ..c("foreign, snapshot")
        },
        Config {
            foreign: Some(Foreign::UnknownFirst),
            alignment: 4096,
            cluster_bits: 12,
            sectors: 512,
            backing: Backing::Raw(90),
            grows: 12_000,
            fill: 64,
            ..c("foreign, direct I/O, 4096, grows")
        },
    ]
}

/// The configuration with this name or number.
#[must_use]
pub fn find(name: &str) -> Option<Config> {
    let by_number = name.parse::<usize>().ok();
    (0..)
        .zip(all())
        .find(|(number, config)| config.name == name || Some(*number) == by_number)
        .map(|(_, config)| config)
}
