//! Raw images under O_DIRECT: what is smaller than a block is read, changed and written as a whole block (O18).

use urus_engine::planted::{Bug, plant};
use urus_sim::config::Config;
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
