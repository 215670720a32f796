//! The crash enumerator makes every state that a power cut can leave and no other. Guards against an enumerator that
//! is blind: a toy commit protocol with one barrier left out, or submitted too early, must be caught.

// Test code on 64-bit hosts.
#![allow(clippy::cast_possible_truncation)]

use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;

use urus_engine::storage::{FileId, Op, OpKind, Storage};
use urus_sim::contents::{Change, Contents, Keep};
use urus_sim::crash::{Choice, Class, CrashCursor, Limits};
use urus_sim::fault::{Action, Fault, Trigger};
use urus_sim::log::{Event, Log, OpId};
use urus_sim::memory::SimMemory;
use urus_sim::rng::Rng;
use urus_sim::storage::SimStorage;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

fn calm() -> SimConfig {
    SimConfig {
        refuse: 0,
        split: 0,
        slow: 0,
        ..SimConfig::default()
    }
}

fn write(offset: u64, len: usize, byte: u8) -> OpKind<SimMemory> {
    OpKind::Write {
        offset,
        memory: SimMemory::from_vec(vec![byte; len]),
        sync: false,
    }
}

fn start(storage: &mut SimStorage, kind: OpKind<SimMemory>, slot: usize) {
    assert!(storage.submit(Op { file: IMAGE, kind }, slot).is_ok());
    storage.kick();
}

fn run(storage: &mut SimStorage, kind: OpKind<SimMemory>) -> bool {
    start(storage, kind, 1000);
    loop {
        storage.wait(None);
        if let Some(done) = storage.complete() {
            return done.result.is_ok();
        }
    }
}

fn cursor(world: &SimWorld) -> CrashCursor {
    let log = world.log();
    let mut cursor = CrashCursor::new(&log);
    cursor.advance_to_end(&log);
    cursor
}

fn no_class(_: FileId, _: &Change) -> Class {
    Class::Unknown
}

/// All states at the end of the log, as bytes.
fn states(world: &SimWorld, limits: &Limits) -> BTreeSet<Vec<u8>> {
    let mut found = BTreeSet::new();
    let mut known = HashSet::new();
    let mut cursor = cursor(world);
    let before: Vec<Vec<u8>> = cursor
        .durable()
        .iter()
        .map(|file| file.bytes().to_vec())
        .collect();
    let tally = cursor.enumerate(
        &mut Rng::new(1),
        limits,
        &no_class,
        (&mut known, 0),
        &mut |state| {
            found.insert(state.files[0].bytes().to_vec());
            ControlFlow::Continue(())
        },
    );
    assert_eq!(tally.visited, found.len() as u64, "each state once");
    assert!(
        cursor
            .durable()
            .iter()
            .map(|file| file.bytes())
            .eq(before.iter()),
        "the durable files are untouched"
    );
    found
}

const WHOLE: Limits = Limits {
    exhaustive: 10,
    random: 64,
    torn: 0,
    each: 0,
};

#[test]
fn every_subset_of_what_is_pending() {
    let world = SimWorld::new(1, calm(), vec![FileSpec::new(vec![0; 4096])]);
    let mut storage = world.handle();
    for slot in 0..6 {
        assert!(run(&mut storage, write(slot * 512, 512, 1)));
        assert_eq!(states(&world, &WHOLE).len(), 2 << slot);
    }
    assert!(run(&mut storage, OpKind::SyncData));
    assert_eq!(states(&world, &WHOLE).len(), 1);
    // Submitted is enough to be pending.
    start(&mut storage, write(0, 512, 2), 0);
    assert_eq!(states(&world, &WHOLE).len(), 2);
    // Many: a choice.
    for slot in 1..20 {
        start(&mut storage, write(slot * 512, 512, 2), slot as usize);
    }
    let limits = Limits { each: 20, ..WHOLE };
    let many = states(&world, &limits);
    let lost = |lost: u64| (0..20).filter(|slot| *slot != lost).collect::<Vec<u64>>();
    let made = |slots: &[u64]| {
        let mut bytes = [vec![1; 6 * 512], vec![0; 1024]].concat();
        for slot in slots {
            let end = (*slot as usize + 1) * 512;
            bytes.resize(bytes.len().max(end), 0);
            bytes[end - 512..end].fill(2);
        }
        bytes
    };
    assert!(many.contains(&made(&[])) && many.contains(&made(&(0..20).collect::<Vec<_>>())));
    for slot in 0..20 {
        assert!(
            many.contains(&made(&lost(slot))) && many.contains(&made(&[slot])),
            "{slot}"
        );
    }
    assert!(many.len() > 100);
}

#[test]
fn a_barrier_covers_what_was_seen_before_it_was_submitted() {
    // Not seen, though in effect: not covered.
    let world = SimWorld::new(1, calm(), vec![FileSpec::new(vec![0; 512])]);
    let mut storage = world.handle();
    start(&mut storage, write(0, 512, 1), 0);
    world.settle();
    start(&mut storage, OpKind::SyncData, 1);
    world.settle();
    assert_eq!(storage.complete().map(|done| done.slot), Some(0));
    assert_eq!(storage.complete().map(|done| done.slot), Some(1));
    assert_eq!(cursor(&world).pending_count(), 1);
    // Another handle's barrier covers it now, but not before it is through.
    let mut other = world.handle();
    assert!(
        other
            .submit(
                Op {
                    file: IMAGE,
                    kind: OpKind::SyncData
                },
                0
            )
            .is_ok()
    );
    assert_eq!(cursor(&world).pending_count(), 1);
    other.kick();
    world.settle();
    assert_eq!(
        cursor(&world).pending_count(),
        0,
        "in effect, though not seen"
    );
    // Barriers are of one file.
    let files = vec![FileSpec::new(vec![0; 512]), FileSpec::new(vec![0; 512])];
    let world = SimWorld::new(1, calm(), files);
    let mut storage = world.handle();
    run(&mut storage, write(0, 512, 1));
    assert!(
        storage
            .submit(
                Op {
                    file: FileId(1),
                    kind: OpKind::SyncData
                },
                0
            )
            .is_ok()
    );
    storage.kick();
    world.settle();
    assert_eq!(cursor(&world).pending_count(), 1);
}

#[test]
fn nothing_is_known_after_a_failed_barrier() {
    let world = SimWorld::new(1, calm(), vec![FileSpec::new(vec![0; 1024])]);
    let mut storage = world.handle();
    world.plan_faults(vec![Fault {
        trigger: Trigger::Sync(0),
        action: Action::Eio,
    }]);
    run(&mut storage, write(0, 512, 1));
    assert!(!run(&mut storage, OpKind::SyncData));
    run(&mut storage, write(512, 512, 1));
    assert!(run(&mut storage, OpKind::SyncData));
    // What came after the failure is durable; what came before never will be, not even below newer data.
    assert_eq!(states(&world, &WHOLE).len(), 2);
    run(&mut storage, write(0, 512, 2));
    assert!(run(&mut storage, OpKind::SyncData));
    let expected = [vec![2; 512], vec![1; 512]].concat();
    assert_eq!(states(&world, &WHOLE), [expected].into());
}

#[test]
fn older_data_never_comes_back_over_durable_data() {
    let world = SimWorld::new(1, calm(), vec![FileSpec::new(vec![0; 1024])]);
    let mut storage = world.handle();
    start(&mut storage, write(0, 1024, 1), 0);
    world.settle();
    // The first write is not seen, the second is.
    let mut other = world.handle();
    run(&mut other, write(512, 512, 2));
    run(&mut other, OpKind::SyncData);
    let expected = [
        [vec![0; 512], vec![2; 512]].concat(),
        [vec![1; 512], vec![2; 512]].concat(),
    ];
    assert_eq!(
        states(&world, &Limits { torn: 50, ..WHOLE }),
        expected.into()
    );
    // A synchronous write is durable by itself.
    let sync = OpKind::Write {
        offset: 0,
        memory: SimMemory::from_vec(vec![3; 512]),
        sync: true,
    };
    run(&mut other, sync);
    assert_eq!(
        states(&world, &WHOLE),
        [[vec![3; 512], vec![2; 512]].concat()].into()
    );
}

/// A write that takes effect in two parts: what its first part wrote and another write replaced durably does not come
/// back with its second part.
#[test]
fn a_part_in_effect_is_not_written_again() {
    let initial = Contents::new(vec![0; 1024]);
    let (slow, other) = (OpId(1), OpId(2));
    let change = |offset, len, byte: u8| Change::Write {
        offset,
        data: vec![byte; len].into(),
    };
    let part = |first: bool| Keep::Sectors {
        mask: [first, !first].into(),
        grown: first,
    };
    let submitted = |op, change| Event::Submitted {
        op,
        file: IMAGE,
        change,
        sync: true,
    };
    let events = vec![
        submitted(slow, change(0, 1024, 1)),
        submitted(other, change(0, 512, 2)),
        Event::Applied {
            op: slow,
            change: change(0, 1024, 1),
            keep: part(true),
            left: Some(part(false)),
        },
        Event::Applied {
            op: other,
            change: change(0, 512, 2),
            keep: Keep::All,
            left: None,
        },
        Event::Synced {
            op: other,
            file: IMAGE,
            ok: true,
        },
    ];
    let log = Log {
        initial: vec![initial],
        events: (1..).zip(events).collect(),
    };
    let mut cursor = CrashCursor::new(&log);
    cursor.advance_to_end(&log);
    let limits = Limits { torn: 50, ..WHOLE };
    let mut found = BTreeSet::new();
    cursor.enumerate(
        &mut Rng::new(1),
        &limits,
        &no_class,
        (&mut HashSet::new(), 0),
        &mut |state| {
            found.insert(state.files[0].bytes().to_vec());
            ControlFlow::Continue(())
        },
    );
    let expected = [
        [vec![2; 512], vec![0; 512]].concat(),
        [vec![2; 512], vec![1; 512]].concat(),
    ];
    assert_eq!(found, expected.into());
}

#[test]
fn lengths_and_torn_writes() {
    let world = SimWorld::new(1, calm(), vec![FileSpec::new(vec![7; 700])]);
    let mut storage = world.handle();
    run(&mut storage, write(512, 1536, 1));
    let found = states(
        &world,
        &Limits {
            torn: 200,
            each: 16,
            ..WHOLE
        },
    );
    let old = [vec![7; 700]].concat();
    let cut = [vec![7; 512], vec![1; 188]].concat();
    let whole = [vec![7; 512], vec![1; 1536]].concat();
    let length_only = [vec![7; 700], vec![0; 1348]].concat();
    let middle = [vec![7; 700], vec![0; 324], vec![1; 512]].concat();
    for state in [&old, &cut, &whole, &length_only, &middle] {
        assert!(found.contains(state), "{} bytes", state.len());
    }
    for state in &found {
        for sector in state.chunks(512) {
            let torn = sector.contains(&1) && sector.contains(&7);
            assert!(!torn, "a sector is whole");
        }
    }
    run(&mut storage, OpKind::SyncData);
    run(&mut storage, OpKind::SetLen { len: 100 });
    run(&mut storage, write(512, 512, 2));
    let lengths: BTreeSet<usize> = states(&world, &WHOLE).iter().map(Vec::len).collect();
    assert_eq!(lengths, [100, 1024, 2048].into());
}

/// Whatever is done and however it is scheduled: the durable files with everything applied are what reads see; and
/// after a last barrier everything is durable.
#[test]
fn the_log_agrees_with_what_reads_see() {
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let config = SimConfig::random(&mut rng);
        let block = rng.chance(64);
        let spec = FileSpec::new(vec![9; 6000]);
        let spec = if block {
            spec.block_device(20_000, seed)
        } else {
            spec
        };
        let world = SimWorld::new(seed, config, vec![spec]);
        let faults = rng.chance(128);
        if faults {
            let fault = |_| Fault {
                trigger: Trigger::Op(rng.below(200)),
                action: Action::Eio,
            };
            world.plan_faults((0..5).map(fault).collect());
        }
        let mut handles: Vec<SimStorage> = (0..3).map(|_| world.handle()).collect();
        let mut cursor = CrashCursor::new(&world.log());
        for slot in 0..400 {
            let storage = &mut handles[rng.index(3)];
            match rng.below(4) {
                0 => {
                    let (offset, len) = (rng.below(10_000), rng.below(3000));
                    let kind = match rng.below(8) {
                        0 | 1 => OpKind::SyncData,
                        2 => OpKind::Punch { offset, len },
                        3 => OpKind::ZeroRange { offset, len },
                        4 => OpKind::SetLen { len: offset },
                        5 => OpKind::Allocate { offset, len },
                        _ => {
                            let memory =
                                SimMemory::from_vec(vec![rng.next_u64() as u8; len as usize]);
                            OpKind::Write {
                                offset,
                                memory,
                                sync: rng.chance(64),
                            }
                        }
                    };
                    let _ = storage.submit(Op { file: IMAGE, kind }, slot);
                }
                1 => storage.kick(),
                2 => drop(storage.complete()),
                _ => drop(world.step()),
            }
            cursor.advance_to_end(&world.log());
            assert_applied(&mut cursor, &world, seed);
        }
        world.plan_faults(Vec::new());
        for storage in &mut handles {
            storage.kick();
        }
        world.settle();
        for storage in &mut handles {
            while storage.complete().is_some() {}
        }
        start(&mut handles[0], OpKind::SyncData, 5000);
        world.settle();
        cursor.advance_to_end(&world.log());
        assert_applied(&mut cursor, &world, seed);
        if !faults {
            assert_eq!(cursor.pending().count(), 0, "seed {seed}");
            assert_eq!(
                cursor.durable()[0].hash(),
                world.contents(IMAGE).hash(),
                "seed {seed}"
            );
        }
    }
}

fn assert_applied(cursor: &mut CrashCursor, world: &SimWorld, seed: u64) {
    // What is in flight comes last; a state in which none of it survived is what reads see.
    let in_flight = in_flight(world);
    let keeps: Vec<Keep> = cursor
        .pending()
        .map(|pending| pending.limit.clone())
        .collect();
    let applied = keeps.len() - in_flight;
    let keeps = keeps
        .into_iter()
        .enumerate()
        .map(|(at, keep)| if at < applied { keep } else { Keep::Nothing });
    let choice = Choice {
        name: "applied",
        keeps: keeps.collect(),
        reversed: false,
        cut_length: false,
    };
    let live = world.contents(IMAGE).bytes().to_vec();
    cursor.with_state(&choice, |state| {
        assert!(state.files[0].bytes() == live, "seed {seed}")
    });
}

/// Changes submitted and not wholly in effect, counted from the log.
fn in_flight(world: &SimWorld) -> usize {
    let mut open = BTreeSet::new();
    for (_, event) in &world.log().events {
        match event {
            Event::Submitted { op, .. } => drop(open.insert(*op)),
            Event::Applied { op, left: None, .. } | Event::Dropped { op } => drop(open.remove(op)),
            _ => {}
        }
    }
    open.len()
}

/// A toy store: a record at a place of its own, then a pointer to it, with a barrier between and one after. The
/// variants leave out what the enumerator must find missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Toy {
    Right,
    NoFirstBarrier,
    NoSecondBarrier,
    BarrierBeforeCompletion,
    RecordInPlace,
}

/// Runs it and counts the states that break a promise: the pointer shows a whole record, and none older than the last
/// acknowledged one.
fn toy_violations(toy: Toy, seed: u64) -> u64 {
    let world = SimWorld::new(
        seed,
        SimConfig::default(),
        vec![FileSpec::new(vec![0; 512])],
    );
    let mut storage = world.handle();
    let mut violations = 0;
    let mut known = HashSet::new();
    let mut rng = Rng::new(seed);
    let mut look = |cursor: &mut CrashCursor, acknowledged: u8| {
        let limits = Limits::default();
        cursor.advance_to_end(&world.log());
        cursor.enumerate(
            &mut rng,
            &limits,
            &no_class,
            (&mut known, u64::from(acknowledged)),
            &mut |state| {
                let bytes = state.files[0].bytes();
                let (shown, place) = (bytes[0], usize::from(bytes[1]));
                let record = bytes.get(place * 512..place * 512 + 1024).unwrap_or(&[]);
                let whole =
                    shown == 0 || (!record.is_empty() && record.iter().all(|byte| *byte == shown));
                violations += u64::from(shown < acknowledged || !whole);
                ControlFlow::Continue(())
            },
        );
    };
    let mut cursor = CrashCursor::new(&world.log());
    for version in 1..=4u8 {
        let place = if toy == Toy::RecordInPlace {
            1
        } else {
            version * 2
        };
        let record = write(u64::from(place) * 512, 1024, version);
        if toy == Toy::BarrierBeforeCompletion {
            start(&mut storage, record, 0);
            assert!(
                storage
                    .submit(
                        Op {
                            file: IMAGE,
                            kind: OpKind::SyncData
                        },
                        1
                    )
                    .is_ok()
            );
            storage.kick();
            world.settle();
            while storage.complete().is_some() {}
        } else {
            run(&mut storage, record);
            look(&mut cursor, version - 1);
            if toy != Toy::NoFirstBarrier {
                run(&mut storage, OpKind::SyncData);
            }
        }
        let mut pointer = vec![0; 512];
        (pointer[0], pointer[1]) = (version, place);
        run(
            &mut storage,
            OpKind::Write {
                offset: 0,
                memory: SimMemory::from_vec(pointer),
                sync: false,
            },
        );
        look(&mut cursor, version - 1);
        if toy != Toy::NoSecondBarrier {
            run(&mut storage, OpKind::SyncData);
        }
        look(&mut cursor, version);
    }
    violations
}

#[test]
fn a_missing_barrier_is_found() {
    for seed in 0..10 {
        assert_eq!(toy_violations(Toy::Right, seed), 0, "seed {seed}");
        for toy in [
            Toy::NoFirstBarrier,
            Toy::NoSecondBarrier,
            Toy::BarrierBeforeCompletion,
            Toy::RecordInPlace,
        ] {
            assert!(toy_violations(toy, seed) > 0, "{toy:?}, seed {seed}");
        }
    }
}
