//! Operations that the kernel works on, by slot.

use std::io;

use io_uring::cqueue;
use urus_engine::storage::{Completion, OpKind, Slot};

use crate::blocking::{Learnable, learn};
use crate::files::FileSet;
use crate::memory::RingMemory;

/// What an operation leaves behind while the kernel has it.
pub(super) enum InFlight {
    /// Its memory, which the kernel reads or writes: dropped only when the completion was seen.
    Transfer(#[allow(dead_code, reason = "held for its Drop")] RingMemory),
    /// What its result will teach.
    Learning(Learnable),
    Other,
}

impl InFlight {
    pub(super) fn of(file: urus_engine::storage::FileId, kind: OpKind<RingMemory>) -> Self {
        match kind {
            OpKind::Read { memory, .. } | OpKind::Write { memory, .. } => Self::Transfer(memory),
            OpKind::Punch { .. } => Self::Learning(Learnable::Punch(file)),
            OpKind::ZeroRange { .. } => Self::Learning(Learnable::ZeroRange(file)),
            _ => Self::Other,
        }
    }
}

#[derive(Default)]
struct Entry {
    in_flight: Option<InFlight>,
    /// For vectored operations; kept for its capacity. The kernel copies it at submission, so it need not be stable
    /// after that, but it is: nothing touches it before the slot's next use.
    iovecs: Vec<libc::iovec>,
}

/// The table of slots. Grows to the highest slot ever used.
pub(super) struct Slots {
    entries: Vec<Entry>,
    busy: usize,
}

impl Slots {
    pub(super) fn new(count: usize) -> Self {
        let mut entries = Vec::new();
        entries.resize_with(count, Entry::default);
        Self { entries, busy: 0 }
    }

    /// Operations pushed whose completion was not seen.
    pub(super) fn busy(&self) -> usize {
        self.busy
    }

    /// The iovec array of a free slot.
    ///
    /// # Panics
    /// When the slot is in flight: memory that the kernel works on would be freed.
    #[inline]
    pub(super) fn iovecs(&mut self, slot: Slot) -> &mut Vec<libc::iovec> {
        if slot >= self.entries.len() {
            self.entries.resize_with(slot + 1, Entry::default);
        }
        let entry = &mut self.entries[slot];
        assert!(
            entry.in_flight.is_none(),
            "slot {slot} is in flight already"
        );
        &mut entry.iovecs
    }

    /// Keeps what a slot, just looked at by [`iovecs`](Self::iovecs), leaves behind.
    #[inline]
    pub(super) fn fill(&mut self, slot: Slot, in_flight: InFlight) {
        self.entries[slot].in_flight = Some(in_flight);
        self.busy += 1;
    }

    /// Lets go of the operation that the kernel has ended.
    #[inline]
    pub(super) fn finish(&mut self, entry: &cqueue::Entry, files: &FileSet) -> Completion {
        let slot = usize::try_from(entry.user_data()).expect("a slot that was pushed");
        let in_flight = self.entries[slot]
            .in_flight
            .take()
            .expect("the kernel completes what was pushed, once");
        self.busy -= 1;
        let result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        if let InFlight::Learning(what) = in_flight {
            learn(files, what, &result);
        }
        Completion { slot, result }
    }
}
