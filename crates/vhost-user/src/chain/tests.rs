//! Guards the first thing that a guest's bytes meet: every chain is either understood as the specification has it, or
//! refused; none loops for ever, none is half understood.

use super::*;
use crate::testing::{DATA, INDIRECT, NEXT, WRITE, descriptor, memory};
use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::GuestMemoryBackend;

const SIZE: u16 = 16;

fn read(table: &[RawDescriptor], indirect: &[RawDescriptor]) -> Result<Chain, BadChain> {
    let memory = memory();
    let mock = MockSplitQueue::new(&*memory, SIZE);
    for (index, descriptor) in (0..).zip(table) {
        mock.desc_table().store(index, *descriptor).unwrap();
    }
    for (index, descriptor) in (0..).zip(indirect) {
        memory
            .write_obj(*descriptor, GuestAddress(DATA + 16 * index))
            .unwrap();
    }
    let slice = memory
        .get_slice(mock.desc_table_addr(), usize::from(SIZE) * 16)
        .unwrap();
    let mut chain = Chain::default();
    chain.read(&memory, &slice, 0).map(|()| chain)
}

fn ranges(list: &[(u64, usize)]) -> Vec<Range> {
    list.iter()
        .map(|&(at, len)| (GuestAddress(at), len))
        .collect()
}

#[test]
fn a_chain_is_taken_apart() {
    let table = [
        descriptor(0x1000, 16, NEXT, 3),
        descriptor(0, 0, 0, 0),
        descriptor(0x3000, 1, WRITE, 9),
        descriptor(0x2000, 512, NEXT | WRITE, 4),
        descriptor(0x5000, 0, NEXT | WRITE, 2),
    ];
    let chain = read(&table, &[]).unwrap();
    assert_eq!(chain.readable, ranges(&[(0x1000, 16)]));
    assert_eq!(chain.writable, ranges(&[(0x2000, 512), (0x3000, 1)]));
}

#[test]
fn so_is_an_indirect_one_behind_direct_descriptors() {
    let table = [
        descriptor(0x1000, 16, NEXT, 1),
        descriptor(DATA, 48, INDIRECT, 0),
    ];
    let indirect = [
        descriptor(0x2000, 512, NEXT, 2),
        descriptor(0, 0, 0, 0),
        descriptor(0x3000, 1, WRITE, 0),
    ];
    let chain = read(&table, &indirect).unwrap();
    assert_eq!(chain.readable, ranges(&[(0x1000, 16), (0x2000, 512)]));
    assert_eq!(chain.writable, ranges(&[(0x3000, 1)]));
}

#[test]
fn chains_that_break_the_rules_are_refused() {
    let indirect = |len, flags| [descriptor(DATA, len, INDIRECT | flags, 1)];
    let ends = [descriptor(0x1000, 1, 0, 0)];
    for (what, table, inner, expected) in [
        (
            "index",
            vec![descriptor(0, 1, NEXT, SIZE)],
            vec![],
            BadChain::Index(SIZE),
        ),
        (
            "loop to itself",
            vec![descriptor(0, 1, NEXT, 0)],
            vec![],
            BadChain::TooLong,
        ),
        (
            "loop of two",
            vec![descriptor(0, 1, NEXT, 1), descriptor(0, 1, NEXT, 0)],
            vec![],
            BadChain::TooLong,
        ),
        (
            "loop of nothing",
            vec![descriptor(0, 0, NEXT, 0)],
            vec![],
            BadChain::TooLong,
        ),
        (
            "order",
            vec![descriptor(0, 1, NEXT | WRITE, 1), descriptor(0, 1, 0, 0)],
            vec![],
            BadChain::Order,
        ),
        (
            "bytes",
            vec![descriptor(0, u32::MAX, NEXT, 1), descriptor(0, 1, 0, 0)],
            vec![],
            BadChain::Bytes,
        ),
        (
            "table of nothing",
            indirect(0, 0).to_vec(),
            vec![],
            BadChain::TableBytes(0),
        ),
        (
            "odd table",
            indirect(24, 0).to_vec(),
            vec![],
            BadChain::TableBytes(24),
        ),
        (
            "table too long",
            indirect(16_400, 0).to_vec(),
            vec![],
            BadChain::TableBytes(16_400),
        ),
        (
            "huge table",
            indirect(u32::MAX, 0).to_vec(),
            vec![],
            BadChain::TableBytes(u32::MAX),
        ),
        (
            "table and next",
            indirect(16, NEXT).to_vec(),
            ends.to_vec(),
            BadChain::Nested,
        ),
        (
            "table in a table",
            indirect(16, 0).to_vec(),
            vec![descriptor(DATA, 16, INDIRECT, 0)],
            BadChain::Nested,
        ),
        (
            "index in a table",
            indirect(16, 0).to_vec(),
            vec![descriptor(0, 1, NEXT, 1)],
            BadChain::Index(1),
        ),
        (
            "table outside",
            vec![descriptor(crate::testing::END - 16, 32, INDIRECT, 0)],
            vec![],
            BadChain::TableOutside,
        ),
        (
            "table at the end of everything",
            vec![descriptor(u64::MAX - 7, 16, INDIRECT, 0)],
            vec![],
            BadChain::TableOutside,
        ),
    ] {
        assert_eq!(read(&table, &inner).unwrap_err(), expected, "{what}");
    }
}

#[test]
fn bytes_are_taken_off_both_ends() {
    let memory = memory();
    memory
        .write_slice(b"0123456789", GuestAddress(DATA))
        .unwrap();
    let mut chain = Chain {
        readable: ranges(&[(DATA, 3), (DATA + 3, 4), (DATA + 7, 2)]),
        writable: ranges(&[(DATA, 2), (DATA + 9, 1)]),
        table: Vec::new(),
    };
    let mut bytes = [0; 5];
    assert!(chain.take_front(&memory, &mut bytes));
    assert_eq!(&bytes, b"01234");
    assert_eq!(chain.readable, ranges(&[(DATA + 5, 2), (DATA + 7, 2)]));
    assert!(!chain.take_front(&memory, &mut bytes), "four are left");
    assert_eq!(chain.take_last_writable(), Some(GuestAddress(DATA + 9)));
    assert_eq!(chain.take_last_writable(), Some(GuestAddress(DATA + 1)));
    assert_eq!(chain.take_last_writable(), Some(GuestAddress(DATA)));
    assert_eq!(chain.take_last_writable(), None);
    chain.writable = ranges(&[(u64::MAX, 2)]);
    assert_eq!(chain.take_last_writable(), None, "beyond the address space");
}

proptest! {
    /// Where virtio-queue's iterator, written by others, sees a whole chain in order, ours sees the same; and whatever
    /// the descriptors are, it ends.
    #[test]
    fn agrees_with_virtio_queue(
        table in proptest::collection::vec((0_u64..4, 0_u32..3, 0_u16..4, 0_u16..SIZE + 1), usize::from(SIZE)),
    ) {
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, SIZE);
        for (index, &(page, len, flags, next)) in (0..).zip(&table) {
            let descriptor = descriptor(page * 0x1000, len, flags, next);
            mock.desc_table().store(index, descriptor).unwrap();
        }
        memory.write_obj(1_u16, mock.avail_addr().unchecked_add_two()).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        let theirs: Vec<_> = queue.iter(&*memory).unwrap().next().unwrap().collect();
        let slice = memory.get_slice(mock.desc_table_addr(), usize::from(SIZE) * 16).unwrap();
        let mut chain = Chain::default();
        match chain.read(&memory, &slice, 0) {
            Ok(()) => {
                let of = |writable| theirs.iter().filter(move |one| one.is_write_only() == writable && one.len() > 0);
                let list = |writable| of(writable).map(|one| (one.addr(), one.len() as usize)).collect::<Vec<_>>();
                prop_assert_eq!(&chain.readable, &list(false));
                prop_assert_eq!(&chain.writable, &list(true));
            }
            Err(BadChain::Order) => {
                let first_written = theirs.iter().position(|one| one.is_write_only() && one.len() > 0);
                let last_read = theirs.iter().rposition(|one| !one.is_write_only());
                prop_assert!(first_written.unwrap() < last_read.unwrap());
            }
            Err(BadChain::Index(index)) => prop_assert_eq!(index, SIZE),
            // A loop: virtio-queue stops after as many descriptors as the queue has.
            Err(error) => {
                prop_assert_eq!(error, BadChain::TooLong);
                prop_assert_eq!(theirs.len(), usize::from(SIZE));
            }
        }
    }
}

trait Step {
    fn unchecked_add_two(self) -> Self;
}

impl Step for GuestAddress {
    fn unchecked_add_two(self) -> Self {
        GuestAddress(self.0 + 2)
    }
}
