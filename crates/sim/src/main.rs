//! The simulator's command.
use urus_sim::config::Config;
use urus_sim::crash::Limits;
use urus_sim::runner::{Effort, run};

fn main() {
    let seed: u64 = std::env::args()
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(1);
    let n: u64 = std::env::args()
        .nth(2)
        .and_then(|s| s.parse().ok())
        .unwrap_or(1);
    let config = Config {
        name: "small",
        cluster_bits: 9,
        version: 3,
        refcount_order: 4,
        sectors: 256,
        queues: 1,
    };
    let effort = Effort {
        requests: 200,
        cuts: 24,
        limits: Limits {
            exhaustive: 5,
            random: 16,
            torn: 6,
            each: 4,
        },
    };
    let mut states = 0;
    for seed in seed..seed + n {
        let outcome = run(&config, seed, &effort);
        states += outcome.states;
        if let Some(violation) = outcome.violation {
            println!("seed {seed}: {violation}");
        }
    }
    println!("{states} states");
}
