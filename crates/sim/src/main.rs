//! The simulator's command.
use urus_sim::config;
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
    let only: Option<usize> = std::env::args().nth(3).and_then(|s| s.parse().ok());
    let effort = Effort::QUICK;
    let mut all = 0;
    std::panic::set_hook(Box::new(|_| {}));
    if std::env::args().nth(4).as_deref() == Some("plants") {
        for bug in urus_engine::planted::Bug::ALL {
            let hunt = urus_sim::plants::hunt(bug, seed, n);
            println!(
                "{bug:?}: {} workloads, {} states: {:?}",
                hunt.workloads, hunt.states, hunt.found
            );
        }
        return;
    }
    let errors = std::env::args().nth(4).as_deref() == Some("errors");
    for (i, config) in config::all().iter().enumerate() {
        if only.is_some_and(|o| o != i) {
            continue;
        }
        let (mut states, mut reopened, mut bad, mut leak) = (0, 0, 0, 0);
        let start = std::time::Instant::now();
        for seed in seed..seed + n {
            let outcome = if errors {
                urus_sim::errors::run_random(config, seed, &Effort::ERRORS)
            } else {
                run(config, seed, &effort)
            };
            states += outcome.states;
            reopened += outcome.reopened;
            leak = leak.max(outcome.largest_leak);
            if let Some(violation) = outcome.violation {
                bad += 1;
                if bad < 4 {
                    println!("  {i} {}: seed {seed}: {violation}", config.name);
                }
            }
        }
        all += states;
        let t = start.elapsed().as_secs_f64();
        println!(
            "{i:2} {:28} {states:7} states {reopened:5} reopened {bad:4} bad, leak {leak}, {t:.2} s {:.0}/s",
            config.name,
            states as f64 / t
        );
    }
    println!("{all} states");
}
