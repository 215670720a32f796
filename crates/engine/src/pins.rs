//! O7: what is in flight through an old mapping keeps its host clusters from being reused.
//!
//! Each queue publishes the epoch of its oldest request in flight. A removal takes the current epoch as its mark
//! and moves the epoch on; it is over once every queue's oldest request began after the mark.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::task::Waker;

use crate::reactor::Inbox;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, fence};

/// Published by a queue that has nothing in flight.
const OFFLINE: u64 = u64::MAX;
/// A mark that is passed only when nothing at all is in flight.
pub(crate) const IDLE: u64 = OFFLINE - 1;

struct Seat {
    oldest: AtomicU64,
    inbox: Arc<Inbox>,
}

/// The epoch, and every queue's oldest request.
pub(crate) struct Pins {
    epoch: AtomicU64,
    seats: Mutex<Vec<Arc<Seat>>>,
    /// Somebody waits for requests to end. The queue whose oldest moves on first takes this back and wakes `waiter`.
    waiting: AtomicBool,
    waiter: Mutex<Option<Waker>>,
}

impl Pins {
    pub(crate) fn new() -> Self {
        Self {
            epoch: AtomicU64::new(1),
            seats: Mutex::new(Vec::new()),
            waiting: AtomicBool::new(false),
            waiter: Mutex::new(None),
        }
    }

    /// A mark for what was removed just before: requests that began earlier may still use it.
    pub(crate) fn mark(&self) -> u64 {
        self.epoch.fetch_add(1, Ordering::SeqCst)
    }

    /// Whether every request in flight began after the mark.
    pub(crate) fn passed(&self, mark: u64) -> bool {
        // Pairs with the fence in `QueuePins::begin`: either the request's look-up sees the removal, or this
        // sees the request.
        fence(Ordering::SeqCst);
        self.seats
            .lock()
            .iter()
            .all(|seat| seat.oldest.load(Ordering::SeqCst) > mark)
    }

    /// The task to wake when requests end, while `set_waiting(true)`. (The task and not its thread: a thread that is
    /// in the middle of its turn would take note and not look at the task again.)
    pub(crate) fn set_waiter(&self, waker: &Waker) {
        self.waiter
            .lock()
            .get_or_insert_with(|| waker.clone())
            .clone_from(waker);
    }

    pub(crate) fn set_waiting(&self, waiting: bool) {
        self.waiting.store(waiting, Ordering::SeqCst);
    }

    /// Makes every queue look again (a gate has opened).
    pub(crate) fn nudge_queues(&self) {
        let inboxes: Vec<_> = self
            .seats
            .lock()
            .iter()
            .map(|seat| Arc::clone(&seat.inbox))
            .collect();
        for inbox in inboxes {
            inbox.nudge();
        }
    }
}

/// One queue's requests in flight.
pub(crate) struct QueuePins {
    pins: Arc<Pins>,
    seat: Arc<Seat>,
    /// The epoch of the request that began last, and how many in flight began in it.
    latest: Cell<(u64, u32)>,
    /// The same of the epochs before that, oldest first.
    older: RefCell<VecDeque<(u64, u32)>>,
    published: Cell<u64>,
}

impl QueuePins {
    pub(crate) fn new(pins: Arc<Pins>, inbox: Arc<Inbox>) -> Self {
        let seat = Arc::new(Seat {
            oldest: AtomicU64::new(OFFLINE),
            inbox,
        });
        pins.seats.lock().push(Arc::clone(&seat));
        Self {
            pins,
            seat,
            latest: Cell::new((0, 0)),
            older: RefCell::new(VecDeque::with_capacity(64)),
            published: Cell::new(OFFLINE),
        }
    }

    /// A request begins, before its first look-up. Returns what to end it with.
    #[inline]
    pub(crate) fn begin(&self) -> u64 {
        let epoch = self.pins.epoch.load(Ordering::SeqCst);
        let (latest, count) = self.latest.get();
        if epoch == latest {
            self.latest.set((epoch, count + 1));
        } else {
            if count > 0 {
                self.older.borrow_mut().push_back((latest, count));
            }
            self.latest.set((epoch, 1));
        }
        if self.published.get() == OFFLINE {
            self.publish(epoch);
            fence(Ordering::SeqCst);
        }
        epoch
    }

    /// A request has ended: the kernel is done with everything it submitted.
    #[inline]
    pub(crate) fn end(&self, epoch: u64) {
        let (latest, count) = self.latest.get();
        if epoch != latest {
            return self.end_older(epoch);
        }
        let left = count.checked_sub(1).expect("the request has begun");
        self.latest.set((latest, left));
        if left == 0 && self.older.borrow().is_empty() {
            self.publish(OFFLINE);
            self.tell();
        }
    }

    #[cold]
    fn end_older(&self, epoch: u64) {
        let mut older = self.older.borrow_mut();
        let entry = older
            .iter_mut()
            .find(|(began, _)| *began == epoch)
            .expect("the request has begun");
        entry.1 -= 1;
        while older.front().is_some_and(|(_, count)| *count == 0) {
            older.pop_front();
        }
        let oldest = match (older.front(), self.latest.get()) {
            (Some((began, _)), _) => *began,
            (None, (_, 0)) => OFFLINE,
            (None, (latest, _)) => latest,
        };
        if oldest != self.published.get() {
            self.publish(oldest);
            self.tell();
        }
    }

    fn publish(&self, oldest: u64) {
        self.published.set(oldest);
        // Release: what requests have done is over for who sees that they have ended. A fence follows, which orders it with all else.
        self.seat.oldest.store(oldest, Ordering::Release);
    }

    /// Tells who waits for requests to end.
    fn tell(&self) {
        fence(Ordering::SeqCst);
        // One wake is enough for all that ends until the waiter looks again, which it announces first.
        let waiting = &self.pins.waiting;
        if waiting.load(Ordering::SeqCst) && waiting.swap(false, Ordering::SeqCst) {
            let waiter = self.pins.waiter.lock().clone();
            if let Some(waiter) = waiter {
                waiter.wake();
            }
        }
    }
}

impl Drop for QueuePins {
    fn drop(&mut self) {
        self.publish(OFFLINE);
        self.pins
            .seats
            .lock()
            .retain(|seat| !Arc::ptr_eq(seat, &self.seat));
        self.tell();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use super::*;
    use crate::chain::Removed;
    use crate::storage::Notify;

    struct Silent;

    impl Notify for Silent {
        fn notify(&self) {}
    }

    #[derive(Default)]
    struct Count(AtomicU64);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Found by `urus-proofs --part blocks`: a server did not end after SIGTERM. The last request of a queue ended while
    /// maintenance was in the middle of a turn, whose settler had already looked and was not woken again.
    #[test]
    fn a_request_that_ends_wakes_the_settler_itself() {
        let pins = Arc::new(Pins::new());
        let inbox = Arc::new(Inbox::new(Arc::new(Silent)));
        let queues = [1, 2].map(|_| QueuePins::new(Arc::clone(&pins), Arc::clone(&inbox)));
        let wakes = Arc::new(Count::default());
        let woken = || wakes.0.load(Ordering::SeqCst);
        pins.set_waiter(&Waker::from(Arc::clone(&wakes)));

        let begun = [queues[0].begin(), queues[1].begin(), queues[1].begin()];
        let mark = pins.mark();
        queues[1].end(begun[1]);
        assert_eq!(woken(), 0, "nobody waits");
        pins.set_waiting(true);
        assert!(!pins.passed(mark));
        queues[1].end(begun[2]);
        assert_eq!(woken(), 1);
        queues[0].end(begun[0]);
        assert_eq!(woken(), 1, "the waiter has not looked since");
        pins.set_waiting(true);
        assert!(pins.passed(mark));
        let begun = queues[0].begin();
        queues[0].end(begun);
        assert_eq!(woken(), 2, "it was told that the waiter waits again");
    }

    /// Guards against a settler that waits for ever: of a queue's requests the one that began before the mark ends last, or others that
    /// began after it are still under way.
    #[test]
    fn the_oldest_request_wakes_the_settler_whatever_else_is_under_way() {
        for newer_ends_first in [true, false] {
            let pins = Arc::new(Pins::new());
            let inbox = Arc::new(Inbox::new(Arc::new(Silent)));
            let queue = QueuePins::new(Arc::clone(&pins), inbox);
            let wakes = Arc::new(Count::default());
            pins.set_waiter(&Waker::from(Arc::clone(&wakes)));
            let old = queue.begin();
            let mark = pins.mark();
            let new = queue.begin();
            assert_ne!(old, new);
            if newer_ends_first {
                queue.end(new);
            }
            pins.set_waiting(true);
            assert!(!pins.passed(mark));
            let before = wakes.0.load(Ordering::SeqCst);
            queue.end(old);
            assert_eq!(wakes.0.load(Ordering::SeqCst), before + 1);
            assert!(pins.passed(mark));
        }
    }

    fn removed(first: u64, count: u64, mark: u64) -> Removed {
        Removed { first, count, mark }
    }

    /// Removals become one only where nothing is lost by it, and the newer mark counts.
    #[test]
    fn merged_removals_have_the_newer_mark() {
        let mut list = Vec::new();
        for (next, expected) in [
            (removed(7, 1, 3), removed(7, 1, 3)),
            (removed(8, 2, 3), removed(7, 3, 3)),
            (removed(10, 1, 4), removed(7, 4, 4)),
            // So much later that the first would wait for long; not adjacent; before it; the same once more.
            (removed(11, 1, 6), removed(11, 1, 6)),
            (removed(13, 1, 6), removed(13, 1, 6)),
            (removed(12, 1, 7), removed(12, 1, 7)),
            (removed(12, 1, 8), removed(12, 1, 8)),
        ] {
            next.add_to(&mut list);
            assert_eq!(list.last(), Some(&expected));
        }
        assert_eq!(list.len(), 5);
    }

    /// O7: a request that began between two removals may use what the second took away.
    #[test]
    fn a_pin_between_two_removals_keeps_what_they_became() {
        let pins = Arc::new(Pins::new());
        let inbox = Arc::new(Inbox::new(Arc::new(Silent)));
        let queue = QueuePins::new(Arc::clone(&pins), inbox);
        let mut list = Vec::new();
        let before = queue.begin();
        removed(7, 1, pins.mark()).add_to(&mut list);
        let between = queue.begin();
        removed(8, 1, pins.mark()).add_to(&mut list);
        let after = queue.begin();
        assert_eq!(list.len(), 1);
        assert!(!pins.passed(list[0].mark));
        queue.end(before);
        assert!(!pins.passed(list[0].mark), "one is left that began between");
        queue.end(between);
        assert!(pins.passed(list[0].mark), "who began after has not seen it");
        queue.end(after);
    }
}
