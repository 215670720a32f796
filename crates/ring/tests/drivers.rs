//! One suite for both drivers, on real files of a temporary directory.
//!
//! Guards the contract of `Storage`: each operation completes exactly once, on its own slot, with what the system call
//! says, whichever driver does it.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{
    Bench, DEPTH, LONG, bytes, directory, for_both_drivers, memory, next, pattern, submit,
};
use urus_engine::storage::{FileId, Memory, Op, OpKind, Storage};
use urus_ring::{Driver, DriverKind, FileSet, OpenFile, RingMemory};

for_both_drivers![
    round_trip,
    vectored_segments,
    more_pieces_than_one_call_takes,
    short_read_at_the_end,
    punch_and_zero_range,
    set_len_and_allocate,
    an_unsupported_zero_range_is_passed_on,
    many_operations_in_one_kick,
    a_full_driver_gives_the_operation_back,
    dropping_with_operations_in_flight,
    jobs_run_elsewhere,
    direct_io,
    direct_io_refuses_unaligned_memory,
    errors_reach_their_slot,
    properties_and_lengths,
    slots_may_be_sparse,
    a_slot_in_flight_twice_panics,
];

fn round_trip(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let data = pattern(100_000, 1);
    let write = OpKind::Write {
        offset: 12_345,
        memory: memory(&data),
        sync: false,
    };
    assert_eq!(bench.run(write).unwrap(), data.len());
    let sync = OpKind::Write {
        offset: 0,
        memory: memory(&data[..10]),
        sync: true,
    };
    assert_eq!(bench.run(sync).unwrap(), 10);
    assert_eq!(bench.run(OpKind::SyncData).unwrap(), 0);
    let target = bench.driver.allocate(data.len()).unwrap();
    let read = OpKind::Read {
        offset: 12_345,
        memory: target.clone(),
    };
    assert_eq!(bench.run(read).unwrap(), data.len());
    assert_eq!(bytes(&target), data);
    // The driver has let go of it.
    assert_eq!(target.try_into_buffer().unwrap().as_slice(), data);
    assert_eq!(bench.content()[..10], data[..10]);
    assert_eq!(
        bench
            .run(OpKind::Read {
                offset: 0,
                memory: bench.driver.allocate(0).unwrap()
            })
            .unwrap(),
        0
    );
}

fn vectored_segments(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let data = pattern(10_000, 2);
    let parts = [0..1, 1..700, 700..5000, 5000..10_000];
    let chain = RingMemory::chain(
        parts
            .iter()
            .map(|part| memory(&data[part.clone()]))
            .collect(),
    );
    assert_eq!(
        bench
            .run(OpKind::Write {
                offset: 77,
                memory: chain,
                sync: false
            })
            .unwrap(),
        10_000
    );
    assert_eq!(bench.content()[77..], data);
    let target = RingMemory::chain(
        (0..10)
            .map(|_| bench.driver.allocate(1000).unwrap())
            .collect(),
    );
    // A slice that starts and ends inside pieces.
    let read = OpKind::Read {
        offset: 77 + 1500,
        memory: target.slice(1500, 7000),
    };
    assert_eq!(bench.run(read).unwrap(), 7000);
    assert_eq!(bytes(&target.slice(1500, 7000)), data[1500..8500]);
    assert!(target.slice(0, 1500).is_zero() && target.slice(8500, 1500).is_zero());
}

fn more_pieces_than_one_call_takes(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let data = pattern(3 * 1500, 3);
    let chain = RingMemory::chain(data.chunks(3).map(memory).collect());
    let done = bench
        .run(OpKind::Write {
            offset: 0,
            memory: chain.clone(),
            sync: false,
        })
        .unwrap();
    assert_eq!(done, 3 * 1024, "the first 1024 pieces; the engine goes on");
    let rest = OpKind::Write {
        offset: 3072,
        memory: chain.slice(done, 4500 - done),
        sync: false,
    };
    assert_eq!(bench.run(rest).unwrap(), 4500 - done);
    assert_eq!(bench.content(), data);
}

fn short_read_at_the_end(kind: DriverKind) {
    let mut bench = Bench::with(kind, DEPTH, false, &pattern(1000, 4));
    let target = bench.driver.allocate(4096).unwrap();
    assert_eq!(
        bench
            .run(OpKind::Read {
                offset: 900,
                memory: target.clone()
            })
            .unwrap(),
        100
    );
    assert_eq!(bytes(&target.slice(0, 100)), pattern(1000, 4)[900..]);
    assert_eq!(
        bench
            .run(OpKind::Read {
                offset: 1000,
                memory: target.clone()
            })
            .unwrap(),
        0
    );
    assert_eq!(
        bench
            .run(OpKind::Read {
                offset: 1 << 40,
                memory: target
            })
            .unwrap(),
        0
    );
}

fn punch_and_zero_range(kind: DriverKind) {
    let data = pattern(64 << 10, 5);
    let mut bench = Bench::with(kind, DEPTH, false, &data);
    assert!(
        bench.driver.properties(FileId(0)).can_punch
            && bench.driver.properties(FileId(0)).can_zero_range
    );
    assert_eq!(
        bench
            .run(OpKind::Punch {
                offset: 4096,
                len: 8192
            })
            .unwrap(),
        0
    );
    assert_eq!(
        bench
            .run(OpKind::ZeroRange {
                offset: 32 << 10,
                len: 4096
            })
            .unwrap(),
        0
    );
    assert_eq!(
        bench
            .run(OpKind::Punch {
                offset: 60 << 10,
                len: 1 << 20
            })
            .unwrap(),
        0
    );
    let mut expected = data;
    expected[4096..12_288].fill(0);
    expected[32 << 10..36 << 10].fill(0);
    expected[60 << 10..].fill(0);
    assert_eq!(
        bench.content(),
        expected,
        "punching past the end leaves the length"
    );
    assert_eq!(
        bench
            .run(OpKind::ZeroRange {
                offset: 64 << 10,
                len: 4096
            })
            .unwrap(),
        0
    );
    assert_eq!(
        bench.content().len(),
        68 << 10,
        "a zero range may extend the file"
    );
}

fn set_len_and_allocate(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    assert_eq!(bench.run(OpKind::SetLen { len: 123_456 }).unwrap(), 0);
    assert_eq!(bench.driver.file_len(FileId(0)).unwrap(), 123_456);
    assert_eq!(bench.run(OpKind::SetLen { len: 100 }).unwrap(), 0);
    assert_eq!(bench.driver.file_len(FileId(0)).unwrap(), 100);
    assert_eq!(
        bench
            .run(OpKind::Allocate {
                offset: 0,
                len: 1 << 20
            })
            .unwrap(),
        0
    );
    assert_eq!(bench.driver.file_len(FileId(0)).unwrap(), 1 << 20);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&bench.path).unwrap());
    assert!(blocks * 512 >= 1 << 20, "space is reserved");
}

/// tmpfs punches but has no zero range: the engine must hear EOPNOTSUPP, whatever was expected.
fn an_unsupported_zero_range_is_passed_on(kind: DriverKind) {
    let shared = Path::new("/dev/shm");
    if !shared.is_dir() {
        eprintln!("SKIPPED: no /dev/shm");
        return;
    }
    let directory = tempfile::tempdir_in(shared).unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, pattern(8192, 17)).unwrap();
    let file = OpenFile::open_image(&path, false, false).unwrap();
    let mut driver = Driver::open(FileSet::new(vec![file]), kind, DEPTH).unwrap();
    submit(
        &mut driver,
        FileId(0),
        OpKind::ZeroRange {
            offset: 0,
            len: 4096,
        },
        0,
    );
    let error = next(&mut driver).result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(95), "EOPNOTSUPP");
    submit(
        &mut driver,
        FileId(0),
        OpKind::Punch {
            offset: 0,
            len: 4096,
        },
        0,
    );
    next(&mut driver).result.unwrap();
    assert!(driver.properties(FileId(0)).can_punch && !driver.properties(FileId(0)).can_zero_range);
    assert_eq!(std::fs::read(&path).unwrap()[..4096], [0; 4096]);
}

fn many_operations_in_one_kick(kind: DriverKind) {
    let mut bench = Bench::with(kind, 256, false, &pattern(256 * 512, 6));
    for round in 0..20 {
        let targets = (0..256)
            .map(|_| bench.driver.allocate(512).unwrap())
            .collect::<Vec<_>>();
        for (slot, target) in targets.iter().enumerate() {
            let offset = u64::try_from((slot + round) % 256 * 512).unwrap();
            submit(
                &mut bench.driver,
                FileId(0),
                OpKind::Read {
                    offset,
                    memory: target.clone(),
                },
                slot,
            );
        }
        bench.driver.kick();
        let mut seen = vec![false; 256];
        for _ in 0..256 {
            let completion = next(&mut bench.driver);
            assert_eq!(completion.result.unwrap(), 512);
            assert!(
                !std::mem::replace(&mut seen[completion.slot], true),
                "each slot once"
            );
        }
        assert!(bench.driver.complete().is_none());
        let expected = pattern(256 * 512, 6);
        for (slot, target) in targets.iter().enumerate() {
            let start = (slot + round) % 256 * 512;
            assert_eq!(bytes(target), expected[start..start + 512]);
        }
    }
}

fn a_full_driver_gives_the_operation_back(kind: DriverKind) {
    let mut bench = Bench::with(kind, 5, false, &pattern(4096, 7));
    let target = bench.driver.allocate(512).unwrap();
    let read = |offset| Op {
        file: FileId(0),
        kind: OpKind::Read {
            offset,
            memory: target.clone(),
        },
    };
    for slot in 0..5 {
        assert!(bench.driver.submit(read(0), slot).is_ok());
    }
    let Err(op) = bench.driver.submit(read(512), 5) else {
        panic!("a sixth operation of five")
    };
    assert!(
        matches!(op.kind, OpKind::Read { offset: 512, .. }),
        "the operation itself comes back"
    );
    let first = next(&mut bench.driver);
    assert!(
        bench.driver.submit(op, first.slot).is_ok(),
        "there is room after a completion"
    );
    for _ in 0..5 {
        next(&mut bench.driver).result.unwrap();
    }
    assert!(bench.driver.complete().is_none());
}

fn dropping_with_operations_in_flight(kind: DriverKind) {
    for kicked in [false, true] {
        let mut bench = Bench::with(kind, DEPTH, true, &pattern(16 << 20, 8));
        let target = bench.driver.allocate(16 << 20).unwrap();
        for slot in 0..63 {
            let part = target.slice(slot * (256 << 10), 256 << 10);
            let offset = u64::try_from(slot * (256 << 10)).unwrap();
            submit(
                &mut bench.driver,
                FileId(0),
                OpKind::Read {
                    offset,
                    memory: part,
                },
                slot,
            );
        }
        submit(&mut bench.driver, FileId(0), OpKind::SyncData, 63);
        if kicked {
            bench.driver.kick();
        }
        drop(bench);
        // Nothing holds the memory, so nobody writes it any more.
        target.zero(0, 16 << 20);
        assert!(
            target
                .try_into_buffer()
                .unwrap()
                .as_slice()
                .iter()
                .all(|&byte| byte == 0)
        );
    }
}

fn jobs_run_elsewhere(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let here = thread::current().id();
    let ran = Arc::new(std::sync::Mutex::new(Vec::new()));
    for slot in 0..32 {
        let ran = Arc::clone(&ran);
        let job = Box::new(move || {
            thread::sleep(Duration::from_millis(1));
            assert!(slot != 7, "job 7 panics, on purpose");
            ran.lock().unwrap().push(thread::current().id());
        });
        submit(&mut bench.driver, FileId(0), OpKind::Job(job), slot);
    }
    let mut seen = [false; 32];
    for _ in 0..32 {
        let completion = next(&mut bench.driver);
        assert!(!std::mem::replace(&mut seen[completion.slot], true));
        assert_eq!(completion.result.is_err(), completion.slot == 7);
    }
    let ran = ran.lock().unwrap();
    assert_eq!(ran.len(), 31);
    assert!(ran.iter().all(|&id| id != here));
}

fn direct_io(kind: DriverKind) {
    let mut bench = Bench::with(kind, DEPTH, true, &[]);
    let properties = bench.driver.properties(FileId(0));
    assert!(
        [512, 4096].contains(&properties.alignment),
        "{properties:?}"
    );
    assert!(
        [512, 4096].contains(&properties.memory_alignment),
        "{properties:?}"
    );
    let data = pattern(256 << 10, 9);
    let write = OpKind::Write {
        offset: 0,
        memory: memory(&data),
        sync: false,
    };
    assert_eq!(bench.run(write).unwrap(), data.len());
    let unit = usize::try_from(properties.alignment).unwrap();
    let target = bench.driver.allocate(256 << 10).unwrap();
    assert!(target.is_aligned(4096));
    let read = OpKind::Read {
        offset: u64::try_from(unit).unwrap(),
        memory: target.slice(unit, 32 * unit),
    };
    assert_eq!(bench.run(read).unwrap(), 32 * unit);
    assert_eq!(bytes(&target.slice(unit, 32 * unit)), data[unit..33 * unit]);
    let chain = RingMemory::chain(vec![
        target.slice(0, unit),
        target.slice(8 * unit, 3 * unit),
    ]);
    assert_eq!(
        bench
            .run(OpKind::Read {
                offset: 0,
                memory: chain.clone()
            })
            .unwrap(),
        4 * unit
    );
    assert_eq!(bytes(&chain), data[..4 * unit]);
    // The helper sees to the alignment itself.
    let file = bench.driver.files().file(FileId(0));
    assert_eq!(file.read_exact_at(1001, 5000).unwrap(), data[1001..6001]);
}

fn direct_io_refuses_unaligned_memory(kind: DriverKind) {
    let mut bench = Bench::with(kind, DEPTH, true, &pattern(8192, 10));
    let target = bench.driver.allocate(8192).unwrap();
    assert!(!target.slice(1, 512).is_aligned(2));
    let read = OpKind::Read {
        offset: 100,
        memory: target.slice(0, 512),
    };
    assert_eq!(
        bench.run(read).unwrap_err().raw_os_error(),
        Some(22),
        "EINVAL"
    );
}

/// What a disk has to do must not wait for the end of a long batch: after a few reads past the page cache they are under way, untold.
#[test]
fn direct_reads_start_before_the_kick() {
    let content = pattern(8 * 4096, 3);
    let mut bench = Bench::with(DriverKind::IoUring, 16, true, &content);
    let read = |driver: &mut Driver, slot: usize| {
        let memory = RingMemory::new(4096);
        let kind = OpKind::Read {
            offset: 4096 * slot as u64,
            memory: memory.clone(),
        };
        submit(driver, FileId(0), kind, slot);
        memory
    };
    let mut memories = Vec::new();
    let start = Instant::now();
    let mut seen = 0;
    while seen == 0 {
        assert!(start.elapsed() < LONG, "nothing completes without a kick");
        if memories.len() < 8 {
            memories.push(read(&mut bench.driver, memories.len()));
        }
        seen += usize::from(bench.driver.complete().is_some());
    }
    assert!(memories.len() >= 2, "one read is no batch");
    while seen < memories.len() {
        assert_eq!(next(&mut bench.driver).result.unwrap(), 4096);
        seen += 1;
    }
    for (block, memory) in content.chunks(4096).zip(&memories) {
        assert_eq!(bytes(memory), block);
    }
}

fn errors_reach_their_slot(kind: DriverKind) {
    let directory = directory();
    let path = directory.path().join("image");
    std::fs::write(&path, pattern(4096, 13)).unwrap();
    let files = vec![
        OpenFile::open_image(&path, false, false).unwrap(),
        OpenFile::open_image(&path, true, false).unwrap(),
    ];
    assert!(files[0].is_writable() && !files[1].is_writable());
    let mut driver = Driver::open(FileSet::new(files), kind, DEPTH).unwrap();
    for slot in 0..32 {
        let memory = driver.allocate(512).unwrap();
        let kind = match slot % 4 {
            0 => OpKind::Read { offset: 0, memory },
            1 => OpKind::Write {
                offset: 0,
                memory,
                sync: slot % 8 == 1,
            },
            2 => OpKind::Punch {
                offset: 0,
                len: 512,
            },
            _ => OpKind::SetLen { len: 1 },
        };
        submit(&mut driver, FileId(u16::from(slot >= 4)), kind, slot);
        if slot == 3 {
            // Let the good ones on the writable file pass first.
            for _ in 0..4 {
                next(&mut driver).result.unwrap();
            }
        }
    }
    let mut seen = 0;
    for _ in 4..32 {
        let completion = next(&mut driver);
        seen += completion.slot;
        match completion.slot % 4 {
            0 => assert_eq!(completion.result.unwrap(), 1),
            1 | 2 => assert_eq!(
                completion.result.unwrap_err().raw_os_error(),
                Some(9),
                "EBADF"
            ),
            _ => assert_eq!(
                completion.result.unwrap_err().raw_os_error(),
                Some(22),
                "EINVAL"
            ),
        }
    }
    assert_eq!(seen, (4..32).sum::<usize>());
    // Offsets that no file has.
    let memory = driver.allocate(512).unwrap();
    submit(
        &mut driver,
        FileId(0),
        OpKind::Read {
            offset: u64::MAX - 511,
            memory,
        },
        0,
    );
    assert!(next(&mut driver).result.is_err());
}

fn properties_and_lengths(kind: DriverKind) {
    let bench = Bench::with(kind, DEPTH, false, &pattern(1234, 14));
    let properties = bench.driver.properties(FileId(0));
    assert_eq!(
        (
            properties.alignment,
            properties.memory_alignment,
            properties.regular
        ),
        (1, 1, true)
    );
    assert_eq!(bench.driver.file_len(FileId(0)).unwrap(), 1234);
    assert_eq!(
        bench.driver.files().file(FileId(0)).name(),
        bench.path.display().to_string()
    );
}

fn slots_may_be_sparse(kind: DriverKind) {
    let mut bench = Bench::with(kind, 4, false, &pattern(4096, 15));
    for slot in [0, 1000, 5, 999] {
        let memory = bench.driver.allocate(10).unwrap();
        submit(
            &mut bench.driver,
            FileId(0),
            OpKind::Read { offset: 0, memory },
            slot,
        );
    }
    let mut slots = (0..4)
        .map(|_| next(&mut bench.driver).slot)
        .collect::<Vec<_>>();
    slots.sort_unstable();
    assert_eq!(slots, [0, 5, 999, 1000]);
}

/// The ring must not free memory that the kernel works on because of an engine's mistake.
fn a_slot_in_flight_twice_panics(kind: DriverKind) {
    if kind == DriverKind::Blocking {
        return; // harmless there
    }
    let result = std::panic::catch_unwind(|| {
        let mut bench = Bench::with(kind, 4, false, &pattern(4096, 16));
        for _ in 0..2 {
            let memory = bench.driver.allocate(10).unwrap();
            submit(
                &mut bench.driver,
                FileId(0),
                OpKind::Read { offset: 0, memory },
                1,
            );
        }
    });
    assert!(result.is_err());
}
