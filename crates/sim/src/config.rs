//! What is simulated: the image, the chain, the device's options and the machine's behaviour.

use std::sync::Arc;

use urus_engine::check::Repair;
use urus_engine::limits::Sizes;
use urus_engine::storage::FileId;
use urus_engine::{LayerFormat, LayerSpec, Options};
use urus_format::{Compression, Header};

use crate::cipher::Xor;
pub use crate::configurations::{TINY, all, find, mix, small_sizes};
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
    /// Its data passes a [`cipher`](crate::cipher) between the guest and the file.
    pub ciphered: bool,
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
    /// The process is killed now and then, and another goes on before the power fails.
    pub dies: bool,
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
            ciphered: false,
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
            dies: false,
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
        plan.ciphered = self.ciphered;
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
        if self.ciphered {
            options.hooks.transform = Some(Arc::new(Xor));
        }
        options
    }

    /// The same for somebody who wants leaked clusters back.
    #[must_use]
    pub fn repairing(&self) -> Options {
        let mut options = self.options();
        options.repair = Repair::Leaks;
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
