//! A queue: where one thread submits requests and reaps completions.

use std::fmt;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use slab::Slab;
use urus_ring::{Buffer, Driver, DriverKind, MemoryRegion, RingMemory};

use crate::device::driver_name;
use crate::request::Kind;
use crate::statistics::{Counted, Place};
use crate::{Completion, Device, Error, Rejected, Request, Result, Sockets};
use urus_engine::request::{Reply, Request as EngineRequest, RequestKind};

/// A place for a queue on a device, not yet bound to a thread.
#[derive(Debug)]
pub struct QueueSeat {
    device: Device,
    place: Place,
    sockets: bool,
}

impl QueueSeat {
    pub(crate) fn new(device: Device) -> Self {
        let place = device.take_place();
        Self {
            device,
            place,
            sockets: false,
        }
    }

    /// The queue's ring is to do the work on sockets too ([`Queue::sockets`]): for a server. Without, the ring refuses it.
    #[must_use]
    pub fn with_sockets(mut self) -> Self {
        self.sockets = true;
        self
    }

    /// The queue, bound to the calling thread: only that thread can use and drop it.
    ///
    /// # Errors
    /// What the kernel says when it gives no ring (memory, descriptors).
    pub fn activate(self) -> Result<Queue> {
        let driver = self.device.open_driver(self.sockets)?;
        let kind = driver.kind();
        let depth = usize::try_from(self.device.queue_depth()).expect("32 bits fit a usize");
        self.place.activated(kind);
        Ok(Queue {
            engine: urus_engine::Queue::new(self.device.shared(), driver, depth),
            latencies: self.device.measures_latencies(),
            device: self.device,
            place: self.place,
            in_flight: Slab::with_capacity(depth),
            begun: None,
            ended: None,
            event_fd: None,
            kind,
            depth,
            sockets: self.sockets && kind == DriverKind::IoUring,
            thread_bound: PhantomData,
        })
    }
}

/// A queue of a [`Device`], with its own ring, bound to the thread that activated it.
///
/// Submit any number of requests, then [`kick`](Self::kick) once. Completions come in any order. The device's
/// work advances in calls of [`completion`](Self::completion), so a queue with requests in flight is to be
/// polled: after each kick and each event until it returns None.
///
/// Dropping it waits for the requests in flight, whose completions are lost.
pub struct Queue {
    // Dropped first: it drains, which needs the device.
    engine: urus_engine::Queue<Driver>,
    device: Device,
    place: Place,
    /// By the token that the engine knows.
    in_flight: Slab<InFlight>,
    /// Whether the clock is read at all.
    latencies: bool,
    /// When what was submitted since the last kick began.
    begun: Option<Instant>,
    /// When the replies that the engine has found were found.
    ended: Option<Instant>,
    event_fd: Option<OwnedFd>,
    kind: DriverKind,
    depth: usize,
    /// The driver has sockets.
    sockets: bool,
    /// Neither `Send` nor `Sync`: the kernel wants a ring used by one thread.
    thread_bound: PhantomData<*const ()>,
}

/// What is known of a request until it completes.
struct InFlight {
    /// The caller's.
    token: u64,
    counted: Counted,
    begun: Option<Instant>,
}

impl Queue {
    /// Whether writes and write-zeroes submitted from now on, once completed, are still there when this process is killed. For a
    /// VMM whose guest lives on in another process (vhost-user): such a guest counts on what has completed, flushed or not. They may
    /// still be lost with the power, as without it. Costs nothing for overwrites; what changes the mapping waits for a commit,
    /// as [`Request::fua`] does. Off by default.
    pub fn outlive_process(&mut self, outlive: bool) {
        self.engine.outlive_process(outlive);
    }

    /// Registers memory with the queue's ring, in place of what was registered before: requests whose buffers lie in it cost the kernel less
    /// (docs/TUNING.md). The pages are pinned until other memory is registered or the queue is dropped; an empty list lets go of them.
    /// [`Buffer::pool`] makes buffers for it.
    ///
    /// # Errors
    /// [`Error::Io`] where the kernel refuses, as a rule since RLIMIT_MEMLOCK is too low. Nothing is registered then, and requests work as without.
    pub fn register_memory(&mut self, regions: Vec<MemoryRegion>) -> Result<()> {
        self.engine
            .with_storage(|driver| driver.register_memory(regions))
            .map_err(Error::io(
                "register memory (is RLIMIT_MEMLOCK large enough?) for",
                &self.device.layers()[0].path,
            ))
    }

    /// Takes a request, to be started at the latest by [`kick`](Self::kick). A request that makes no sense (a
    /// range past the end, a write on a read-only device) is taken too, and completes with its error.
    ///
    /// # Errors
    /// The request itself, when as many as [`depth`](Self::depth) are in flight.
    #[allow(
        clippy::result_large_err,
        reason = "handing the request back is the point; it is moved, not allocated"
    )]
    pub fn submit(&mut self, request: Request) -> Result<(), Rejected> {
        if self.engine.in_flight() >= self.depth {
            return Err(Rejected { request });
        }
        let key = self.in_flight.insert(InFlight {
            token: request.token,
            counted: Counted::of(&request.kind),
            begun: self
                .latencies
                .then(|| *self.begun.get_or_insert_with(Instant::now)),
        });
        let taken = self.engine.submit(into_engine(key as u64, request.kind));
        let result = taken.map_err(|refused| Rejected {
            request: Request {
                token: self.in_flight.remove(key).token,
                kind: from_engine(refused.kind),
            },
        });
        self.place.set_in_flight(self.in_flight.len());
        result
    }

    /// Starts everything submitted: one system call for all of it.
    pub fn kick(&mut self) {
        self.begun = None;
        self.engine.kick();
    }

    /// The next completion, without waiting.
    pub fn completion(&mut self) -> Option<Completion> {
        // (What sockets do goes on in the engine's storage.)
        if self.engine.is_idle() && !self.sockets {
            return None;
        }
        if !self.engine.has_reply() {
            // The engine starts what was submitted, and looks for replies.
            self.begun = None;
            self.ended = None;
        }
        let Reply {
            token,
            result,
            memory,
            extents,
        } = self.engine.complete()?;
        let token = self.count(token, result.is_ok());
        Some(Completion {
            token,
            result: result.map_err(|error| Error::from(*error)),
            buffer: memory.map(whole_buffer),
            extents,
        })
    }

    /// A request has ended; returns the caller's token.
    fn count(&mut self, key: u64, succeeded: bool) -> u64 {
        let key = usize::try_from(key).expect("was an index");
        let InFlight {
            token,
            counted,
            begun,
        } = self.in_flight.remove(key);
        self.place.set_in_flight(self.in_flight.len());
        if !succeeded {
            self.place.failed(counted);
            return token;
        }
        self.place.succeeded(counted);
        if let Some(begun) = begun {
            let ended = match self.ended {
                Some(ended) if ended >= begun => ended,
                // Found anew, or answered when it was submitted.
                _ => *self.ended.insert(Instant::now()),
            };
            self.place.took(counted, ended.duration_since(begun));
        }
        token
    }

    /// Sleeps until [`completion`](Self::completion) may have something, or the time is over. Starts what was
    /// submitted. With nothing in flight and no time given it may sleep forever.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.begun = None;
        self.engine.wait(timeout);
    }

    /// An eventfd that becomes readable when [`completion`](Self::completion) may have something, for epoll,
    /// poll or a ring of the caller's. It is readable once right after the first call. When it is, call
    /// [`consume_event`](Self::consume_event), then `completion` until it returns None: what is left is not
    /// announced again.
    ///
    /// A queue whose eventfd was never asked for does not pay for signalling it.
    ///
    /// # Errors
    /// What the kernel says when it gives no eventfd (descriptors), on the first call.
    pub fn event_fd(&mut self) -> Result<BorrowedFd<'_>> {
        let fd = match self.event_fd.take() {
            Some(fd) => fd,
            None => self
                .engine
                .with_storage(|driver| driver.event_fd()?.try_clone_to_owned())
                .map_err(Error::io(
                    "set up an eventfd for",
                    &self.device.layers()[0].path,
                ))?,
        };
        let fd: &OwnedFd = self.event_fd.insert(fd);
        Ok(fd.as_fd())
    }

    /// Makes [`event_fd`](Self::event_fd) unreadable until the next event.
    pub fn consume_event(&mut self) {
        self.engine.with_storage(Driver::consume_event);
    }

    /// What the queue's ring does with sockets, for a server that has nothing but its queue to sleep in. None where there is no ring, and
    /// for a seat that was not asked [`with_sockets`](QueueSeat::with_sockets).
    #[must_use]
    pub fn sockets(&mut self) -> Option<Sockets<'_>> {
        self.sockets.then_some(Sockets {
            engine: &mut self.engine,
        })
    }

    /// Requests submitted whose completion was not yet taken.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    /// Requests that can be in flight at once.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// The device it belongs to.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its place in [`Statistics::queues`](crate::Statistics::queues).
    #[must_use]
    pub fn number(&self) -> usize {
        self.place.number()
    }

    /// What does the I/O of this queue: "io_uring" or "blocking".
    #[must_use]
    pub fn driver(&self) -> &'static str {
        driver_name(self.kind)
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("device", &self.device.name())
            .field("number", &self.number())
            .field("driver", &self.driver())
            .field("depth", &self.depth)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

fn into_engine(token: u64, kind: Kind) -> EngineRequest<RingMemory> {
    let kind = match kind {
        Kind::Read { offset, buffer } => RequestKind::Read {
            offset,
            memory: buffer.into_memory(),
        },
        Kind::Write {
            offset,
            buffer,
            fua,
        } => RequestKind::Write {
            offset,
            memory: buffer.into_memory(),
            fua,
        },
        Kind::Discard { offset, len } => RequestKind::Discard { offset, len },
        Kind::WriteZeroes {
            offset,
            len,
            unmap,
            fua,
        } => RequestKind::WriteZeroes {
            offset,
            len,
            unmap,
            fua,
        },
        Kind::Flush => RequestKind::Flush,
        Kind::BlockStatus { offset, len } => RequestKind::BlockStatus { offset, len },
    };
    EngineRequest { token, kind }
}

fn from_engine(kind: RequestKind<RingMemory>) -> Kind {
    match kind {
        RequestKind::Read { offset, memory } => Kind::Read {
            offset,
            buffer: whole_buffer(memory),
        },
        RequestKind::Write {
            offset,
            memory,
            fua,
        } => Kind::Write {
            offset,
            buffer: whole_buffer(memory),
            fua,
        },
        RequestKind::Discard { offset, len } => Kind::Discard { offset, len },
        RequestKind::WriteZeroes {
            offset,
            len,
            unmap,
            fua,
        } => Kind::WriteZeroes {
            offset,
            len,
            unmap,
            fua,
        },
        RequestKind::Flush => Kind::Flush,
        RequestKind::BlockStatus { offset, len } => Kind::BlockStatus { offset, len },
    }
}

/// The caller's buffer again.
///
/// The engine hands memory back when no operation and no task holds a view of it any more: so it is the last one.
fn whole_buffer(memory: RingMemory) -> Buffer {
    memory
        .try_into_buffer()
        .expect("the engine has let go of the request's memory")
}
