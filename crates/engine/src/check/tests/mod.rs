//! The check against `qemu-img check`: the same numbers, and repaired images in which QEMU finds nothing.
//!
//! These tests need `qemu-img` and `qemu-io` on the PATH: without them the promises are not tested at all.

mod crash;
mod damage;
mod dirty;
mod hostile;
mod images;
mod memory;
mod qemu;

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use urus_format::Header;

use super::{CheckReport, LIMITS, Limits, Repair, run};
use crate::error::Result;
use memory::Memory;

/// Runs a future that never has to wait.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("memory answers at once"),
    }
}

fn try_check_within(memory: &Memory, repair: Repair, limits: Limits) -> Result<CheckReport> {
    let mut header = memory.header();
    let result = ready(run(memory, &mut header, repair, limits));
    if result.is_ok() {
        assert_eq!(header, memory.header(), "the header is the one on disk");
    }
    result
}

fn check(memory: &Memory, repair: Repair) -> CheckReport {
    try_check_within(memory, repair, LIMITS).expect("memory never fails")
}

/// An image's bytes, and where things are in it.
#[derive(Clone)]
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    fn header(&self) -> Header {
        Header::parse(&self.bytes, self.bytes.len() as u64).expect("a header")
    }

    fn word(&self, at: u64) -> u64 {
        let at = crate::to_usize(at);
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn poke(&mut self, at: u64, word: u64) {
        let at = crate::to_usize(at);
        self.bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
    }

    fn poked(&self, at: u64, word: u64) -> Self {
        let mut image = self.clone();
        image.poke(at, word);
        image
    }

    /// Where the active L1 table lies.
    fn l1(&self) -> u64 {
        self.header().l1_table.0
    }

    /// Where the L2 table of an L1 entry lies.
    fn l2(&self, l1_index: u64) -> u64 {
        self.word(self.l1() + l1_index * 8) & super::entries::OFFSET_MASK
    }

    /// Where the refcount block with this index lies.
    fn block(&self, index: u64) -> u64 {
        self.word(self.header().refcount_table.0 + index * 8)
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let geometry = self.header().geometry();
        let index = cluster >> geometry.refcount_block_bits();
        if index * 8 >= u64::from(self.header().refcount_table_clusters) * geometry.cluster_bytes()
        {
            return 0;
        }
        let start = crate::to_usize(self.block(index));
        if start == 0 {
            return 0;
        }
        let block = &self.bytes[start..];
        let within = cluster % (1 << geometry.refcount_block_bits());
        urus_format::refcount::get(block, within, geometry.refcount_order())
    }

    fn set_refcount(&mut self, cluster: u64, refcount: u64) {
        let geometry = self.header().geometry();
        let start = crate::to_usize(self.block(cluster >> geometry.refcount_block_bits()));
        let end = start + crate::to_usize(geometry.cluster_bytes());
        let within = cluster % (1 << geometry.refcount_block_bits());
        let block = &mut self.bytes[start..end];
        urus_format::refcount::set(block, within, geometry.refcount_order(), refcount);
    }

    fn with_refcount(&self, cluster: u64, refcount: u64) -> Self {
        let mut image = self.clone();
        image.set_refcount(cluster, refcount);
        image
    }
}
