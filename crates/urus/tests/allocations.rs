//! A hit allocates nothing: from `submit` to the buffer's return, on either driver. Guards the hot path's
//! promise, which one innocent `collect` would break unseen.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{Scratch, make, open};
use urus::{Buffer, IoDriver, OpenOptions, Queue, Request};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread.
struct Counting;

// SAFETY: everything is the system allocator's doing; counting touches a `const` thread-local, which allocates
// nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

const DEPTH: usize = 32;
const BYTES: usize = 4096;

/// Runs full batches of writes and reads, with the buffers of the batch before.
fn rounds(queue: &mut Queue, buffers: &mut Vec<Buffer>, count: usize) {
    for round in 0..count {
        let mut token = 0;
        while let Some(buffer) = buffers.pop() {
            let offset = token * 65536 + 512;
            let request = if round % 2 == 0 {
                Request::write(token, offset, buffer)
            } else {
                Request::read(token, offset, buffer)
            };
            queue.submit(request).unwrap();
            token += 1;
        }
        queue.kick();
        while queue.in_flight() > 0 {
            match queue.completion() {
                Some(completion) => {
                    completion.result.unwrap();
                    buffers.push(completion.buffer.unwrap());
                }
                None => queue.wait(None),
            }
        }
    }
}

#[test]
fn hits_allocate_nothing() {
    for io in [IoDriver::IoUring, IoDriver::Blocking] {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        make(&path, "16M", &[]);
        let device = open(OpenOptions::new().io(io), &path);
        let mut queue = device.queue().unwrap().activate().unwrap();
        let mut buffers: Vec<_> = (0..DEPTH).map(|_| Buffer::new(BYTES)).collect();
        // Allocates the clusters, and lets everything that grows reach its size.
        rounds(&mut queue, &mut buffers, 10);
        let before = ALLOCATIONS.get();
        rounds(&mut queue, &mut buffers, 100);
        assert_eq!(ALLOCATIONS.get() - before, 0, "{io:?}");
    }
}
