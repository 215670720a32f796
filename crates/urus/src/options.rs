//! How to open an image.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::hooks::Hooks;
use crate::{Device, Error, Prepared, Repair, Result, limits};

/// The format of an image file. Always stated, never guessed: a guest can write any bytes onto its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// QCOW2, version 2 or 3.
    Qcow2,
    /// The file's bytes are the disk.
    Raw,
}

impl Format {
    /// As qemu-img and image headers name it: "qcow2", "raw".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }

    /// The format of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            _ => None,
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the host's page cache lies between the device and the disk. A completed flush is durable in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheMode {
    /// Through the page cache.
    #[default]
    Writeback,
    /// Past the page cache (O_DIRECT). Where the file system's alignment is larger than a cluster, writeback is used
    /// and a warning logged.
    None,
}

/// What does the I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoDriver {
    /// io_uring where the kernel has it and lets us use it, else plain system calls; which one is logged, and
    /// told by [`Device::driver`].
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Plain system calls on a few threads.
    Blocking,
}

/// What a discard, or a write-zeroes with unmap, does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscardPolicy {
    /// Whole clusters are given back to the image and to the host's file system.
    #[default]
    Unmap,
    /// Discards do nothing and succeed; write-zeroes keeps clusters allocated.
    Ignore,
}

/// Which backing files may be opened. An image that comes from somebody else can name any file of the host, so
/// this is a matter of security.
///
/// Names are resolved by the kernel beneath the directory (`openat2`, RESOLVE_BENEATH and
/// RESOLVE_NO_MAGICLINKS): neither `..` nor a symbolic link leads out of it. A relative name is relative to the
/// directory of the image that names it, as in QEMU; an absolute name is allowed when it lies beneath the
/// directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackingPolicy {
    /// Only beneath the directory of the image that names it.
    #[default]
    Beneath,
    /// Only beneath this directory.
    Dir(PathBuf),
    /// None: an image with a backing file is refused.
    Forbid,
}

/// How to open an image: [`open`](Self::open) by path or [`open_fds`](Self::open_fds) by descriptors.
///
/// ```no_run
/// # fn main() -> Result<(), urus::Error> {
/// let device = urus::OpenOptions::new().read_only(true).open("disk.qcow2")?;
/// println!("{} bytes", device.size());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub(crate) read_only: bool,
    pub(crate) format: Format,
    pub(crate) backing_format: Option<Format>,
    pub(crate) cache: CacheMode,
    pub(crate) io: IoDriver,
    pub(crate) discard: DiscardPolicy,
    pub(crate) backing: BackingPolicy,
    pub(crate) l2_cache_bytes: Option<u64>,
    pub(crate) queue_depth: u32,
    pub(crate) lock: bool,
    pub(crate) latencies: bool,
    pub(crate) repair: Repair,
    pub(crate) count_leaks: bool,
    pub(crate) hooks: Hooks,
    pub(crate) name: Option<String>,
    pub(crate) snapshot: Option<PathBuf>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            format: Format::Qcow2,
            backing_format: None,
            cache: CacheMode::default(),
            io: IoDriver::default(),
            discard: DiscardPolicy::default(),
            backing: BackingPolicy::default(),
            l2_cache_bytes: None,
            queue_depth: limits::QUEUE_DEPTH,
            lock: true,
            latencies: false,
            repair: Repair::None,
            count_leaks: false,
            hooks: Hooks::default(),
            name: None,
            snapshot: None,
        }
    }
}

impl OpenOptions {
    /// Read-write, qcow2, backing files beneath the image's directory, locked, io_uring where it can be had.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuse everything that changes the disk, and open the image file read-only. Nothing is repaired then: a
    /// dirty image stays dirty.
    pub fn read_only(&mut self, read_only: bool) -> &mut Self {
        self.read_only = read_only;
        self
    }

    /// The format of the image (qcow2 unless stated). Never guessed.
    pub fn format(&mut self, format: Format) -> &mut Self {
        self.format = format;
        self
    }

    /// The format of backing files whose format no image records. A recorded format wins.
    pub fn backing_format(&mut self, format: Format) -> &mut Self {
        self.backing_format = Some(format);
        self
    }

    /// Through the host's page cache, or past it.
    pub fn cache(&mut self, cache: CacheMode) -> &mut Self {
        self.cache = cache;
        self
    }

    /// What does the I/O.
    pub fn io(&mut self, io: IoDriver) -> &mut Self {
        self.io = io;
        self
    }

    /// What discards do.
    pub fn discard(&mut self, discard: DiscardPolicy) -> &mut Self {
        self.discard = discard;
        self
    }

    /// Which backing files may be opened. Has no effect on [`open_fds`](Self::open_fds).
    pub fn backing(&mut self, backing: BackingPolicy) -> &mut Self {
        self.backing = backing;
        self
    }

    /// Memory for cached L2 tables, in bytes, of the whole device. The default (64 MiB) holds the map of 512
    /// GiB with clusters of 64 KiB.
    pub fn l2_cache_bytes(&mut self, bytes: u64) -> &mut Self {
        self.l2_cache_bytes = Some(bytes);
        self
    }

    /// Requests in flight per queue, 1 to [`MAX_QUEUE_DEPTH`](crate::MAX_QUEUE_DEPTH) (default 128).
    pub fn queue_depth(&mut self, depth: u32) -> &mut Self {
        self.queue_depth = depth;
        self
    }

    /// Take QEMU's image locks on every file of the chain (default), so that QEMU and urus keep each other off
    /// one image. Without them the caller sees to that.
    pub fn lock(&mut self, lock: bool) -> &mut Self {
        self.lock = lock;
        self
    }

    /// Measure how long requests take ([`OperationStatistics::latency`](crate::OperationStatistics::latency)). Off by default, because
    /// reading the clock costs some 3 % of a request that finds its data in the page cache, where requests come one at a time; it is
    /// nothing beside a disk or a socket.
    pub fn latencies(&mut self, measure: bool) -> &mut Self {
        self.latencies = measure;
        self
    }

    /// Leave the image as it is: it is opened read-only, and all writes go to a temporary overlay, a file without a name in
    /// `directory` that is gone when the device is closed, or the process is killed. The overlay takes as much space there as is
    /// written.
    pub fn snapshot(&mut self, directory: impl Into<PathBuf>) -> &mut Self {
        self.snapshot = Some(directory.into());
        self
    }

    /// Check the image at opening and repair what `repair` says, such as the clusters that a killed process has leaked:
    /// [`Device::found_at_opening`](crate::Device::found_at_opening) tells what was found. Reads all metadata. Nothing is repaired on an
    /// image that is opened read-only. By default only a dirty image is repaired.
    pub fn repair(&mut self, repair: Repair) -> &mut Self {
        self.repair = repair;
        self
    }

    /// Count leaked clusters at opening where that takes little: in images with up to 8 MiB of tables (64 GiB of data with clusters of
    /// 64 KiB). Off by default.
    pub fn count_leaks(&mut self, count: bool) -> &mut Self {
        self.count_leaks = count;
        self
    }

    /// What is done to the data of a qcow2 image on its way, and who is told of changes. Not part of what is promised yet: encryption and bitmaps
    /// come to stand on it.
    #[doc(hidden)]
    pub fn hooks(&mut self, hooks: Hooks) -> &mut Self {
        self.hooks = hooks;
        self
    }

    /// What logs and errors call the device. By default the path.
    pub fn name(&mut self, name: impl Into<String>) -> &mut Self {
        self.name = Some(name.into());
        self
    }

    /// Opens the image at `path`, and its backing files as [`backing`](Self::backing) allows.
    ///
    /// Blocks on I/O: reads the headers, and repairs a dirty image unless it is opened read-only.
    ///
    /// # Errors
    /// Whatever stands against it: see [`Error`]. Nothing is changed on disk then.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Device> {
        self.prepare(path)?.start()
    }

    /// The first half of [`open`](Self::open): opens and locks the files and reads the headers, and starts no thread. Between this and
    /// [`Prepared::start`] a process can confine itself.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn prepare(&self, path: impl AsRef<Path>) -> Result<Prepared> {
        Prepared::open(self, path.as_ref())
    }

    /// Opens the image behind a descriptor, with its backing files behind `backing`, nearest first: for a
    /// process that may not open files itself. The caller has chosen the files, so [`backing`](Self::backing)
    /// is not asked; formats and all other rules hold. `image` is open for reading and writing unless
    /// [`read_only`](Self::read_only).
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`Error::BackingCount`] unless there is exactly one descriptor per backing file.
    pub fn open_fds(&self, image: OwnedFd, backing: Vec<OwnedFd>) -> Result<Device> {
        Prepared::open_fds(self, image, backing)?.start()
    }

    /// Options that no image could satisfy.
    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=limits::MAX_QUEUE_DEPTH).contains(&self.queue_depth) {
            return Err(Error::invalid(format!(
                "a queue depth of {} is not possible: 1 to {} are",
                self.queue_depth,
                limits::MAX_QUEUE_DEPTH
            )));
        }
        Ok(())
    }
}
