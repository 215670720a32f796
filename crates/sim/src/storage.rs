//! The driver's side: [`SimStorage`] is what the engine's queues and maintenance hold.

use std::io;
use std::time::Duration;

use urus_engine::storage::{
    Completion, FileExtent, FileId, FileProperties, Memory, Notify, Op, Slot, Storage,
};
use urus_engine::sync::{Arc, AtomicBool, Ordering};

use crate::contents::SECTOR;
use crate::extents::is_data;
use crate::fault::{errno, error};
use crate::log::Event;
use crate::memory::SimMemory;
use crate::rng::mix;
use crate::world::SimWorld;

/// Set by a notification, cleared by [`Storage::wait`] and [`SimStorage::take_notification`].
#[derive(Default)]
pub(crate) struct Flag(pub(crate) AtomicBool);

impl Notify for Flag {
    fn notify(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// So many waits in a row with nothing in flight anywhere, and no notification, are a hang.
const HANG_WAITS: u32 = 10_000;

/// One queue's way to a [`SimWorld`].
pub struct SimStorage {
    world: SimWorld,
    number: usize,
    flag: Arc<Flag>,
}

impl SimStorage {
    pub(crate) fn new(world: SimWorld, number: usize, flag: Arc<Flag>) -> Self {
        Self {
            world,
            number,
            flag,
        }
    }

    /// Its number, for [`SimWorld::is_awake`].
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// The world it belongs to.
    #[must_use]
    pub fn world(&self) -> SimWorld {
        self.world.clone()
    }
}

impl Storage for SimStorage {
    type Memory = SimMemory;

    fn allocate(&self, bytes: usize) -> Option<SimMemory> {
        let refused = self.world.0.borrow_mut().faults.next_memory();
        (!refused).then(|| SimMemory::zeroed(bytes))
    }

    fn submit(&mut self, op: Op<SimMemory>, slot: Slot) -> Result<(), Op<SimMemory>> {
        self.world.0.borrow_mut().submit(self.number, op, slot)
    }

    fn read_now(&mut self, file: FileId, offset: u64, memory: &SimMemory) -> bool {
        self.world.0.borrow_mut().read_now(file, offset, memory)
    }

    fn kick(&mut self) {
        let mut world = self.world.0.borrow_mut();
        for op in world
            .running
            .iter_mut()
            .filter(|op| op.handle == self.number)
        {
            op.kicked = true;
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        let mut world = self.world.0.borrow_mut();
        let world = &mut *world;
        let handle = &mut world.handles[self.number];
        if handle.ready.is_empty() {
            return None;
        }
        // In order of arrival: a ring's completion queue is one.
        let landed = handle.ready.remove(0);
        handle.in_flight.retain(|slot| *slot != landed.slot);
        world.trace.add(0x5e ^ u64::from(landed.op.0) << 8);
        if landed.logged {
            world.record(Event::Seen { op: landed.op });
        }
        Some(Completion {
            slot: landed.slot,
            result: landed.result,
        })
    }

    fn wait(&mut self, _timeout: Option<Duration>) {
        loop {
            if self.flag.0.swap(false, Ordering::SeqCst) {
                return;
            }
            if !self.world.0.borrow().handles[self.number].ready.is_empty() {
                return;
            }
            if !self.world.step() {
                break;
            }
        }
        let mut world = self.world.0.borrow_mut();
        world.idle_waits += 1;
        assert!(
            world.idle_waits < HANG_WAITS,
            "a hang: waiting, and nothing is in flight (a missing kick?)"
        );
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        Arc::clone(&self.flag) as Arc<dyn Notify>
    }

    fn properties(&self, file: FileId) -> FileProperties {
        self.world.0.borrow().files[usize::from(file.0)].properties
    }

    /// By the sector: what reads as zeroes is a hole. Sometimes the file system tells of a part only.
    fn extent(&self, file: FileId, offset: u64, len: u64) -> FileExtent {
        let world = self.world.0.borrow();
        let contents = &world.files[usize::from(file.0)].contents;
        let end = (offset + len).min(contents.len());
        let data_at = |at: u64| is_data(contents, at);
        if offset >= end {
            return FileExtent { data: false, len };
        }
        let (data, mut at) = (data_at(offset), offset);
        let partial = mix(offset ^ mix(len)).is_multiple_of(4);
        while at < end && data_at(at) == data && !(partial && at > offset + 3 * SECTOR) {
            at = ((at / SECTOR + 1) * SECTOR).min(end);
        }
        let len = at - offset;
        FileExtent { data, len }
    }

    fn file_len(&self, file: FileId) -> io::Result<u64> {
        let mut world = self.world.0.borrow_mut();
        if world.faults.next_length() {
            return Err(error(errno::EIO));
        }
        Ok(world.files[usize::from(file.0)].contents.len())
    }
}

impl SimStorage {
    /// Clears the notification, as a poll of the owner's event loop does; whether there was one.
    pub fn take_notification(&self) -> bool {
        self.flag.0.swap(false, Ordering::SeqCst)
    }
}

impl Drop for SimStorage {
    /// What was started still takes effect; nobody hears of it. (The memory lives on in the operations.)
    fn drop(&mut self) {
        let mut world = self.world.0.borrow_mut();
        let world = &mut *world;
        let handle = &mut world.handles[self.number];
        handle.closed = true;
        handle.in_flight.clear();
        for landed in std::mem::take(&mut handle.ready) {
            world.arrive(landed);
        }
    }
}

/// Bytes of memory, for operations that have it.
pub(crate) fn bytes_of(memory: &SimMemory) -> u64 {
    memory.len() as u64
}
