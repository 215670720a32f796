//! Every interleaving (as far as loom's bound on preemptions goes) of the parts that work without a lock: look-up
//! against eviction and change (`map`), pins against reuse (`pins`), wakes against sleep (`reactor`), and of the protocols that take a lock
//! for each of several steps: the gate, merged removals, locks of clusters, slices loaded while they change, decoded clusters.
//!
//! `cargo test -p urus-engine --features loom --lib interleavings`; `LOOM_MAX_PREEMPTIONS` widens it.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Wake, Waker};

use loom::thread;
use urus_format::{Geometry, GuestCluster, L2Raw};

use crate::chain::{LayerId, Removed};
use crate::cluster_locks::ClusterLocks;
use crate::decoded::DecodedCache;
use crate::frames::Frames;
use crate::gate::Gate;
use crate::map::{Lookup, Map, SliceId};
use crate::pins::{IDLE, Pins, QueuePins};
use crate::reactor::Inbox;
use crate::storage::Notify;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering};
use crate::wake::oneshot;

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

/// O7: two removals that became one are over when nobody uses either, whoever began between them.
#[test]
fn pin_and_merged_removals() {
    explore(|| {
        let pins = Arc::new(Pins::new());
        let queue = QueuePins::new(Arc::clone(&pins), inbox());
        let map = map(8);
        let reused = Arc::new(AtomicBool::new(false));
        let remover = {
            let (pins, map, reused) = (Arc::clone(&pins), Arc::clone(&map), Arc::clone(&reused));
            thread::spawn(move || {
                let mut list = Vec::new();
                for cluster in 0..2 {
                    map.store(0, GuestCluster(cluster), raw(99, 0));
                    let (first, mark) = (10 + cluster, pins.mark());
                    let count = 1;
                    Removed { first, count, mark }.add_to(&mut list);
                }
                assert_eq!(list.len(), 1);
                if pins.passed(list[0].mark) {
                    reused.store(true, Ordering::SeqCst);
                }
            })
        };
        for cluster in [1, 0] {
            let epoch = queue.begin();
            let found = map.lookup(GuestCluster(cluster));
            if found == Lookup::Entry(raw(10 + cluster, 0)) {
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

/// A pause begins when nobody is through the gate, on whichever queue, and then nobody comes through.
#[test]
fn gate_and_pause() {
    explore(|| {
        let (pins, gate) = (Arc::new(Pins::new()), Arc::new(Gate::new()));
        let paused = Arc::new(AtomicBool::new(false));
        let pauser = {
            let (pins, gate, paused) = (Arc::clone(&pins), Arc::clone(&gate), Arc::clone(&paused));
            thread::spawn(move || {
                gate.close();
                if pins.passed(IDLE) {
                    paused.store(true, Ordering::SeqCst);
                }
            })
        };
        let guest = |count: u32| {
            let (pins, gate, paused) = (Arc::clone(&pins), Arc::clone(&gate), Arc::clone(&paused));
            move || {
                let queue = QueuePins::new(Arc::clone(&pins), inbox());
                for _ in 0..count {
                    if let Some(epoch) = gate.enter(&queue) {
                        assert!(!paused.load(Ordering::SeqCst), "served during a pause");
                        queue.end(epoch);
                    }
                }
            }
        };
        let other = thread::spawn(guest(1));
        guest(2)();
        other.join().expect("the other guest does not panic");
        pauser.join().expect("the pauser does not panic");
    });
}

/// Who is held by the gate sees that it has opened, or is woken.
#[test]
fn gate_opens_for_who_sleeps() {
    explore(|| {
        let (pins, gate) = (Arc::new(Pins::new()), Arc::new(Gate::new()));
        let heard = Arc::new(Notified::default());
        let inbox = Arc::new(Inbox::new(Arc::clone(&heard) as Arc<dyn Notify>));
        let queue = QueuePins::new(Arc::clone(&pins), Arc::clone(&inbox));
        gate.close();
        let opener = {
            let (pins, gate) = (Arc::clone(&pins), Arc::clone(&gate));
            thread::spawn(move || gate.open(&pins))
        };
        // As a queue does: its turn, then sleep.
        let served = gate.enter(&queue).is_some() || !gate.is_closed();
        let asleep = !served && inbox.prepare_sleep();
        opener.join().expect("the opener does not panic");
        let heard = heard.0.load(Ordering::SeqCst);
        assert!(!asleep || heard, "held for ever");
    });
}

/// The same where the gate closes and opens once more while the queue lets go of what it held.
#[test]
fn gate_opens_again_for_who_sleeps() {
    explore(|| {
        let (pins, gate) = (Arc::new(Pins::new()), Arc::new(Gate::new()));
        let heard = Arc::new(Notified::default());
        let inbox = Arc::new(Inbox::new(Arc::clone(&heard) as Arc<dyn Notify>));
        let queue = QueuePins::new(Arc::clone(&pins), Arc::clone(&inbox));
        let opener = {
            let (pins, gate) = (Arc::clone(&pins), Arc::clone(&gate));
            thread::spawn(move || {
                gate.close();
                gate.open(&pins);
            })
        };
        // A request that an earlier pause has held; its wake was seen.
        let held = std::cell::Cell::new(true);
        let look = || {
            inbox.take_filled();
        };
        let release = || held.set(gate.enter(&queue).is_none());
        let asleep = loop {
            gate.turn(look, || held.get(), release);
            if !held.get() {
                break false;
            }
            if inbox.prepare_sleep() {
                break true;
            }
        };
        opener.join().expect("the opener does not panic");
        let heard = heard.0.load(Ordering::SeqCst);
        assert!(!asleep || heard, "held for ever");
    });
}

fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>, heard: &Arc<Notified>) -> Poll<T> {
    let waker = Waker::from(Arc::clone(heard));
    future.poll(&mut Context::from_waker(&waker))
}

/// O14: the lock of a cluster goes from one to the other, who hears of it, and never to both.
#[test]
fn cluster_lock_changes_hands() {
    explore(|| {
        let locks = Arc::new(ClusterLocks::new());
        let inside = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(Notified::default());
        let mut first = Box::pin({
            let locks = Arc::clone(&locks);
            async move { locks.lock(GuestCluster(5), 1).await }
        });
        let Poll::Ready(guard) = poll(first.as_mut(), &heard) else {
            unreachable!("nobody has it")
        };
        inside.store(true, Ordering::SeqCst);
        let holder = {
            let inside = Arc::clone(&inside);
            thread::spawn(move || {
                inside.store(false, Ordering::SeqCst);
                drop(guard);
            })
        };
        let mut second = pin!(locks.lock(GuestCluster(4), 3));
        match poll(second.as_mut(), &heard) {
            Poll::Ready(_) => assert!(!inside.load(Ordering::SeqCst), "both have it"),
            Poll::Pending => {
                holder.join().expect("the holder does not panic");
                assert!(
                    heard.0.load(Ordering::SeqCst),
                    "nobody said that it is free"
                );
                assert!(poll(second.as_mut(), &heard).is_ready());
                return;
            }
        }
        holder.join().expect("the holder does not panic");
    });
}

/// A value that is sent, and a sender that is gone without one, are heard of.
#[test]
fn a_sent_value_arrives() {
    for sends in [true, false] {
        explore(move || {
            let (sender, receiver) = oneshot();
            let heard = Arc::new(Notified::default());
            let other = thread::spawn(move || {
                if sends {
                    sender.send(7);
                }
            });
            let mut receiving = pin!(receiver.receive());
            let first = poll(receiving.as_mut(), &heard);
            other.join().expect("the sender does not panic");
            let value = match first {
                Poll::Ready(value) => value,
                Poll::Pending => {
                    assert!(
                        heard.0.load(Ordering::SeqCst),
                        "nobody said that it is there"
                    );
                    match poll(receiving.as_mut(), &heard) {
                        Poll::Ready(value) => value,
                        Poll::Pending => panic!("it was said to be there"),
                    }
                }
            };
            assert_eq!(value, sends.then_some(7));
        });
    }
}

/// O19: a slice that is read from disk while it changes, is written back and makes room for another never comes back as it was.
#[test]
fn load_against_change_and_eviction() {
    explore(|| {
        let map = Arc::new(Map::new(
            Geometry::new(9, 4, 8, 3),
            (1, 1),
            1,
            &crate::limits::Sizes::default(),
        ));
        map.set_l1(0, 1 << 63 | 512);
        let frames = Arc::new(Mutex::new(Frames::new(1, 64)));
        let disk = Arc::new(AtomicU64::new(10));
        let (slice, other) = (SliceId(0), SliceId(1));
        let loader = {
            let (map, frames, disk) = (Arc::clone(&map), Arc::clone(&frames), Arc::clone(&disk));
            thread::spawn(move || {
                let ticket = {
                    let mut frames = frames.lock();
                    if map.frame_of(slice).is_some() {
                        return;
                    }
                    frames.begin_load(slice)
                };
                let words = [disk.load(Ordering::SeqCst), 11];
                let _ = frames.lock().end_load(&map, slice, ticket, Some(&words));
            })
        };
        let sealed = {
            let mut frames = frames.lock();
            let frame = map.frame_of(slice).unwrap_or_else(|| {
                let installed = frames.install(&map, slice, &[10, 11]);
                installed.expect("nothing is dirty")
            });
            map.store(frame, GuestCluster(0), raw(30, 0));
            frames.mark_dirty(slice, frame);
            frames.seal()
        };
        disk.store(30, Ordering::SeqCst);
        {
            let mut frames = frames.lock();
            frames.unseal(&sealed, true);
            let installed = frames.install(&map, other, &[20, 21]);
            installed.expect("nothing is dirty");
        }
        loader.join().expect("the loader does not panic");
        match map.lookup(GuestCluster(0)) {
            Lookup::Miss(found) => assert_eq!(found, slice),
            found => assert_eq!(found, Lookup::Entry(raw(30, 0))),
        }
    });
}

/// O19: what was decoded from a cluster is never found once somebody else has it.
#[test]
fn decoded_and_reused() {
    explore(|| {
        let pins = Arc::new(Pins::new());
        let queue = QueuePins::new(Arc::clone(&pins), inbox());
        let (map, cache) = (
            map(8),
            Arc::new(DecodedCache::new(crate::limits::DECODED_CACHE_BYTES)),
        );
        let disk = Arc::new(AtomicU64::new(1));
        let settler = {
            let (pins, map) = (Arc::clone(&pins), Arc::clone(&map));
            let (cache, disk) = (Arc::clone(&cache), Arc::clone(&disk));
            thread::spawn(move || {
                map.store(0, GuestCluster(0), raw(99, 0));
                let mark = pins.mark();
                let free = pins.passed(mark);
                if free {
                    cache.invalidate(LayerId(0), 512, 1024);
                    disk.store(2, Ordering::SeqCst);
                }
                free
            })
        };
        let epoch = queue.begin();
        if map.lookup(GuestCluster(0)) == Lookup::Entry(raw(10, 0)) {
            let data = cache.get(LayerId(0), 600).unwrap_or_else(|| {
                let value = u8::try_from(disk.load(Ordering::SeqCst)).expect("a small one");
                let data = Arc::new(vec![value]);
                cache.insert(LayerId(0), 600, Arc::clone(&data));
                data
            });
            assert_eq!(*data, [1], "somebody else's");
        }
        queue.end(epoch);
        if settler.join().expect("the settler does not panic") {
            assert!(cache.get(LayerId(0), 600).is_none(), "it came late");
        }
    });
}
