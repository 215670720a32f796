//! A virtqueue without a front end, for fuzz targets: everything between the rings in the guest's memory and the engine's queue, and
//! nothing of the protocol around it.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use urus::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::limits::SERIAL_BYTES;
use crate::memory::{Map, Place, Region};
use crate::request::Disk;
use crate::ring::{Layout, Ring};
use crate::stats::QueueStats;
use crate::vring::{Logging, Shared, Start, Vring};

/// A guest's memory.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Map>);

impl Memory {
    /// Of regions: where they begin for the guest, their bytes, and a file for each.
    ///
    /// # Errors
    /// Regions that cannot be.
    pub fn new(regions: Vec<(u64, u64, File)>) -> Result<Self, String> {
        let regions: Result<Vec<_>, _> = regions
            .into_iter()
            .map(|(guest, bytes, file)| {
                let user = guest;
                Region::map(Place { guest, bytes, user }, file, 0)
            })
            .collect();
        let map = regions.and_then(Map::new);
        map.map(|map| Self(Arc::new(map)))
            .map_err(|error| error.to_string())
    }

    /// To read and write it as the guest does.
    #[must_use]
    pub fn guest(&self) -> &GuestMemoryMmap {
        self.0.memory()
    }
}

/// What a front end has said of a virtqueue.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Entries: a power of two up to 32768, as front ends have to keep to.
    pub size: u16,
    /// Where the descriptor table lies.
    pub descriptors: u64,
    /// Where the available ring lies.
    pub avail: u64,
    /// Where the used ring lies.
    pub used: u64,
    /// Where in the available ring it begins.
    pub next_avail: u16,
    /// Where in the used ring it begins.
    pub next_used: u16,
    /// Event indices are used.
    pub event_idx: bool,
    /// The disk refuses writes.
    pub read_only: bool,
    /// The driver has turned the cache off.
    pub write_through: bool,
}

/// A virtqueue at work, moved on by hand.
pub struct Virtqueue(Vring);

impl Virtqueue {
    /// Over a memory. `kick` is never read.
    #[must_use]
    pub fn new(memory: &Memory, setup: &Setup, kick: File) -> Self {
        let layout = Layout {
            size: setup.size,
            descriptors: GuestAddress(setup.descriptors),
            avail: GuestAddress(setup.avail),
            used: GuestAddress(setup.used),
        };
        let shared = Shared {
            disk: Disk {
                read_only: setup.read_only,
                serial: [b's'; SERIAL_BYTES],
            },
            write_through: AtomicBool::new(setup.write_through),
            outlived: AtomicBool::new(false),
            served: AtomicBool::new(false),
        };
        let start = Start {
            map: Arc::clone(&memory.0),
            ring: Ring::new(layout, setup.next_avail, setup.next_used, setup.event_idx),
            kick: Arc::new(kick),
            call: None,
            error: None,
            notes: None,
            left: Vec::new(),
            logging: Logging::default(),
        };
        let stats = Arc::new(QueueStats::default());
        Self(Vring::new(0, Arc::new(shared), stats, start))
    }

    /// Takes what is available and answers what has ended, as its thread does when it is woken; where there was nothing, asks for kicks, as
    /// before a sleep. False when its thread would sleep.
    pub fn turn(&mut self, queue: &mut Queue) -> bool {
        self.0.turn(queue, false).progress || self.0.want_kicks(queue)
    }

    /// Requests taken and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    /// The index of the available ring from which it takes next.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.0.next_avail()
    }

    /// Whether it takes no more until it is set up again.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.0.is_broken()
    }
}

impl std::fmt::Debug for Virtqueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Virtqueue")
            .field("in_flight", &self.in_flight())
            .field("is_broken", &self.is_broken())
            .finish_non_exhaustive()
    }
}
