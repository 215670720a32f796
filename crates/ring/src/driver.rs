//! The closed choice of drivers.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Once;
use std::time::Duration;

use io_uring::IoUring;
use urus_engine::storage::{
    Completion, FileExtent, FileId, FileProperties, Notify, Op, Slot, Storage,
};
use urus_engine::sync::Arc;

use crate::blocking::Blocking;
use crate::files::FileSet;
use crate::memory::{MemoryRegion, RingMemory};
use crate::refusal::explain_refusal;
use crate::sockets::Sockets;
use crate::uring::{Uring, setup};

/// The most operations a driver has in flight, whatever it is asked for.
pub const DEPTH_MAX: u32 = 16_384;

/// Which driver: to ask for, or in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverKind {
    /// io_uring where it works, else blocking system calls. Never the kind of an open driver.
    Auto,
    /// io_uring, or fail.
    IoUring,
    /// Blocking system calls.
    Blocking,
}

/// Does the I/O of one thread on the files of a device. Opened, used and dropped on that thread: not `Send`.
///
/// Dropping it waits for what the kernel is still doing, since the memory belongs to the operations.
pub struct Driver(Inner);

// One per queue, so the size of the larger variant is not worth a pointer to chase.
#[allow(
    clippy::large_enum_variant,
    reason = "one per queue, and a box would cost the hit path"
)]
enum Inner {
    Uring(Uring),
    Blocking(Blocking),
}

/// Runs the same expression on whichever driver there is.
macro_rules! each {
    ($driver:expr, $inner:ident => $call:expr) => {
        match $driver {
            Inner::Uring($inner) => $call,
            Inner::Blocking($inner) => $call,
        }
    };
}

impl Driver {
    /// A driver for the calling thread, with up to `depth` operations in flight (1 to [`DEPTH_MAX`], clamped).
    ///
    /// [`DriverKind::Auto`] falls back to blocking system calls where io_uring is missing (Linux before 5.13) or
    /// forbidden (seccomp, the `io_uring_disabled` sysctl), and says why once per process as a warning.
    ///
    /// # Errors
    /// As eventfd(2) and, for [`DriverKind::IoUring`], io_uring_setup(2).
    pub fn open(files: Arc<FileSet>, kind: DriverKind, depth: u32) -> io::Result<Self> {
        Self::open_with(files, kind, depth, false, setup::build)
    }

    /// As [`open`](Self::open), for a thread that serves sockets as well: with io_uring there are [`sockets`](Self::sockets).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with_sockets(
        files: Arc<FileSet>,
        kind: DriverKind,
        depth: u32,
    ) -> io::Result<Self> {
        Self::open_with(files, kind, depth, true, setup::build)
    }

    /// Where the ring does the work on sockets too; none without a ring, and for a driver that was opened without them, whose ring
    /// refuses such work.
    #[must_use]
    pub fn sockets(&mut self) -> Option<Sockets<'_>> {
        match &mut self.0 {
            Inner::Uring(uring) if uring.serves_sockets() => Some(Sockets(uring)),
            _ => None,
        }
    }

    /// As [`open`](Self::open), with the making of the ring as a parameter, so that tests can refuse it.
    fn open_with(
        files: Arc<FileSet>,
        kind: DriverKind,
        depth: u32,
        sockets: bool,
        build: fn(u32) -> io::Result<IoUring>,
    ) -> io::Result<Self> {
        let depth = depth.clamp(1, DEPTH_MAX);
        let blocking = |files| {
            Blocking::open(files, usize::try_from(depth).expect("fits"))
                .map(Inner::Blocking)
                .map(Self)
        };
        match kind {
            DriverKind::Blocking => blocking(files),
            DriverKind::IoUring => Uring::open(files, depth, sockets, build)
                .map(Inner::Uring)
                .map(Self),
            DriverKind::Auto => match Uring::open(Arc::clone(&files), depth, sockets, build) {
                Ok(uring) => Ok(Self(Inner::Uring(uring))),
                Err(error) => {
                    warn_once(&error);
                    blocking(files)
                }
            },
        }
    }

    /// The kind in use: never [`DriverKind::Auto`].
    #[must_use]
    pub fn kind(&self) -> DriverKind {
        match self.0 {
            Inner::Uring(_) => DriverKind::IoUring,
            Inner::Blocking(_) => DriverKind::Blocking,
        }
    }

    /// Registers memory with the ring in place of what was registered before: reads and writes that lie in it cost the kernel less. None lets
    /// go of it. Blocking system calls have no use for it, and take it as done.
    ///
    /// # Errors
    /// As io_uring_register(2): as a rule RLIMIT_MEMLOCK is too low (ENOMEM). Nothing is registered then, and everything works as before.
    pub fn register_memory(&mut self, regions: Vec<MemoryRegion>) -> io::Result<()> {
        match &mut self.0 {
            Inner::Uring(uring) => uring.register_memory(regions),
            Inner::Blocking(_) => Ok(()),
        }
    }

    /// An eventfd that becomes readable when completions are ready or the notifier was used, for an event loop of the
    /// caller's. Readable once after the first call.
    ///
    /// When it is: [`consume_event`](Self::consume_event), then [`complete`](Storage::complete) until it returns
    /// `None`, then [`kick`](Storage::kick) what was submitted meanwhile, then sleep. What is left uncompleted is not
    /// announced again.
    ///
    /// # Errors
    /// As eventfd(2) or io_uring_register(2), on the first call.
    pub fn event_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        match &mut self.0 {
            Inner::Uring(uring) => uring.event_fd(),
            Inner::Blocking(blocking) => Ok(blocking.event_fd()),
        }
    }

    /// Makes the eventfd unreadable and takes note of notifications so far, as [`wait`](Storage::wait) would.
    pub fn consume_event(&mut self) {
        each!(&mut self.0, inner => inner.consume_event());
    }

    /// The files it works on.
    #[must_use]
    pub fn files(&self) -> &FileSet {
        each!(&self.0, inner => inner.files())
    }
}

fn warn_once(error: &io::Error) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        let cause = explain_refusal(error);
        tracing::warn!(
            %error,
            "io_uring is not available: {cause}. Falling back to blocking system calls, which are slower"
        );
    });
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}

impl Storage for Driver {
    type Memory = RingMemory;

    fn allocate(&self, bytes: usize) -> Option<RingMemory> {
        RingMemory::try_new(bytes)
    }

    #[inline]
    fn submit(&mut self, op: Op<RingMemory>, slot: Slot) -> Result<(), Op<RingMemory>> {
        each!(&mut self.0, inner => inner.submit(op, slot))
    }

    #[inline]
    fn read_now(&mut self, file: FileId, offset: u64, memory: &RingMemory) -> bool {
        match &mut self.0 {
            Inner::Uring(uring) => uring.read_now(file, offset, memory),
            // Its calls wait.
            Inner::Blocking(_) => false,
        }
    }

    #[inline]
    fn kick(&mut self) {
        each!(&mut self.0, inner => inner.kick());
    }

    #[inline]
    fn complete(&mut self) -> Option<Completion> {
        each!(&mut self.0, inner => inner.complete())
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        each!(&mut self.0, inner => inner.wait(timeout));
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        each!(&self.0, inner => Arc::clone(inner.bell()) as Arc<dyn Notify>)
    }

    fn properties(&self, file: FileId) -> FileProperties {
        self.files().file(file).properties()
    }

    fn extent(&self, file: FileId, offset: u64, len: u64) -> FileExtent {
        self.files().file(file).extent(offset, len)
    }

    fn file_len(&self, file: FileId) -> io::Result<u64> {
        self.files().file(file).file_len()
    }
}

#[cfg(test)]
mod tests {
    //! Guards the automatic choice: a kernel that refuses the ring must cost speed, not the device.
    use super::*;

    #[test]
    fn auto_falls_back_where_the_kernel_refuses() {
        let refuse: fn(u32) -> io::Result<IoUring> =
            |_| Err(io::Error::from_raw_os_error(libc::EPERM));
        let files = FileSet::new(Vec::new());
        let driver =
            Driver::open_with(Arc::clone(&files), DriverKind::Auto, 8, false, refuse).unwrap();
        assert_eq!(driver.kind(), DriverKind::Blocking);
        let error = Driver::open_with(Arc::clone(&files), DriverKind::IoUring, 8, false, refuse)
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        assert_eq!(
            Driver::open(files, DriverKind::Auto, 8).unwrap().kind(),
            DriverKind::IoUring
        );
    }

    /// Every rung of the ladder of flags, as an older kernel would have it: reads, waiting, waking, watching, leaving.
    #[test]
    fn rings_of_older_kernels_work() {
        use urus_engine::storage::{FileId, Memory, OpKind};
        let path = std::env::current_exe().unwrap();
        let builds: [fn(u32) -> io::Result<IoUring>; 4] = [
            |entries| setup::build_step(0, entries),
            |entries| setup::build_step(1, entries),
            |entries| setup::build_step(2, entries),
            |entries| setup::build_step(3, entries),
        ];
        for (step, build) in builds.into_iter().enumerate() {
            let file = crate::OpenFile::open_image(&path, true, true).unwrap();
            let mut driver = Driver::open_with(
                FileSet::new(vec![file]),
                DriverKind::IoUring,
                8,
                false,
                build,
            )
            .unwrap();
            for round in 0..200 {
                if round == 100 {
                    driver.event_fd().unwrap();
                }
                let memory = driver.allocate(8 * 4096).unwrap();
                for slot in 0..8 {
                    let memory = memory.slice(slot * 4096, 4096);
                    let kind = OpKind::Read {
                        offset: 4096 * (round % 20),
                        memory,
                    };
                    let file = FileId(0);
                    assert!(driver.submit(Op { file, kind }, slot).is_ok());
                }
                if round == 199 {
                    driver.kick();
                    break; // dropped with operations in flight
                }
                let mut done = 0;
                while done < 8 {
                    driver.kick();
                    while let Some(completion) = driver.complete() {
                        assert_eq!(completion.result.unwrap(), 4096);
                        done += 1;
                    }
                    if done < 8 {
                        driver.wait(Some(Duration::from_secs(20)));
                    }
                }
                let notifier = driver.notifier();
                let start = std::time::Instant::now();
                std::thread::spawn(move || notifier.notify())
                    .join()
                    .unwrap();
                driver.wait(None);
                assert!(start.elapsed() < Duration::from_secs(10), "step {step}");
            }
        }
    }

    /// The same for the work on sockets: sent, received, cancelled, left in flight.
    #[test]
    fn sockets_work_in_rings_of_older_kernels() {
        use crate::memory::Buffer;
        use crate::sockets::Parts;
        let builds: [fn(u32) -> io::Result<IoUring>; 4] = [
            |entries| setup::build_step(0, entries),
            |entries| setup::build_step(1, entries),
            |entries| setup::build_step(2, entries),
            |entries| setup::build_step(3, entries),
        ];
        let parts = |fill: u8| {
            let mut parts = Parts::new();
            let buffer = parts.own(Buffer::from_vec(vec![fill; 100]));
            parts.push(buffer, 0..100);
            parts
        };
        for build in builds {
            let files = FileSet::new(Vec::new());
            let mut driver = Driver::open_with(files, DriverKind::IoUring, 8, true, build).unwrap();
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            let sockets = [ours, theirs].map(|socket| {
                socket.set_nonblocking(true).unwrap();
                Arc::new(std::os::fd::OwnedFd::from(socket))
            });
            for fill in 0..100 {
                let [ours, theirs] = sockets.clone();
                let mut work = driver.sockets().unwrap();
                work.receive(1, Arc::clone(&theirs), parts(255));
                work.receive(2, Arc::clone(&ours), parts(255));
                driver.kick();
                driver.sockets().unwrap().send(3, ours, parts(fill));
                driver.sockets().unwrap().cancel(2);
                let mut seen = Vec::new();
                while seen.len() < 3 {
                    driver.wait(Some(Duration::from_secs(20)));
                    assert!(driver.complete().is_none());
                    while let Some(done) = driver.sockets().unwrap().completion() {
                        let canceled = done.token == 2;
                        assert_eq!(done.result.ok(), (!canceled).then_some(100));
                        let expected = if canceled { 255 } else { fill };
                        assert_eq!(done.parts.unwrap().to_bytes(), vec![expected; 100]);
                        seen.push(done.token);
                    }
                }
                seen.sort_unstable();
                assert_eq!(seen, [1, 2, 3]);
            }
            let [ours, _] = &sockets;
            let left = Arc::clone(ours);
            driver.sockets().unwrap().receive(4, left, parts(0));
            driver.kick();
            drop(driver);
            assert_eq!(Arc::strong_count(ours), 1);
        }
    }
}
