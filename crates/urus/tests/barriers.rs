//! Guards the cost of durability (bar P16): how many fdatasyncs a write and a flush cost, counted by the device
//! itself. One too many is slow; one too few is a rule of docs/ordering.md broken.

mod common;

use common::{Scratch, make, open};
use urus::OpenOptions;

const CLUSTER: u64 = 64 << 10;

#[test]
fn a_flush_costs_two_two_and_one() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(&path, "8G", &[]);
    let device = open(&OpenOptions::new(), &path);
    let mut io = device.blocking().expect("a queue");
    let mut cost = |offset: u64| {
        let before = device.counters().barriers;
        io.write_at(&[7; 4096], offset).expect("write");
        io.flush().expect("flush");
        device.counters().barriers - before
    };
    // New L2 table, then a steady allocation, then an overwrite; QEMU needs 5, 2 and 1.
    assert_eq!(cost(0), 2, "a write that needs an L2 table");
    assert_eq!(cost(CLUSTER), 2, "a write that allocates a cluster");
    assert_eq!(cost(CLUSTER), 1, "an overwrite");
    // The second L2 table, far away.
    assert_eq!(cost(4 << 30), 2, "another L2 table");
}

#[test]
fn a_new_refcount_block_costs_one_more() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    // Blocks of 512 bytes with 64-bit refcounts cover 64 clusters.
    make(&path, "1M", &["-o", "cluster_size=512,refcount_bits=64"]);
    let device = open(&OpenOptions::new(), &path);
    let mut io = device.blocking().expect("a queue");
    let mut most = 0;
    for cluster in 0..512u64 {
        let before = device.counters().barriers;
        io.write_at(&[7; 512], cluster * 512).expect("write");
        io.flush().expect("flush");
        most = most.max(device.counters().barriers - before);
    }
    assert_eq!(most, 3, "two barriers, and one for the block");
}

#[test]
fn flushes_that_arrive_together_share_a_commit() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(&path, "64M", &[]);
    let device = open(&OpenOptions::new(), &path);
    let mut queue = device.queue().expect("a seat").activate().expect("a queue");
    let before = device.counters().barriers;
    for token in 0..64 {
        queue
            .submit(urus::Request::flush(token))
            .unwrap_or_else(|_| panic!("the queue has room"));
    }
    queue.kick();
    let mut done = 0;
    while done < 64 {
        match queue.completion() {
            Some(completion) => {
                completion.result.expect("flush");
                done += 1;
            }
            None => queue.wait(None),
        }
    }
    let barriers = device.counters().barriers - before;
    assert!(
        (1..=8).contains(&barriers),
        "64 flushes at once cost {barriers} barriers"
    );
}
