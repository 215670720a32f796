//! The back end: its threads, and how it starts and ends.

use std::fmt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use tracing::{Span, error, info, info_span};
use urus::{Device, QueueSeat};

use crate::Error;
use crate::control::{self, Signals};
use crate::frontend::Core;
use crate::limits;
use crate::listen::Listener;
use crate::request::Disk;
use crate::stats::{QueueStats, Stats};
use crate::vring::Shared;
use crate::worker::{Inbox, Message, Polling, Worker};

/// What to serve, and how. Made by [`Server::builder`].
pub struct ServerBuilder {
    device: Device,
    listener: Listener,
    queues: usize,
    serial: String,
    poll: Duration,
    volatile_cache: bool,
    pin_guest_memory: bool,
    introduction_time: Duration,
    on_end: Option<Box<dyn FnOnce() + Send>>,
}

impl ServerBuilder {
    /// Virtqueues that a front end can use, each with its own thread: 1 (default) to 256. A front end may use fewer.
    #[must_use]
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// What the guest sees as the disk's serial number, at most 20 bytes. The default is empty.
    #[must_use]
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = serial.into();
        self
    }

    /// How long a queue looks for requests before it sleeps, at most (0, which is the default, to 100 ms). It looks as
    /// long as the pauses between requests have been; a processor is busy meanwhile.
    #[must_use]
    pub fn poll(mut self, time: Duration) -> Self {
        self.poll = time;
        self
    }

    /// Lets writes complete before they are durable also where the front end has handed over memory for requests in
    /// flight (QEMU always does), as they do elsewhere: faster, but when this process is killed and its guest goes on with
    /// another one, writes that had completed and were not flushed may be gone, which no file system expects.
    #[must_use]
    pub fn volatile_cache(mut self, volatile: bool) -> Self {
        self.volatile_cache = volatile;
        self
    }

    /// Registers the guest's memory with each queue's ring, so that the kernel does not look its pages up for each request. All of it stays in the
    /// host's memory then, whether the guest uses it or not, and must not be taken from it (no ballooning, no overcommit): I/O would go to pages that
    /// the guest no longer has. Where the kernel refuses (RLIMIT_MEMLOCK), the log says so and requests are served without.
    #[must_use]
    pub fn pin_guest_memory(mut self, pin: bool) -> Self {
        self.pin_guest_memory = pin;
        self
    }

    /// How long a front end may take until it has begun a session, and for the rest of a message of which it has sent a part (default 10 s, at least
    /// 1 ms). After that it may be silent for ever. Connections that say nothing keep nobody waiting.
    #[must_use]
    pub fn introduction_time(mut self, time: Duration) -> Self {
        self.introduction_time = time.max(Duration::from_millis(1));
        self
    }

    /// What to do when no front end comes any more: the only one, of a connected socket, has gone. Called on a thread of
    /// the server's.
    #[must_use]
    pub fn on_end(mut self, action: impl FnOnce() + Send + 'static) -> Self {
        self.on_end = Some(Box::new(action));
        self
    }

    /// Starts to serve.
    ///
    /// # Errors
    /// Options that make no sense, or a device or system that gives no queue or thread. Nothing runs then.
    pub fn start(self) -> Result<Server, Error> {
        self.check()?;
        let span = info_span!("vhost-user", image = self.device.name());
        let _entered = span.enter();
        let mut serial = [0; limits::SERIAL_BYTES];
        serial[..self.serial.len()].copy_from_slice(self.serial.as_bytes());
        let shared = Arc::new(Shared {
            disk: Disk {
                read_only: self.device.read_only(),
                serial,
            },
            write_through: AtomicBool::new(false),
            outlived: AtomicBool::new(false),
            served: AtomicBool::new(false),
        });
        let seats = (0..self.queues)
            .map(|_| self.device.queue())
            .collect::<Result<Vec<_>, _>>()?;
        let signals = Signals::new(&self.listener.source)
            .map_err(|error| Error::system("make an eventfd", error))?;
        let mut server = Server {
            signals: Arc::new(signals),
            control: None,
            workers: Vec::new(),
            stats: Vec::new(),
            path: self.listener.path().map(Into::into),
            span: span.clone(),
        };
        // Dropped on failure, the server stops the threads that have started.
        server.start_workers(seats, &shared, self.poll, self.pin_guest_memory)?;
        let signals = Arc::downgrade(&server.signals);
        self.device.on_resize(move || {
            if let Some(signals) = signals.upgrade() {
                signals.resized();
            }
        });
        let core = Core {
            device: self.device,
            shared,
            inboxes: server
                .workers
                .iter()
                .map(|worker| Arc::clone(&worker.inbox))
                .collect(),
            volatile_cache: self.volatile_cache,
            introduction_time: self.introduction_time,
        };
        server.start_control(core, self.listener, self.on_end)?;
        Ok(server)
    }

    fn check(&self) -> Result<(), Error> {
        let queues = self.queues;
        if !(1..=limits::QUEUES).contains(&queues) {
            return Err(Error::invalid(format!(
                "{queues} queues: a vhost-user back end can have 1 to {}",
                limits::QUEUES
            )));
        }
        let bytes = self.serial.len();
        if bytes > limits::SERIAL_BYTES || !self.serial.is_ascii() {
            return Err(Error::invalid(format!(
                "the serial number {:?} is not possible: it can have at most {} bytes of ASCII",
                self.serial,
                limits::SERIAL_BYTES
            )));
        }
        if self.poll > limits::POLL_TIME {
            return Err(Error::invalid(format!(
                "polling for {:?} is too long: at most {:?} are possible",
                self.poll,
                limits::POLL_TIME
            )));
        }
        Ok(())
    }
}

impl fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerBuilder")
            .field("device", &self.device)
            .field("listener", &self.listener)
            .field("queues", &self.queues)
            .field("serial", &self.serial)
            .field("poll", &self.poll)
            .finish_non_exhaustive()
    }
}

/// A running vhost-user-blk back end.
///
/// Dropping it is a [`shutdown`](Self::shutdown) whose outcome is only logged.
pub struct Server {
    signals: Arc<Signals>,
    control: Option<JoinHandle<Result<(), Errno>>>,
    workers: Vec<RunningWorker>,
    stats: Vec<Arc<QueueStats>>,
    path: Option<Box<Path>>,
    span: Span,
}

struct RunningWorker {
    inbox: Arc<Inbox>,
    thread: JoinHandle<Result<(), Errno>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("path", &self.path)
            .field("queues", &self.workers.len())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// What is to be seen of a [`Server`], from any thread, for as long as one likes.
#[derive(Clone, Debug)]
pub struct Monitor {
    signals: Arc<Signals>,
    stats: Vec<Arc<QueueStats>>,
}

impl Monitor {
    /// Whether a front end is connected at this moment.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.signals.is_connected()
    }

    /// What the server has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        sum(&self.stats)
    }
}

fn sum(queues: &[Arc<QueueStats>]) -> Stats {
    let mut sum = Stats::default();
    for queue in queues {
        sum.add(queue);
    }
    sum
}

impl Server {
    /// A back end of `device` for the front ends that come to `listener`, to be configured.
    #[must_use]
    pub fn builder(device: Device, listener: Listener) -> ServerBuilder {
        ServerBuilder {
            device,
            listener,
            queues: 1,
            serial: String::new(),
            poll: Duration::ZERO,
            volatile_cache: false,
            pin_guest_memory: false,
            introduction_time: limits::INTRODUCTION_TIME,
            on_end: None,
        }
    }

    /// The path of the socket, if it has one that the server was given to listen at.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        sum(&self.stats)
    }

    /// To see how it is doing from elsewhere.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        Monitor {
            signals: Arc::clone(&self.signals),
            stats: self.stats.clone(),
        }
    }

    /// Ends the back end: takes no more requests, finishes those in flight and tells the guest, cuts the front end off,
    /// removes its socket and ends its threads. What the guest has made available meanwhile stays for a successor.
    ///
    /// Nothing is flushed by this: [`Device::close`] makes everything durable.
    ///
    /// # Errors
    /// [`Error::ThreadFailed`] when a thread had failed before.
    pub fn shutdown(mut self) -> Result<(), Error> {
        self.end()
    }

    fn start_workers(
        &mut self,
        seats: Vec<QueueSeat>,
        shared: &Arc<Shared>,
        poll: Duration,
        pin: bool,
    ) -> Result<(), Error> {
        let (started, results) = mpsc::channel();
        for (index, seat) in (0..).zip(seats) {
            let inbox = Inbox::new().map_err(|error| Error::system("make an eventfd", error))?;
            let inbox = Arc::new(inbox);
            let stats = Arc::new(QueueStats::default());
            self.stats.push(Arc::clone(&stats));
            let (ours, started) = (Arc::clone(&inbox), started.clone());
            let (shared, span) = (Arc::clone(shared), self.span.clone());
            let work = move || {
                let _entered = span.enter();
                let worker = seat.activate().map_err(Error::from).and_then(|queue| {
                    let inbox = Arc::clone(&ours);
                    Worker::new(index, queue, inbox, shared, stats, Polling::new(poll), pin)
                });
                run_worker(&ours, worker, &started)
            };
            let thread = std::thread::Builder::new()
                .name(format!("urus-vhost-{index}"))
                .spawn(work)
                .map_err(|error| Error::system("start a thread", error))?;
            self.workers.push(RunningWorker { inbox, thread });
        }
        drop(started);
        for _ in &self.workers {
            results.recv().map_err(|_| Error::ThreadFailed)??;
        }
        Ok(())
    }

    fn start_control(
        &mut self,
        core: Core,
        listener: Listener,
        on_end: Option<Box<dyn FnOnce() + Send>>,
    ) -> Result<(), Error> {
        let (signals, span) = (Arc::clone(&self.signals), self.span.clone());
        let work = move || {
            let _entered = span.enter();
            let result = control::run(&core, listener, &signals)
                .inspect_err(|error| error!(%error, "no more front ends are taken"));
            if let Some(on_end) = on_end {
                on_end();
            }
            result
        };
        let thread = std::thread::Builder::new()
            .name("urus-vhost".into())
            .spawn(work)
            .map_err(|error| Error::system("start a thread", error))?;
        self.control = Some(thread);
        Ok(())
    }

    /// Stops all threads and waits for them. Doing it again does nothing.
    fn end(&mut self) -> Result<(), Error> {
        let span = self.span.clone();
        let _entered = span.enter();
        let mut result = Ok(());
        let mut note = |ended: std::thread::Result<Result<(), Errno>>| {
            if !matches!(ended, Ok(Ok(()))) {
                result = Err(Error::ThreadFailed);
            }
        };
        if let Some(control) = self.control.take() {
            self.signals.stop();
            note(control.join());
            // Not once more when there is nothing left to end.
            let stats = self.stats();
            info!(?stats, "ended");
        }
        for worker in self.workers.drain(..) {
            // A thread that is gone has been told.
            let _ = worker.inbox.ask(Message::Quit);
            note(worker.thread.join());
        }
        result
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            error!(%error, "the vhost-user back end did not end well");
        }
    }
}

/// The life of a queue's thread. Says through `started` whether it could begin.
fn run_worker(
    inbox: &Inbox,
    worker: Result<Worker, Error>,
    started: &mpsc::Sender<Result<(), Error>>,
) -> Result<(), Errno> {
    /// Lets go of those who wait for answers when the thread ends, in whatever way.
    struct Closing<'a>(&'a Inbox);
    impl Drop for Closing<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }
    let _closing = Closing(inbox);
    match worker {
        Ok(worker) => {
            let _ = started.send(Ok(()));
            worker.run()
        }
        Err(error) => {
            let _ = started.send(Err(error));
            Ok(())
        }
    }
}
