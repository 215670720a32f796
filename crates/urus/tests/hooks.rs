//! A cipher and an observer on real files: what QEMU finds in the image is ciphered, and every change was told. Guards the
//! place where encryption and bitmaps are to stand, with both drivers and with O_DIRECT.

mod common;

use std::sync::{Arc, Mutex};

use common::{Scratch, make, open, qemu_img, text};
use urus::hooks::{Hooks, Observer, Transform};
use urus::{CacheMode, IoDriver, OpenOptions};

const KEY: u8 = 0x5a;
const SIZE: usize = 4 << 20;
const SECTOR: usize = 512;

struct Xor;

impl Transform for Xor {
    fn before_write(&self, offset: u64, bytes: &mut [u8]) {
        assert!(offset.is_multiple_of(512) && bytes.len().is_multiple_of(SECTOR));
        bytes.iter_mut().for_each(|byte| *byte ^= KEY);
    }

    fn after_read(&self, offset: u64, bytes: &mut [u8]) {
        self.before_write(offset, bytes);
    }
}

#[derive(Default)]
struct Told(Mutex<Vec<(u64, u64)>>);

impl Observer for Told {
    fn changes(&self, offset: u64, len: u64) {
        self.0.lock().unwrap().push((offset, len));
    }
}

/// Numbers that look drawn by lot.
struct Lot(u64);

impl Lot {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % most
    }
}

fn ciphered(io: IoDriver, cache: CacheMode, cluster_bytes: &str) {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(
        &path,
        "4M",
        &["-o", &format!("cluster_size={cluster_bytes}")],
    );
    let told = Arc::new(Told::default());
    let mut options = OpenOptions::new();
    options.io(io).cache(cache).hooks(Hooks {
        transform: Some(Arc::new(Xor)),
        observer: Some(Arc::clone(&told) as Arc<dyn Observer>),
    });
    let device = open(&options, &path);
    let mut disk = device.blocking().unwrap();
    let (mut model, mut expected) = (vec![0; SIZE], Vec::new());
    let mut lot = Lot(7);
    for round in 0..300 {
        let start = lot.below(SIZE - 1);
        let len = 1 + lot.below((SIZE - start).min(200_000));
        // Some of them at whole sectors, so that they can be hits.
        let (start, len) = if round % 2 == 0 {
            (
                start & !4095,
                len.next_multiple_of(4096).min(SIZE - (start & !4095)),
            )
        } else {
            (start, len)
        };
        let (offset, bytes) = (start as u64, len as u64);
        match lot.below(8) {
            0 => {
                disk.write_zeroes(offset, bytes, round % 4 < 2).unwrap();
                model[start..start + len].fill(0);
            }
            1 | 2 => {
                let mut found = vec![0xee; len];
                disk.read_at(&mut found, offset).unwrap();
                assert!(found == model[start..start + len], "round {round}");
                continue;
            }
            kind => {
                let data: Vec<u8> = (0..len)
                    .map(|at| (at + kind + round).to_le_bytes()[0])
                    .collect();
                disk.write_at(&data, offset).unwrap();
                model[start..start + len].copy_from_slice(&data);
            }
        }
        expected.push((offset, bytes));
    }
    let mut found = vec![0xee; SIZE];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found == model);
    // A long write may go as several requests.
    let mut told = std::mem::take(&mut *told.0.lock().unwrap()).into_iter();
    for (offset, len) in expected {
        let mut at = offset;
        while at < offset + len {
            let (from, bytes) = told.next().expect("a change that nobody was told of");
            assert_eq!(from, at, "of {len} bytes at {offset}");
            at += bytes;
        }
        assert_eq!(at, offset + len);
    }
    assert_eq!(told.next(), None, "no change was told twice");
    drop(disk);
    device.close().unwrap();
    let copy = scratch.path("copy.raw");
    qemu_img(&["check", "-q", "-f", "qcow2", text(&path)]);
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(&path),
        text(&copy),
    ]);
    let stored = std::fs::read(copy).unwrap();
    let mut sectors = 0;
    for (at, (stored, plain)) in stored.chunks(SECTOR).zip(model.chunks(SECTOR)).enumerate() {
        let is_ciphered = stored.iter().zip(plain).all(|(a, b)| *a == *b ^ KEY);
        let is_nothing = stored.iter().chain(plain).all(|byte| *byte == 0);
        assert!(is_ciphered || is_nothing, "sector {at}");
        sectors += usize::from(is_ciphered);
    }
    assert!(sectors > 1000, "{sectors} sectors are data");
}

#[test]
fn buffered_over_io_uring() {
    ciphered(IoDriver::IoUring, CacheMode::Writeback, "64k");
    ciphered(IoDriver::IoUring, CacheMode::Writeback, "512");
}

#[test]
fn direct_over_io_uring() {
    ciphered(IoDriver::IoUring, CacheMode::None, "64k");
    ciphered(IoDriver::IoUring, CacheMode::None, "4k");
}

#[test]
fn by_system_calls() {
    ciphered(IoDriver::Blocking, CacheMode::Writeback, "64k");
    ciphered(IoDriver::Blocking, CacheMode::None, "64k");
}
