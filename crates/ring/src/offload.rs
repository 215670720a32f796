//! Threads for CPU work, such as decoding clusters: one pool for the process, started when first needed.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Condvar;
use std::thread;

use urus_engine::storage::{Completion, Slot};
use urus_engine::sync::{Arc, AtomicUsize, Mutex, OnceLock, Ordering};

use crate::bell::Bell;

/// Work as the engine gives it.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Where the results of a driver's jobs arrive.
pub(crate) struct Mailbox {
    bell: Arc<Bell>,
    done: Mutex<Vec<Completion>>,
    /// How many results wait in `done`: lets the driver look without the lock.
    count: AtomicUsize,
}

impl Mailbox {
    pub(crate) fn new(bell: Arc<Bell>) -> Arc<Self> {
        Arc::new(Self {
            bell,
            done: Mutex::default(),
            count: AtomicUsize::new(0),
        })
    }

    /// Moves what arrived to `completions`.
    pub(crate) fn collect(&self, completions: &mut VecDeque<Completion>) {
        if self.is_empty() {
            return;
        }
        let mut done = self.done.lock();
        self.count.store(0, Ordering::Release);
        completions.extend(done.drain(..));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    fn deliver(&self, completion: Completion) {
        {
            let mut done = self.done.lock();
            done.push(completion);
            self.count.store(done.len(), Ordering::Release);
        }
        self.bell.ring();
    }
}

struct Task {
    job: Job,
    slot: Slot,
    mailbox: Arc<Mailbox>,
}

impl Task {
    fn run(self) {
        let Self { job, slot, mailbox } = self;
        // A panic in a decoder must not take the pool down, nor leave the engine waiting for its slot.
        let result = match catch_unwind(AssertUnwindSafe(job)) {
            Ok(()) => Ok(0),
            Err(_) => Err(io::Error::other("an offloaded job panicked")),
        };
        mailbox.deliver(Completion { slot, result });
    }
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// Threads that wait for work.
    idle: usize,
    /// All threads.
    threads: usize,
}

struct Pool {
    queue: Mutex<Queue>,
    work: Condvar,
}

/// How many threads there may be. Asked once: finding it out reads files, so it is asked first while files are opened, after which a
/// process may have given up the right to.
pub(crate) fn threads_max() -> usize {
    static THREADS_MAX: OnceLock<usize> = OnceLock::new();
    *THREADS_MAX.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}

static POOL: Pool = Pool {
    queue: Mutex::new(Queue {
        tasks: VecDeque::new(),
        idle: 0,
        threads: 0,
    }),
    work: Condvar::new(),
};

/// Runs `job` on another thread; its completion arrives in `mailbox`, exactly once.
pub(crate) fn submit(job: Job, slot: Slot, mailbox: &Arc<Mailbox>) {
    let task = Task {
        job,
        slot,
        mailbox: Arc::clone(mailbox),
    };
    let mut queue = POOL.queue.lock();
    queue.tasks.push_back(task);
    let limit = threads_max();
    if queue.tasks.len() > queue.idle && queue.threads < limit {
        queue.threads += 1;
        let spawned = thread::Builder::new()
            .name("urus-offload".to_owned())
            .spawn(work);
        if let Err(error) = spawned {
            queue.threads -= 1;
            tracing::warn!(%error, threads = queue.threads, "cannot start a thread for offloaded work");
            if queue.threads == 0 {
                let tasks = std::mem::take(&mut queue.tasks);
                drop(queue);
                tasks.into_iter().for_each(Task::run);
                return;
            }
        }
    }
    drop(queue);
    POOL.work.notify_one();
}

/// The life of a pool thread. It stays: an idle thread costs a stack that is hardly touched.
fn work() {
    let mut queue = POOL.queue.lock();
    loop {
        if let Some(task) = queue.tasks.pop_front() {
            drop(queue);
            task.run();
            queue = POOL.queue.lock();
        } else {
            queue.idle += 1;
            queue = POOL
                .work
                .wait(queue)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}
