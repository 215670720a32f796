//! A driver on a real file, for the suites of this crate.
#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test binary uses a part"
)]

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use urus_engine::storage::{Completion, FileId, Memory, Op, OpKind, Slot, Storage};
use urus_ring::{Buffer, Driver, DriverKind, FileSet, OpenFile, RingMemory};

pub(crate) const DEPTH: u32 = 64;
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// A directory on the disk's file system (tmpfs would hide alignment mistakes), or in `URUS_TEST_DIRECTORY`.
pub(crate) fn directory() -> tempfile::TempDir {
    let default = env!("CARGO_TARGET_TMPDIR").into();
    tempfile::tempdir_in(std::env::var_os("URUS_TEST_DIRECTORY").unwrap_or(default)).unwrap()
}

pub(crate) struct Bench {
    pub(crate) driver: Driver,
    pub(crate) path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new(kind: DriverKind) -> Self {
        Self::with(kind, DEPTH, false, &[])
    }

    pub(crate) fn with(kind: DriverKind, depth: u32, direct: bool, content: &[u8]) -> Self {
        let directory = directory();
        let path = directory.path().join("image");
        std::fs::write(&path, content).unwrap();
        let file = OpenFile::open_image(&path, false, direct).unwrap();
        let driver = Driver::open(FileSet::new(vec![file]), kind, depth).unwrap();
        assert_eq!(driver.kind(), kind);
        Self {
            driver,
            path,
            _directory: directory,
        }
    }

    /// Does one operation on the image.
    pub(crate) fn run(&mut self, kind: OpKind<RingMemory>) -> io::Result<usize> {
        submit(&mut self.driver, FileId(0), kind, 3);
        let completion = next(&mut self.driver);
        assert_eq!(completion.slot, 3);
        completion.result
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

pub(crate) fn submit(driver: &mut Driver, file: FileId, kind: OpKind<RingMemory>, slot: Slot) {
    assert!(
        driver.submit(Op { file, kind }, slot).is_ok(),
        "there is room"
    );
}

/// Kicks, and waits for a completion.
pub(crate) fn next(driver: &mut Driver) -> Completion {
    driver.kick();
    let start = Instant::now();
    loop {
        if let Some(completion) = driver.complete() {
            return completion;
        }
        assert!(start.elapsed() < LONG, "nothing completes");
        driver.wait(Some(LONG));
    }
}

/// Makes each test of the list once per driver.
macro_rules! for_both_drivers {
    ($($name:ident),* $(,)?) => {
        mod uring {
            $(#[test] fn $name() { super::$name(urus_ring::DriverKind::IoUring); })*
        }
        mod blocking {
            $(#[test] fn $name() { super::$name(urus_ring::DriverKind::Blocking); })*
        }
    };
}
pub(crate) use for_both_drivers;

pub(crate) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 31 + seed * 7 + i / 256) % 251).unwrap())
        .collect()
}

pub(crate) fn memory(bytes: &[u8]) -> RingMemory {
    let mut buffer = Buffer::new(bytes.len());
    buffer.as_mut_slice().copy_from_slice(bytes);
    buffer.into_memory()
}

pub(crate) fn bytes(memory: &RingMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    memory.read(0, &mut bytes);
    bytes
}
