//! Small things that tasks on different executors wait for.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use crate::planted::{self, Bug};
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

type Part<'a, E> = Pin<Box<dyn Future<Output = Result<(), E>> + 'a>>;

/// Parts of one task's work that run side by side, a bounded number at once: so what they hold is
/// bounded, and a wake costs a look at these few, however many parts there are in all.
///
/// While parts are running, the task must not wait for anything else: a part that is not polled may
/// hold what the task waits for. [`during`](Self::during) waits and polls them.
pub(crate) struct Window<'a, E> {
    running: Vec<Part<'a, E>>,
    most: usize,
    first_error: Option<E>,
}

impl<'a, E> Window<'a, E> {
    /// At most `most` parts at once, one at least.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            running: Vec::new(),
            most: most.max(1),
            first_error: None,
        }
    }

    /// Adds a part, as soon as there is room for it. It runs while the window is waited for.
    pub(crate) async fn start(&mut self, part: impl Future<Output = Result<(), E>> + 'a) {
        poll_fn(|cx| {
            if self.running.len() >= self.most {
                self.poll(cx);
            }
            if self.running.len() < self.most {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        self.running.push(Box::pin(part));
    }

    /// Waits for something else while the parts go on.
    pub(crate) async fn during<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        poll_fn(|cx| {
            self.poll(cx);
            other.as_mut().poll(cx)
        })
        .await
    }

    /// Waits until every part has ended; the first error.
    pub(crate) async fn end(mut self) -> Result<(), E> {
        poll_fn(move |cx| {
            self.poll(cx);
            let over = self.running.is_empty()
                || planted::is(Bug::EndsWithFirstError) && self.first_error.is_some()
                || planted::is(Bug::EndsBeforeLastPart) && self.running.len() == 1;
            if over {
                Poll::Ready(self.first_error.take().map_or(Ok(()), Err))
            } else {
                Poll::Pending
            }
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        let first_error = &mut self.first_error;
        self.running
            .retain_mut(|part| match part.as_mut().poll(cx) {
                Poll::Pending => true,
                Poll::Ready(result) => {
                    if let Err(error) = result {
                        first_error.get_or_insert(error);
                    }
                    false
                }
            });
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    //! Guards against a window that starts more parts than it may, polls them more often than their
    //! number allows, forgets an error, or leaves a part unpolled while its task waits.

    use std::rc::Rc;

    use super::*;

    /// Parts that end in order, one at each poll of the whole.
    #[derive(Default)]
    struct Parts {
        polls: Cell<usize>,
        running: Cell<usize>,
        most: Cell<usize>,
        ended: Cell<usize>,
        /// As many as this may have ended.
        allowed: Cell<usize>,
    }

    async fn part(parts: Rc<Parts>, number: usize) -> Result<(), usize> {
        parts.running.set(parts.running.get() + 1);
        parts.most.set(parts.most.get().max(parts.running.get()));
        poll_fn(|_| {
            parts.polls.set(parts.polls.get() + 1);
            if number < parts.allowed.get() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        parts.running.set(parts.running.get() - 1);
        parts.ended.set(parts.ended.get() + 1);
        if number % 10 == 3 {
            Err(number)
        } else {
            Ok(())
        }
    }

    fn run(parts: &Rc<Parts>, work: impl Future<Output = Result<(), usize>>) -> Result<(), usize> {
        let mut work = pin!(work);
        loop {
            if let Poll::Ready(result) = work.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return result;
            }
            parts.allowed.set(parts.allowed.get() + 1);
        }
    }

    #[test]
    fn a_window_is_bounded_and_linear() {
        let parts = Rc::new(Parts::default());
        let result = run(&parts, async {
            let mut window = Window::new(8);
            for number in 0..5000 {
                window.start(part(Rc::clone(&parts), number)).await;
            }
            window.end().await
        });
        assert_eq!(result, Err(3), "the first error, after all have ended");
        assert_eq!((parts.ended.get(), parts.most.get()), (5000, 8));
        assert!(parts.polls.get() <= 5000 * 2 * 9, "{}", parts.polls.get());
    }

    /// A task that waits for what a part of its own holds gets it.
    #[test]
    fn parts_go_on_while_their_task_waits() {
        let parts = Rc::new(Parts::default());
        let result = run(&parts, async {
            let mut window = Window::new(2);
            window.start(part(Rc::clone(&parts), 0)).await;
            window
                .during(poll_fn(|_| {
                    if parts.ended.get() == 1 {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                }))
                .await;
            window.end().await
        });
        assert_eq!((result, parts.ended.get()), (Ok(()), 1));
    }
}
