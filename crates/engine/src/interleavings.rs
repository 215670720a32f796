//! Every interleaving (as far as loom's bound on preemptions goes) of the parts that work without a lock: look-up
//! against eviction and change (`map`), pins against reuse (`pins`), wakes against sleep (`reactor`).
//!
//! `cargo test -p urus-engine --features loom --lib interleavings`; `LOOM_MAX_PREEMPTIONS` widens it.

use std::task::{Wake, Waker};

use loom::thread;
use urus_format::{Geometry, GuestCluster, L2Raw};

use crate::map::{Lookup, Map, SliceId};
use crate::pins::{Pins, QueuePins};
use crate::reactor::Inbox;
use crate::storage::Notify;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering};

/// Runs a model with at most three preemptions per run, where the environment does not say otherwise.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(model);
}

fn raw(entry: u64, subclusters: u64) -> L2Raw {
    L2Raw { entry, subclusters }
}

/// A map of 512-byte clusters whose slices have as few entries as can be, with slice 0 in frame 0.
fn map(entry_bytes: u32) -> Arc<Map> {
    let map = Map::new(
        Geometry::new(9, 4, entry_bytes, 3),
        (1, 1),
        1,
        &crate::limits::Sizes::default(),
    );
    map.set_l1(0, 1 << 63 | 512);
    // What differs per slice tells whose entry a look-up found.
    map.install(0, SliceId(0), &[10, 11]);
    Arc::new(map)
}

/// A look-up never finds the entry of another slice, however its frame changes hands.
#[test]
fn lookup_and_eviction() {
    explore(|| {
        let map = map(8);
        let evictor = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                map.release(0);
                map.install(0, SliceId(1), &[20, 21]);
            })
        };
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || match map.lookup(GuestCluster(3)) {
                Lookup::Miss(slice) => assert_eq!(slice, SliceId(1)),
                found => assert_eq!(found, Lookup::Entry(raw(21, 0))),
            })
        };
        match map.lookup(GuestCluster(1)) {
            Lookup::Miss(slice) => assert_eq!(slice, SliceId(0)),
            found => assert_eq!(found, Lookup::Entry(raw(11, 0))),
        }
        evictor.join().expect("the evictor does not panic");
        other.join().expect("the reader does not panic");
        assert_eq!(map.lookup(GuestCluster(3)), Lookup::Entry(raw(21, 0)));
    });
}

/// The two words of a wide entry change together, and whoever looks after the change sees it.
#[test]
fn lookup_and_change_of_a_wide_entry() {
    explore(|| {
        let map = map(16);
        let changed = Arc::new(AtomicBool::new(false));
        let writer = {
            let (map, changed) = (Arc::clone(&map), Arc::clone(&changed));
            thread::spawn(move || {
                map.store(0, GuestCluster(0), raw(30, 31));
                changed.store(true, Ordering::Release);
            })
        };
        let after = changed.load(Ordering::Acquire);
        match map.lookup(GuestCluster(0)) {
            Lookup::Entry(found) if after => assert_eq!(found, raw(30, 31)),
            Lookup::Entry(found) => {
                assert!(found == raw(10, 11) || found == raw(30, 31), "{found:?}")
            }
            // The slow way, which waits for the lock.
            found => assert_eq!(found, Lookup::Miss(SliceId(0))),
        }
        writer.join().expect("the writer does not panic");
    });
}

struct Notified(AtomicBool);

impl Default for Notified {
    fn default() -> Self {
        Self(AtomicBool::new(false))
    }
}

impl Notify for Notified {
    fn notify(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Wake for Notified {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn inbox() -> Arc<Inbox> {
    Arc::new(Inbox::new(Arc::new(Notified::default())))
}

/// O7: what a request found stays its until it ends: either it finds the new entry, or reuse waits for it.
#[test]
fn pin_and_free() {
    explore(|| {
        let pins = Arc::new(Pins::new());
        let queue = QueuePins::new(Arc::clone(&pins), inbox());
        let map = map(8);
        let reused = Arc::new(AtomicBool::new(false));
        let remover = {
            let (pins, map, reused) = (Arc::clone(&pins), Arc::clone(&map), Arc::clone(&reused));
            thread::spawn(move || {
                map.store(0, GuestCluster(0), raw(99, 0));
                let mark = pins.mark();
                if pins.passed(mark) {
                    reused.store(true, Ordering::SeqCst);
                }
            })
        };
        for _ in 0..2 {
            let epoch = queue.begin();
            if map.lookup(GuestCluster(0)) == Lookup::Entry(raw(10, 0)) {
                assert!(
                    !reused.load(Ordering::SeqCst),
                    "reused while a request uses it"
                );
            }
            queue.end(epoch);
        }
        remover.join().expect("the remover does not panic");
    });
}

/// Whoever waits for requests to end hears of the last one, or sees at once that it has ended.
#[test]
fn end_and_waiting() {
    explore(|| {
        let pins = Arc::new(Pins::new());
        let heard = Arc::new(Notified::default());
        let queue = QueuePins::new(Arc::clone(&pins), inbox());
        let epoch = queue.begin();
        let mark = pins.mark();
        pins.set_waiter(&Waker::from(Arc::clone(&heard)));
        let settler = {
            let pins = Arc::clone(&pins);
            thread::spawn(move || {
                pins.set_waiting(true);
                pins.passed(mark)
            })
        };
        queue.end(epoch);
        let passed = settler.join().expect("the settler does not panic");
        assert!(
            passed || heard.0.load(Ordering::SeqCst),
            "the request has ended unheard"
        );
    });
}

/// A wake is never lost between looking and falling asleep.
#[test]
fn wake_and_sleep() {
    explore(|| {
        let heard = Arc::new(Notified::default());
        let inbox = Arc::new(Inbox::new(Arc::clone(&heard) as Arc<dyn Notify>));
        let work = Arc::new(AtomicU64::new(0));
        let waker = {
            let (inbox, work) = (Arc::clone(&inbox), Arc::clone(&work));
            thread::spawn(move || {
                work.store(1, Ordering::Relaxed);
                inbox.nudge();
            })
        };
        let asleep = inbox.prepare_sleep();
        let seen = asleep || work.load(Ordering::Relaxed) == 1;
        waker.join().expect("the waker does not panic");
        let heard = heard.0.load(Ordering::SeqCst);
        assert!(seen, "awake, and without the work that woke it");
        assert!(!asleep || heard, "asleep, and nobody calls");
    });
}

/// The lock beneath all bookkeeping excludes (loom's own, as a check that the models see it).
#[test]
fn the_lock_excludes() {
    explore(|| {
        let sum = Arc::new(Mutex::new(0));
        let other = {
            let sum = Arc::clone(&sum);
            thread::spawn(move || *sum.lock() += 1)
        };
        *sum.lock() += 1;
        other.join().expect("no panic");
        assert_eq!(*sum.lock(), 2);
    });
}
