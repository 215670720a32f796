//! Random scripts of writes, and what an image must hold after them.
//!
//! A script is made from a seed, so that a failure can be repeated. It runs as qemu-io commands, through urus's NBD
//! export or on the image file itself. The [`Model`] is a flat array that followed the same script.

use crate::{KIB, Served};
use std::fmt::Write as _;
use std::path::Path;

/// The unit in which the model knows what was discarded.
const SECTOR: u64 = 512;

/// A small generator of numbers that look random (SplitMix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that always yields the same numbers for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }
}

/// One step of a script. Offsets and lengths are bytes, multiples of 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Fill a range with one byte.
    Write(u64, u64, u8),
    /// Make a range zero; whether its clusters stay is the server's choice.
    Zero(u64, u64),
    /// Make a range zero and give its clusters back.
    ZeroUnmap(u64, u64),
    /// Forget a range.
    Discard(u64, u64),
    /// Make everything so far durable.
    Flush,
}

/// A script of `count` steps for an image of `size` bytes with clusters of `cluster` bytes. Lengths go from one sector
/// to several clusters; starts and ends like to lie on and beside cluster borders.
#[must_use]
pub fn random(seed: u64, size: u64, cluster: u64, count: usize) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    let mut steps = Vec::with_capacity(count);
    while steps.len() < count {
        let longest = (cluster * 3).clamp(8 * KIB, 4 << 20).min(size);
        let unit = if rng.below(2) == 0 { cluster } else { SECTOR };
        let length = (SECTOR + rng.below(longest)).next_multiple_of(unit);
        let offset = rng.below(size) / unit * unit;
        let length = length.min(size - offset) / SECTOR * SECTOR;
        if length == 0 {
            continue;
        }
        steps.push(match rng.below(20) {
            0..11 => Step::Write(offset, length, rng.draw().to_le_bytes()[0] | 1),
            11..13 => Step::Zero(offset, length),
            13..15 => Step::ZeroUnmap(offset, length),
            15..18 => Step::Discard(offset, length),
            _ => Step::Flush,
        });
    }
    steps
}

/// The script as qemu-io commands.
#[must_use]
pub fn commands(steps: &[Step]) -> Vec<String> {
    steps
        .iter()
        .map(|step| match *step {
            Step::Write(offset, length, byte) => format!("write -q -P {byte} {offset} {length}"),
            Step::Zero(offset, length) => format!("write -q -z {offset} {length}"),
            Step::ZeroUnmap(offset, length) => format!("write -q -z -u {offset} {length}"),
            Step::Discard(offset, length) => format!("discard -q {offset} {length}"),
            Step::Flush => "flush".to_owned(),
        })
        .collect()
}

/// The same script, so many bytes further on.
#[must_use]
pub fn shifted(steps: &[Step], by: u64) -> Vec<Step> {
    let shift = |step: &Step| match *step {
        Step::Write(offset, length, byte) => Step::Write(offset + by, length, byte),
        Step::Zero(offset, length) => Step::Zero(offset + by, length),
        Step::ZeroUnmap(offset, length) => Step::ZeroUnmap(offset + by, length),
        Step::Discard(offset, length) => Step::Discard(offset + by, length),
        Step::Flush => Step::Flush,
    };
    steps.iter().map(shift).collect()
}

/// Runs several scripts at the same time, each over a connection of its own.
pub fn run_in_parallel(served: &Served, scripts: &[Vec<Step>]) {
    std::thread::scope(|scope| {
        for steps in scripts {
            scope.spawn(move || served.qemu_io(&commands(steps)));
        }
    });
}

/// What an image must hold.
#[derive(Clone, Debug)]
pub struct Model {
    bytes: Vec<u8>,
    /// Per sector: discarded since it was last written, so that zeroes are right as well.
    discarded: Vec<bool>,
}

impl Model {
    /// An image of zeroes.
    #[must_use]
    pub fn zeroes(size: u64) -> Self {
        Self::holding(vec![0; index(size)])
    }

    /// An image with these contents, a whole number of sectors.
    #[must_use]
    pub fn holding(bytes: Vec<u8>) -> Self {
        let sectors = bytes.len().div_ceil(index(SECTOR));
        Self {
            bytes,
            discarded: vec![false; sectors],
        }
    }

    /// What it holds, where nothing was discarded.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Follows the script.
    pub fn follow(&mut self, steps: &[Step]) {
        for step in steps {
            match *step {
                Step::Write(offset, length, byte) => self.fill(offset, length, byte),
                Step::Zero(offset, length) | Step::ZeroUnmap(offset, length) => {
                    self.fill(offset, length, 0)
                }
                Step::Discard(offset, length) => self.sectors(offset, length).fill(true),
                Step::Flush => {}
            }
        }
    }

    /// Holds `raw` against the model: a discarded sector may be what it was or zeroes, every other one is fixed.
    ///
    /// # Panics
    /// When `raw` differs; `context` goes into the message.
    pub fn assert_equals_file(&self, raw: &Path, context: &str) {
        let found = std::fs::read(raw).unwrap_or_else(|error| panic!("{}: {error}", raw.display()));
        // Tools that read through a coarser interface round an odd size up; what is beyond the end must be zero.
        assert!(
            found.len() >= self.bytes.len(),
            "{context}: {} bytes, not {}",
            found.len(),
            self.bytes.len()
        );
        assert!(
            found[self.bytes.len()..].iter().all(|&byte| byte == 0),
            "{context}: something beyond the end"
        );
        let wrong = self.wrong_sectors(0, &found);
        if let Some(&first) = wrong.first() {
            let at = first * index(SECTOR);
            let mut message = format!(
                "{context}: {} wrong sectors, the first at byte {at}: ",
                wrong.len()
            );
            let _ = write!(
                message,
                "{:02x?} instead of {:02x?}",
                &found[at..at + 8],
                &self.bytes[at..at + 8]
            );
            panic!("{message}");
        }
    }

    /// The sectors that must not hold what was `found` from `offset` on.
    #[must_use]
    pub fn wrong_sectors(&self, offset: u64, found: &[u8]) -> Vec<usize> {
        let sector_bytes = index(SECTOR);
        let first = index(offset / SECTOR);
        let expected = self.bytes[index(offset)..].chunks(sector_bytes);
        expected
            .zip(found.chunks(sector_bytes))
            .zip(&self.discarded[first..])
            .enumerate()
            .filter(|(_, ((expected, found), discarded))| {
                let zeroes = found.iter().all(|&byte| byte == 0);
                let length = expected.len().min(found.len());
                expected[..length] != found[..length] && !(**discarded && zeroes)
            })
            .map(|(number, _)| first + number)
            .collect()
    }

    /// The image was cut or grew; what is new is zero.
    pub fn resize(&mut self, size: u64) {
        self.bytes.resize(index(size), 0);
        self.discarded.resize(index(size.div_ceil(SECTOR)), false);
    }

    fn fill(&mut self, offset: u64, length: u64, byte: u8) {
        self.bytes[index(offset)..index(offset + length)].fill(byte);
        self.sectors(offset, length).fill(false);
    }

    fn sectors(&mut self, offset: u64, length: u64) -> &mut [bool] {
        &mut self.discarded[index(offset / SECTOR)..index((offset + length) / SECTOR)]
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("test images fit into memory")
}
