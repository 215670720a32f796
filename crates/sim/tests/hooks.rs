//! What is done to data on its way, and who is told of changes.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use urus_engine::Options;
use urus_engine::file::hooks::{Hooks, Observer};
use urus_sim::checker::GuestReader;
use urus_sim::cipher::Xor;
use urus_sim::config::layers;
use urus_sim::image;
use urus_sim::machine::{Driving, Machine};
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::workload::Ask;
use urus_sim::world::{FileSpec, SimConfig, SimWorld};

/// What was told.
#[derive(Default)]
struct Told(Mutex<Vec<(u64, u64)>>);

impl Observer for Told {
    fn changes(&self, offset: u64, len: u64) {
        self.0.lock().unwrap().push((offset, len));
    }
}

/// Guards against a change that nobody is told of (a bitmap would miss it), and against data that goes past a cipher: hits, allocating
/// writes, zeroes and discards, on several queues.
#[test]
fn every_change_is_told_and_no_data_goes_past_a_cipher() {
    for (seed, alignment) in [(1, None), (2, Some(512)), (3, Some(4096)), (4, None)] {
        let mut rng = Rng::new(seed);
        let mut plan = image::plan(1 << 20, 13, 3, 4);
        plan.fill = 128;
        plan.ciphered = true;
        let built = image::build(&plan, &mut rng);
        let mut file = FileSpec::new(built.bytes.clone());
        if let Some(alignment) = alignment {
            file = file.direct(alignment);
        }
        let world = SimWorld::new(rng.next_u64(), SimConfig::random(&mut rng), vec![file]);
        let told = Arc::new(Told::default());
        let mut options = Options::default();
        options.hooks = Hooks {
            transform: Some(Arc::new(Xor)),
            observer: Some(Arc::clone(&told) as Arc<dyn Observer>),
        };
        let driving = Driving::plain(2);
        let mut machine = Machine::open(
            &world,
            layers(&[&built.bytes], &[false]).unwrap(),
            options,
            Model::new(built.active, 1),
            driving,
            rng.clone(),
        )
        .unwrap();
        let mut expected = Vec::new();
        for _ in 0..400 {
            let (lba, count) = (rng.below(2040), 1 + rng.below(8));
            let ask = match rng.index(6) {
                0 | 1 => Ask::Read { lba, count },
                2 => Ask::Discard { lba, count },
                3 => Ask::Zero {
                    lba,
                    count,
                    unmap: rng.chance(128),
                    fua: false,
                },
                _ => Ask::Write {
                    lba,
                    count,
                    fua: rng.chance(16),
                },
            };
            if !matches!(ask, Ask::Read { .. }) {
                expected.push((lba * 512, count * 512));
            }
            // The machine compares what is read with its model.
            machine.ask(ask).unwrap();
        }
        machine.drain().unwrap();
        expected.sort_unstable();
        let mut told = std::mem::take(&mut *told.0.lock().unwrap());
        told.sort_unstable();
        assert_eq!(told, expected, "seed {seed}");
        machine.close().unwrap();
        assert_eq!(world.complaints(), Vec::<String>::new());
        // The naive reader has the same cipher, and nothing else in common with the engine.
        let contents = world.contents(urus_sim::world::IMAGE).clone();
        let reader = GuestReader::open(contents.bytes(), None).unwrap();
        let plain = reader.clone().read(0, 1 << 20).unwrap();
        let deciphered = reader.ciphered(true).read(0, 1 << 20).unwrap();
        let stamps = deciphered
            .chunks(512)
            .filter(|sector| sector.iter().any(|byte| *byte != 0));
        assert!(stamps.count() > 100, "seed {seed}");
        let equal = plain.chunks(512).zip(deciphered.chunks(512));
        let equal =
            equal.filter(|(one, other)| one == other && other.iter().any(|byte| *byte != 0));
        assert_eq!(equal.count(), 0, "seed {seed}: data that is not ciphered");
    }
}

/// Guards against a cipher that is promised and not there: a raw image has no place for one.
#[test]
fn a_raw_image_takes_no_cipher() {
    let world = SimWorld::new(1, SimConfig::default(), vec![FileSpec::new(vec![0; 65536])]);
    let mut options = Options::default();
    options.hooks.transform = Some(Arc::new(Xor));
    let layers = layers(&[vec![0; 65536]], &[true]).unwrap();
    let opened = urus_engine::Maintenance::open(world.handle(), layers, options);
    let error = opened.err().expect("it is refused");
    assert!(error.to_string().contains("cipher"), "{error}");
}

thread_local! {
    /// The machine of this test's thread.
    static WORLD: RefCell<Option<SimWorld>> = const { RefCell::new(None) };
}

/// Counts what it is told, and notes how many operations had gone to storage by then.
#[derive(Default)]
struct Early(AtomicU64, AtomicU64);

impl Observer for Early {
    fn changes(&self, _offset: u64, _len: u64) {
        let ops = WORLD.with_borrow(|world| world.as_ref().map_or(0, SimWorld::op_count));
        self.0.fetch_add(1, Ordering::SeqCst);
        self.1.store(ops, Ordering::SeqCst);
    }
}

/// Guards against an observer that is told too late (what copies the old data before it changes would copy the new): it is told before any
/// operation of the request is given to storage, of hits as of all others.
#[test]
fn whoever_observes_is_told_before_anything_is_changed() {
    let mut hits = 0;
    for (seed, raw) in [(1, false), (2, false), (3, true), (4, true)] {
        let mut rng = Rng::new(seed);
        let mut plan = image::plan(1 << 18, 12, 3, 4);
        plan.fill = 200;
        let built = image::build(&plan, &mut rng);
        let bytes = if raw {
            image::bytes_of(&built.active)
        } else {
            built.bytes
        };
        let file = FileSpec::new(bytes.clone());
        let world = SimWorld::new(rng.next_u64(), SimConfig::random(&mut rng), vec![file]);
        WORLD.set(Some(world.clone()));
        let told = Arc::new(Early::default());
        let mut options = Options::default();
        options.hooks.observer = Some(Arc::clone(&told) as Arc<dyn Observer>);
        let driving = Driving::plain(1);
        let layers = layers(&[&bytes], &[raw]).unwrap();
        let model = Model::new(built.active, 1);
        let mut machine =
            Machine::open(&world, layers, options, model, driving, rng.clone()).unwrap();
        for number in 1..=200 {
            let (lba, count) = (rng.below(500), 1 + rng.below(12));
            let ask = match rng.index(4) {
                0 => Ask::Discard { lba, count },
                1 => Ask::Zero {
                    lba,
                    count,
                    unmap: rng.chance(128),
                    fua: rng.chance(64),
                },
                _ => Ask::Write {
                    lba,
                    count,
                    fua: rng.chance(64),
                },
            };
            let before = world.op_count();
            assert!(machine.submit(ask), "there is room");
            let what = format!("seed {seed}, request {number}: {ask:?}");
            assert_eq!(told.0.load(Ordering::SeqCst), number, "{what}");
            assert_eq!(told.1.load(Ordering::SeqCst), before, "{what}");
            hits += u64::from(world.op_count() > before);
            machine.drain().unwrap();
        }
        machine.close().unwrap();
        WORLD.set(None);
    }
    assert!(hits > 100, "only {hits} went to storage at once");
}
