//! A virtual machine reduced to its disk: memory, one virtqueue, and the front end's side of the protocol, from the
//! vhost crate. It goes on when its connection ends, as a machine does.
#![allow(dead_code, reason = "each test takes what it needs")]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const SIZE: u16 = 64;
/// Requests at once: each has three descriptors and places of its own.
pub(crate) const SLOTS: u16 = 16;
pub(crate) const MEMORY: u64 = 4 << 20;
/// Where the front end says that it has the memory in its own address space.
const USER: u64 = 0x7f00_0000_0000;

const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
/// Bytes of data that a slot has room for.
pub(crate) const ROOM: u32 = 64 << 10;

pub(crate) const READ: u32 = 0;
pub(crate) const WRITE: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITABLE: u16 = 2;

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// What the machine's driver takes of what is offered.
pub(crate) const FEATURES: u64 = VERSION_1 | EVENT_IDX | PROTOCOL_FEATURES | 1 << 9 | 1 << 11;

pub(crate) struct Machine {
    file: OwnedFd,
    pub(crate) memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    avail: u16,
    used: u16,
    /// Slots whose request was not answered.
    pub(crate) outstanding: BTreeSet<u16>,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let file = memfd_create("machine", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, MEMORY).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap().into(), 0);
        let len = usize::try_from(MEMORY).unwrap();
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), len, Some(offset))])
                .unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            file,
            memory,
            kick: event(),
            call: event(),
            error: event(),
            avail: 0,
            used: 0,
            outstanding: BTreeSet::new(),
            inflight: None,
        }
    }

    /// Shortens the file behind the memory to so many bytes. The machine itself must not look beyond.
    pub(crate) fn shorten(&self, bytes: u64) {
        ftruncate(&self.file, bytes).unwrap();
    }

    /// Keeps the notes of requests in flight in this file, as a front end of ill will does: ours cannot be shortened.
    pub(crate) fn keep_notes_in(&mut self, file: File, bytes: u64) {
        self.inflight = Some((VhostUserInflight::new(bytes, 0, 1, SIZE), file));
    }

    /// Connects, and waits until somebody listens.
    pub(crate) fn connect(&self, socket: &Path) -> Frontend {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match std::os::unix::net::UnixStream::connect(socket) {
                Ok(stream) => return Frontend::from_stream(stream, 2),
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", socket.display()),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Tells a back end everything that it needs to work on the virtqueue.
    pub(crate) fn start(&mut self, front_end: &mut Frontend, features: u64, base: u16) {
        self.introduce(front_end, features);
        if let Some((_, file)) = &self.inflight {
            let (area, file) = (&self.inflight.as_ref().unwrap().0, file.as_raw_fd());
            front_end.set_inflight_fd(area, file).unwrap();
        } else {
            let wanted = VhostUserInflight::new(0, 0, 1, SIZE);
            let area = front_end.get_inflight_fd(&wanted).unwrap();
            front_end
                .set_inflight_fd(&area.0, area.1.as_raw_fd())
                .unwrap();
            self.inflight = Some(area);
        }
        self.start_queue(front_end, base);
    }

    pub(crate) fn introduce(&self, front_end: &mut Frontend, features: u64) {
        front_end.set_owner().unwrap();
        let offered = front_end.get_features().unwrap();
        assert_eq!(offered & features, features, "{offered:#x}");
        front_end.set_features(features).unwrap();
        let protocol = front_end.get_protocol_features().unwrap();
        let wanted = Protocol::MQ
            | Protocol::CONFIG
            | Protocol::INFLIGHT_SHMFD
            | Protocol::REPLY_ACK
            | Protocol::BACKEND_REQ
            | Protocol::RESET_DEVICE
            | Protocol::LOG_SHMFD
            | Protocol::CONFIGURE_MEM_SLOTS;
        assert_eq!(protocol, wanted);
        front_end.set_protocol_features(wanted).unwrap();
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front_end.set_mem_table(&[self.region()]).unwrap();
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub(crate) fn addresses(&self, log: bool) -> VringConfigData {
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: u32::from(log),
            desc_table_addr: USER + DESCRIPTORS,
            used_ring_addr: USER + USED,
            avail_ring_addr: USER + AVAIL,
            log_addr: log.then_some(USED),
        }
    }

    pub(crate) fn start_queue(&self, front_end: &mut Frontend, base: u16) {
        front_end.set_vring_num(0, SIZE).unwrap();
        front_end.set_vring_base(0, base).unwrap();
        front_end.set_vring_addr(0, &self.addresses(false)).unwrap();
        front_end.set_vring_call(0, &self.call).unwrap();
        front_end.set_vring_err(0, &self.error).unwrap();
        front_end.set_vring_kick(0, &self.kick).unwrap();
        front_end.set_vring_enable(0, true).unwrap();
    }

    /// Stops the virtqueue; where the back end would go on.
    pub(crate) fn stop(&self, front_end: &Frontend) -> u16 {
        u16::try_from(front_end.get_vring_base(0).unwrap()).unwrap()
    }

    pub(crate) fn data_at(&self, slot: u16) -> GuestAddress {
        GuestAddress(DATA + u64::from(slot) * u64::from(ROOM))
    }

    pub(crate) fn status_at(&self, slot: u16) -> GuestAddress {
        GuestAddress(HEADERS + u64::from(slot) * 64 + 32)
    }

    pub(crate) fn head(slot: u16) -> u16 {
        slot * 3
    }

    pub(crate) fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = DESCRIPTORS + u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory
            .write_obj([flags, next], GuestAddress(at + 12))
            .unwrap();
    }

    /// Writes a request of a slot into its descriptors.
    pub(crate) fn prepare(&mut self, slot: u16, kind: u32, sector: u64, len: u32) {
        let header = HEADERS + u64::from(slot) * 64;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(header))
            .unwrap();
        self.memory
            .write_obj(0xff_u8, self.status_at(slot))
            .unwrap();
        let head = Self::head(slot);
        let direction = if kind == WRITE { 0 } else { WRITABLE };
        self.descriptor(head, header, 16, NEXT, head + 1);
        self.descriptor(
            head + 1,
            self.data_at(slot).0,
            len,
            NEXT | direction,
            head + 2,
        );
        self.descriptor(head + 2, self.status_at(slot).0, 1, WRITABLE, 0);
    }

    /// Makes a slot's request available, without a kick.
    pub(crate) fn offer(&mut self, slot: u16) {
        assert!(self.outstanding.insert(slot), "slot {slot} is in use");
        self.offer_head(Self::head(slot));
    }

    pub(crate) fn offer_head(&mut self, head: u16) {
        let at = AVAIL + 4 + u64::from(self.avail % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        let order = std::sync::atomic::Ordering::SeqCst;
        self.memory
            .store(self.avail, GuestAddress(AVAIL + 2), order)
            .unwrap();
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Slots answered since this was last asked, each of which must have been outstanding.
    pub(crate) fn answered(&mut self) -> Vec<u16> {
        let order = std::sync::atomic::Ordering::SeqCst;
        let mut slots = Vec::new();
        loop {
            let index: u16 = self.memory.load(GuestAddress(USED + 2), order).unwrap();
            if self.used == index {
                return slots;
            }
            while self.used != index {
                let at = USED + 4 + u64::from(self.used % SIZE) * 8;
                let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
                let slot = u16::try_from(head / 3).unwrap();
                assert!(
                    self.outstanding.remove(&slot),
                    "slot {slot} was answered and did not ask"
                );
                slots.push(slot);
                self.used = self.used.wrapping_add(1);
            }
            // The next one is to be told. What came before this was seen is not, so the index is looked at again.
            let event = GuestAddress(AVAIL + 4 + u64::from(SIZE) * 2);
            self.memory.store(self.used, event, order).unwrap();
        }
    }

    /// Waits until every request was answered, by its call eventfd.
    pub(crate) fn settle(&mut self) -> Vec<u16> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut slots = self.answered();
        while !self.outstanding.is_empty() {
            assert!(
                Instant::now() < deadline,
                "no answer for {:?}",
                self.outstanding
            );
            if !wait(&self.call, Duration::from_millis(500)) {
                // Not told: it must not have been answered either.
                let late = self.answered();
                assert!(
                    late.is_empty() || wait(&self.call, Duration::from_secs(5)),
                    "answered without a call"
                );
                slots.extend(late);
                continue;
            }
            slots.extend(self.answered());
        }
        slots
    }

    pub(crate) fn status(&self, slot: u16) -> u8 {
        self.memory.read_obj(self.status_at(slot)).unwrap()
    }

    /// One request from beginning to end; its status.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        self.prepare(0, kind, sector, len);
        self.offer(0);
        self.kick();
        self.settle();
        self.status(0)
    }

    pub(crate) fn fill(&self, slot: u16, bytes: &[u8]) {
        self.memory.write_slice(bytes, self.data_at(slot)).unwrap();
    }

    pub(crate) fn data(&self, slot: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, self.data_at(slot))
            .unwrap();
        bytes
    }

    /// Whether the back end has said that the virtqueue is broken, within a while.
    pub(crate) fn is_broken(&self) -> bool {
        wait(&self.error, Duration::from_secs(20))
    }

    /// Whether the driver was told of something, within a while.
    pub(crate) fn is_called(&self) -> bool {
        wait(&self.call, Duration::from_secs(20))
    }

    pub(crate) fn config(&self, front_end: &mut Frontend, at: u32, len: u32) -> Vec<u8> {
        let buffer = vec![0; usize::try_from(len).unwrap()];
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = front_end.get_config(at, len, flags, &buffer).unwrap();
        bytes
    }

    pub(crate) fn capacity(&self, front_end: &mut Frontend) -> u64 {
        let bytes = self.config(front_end, 0, 8);
        u64::from_le_bytes(bytes.try_into().unwrap()) * 512
    }

    /// The virtqueue from its beginning, as a driver that starts anew has it.
    pub(crate) fn reset_queue(&mut self) {
        self.memory
            .write_slice(&[0; 0x3000], GuestAddress(0))
            .unwrap();
        (self.avail, self.used) = (0, 0);
        self.outstanding.clear();
        self.inflight = None;
        let _ = self.error.read();
    }
}

/// Waits for an eventfd, and takes what it has.
fn wait(event: &EventFd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if event.read().is_ok() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}
