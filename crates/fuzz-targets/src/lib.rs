//! What is fuzzed in urus, and what is judged. libFuzzer (`fuzz/`) and the plain run on stable (`urus-fuzz`) call
//! the same functions.
//!
//! Each target takes any bytes and gives a [`Verdict`]. A panic, on whatever thread, is a violation too, and so is
//! more than [`MOST_MEMORY`] or [`MOST_TIME`] for one input: those are enforced by who runs the targets.
#![forbid(unsafe_code)]

pub mod bases;
pub mod chain;
pub mod check;
pub mod codec;
pub mod havoc;
pub mod input;
pub mod mutate;
pub mod nbd;
pub mod operate;
pub mod selftest;
mod view;
pub mod virtqueue;

use std::time::Duration;

/// Bytes that one input may cost.
pub const MOST_MEMORY: usize = 256 << 20;
/// Processor time that one input may cost.
pub const MOST_TIME: Duration = Duration::from_secs(1);

/// What is wrong, if anything.
pub type Verdict = Result<(), String>;

/// Something that is fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Judges one input.
    pub run: fn(&[u8]) -> Verdict,
    /// Bytes of an input, at most: longer ones only cost time.
    pub most_bytes: usize,
    /// Its share of the time, where all of them run.
    pub share: u32,
}

/// All targets.
pub const TARGETS: [Target; 10] = [
    target("header", codec::header, 4096, 1),
    target("tables", codec::tables, 512, 1),
    target("compressed", codec::compressed, 4096, 1),
    target("snapshots", codec::snapshots, 4096, 1),
    target("bitmaps", codec::bitmaps, 4096, 1),
    target("check", check::check, 512, 4),
    target("operate", operate::operate, 512, 6),
    target("chain", chain::chain, 512, 4),
    target("nbd", nbd::nbd, 2048, 2),
    target("virtqueue", virtqueue::virtqueue, 1024, 2),
];

const fn target(
    name: &'static str,
    run: fn(&[u8]) -> Verdict,
    most_bytes: usize,
    share: u32,
) -> Target {
    Target {
        name,
        run,
        most_bytes,
        share,
    }
}

/// The target of that name; those that fail on purpose included.
#[must_use]
pub fn find(name: &str) -> Option<Target> {
    let mut all = TARGETS.into_iter().chain(selftest::TARGETS);
    all.find(|target| target.name == name)
}

/// Judges one input of a target, for libFuzzer.
///
/// # Panics
/// Where something is wrong, or there is no such target.
pub fn must_hold(name: &str, data: &[u8]) {
    let target = find(name).expect("a target of that name");
    // Longer ones only cost time.
    let data = &data[..data.len().min(target.most_bytes)];
    if let Err(violation) = (target.run)(data) {
        panic!("{name}: {violation}");
    }
}

/// Returns a violation unless the condition holds.
macro_rules! require {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}
pub(crate) use require;
