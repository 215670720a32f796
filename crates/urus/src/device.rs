//! An open image, and the thread that looks after its metadata.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use urus_format::Header;
use urus_ring::{Driver, DriverKind, FileSet, LockMode};

use crate::chain::{self, ChainFile};
use crate::statistics::{Place, Places};
use crate::{
    BlockingIo, CheckReport, Counters, DiscardPolicy, Error, Format, IoDriver, OpenOptions,
    QueueSeat, Result, Statistics, limits,
};
use urus_engine::{Control, ControlReply, LayerSpec, Maintenance, Options, Shared};

/// An open image: cheap to clone, usable from every thread. Requests go through [`Queue`](crate::Queue)s.
///
/// The last handle closes it on drop (queues and seats are handles too): see [`close`](Self::close).
#[derive(Clone)]
pub struct Device {
    core: Arc<Core>,
}

/// A layer of the chain that makes up a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layer {
    /// The file; for a descriptor what `/proc` says of it.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its own virtual size in bytes, when it was opened.
    pub size: u64,
}

/// What [`Device::pause`] does besides draining and committing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PauseOptions {
    /// Also let go of the image locks, so that another process can take the image over (migration).
    pub release_locks: bool,
}

impl PauseOptions {
    /// Keep the locks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Also let go of the image locks, so that another process can take the image over (migration).
    #[must_use]
    pub fn release_locks(mut self, release: bool) -> Self {
        self.release_locks = release;
        self
    }
}

/// What all handles share.
struct Core {
    shared: Arc<Shared>,
    files: Arc<FileSet>,
    layers: Vec<Layer>,
    /// The header as it was, for raw `None`: what must not change while somebody else has the image.
    header: Option<Box<Header>>,
    name: String,
    /// What was asked for, for the drivers of queues.
    asked: DriverKind,
    /// What the maintenance thread got.
    driver: DriverKind,
    queue_depth: u32,
    latencies: bool,
    uses_locks: bool,
    /// Whether write-zeroes with unmap gives clusters back.
    unmaps: bool,
    /// Held while it changes, so that pause, resume, resize and close come one after the other.
    state: Mutex<State>,
    /// Set once `state` is `Closed`: for those who must not wait for a change of state.
    closed: AtomicBool,
    /// Set while `state` is `Paused`, for the same.
    paused: AtomicBool,
    places: Arc<Places>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Who wants to know of another size.
    on_resize: Mutex<Vec<OnResize>>,
}

type OnResize = Box<dyn Fn() + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Paused { locks_released: bool },
    Closed,
}

/// An image whose files are open and locked, and whose headers are read, before any thread runs: where a process that will need
/// no other file can give up the right to open one, by means that only threads started later inherit (Landlock). Made by
/// [`OpenOptions::prepare`].
///
/// Dropping it closes the files; nothing has been changed.
pub struct Prepared {
    options: OpenOptions,
    chain: Vec<ChainFile>,
}

impl Prepared {
    pub(crate) fn open(options: &OpenOptions, path: &Path) -> Result<Self> {
        options.check()?;
        Ok(Self {
            options: options.clone(),
            chain: chain::open_path(options, path)?,
        })
    }

    pub(crate) fn open_fds(
        options: &OpenOptions,
        image: OwnedFd,
        backing: Vec<OwnedFd>,
    ) -> Result<Self> {
        options.check()?;
        Ok(Self {
            options: options.clone(),
            chain: chain::open_fds(options, image, backing)?,
        })
    }

    /// The rest of opening: starts the device's thread and repairs a dirty image unless it is opened read-only. Blocks on I/O.
    /// Opens no file.
    ///
    /// # Errors
    /// As [`OpenOptions::open`].
    pub fn start(self) -> Result<Device> {
        Device::start(&self.options, self.chain)
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("image", &self.chain[0].path)
            .field("layers", &self.chain.len())
            .finish_non_exhaustive()
    }
}

impl Device {
    /// Starts the maintenance thread over an open chain.
    fn start(options: &OpenOptions, chain: Vec<ChainFile>) -> Result<Self> {
        let layers = chain
            .iter()
            .map(ChainFile::describe)
            .collect::<Result<Vec<_>>>()?;
        let header = chain[0].header.clone();
        let name = options
            .name
            .clone()
            .unwrap_or_else(|| layers[0].path.display().to_string());
        let (files, specs): (Vec<_>, Vec<_>) = chain
            .into_iter()
            .enumerate()
            .map(|(index, file)| {
                let name = if index == 0 {
                    name.clone()
                } else {
                    file.path.display().to_string()
                };
                file.into_parts(index, name)
            })
            .unzip();
        let files = FileSet::new(files);
        let asked = match options.io {
            IoDriver::Auto => DriverKind::Auto,
            IoDriver::IoUring => DriverKind::IoUring,
            IoDriver::Blocking => DriverKind::Blocking,
        };
        let (thread, started) = spawn_maintenance(
            &layers[0].path,
            &files,
            asked,
            specs,
            engine_options(options),
        )?;
        let device = Self {
            core: Arc::new(Core {
                shared: started.shared,
                files,
                layers,
                header,
                name,
                asked,
                driver: started.driver,
                queue_depth: options.queue_depth,
                latencies: options.latencies,
                uses_locks: options.lock,
                unmaps: options.discard == DiscardPolicy::Unmap,
                state: Mutex::new(State::Running),
                closed: AtomicBool::new(false),
                paused: AtomicBool::new(false),
                places: Arc::default(),
                thread: Mutex::new(Some(thread)),
                on_resize: Mutex::default(),
            }),
        };
        tracing::info!(
            image = device.name(),
            size_bytes = device.size(),
            format = %device.format(),
            layers = device.layers().len(),
            driver = device.driver(),
            read_only = device.read_only(),
            "opened"
        );
        Ok(device)
    }

    /// Size of the virtual disk in bytes. Changes with [`resize`](Self::resize).
    #[must_use]
    pub fn size(&self) -> u64 {
        self.core.shared.size()
    }

    /// The block size to tell a guest, in bytes: 512, or 4096 where smaller writes would cost a read first.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.alignment().max(512)
    }

    /// Requests whose offset, length and memory are multiples of this (bytes) are served without copying. Any
    /// other is taken too.
    #[must_use]
    pub fn alignment(&self) -> u32 {
        self.core.files.file(chain::IMAGE).properties().alignment
    }

    /// Whether everything that changes the disk is refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.core.shared.read_only()
    }

    /// Bytes of a cluster: the unit in which space is allocated and given back. None for raw.
    #[must_use]
    pub fn cluster_bytes(&self) -> Option<u64> {
        self.core
            .shared
            .geometry()
            .map(|geometry| geometry.cluster_bytes())
    }

    /// Whether zeroes in that range (bytes) are sure to be a matter of metadata, or of one call to the file system: of
    /// whole clusters, in a format that can say so. [`Request::write_zeroes`](crate::Request::write_zeroes) writes
    /// zeroes as data where it has to. `unmap` as in [`Request::unmap`](crate::Request::unmap).
    #[must_use]
    pub fn zeroes_fast(&self, offset: u64, len: u64, unmap: bool) -> bool {
        let unmap = unmap && self.core.unmaps;
        let Some(geometry) = self.core.shared.geometry() else {
            let file = self.core.files.file(chain::IMAGE).properties();
            return file.can_zero_range || (unmap && file.can_punch);
        };
        let backed = self.layers().len() > 1;
        if !geometry.has_zero_flag() && (backed || !unmap) {
            return false;
        }
        let whole = |at: u64| at.is_multiple_of(geometry.cluster_bytes());
        let end = offset.saturating_add(len);
        whole(offset) && (whole(end) || end == self.size())
    }

    /// Whether [`pause`](Self::pause) holds requests at this moment. Does not wait for a change under way.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.core.paused.load(Ordering::SeqCst)
    }

    /// What logs and errors call the device.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// The format of the image itself.
    #[must_use]
    pub fn format(&self) -> Format {
        self.layers()[0].format
    }

    /// What does the I/O: "io_uring" or "blocking".
    #[must_use]
    pub fn driver(&self) -> &'static str {
        driver_name(self.core.driver)
    }

    /// The chain: the image itself, then its backing files, nearest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.core.layers
    }

    /// What a check at opening has found and repaired ([`OpenOptions::repair`], [`OpenOptions::count_leaks`]). None where none was made.
    #[must_use]
    pub fn found_at_opening(&self) -> Option<CheckReport> {
        self.core.shared.found_at_opening()
    }

    /// The files of the chain that have no name any more, the image first: they were deleted while they were open, or replaced by
    /// others, and what they hold is gone when the device is closed. Answers after that too.
    #[must_use]
    pub fn deleted_files(&self) -> Vec<&Path> {
        let layers = self.core.files.iter().zip(self.layers());
        layers
            .filter(|(file, _)| file.is_deleted())
            .map(|(_, layer)| layer.path.as_path())
            .collect()
    }

    /// Counters of the device at this moment, for metrics. They only grow.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.core.shared.counters()
    }

    /// What the device and its queues have done, and how it stands. Cheap, and never waits for I/O: may be asked from any thread
    /// while queues work. Each number is exact; they are not all of the same moment.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        Statistics {
            counters: self.counters(),
            queues: self.core.places.read(),
            size: self.size(),
            chain_depth: self.layers().len(),
            driver: self.driver(),
            read_only: self.read_only(),
            paused: self.is_paused(),
            poisoned: self.core.shared.is_poisoned(),
        }
    }

    /// A seat for one more queue, to be sent to the thread that will use it.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`close`](Self::close).
    pub fn queue(&self) -> Result<QueueSeat> {
        self.core.check_open()?;
        Ok(QueueSeat::new(self.clone()))
    }

    /// Plain reads and writes for tools and tests, over a queue of the calling thread.
    ///
    /// # Errors
    /// As [`queue`](Self::queue) and [`QueueSeat::activate`].
    pub fn blocking(&self) -> Result<BlockingIo> {
        Ok(BlockingIo::new(self.queue()?.activate()?))
    }

    /// Makes everything durable whose completion was seen before, on any queue. Blocks: a thread with requests
    /// in flight on a queue of its own submits [`Request::flush`](crate::Request::flush) there instead.
    ///
    /// # Errors
    /// As a flush request: after one has failed, nothing is written any more.
    pub fn flush(&self) -> Result<()> {
        self.core.check_open()?;
        self.core.ask(Control::Flush)
    }

    /// Holds new requests, waits for those in flight on every queue, and makes everything durable; then the
    /// image on disk is complete, and can be copied or opened elsewhere read-only. With
    /// [`PauseOptions::release_locks`] another process may write it until [`resume`](Self::resume). Requests
    /// submitted meanwhile wait.
    ///
    /// Blocks, and needs the queues to be polled: not to be called from a thread whose own queue has requests
    /// in flight. On a paused device it only adds the release of the locks.
    ///
    /// # Errors
    /// As [`flush`](Self::flush); the device is not paused then.
    pub fn pause(&self, options: PauseOptions) -> Result<()> {
        let mut state = self.core.state();
        let released = match *state {
            State::Closed => return Err(Error::Closed),
            State::Running => {
                if let Err(error) = self.core.ask(Control::Pause) {
                    // Requests are held already: let them go on. The first error is the one to tell.
                    let _ = self.core.ask(|reply| Control::Resume(None, reply));
                    return Err(error);
                }
                *state = State::Paused {
                    locks_released: false,
                };
                self.core.paused.store(true, Ordering::SeqCst);
                false
            }
            State::Paused { locks_released } => locks_released,
        };
        if options.release_locks && !released {
            self.core.unlock();
            *state = State::Paused {
                locks_released: true,
            };
        }
        tracing::info!(
            image = self.name(),
            release_locks = options.release_locks,
            "paused"
        );
        Ok(())
    }

    /// Goes on after [`pause`](Self::pause), with the requests that have waited. Where the locks were let go it
    /// takes them again and re-reads the image's metadata. Does nothing on a device that is not paused.
    ///
    /// # Errors
    /// [`Error::InUse`] when somebody else holds the image now; [`Error::Invalid`] when its header was changed
    /// in a way that needs it to be opened anew (another cluster size, another backing file). The device stays
    /// paused.
    pub fn resume(&self) -> Result<()> {
        let mut state = self.core.state();
        match *state {
            State::Closed => return Err(Error::Closed),
            State::Running => return Ok(()),
            State::Paused {
                locks_released: false,
            } => self.core.ask(|reply| Control::Resume(None, reply))?,
            State::Paused {
                locks_released: true,
            } => {
                let result = self.core.lock().and_then(|()| self.core.reread_header());
                let result =
                    result.and_then(|header| self.core.ask(|reply| Control::Resume(header, reply)));
                if let Err(error) = result {
                    self.core.unlock();
                    return Err(error);
                }
            }
        }
        *state = State::Running;
        self.core.paused.store(false, Ordering::SeqCst);
        tracing::info!(image = self.name(), "resumed");
        Ok(())
    }

    /// Changes the size of the virtual disk, in bytes; rounded up to whole sectors of 512. What is
    /// new reads as zeroes, also with a longer backing file. Durable on return. Blocks.
    ///
    /// # Errors
    /// What the format or the file cannot do; nothing has changed then.
    pub fn resize(&self, new_size: u64) -> Result<()> {
        let state = self.core.state();
        match *state {
            State::Closed => Err(Error::Closed),
            State::Paused { .. } => Err(Error::invalid(
                "a paused device cannot be resized: resume it first",
            )),
            State::Running => {
                self.core.ask(|reply| Control::Resize(new_size, reply))?;
                drop(state);
                for action in &*self.core.on_resize() {
                    action();
                }
                Ok(())
            }
        }
    }

    /// Calls `action` after each [`resize`](Self::resize), on the thread that does it: for transports, to tell their
    /// clients. It stays for the life of the device, so it should hold no handle of it.
    pub fn on_resize(&self, action: impl Fn() + Send + Sync + 'static) {
        self.core.on_resize().push(Box::new(action));
    }

    /// From now on a discard or write-zeroes that is under way ends at its next step, with [`Error::Closed`]; its range may
    /// be cleared in part. Before a [`close`](Self::close) that is not to wait for requests over terabytes.
    pub fn cut_clearing_short(&self) {
        self.core.shared.cut_clearing_short();
    }

    /// Ends the device: waits for the requests in flight on every queue, makes everything durable, clears the
    /// dirty bit, lets go of the locks, and says whether all that worked. Requests submitted afterwards fail
    /// with [`Error::Closed`]. Closing again does nothing. Dropping the last handle does the same, but can only
    /// log an error.
    ///
    /// Blocks, and needs the queues to be polled: not to be called from a thread whose own queue has requests
    /// in flight.
    ///
    /// # Errors
    /// What could not be made durable.
    pub fn close(&self) -> Result<()> {
        self.core.close()
    }

    /// A driver for a queue of the calling thread.
    pub(crate) fn open_driver(&self, sockets: bool) -> Result<Driver> {
        let core = &self.core;
        let open = if sockets {
            Driver::open_with_sockets
        } else {
            Driver::open
        };
        open(Arc::clone(&core.files), core.asked, core.queue_depth)
            .map_err(no_driver(core.asked, &core.layers[0].path))
    }

    pub(crate) fn take_place(&self) -> Place {
        self.core.places.take()
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.core.shared)
    }

    pub(crate) fn measures_latencies(&self) -> bool {
        self.core.latencies
    }

    pub(crate) fn queue_depth(&self) -> u32 {
        self.core.queue_depth
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name())
            .field("size", &self.size())
            .field("layers", &self.layers())
            .field("driver", &self.driver())
            .field("read_only", &self.read_only())
            .finish_non_exhaustive()
    }
}

impl Core {
    fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            Err(Error::Closed)
        } else {
            Ok(())
        }
    }

    fn on_resize(&self) -> MutexGuard<'_, Vec<OnResize>> {
        self.on_resize
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks something of the maintenance thread, and waits for the answer.
    fn ask(&self, control: impl FnOnce(ControlReply) -> Control) -> Result<()> {
        /// How often to see whether the thread that should answer is still there: another handle may close the
        /// device at this moment.
        const CHECK: Duration = Duration::from_secs(1);
        let (sender, receiver) = mpsc::sync_channel(1);
        let reply: ControlReply = Box::new(move |result| {
            let _ = sender.send(result);
        });
        self.shared.control(control(reply));
        loop {
            match receiver.recv_timeout(CHECK) {
                Ok(result) => return Ok(result?),
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Closed),
                Err(RecvTimeoutError::Timeout) => {
                    if self.thread().as_ref().is_none_or(JoinHandle::is_finished) {
                        return Err(Error::Closed);
                    }
                }
            }
        }
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) -> Result<()> {
        let mut state = self.state();
        if *state == State::Closed {
            return Ok(());
        }
        let result = self.ask(Control::Close);
        *state = State::Closed;
        self.closed.store(true, Ordering::SeqCst);
        self.paused.store(false, Ordering::SeqCst);
        let thread = self.thread().take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(image = self.name, "the maintenance thread has panicked");
        }
        self.unlock();
        match &result {
            Ok(()) => tracing::info!(image = self.name, "closed"),
            Err(error) => tracing::error!(image = self.name, %error, "closing has failed"),
        }
        result
    }

    /// Takes the image locks again, all or none.
    fn lock(&self) -> Result<()> {
        if !self.uses_locks {
            return Ok(());
        }
        for (index, (file, layer)) in self.files.iter().zip(&self.layers).enumerate() {
            let write = index == 0 && !self.shared.read_only();
            let mode = if write {
                LockMode::Write
            } else {
                LockMode::Read
            };
            if let Err(error) = file.lock(mode) {
                self.unlock();
                return Err(Error::lock(&layer.path)(error));
            }
        }
        Ok(())
    }

    fn unlock(&self) {
        if !self.uses_locks {
            return;
        }
        for file in self.files.iter() {
            if let Err(error) = file.unlock() {
                tracing::warn!(image = self.name, file = file.name(), %error, "cannot unlock");
            }
        }
    }

    /// The header as it is now, if nothing has changed in it that the open files and tables depend on.
    fn reread_header(&self) -> Result<Option<Box<Header>>> {
        let Some(old) = &self.header else {
            return Ok(None);
        };
        let path = &self.layers[0].path;
        let new = chain::read_header(self.files.file(chain::IMAGE), path)?;
        new.check_supported(!self.shared.read_only())
            .map_err(Error::format(path))?;
        let same = new.geometry() == old.geometry()
            && new.version == old.version
            && new.compression == old.compression
            && new.backing == old.backing;
        if !same {
            return Err(Error::invalid(format!(
                "{}: while the device was paused its cluster size, refcount width, version, compression type or \
                 backing file was changed; close it and open it again",
                path.display()
            )));
        }
        Ok(Some(Box::new(new)))
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // An error was logged; there is nobody left to tell.
        let _ = self.close();
    }
}

/// What the maintenance thread tells once it runs.
struct Started {
    shared: Arc<Shared>,
    driver: DriverKind,
}

/// Starts the thread that commits, allocates and punches for all queues. It opens the driver itself, since a
/// ring belongs to the thread that made it.
fn spawn_maintenance(
    path: &Path,
    files: &Arc<FileSet>,
    kind: DriverKind,
    layers: Vec<LayerSpec>,
    options: Options,
) -> Result<(JoinHandle<()>, Started)> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let files = Arc::clone(files);
    let path_there = path.to_owned();
    let work = move || {
        let opened = Driver::open(files, kind, limits::MAINTENANCE_DEPTH)
            .map_err(no_driver(kind, &path_there))
            .and_then(|driver| {
                let kind = driver.kind();
                let maintenance = Maintenance::open(driver, layers, options)?;
                Ok((
                    Started {
                        shared: maintenance.shared(),
                        driver: kind,
                    },
                    maintenance,
                ))
            });
        match opened {
            Ok((started, mut maintenance)) => {
                if sender.send(Ok(started)).is_ok() {
                    maintenance.run();
                }
            }
            Err(error) => {
                let _ = sender.send(Err(error));
            }
        }
    };
    let thread = thread::Builder::new()
        .name("urus-maint".into())
        .spawn(work)
        .map_err(Error::io("start a thread for", path))?;
    match receiver.recv() {
        Ok(Ok(started)) => Ok((thread, started)),
        Ok(Err(error)) => {
            let _ = thread.join();
            Err(error)
        }
        Err(_) => {
            let _ = thread.join();
            Err(Error::invalid(format!(
                "{}: opening has panicked; this is a bug of urus",
                path.display()
            )))
        }
    }
}

/// Why there is no driver; where only io_uring was asked for, with what is likely to stand in its way.
fn no_driver(asked: DriverKind, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let as_io = Error::io("set up the I/O driver for", path);
    move |error| {
        if asked != DriverKind::IoUring {
            return as_io(error);
        }
        let cause = urus_ring::explain_refusal(&error);
        as_io(io::Error::new(
            error.kind(),
            format!("io_uring is not available: {cause} ({error})"),
        ))
    }
}

#[allow(
    clippy::field_reassign_with_default,
    reason = "only while the stand-in is in this crate"
)]
fn engine_options(options: &OpenOptions) -> Options {
    let mut engine = Options::default();
    engine.read_only = options.read_only;
    engine.discard = options.discard == DiscardPolicy::Unmap;
    engine.repair = options.repair;
    engine.count_leaks = options.count_leaks;
    engine.hooks = options.hooks.clone();
    if let Some(bytes) = options.l2_cache_bytes {
        engine.l2_cache_bytes = bytes;
    }
    engine
}

pub(crate) fn driver_name(kind: DriverKind) -> &'static str {
    match kind {
        DriverKind::IoUring => "io_uring",
        DriverKind::Blocking | DriverKind::Auto => "blocking",
    }
}
