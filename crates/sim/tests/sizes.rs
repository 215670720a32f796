//! What only large images have happens in small simulated ones, too. Guards against configurations that no longer reach what they
//! are there for: a judge that looks at nothing finds nothing.

use urus_engine::seen::{Way, Ways};
use urus_sim::config;
use urus_sim::runner::{Effort, run};

/// Every way through the engine that only large images take is taken, without a power cut in all of them.
#[test]
fn every_way_of_large_images_is_taken() {
    let effort = Effort {
        cuts: 1,
        ..Effort::QUICK
    };
    let mut ways = Ways::default();
    let mut rounds = 0;
    while ways.missed().next().is_some() && rounds < 12 {
        for config in config::small_sizes() {
            let outcome = run(&config, 100 + rounds, &effort);
            assert_eq!(outcome.violation, None, "{}, {rounds}", config.name);
            ways.add(outcome.ways);
        }
        rounds += 1;
    }
    let missed: Vec<Way> = ways.missed().collect();
    assert!(
        missed.is_empty(),
        "{missed:?} were taken in none of {rounds} rounds"
    );
}

/// The sizes that the product has lead a small image through few of them: it is the small sizes that do it.
#[test]
fn a_small_image_takes_few_of_them_with_the_sizes_of_the_product() {
    let config = config::find("plain").expect("there is one");
    let effort = Effort {
        cuts: 1,
        ..Effort::QUICK
    };
    let outcome = run(&config, 1, &effort);
    assert_eq!(outcome.violation, None);
    let slices = [
        Way::LaterSliceWritten,
        Way::LaterL1Sector,
        Way::LaterCountsWritten,
    ];
    assert!(slices.into_iter().all(|way| !outcome.ways.has(way)));
}

/// A round of `cuts` has every configuration, and begins with those that find fastest.
#[test]
fn the_mix_leaves_nothing_out() {
    let (mix, all) = (config::mix(), config::all());
    let names =
        |configs: &[config::Config]| -> Vec<&str> { configs.iter().map(|c| c.name).collect() };
    let (mix, all) = (names(&mix), names(&all));
    assert!(all.iter().all(|name| mix.contains(name)));
    assert!(mix.iter().all(|name| all.contains(name)));
    let twice = mix.len() - all.len();
    assert!(twice > 0 && twice < all.len() / 4);
    let distinct: std::collections::BTreeSet<_> = all.iter().collect();
    assert_eq!(
        distinct.len(),
        all.len(),
        "each name names one configuration"
    );
}
