//! Files that are longer than the image in them: a program that made room ahead, a partition, a copy with something behind it.

use urus_engine::Options;
use urus_sim::checker;
use urus_sim::config::{TINY, layers};
use urus_sim::image;
use urus_sim::machine::{Driving, Machine};
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::workload::Ask;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

/// Guards against clusters behind the image that count as zeroes, though the file has something there: a write of a part of one would show it
/// (refcount blocks cover some of what lies there, or nothing of it). And against a file that is cut where it was longer before: what lies there is
/// not ours.
#[test]
fn what_lies_behind_an_image_neither_shows_nor_goes() {
    for seed in 0..60u64 {
        let mut rng = Rng::new(seed);
        // 64-bit refcounts: a block counts 64 clusters.
        let order = if rng.chance(128) { 6 } else { 4 };
        let mut plan = image::plan(256 * 512, 10, 3, order);
        plan.fill = 96;
        let built = image::build(&plan, &mut rng);
        let mut bytes = built.bytes.clone();
        bytes.resize(
            bytes.len() + usize::try_from(rng.below(200 << 10)).unwrap(),
            0xee,
        );
        let file = FileSpec::new(bytes.clone());
        let world = SimWorld::new(rng.next_u64(), SimConfig::random(&mut rng), vec![file]);
        let driving = Driving::plain(2);
        let mut options = Options::default();
        if rng.chance(128) {
            options.sizes = TINY;
        }
        let mut machine = Machine::open(
            &world,
            layers(&[&bytes], &[false]).unwrap(),
            options,
            Model::new(built.active, 1),
            driving,
            rng.clone(),
        )
        .unwrap();
        let what = format!("seed {seed}");
        for _ in 0..rng.below(300) {
            let (lba, count) = (rng.below(253), 1 + rng.below(3));
            let ask = match rng.index(6) {
                0 => Ask::Read { lba, count },
                1 => Ask::Discard { lba, count },
                2 => Ask::Flush,
                _ => Ask::Write {
                    lba,
                    count,
                    fua: false,
                },
            };
            machine.ask(ask).expect(&what);
        }
        machine.drain().expect(&what);
        machine.read_all().expect(&what);
        machine.close().expect(&what);
        let contents = world.contents(IMAGE).clone();
        let report = checker::check(contents.bytes());
        assert!(report.is_clean(), "{what}: {:?}", report.violations);
        assert!(contents.bytes().len() >= bytes.len(), "{what}: it was cut");
    }
}
