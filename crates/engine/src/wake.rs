//! Small things that tasks on different executors wait for.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, Waker};

use crate::sync::{Arc, Mutex};

struct Shot<T> {
    value: Option<T>,
    waker: Option<Waker>,
    sender_gone: bool,
}

/// The giving half of a value passed once.
pub(crate) struct Sender<T>(Arc<Mutex<Shot<T>>>);

/// The waiting half.
pub(crate) struct Receiver<T>(Arc<Mutex<Shot<T>>>);

/// A value passed once between tasks.
pub(crate) fn oneshot<T>() -> (Sender<T>, Receiver<T>) {
    let shot = Arc::new(Mutex::new(Shot {
        value: None,
        waker: None,
        sender_gone: false,
    }));
    (Sender(Arc::clone(&shot)), Receiver(shot))
}

impl<T> Sender<T> {
    pub(crate) fn send(self, value: T) {
        self.0.lock().value = Some(value);
        // Drop wakes the receiver.
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut shot = self.0.lock();
            shot.sender_gone = true;
            shot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Receiver<T> {
    /// The value; `None` where the sender was dropped without one.
    pub(crate) async fn receive(self) -> Option<T> {
        poll_fn(|cx| {
            let mut shot = self.0.lock();
            if let Some(value) = shot.value.take() {
                return Poll::Ready(Some(value));
            }
            if shot.sender_gone {
                return Poll::Ready(None);
            }
            shot.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// A list of wakers: wait for something to change, then look again.
#[derive(Default)]
pub(crate) struct WaitList(VecDeque<Waker>);

impl WaitList {
    pub(crate) fn register(&mut self, waker: &Waker) {
        if !self.0.iter().any(|known| known.will_wake(waker)) {
            self.0.push_back(waker.clone());
        }
    }

    /// Takes the wakers out, to be woken after the lock around the list is let go.
    pub(crate) fn take(&mut self) -> VecDeque<Waker> {
        std::mem::take(&mut self.0)
    }
}

/// A lock between tasks of one executor, held across awaits.
#[derive(Default)]
pub(crate) struct Turn {
    taken: Cell<bool>,
    waiting: RefCell<WaitList>,
}

/// Somebody's turn; over when dropped.
pub(crate) struct TurnGuard<'a>(&'a Turn);

impl Turn {
    pub(crate) async fn take(&self) -> TurnGuard<'_> {
        poll_fn(|cx| {
            if self.taken.replace(true) {
                self.waiting.borrow_mut().register(cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        TurnGuard(self)
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.taken.set(false);
        for waker in self.0.waiting.borrow_mut().take() {
            waker.wake();
        }
    }
}

/// Work that several tasks of one executor want, and one does: the others wait for it.
pub(crate) struct Flights<K>(RefCell<BTreeMap<K, WaitList>>);

/// Whoever holds it does the work; the others wait until it is dropped.
pub(crate) struct FlightGuard<'a, K: Ord + Copy> {
    flights: &'a Flights<K>,
    key: K,
}

impl<K> Default for Flights<K> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<K: Ord + Copy> Flights<K> {
    /// The work, if nobody does it; else waits until whoever does has ended, and returns `None`.
    pub(crate) async fn join(&self, key: K) -> Option<FlightGuard<'_, K>> {
        let mut waited = false;
        poll_fn(|cx| {
            let mut flights = self.0.borrow_mut();
            match flights.get_mut(&key) {
                Some(waiters) => {
                    waiters.register(cx.waker());
                    waited = true;
                    Poll::Pending
                }
                None if waited => Poll::Ready(None),
                None => {
                    flights.insert(key, WaitList::default());
                    Poll::Ready(Some(FlightGuard { flights: self, key }))
                }
            }
        })
        .await
    }
}

impl<K: Ord + Copy> Drop for FlightGuard<'_, K> {
    fn drop(&mut self) {
        let waiters = self.flights.0.borrow_mut().remove(&self.key);
        for waker in waiters.map(|mut list| list.take()).unwrap_or_default() {
            waker.wake();
        }
    }
}

/// Work of one task that runs side by side, each part with its own result.
pub(crate) type Parts<'a, E> = Vec<Pin<Box<dyn Future<Output = Result<(), E>> + 'a>>>;

/// Runs futures side by side on one task; the first error, after all have ended.
pub(crate) async fn join_all<E>(futures: Parts<'_, E>) -> Result<(), E> {
    let mut running: Vec<Option<_>> = futures.into_iter().map(Some).collect();
    let mut first_error = None;
    poll_fn(move |cx| {
        let mut pending = false;
        for entry in &mut running {
            if let Some(future) = entry {
                match future.as_mut().poll(cx) {
                    Poll::Ready(result) => {
                        *entry = None;
                        if let Err(error) = result {
                            first_error.get_or_insert(error);
                        }
                    }
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            Poll::Pending
        } else {
            Poll::Ready(first_error.take().map_or(Ok(()), Err))
        }
    })
    .await
}
