//! A disk without room: what has no room is refused, and nothing else is.

use urus_engine::request::RequestKind;
use urus_engine::{Control, Options};
use urus_sim::checker;
use urus_sim::config::layers;
use urus_sim::image;
use urus_sim::machine::{Driving, Machine};
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::stamp::Content;
use urus_sim::workload::Ask;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

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
        errors: true,
        ..Driving::plain(2)
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

fn open_device(bits: u32, sectors: u64, spare: usize, rng: &mut Rng) -> (SimWorld, Machine) {
    let built = image::build(&image::plan(sectors * 512, bits, 3, 4), rng);
    let len = (built.bytes.len() + spare).next_multiple_of(512);
    let file = FileSpec::new(built.bytes.clone()).block_device(len, rng.next_u64());
    let world = SimWorld::new(rng.next_u64(), SimConfig::random(rng), vec![file]);
    let driving = Driving {
        errors: true,
        ..Driving::plain(2)
    };
    let layers = layers(&[&built.bytes], &[false]).expect("its header parses");
    let machine = Machine::open(
        &world,
        layers,
        Options::default(),
        Model::new(built.active, 1).with_room(sectors * 4),
        driving,
        rng.clone(),
    );
    (world, machine.expect("it opens"))
}

/// Guards against a block device that stays full though it has become longer, and against one that hands out a last cluster
/// of which it has only a part.
#[test]
fn a_full_block_device_goes_on_when_it_becomes_longer() {
    for (bits, sectors) in [(9, 1 << 11), (10, 1 << 12), (12, 1 << 13)] {
        for seed in 0..24 {
            let mut rng = Rng::new(seed << 8 | u64::from(bits));
            let spare = small(rng.below(sectors * 512 / 4));
            let (world, mut machine) = open_device(bits, sectors, spare, &mut rng);
            let what = format!("clusters of 2^{bits}, seed {seed}, {spare} bytes to spare");
            for lba in (0..sectors - COUNT).step_by(16) {
                let ask = Ask::Write {
                    lba,
                    count: COUNT,
                    fua: false,
                };
                machine.ask(ask).expect(&what);
            }
            machine.drain().expect(&what);
            assert!(machine.failed > 0, "{what}: it was to be full");
            must(&mut machine, Ask::Flush, &what);
            machine.read_all().expect(&what);
            let len = world.contents(IMAGE).len();
            world.lengthen(IMAGE, len + sectors * 1024 + (512 << bits));
            for lba in (0..sectors - COUNT).step_by(16) {
                let ask = Ask::Write {
                    lba,
                    count: COUNT,
                    fua: false,
                };
                must(&mut machine, ask, &what);
            }
            must(&mut machine, Ask::Flush, &what);
            machine.read_all().expect(&what);
            machine.close().expect(&what);
            let report = checker::check(world.contents(IMAGE).bytes());
            assert!(report.is_clean(), "{what}: {:?}", report.violations);
        }
    }
}

/// Guards against a block device whose free space is not found for a larger L1 table, since refcounts cover it to its end.
#[test]
fn a_disk_grows_on_a_block_device() {
    let mut grown = 0;
    for (bits, sectors) in [(9, 1 << 10), (10, 1 << 11)] {
        for seed in 0..24 {
            let mut rng = Rng::new(seed << 8 | u64::from(bits));
            let spare = small(sectors * 512 + (64 << bits));
            let (world, mut machine) = open_device(bits, sectors, spare, &mut rng);
            let what = format!("clusters of 2^{bits}, seed {seed}");
            let ask = |rng: &mut Rng, machine: &mut Machine| {
                let lba = rng.below(sectors / COUNT) * COUNT;
                let ask = if rng.chance(64) {
                    Ask::Discard { lba, count: COUNT }
                } else {
                    Ask::Write {
                        lba,
                        count: COUNT,
                        fua: rng.chance(16),
                    }
                };
                machine.ask(ask).expect(&what);
            };
            for _ in 0..sectors / COUNT / 2 {
                ask(&mut rng, &mut machine);
            }
            grown += u64::from(machine.grow(sectors * 4).expect(&what));
            for _ in 0..sectors / COUNT / 2 {
                ask(&mut rng, &mut machine);
            }
            must(&mut machine, Ask::Flush, &what);
            machine.read_all().expect(&what);
            machine.close().expect(&what);
            let report = checker::check(world.contents(IMAGE).bytes());
            assert!(report.is_clean(), "{what}: {:?}", report.violations);
        }
    }
    assert_eq!(grown, 48);
}

/// A raw disk on a block device follows the device, and takes no size that the device does not have.
#[test]
fn a_raw_disk_follows_its_block_device() {
    let mut rng = Rng::new(1);
    let file = FileSpec::new(Vec::new()).block_device(64 << 10, 1);
    let bytes = file.contents.clone();
    let world = SimWorld::new(1, SimConfig::random(&mut rng), vec![file]);
    let driving = Driving {
        errors: true,
        ..Driving::plain(1)
    };
    let layers = layers(&[&bytes], &[true]).expect("raw has no header");
    // Nothing is read of it.
    let contents = vec![Content::Zero; 128];
    let mut machine = Machine::open(
        &world,
        layers,
        Options::default(),
        Model::new(contents, 1).with_room(256),
        driving,
        rng,
    )
    .expect("it opens");
    let text = machine
        .control(|reply| Control::Resize(96 << 10, reply))
        .expect_err("the device has no such length");
    assert!(text.contains("block device of 65536 bytes"), "{text}");
    world.lengthen(IMAGE, 96 << 10);
    machine
        .control(|reply| Control::Resize(96 << 10, reply))
        .expect("it has now");
    machine.close().expect("it closes");
    assert_eq!(world.contents(IMAGE).len(), 96 << 10);
}

fn small(value: u64) -> usize {
    usize::try_from(value).expect("a small number")
}

/// Guards against space that is given back and never found again, which is a file without bound, or a block device that fills up: freed
/// clusters that cannot be punched are looked for like any others.
#[test]
fn what_is_freed_is_used_again_though_it_was_not_punched() {
    let sectors = 1 << 11;
    for bits in [9, 10, 12] {
        for on_device in [true, false] {
            let mut rng = Rng::new(u64::from(bits));
            let spare = sectors * 512 * 3 / 2;
            let (world, mut machine) = if on_device {
                open_device(bits, sectors, small(spare), &mut rng)
            } else {
                open_without_punch(bits, sectors, spare, &mut rng)
            };
            for round in 0..8 {
                let what = format!("clusters of 2^{bits}, device: {on_device}, round {round}");
                for lba in (0..sectors).step_by(16) {
                    let ask = Ask::Write {
                        lba,
                        count: 16,
                        fua: false,
                    };
                    must(&mut machine, ask, &what);
                }
                must(&mut machine, Ask::Flush, &what);
                for lba in (0..sectors).step_by(1 << 9) {
                    must(&mut machine, Ask::Discard { lba, count: 1 << 9 }, &what);
                }
                must(&mut machine, Ask::Flush, &what);
                machine.settle().expect(&what);
            }
            machine.close().expect("it closes");
            let report = checker::check(world.contents(IMAGE).bytes());
            assert!(report.is_clean(), "{:?}", report.violations);
        }
    }
}

/// A file that may grow by so many bytes, on a file system that punches no holes.
fn open_without_punch(bits: u32, sectors: u64, spare: u64, rng: &mut Rng) -> (SimWorld, Machine) {
    let built = image::build(&image::plan(sectors * 512, bits, 3, 4), rng);
    let mut file = FileSpec::new(built.bytes.clone());
    file.properties.can_punch = false;
    file.capacity = built.bytes.len() as u64 + spare;
    let mut config = SimConfig::random(rng);
    config.unsupported = 256;
    let world = SimWorld::new(rng.next_u64(), config, vec![file]);
    let driving = Driving {
        errors: true,
        ..Driving::plain(2)
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

/// Guards against clusters that come back twice, or that were never this write's: on a full disk a write that reaches into a second L2 table gets its
/// clusters, is mapped in the first table, and finds no room for the second.
#[test]
fn a_write_that_finds_no_room_for_its_second_table_gives_back_what_is_left() {
    let sectors = 1 << 12;
    let mut refused = 0;
    for blocks in 0..60 {
        let mut rng = Rng::new(blocks);
        let (world, mut machine) = open(9, sectors, blocks, None, &mut rng);
        let what = format!("{blocks} blocks of room");
        for table in (1..sectors / 64).rev() {
            // Twelve clusters of one table, twelve of the next.
            machine
                .ask(Ask::Write {
                    lba: table * 64 - 12,
                    count: 24,
                    fua: false,
                })
                .expect(&what);
            if rng.chance(64) {
                machine.ask(Ask::Flush).expect(&what);
            }
        }
        machine.drain().expect(&what);
        refused += machine.failed;
        machine.read_all().expect(&what);
        must(&mut machine, Ask::Flush, &what);
        machine.close().expect(&what);
        let report = checker::check(world.contents(IMAGE).bytes());
        assert!(report.is_clean(), "{what}: {:?}", report.violations);
    }
    assert!(refused > 100, "only {refused} writes found no room");
}
