//! urus: QCOW2 and raw images as fast, safe block devices on Linux.
//!
//! For authors of virtual machine monitors, storage daemons and image tools. An image becomes a [`Device`];
//! each thread that does I/O on it gets a [`Queue`] with an io_uring of its own; requests carry buffers that
//! they own. There is no async runtime in here and none is needed: a queue goes into any event loop through one
//! eventfd, or is waited on.
//!
//! # The shortest program
//! ```no_run
//! # fn main() -> Result<(), urus::Error> {
//! let device = urus::OpenOptions::new().read_only(true).open("disk.qcow2")?;
//! let mut first_sector = [0; 512];
//! device.blocking()?.read_at(&mut first_sector, 0)?;
//! # Ok(()) }
//! ```
//! [`BlockingIo`] is for tools and tests. `examples/copy.rs` copies an image to a raw file with it.
//!
//! # Queues
//! [`Device::queue`] gives a seat, which may be sent to the thread that will use it; [`QueueSeat::activate`]
//! makes the queue there. From then on only that thread submits, reaps and drops it. Any number of queues work
//! side by side; a request that finds its clusters mapped takes no lock and allocates nothing.
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let device = urus::OpenOptions::new().open("disk.qcow2")?;
//! use urus::{Buffer, Request};
//!
//! let mut queue = device.queue()?.activate()?;
//! for token in 0..8 {
//!     queue.submit(Request::read(token, token * 4096, Buffer::new(4096)))?;
//! }
//! queue.kick(); // one system call for all of them
//! while queue.in_flight() > 0 {
//!     match queue.completion() {
//!         Some(completion) => completion.result?,
//!         None => queue.wait(None),
//!     }
//! }
//! # Ok(()) }
//! ```
//! In an event loop: watch [`Queue::event_fd`]; when it is readable call [`Queue::consume_event`]; submit what
//! there is; [`Queue::kick`]; and call [`Queue::completion`] until it returns `None`. `examples/epoll_loop.rs`
//! is a whole one, with two queues and a guest's memory. A queue's requests advance only in these calls: keep
//! polling a queue that has requests in flight.
//!
//! # Contracts
//! Offsets and lengths are in bytes, of any alignment and size.
//!
//! **Completion.** Every request that [`Queue::submit`] takes completes exactly once, with its own result, in
//! any order. A request that makes no sense completes with an error too. The buffer comes back with the
//! completion, and until then nobody else can touch it: the kernel may be writing into it, whatever happens to
//! the caller, the queue or the device.
//!
//! **Order.** There is none between requests in flight together. Of writes that overlap, each sector ends as one of
//! them says; a read beside a write sees each sector before or after it. Who needs an order waits for the first
//! completion before the second submission.
//!
//! **Write.** Completed means that later reads see it, not that it is durable. After a crash each sector reads
//! as it was last flushed, or as a later write put it; never as something else. A failed write may have written
//! any part of its range.
//!
//! **Flush.** When [`Request::flush`] (or [`Device::flush`]) completes, every request is durable whose
//! completion was *taken* before the flush was submitted, on any queue of the device. What was still in flight
//! then may be or may not. [`Request::fua`] makes one write durable by its own completion. There is no mode in
//! which a flush is not durable.
//!
//! **A failed sync** is never retried as if nothing had happened: what is on disk is not known after it. From
//! then on writes and flushes fail ([`EngineError::SyncFailed`], then [`EngineError::Poisoned`]), reads work, and the image keeps what marks it
//! for repair. Open it again to go on.
//!
//! **No space.** [`Error::is_out_of_space`] tells it: nothing was changed, the device goes on, and the same request
//! may succeed once there is space (QEMU's `werror=enospc` pauses the guest meanwhile).
//!
//! **No memory.** What an image or a request decides the size of is asked for by calls that can fail; the request
//! fails with [`EngineError::OutOfMemory`] then, and nothing else does. What is small cannot fail in Rust, but for a process
//! that makes [`ReservingAllocator`] its global allocator and calls [`hold_reserve`]: some address space is kept back for
//! it, and [`memory_is_short`] says when to take no more requests. The `urus` program does so.
//!
//! **Discard** is a hint. Whole clusters in the range are given back to the image and to the host's file
//! system, and read as zeroes then; the rest of the range keeps its content. Where reading zeroes cannot be
//! recorded (version 2 with a backing file), and with [`DiscardPolicy::Ignore`], it succeeds and does nothing.
//!
//! **Write zeroes** is no hint: the range reads as zeroes afterwards, all of it. Allocated clusters stay
//! allocated, so that a later write needs no space, unless [`Request::unmap`] lets them go.
//!
//! **Resize** ([`Device::resize`]) grows the disk; new space reads as zeroes, even where a backing file is
//! longer. Requests that arrive meanwhile wait for it, and are judged by the new size. An open device does not
//! shrink.
//!
//! **Pause** ([`Device::pause`]) holds new requests, waits for those in flight and makes everything durable:
//! the image on disk is complete then. It can let go of the image locks, so that another process takes the
//! image over; [`Device::resume`] takes them again, re-reads the metadata and starts what has waited.
//!
//! **Close and drop.** [`Device::close`] waits for the requests in flight, makes everything durable, lets go of
//! the locks and says whether that worked. Dropping the last handle does the same and can only log an error;
//! queues and seats are handles. Dropping a queue waits for its requests. After a kill the image is as whole as
//! after a power cut: no repair is needed to open it, at most some clusters are leaked
//! ([`OpenOptions::count_leaks`], [`OpenOptions::repair`]).
//!
//! **Errors and panics.** Whatever an image, a guest or the kernel does ends in an [`Error`] that names the
//! file, the table and what to do. Panics are for errors in the calling program: a buffer's range out of its
//! bounds, a thread that panicked while it held the caller's own state.
//!
//! # Formats
//! Raw, and QCOW2 versions 2 and 3 (QEMU's `docs/interop/qcow2`): all cluster sizes (section "Header",
//! `cluster_bits` 9 to 21), all refcount widths, zlib and zstd clusters (read; written over by copy), backing
//! chains, zero clusters, internal snapshots (kept intact, section "Snapshots"), lazy refcounts, unknown header
//! extensions (kept). A dirty image is repaired when it is opened for writing, a corrupt one can only be read.
//! Refused with an error that names the feature: encryption, external data files, extended L2 entries, unknown
//! incompatible features; and for writing, images with persistent bitmaps. [`info()`] shows those too, and
//! [`check()`] checks and repairs an image that nobody has open.
//!
//! # Images from strangers
//! An image can name any file of the host as its backing file, and a guest can write any bytes onto its disk.
//! So the format of a file is always stated or recorded, never guessed; and backing files are opened only
//! beneath the directory of the image that names them, unless [`BackingPolicy`] says otherwise. Names with a
//! protocol (`json:`, `nbd:`, `fd:`) are refused, chains have at most 64 layers, no file occurs in one twice.
//! Every field and table entry is checked before use; memory follows what the file holds and not what it
//! claims. For stricter needs, open descriptors elsewhere and pass them: [`OpenOptions::open_fds`].
//!
//! # Locks
//! Images are locked as QEMU locks them (OFD locks on bytes 100 to 104 and 200 to 204): one writer, or several
//! readers; backing files for reading. [`Error::InUse`] says who is in the way. [`OpenOptions::lock`] turns it
//! off.
//!
//! # Threads
//! A device has one thread of its own, `urus-maint`, for allocation, commits and punching, so that shared work
//! goes on whether or not any queue is polled. Decoding compressed clusters happens on a pool that all devices
//! of the process share, started when first needed. A queue works on its caller's thread. No signal handlers
//! (but of SIGBUS, from the first `Guard` of a virtual machine's memory on), no process-wide state but that pool.
//!
//! # Kernel
//! Linux 5.6 or later (`openat2`), on 64-bit machines. io_uring needs 5.13; newer kernels make it faster (5.19,
//! 6.1, 6.6). Where it is missing or forbidden (seccomp, the `io_uring_disabled` sysctl) plain system calls do
//! the same work on the queue's thread: this is logged as a warning, and [`Device::driver`] tells.
//! [`IoDriver::IoUring`] makes it an error. Only recent kernels are tested.
//!
//! For a seccomp filter. To open: `openat`, `openat2`, `close`, `fcntl`, `fstat`, `newfstatat`, `statx`,
//! `fstatfs`, `lseek`, `readlink`, `ioctl` (BLKSSZGET), `pread64`. With io_uring: `io_uring_setup`,
//! `io_uring_register`, `io_uring_enter`, `eventfd2`, `read`, `write`, `ppoll`. Without: `preadv`, `pwritev`,
//! `pwritev2`, `pread64`, `pwrite64`, `fallocate`, `fdatasync`, `ftruncate`, `eventfd2`, `read`, `write`,
//! `ppoll`. And what Rust's threads and memory take: `mmap`, `munmap`, `mprotect`, `madvise`, `brk`, `clone3`,
//! `futex`, `rseq`, `set_robust_list`, `sigaltstack`, `rt_sigprocmask`, `sched_getaffinity`, `prctl`, `gettid`,
//! `exit`.
#![forbid(unsafe_code)]

mod blocking;
mod chain;
mod check;
mod create;
mod device;
mod error;
mod foreign;
mod info;
mod limits;
mod options;
mod place;
mod queue;
mod request;
mod sockets;
mod statistics;
mod temporary;

pub use blocking::BlockingIo;
pub use check::{CheckOptions, check, check_with};
pub use create::{CreateOptions, create};
pub use device::{Device, Layer, PauseOptions, Prepared};
pub use error::{Error, Result};
pub use info::{
    BackingInfo, BitmapInfo, Encryption, ImageInfo, InfoOptions, Qcow2Info, SnapshotInfo, info,
};
pub use limits::MAX_QUEUE_DEPTH;
pub use options::{BackingPolicy, CacheMode, DiscardPolicy, Format, IoDriver, OpenOptions};
pub use queue::{Queue, QueueSeat};
pub use request::{Completion, Rejected, Request};
pub use sockets::Sockets;
pub use statistics::{Histogram, OperationStatistics, QueueStatistics, Statistics};
pub use urus_engine::Counters;
pub use urus_engine::check::{CheckReport, Finding, Repair, Severity};
pub use urus_engine::error::Error as EngineError;
#[doc(hidden)]
pub use urus_engine::file::hooks;
pub use urus_engine::request::Extent;
pub use urus_format::Compression;
pub use urus_format::foreign::ForeignFormat;
#[cfg(feature = "vm-memory")]
pub use urus_ring::OutsideGuestMemory;
pub use urus_ring::{BUFFER_ALIGNMENT, Buffer, MemoryRegion, Parts, SocketCompletion};
#[cfg(feature = "vm-memory")]
pub use urus_ring::{Guard, faults};
pub use urus_ring::{
    RESERVE_BYTES, ReservingAllocator, hold_reserve, may_fail, memory_is_short, shortages,
};
