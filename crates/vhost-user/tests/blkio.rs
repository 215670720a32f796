//! The back end as libblkio's client sees it, which others wrote and which needs no virtual machine.
//!
//! Guards against data in the wrong place: thousands of random operations on four queues, whole and scattered, against
//! a model; then the image by itself.

use std::mem::MaybeUninit;
use std::path::Path;

use blkio::{Blkio, BlkioStartOutcome, Blkioq, Completion, MemoryRegion, ReqFlags, iovec};
use urus::{CreateOptions, Device, OpenOptions, Repair};
use urus_vhost_user::{Listener, Server, Stats};

const SECTOR: u64 = 512;
const CLUSTER: u64 = 65_536;
const SIZE: u64 = 24 << 20;
const QUEUES: usize = 4;

/// A client that is connected and started.
struct Client {
    queues: Vec<Blkioq>,
    // Last: its memory is used by the queues.
    blkio: Blkio,
}

impl Client {
    fn connect(socket: &Path, read_only: bool, queues: usize) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", socket.to_str().unwrap()).unwrap();
        blkio.set_bool("read-only", read_only).unwrap();
        blkio.connect().unwrap();
        blkio
            .set_i32("num-queues", i32::try_from(queues).unwrap())
            .unwrap();
        let BlkioStartOutcome { queues, .. } = blkio.start().unwrap();
        Self { queues, blkio }
    }

    fn memory(&mut self, bytes: usize) -> MemoryRegion {
        let region = self.blkio.alloc_mem_region(bytes).unwrap();
        self.blkio.map_mem_region(&region).unwrap();
        region
    }

    /// Waits for `count` requests of a queue; their results.
    fn wait(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        let mut completions: Vec<MaybeUninit<Completion>> = Vec::new();
        completions.resize_with(count.max(1), MaybeUninit::uninit);
        let done = self.queues[queue]
            .do_io(&mut completions[..count], count, None, None)
            .unwrap();
        assert_eq!(done, count);
        let of = |one: &MaybeUninit<Completion>| {
            // SAFETY: `do_io` has filled as many as it says.
            let one = unsafe { one.assume_init_ref() };
            (one.user_data, one.ret)
        };
        completions[..count].iter().map(of).collect()
    }
}

/// xorshift64*, seeded.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

/// Copies into the memory. Each operation has a part of its own, touched before it is submitted and after it has
/// completed.
fn put(region: &MemoryRegion, start: usize, bytes: &[u8]) {
    assert!(start + bytes.len() <= region.len);
    // SAFETY: within the region, which is mapped as long as its client lives, and is no Rust object.
    unsafe {
        let to = (region.addr + start) as *mut u8;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
    }
}

fn get(region: &MemoryRegion, start: usize, len: usize) -> Vec<u8> {
    assert!(start + len <= region.len);
    let mut bytes = vec![0; len];
    // SAFETY: as in `put`.
    unsafe {
        let from = (region.addr + start) as *const u8;
        std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len);
    }
    bytes
}

/// Bytes of which no two sectors are the same.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let words = (0..len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(len).collect()
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write { fua: bool },
    Zeroes { unmap: bool },
    Discard,
    Flush,
}

/// An operation on a part of the disk that no other of its round touches.
#[derive(Clone, Copy, Debug)]
struct Operation {
    kind: Kind,
    offset: u64,
    len: usize,
    /// Its part of the memory.
    at: usize,
    scattered: bool,
}

const PART: usize = 256 << 10;

impl Operation {
    fn random(random: &mut Random, slot: u64, slots: u64) -> Self {
        let share = SIZE / slots / SECTOR;
        let start = random.below(share);
        let most = (share - start).min(PART as u64 / SECTOR);
        let mut len = 1 + random.below(most);
        if random.below(2) == 0 {
            len = len.min(8);
        }
        let kind = match random.below(20) {
            0..8 => Kind::Read,
            8..15 => Kind::Write {
                fua: random.below(8) == 0,
            },
            15 | 16 => Kind::Zeroes {
                unmap: random.below(2) == 0,
            },
            17 | 18 => Kind::Discard,
            _ => Kind::Flush,
        };
        Self {
            kind,
            offset: (slot * share + start) * SECTOR,
            len: usize::try_from(len * SECTOR).unwrap(),
            at: usize::try_from(slot).unwrap() * PART,
            scattered: random.below(2) == 0,
        }
    }

    fn pieces(&self, region: &MemoryRegion, random: &mut Random) -> Vec<iovec> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < self.len {
            let piece = (1 + random.below(9)) * SECTOR;
            let piece = usize::try_from(piece).unwrap().min(self.len - done);
            // At most as many as the device says.
            let piece = if pieces.len() == 100 {
                self.len - done
            } else {
                piece
            };
            pieces.push(iovec {
                iov_base: (region.addr + self.at + done) as *mut _,
                iov_len: piece,
            });
            done += piece;
        }
        pieces
    }

    fn submit(&self, queue: &mut Blkioq, region: &MemoryRegion, pieces: &[iovec], id: usize) {
        let buffer = (region.addr + self.at) as *mut u8;
        let none = ReqFlags::empty();
        let count = u32::try_from(pieces.len()).unwrap();
        let len = self.len as u64;
        match self.kind {
            Kind::Read if self.scattered => {
                queue.readv(self.offset, pieces.as_ptr(), count, id, none)
            }
            Kind::Read => queue.read(self.offset, buffer, self.len, id, none),
            Kind::Write { fua } => {
                let flags = if fua { ReqFlags::FUA } else { none };
                if self.scattered {
                    queue.writev(self.offset, pieces.as_ptr(), count, id, flags);
                } else {
                    queue.write(self.offset, buffer, self.len, id, flags);
                }
            }
            Kind::Zeroes { unmap } => {
                let flags = if unmap { none } else { ReqFlags::NO_UNMAP };
                queue.write_zeroes(self.offset, len, id, flags);
            }
            Kind::Discard => queue.discard(self.offset, len, id, none),
            Kind::Flush => queue.flush(id, none),
        }
    }

    /// The disk after it, and what a read must have brought.
    fn judge(&self, model: &mut [u8], memory: &[u8]) {
        let start = usize::try_from(self.offset).unwrap();
        let range = start..start + self.len;
        match self.kind {
            Kind::Read => assert!(model[range] == *memory, "{self:?}: not what was written"),
            Kind::Write { .. } => model[range].copy_from_slice(memory),
            Kind::Zeroes { .. } => model[range].fill(0),
            Kind::Discard => {
                let first = self.offset.next_multiple_of(CLUSTER);
                let last = (self.offset + self.len as u64) / CLUSTER * CLUSTER;
                if first < last {
                    model[usize::try_from(first).unwrap()..usize::try_from(last).unwrap()].fill(0);
                }
            }
            Kind::Flush => {}
        }
    }
}

fn device(dir: &Path) -> Device {
    let image = dir.join("image.qcow2");
    urus::create(&image, CreateOptions::new().size(SIZE)).unwrap();
    OpenOptions::new().queue_depth(32).open(&image).unwrap()
}

/// Rounds of operations over all queues, each round's on places of their own.
fn play(client: &mut Client, model: &mut [u8], rounds: u64, seed: u64) {
    const SLOTS: u64 = 48;
    let queues = client.queues.len();
    let region = client.memory(usize::try_from(SLOTS).unwrap() * PART);
    let mut random = Random(seed);
    for _ in 0..rounds {
        let count = 1 + random.below(SLOTS);
        let operations: Vec<_> = (0..count)
            .map(|slot| Operation::random(&mut random, slot, SLOTS))
            .collect();
        let mut in_flight = vec![0; queues];
        let mut keep = Vec::new();
        for (id, operation) in operations.iter().enumerate() {
            put(&region, operation.at, &noise(random.next(), operation.len));
            let pieces = operation.pieces(&region, &mut random);
            let queue = usize::try_from(random.below(queues as u64)).unwrap();
            operation.submit(&mut client.queues[queue], &region, &pieces, id);
            in_flight[queue] += 1;
            keep.push(pieces);
            if random.below(4) == 0 {
                // Let the queue know, without waiting: batches of all sizes.
                let mut none = [];
                client.queues[queue]
                    .do_io(&mut none, 0, None, None)
                    .unwrap();
            }
        }
        for (queue, &count) in in_flight.iter().enumerate() {
            for (id, result) in client.wait(queue, count) {
                assert_eq!(result, 0, "{:?}", operations[id]);
            }
        }
        for operation in &operations {
            operation.judge(model, &get(&region, operation.at, operation.len));
        }
    }
}

/// The disk, read by the library alone; and its tables.
fn assert_image_is(dir: &Path, model: &[u8]) {
    let image = dir.join("image.qcow2");
    let device = OpenOptions::new().read_only(true).open(&image).unwrap();
    let mut disk = vec![0; model.len()];
    device.blocking().unwrap().read_at(&mut disk, 0).unwrap();
    assert!(disk == model, "the image differs from the model");
    device.close().unwrap();
    let report = urus::check(&image, Repair::None).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

fn serve(dir: &Path, device: &Device, queues: usize) -> Server {
    let listener = Listener::bind(dir.join("sock")).unwrap();
    Server::builder(device.clone(), listener)
        .queues(queues)
        .serial("a serial")
        .start()
        .unwrap()
}

#[test]
fn random_operations_on_four_queues() {
    let seed = 0x7572_7573;
    println!("seed {seed:#x}");
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let server = serve(dir.path(), &device, QUEUES);
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    let mut client = Client::connect(&dir.path().join("sock"), false, QUEUES);
    assert_eq!(client.blkio.get_u64("capacity").unwrap(), SIZE);
    assert_eq!(client.blkio.get_i32("max-queues").unwrap(), 4);
    assert_eq!(client.blkio.get_i32("max-segments").unwrap(), 126);
    play(&mut client, &mut model, 300, seed);
    let Stats {
        reads,
        writes,
        flushes,
        discards,
        write_zeroes,
        failed,
        batches,
        calls,
        ..
    } = server.stats();
    let requests = reads + writes + flushes + discards + write_zeroes;
    assert!(requests > 5000, "{requests}");
    for count in [reads, writes, flushes, discards, write_zeroes] {
        assert!(count > 200, "{:?}", server.stats());
    }
    assert_eq!(failed, 0);
    assert!(
        batches < requests && calls < requests,
        "requests go in batches: {:?}",
        server.stats()
    );
    drop(client);
    server.shutdown().unwrap();
    device.close().unwrap();
    assert_image_is(dir.path(), &model);
}

#[test]
fn front_ends_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let server = serve(dir.path(), &device, 2);
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    for (round, queues) in [1, 2, 2, 1, 2].into_iter().enumerate() {
        let mut client = Client::connect(&dir.path().join("sock"), false, queues);
        play(&mut client, &mut model, 10, 77 + round as u64);
        if round % 2 == 0 {
            // Leaves without waiting for what it has asked for.
            let region = client.memory(PART);
            for id in 0..16 {
                client.queues[0].read(
                    id as u64 * CLUSTER,
                    region.addr as *mut u8,
                    PART,
                    id,
                    ReqFlags::empty(),
                );
            }
            client.queues[0].do_io(&mut [], 0, None, None).unwrap();
        }
    }
    server.shutdown().unwrap();
    assert!(!dir.path().join("sock").exists());
    device.close().unwrap();
    assert_image_is(dir.path(), &model);
}

#[test]
fn polling_serves_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let listener = Listener::bind(dir.path().join("sock")).unwrap();
    let poll = std::time::Duration::from_micros(200);
    let server = Server::builder(device.clone(), listener)
        .queues(2)
        .poll(poll)
        .start()
        .unwrap();
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    let mut client = Client::connect(&dir.path().join("sock"), false, 2);
    play(&mut client, &mut model, 40, 5);
    drop(client);
    server.shutdown().unwrap();
    device.close().unwrap();
    assert_image_is(dir.path(), &model);
}

/// Memory that is pinned is the memory of the map of that moment: front ends that come one after the other, with memory of their own at whatever
/// addresses, get their own bytes.
#[test]
fn pinned_memory_serves_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let listener = Listener::bind(dir.path().join("sock")).unwrap();
    let server = Server::builder(device.clone(), listener)
        .queues(2)
        .pin_guest_memory(true)
        .start()
        .unwrap();
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    for seed in [6, 7, 8] {
        let mut client = Client::connect(&dir.path().join("sock"), false, 2);
        play(&mut client, &mut model, 30, seed);
    }
    server.shutdown().unwrap();
    device.close().unwrap();
    assert_image_is(dir.path(), &model);
}

#[test]
fn a_read_only_disk_is_only_read() {
    let dir = tempfile::tempdir().unwrap();
    device(dir.path()).close().unwrap();
    let device = OpenOptions::new()
        .read_only(true)
        .open(dir.path().join("image.qcow2"))
        .unwrap();
    let server = serve(dir.path(), &device, 1);
    let mut writer = Blkio::new("virtio-blk-vhost-user").unwrap();
    writer
        .set_str("path", dir.path().join("sock").to_str().unwrap())
        .unwrap();
    writer.connect().unwrap();
    assert!(
        writer.start().is_err(),
        "a client that wants to write is told"
    );
    drop(writer);
    let mut client = Client::connect(&dir.path().join("sock"), true, 1);
    let region = client.memory(4096);
    put(&region, 0, &[0xff; 4096]);
    client.queues[0].read(0, region.addr as *mut u8, 4096, 9, ReqFlags::empty());
    assert_eq!(client.wait(0, 1), [(9, 0)]);
    assert_eq!(get(&region, 0, 4096), [0; 4096]);
    // Beyond the end.
    client.queues[0].read(SIZE, region.addr as *mut u8, 4096, 1, ReqFlags::empty());
    let (_, result) = client.wait(0, 1)[0];
    assert!(result < 0, "{result}");
    drop(client);
    server.shutdown().unwrap();
}
