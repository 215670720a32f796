//! An open image.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::{BlockingIo, Error, Format, OpenOptions, Queue, Result};

/// An open image: cheap to clone, usable from every thread. Requests go through [`Queue`]s.
///
/// The last handle (queues and seats are handles too) closes it on drop: see [`close`](Self::close).
#[derive(Clone, Debug)]
pub struct Device {}

/// A layer of the chain that makes up a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layer {
    /// The file; for a descriptor what `/proc` says of it.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its own virtual size in bytes.
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

impl Device {
    pub(crate) fn open(_options: &OpenOptions, _path: &Path) -> Result<Self> {
        Err(pending())
    }

    pub(crate) fn open_fds(
        _options: &OpenOptions,
        _image: OwnedFd,
        _backing: Vec<OwnedFd>,
    ) -> Result<Self> {
        Err(pending())
    }

    /// Size of the virtual disk in bytes, a multiple of 512. Changes with [`resize`](Self::resize).
    #[must_use]
    pub fn size(&self) -> u64 {
        0
    }

    /// The block size to tell a guest, in bytes: 512, or 4096 where smaller writes cost a read first.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        512
    }

    /// Requests whose offset, length and memory are multiples of this (bytes) are served without copying. Any
    /// other is taken too.
    #[must_use]
    pub fn alignment(&self) -> u32 {
        1
    }

    /// Whether everything that changes the disk is refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        true
    }

    /// Bytes of a cluster: the unit in which space is allocated and given back. None for raw.
    #[must_use]
    pub fn cluster_bytes(&self) -> Option<u64> {
        None
    }

    /// What logs and errors call the device.
    #[must_use]
    pub fn name(&self) -> &str {
        ""
    }

    /// The format of the image itself.
    #[must_use]
    pub fn format(&self) -> Format {
        Format::Raw
    }

    /// What does the I/O: "io_uring" or "blocking".
    #[must_use]
    pub fn driver(&self) -> &'static str {
        "blocking"
    }

    /// The chain: the image itself, then its backing files, nearest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &[]
    }

    /// A seat for one more queue, to be sent to the thread that will use it.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`close`](Self::close).
    pub fn queue(&self) -> Result<QueueSeat> {
        Ok(QueueSeat {
            device: self.clone(),
        })
    }

    /// Plain reads and writes for tools and tests, over a queue of the calling thread.
    ///
    /// # Errors
    /// As [`queue`](Self::queue) and [`QueueSeat::activate`].
    pub fn blocking(&self) -> Result<BlockingIo> {
        BlockingIo::new(self.queue()?.activate()?)
    }

    /// Makes everything durable whose completion was seen before, on any queue. Blocks.
    ///
    /// # Errors
    /// As a flush request: after one has failed, nothing is written any more.
    pub fn flush(&self) -> Result<()> {
        Err(pending())
    }

    /// Holds new requests, waits for those in flight, makes everything durable, and clears the dirty bit; can let go of
    /// the image locks. Requests submitted meanwhile wait for [`resume`](Self::resume). Blocks until then, so the thread that pauses
    /// must not be the one whose queue has requests in flight.
    ///
    /// # Errors
    /// As [`flush`](Self::flush). The device is not paused then.
    pub fn pause(&self, _options: PauseOptions) -> Result<()> {
        Err(pending())
    }

    /// Goes on after [`pause`](Self::pause): takes the locks again where they were let go, re-reads all metadata then, and starts the
    /// requests that have waited.
    ///
    /// # Errors
    /// [`Error::InUse`] when somebody else holds the image now; the device stays paused.
    pub fn resume(&self) -> Result<()> {
        Err(pending())
    }

    /// Changes the size of the virtual disk, in bytes. What is new reads as zeroes, also with a longer backing file. Durable on
    /// return. Blocks.
    ///
    /// # Errors
    /// What the format or the file cannot do; nothing has changed then.
    pub fn resize(&self, _new_size: u64) -> Result<()> {
        Err(pending())
    }

    /// Ends the device: drains all queues, makes everything durable, clears the dirty bit, lets go of the locks, and says whether all
    /// that worked. Requests submitted afterwards fail with [`Error::Closed`]. Closing again does nothing. Dropping the last
    /// handle does the same, but can only log an error.
    ///
    /// # Errors
    /// What could not be made durable.
    pub fn close(&self) -> Result<()> {
        Err(pending())
    }
}

/// A place for a queue on a device, not yet bound to a thread.
#[derive(Debug)]
pub struct QueueSeat {
    #[allow(dead_code, reason = "stand-in")]
    device: Device,
}

impl QueueSeat {
    /// The queue, bound to the calling thread: only that thread can use and drop it.
    ///
    /// # Errors
    /// What the kernel says when it gives no ring (memory, descriptors).
    pub fn activate(self) -> Result<Queue> {
        Err(pending())
    }
}

pub(crate) fn pending() -> Error {
    Error::Engine(crate::pending::EngineError::Unsupported {
        what: "the engine has not landed yet".into(),
    })
}
