//! A commit holds a bounded part of what it writes, and takes time in proportion to it. Guards against a commit that composes all
//! of its tables at once, and against bookkeeping that grows with what a request covers.

mod common;

use std::alloc::System;

use cap::Cap;
use common::{Scratch, open, qemu_img, text};
use urus::{Buffer, Device, OpenOptions, Request};

#[global_allocator]
static GLOBAL: Cap<System> = Cap::new(System, usize::MAX);

const L2_CACHE: u64 = 8 << 20;
/// What commits and settling may take besides the mapping cache (docs/TUNING.md, "Memory").
const COMMIT: usize = 32 << 20;

/// Carries the requests out one after the other; the most memory that was in use meanwhile, less what was in use before.
fn peak(device: &Device, requests: impl IntoIterator<Item = Request>) -> usize {
    let mut queue = device.queue().unwrap().activate().unwrap();
    let before = GLOBAL.allocated();
    for request in requests {
        queue.submit(request).unwrap();
        queue.kick();
        let completion = loop {
            match queue.completion() {
                Some(completion) => break completion,
                None => queue.wait(None),
            }
        };
        completion.result.unwrap();
    }
    GLOBAL.max_allocated() - before
}

/// One test, as the allocator counts what all threads of the process take.
#[test]
fn a_commit_takes_bounded_memory() {
    let scratch = Scratch::new();
    let mut options = OpenOptions::new();
    options.l2_cache_bytes(L2_CACHE);

    // 16384 tables of one cluster each, over a backing file so that each entry changes.
    let base = scratch.path("base.raw");
    std::fs::File::create(&base)
        .unwrap()
        .set_len(512 << 20)
        .unwrap();
    let small = scratch.path("small.qcow2");
    let format = ["-o", "cluster_size=512", "-b", text(&base), "-F", "raw"];
    qemu_img(
        &[
            &["create", "-q", "-f", "qcow2"][..],
            &format,
            &[text(&small)],
        ]
        .concat(),
    );
    let device = open(&options, &small);
    let taken = peak(
        &device,
        [Request::write_zeroes(0, 0, 512 << 20), Request::flush(1)],
    );
    let bound = usize::try_from(L2_CACHE).unwrap() + COMMIT;
    assert!(
        taken <= bound,
        "{taken} bytes for small tables, bound {bound}"
    );
    // What was zeroes is freed, which is settled in steps.
    device.close().unwrap();
    qemu_img(&["check", "-q", text(&small)]);

    // 64 tables of 2 MiB each: all at once they would take 128 MiB.
    let large = scratch.path("large.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=2M",
        text(&large),
        "32T",
    ]);
    let device = open(&options, &large);
    let writes = (0..64).map(|table| {
        let mut buffer = Buffer::new(4096);
        buffer.as_mut_slice().fill(7);
        Request::write(table, table << 39, buffer)
    });
    let taken = peak(&device, writes.chain([Request::flush(64)]));
    assert!(
        taken <= bound,
        "{taken} bytes for large tables, bound {bound}"
    );
    device.close().unwrap();
    qemu_img(&["check", "-q", text(&large)]);
}
