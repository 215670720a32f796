//! Raw images under O_DIRECT: what is smaller than a block is read, changed and written as a whole block (O18).

use urus_engine::planted::{Bug, plant};
use urus_sim::config::{Behaviour, Config, TINY};
use urus_sim::rng::Rng;
use urus_sim::runner::{Effort, run_list};
use urus_sim::workload::Ask;

/// Writes of one sector in two blocks, and zeroes over both blocks while they are under way.
fn violation(seed: u64, unmap: bool, queues: usize) -> Option<String> {
    let config = Config {
        raw: true,
        sectors: 32,
        fill: 256,
        alignment: 4096,
        queues,
        ..Config::small("raw, blocks of 4096 bytes")
    };
    let effort = Effort {
        cuts: 0,
        ..Effort::QUICK
    };
    let write = |lba| Ask::Write {
        lba,
        count: 1,
        fua: false,
    };
    let zero = Ask::Zero {
        lba: 0,
        count: 16,
        unmap,
        fua: false,
    };
    let asks = [write(30), write(1), write(14), zero, Ask::Flush];
    run_list(&config, seed, &effort, &asks).violation
}

/// What was cleared around a smaller write stays cleared: that write must not bring back what it read before. Found by a hunt for another bug
/// (configuration "raw, direct I/O", seed 10827660697556224145).
#[test]
fn zeroes_around_a_smaller_write_stay() {
    for seed in 0..400 {
        let found = violation(seed, seed % 2 == 0, 1 + (seed % 3 == 0) as usize);
        assert_eq!(found, None, "{seed}");
    }
}

/// The test above would see it.
#[test]
fn without_locks_they_do_not() {
    plant(Bug::NoBlockLocks);
    let found = (0..400).any(|seed| violation(seed, true, 1).is_some());
    plant(Bug::None);
    assert!(found);
}

/// Of one sort in a run: so that none of another sort has made writes take locks before.
fn small_ask(seed: u64, lba: u64, count: u64) -> Ask {
    let fua = false;
    match seed % 4 {
        0 => Ask::Zero {
            lba,
            count,
            unmap: true,
            fua,
        },
        1 => Ask::Zero {
            lba,
            count,
            unmap: false,
            fua,
        },
        _ => Ask::Write { lba, count, fua },
    }
}

/// Small writes, and while they are under way whole blocks over each: several of them, and locks no larger than a block.
fn violation_of_wide_requests(seed: u64, raw: bool) -> Option<String> {
    let config = Config {
        raw,
        cluster_bits: 12,
        sectors: 256,
        fill: 256,
        alignment: 4096,
        queues: 3,
        depth: 16,
        behaviour: Behaviour::Slow,
        sizes: TINY,
        ..Config::small("blocks of 4096 bytes, wide requests")
    };
    let effort = Effort {
        cuts: 0,
        ..Effort::QUICK
    };
    let mut rng = Rng::new(seed);
    let mut asks = Vec::new();
    // Each in a part of the disk of its own: four blocks.
    for part in (0..config.sectors).step_by(32) {
        if rng.chance(64) {
            // A wider one that ends inside a block, and a smaller one behind it there.
            let (start, end) = (rng.below(8), 25 + rng.below(5));
            let (count, few, fua) = (end - start, 1 + rng.below(31 - end), false);
            let lba = part + start;
            asks.push(Ask::Write { lba, count, fua });
            asks.push(small_ask(seed, part + end, few));
            continue;
        }
        // Smaller ones wait for one another; whole blocks do not wait for them.
        let (small, fua) = (1 + rng.below(30), false);
        let few = 1 + rng.below((31 - small).min(12));
        asks.push(small_ask(seed, part + small, few));
        let first = rng.below((small + few - 1) / 8 + 1) * 8;
        let (lba, count) = (part + first, ((small + few - 1) / 8 + 1) * 8 - first);
        asks.push(match rng.index(2) {
            0 => Ask::Zero {
                lba,
                count,
                unmap: rng.chance(128),
                fua,
            },
            _ => Ask::Write { lba, count, fua },
        });
    }
    run_list(&config, seed, &effort, &asks).violation
}

/// Guards against a request of several blocks that locks some of them only: a smaller one reads such a block, changes it and writes what it has read
/// over what the wider one wrote (O18). Each is told by the sectors beside the small write, which are the wider one's.
#[test]
fn a_wide_request_locks_every_block_of_its_range() {
    for seed in 0..1500 {
        for raw in [true, false] {
            let found = violation_of_wide_requests(seed, raw);
            assert_eq!(found, None, "{seed}, raw: {raw}");
        }
    }
}
