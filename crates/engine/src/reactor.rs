//! One thread's executor: tasks, the operations they wait for, and the inbox that other threads wake it by.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use slab::Slab;

use crate::error::{Error, Result};
use crate::storage::{Completion, FileId, FileProperties, Notify, Op, Slot, Storage};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, fence};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What other threads (and this one) put their wakes into.
pub(crate) struct Inbox {
    ready: Mutex<VecDeque<usize>>,
    /// The owner sleeps or is about to: whoever wakes it must also notify.
    sleeping: AtomicBool,
    /// Something was put in since the owner last looked.
    filled: AtomicBool,
    notify: Arc<dyn Notify>,
}

impl Inbox {
    pub(crate) fn new(notify: Arc<dyn Notify>) -> Self {
        Self {
            ready: Mutex::new(VecDeque::new()),
            sleeping: AtomicBool::new(false),
            filled: AtomicBool::new(false),
            notify,
        }
    }

    fn push(&self, task: usize) {
        self.ready.lock().push_back(task);
        self.nudge();
    }

    /// Announces that the owner is about to sleep; `false` where it must look again first.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        // Pairs with the fence in `nudge`: one of the two sees what the other stored before.
        fence(Ordering::SeqCst);
        if self.filled.load(Ordering::Acquire) {
            self.sleeping.store(false, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// The owner does not sleep. (Who has not seen it yet notifies for nothing.)
    #[inline]
    fn awake(&self) {
        if self.sleeping.load(Ordering::Relaxed) {
            self.sleeping.store(false, Ordering::Relaxed);
        }
    }

    /// Whether something was put in since this was last asked. What is not seen yet is seen by `prepare_sleep`.
    #[inline]
    pub(crate) fn take_filled(&self) -> bool {
        self.filled.load(Ordering::Relaxed) && self.filled.swap(false, Ordering::SeqCst)
    }

    /// Makes the owner look again.
    pub(crate) fn nudge(&self) {
        self.filled.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            self.notify.notify();
        }
    }
}

struct TaskWaker {
    task: usize,
    inbox: Arc<Inbox>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.inbox.push(self.task);
    }
}

enum SlotState<D> {
    /// A task waits for it.
    Waiting(Option<Waker>),
    /// Completed, not yet taken.
    Done(io::Result<usize>),
    /// Whoever waited is gone; the driver still holds the memory.
    Abandoned,
    /// No task: the owner of the reactor handles the completion.
    Direct(D),
}

/// An executor on one [`Storage`]. `D` describes operations that need no task.
pub(crate) struct Reactor<S: Storage, D = ()> {
    storage: RefCell<S>,
    slots: RefCell<Slab<SlotState<D>>>,
    /// Operations the driver had no room for, in order.
    deferred: RefCell<VecDeque<(Slot, Op<S::Memory>)>>,
    tasks: RefCell<Slab<(Option<Task>, Waker)>>,
    /// Whether operations were submitted since the storage was last told to start them.
    unstarted: Cell<bool>,
    inbox: Arc<Inbox>,
}

impl<S: Storage, D> Reactor<S, D> {
    pub(crate) fn new(storage: S) -> Self {
        let inbox = Arc::new(Inbox::new(storage.notifier()));
        Self {
            storage: RefCell::new(storage),
            slots: RefCell::new(Slab::new()),
            deferred: RefCell::new(VecDeque::new()),
            tasks: RefCell::new(Slab::new()),
            unstarted: Cell::new(false),
            inbox,
        }
    }

    pub(crate) fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    #[inline]
    pub(crate) fn with_storage<R>(&self, f: impl FnOnce(&mut S) -> R) -> R {
        f(&mut self.storage.borrow_mut())
    }

    pub(crate) fn allocate(&self, bytes: u64) -> Result<S::Memory> {
        let memory = self.storage.borrow().allocate(crate::to_usize(bytes));
        memory.ok_or(Error::OutOfMemory { bytes })
    }

    pub(crate) fn properties(&self, file: FileId) -> FileProperties {
        self.storage.borrow().properties(file)
    }

    /// Starts a task. It runs at the next turn.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        let entry = tasks.vacant_entry();
        let id = entry.key();
        let waker = Waker::from(Arc::new(TaskWaker {
            task: id,
            inbox: Arc::clone(&self.inbox),
        }));
        entry.insert((Some(Box::pin(task)), waker));
        drop(tasks);
        self.inbox.push(id);
    }

    /// Nothing is under way: no operation, and no task.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.slots.borrow().is_empty() && self.tasks.borrow().is_empty()
    }

    pub(crate) fn task_count(&self) -> usize {
        self.tasks.borrow().len()
    }

    /// Drops every task where it stands. Operations in flight end by themselves.
    pub(crate) fn abandon_tasks(&self) {
        // Taken out first: what a task drops may look at the tasks.
        let tasks: Vec<_> = self.tasks.borrow_mut().drain().collect();
        drop(tasks);
    }

    /// Starts an operation whose completion `turn` hands to the owner.
    pub(crate) fn submit_direct(&self, op: Op<S::Memory>, what: D) {
        self.start(op, SlotState::Direct(what));
    }

    /// Whether operations wait for the next [`kick`](Self::kick).
    #[inline]
    pub(crate) fn has_unstarted(&self) -> bool {
        self.unstarted.get()
    }

    #[inline]
    fn start(&self, op: Op<S::Memory>, state: SlotState<D>) -> Slot {
        self.unstarted.set(true);
        let slot = self.slots.borrow_mut().insert(state);
        let mut deferred = self.deferred.borrow_mut();
        if deferred.is_empty() {
            if let Err(op) = self.storage.borrow_mut().submit(op, slot) {
                deferred.push_back((slot, op));
            }
        } else {
            deferred.push_back((slot, op));
        }
        slot
    }

    /// Runs an operation to its completion. Dropping the future leaves the operation to end by itself.
    pub(crate) fn run(&self, op: Op<S::Memory>) -> OpFuture<'_, S, D> {
        let slot = self.start(op, SlotState::Waiting(None));
        OpFuture {
            reactor: self,
            slot: Some(slot),
        }
    }

    /// Hands completions to tasks and to `direct`, runs what became ready, starts what was submitted. Never
    /// blocks. Returns whether anything happened.
    pub(crate) fn turn(&self, mut direct: impl FnMut(D, io::Result<usize>)) -> bool {
        self.inbox.awake();
        let mut progress = false;
        loop {
            let mut round = false;
            loop {
                let completion = self.storage.borrow_mut().complete();
                let Some(Completion { slot, result }) = completion else {
                    break;
                };
                round = true;
                self.settle(slot, result, &mut direct);
            }
            round |= self.has_deferred() && self.resubmit();
            round |= self.run_ready();
            if !round {
                break;
            }
            progress = true;
        }
        self.kick();
        progress
    }

    #[inline]
    fn settle(
        &self,
        slot: Slot,
        result: io::Result<usize>,
        direct: &mut impl FnMut(D, io::Result<usize>),
    ) {
        let mut slots = self.slots.borrow_mut();
        let state = slots
            .get_mut(slot)
            .expect("completion of a slot that is not in flight");
        match state {
            SlotState::Direct(_) | SlotState::Abandoned => {
                let state = slots.remove(slot);
                drop(slots);
                if let SlotState::Direct(what) = state {
                    direct(what, result);
                }
            }
            SlotState::Waiting(waker) => {
                let waker = waker.take();
                *state = SlotState::Done(result);
                drop(slots);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            SlotState::Done(_) => panic!("operation in slot {slot} completed twice"),
        }
    }

    #[inline]
    fn has_deferred(&self) -> bool {
        !self.deferred.borrow().is_empty()
    }

    fn resubmit(&self) -> bool {
        let mut any = false;
        loop {
            let Some((slot, op)) = self.deferred.borrow_mut().pop_front() else {
                return any;
            };
            if let Err(op) = self.storage.borrow_mut().submit(op, slot) {
                self.deferred.borrow_mut().push_front((slot, op));
                return any;
            }
            any = true;
        }
    }

    #[inline]
    fn run_ready(&self) -> bool {
        let mut any = false;
        while self.inbox.take_filled() {
            any |= self.run_listed();
        }
        any
    }

    /// Polls the tasks on the list, and those that come onto it meanwhile.
    fn run_listed(&self) -> bool {
        let mut any = false;
        loop {
            let Some(id) = self.inbox.ready.lock().pop_front() else {
                return any;
            };
            any = true;
            let taken = {
                let mut tasks = self.tasks.borrow_mut();
                tasks
                    .get_mut(id)
                    .and_then(|(task, waker)| task.take().map(|task| (task, waker.clone())))
            };
            // A wake for a task that has ended meanwhile.
            let Some((mut task, waker)) = taken else {
                continue;
            };
            match task.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(()) => {
                    self.tasks.borrow_mut().remove(id);
                }
                Poll::Pending => {
                    if let Some(entry) = self.tasks.borrow_mut().get_mut(id) {
                        entry.0 = Some(task);
                    }
                }
            }
        }
    }

    pub(crate) fn kick(&self) {
        self.unstarted.set(false);
        self.storage.borrow_mut().kick();
    }

    /// Announces that the owner is about to sleep; `false` where it must look again first.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.inbox.prepare_sleep()
    }

    /// Sleeps until a completion or a wake.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        if self.prepare_sleep() {
            self.storage.borrow_mut().wait(timeout);
            self.inbox.awake();
        }
    }

    /// Runs one future to its end, with everything else on this executor.
    pub(crate) fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let result = std::rc::Rc::new(RefCell::new(None));
        let slot = std::rc::Rc::clone(&result);
        self.spawn(async move {
            let value = future.await;
            *slot.borrow_mut() = Some(value);
        });
        loop {
            let progress = self.turn(|_, _| {});
            if let Some(value) = result.borrow_mut().take() {
                return value;
            }
            if !progress {
                self.wait(None);
            }
        }
    }
}

/// An operation in flight.
pub(crate) struct OpFuture<'a, S: Storage, D> {
    reactor: &'a Reactor<S, D>,
    slot: Option<Slot>,
}

impl<S: Storage, D> Future for OpFuture<'_, S, D> {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let slot = self.slot.expect("polled after completion");
        let mut slots = self.reactor.slots.borrow_mut();
        match &mut slots[slot] {
            SlotState::Waiting(waker) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            SlotState::Done(_) => {
                let SlotState::Done(result) = slots.remove(slot) else {
                    unreachable!("matched above")
                };
                drop(slots);
                self.slot = None;
                Poll::Ready(result)
            }
            SlotState::Abandoned | SlotState::Direct(_) => {
                unreachable!("a future's slot is its own")
            }
        }
    }
}

impl<S: Storage, D> Drop for OpFuture<'_, S, D> {
    fn drop(&mut self) {
        let Some(slot) = self.slot else { return };
        let mut slots = self.reactor.slots.borrow_mut();
        if matches!(slots[slot], SlotState::Done(_)) {
            slots.remove(slot);
        } else {
            slots[slot] = SlotState::Abandoned;
        }
    }
}
