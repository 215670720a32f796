//! What the parts share: the images they work on, one image's rounds from its making to its end, and what is kept when
//! something is wrong.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use urus_sim::rng::Rng;
use urus_sim::runner::panic_text;
use urus_sim::stamp::stamped;
use urus_tests::load::{self, Disk, Ranges};
use urus_tests::nbd::{Client, Command};
use urus_tests::{KIB, MIB, Scratch, Served, content, program, qemu, urus};

/// What lies below or in an image at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    Empty,
    /// Compressed clusters of its own.
    Compressed,
    /// An overlay over a raw file.
    OverRaw,
    /// An overlay over an image of compressed clusters.
    OverZlib,
}

/// An image and how it is served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    pub(crate) cluster: u64,
    /// What `-o` takes besides the cluster size.
    options: &'static str,
    start: Start,
    pub(crate) size: u64,
    /// What of it is used: first byte and length; all where it is empty. The first of them begins at 0.
    ranges: &'static [(u64, u64)],
    /// More arguments for `urus serve`.
    pub(crate) serve: &'static str,
}

impl Plan {
    pub(crate) const fn new(name: &'static str, cluster: u64, start: Start) -> Self {
        // Several L2 tables where clusters are small.
        let size = if cluster <= 512 {
            4 * MIB
        } else if cluster >= 2 * MIB {
            32 * MIB
        } else {
            16 * MIB
        };
        Self {
            name,
            cluster,
            options: "",
            start,
            size,
            ranges: &[],
            serve: "--num-queues 4",
        }
    }

    pub(crate) const fn made(mut self, options: &'static str) -> Self {
        self.options = options;
        self
    }

    pub(crate) const fn served(mut self, serve: &'static str) -> Self {
        self.serve = serve;
        self
    }

    pub(crate) const fn sized(mut self, size: u64) -> Self {
        self.size = size;
        self
    }

    /// A large disk, of which these ranges are used.
    pub(crate) const fn far(mut self, size: u64, ranges: &'static [(u64, u64)]) -> Self {
        self.size = size;
        self.ranges = ranges;
        self
    }

    fn ranges(&self) -> Ranges {
        if self.ranges.is_empty() {
            Ranges::whole(self.size)
        } else {
            Ranges::of(self.ranges)
        }
    }

    /// Makes the image in `directory`, and the disk that it is.
    pub(crate) fn build(&self, directory: &Path) -> (PathBuf, Disk) {
        let image = directory.join("image.qcow2");
        let raw = directory.join("raw");
        let options = format!("cluster_size={}{}", self.cluster, self.options);
        // Two thirds stamped, with holes, and where it is a backing file it ends before the overlay does.
        let mut bytes = Vec::new();
        let stamped_bytes = if self.start == Start::Empty {
            0
        } else {
            self.ranges().parts()[0].1.min(16 * MIB) * 3 / 4
        };
        for piece in 0..(stamped_bytes / (64 * KIB)) {
            let (lba, sectors) = (piece * 128, 128);
            if piece % 3 == 2 {
                bytes.resize(bytes.len() + 64 * 1024, 0);
            } else {
                bytes.extend(stamped(lba, sectors, 1));
            }
        }
        if self.start == Start::Empty {
            qemu::create(&image, &options, self.size);
        } else {
            std::fs::write(&raw, &bytes).expect("writing a raw file");
        }
        let compress = |to: &Path| {
            let convert = qemu::img("convert -c -f raw -O qcow2 -o").arg(&options);
            convert.arg(&raw).arg(to).ok();
        };
        let sized = || {
            qemu::img("resize -q -f qcow2")
                .arg(&image)
                .arg(self.size.to_string())
                .ok();
        };
        match self.start {
            Start::Empty => {}
            Start::Compressed => {
                compress(&image);
                sized();
                let _ = std::fs::remove_file(&raw);
            }
            Start::OverRaw => {
                qemu::create_overlay(&image, &options, "raw", "raw");
                sized();
            }
            Start::OverZlib => {
                compress(&directory.join("base.qcow2"));
                let _ = std::fs::remove_file(&raw);
                qemu::create_overlay(&image, &options, "base.qcow2", "qcow2");
                sized();
            }
        }
        let ranges = self.ranges();
        bytes.resize(usize::try_from(ranges.bytes()).expect("small"), 0);
        let disk = Disk::within(ranges, load::contents(&bytes), 2);
        (image, disk)
    }
}

/// Reads all of an export.
pub(crate) fn read_all(served: &Served) -> Result<Vec<u8>, String> {
    let all = Client::connect(&served.socket()).and_then(|mut client| client.read_all());
    all.map_err(|error| format!("reading everything: {error}\n{}", served.log()))
}

/// Reads what of a disk is used.
pub(crate) fn read_used(served: &Served, disk: &Disk) -> Result<Vec<u8>, String> {
    let read = || {
        let mut client = Client::connect(&served.socket())?;
        let mut bytes = Vec::new();
        for (first, length) in disk.ranges().parts() {
            for at in (0..*length).step_by(1 << 20) {
                let length = (length - at).min(1 << 20);
                bytes.extend(client.ask(Command::Read, first + at, length, &[])?);
            }
        }
        Ok(bytes)
    };
    read().map_err(|error: std::io::Error| format!("reading: {error}\n{}", served.log()))
}

/// The same, read by QEMU, who is also asked whether anything lies elsewhere.
pub(crate) fn read_by_qemu(image: &Path, copy: &Path, disk: &Disk) -> Result<Vec<u8>, String> {
    const BLOCK: u64 = 64 * KIB;
    let ranges = disk.ranges();
    let mut bytes = Vec::new();
    for (first, length) in ranges.parts() {
        let (skip, count) = (first / BLOCK, length / BLOCK);
        let words = format!("dd -f qcow2 -O raw bs={BLOCK} skip={skip} count={count}");
        let (from, to) = (image.display(), copy.display());
        let dd = qemu::img(&words).arg(format!("if={from}"));
        dd.arg(format!("of={to}")).ok();
        bytes.extend(content::bytes(copy));
        std::fs::remove_file(copy).expect("removing a copy");
    }
    for extent in qemu::map(image).as_array().expect("a list") {
        let number = |name: &str| extent[name].as_u64().expect("a number");
        let (start, end) = (number("start"), number("start") + number("length"));
        let zero = extent["zero"].as_bool().expect("a flag");
        // What of it lies in the ranges; they end where clusters do.
        let inside: u64 = ranges
            .parts()
            .iter()
            .map(|(first, length)| {
                let to = end.min(first + length);
                to.saturating_sub(start.max(*first))
            })
            .sum();
        if !zero && inside < end - start {
            return Err(format!("QEMU finds data where nobody wrote: {extent}"));
        }
    }
    Ok(bytes)
}

/// Leaked clusters, where that is all that `qemu-img check` and `urus check` say, in agreement.
pub(crate) fn leaks(image: &Path) -> Result<u64, String> {
    let theirs = qemu::img("check --output=json -f qcow2").arg(image).run();
    let ours = urus()
        .words("check --output=json -f qcow2")
        .arg(image)
        .run();
    if !matches!(theirs.status.code(), Some(0 | 3)) {
        return Err(format!("qemu-img check finds errors: {theirs}"));
    }
    if ours.status.code() != theirs.status.code() {
        return Err(format!("checks differ\n{ours}\n{theirs}"));
    }
    for figure in ["leaks", "corruptions", "check-errors", "allocated-clusters"] {
        if ours.json()[figure] != theirs.json()[figure] {
            return Err(format!("checks differ in {figure}\n{ours}\n{theirs}"));
        }
    }
    Ok(theirs.json()["leaks"].as_u64().unwrap_or(0))
}

/// Runs one campaign in a directory of its own; a panic in it is a violation like any other. What it worked on is kept
/// then, and the message says where and how to see it again.
pub(crate) fn guarded(
    part: &str,
    name: &str,
    seed: u64,
    work: impl FnOnce(&Scratch, &mut Rng) -> Result<(), String>,
) -> Result<(), String> {
    let scratch = Scratch::new();
    let mut rng = Rng::new(seed);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let outcome = work(&scratch, &mut rng);
        if outcome.is_err() {
            keep(&scratch, part, seed);
        }
        outcome
    }));
    let outcome = outcome.unwrap_or_else(|panic| {
        keep(&scratch, part, seed);
        Err(panic_text(&*panic).to_owned())
    });
    outcome.map_err(|message| {
        format!(
            "{name}: {message}\n  again: urus-proofs --part {part} --plan '{name}' --seed {seed}; files: {}",
            kept(part, seed).display()
        )
    })
}

fn kept(part: &str, seed: u64) -> PathBuf {
    urus_tests::scratch::shared_directory("urus-proofs-kept").join(format!("{part}-{seed}"))
}

/// Copies images, mounted ones too, to where no cleaning comes by.
fn keep(scratch: &Scratch, part: &str, seed: u64) {
    let to = kept(part, seed);
    let _ = std::fs::remove_dir_all(&to);
    let _ = program("cp")
        .words("-r --sparse=always")
        .arg(scratch.path())
        .arg(&to)
        .run();
}
