//! The simulated storage keeps the contract of `Storage`, and nothing more than it: what the contract leaves open is
//! drawn by lot. Guards against a simulator that is kinder than a real machine, and against runs that a seed does not
//! repeat.

// Test code on 64-bit hosts.
#![allow(clippy::cast_possible_truncation)]

use std::io;

use urus_engine::storage::{Completion, Memory, Op, OpKind, Storage};
use urus_engine::sync::{Arc, AtomicBool, Ordering};
use urus_sim::fault::{ACTIONS, Action, Fault, Trigger};
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

fn world(spec: FileSpec) -> (SimWorld, SimStorage) {
    let world = SimWorld::new(1, calm(), vec![spec]);
    let storage = world.handle();
    (world, storage)
}

fn submit(storage: &mut SimStorage, kind: OpKind<SimMemory>, slot: usize) {
    assert!(
        storage.submit(Op { file: IMAGE, kind }, slot).is_ok(),
        "there is room"
    );
}

/// One operation, from submission to completion.
fn run(storage: &mut SimStorage, kind: OpKind<SimMemory>) -> io::Result<usize> {
    submit(storage, kind, 7);
    storage.kick();
    loop {
        storage.wait(None);
        if let Some(Completion { slot, result }) = storage.complete() {
            assert_eq!(slot, 7);
            return result;
        }
    }
}

fn write(offset: u64, bytes: Vec<u8>) -> OpKind<SimMemory> {
    OpKind::Write {
        offset,
        memory: SimMemory::from_vec(bytes),
        sync: false,
    }
}

fn read(storage: &mut SimStorage, offset: u64, len: usize) -> Vec<u8> {
    let memory = storage.allocate(len).unwrap();
    let done = run(
        storage,
        OpKind::Read {
            offset,
            memory: memory.clone(),
        },
    )
    .unwrap();
    memory.to_vec()[..done].to_vec()
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn operations_do_what_they_say() {
    let (world, mut storage) = world(FileSpec::new(vec![1; 1000]));
    assert_eq!(run(&mut storage, write(900, vec![2; 200])).unwrap(), 200);
    assert_eq!(storage.file_len(IMAGE).unwrap(), 1100);
    assert_eq!(
        read(&mut storage, 890, 1000),
        [vec![1; 10], vec![2; 200]].concat()
    );
    assert_eq!(read(&mut storage, 1100, 10), []);
    run(
        &mut storage,
        OpKind::Punch {
            offset: 950,
            len: 1000,
        },
    )
    .unwrap();
    assert_eq!(storage.file_len(IMAGE).unwrap(), 1100);
    assert_eq!(
        read(&mut storage, 940, 20),
        [vec![2; 10], vec![0; 10]].concat()
    );
    run(
        &mut storage,
        OpKind::ZeroRange {
            offset: 0,
            len: 2000,
        },
    )
    .unwrap();
    assert_eq!(read(&mut storage, 0, 3000), vec![0; 2000]);
    run(
        &mut storage,
        OpKind::Allocate {
            offset: 2000,
            len: 500,
        },
    )
    .unwrap();
    assert_eq!(storage.file_len(IMAGE).unwrap(), 2500);
    run(&mut storage, OpKind::SetLen { len: 10 }).unwrap();
    assert_eq!(storage.file_len(IMAGE).unwrap(), 10);
    run(&mut storage, OpKind::SyncData).unwrap();
    let ran = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&ran);
    run(
        &mut storage,
        OpKind::Job(Box::new(move || shared.store(true, Ordering::SeqCst))),
    )
    .unwrap();
    assert!(ran.load(Ordering::SeqCst));
    assert_eq!(world.complaints(), Vec::<String>::new());
    assert_eq!((world.in_flight(), world.sync_count()), (0, 1));
}

#[test]
fn misuse_is_refused_and_told() {
    let (direct, mut storage) = world(FileSpec::new(vec![1; 8192]).direct(512));
    assert_eq!(errno(run(&mut storage, write(8, vec![0; 512]))), 22);
    assert_eq!(errno(run(&mut storage, write(0, vec![0; 100]))), 22);
    let skewed = SimMemory::skewed(vec![0; 512], 8);
    assert_eq!(
        errno(run(
            &mut storage,
            OpKind::Read {
                offset: 0,
                memory: skewed
            }
        )),
        22
    );
    assert_eq!(direct.complaints().len(), 3);
    run(&mut storage, write(512, vec![0; 1024])).unwrap();
    assert_eq!(direct.complaints().len(), 3);

    let (fixed, mut storage) = world(FileSpec::new(Vec::new()).read_only());
    assert_eq!(errno(run(&mut storage, write(0, vec![0; 512]))), 9);
    assert_eq!(errno(run(&mut storage, OpKind::SetLen { len: 0 })), 9);
    assert_eq!(fixed.complaints().len(), 2);

    let mut spec = FileSpec::new(vec![1; 512]);
    spec.properties.can_punch = false;
    spec.capacity = 1024;
    let (_, mut storage) = world(spec);
    assert_eq!(
        errno(run(
            &mut storage,
            OpKind::Punch {
                offset: 0,
                len: 512
            }
        )),
        95
    );
    assert_eq!(errno(run(&mut storage, write(512, vec![0; 1024]))), 28);
    run(&mut storage, write(512, vec![0; 512])).unwrap();
    assert_eq!(
        errno(run(
            &mut storage,
            OpKind::Allocate {
                offset: 0,
                len: 2000
            }
        )),
        28
    );
}

#[test]
fn a_block_device_keeps_its_length_and_is_never_zero_by_itself() {
    let (world, mut storage) = world(FileSpec::new(Vec::new()).block_device(8192, 3));
    assert!(!storage.properties(IMAGE).regular);
    assert!(read(&mut storage, 0, 8192).iter().all(|byte| *byte != 0));
    assert_eq!(errno(run(&mut storage, write(8000, vec![0; 512]))), 28);
    assert_eq!(errno(run(&mut storage, OpKind::SetLen { len: 10 })), 22);
    run(
        &mut storage,
        OpKind::ZeroRange {
            offset: 512,
            len: 512,
        },
    )
    .unwrap();
    assert_eq!(read(&mut storage, 512, 512), [0; 512]);
    assert_eq!(read(&mut storage, 8192, 512), []);
    assert_eq!(world.contents(IMAGE).len(), 8192);
}

#[test]
fn memory_is_taken_and_filled_late() {
    let (world, mut storage) = world(FileSpec::new(vec![1; 512]));
    let memory = SimMemory::from_vec(vec![5; 512]);
    submit(
        &mut storage,
        OpKind::Write {
            offset: 0,
            memory: memory.clone(),
            sync: false,
        },
        0,
    );
    memory.write(0, &[6; 512]);
    storage.kick();
    world.settle();
    assert_eq!(
        world.contents(IMAGE).bytes(),
        [6; 512],
        "what the memory held at last"
    );
    assert_eq!(world.complaints().len(), 1);
    // A read's memory holds junk until the read took effect.
    let memory = storage.allocate(512).unwrap();
    submit(
        &mut storage,
        OpKind::Read {
            offset: 0,
            memory: memory.clone(),
        },
        1,
    );
    assert!(memory.to_vec().iter().all(|byte| *byte != 0 && *byte != 6));
    storage.kick();
    world.settle();
    assert_eq!(memory.to_vec(), [6; 512]);
}

#[test]
fn completions_are_seen_once_in_some_order_after_a_kick() {
    let mut orders = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let world = SimWorld::new(seed, calm(), vec![FileSpec::new(vec![0; 4096])]);
        let mut storage = world.handle();
        for slot in 0..4 {
            submit(&mut storage, write(slot as u64 * 512, vec![1; 512]), slot);
        }
        assert!(!world.step(), "nothing starts before the kick");
        storage.kick();
        assert!(!world.is_awake(storage.number()));
        world.settle();
        assert!(world.is_awake(storage.number()));
        let order: Vec<usize> = std::iter::from_fn(|| storage.complete())
            .map(|done| done.slot)
            .collect();
        assert_eq!(order.len(), 4);
        orders.insert(order);
        storage.notifier().notify();
        assert!(world.is_awake(storage.number()) && storage.take_notification());
        assert!(!world.is_awake(storage.number()));
    }
    assert!(orders.len() > 10, "{orders:?}");
}

#[test]
fn there_is_a_limit_and_the_operation_comes_back() {
    let world = SimWorld::new(
        1,
        SimConfig { depth: 2, ..calm() },
        vec![FileSpec::new(Vec::new())],
    );
    let mut storage = world.handle();
    submit(&mut storage, write(0, vec![1; 512]), 0);
    submit(&mut storage, write(512, vec![1; 512]), 1);
    let back = storage.submit(
        Op {
            file: IMAGE,
            kind: write(1024, vec![3; 512]),
        },
        2,
    );
    assert!(matches!(
        back,
        Err(Op {
            kind: OpKind::Write { offset: 1024, .. },
            ..
        })
    ));
    let mut other = world.handle();
    submit(&mut other, write(1024, vec![2; 512]), 0);
    storage.kick();
    world.settle();
    assert!(storage.complete().is_some());
    submit(&mut storage, write(1024, vec![3; 512]), 2);
}

#[test]
#[should_panic(expected = "a hang")]
fn a_missing_kick_is_a_hang() {
    let (_, mut storage) = world(FileSpec::new(Vec::new()));
    submit(&mut storage, write(0, vec![1; 512]), 0);
    while storage.complete().is_none() {
        storage.wait(None);
    }
}

#[test]
#[should_panic(expected = "slot 3 is in flight")]
fn a_slot_is_not_used_twice() {
    let (_, mut storage) = world(FileSpec::new(Vec::new()));
    submit(&mut storage, OpKind::SyncData, 3);
    submit(&mut storage, OpKind::SyncData, 3);
}

#[test]
fn errors_are_given_as_planned() {
    for action in ACTIONS {
        let (world, mut storage) = world(FileSpec::new(vec![1; 2048]));
        world.plan_faults(vec![Fault {
            trigger: Trigger::Ops(1, 3),
            action,
        }]);
        assert_eq!(run(&mut storage, write(0, vec![2; 1024])).unwrap(), 1024);
        let result = run(&mut storage, write(0, vec![3; 1024]));
        let bytes = world.contents(IMAGE).bytes().to_vec();
        let first = |len: usize| [vec![3; len], vec![2; 1024 - len], vec![1; 1024]].concat();
        match action {
            Action::Eio => assert_eq!(errno(result), 5),
            Action::Enospc => assert_eq!((errno(result), bytes), (28, first(0))),
            Action::Eintr => assert_eq!((errno(result), bytes), (4, first(0))),
            Action::Eagain => assert_eq!((errno(result), bytes), (11, first(0))),
            Action::ShortBySector | Action::ShortByHalf => {
                assert_eq!((result.unwrap(), bytes), (512, first(512)))
            }
            Action::ShortToZero => assert_eq!((result.unwrap(), bytes), (0, first(0))),
            // Writes are always supported: two others are not.
            Action::Eopnotsupp => {
                assert_eq!((result.unwrap(), bytes), (1024, first(1024)));
                let punch = OpKind::Punch {
                    offset: 0,
                    len: 512,
                };
                assert_eq!(errno(run(&mut storage, punch)), 95);
                assert_eq!(world.contents(IMAGE).bytes(), first(1024));
                assert_eq!(world.injected(), 1);
                continue;
            }
        }
        let memory = storage.allocate(2048).unwrap();
        let result = run(&mut storage, OpKind::Read { offset: 0, memory });
        match action {
            Action::Eio | Action::Eintr | Action::Eagain => assert!(result.is_err()),
            Action::Enospc => assert_eq!(result.unwrap(), 2048),
            Action::ShortBySector => assert_eq!(result.unwrap(), 1536),
            Action::ShortByHalf => assert_eq!(result.unwrap(), 1024),
            Action::ShortToZero => assert_eq!(result.unwrap(), 0),
            Action::Eopnotsupp => unreachable!("it has been seen to"),
        }
        assert!(run(&mut storage, write(0, vec![3; 1024])).is_ok());
        assert_eq!(
            world.injected(),
            if action == Action::Enospc { 1 } else { 2 }
        );
        assert_eq!(world.op_count(), 4);
    }
    let (world, mut storage) = world(FileSpec::new(vec![1; 2048]));
    world.plan_faults(vec![Fault {
        trigger: Trigger::Sync(1),
        action: Action::Eio,
    }]);
    let results: Vec<bool> = (0..3)
        .map(|_| run(&mut storage, OpKind::SyncData).is_ok())
        .collect();
    assert_eq!(results, [true, false, true]);
    assert_eq!(world.failed_syncs(), 1);
    world.plan_faults(vec![Fault {
        trigger: Trigger::Sync(3),
        action: Action::Eopnotsupp,
    }]);
    assert_eq!(errno(run(&mut storage, OpKind::SyncData)), 95);
    assert_eq!(world.failed_syncs(), 2);
}

/// Random operations from three handles.
fn random_run(seed: u64) -> (u64, u64) {
    let mut rng = Rng::new(seed ^ 0x55);
    let config = SimConfig::random(&mut rng);
    let files = vec![FileSpec::new(vec![1; 9000]), FileSpec::new(vec![2; 5000])];
    let world = SimWorld::new(seed, config, files);
    let mut handles: Vec<SimStorage> = (0..3).map(|_| world.handle()).collect();
    let mut slots = 0;
    for _ in 0..500 {
        let storage = &mut handles[rng.index(3)];
        match rng.below(4) {
            0 => {
                let (offset, len) = (rng.below(10_000), rng.below(3000) as usize);
                let kind = match rng.below(5) {
                    0 => OpKind::SyncData,
                    1 => OpKind::Read {
                        offset,
                        memory: storage.allocate(len).unwrap(),
                    },
                    2 => OpKind::Punch {
                        offset,
                        len: len as u64,
                    },
                    _ => write(offset, vec![rng.next_u64() as u8; len]),
                };
                let file = urus_engine::storage::FileId(rng.below(2) as u16);
                slots += 1;
                let _ = storage.submit(Op { file, kind }, slots);
            }
            1 => storage.kick(),
            2 => drop(storage.complete()),
            _ => drop(world.step()),
        }
    }
    let contents = world.contents(IMAGE).hash();
    (world.trace_hash(), contents)
}

#[test]
fn one_seed_twice_gives_one_trace() {
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let first = random_run(seed);
        assert_eq!(first, random_run(seed), "seed {seed}");
        hashes.insert(first.0);
    }
    assert_eq!(hashes.len(), 50);
}
