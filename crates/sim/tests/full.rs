//! A disk without room: what has no room is refused, and nothing else is.

use urus_engine::request::RequestKind;
use urus_engine::storage::IMAGE;
use urus_engine::{Control, Options};
use urus_sim::checker;
use urus_sim::config::layers;
use urus_sim::image;
use urus_sim::machine::{Driving, Machine};
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::workload::Ask;
use urus_sim::world::{FileSpec, SimConfig, SimWorld};

/// Sectors of one request.
const COUNT: u64 = 16;

fn open(
    bits: u32,
    sectors: u64,
    blocks: u64,
    alignment: Option<u32>,
    rng: &mut Rng,
) -> (SimWorld, Machine) {
    let built = image::build(&image::plan(sectors * 512, bits, 3, 4), rng);
    let mut file = FileSpec::new(built.bytes.clone());
    if let Some(alignment) = alignment {
        file = file.direct(alignment);
    }
    let world = SimWorld::new(rng.next_u64(), SimConfig::random(rng), vec![file]);
    world.give_room(IMAGE, blocks);
    let driving = Driving {
        queues: 2,
        depth: 8,
        spurious: false,
        errors: true,
        outlives: false,
    };
    let layers = layers(&[&built.bytes], &[false]).expect("its header parses");
    let machine = Machine::open(
        &world,
        layers,
        Options::default(),
        Model::new(built.active, 1),
        driving,
        rng.clone(),
    );
    (world, machine.expect("it opens"))
}

fn must(machine: &mut Machine, ask: Ask, when: &str) {
    machine.drain().expect(when);
    let failed = machine.failed;
    machine.ask(ask).expect(when);
    machine.drain().expect(when);
    assert_eq!(machine.failed, failed, "{when}: {ask:?} was refused");
}

/// Guards against a full disk that stays full: a flush had to find room for the tables of writes that were answered before, and
/// while it found none no discard could give any back.
#[test]
fn a_full_disk_takes_flushes_and_discards() {
    let mut refused = 0;
    for (bits, sectors) in [(9, 1 << 11), (10, 1 << 12), (12, 1 << 14), (16, 1 << 15)] {
        for seed in 0..24 {
            let mut rng = Rng::new(seed << 8 | u64::from(bits));
            let most = sectors / 8 * 2 / 3;
            let blocks = rng.below(most);
            let alignment = [None, Some(512), Some(1 << bits.min(12))][rng.index(3)];
            let (world, mut machine) = open(bits, sectors, blocks, alignment, &mut rng);
            let what = format!("clusters of 2^{bits}, seed {seed}, {blocks} blocks of room");
            let mut asked = 0;
            while machine.failed < 12 && asked < 2000 {
                let lba = rng.below(sectors / COUNT) * COUNT;
                let fua = rng.chance(8);
                machine
                    .ask(Ask::Write {
                        lba,
                        count: COUNT,
                        fua,
                    })
                    .expect(&what);
                if rng.chance(8) {
                    must(&mut machine, Ask::Flush, &what);
                }
                asked += 1;
            }
            machine.drain().expect(&what);
            refused += machine.failed;
            must(&mut machine, Ask::Flush, &what);
            machine.read_all().expect(&what);
            for lba in (0..sectors).step_by(1 << 9) {
                must(&mut machine, Ask::Discard { lba, count: 1 << 9 }, &what);
            }
            must(&mut machine, Ask::Flush, &what);
            machine.settle().expect(&what);
            // Some of what was written can be written again.
            for lba in (0..blocks.saturating_sub(16).min(64) * 8 / 4).step_by(8) {
                must(
                    &mut machine,
                    Ask::Write {
                        lba,
                        count: 8,
                        fua: false,
                    },
                    &what,
                );
            }
            must(&mut machine, Ask::Flush, &what);
            machine.read_all().expect(&what);
            machine.close().expect(&what);
            let report = checker::check(world.contents(IMAGE).bytes());
            assert!(report.is_clean(), "{what}: {:?}", report.violations);
        }
    }
    assert!(refused > 500, "only {refused} writes found no room");
}

/// The same where what needs room is a larger L1 table.
#[test]
fn a_disk_that_cannot_grow_for_want_of_room_goes_on() {
    let mut rng = Rng::new(1);
    let (world, mut machine) = open(9, 1 << 10, 1, None, &mut rng);
    let text = machine
        .control(|reply| Control::Resize(64 << 20, reply))
        .expect_err("there is no room for its table");
    assert!(text.contains("no space"), "{text}");
    must(&mut machine, Ask::Flush, "after it");
    machine
        .submit_kind(RequestKind::Discard {
            offset: 0,
            len: 512 << 10,
        })
        .expect("there is room in the queue");
    machine.drain().expect("no hang");
    assert_eq!(machine.replies.pop().expect("a reply").1, Ok(()));
    machine.close().expect("it closes");
    let report = checker::check(world.contents(IMAGE).bytes());
    assert!(report.is_sound(), "{:?}", report.violations);
}
