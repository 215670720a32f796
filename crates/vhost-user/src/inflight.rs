//! Requests in flight, noted in memory that outlives this process (vhost-user, "Inflight I/O tracking").
//!
//! The front end keeps the memory, and hands it to the back end that comes after this one. That finds there which
//! requests had been taken and not been answered, and does them again, in their order.
//!
//! The steps and their order are those of the specification. A process that is killed between any two of them leaves
//! what the next one can tell apart: each step is a store that no later one overtakes.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{AtomicInteger, VolatileMemory};

use crate::limits::{QUEUE_SIZE, QUEUES};
use crate::memory::BadMemory;
use crate::shared::Shared;

/// Of a queue's part before its entries: `features`, `version`, `desc_num`, `last_batch_head`, `used_idx`.
const HEADER_BYTES: usize = 16;
const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;

/// Of an entry: `inflight`, five bytes of padding, `next`, `counter`.
const ENTRY_BYTES: usize = 16;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Parts of queues begin at such multiples.
const ALIGNMENT: usize = 64;

/// The layout of split virtqueues that the specification has had so far.
const LAYOUT_VERSION: u16 = 1;

/// Why notes cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadNotes {
    #[error("an area for {queues} queues of {size} entries")]
    Shape { queues: u16, size: u16 },
    #[error("the area for requests in flight has {bytes} bytes, and its queues need {needed}")]
    Bytes { bytes: u64, needed: usize },
    #[error("{0}")]
    Memory(#[from] BadMemory),
    #[error("cannot make an area for requests in flight: {0}")]
    Create(#[from] rustix::io::Errno),
    #[error("queue {queue} of {size} entries has notes for {noted}")]
    Queue { queue: u16, size: u16, noted: u16 },
    #[error("the notes of requests in flight contradict the used ring")]
    Contradiction,
}

/// Bytes of a queue's part.
fn queue_bytes(size: u16) -> usize {
    (HEADER_BYTES + usize::from(size) * ENTRY_BYTES).next_multiple_of(ALIGNMENT)
}

fn check_shape(queues: u16, size: u16) -> Result<(), BadNotes> {
    let queues_fit = (1..=QUEUES).contains(&usize::from(queues));
    if queues_fit && (1..=QUEUE_SIZE).contains(&size) {
        Ok(())
    } else {
        Err(BadNotes::Shape { queues, size })
    }
}

/// The whole area.
#[derive(Debug)]
pub(crate) struct Area {
    memory: Shared,
    queues: u16,
    size: u16,
}

impl Area {
    /// A new file for such an area, and its bytes.
    pub(crate) fn create(queues: u16, size: u16) -> Result<(File, u64), BadNotes> {
        check_shape(queues, size)?;
        let bytes = queue_bytes(size) * usize::from(queues);
        let file = memfd_create(
            "urus-inflight",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        ftruncate(&file, bytes as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((file.into(), bytes as u64))
    }

    /// Maps an area that `bytes` were said to belong to.
    pub(crate) fn open(
        file: File,
        offset: u64,
        bytes: u64,
        queues: u16,
        size: u16,
    ) -> Result<Self, BadNotes> {
        check_shape(queues, size)?;
        let needed = queue_bytes(size) * usize::from(queues);
        if bytes < needed as u64 {
            return Err(BadNotes::Bytes { bytes, needed });
        }
        Ok(Self {
            memory: Shared::map(file, offset, bytes)?,
            queues,
            size,
        })
    }

    /// Whether its file was shortened: the notes are gone.
    pub(crate) fn is_broken(&self) -> bool {
        self.memory.is_broken()
    }

    fn queue_start(&self, queue: u16) -> usize {
        usize::from(queue) * queue_bytes(self.size)
    }

    /// Does something with a number of the area. `None` where there is none: never within a queue's part.
    fn at<A: AtomicInteger, R>(&self, at: usize, action: impl FnOnce(&A) -> R) -> Option<R> {
        let slice = self.memory.slice(at, size_of::<A>())?;
        slice.get_atomic_ref::<A>(0).ok().map(action)
    }
}

/// The notes of one queue.
#[derive(Debug)]
pub(crate) struct Notes {
    area: Arc<Area>,
    start: usize,
    size: u16,
    /// Order in which requests are taken.
    counter: u64,
    /// Requests answered and not yet published.
    batch: Vec<u16>,
}

/// What an earlier back end has left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// Heads of requests that were taken and not answered, in the order in which they were taken.
    pub(crate) heads: Vec<u16>,
    /// Whether any back end has worked with these notes before.
    pub(crate) used: bool,
}

impl Notes {
    /// The notes of `queue`, which has `size` entries and this index in its used ring.
    pub(crate) fn open(
        area: Arc<Area>,
        queue: u16,
        size: u16,
        used_index: u16,
    ) -> Result<(Self, Left), BadNotes> {
        if queue >= area.queues || size > area.size {
            return Err(BadNotes::Queue {
                queue,
                size,
                noted: if queue < area.queues { area.size } else { 0 },
            });
        }
        let mut notes = Self {
            start: area.queue_start(queue),
            area,
            size,
            counter: 0,
            batch: Vec::new(),
        };
        let left = notes.recover(queue, used_index)?;
        Ok((notes, left))
    }

    fn recover(&mut self, queue: u16, used_index: u16) -> Result<Left, BadNotes> {
        if self.load16(VERSION) == 0 {
            // Made a moment ago: nobody has noted anything.
            self.store16(ENTRIES, self.area.size);
            self.store16(USED_INDEX, used_index);
            self.store16(VERSION, LAYOUT_VERSION);
            return Ok(Left {
                heads: Vec::new(),
                used: false,
            });
        }
        let noted = self.load16(ENTRIES);
        if self.load16(VERSION) != LAYOUT_VERSION || noted != self.area.size {
            return Err(BadNotes::Queue {
                queue,
                size: self.size,
                noted,
            });
        }
        // A driver that has begun anew has nothing in flight, whatever its index was before.
        if (0..self.size).any(|head| self.is_in_flight(head)) {
            self.settle_last_batch(used_index)?;
        }
        self.store16(USED_INDEX, used_index);
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.is_in_flight(head))
            .map(|head| (self.counter_of(head), head))
            .collect();
        heads.sort_unstable();
        if let Some(&(last, _)) = heads.last() {
            self.counter = last.wrapping_add(1);
        }
        Ok(Left {
            heads: heads.into_iter().map(|(_, head)| head).collect(),
            used: true,
        })
    }

    /// Strikes off the last batch, which was published and may not have been struck off.
    fn settle_last_batch(&self, used_index: u16) -> Result<(), BadNotes> {
        let unsettled = used_index.wrapping_sub(self.load16(USED_INDEX));
        if unsettled > self.size {
            return Err(BadNotes::Contradiction);
        }
        let mut head = self.load16(LAST_BATCH_HEAD);
        for _ in 0..unsettled {
            if head >= self.size {
                return Err(BadNotes::Contradiction);
            }
            self.set_in_flight(head, false);
            head = self.load16(entry(head) + NEXT);
        }
        Ok(())
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.area.is_broken()
    }

    /// A request is taken: to be noted before anything is done about it.
    pub(crate) fn take(&mut self, head: u16) {
        let at = self.start + entry(head) + COUNTER;
        let counter = self.counter;
        self.area.at(at, |number: &AtomicU64| {
            number.store(counter, Ordering::Release)
        });
        self.counter = counter.wrapping_add(1);
        self.set_in_flight(head, true);
    }

    /// A request was answered; the driver does not see it yet.
    pub(crate) fn answer(&mut self, head: u16) {
        let last = self.load16(LAST_BATCH_HEAD);
        self.store16(entry(head) + NEXT, last);
        self.store16(LAST_BATCH_HEAD, head);
        self.batch.push(head);
    }

    /// What was answered was published with this index.
    pub(crate) fn published(&mut self, used_index: u16) {
        let mut batch = std::mem::take(&mut self.batch);
        for head in batch.drain(..) {
            self.set_in_flight(head, false);
        }
        self.batch = batch;
        self.store16(USED_INDEX, used_index);
    }

    fn is_in_flight(&self, head: u16) -> bool {
        let at = self.start + entry(head);
        self.area
            .at(at, |mark: &AtomicU8| mark.load(Ordering::Acquire))
            == Some(1)
    }

    fn set_in_flight(&self, head: u16, is: bool) {
        let at = self.start + entry(head);
        self.area.at(at, |mark: &AtomicU8| {
            mark.store(u8::from(is), Ordering::Release);
        });
    }

    fn counter_of(&self, head: u16) -> u64 {
        let at = self.start + entry(head) + COUNTER;
        self.area
            .at(at, |number: &AtomicU64| number.load(Ordering::Acquire))
            .unwrap_or(0)
    }

    fn load16(&self, at: usize) -> u16 {
        self.area
            .at(self.start + at, |number: &AtomicU16| {
                number.load(Ordering::Acquire)
            })
            .unwrap_or(0)
    }

    fn store16(&self, at: usize, value: u16) {
        self.area.at(self.start + at, |number: &AtomicU16| {
            number.store(value, Ordering::Release);
        });
    }
}

/// Where the entry of a head begins in its queue's part.
fn entry(head: u16) -> usize {
    HEADER_BYTES + usize::from(head) * ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    //! Guards what a killed back end leaves to the next one: at every step of the protocol, each request is either
    //! answered or found again, never both and never neither.
    use super::*;

    fn area(queues: u16, size: u16) -> Arc<Area> {
        let (file, bytes) = Area::create(queues, size).unwrap();
        Arc::new(Area::open(file, 0, bytes, queues, size).unwrap())
    }

    fn heads(area: &Arc<Area>, queue: u16, used_index: u16) -> Vec<u16> {
        let (_, left) = Notes::open(Arc::clone(area), queue, 8, used_index).unwrap();
        left.heads
    }

    #[test]
    fn nothing_is_left_of_nothing() {
        let area = area(2, 8);
        let (_, left) = Notes::open(Arc::clone(&area), 1, 8, 77).unwrap();
        assert_eq!(
            left,
            Left {
                heads: vec![],
                used: false
            }
        );
        let (_, left) = Notes::open(area, 1, 8, 77).unwrap();
        assert_eq!(
            left,
            Left {
                heads: vec![],
                used: true
            }
        );
    }

    #[test]
    fn requests_are_found_again_in_their_order() {
        let area = area(1, 8);
        let (mut notes, _) = Notes::open(Arc::clone(&area), 0, 8, 65_535).unwrap();
        for head in [5, 2, 7, 0] {
            notes.take(head);
        }
        assert_eq!(heads(&area, 0, 65_535), [5, 2, 7, 0]);
        notes.answer(2);
        notes.answer(0);
        // Killed before the used ring was published: the driver has seen neither.
        assert_eq!(heads(&area, 0, 65_535), [5, 2, 7, 0]);
    }

    #[test]
    fn a_batch_that_was_published_is_not_done_again() {
        let area = area(1, 8);
        let (mut notes, _) = Notes::open(Arc::clone(&area), 0, 8, 65_535).unwrap();
        for head in [5, 2, 7, 0] {
            notes.take(head);
        }
        notes.answer(2);
        notes.published(0);
        notes.answer(0);
        notes.answer(5);
        // Killed right after publishing two more, index 2, before they were struck off.
        assert_eq!(heads(&area, 0, 2), [7]);
        // The next one goes on counting.
        let (mut notes, left) = Notes::open(Arc::clone(&area), 0, 8, 2).unwrap();
        assert_eq!(left.heads, [7]);
        notes.take(1);
        assert_eq!(heads(&area, 0, 2), [7, 1]);
    }

    #[test]
    fn a_kill_amid_striking_off_is_made_good() {
        let area = area(1, 8);
        let (mut notes, _) = Notes::open(Arc::clone(&area), 0, 8, 0).unwrap();
        for head in [1, 2, 3] {
            notes.take(head);
        }
        notes.answer(1);
        notes.answer(3);
        // Published with index 2; of the two only one was struck off.
        notes.set_in_flight(1, false);
        assert_eq!(heads(&area, 0, 2), [2]);
    }

    #[test]
    fn notes_that_cannot_be_are_refused() {
        assert!(matches!(Area::create(0, 8), Err(BadNotes::Shape { .. })));
        assert!(matches!(Area::create(1, 0), Err(BadNotes::Shape { .. })));
        let (file, bytes) = Area::create(1, 8).unwrap();
        let open = |bytes, queues, size| {
            Area::open(file.try_clone().unwrap(), 0, bytes, queues, size).unwrap_err()
        };
        assert!(matches!(open(bytes - 1, 1, 8), BadNotes::Bytes { .. }));
        assert!(matches!(open(bytes, 2, 8), BadNotes::Bytes { .. }));
        assert!(matches!(open(1 << 20, 1, 8), BadNotes::Memory(_)));

        let area = area(1, 8);
        let (mut notes, _) = Notes::open(Arc::clone(&area), 0, 8, 0).unwrap();
        notes.take(3);
        let refused = |size, used| Notes::open(Arc::clone(&area), 0, size, used).unwrap_err();
        assert!(matches!(refused(16, 0), BadNotes::Queue { .. }));
        assert!(matches!(refused(8, 9), BadNotes::Contradiction));
        notes.store16(LAST_BATCH_HEAD, 8);
        assert!(matches!(refused(8, 1), BadNotes::Contradiction));
        assert!(matches!(
            Notes::open(Arc::clone(&area), 1, 8, 0),
            Err(BadNotes::Queue { .. })
        ));
    }
}
