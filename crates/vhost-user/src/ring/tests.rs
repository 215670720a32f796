//! Guards the ring's arithmetic: no request lost or taken twice where indices wrap around, nobody left waiting for a
//! notification, and indices that cannot be are refused.

use super::*;
use crate::testing::memory;

const SIZE: u16 = 8;

/// Not as virtio-queue's mock lays them out: its rings overlap.
const LAYOUT: Layout = Layout {
    size: SIZE,
    descriptors: GuestAddress(0),
    avail: GuestAddress(0x1000),
    used: GuestAddress(0x2000),
};

fn at(base: GuestAddress, offset: usize) -> GuestAddress {
    GuestAddress(base.0 + offset as u64)
}

fn put<T: vm_memory::ByteValued>(
    memory: &GuestMemoryMmap,
    base: GuestAddress,
    offset: usize,
    value: T,
) {
    memory.write_obj(value, at(base, offset)).unwrap();
}

#[test]
fn requests_go_round_the_ring() {
    let memory = memory();
    let layout = LAYOUT;
    let view = layout.view(&memory).unwrap();
    let mut ring = Ring::new(layout, 65_534, 65_533, true);
    put(&memory, layout.avail, 2, 65_534_u16);
    assert_eq!(ring.available(&view), Ok(0));
    put(&memory, layout.avail, 2, 1_u16);
    assert_eq!(ring.available(&view), Ok(3));
    for (slot, head) in [(6, 5_u16), (7, 2), (0, 7)] {
        put(&memory, layout.avail, 4 + 2 * slot, head);
        assert_eq!(ring.take(&view), Ok(head));
    }
    assert_eq!((ring.available(&view), ring.next_avail()), (Ok(0), 1));

    ring.put_used(&view, 2, 513).unwrap();
    ring.put_used(&view, 5, 1).unwrap();
    assert_eq!(
        memory.read_obj::<u16>(at(layout.used, 2)).unwrap(),
        0,
        "not published yet"
    );
    ring.publish(&view).unwrap();
    assert_eq!(view.used_index(), Ok(65_535));
    assert_eq!(
        memory
            .read_obj::<[u32; 4]>(at(layout.used, 4 + 8 * 5))
            .unwrap(),
        [2, 513, 5, 1]
    );
    assert_eq!(layout.used_entry(65_533), (4 + 8 * 5, 8));
}

#[test]
fn what_cannot_be_is_refused() {
    let memory = memory();
    let layout = LAYOUT;
    let view = layout.view(&memory).unwrap();
    let mut ring = Ring::new(layout, 10, 0, false);
    put(&memory, layout.avail, 2, 19_u16);
    let error = BadRing::Index {
        available: 9,
        size: SIZE,
    };
    assert_eq!(ring.available(&view), Err(error));
    put(&memory, layout.avail, 2, 9_u16);
    assert!(ring.available(&view).is_err());
    put(&memory, layout.avail, 4 + 2 * 2, SIZE);
    assert_eq!(
        ring.take(&view),
        Err(BadRing::Head {
            head: SIZE,
            size: SIZE
        })
    );
    for outside in [crate::testing::END, crate::testing::END - 16, u64::MAX - 3] {
        let layout = Layout {
            used: GuestAddress(outside),
            ..layout
        };
        assert_eq!(layout.view(&memory).err(), Some(BadRing::Memory));
    }
    // Where it is not on its boundary, an atomic access would be undefined.
    let odd = Layout {
        avail: GuestAddress(layout.avail.0 + 1),
        ..layout
    };
    assert_eq!(
        ring_at(odd).available(&odd.view(&memory).unwrap()),
        Err(BadRing::Memory)
    );
}

fn ring_at(layout: Layout) -> Ring {
    Ring::new(layout, 0, 0, false)
}

#[test]
fn the_driver_is_told_when_it_wants_to_be() {
    let memory = memory();
    let layout = LAYOUT;
    let view = layout.view(&memory).unwrap();
    // With event indices: exactly when the entry it waits for is among the new ones.
    for (event, batch, wanted) in [
        (65_534_u16, 1, true),
        (65_535, 1, false),
        (65_535, 2, true),
        (65_533, 3, false),
        (0, 3, true),
        (1, 3, false),
    ] {
        let mut ring = Ring::new(layout, 0, 65_534, true);
        put(&memory, layout.avail, 4 + 2 * usize::from(SIZE), event);
        for head in 0..batch {
            ring.put_used(&view, head, 0).unwrap();
        }
        ring.publish(&view).unwrap();
        assert_eq!(ring.wants_call(&view), Ok(wanted), "{event} {batch}");
        assert_eq!(ring.wants_call(&view), Ok(false), "nothing new");
    }
    // Without: unless it says no.
    let mut ring = Ring::new(layout, 0, 0, false);
    put(&memory, layout.avail, 0, 0_u16);
    assert_eq!(ring.wants_call(&view), Ok(true));
    put(&memory, layout.avail, 0, 1_u16);
    assert_eq!(ring.wants_call(&view), Ok(false));
}

#[test]
fn kicks_are_asked_for_without_missing_one() {
    let memory = memory();
    let layout = LAYOUT;
    let view = layout.view(&memory).unwrap();
    put(&memory, layout.avail, 2, 3_u16);
    let with = Ring::new(layout, 3, 0, true);
    assert_eq!(with.want_kicks(&view), Ok(false));
    let event = at(layout.used, 4 + 8 * usize::from(SIZE));
    assert_eq!(memory.read_obj::<u16>(event).unwrap(), 3);
    let without = Ring::new(layout, 2, 0, false);
    without.refuse_kicks(&view).unwrap();
    assert_eq!(memory.read_obj::<u16>(layout.used).unwrap(), 1);
    assert_eq!(without.want_kicks(&view), Ok(true), "one came meanwhile");
    assert_eq!(memory.read_obj::<u16>(layout.used).unwrap(), 0);
}
