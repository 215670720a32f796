//! O14: changes of one guest cluster's state exclude one another, and only those.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::task::{Poll, Waker};

use urus_format::GuestCluster;

use crate::planted::{self, Bug};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};

const SHARDS: usize = 16;

struct Waiter {
    granted: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

/// Locks by guest cluster. Taken in ascending order by each task, so that no two wait for one another.
pub(crate) struct ClusterLocks {
    shards: [Mutex<BTreeMap<u64, VecDeque<Arc<Waiter>>>>; SHARDS],
}

/// Holds a range of guest clusters.
pub(crate) struct ClusterGuard {
    locks: Arc<ClusterLocks>,
    first: u64,
    held: u64,
}

impl ClusterLocks {
    pub(crate) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::new(BTreeMap::new())),
        }
    }

    fn shard(&self, cluster: u64) -> &Mutex<BTreeMap<u64, VecDeque<Arc<Waiter>>>> {
        // The remainder is below SHARDS.
        &self.shards[crate::to_usize(cluster % SHARDS as u64)]
    }

    /// Takes `count` clusters from `first`, in ascending order.
    pub(crate) async fn lock(self: &Arc<Self>, first: GuestCluster, count: u64) -> ClusterGuard {
        let mut guard = ClusterGuard {
            locks: Arc::clone(self),
            first: first.0,
            held: 0,
        };
        if planted::is(Bug::NoClusterLocks) {
            return guard;
        }
        for cluster in first.0..first.0 + count {
            let waiter = {
                let mut shard = self.shard(cluster).lock();
                match shard.get_mut(&cluster) {
                    None => {
                        shard.insert(cluster, VecDeque::new());
                        None
                    }
                    Some(waiters) => {
                        let waiter = Arc::new(Waiter {
                            granted: AtomicBool::new(false),
                            waker: Mutex::new(None),
                        });
                        waiters.push_back(Arc::clone(&waiter));
                        Some(waiter)
                    }
                }
            };
            if let Some(waiter) = waiter {
                poll_fn(|cx| {
                    *waiter.waker.lock() = Some(cx.waker().clone());
                    if waiter.granted.load(Ordering::SeqCst) {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                })
                .await;
            }
            guard.held += 1;
        }
        guard
    }
}

impl Drop for ClusterGuard {
    fn drop(&mut self) {
        for cluster in self.first..self.first + self.held {
            let next = {
                let mut shard = self.locks.shard(cluster).lock();
                let waiters = shard.get_mut(&cluster).expect("held");
                let next = waiters.pop_front();
                if next.is_none() {
                    shard.remove(&cluster);
                }
                next
            };
            if let Some(waiter) = next {
                waiter.granted.store(true, Ordering::SeqCst);
                let waker = waiter.waker.lock().take();
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }
    }
}
