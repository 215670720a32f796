//! What a device says of itself is exact. Guards against requests that are counted twice, under another kind or not at all, against
//! counts that are lost with their queue, and against metrics that make anybody wait.

mod common;

use std::time::{Duration, Instant};

use common::{Scratch, make, open, qemu_img, text};
use urus::{
    Buffer, Device, Format, IoDriver, OpenOptions, OperationStatistics, PauseOptions, Queue,
    Request, Statistics,
};

const CLUSTER: u64 = 64 << 10;
const DRIVERS: [IoDriver; 2] = [IoDriver::IoUring, IoDriver::Blocking];

fn queue(device: &Device) -> Queue {
    device.queue().unwrap().activate().unwrap()
}

/// Runs requests to their end; says of each whether it succeeded.
fn run(queue: &mut Queue, requests: impl IntoIterator<Item = Request>) -> Vec<bool> {
    for request in requests {
        queue.submit(request).unwrap();
    }
    queue.kick();
    let mut results = Vec::new();
    while queue.in_flight() > 0 {
        match queue.completion() {
            Some(completion) => results.push(completion.result.is_ok()),
            None => queue.wait(None),
        }
    }
    results
}

fn numbers(of: &OperationStatistics) -> (u64, u64, u64) {
    assert_eq!(of.latency.count(), 0, "the clock was not asked for");
    (of.operations, of.bytes, of.errors)
}

/// (operations, bytes, errors) by kind of one queue.
fn by_kind(statistics: &Statistics, queue: usize) -> Vec<(&'static str, (u64, u64, u64))> {
    let kinds = statistics.queues[queue].by_kind();
    kinds.map(|(name, kind)| (name, numbers(kind))).collect()
}

#[test]
fn operations_are_counted_by_kind() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        make(&path, "1M", &[]);
        let device = open(OpenOptions::new().io(io), &path);
        let mut queue = queue(&device);
        let buffer = |bytes| Buffer::new(bytes);
        let results = run(
            &mut queue,
            [
                Request::write(0, 0, buffer(4096)),
                Request::write(1, CLUSTER, buffer(8192)).fua(true),
                Request::read(2, 0, buffer(512)),
                Request::read(3, 1 << 20, buffer(512)),
                Request::read(4, 2 << 20, buffer(512)),
                Request::discard(5, 8 * CLUSTER, CLUSTER),
                Request::write_zeroes(6, 4 * CLUSTER, 2 * CLUSTER),
                Request::block_status(7, 0, 3 * CLUSTER),
                Request::flush(8),
                Request::flush(9),
                Request::write(10, (1 << 20) - 512, buffer(1024)),
            ],
        );
        assert_eq!(results.iter().filter(|ok| !**ok).count(), 3);
        let statistics = device.statistics();
        assert_eq!(
            by_kind(&statistics, 0),
            [
                ("read", (1, 512, 2)),
                ("write", (2, 4096 + 8192, 1)),
                ("flush", (2, 0, 0)),
                ("discard", (1, CLUSTER, 0)),
                ("write_zeroes", (1, 2 * CLUSTER, 0)),
                ("block_status", (1, 3 * CLUSTER, 0)),
            ]
        );
        assert_eq!(statistics.queues[0].driver, Some(device.driver()));
        assert_eq!(statistics.queues[0].in_flight, 0);
        assert_eq!((statistics.size, statistics.chain_depth), (1 << 20, 1));
        assert!(!statistics.read_only && !statistics.paused && !statistics.poisoned);
    }
}

/// Each request's own time is known, and none is longer than all of them took.
#[test]
fn latencies_are_of_this_world() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        make(&path, "16M", &[]);
        let device = open(OpenOptions::new().io(io).latencies(true), &path);
        let mut queue = queue(&device);
        let begun = Instant::now();
        for round in 0..50 {
            run(
                &mut queue,
                (0..8).map(|n| Request::write(n, (round * 8 + n) * 512, Buffer::new(512))),
            );
            run(&mut queue, [Request::flush(0)]);
        }
        let took = begun.elapsed();
        let statistics = device.statistics();
        let (writes, flushes) = (&statistics.queues[0].writes, &statistics.queues[0].flushes);
        assert_eq!((writes.operations, flushes.operations), (400, 50));
        assert_eq!((writes.latency.count(), flushes.latency.count()), (400, 50));
        assert!(
            flushes.latency.sum <= took,
            "flushes came one after the other"
        );
        assert!(writes.latency.sum <= took * 8, "eight writes at a time");
        assert!(
            flushes.latency.sum > Duration::from_micros(50),
            "a sync takes a while"
        );
    }
}

/// A queue's numbers outlive it, in the place that the next one takes.
#[test]
fn a_place_passes_on_with_its_counts() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(&path, "1M", &[]);
    let device = open(&OpenOptions::new(), &path);
    let write = |queue: &mut Queue| run(queue, [Request::write(0, 0, Buffer::new(512))]);
    let (mut first, mut second) = (queue(&device), queue(&device));
    assert_eq!((first.number(), second.number()), (0, 1));
    write(&mut first);
    write(&mut second);
    let hits = device.counters().mapping_hits;
    drop(first);
    let statistics = device.statistics();
    assert_eq!(statistics.counters.mapping_hits, hits);
    assert_eq!(statistics.queues[0].driver, None);
    assert_eq!(statistics.queues[0].writes.operations, 1);
    let mut third = queue(&device);
    assert_eq!(third.number(), 0);
    write(&mut third);
    drop(device.queue().unwrap());
    let statistics = device.statistics();
    assert_eq!(statistics.queues.len(), 3);
    let writes = statistics
        .queues
        .iter()
        .map(|queue| queue.writes.operations);
    assert_eq!(writes.collect::<Vec<_>>(), [2, 1, 0]);
}

#[test]
fn what_waits_is_in_flight_and_nobody_who_asks_waits() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(&path, "1M", &[]);
    let device = open(&OpenOptions::new(), &path);
    let mut queue = queue(&device);
    let read = |token| Request::read(token, 0, Buffer::new(512));
    queue
        .submit(Request::write(0, 0, Buffer::new(512)))
        .unwrap();
    queue.kick();
    std::thread::scope(|scope| {
        // Has to wait for the write, which ends when this thread looks at its queue.
        let pausing = scope.spawn(|| device.pause(PauseOptions::new()));
        std::thread::sleep(Duration::from_millis(20));
        let statistics = device.statistics();
        assert!(!pausing.is_finished() && !statistics.paused);
        assert_eq!(statistics.queues[0].in_flight, 1);
        while queue.completion().is_none() {
            queue.wait(None);
        }
        pausing.join().unwrap().unwrap();
    });
    for token in 1..4 {
        queue.submit(read(token)).unwrap();
    }
    queue.kick();
    assert!(queue.completion().is_none());
    let statistics = device.statistics();
    assert!(statistics.paused);
    assert_eq!(statistics.queues[0].in_flight, 3);
    device.resume().unwrap();
    assert_eq!(run(&mut queue, []), [true; 3]);
    let statistics = device.statistics();
    assert!(!statistics.paused);
    assert_eq!(statistics.queues[0].in_flight, 0);
    assert_eq!(statistics.queues[0].reads.operations, 3);
}

/// What the engine does with the image behind the requests.
#[test]
fn allocation_copying_and_commits_are_counted() {
    let scratch = Scratch::new();
    let (base, path) = (scratch.path("base.raw"), scratch.path("disk.qcow2"));
    std::fs::write(&base, vec![9; 1 << 20]).unwrap();
    make(&path, "1M", &["-b", text(&base), "-F", "raw"]);
    let device = open(&OpenOptions::new(), &path);
    let mut queue = queue(&device);
    let before = device.statistics().counters;
    assert_eq!(device.statistics().chain_depth, 2);
    run(
        &mut queue,
        [
            Request::write(0, 512, Buffer::new(512)),
            Request::write(1, CLUSTER, Buffer::new(usize::try_from(CLUSTER).unwrap())),
        ],
    );
    run(&mut queue, [Request::flush(0)]);
    let after = device.statistics().counters;
    // An L2 table, and two clusters of data, of which one was written in part.
    assert_eq!(after.allocated_clusters - before.allocated_clusters, 3);
    assert_eq!(after.copied_bytes - before.copied_bytes, CLUSTER - 512);
    assert_eq!(
        (
            after.commits - before.commits,
            after.barriers - before.barriers
        ),
        (1, 2)
    );
    assert_eq!(after.freed_clusters, 0);

    let hits = after.mapping_hits;
    run(
        &mut queue,
        (0..10).map(|n| Request::read(n, 512, Buffer::new(512))),
    );
    assert_eq!(device.counters().mapping_hits - hits, 10);

    run(
        &mut queue,
        [Request::write_zeroes(0, CLUSTER, CLUSTER).unmap(true)],
    );
    device.pause(PauseOptions::new()).unwrap();
    assert_eq!(device.counters().freed_clusters, 1);
}

/// Slices make room for one another where the cache is too small for the disk.
#[test]
fn the_mapping_cache_counts_what_it_reads_and_evicts() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(
        &path,
        "64M",
        &["-o", "cluster_size=4096,preallocation=metadata"],
    );
    // 2 MiB of disk each, 32 in all.
    let slice = 512 * 4096;
    let mut options = OpenOptions::new();
    options.l2_cache_bytes(1).read_only(true);
    let device = open(&options, &path);
    let mut queue = queue(&device);
    for round in 0..2 {
        for n in 0..32 {
            run(
                &mut queue,
                [Request::read(round, n * slice, Buffer::new(512))],
            );
        }
    }
    let counters = device.counters();
    assert_eq!(
        counters.slice_loads, 64,
        "a cycle longer than the cache finds nothing"
    );
    assert!(
        counters.evicted_slices > 0 && counters.evicted_slices < counters.slice_loads,
        "{counters:?}"
    );
    let again = Request::read(0, 31 * slice, Buffer::new(512));
    run(&mut queue, [again]);
    let then = device.counters();
    assert_eq!(then.slice_loads, counters.slice_loads);
    assert_eq!(then.mapping_hits, counters.mapping_hits + 1);
}

#[test]
fn decoding_is_counted_when_it_is_done_and_when_it_is_not() {
    let scratch = Scratch::new();
    let (source, path) = (scratch.path("source.raw"), scratch.path("disk.qcow2"));
    std::fs::write(&source, vec![5; 2 << 16]).unwrap();
    qemu_img(&["convert", "-c", "-O", "qcow2", text(&source), text(&path)]);
    let device = open(OpenOptions::new().read_only(true), &path);
    assert_eq!(device.format(), Format::Qcow2);
    let mut queue = queue(&device);
    for _ in 0..5 {
        run(&mut queue, [Request::read(0, 4096, Buffer::new(4096))]);
    }
    run(&mut queue, [Request::read(0, CLUSTER, Buffer::new(512))]);
    let counters = device.counters();
    assert_eq!((counters.decoded_clusters, counters.decoded_hits), (2, 4));
}
