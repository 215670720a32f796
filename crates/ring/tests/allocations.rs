//! Guards the hit path: submitting, kicking, waiting and completing allocate nothing once warm.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use urus_engine::storage::{FileId, Memory, Op, OpKind, Storage};
use urus_ring::{Buffer, Driver, DriverKind, FileSet, OpenFile, RingMemory};

struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's obligation, passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligation, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(kind: DriverKind) -> usize {
    const SLOTS: usize = 32;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let files = FileSet::new(vec![OpenFile::open_image(&path, false, false).unwrap()]);
    let mut driver = Driver::open(files, kind, 64).unwrap();
    let whole = driver.allocate(SLOTS * 4096).unwrap();
    let scattered = RingMemory::chain((0..8).map(|_| driver.allocate(512).unwrap()).collect());
    let mut buffer = Some(Buffer::new(4096));
    let mut before = 0;
    for round in 0..20 {
        if round == 10 {
            before = COUNT.get();
        }
        // What a transport does with its buffer.
        let own = buffer.take().unwrap().into_memory();
        for slot in 0..SLOTS {
            let memory = match slot % 3 {
                0 => whole.slice(slot * 4096, 4096),
                1 => scattered.slice(10, 4000),
                _ => own.clone(),
            };
            let kind = match slot % 5 {
                4 => OpKind::Write {
                    offset: 0,
                    memory: whole.slice(0, 4096),
                    sync: false,
                },
                _ => OpKind::Read {
                    offset: 4096,
                    memory,
                },
            };
            let file = FileId(0);
            assert!(driver.submit(Op { file, kind }, slot).is_ok());
        }
        driver.kick();
        let mut done = 0;
        while done < SLOTS {
            match driver.complete() {
                Some(completion) => {
                    assert!(completion.result.is_ok());
                    done += 1;
                }
                None => driver.wait(Some(Duration::from_secs(10))),
            }
        }
        buffer = Some(own.try_into_buffer().unwrap());
    }
    COUNT.get() - before
}

#[test]
fn the_hit_path_allocates_nothing() {
    assert_eq!(allocations(DriverKind::IoUring), 0);
    assert_eq!(allocations(DriverKind::Blocking), 0);
}
