//! Reads and writes through the facade, for every driver and format: the unit tests of the proposal that urus
//! began from, by name. Each also checks what QEMU reads afterwards, and that the image is whole.

mod common;

use std::path::PathBuf;

use common::{Scratch, make, open, qemu_img, text};
use urus::{
    BlockingIo, Buffer, CacheMode, CreateOptions, Device, Format, IoDriver, OpenOptions, Queue,
    Request,
};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 16 << 20;

/// A device over a fresh image, and the bytes that it should hold.
struct Disk {
    scratch: Scratch,
    format: Format,
    device: Device,
    model: Vec<u8>,
}

impl Disk {
    fn new(io: IoDriver, format: Format, cache: CacheMode) -> Self {
        let scratch = Scratch::new();
        let path = scratch.path("disk");
        urus::create(&path, CreateOptions::new().format(format).size(SIZE)).unwrap();
        let mut options = OpenOptions::new();
        options.io(io).format(format).cache(cache);
        let device = open(&options, &path);
        let model = vec![0; usize::try_from(SIZE).unwrap()];
        Self {
            scratch,
            format,
            device,
            model,
        }
    }

    fn path(&self) -> PathBuf {
        self.scratch.path("disk")
    }

    fn io(&self) -> BlockingIo {
        self.device.blocking().unwrap()
    }

    fn expect(&mut self, offset: u64, bytes: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        self.model[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn write(&mut self, io: &mut BlockingIo, offset: u64, bytes: &[u8]) {
        io.write_at(bytes, offset).unwrap();
        self.expect(offset, bytes);
    }

    fn zeroes(&mut self, offset: u64, len: u64) {
        self.expect(offset, &vec![0; usize::try_from(len).unwrap()]);
    }

    /// Compares all of it: here, and, once closed, as QEMU reads it.
    fn verify(self) {
        let mut bytes = vec![0xee; self.model.len()];
        self.io().read_at(&mut bytes, 0).unwrap();
        assert!(bytes == self.model, "what the device reads");
        self.device.close().unwrap();
        let path = self.path();
        let copy = self.scratch.path("copy.raw");
        qemu_img(&[
            "convert",
            "-f",
            self.format.name(),
            "-O",
            "raw",
            text(&path),
            text(&copy),
        ]);
        assert!(
            std::fs::read(copy).unwrap() == self.model,
            "what QEMU reads"
        );
        if self.format == Format::Qcow2 {
            qemu_img(&["check", "-q", "-f", "qcow2", text(&path)]);
        }
    }
}

/// Bytes that tell where they belong.
fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| (at.wrapping_mul(7) >> 3).to_le_bytes()[0] ^ (at >> 9).to_le_bytes()[0] ^ seed)
        .collect()
}

fn filled(bytes: &[u8]) -> Buffer {
    let mut buffer = Buffer::new(bytes.len());
    buffer.copy_from(0, bytes);
    buffer
}

/// Runs all requests as one batch; returns the buffers by token.
fn batch(queue: &mut Queue, requests: Vec<Request>) -> Vec<Option<Buffer>> {
    let count = requests.len();
    for request in requests {
        queue.submit(request).unwrap();
    }
    queue.kick();
    let mut ended: Vec<Option<Option<Buffer>>> = (0..count).map(|_| None).collect();
    while ended.iter().any(Option::is_none) {
        let Some(completion) = queue.completion() else {
            queue.wait(None);
            continue;
        };
        completion.result.unwrap();
        let slot = &mut ended[usize::try_from(completion.token).unwrap()];
        assert!(
            slot.is_none(),
            "request {} has completed twice",
            completion.token
        );
        *slot = Some(completion.buffer);
    }
    assert_eq!(queue.in_flight(), 0);
    ended.into_iter().map(Option::unwrap).collect()
}

fn round_trip(mut disk: Disk) {
    let mut io = disk.io();
    for (seed, (offset, len)) in (1..).zip([
        (0, CLUSTER),
        (3 * CLUSTER, 4096),
        (SIZE - 4096, 4096),
        (SIZE / 2, 1 << 20),
    ]) {
        let bytes = pattern(seed, len);
        disk.write(&mut io, offset, &bytes);
        let mut back = vec![0; bytes.len()];
        io.read_at(&mut back, offset).unwrap();
        assert!(back == bytes, "{offset} +{len}");
    }
    io.flush().unwrap();
    drop(io);
    disk.verify();
}

fn cross_cluster(mut disk: Disk) {
    let mut io = disk.io();
    // One end in each of two, then in each of four clusters.
    disk.write(&mut io, CLUSTER - 2048, &pattern(1, 4096));
    disk.write(&mut io, 5 * CLUSTER - 512, &pattern(2, 2 * CLUSTER + 1024));
    drop(io);
    disk.verify();
}

fn unallocated(disk: Disk) {
    let mut bytes = pattern(9, 3 * CLUSTER);
    disk.io().read_at(&mut bytes, 7 * CLUSTER + 100).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    disk.verify();
}

fn sub_cluster_write(mut disk: Disk) {
    let mut io = disk.io();
    for (seed, (offset, len)) in (1..).zip([
        (512, 512),
        (CLUSTER + 1, 3),
        (2 * CLUSTER + 4096, 8192),
        (520, 10),
        (0, 1),
    ]) {
        disk.write(&mut io, offset, &pattern(seed, len));
    }
    drop(io);
    disk.verify();
}

fn punch_hole(mut disk: Disk) {
    let mut io = disk.io();
    disk.write(&mut io, 0, &pattern(1, 4 * CLUSTER));
    io.flush().unwrap();
    // Whole clusters of the range; what becomes of the rest is not promised, so none is given.
    io.discard(CLUSTER, 2 * CLUSTER).unwrap();
    disk.zeroes(CLUSTER, 2 * CLUSTER);
    io.flush().unwrap();
    drop(io);
    disk.verify();
}

fn write_zeroes(mut disk: Disk) {
    let mut io = disk.io();
    disk.write(&mut io, 0, &pattern(1, 8 * CLUSTER));
    for (offset, len, unmap) in [
        (CLUSTER, CLUSTER, false),
        (3 * CLUSTER, 2 * CLUSTER, true),
        (6 * CLUSTER + 5, 1000, false),
        (7 * CLUSTER + 512, 512, true),
        (SIZE - CLUSTER, CLUSTER, true),
    ] {
        io.write_zeroes(offset, len, unmap).unwrap();
        disk.zeroes(offset, len);
    }
    io.flush().unwrap();
    drop(io);
    disk.verify();
}

fn punch_then_rewrite(mut disk: Disk) {
    let mut io = disk.io();
    for seed in 1..5 {
        disk.write(&mut io, 2 * CLUSTER, &pattern(seed, CLUSTER));
        io.discard(2 * CLUSTER, CLUSTER).unwrap();
        disk.zeroes(2 * CLUSTER, CLUSTER);
        disk.write(&mut io, 2 * CLUSTER + 4096, &pattern(seed + 50, 4096));
    }
    drop(io);
    disk.verify();
}

fn mixed_batch(mut disk: Disk) {
    let mut io = disk.io();
    disk.write(&mut io, 0, &pattern(1, 4 * CLUSTER));
    let mut queue = disk.device.queue().unwrap().activate().unwrap();
    let requests = vec![
        Request::read(0, CLUSTER, Buffer::new(8192)),
        Request::write(1, 10 * CLUSTER, filled(&pattern(2, CLUSTER))),
        Request::flush(2),
        Request::write_zeroes(3, 2 * CLUSTER, CLUSTER),
        Request::read(4, 12 * CLUSTER, Buffer::new(4096)),
        Request::discard(5, 3 * CLUSTER, CLUSTER),
        Request::write(6, 512, filled(&pattern(3, 512))).fua(true),
        Request::block_status(7, 0, CLUSTER),
    ];
    let buffers = batch(&mut queue, requests);
    assert!(
        buffers[0].as_ref().unwrap().as_slice() == &pattern(1, 4 * CLUSTER)[65536..65536 + 8192]
    );
    assert!(
        buffers[4]
            .as_ref()
            .unwrap()
            .as_slice()
            .iter()
            .all(|&byte| byte == 0)
    );
    for (token, buffer) in buffers.iter().enumerate() {
        assert_eq!(buffer.is_some(), [0, 1, 4, 6].contains(&token), "{token}");
    }
    disk.expect(10 * CLUSTER, &pattern(2, CLUSTER));
    disk.zeroes(2 * CLUSTER, 2 * CLUSTER);
    disk.expect(512, &pattern(3, 512));
    drop((io, queue));
    disk.verify();
}

fn eight_clusters_at_once(mut disk: Disk) {
    let mut queue = disk.device.queue().unwrap().activate().unwrap();
    // Backwards, so that neighbours on the disk are no neighbours in the file.
    let bytes = |index: u64| pattern(index.to_le_bytes()[0], CLUSTER);
    for index in (0..8).rev() {
        batch(
            &mut queue,
            vec![Request::write(0, index * CLUSTER, filled(&bytes(index)))],
        );
    }
    let all: Vec<u8> = (0..8).flat_map(bytes).collect();
    disk.expect(0, &all);
    let whole = batch(
        &mut queue,
        vec![Request::read(0, 0, Buffer::new(all.len()))],
    );
    assert!(whole[0].as_ref().unwrap().as_slice() == all);
    // And written by one request, over them and over nothing.
    let again = pattern(77, 8 * CLUSTER);
    for offset in [4 * CLUSTER + 512, 40 * CLUSTER] {
        batch(&mut queue, vec![Request::write(0, offset, filled(&again))]);
        disk.expect(offset, &again);
    }
    drop(queue);
    disk.verify();
}

macro_rules! suite {
    ($($name:ident: $io:ident, $format:ident, $cache:ident;)*) => {
        $(mod $name {
            use urus::{CacheMode, Format, IoDriver};

            suite!(@tests $io, $format, $cache: round_trip cross_cluster unallocated sub_cluster_write punch_hole
                write_zeroes punch_then_rewrite mixed_batch eight_clusters_at_once);
        })*
    };
    (@tests $io:ident, $format:ident, $cache:ident: $($test:ident)*) => {
        $(#[test]
        fn $test() {
            super::$test(super::Disk::new(IoDriver::$io, Format::$format, CacheMode::$cache));
        })*
    };
}

suite! {
    io_uring_qcow2: IoUring, Qcow2, Writeback;
    blocking_qcow2: Blocking, Qcow2, Writeback;
    io_uring_qcow2_direct: IoUring, Qcow2, None;
    blocking_qcow2_direct: Blocking, Qcow2, None;
    io_uring_raw: IoUring, Raw, Writeback;
    blocking_raw: Blocking, Raw, Writeback;
    io_uring_raw_direct: IoUring, Raw, None;
    blocking_raw_direct: Blocking, Raw, None;
}

#[test]
fn an_overlay_reads_through_and_copies_up() {
    for io in [IoDriver::IoUring, IoDriver::Blocking] {
        let scratch = Scratch::new();
        let base = pattern(42, SIZE / 2);
        std::fs::write(scratch.path("base.raw"), &base).unwrap();
        let path = scratch.path("overlay.qcow2");
        make(
            &path,
            "16M",
            &["-b", text(&scratch.path("base.raw")), "-F", "raw"],
        );
        let device = open(OpenOptions::new().io(io), &path);
        let mut model = base.clone();
        model.resize(usize::try_from(SIZE).unwrap(), 0);
        let mut io = device.blocking().unwrap();
        io.write_at(&[1; 100], 3 * CLUSTER + 7).unwrap();
        model[3 * 65536 + 7..][..100].fill(1);
        io.write_zeroes(5 * CLUSTER, CLUSTER, true).unwrap();
        model[5 * 65536..6 * 65536].fill(0);
        let mut bytes = vec![0; model.len()];
        io.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == model);
        let extents = io.block_status(0, SIZE).unwrap();
        assert_eq!(extents[0].start, 0);
        assert!(
            extents
                .windows(2)
                .all(|pair| pair[0].start + pair[0].len == pair[1].start)
        );
        let at = |offset: u64| {
            extents
                .iter()
                .find(|extent| extent.start + extent.len > offset)
                .unwrap()
        };
        assert_eq!((at(0).depth, at(0).data), (1, true));
        assert_eq!((at(3 * CLUSTER).depth, at(3 * CLUSTER).data), (0, true));
        assert!(at(5 * CLUSTER).zero && at(5 * CLUSTER).depth == 0);
        drop(io);
        device.close().unwrap();
        assert!(
            std::fs::read(scratch.path("base.raw")).unwrap() == base,
            "a backing file is never written"
        );
        qemu_img(&["check", "-q", text(&path)]);
    }
}
