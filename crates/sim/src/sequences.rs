//! All short sequences over a small alphabet of requests, cut at every point.

use crate::config::{Backing, Config};
use crate::contents::index;
use crate::crash::Limits;
use crate::rng::mix;
use crate::runner::{Effort, Outcome, run_list};
use crate::workload::Ask;

/// Clusters of 2 sectors; the first three lie in one L2 table, the fourth in another.
const CLUSTER: u64 = 2;
const FAR: u64 = 128 * CLUSTER;

/// The alphabet.
pub const ALPHABET: [Ask; 9] = [
    // A whole cluster; part of it; two and a half, durably; one in another table.
    Ask::Write {
        lba: 0,
        count: CLUSTER,
        fua: false,
    },
    Ask::Write {
        lba: 1,
        count: 1,
        fua: false,
    },
    Ask::Write {
        lba: 1,
        count: 2 * CLUSTER,
        fua: true,
    },
    Ask::Write {
        lba: FAR,
        count: CLUSTER,
        fua: false,
    },
    Ask::Discard {
        lba: 0,
        count: 2 * CLUSTER,
    },
    Ask::Zero {
        lba: 0,
        count: CLUSTER,
        unmap: true,
        fua: false,
    },
    Ask::Zero {
        lba: 0,
        count: CLUSTER + 1,
        unmap: false,
        fua: false,
    },
    Ask::Discard {
        lba: FAR,
        count: CLUSTER,
    },
    Ask::Flush,
];

/// How many sequences of one to three requests there are, in each configuration.
pub const SEQUENCES: u64 = 9 + 9 * 9 + 9 * 9 * 9;

/// The sequence with this number.
#[must_use]
pub fn sequence(number: u64) -> Vec<Ask> {
    let (mut rest, mut len) = (number % SEQUENCES, 1);
    while rest >= 9u64.pow(len) {
        rest -= 9u64.pow(len);
        len += 1;
    }
    let mut asks = Vec::new();
    for _ in 0..len {
        asks.push(ALPHABET[index(rest % 9)]);
        rest /= 9;
    }
    asks
}

/// The configurations: an empty image, a full one, one with a snapshot, one with a backing file.
#[must_use]
pub fn configs() -> Vec<Config> {
    let base = |name| Config {
        cluster_bits: 10,
        sectors: FAR + 2 * CLUSTER,
        depth: 4,
        ..Config::small(name)
    };
    vec![
        base("sequences, empty"),
        Config {
            fill: 200,
            ..base("sequences, full")
        },
        Config {
            fill: 200,
            snapshot: true,
            ..base("sequences, snapshot")
        },
        Config {
            fill: 40,
            backing: Backing::Raw(100),
            queues: 2,
            ..base("sequences, backed")
        },
    ]
}

/// Runs the sequence with this number, in one of the configurations.
#[must_use]
pub fn run(seed: u64, number: u64) -> Outcome {
    let configs = configs();
    // Every sequence in one configuration before the next.
    let config = &configs[index(number / SEQUENCES % configs.len() as u64)];
    let effort = Effort {
        requests: 0,
        cuts: u64::MAX,
        limits: Limits {
            exhaustive: 10,
            random: 64,
            torn: 8,
            each: 8,
        },
        reopen: 400,
        depth: 2,
        qemu: 0,
        pauses: false,
    };
    let asks = sequence(number);
    let mut outcome = run_list(config, mix(seed ^ mix(number)), &effort, &asks);
    if let Some(violation) = &mut outcome.violation {
        *violation = format!("{}, {asks:?}: {violation}", config.name);
    }
    outcome
}
