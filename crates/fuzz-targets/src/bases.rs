//! Valid images to start from. An input names one by its number, so that corpus entries stay tiny. New ones are
//! added at the end: the numbers stand in the corpora.

use std::cell::OnceCell;
use std::rc::Rc;

use urus_engine::check::Repair;
use urus_engine::check_image;
use urus_format::{Compression, Header, create};
use urus_sim::config::{self, Backing, Config, Fixture};
use urus_sim::rng::Rng;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};
use urus_sim::{checker, image};

/// A valid image, and what lies behind it.
#[derive(Debug)]
pub struct Base {
    /// For messages.
    pub name: &'static str,
    /// The files: the image first. Their properties say how the image lies on its disk.
    pub files: Vec<FileSpec>,
    /// What the backing file shows, where there is one.
    pub behind: Option<Vec<u8>>,
    /// The backing file is raw.
    pub raw_behind: bool,
    /// Budget of the mapping cache.
    pub cache_bytes: u64,
    /// Freed clusters are given back.
    pub discard: bool,
}

/// Numbers of bases that an input can give; those that are free yet stand for the first ones.
const NUMBERS: usize = 64;
/// Configurations of the simulator that are bases: the first ones. What it has got since would move
/// the numbers of those behind them, and there are no more numbers.
const CONFIGURATIONS: usize = 61;

thread_local! {
    static BASES: OnceCell<Vec<Rc<Base>>> = const { OnceCell::new() };
}

/// Makes them all, so that no input pays for it.
///
/// # Panics
/// Where one of them is not clean.
pub fn prepare() {
    for number in 0..=u8::MAX {
        let _ = base(number);
    }
}

/// The base of this number.
#[must_use]
pub fn base(number: u8) -> Rc<Base> {
    BASES.with(|bases| {
        let bases = bases.get_or_init(build);
        let number = usize::from(number) % NUMBERS;
        Rc::clone(&bases[number % bases.len()])
    })
}

fn build() -> Vec<Rc<Base>> {
    let mut bases: Vec<Base> = config::all()
        .iter()
        .filter(|config| !config.raw && !matches!(config.backing, Backing::Chain(..)))
        .take(CONFIGURATIONS)
        .map(of_config)
        .collect();
    bases.push(large_clusters());
    bases.push(large_disk());
    bases.push(with_bitmaps());
    assert!(bases.len() <= NUMBERS, "more bases than numbers");
    for base in &bases {
        let report = checker::check(&base.files[0].contents);
        assert!(
            report.is_clean(),
            "{}: {:?} {:?}",
            base.name,
            report.violations,
            report.leaks
        );
    }
    bases.into_iter().map(Rc::new).collect()
}

fn of_config(config: &Config) -> Base {
    let Fixture { files, behind, .. } = config.fixture(&mut Rng::new(7));
    Base {
        name: config.name,
        files,
        behind,
        raw_behind: matches!(config.backing, Backing::Raw(_)),
        cache_bytes: config.cache_bytes,
        discard: config.discard,
    }
}

fn alone(name: &'static str, bytes: Vec<u8>) -> Base {
    Base {
        name,
        files: vec![FileSpec::new(bytes)],
        behind: None,
        raw_behind: false,
        cache_bytes: 1 << 20,
        discard: true,
    }
}

/// Clusters of 2 MiB, some of them compressed.
fn large_clusters() -> Base {
    let mut plan = image::plan(6 << 20, 21, 3, 4);
    plan.options.compression = Compression::Zstd;
    plan.fill = 256;
    plan.compressed = true;
    alone("2M, zstd", image::build(&plan, &mut Rng::new(7)).bytes)
}

/// A disk of 1 TiB with nothing in it.
fn large_disk() -> Base {
    let options = create::CreateOptions::new(1 << 40);
    let new = create::layout(&options).expect("valid options");
    let mut bytes = vec![0; usize::try_from(new.file_bytes).expect("small")];
    for (offset, part) in new.writes {
        let at = usize::try_from(offset).expect("small");
        bytes[at..at + part.len()].copy_from_slice(&part);
    }
    alone("1T, empty", bytes)
}

/// A persistent bitmap, as QEMU leaves one: directory, table and data behind everything else.
fn with_bitmaps() -> Base {
    const CLUSTER: usize = 512;
    let plan = image::plan(128 << 10, 9, 3, 4);
    let mut bytes = image::build(&plan, &mut Rng::new(7)).bytes;
    bytes.resize(bytes.len().next_multiple_of(CLUSTER), 0);
    let directory = bytes.len();
    let (table, data) = (directory + CLUSTER, directory + 2 * CLUSTER);
    bytes.resize(directory + 3 * CLUSTER, 0);
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    put(directory, &(table as u64).to_be_bytes());
    put(directory + 8, &1u32.to_be_bytes());
    // Type 1, granularity 64 KiB, and the name's length.
    put(directory + 16, &[1, 16, 0, 5]);
    put(directory + 24, b"daily");
    put(table, &(data as u64).to_be_bytes());
    put(data, &[0xa5; 16]);
    let mut header = Header::parse(&bytes, bytes.len() as u64).expect("just built");
    header.autoclear |= urus_format::autoclear::BITMAPS;
    header.bitmaps = Some(urus_format::BitmapsExtension {
        count: 1,
        directory_bytes: 32,
        directory: urus_format::HostOffset(directory as u64),
    });
    let encoded = header.encode().expect("it fits");
    bytes[..encoded.len()].copy_from_slice(&encoded);
    // The refcounts of the new clusters: what a repair is for.
    let world = SimWorld::new(1, SimConfig::default(), vec![FileSpec::new(bytes)]);
    check_image(world.handle(), IMAGE, "bitmaps".into(), header, Repair::All)
        .expect("it is repaired");
    world.settle();
    let bytes = world.contents(IMAGE).bytes().to_vec();
    alone("bitmaps", bytes)
}
