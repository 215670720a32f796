//! A front end's messages: what they mean for the queues.
//!
//! One of these is made per connection. It knows what the front end has said, and starts a queue's thread on its
//! virtqueue once all is there: memory, size, addresses, a kick eventfd, enabled. Every change of a virtqueue that
//! runs is made by its own thread, and waited for.
//!
//! An error of ours is told as a failure in the reply, where the front end asked for one, and the connection goes on;
//! a message that breaks the protocol ends it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::{debug, info, warn};
use urus::Device;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::config::{Shape, WRITEBACK, bit, features, protocol_features};
use crate::dirty::DirtyLog;
use crate::inflight::{Area, Left, Notes};
use crate::limits;
use crate::memory::{Map, Place, Region};
use crate::ring::{Layout, Ring};
use crate::shared::Shared as SharedFile;
use crate::vring::{Logging, Shared, Shortened, Start};
use crate::worker::{Inbox, Message};

/// Where the parts of a virtqueue are in the front end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Addresses {
    descriptors: u64,
    avail: u64,
    used: u64,
    /// The guest's address of the used ring, when changes of it are to be logged.
    log: Option<u64>,
}

/// What the front end has said of a virtqueue.
#[derive(Debug, Default)]
struct Virtqueue {
    size: u16,
    addresses: Option<Addresses>,
    /// Index of the next available entry.
    base: u16,
    kick: Option<Arc<File>>,
    call: Option<File>,
    error: Option<File>,
    enabled: bool,
    running: bool,
}

/// What queues, front ends and the server share.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    pub(crate) device: Device,
    pub(crate) shared: Arc<Shared>,
    /// One per queue.
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    /// Completed writes need not survive this process.
    pub(crate) volatile_cache: bool,
    /// How long a front end may take until it has begun a session.
    pub(crate) introduction_time: Duration,
}

/// A front end, as far as it has introduced itself.
pub(crate) struct FrontEnd {
    core: Core,
    features: u64,
    map: Arc<Map>,
    virtqueues: Vec<Virtqueue>,
    inflight: Option<Arc<Area>>,
    log: Option<Arc<DirtyLog>>,
    /// The cache mode that the driver has set, where it can.
    writeback: bool,
    /// It has said something that only a front end in earnest says.
    begun: bool,
}

/// A failure that the front end is told of, and may live with.
fn refuse(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(why))
}

/// A failure of a request whose answer is no mere success or failure: nothing can be told but the end.
fn give_up(error: impl std::error::Error) -> Error {
    warn!(%error, "cannot do what the front end asks for");
    Error::InvalidParam
}

impl FrontEnd {
    pub(crate) fn new(core: Core) -> Self {
        let queues = core.inboxes.len();
        let mut front_end = Self {
            core,
            features: 0,
            map: Arc::default(),
            virtqueues: Vec::new(),
            inflight: None,
            log: None,
            writeback: true,
            begun: false,
        };
        front_end.virtqueues.resize_with(queues, Virtqueue::default);
        front_end.set_cache_mode();
        front_end
    }

    /// Whether it has begun a session, and may take its time from now on.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Whether the driver sees what the device says in this feature.
    fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    fn shape(&self) -> Shape {
        Shape {
            size: self.core.device.size(),
            cluster_bytes: self.core.device.cluster_bytes(),
            queues: u16::try_from(self.core.inboxes.len()).expect("a bounded number"),
            writeback: self.writeback,
        }
    }

    /// virtio 1.2, 5.2.6.2: what the field says where the driver knows it, else write-back if it can flush.
    ///
    /// With notes for a successor, the guest outlives this process and counts on writes that have completed, flushed or not.
    fn set_cache_mode(&self) {
        let outlived = self.inflight.is_some() && !self.core.volatile_cache;
        let write_through = if self.has(VIRTIO_BLK_F_CONFIG_WCE) {
            !self.writeback
        } else {
            !self.has(VIRTIO_BLK_F_FLUSH)
        };
        self.core.shared.outlived.store(outlived, Ordering::Relaxed);
        let was = self
            .core
            .shared
            .write_through
            .swap(write_through, Ordering::Relaxed);
        if write_through != was {
            debug!(write_through, "cache mode");
        }
    }

    fn virtqueue(&mut self, index: u32) -> Result<&mut Virtqueue> {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.virtqueues.get_mut(index))
            .ok_or(Error::InvalidParam)
    }

    /// Asks a queue's thread.
    fn ask(&self, index: usize, message: Message) -> Result<Option<u16>> {
        self.core.inboxes[index]
            .ask(message)
            .map_err(|_| Error::BackendInternalError)
    }

    /// Asks the threads of all virtqueues that run.
    fn ask_running(&self, message: impl Fn(&Virtqueue) -> Message) -> Result<()> {
        for (index, virtqueue) in self.virtqueues.iter().enumerate() {
            if virtqueue.running {
                self.ask(index, message(virtqueue))?;
            }
        }
        Ok(())
    }

    /// Starts a virtqueue if all is there.
    fn start(&mut self, index: usize) -> Result<()> {
        let virtqueue = &self.virtqueues[index];
        let (Some(addresses), Some(kick), true, false) = (
            virtqueue.addresses,
            &virtqueue.kick,
            virtqueue.enabled,
            virtqueue.running,
        ) else {
            return Ok(());
        };
        let kick = Arc::clone(kick);
        let (ring, notes, left) = self.ring(index, addresses)?;
        let copy = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        let start = Start {
            map: Arc::clone(&self.map),
            ring,
            kick,
            call: copy(&virtqueue.call).map_err(Error::ReqHandlerError)?,
            error: copy(&virtqueue.error).map_err(Error::ReqHandlerError)?,
            notes,
            left,
            logging: self.logging(virtqueue),
        };
        debug!(
            queue = index,
            next_avail = start.ring.next_avail(),
            left = start.left.len(),
            "starting a queue"
        );
        self.ask(index, Message::Start(Box::new(start)))?;
        self.virtqueues[index].running = true;
        Ok(())
    }

    /// The ring of a virtqueue, where to go on in it, and what an earlier back end has left to do.
    fn ring(&self, index: usize, addresses: Addresses) -> Result<(Ring, Option<Notes>, Vec<u16>)> {
        let virtqueue = &self.virtqueues[index];
        let guest = |user| {
            self.map
                .guest_address(user)
                .ok_or_else(|| refuse(format!("queue {index}: a ring lies outside the memory")))
        };
        if virtqueue.size == 0 {
            return Err(refuse(format!("queue {index} has no size")));
        }
        let layout = Layout {
            size: virtqueue.size,
            descriptors: guest(addresses.descriptors)?,
            avail: guest(addresses.avail)?,
            used: guest(addresses.used)?,
        };
        let used_index = layout
            .view(self.map.memory())
            .and_then(|view| view.used_index())
            .map_err(refuse)?;
        let mut next_avail = virtqueue.base;
        let mut notes = None;
        let mut heads = Vec::new();
        if let Some(area) = &self.inflight {
            let queue = u16::try_from(index).expect("a bounded number");
            let (opened, left) =
                Notes::open(Arc::clone(area), queue, layout.size, used_index).map_err(refuse)?;
            notes = Some(opened);
            let Left { heads: found, used } = left;
            if used {
                // What the front end remembers may be from before the end of the earlier back end.
                let taken = u16::try_from(found.len()).expect("no more than entries");
                next_avail = used_index.wrapping_add(taken);
            }
            if !found.is_empty() {
                info!(
                    queue = index,
                    requests = found.len(),
                    "doing again what an earlier back end has left"
                );
            }
            heads = found;
        }
        // Asked last: all of it was just looked at.
        if self.map.is_broken() || self.inflight.as_ref().is_some_and(|area| area.is_broken()) {
            return Err(refuse(format!("queue {index}: {Shortened}")));
        }
        let event_idx = self.has(VIRTIO_RING_F_EVENT_IDX);
        Ok((
            Ring::new(layout, next_avail, used_index, event_idx),
            notes,
            heads,
        ))
    }

    /// Stops a virtqueue if it runs: what was in flight has ended then.
    fn stop(&mut self, index: usize) -> Result<()> {
        if std::mem::take(&mut self.virtqueues[index].running)
            && let Some(next_avail) = self.ask(index, Message::Stop)?
        {
            self.virtqueues[index].base = next_avail;
        }
        Ok(())
    }

    /// Stops all virtqueues.
    pub(crate) fn stop_all(&mut self) -> Result<()> {
        for index in 0..self.virtqueues.len() {
            self.stop(index)?;
        }
        Ok(())
    }

    /// The log, if the front end has asked for logging.
    fn logging(&self, virtqueue: &Virtqueue) -> Logging {
        let on = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        Logging {
            log: self.log.clone().filter(|_| on),
            used: virtqueue.addresses.and_then(|addresses| addresses.log),
        }
    }

    fn set_map(&mut self, map: Map) -> Result<()> {
        self.map = Arc::new(map);
        self.ask_running(|_| Message::Map(Arc::clone(&self.map)))?;
        // Virtqueues may have waited for their memory. Those that still do are not this message's failure.
        for index in 0..self.virtqueues.len() {
            match self.start(index) {
                Err(Error::ReqHandlerError(error)) => debug!(queue = index, %error, "not yet"),
                result => result?,
            }
        }
        Ok(())
    }
}

fn place(region: &VhostUserMemoryRegion) -> Place {
    Place {
        guest: region.guest_phys_addr,
        bytes: region.memory_size,
        user: region.user_addr,
    }
}

/// Reading or writing an eventfd of the front end's must never wait.
fn unblocked(file: Option<File>) -> Result<Option<File>> {
    if let Some(file) = &file {
        // What does not know of it is no eventfd.
        rustix::io::ioctl_fionbio(file, true).map_err(refuse)?;
    }
    Ok(file)
}

impl VhostUserBackendReqHandlerMut for FrontEnd {
    fn set_owner(&mut self) -> Result<()> {
        self.begun = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all()?;
        for virtqueue in &mut self.virtqueues {
            *virtqueue = Virtqueue::default();
        }
        self.features = 0;
        self.inflight = None;
        self.log = None;
        self.writeback = true;
        self.set_cache_mode();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(features(self.core.device.read_only()))
    }

    fn set_features(&mut self, wanted: u64) -> Result<()> {
        let unknown = wanted & !features(self.core.device.read_only());
        if unknown != 0 {
            return Err(refuse(format!("features {unknown:#x} were not offered")));
        }
        self.begun = true;
        self.features = wanted;
        self.set_cache_mode();
        if wanted & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            // Without it there is no message to enable a virtqueue.
            for index in 0..self.virtqueues.len() {
                self.virtqueues[index].enabled = true;
            }
        }
        self.ask_running(|virtqueue| Message::Logging(self.logging(virtqueue)))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, wanted: u64) -> Result<()> {
        let unknown = wanted & !protocol_features().bits();
        if unknown != 0 {
            return Err(refuse(format!(
                "protocol features {unknown:#x} were not offered"
            )));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.core.inboxes.len() as u64)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(limits::MEMORY_SLOTS as u64)
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions = table
            .iter()
            .zip(files)
            .map(|(region, file)| Region::map(place(region), file, region.mmap_offset))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(refuse)?;
        self.set_map(Map::new(regions).map_err(refuse)?)?;
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let added = Region::map(place(region), file, region.mmap_offset).map_err(refuse)?;
        self.set_map(self.map.with(added).map_err(refuse)?)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.set_map(self.map.without(place(region)).map_err(refuse)?)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let virtqueue = self.virtqueue(index)?;
        let size = u16::try_from(num)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= limits::QUEUE_SIZE)
            .ok_or_else(|| refuse(format!("queue {index} of {num} entries")))?;
        if virtqueue.running && virtqueue.size != size {
            return Err(refuse(format!("queue {index} runs")));
        }
        virtqueue.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        avail: u64,
        log: u64,
    ) -> Result<()> {
        let logs = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        let new = Addresses {
            descriptors,
            avail,
            used,
            log: logs.then_some(log),
        };
        let virtqueue = self.virtqueue(index)?;
        let old = virtqueue.addresses.replace(new);
        if !virtqueue.running {
            let index = usize::try_from(index).expect("it has found a queue");
            return self.start(index);
        }
        let index = usize::try_from(index).expect("it has found a queue");
        let moved = old.is_none_or(|old| {
            Addresses {
                log: new.log,
                ..old
            } != new
        });
        if moved {
            self.stop(index)?;
            return self.start(index);
        }
        let logging = self.logging(&self.virtqueues[index]);
        self.ask(index, Message::Logging(logging)).map(|_| ())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let virtqueue = self.virtqueue(index)?;
        if virtqueue.running {
            return Err(refuse(format!("queue {index} runs")));
        }
        virtqueue.base =
            u16::try_from(base).map_err(|_| refuse(format!("queue {index} from entry {base}")))?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.virtqueue(index)?;
        let at = usize::try_from(index).expect("it has found a queue");
        self.stop(at)?;
        let virtqueue = &mut self.virtqueues[at];
        // It starts again with a new one.
        virtqueue.kick = None;
        Ok(VhostUserVringState::new(index, virtqueue.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.virtqueue(index.into())?;
        let at = usize::from(index);
        if self.virtqueues[at].running {
            self.stop(at)?;
        }
        if file.is_none() {
            warn!(
                queue = index,
                "a front end that does not kick is not served"
            );
        }
        self.virtqueues[at].kick = file.map(Arc::new);
        self.start(at)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = unblocked(file)?;
        let virtqueue = self.virtqueue(index.into())?;
        virtqueue.call = file;
        if virtqueue.running {
            let copy = virtqueue.call.as_ref().map(File::try_clone).transpose();
            let copy = copy.map_err(Error::ReqHandlerError)?;
            self.ask(index.into(), Message::Call(copy))?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = unblocked(file)?;
        let virtqueue = self.virtqueue(index.into())?;
        virtqueue.error = file;
        if virtqueue.running {
            let copy = virtqueue.error.as_ref().map(File::try_clone).transpose();
            let copy = copy.map_err(Error::ReqHandlerError)?;
            self.ask(index.into(), Message::Error(copy))?;
        }
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.virtqueue(index)?.enabled = enable;
        let index = usize::try_from(index).expect("it has found a queue");
        if enable {
            self.start(index)
        } else {
            self.stop(index)
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let small = |number| usize::try_from(number).map_err(|_| Error::InvalidParam);
        Ok(self.shape().read(small(offset)?, small(size)?))
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        let offset = usize::try_from(offset).map_err(|_| Error::InvalidParam)?;
        let mode = WRITEBACK
            .checked_sub(offset)
            .and_then(|at| bytes.get(at).copied());
        let writeback = match mode {
            Some(byte @ 0..=1) => byte == 1,
            _ => return Err(refuse("only the cache mode can be written")),
        };
        let turned_off = std::mem::replace(&mut self.writeback, writeback) && !writeback;
        self.set_cache_mode();
        if turned_off {
            // What was written before is to be as durable as what is written from now on.
            self.core.device.flush().map_err(refuse)?;
        }
        Ok(())
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        let (file, bytes) = Area::create(queues, size).map_err(give_up)?;
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight {
            mmap_size,
            mmap_offset,
            num_queues,
            queue_size,
        } = *given;
        let area = Area::open(file, mmap_offset, mmap_size, num_queues, queue_size);
        self.inflight = Some(Arc::new(area.map_err(refuse)?));
        self.set_cache_mode();
        Ok(())
    }

    fn set_log_base(&mut self, given: &VhostUserLog, file: File) -> Result<()> {
        let bits = SharedFile::map(file, given.mmap_offset, given.mmap_size).map_err(give_up)?;
        self.log = Some(Arc::new(DirtyLog::new(bits)));
        self.ask_running(|virtqueue| Message::Logging(self.logging(virtqueue)))
    }

    // What was not offered.

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shared_object(&mut self, _object: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidMessage)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidMessage)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidMessage)
    }
}
