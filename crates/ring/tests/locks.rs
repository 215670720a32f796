//! Image locks against real QEMU, in both directions.
//!
//! Guards against the worst accident: two programs writing one image. Skipped, loudly, where there is no qemu-io.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use urus_ring::{LockError, LockMode, OpenFile};

struct Image {
    path: PathBuf,
    overlay: PathBuf,
    _directory: tempfile::TempDir,
}

/// An image and an overlay on it; nothing without QEMU.
fn image() -> Option<Image> {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("base.qcow2");
    let overlay = directory.path().join("overlay.qcow2");
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("SKIPPED: no qemu-io here");
        return None;
    }
    let create = |arguments: &[&std::ffi::OsStr]| {
        assert!(
            Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .args(arguments)
                .status()
                .unwrap()
                .success()
        );
    };
    create(&[path.as_os_str(), "1M".as_ref()]);
    create(&[
        "-F".as_ref(),
        "qcow2".as_ref(),
        "-b".as_ref(),
        path.as_os_str(),
        overlay.as_os_str(),
    ]);
    Some(Image {
        path,
        overlay,
        _directory: directory,
    })
}

/// A qemu-io that has the image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(path: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        let mut child = command
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers when the image is open.
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"length\n")
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.contains('1'), "{line}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.stdin.take().unwrap().write_all(b"quit\n");
        let _ = self.0.wait();
    }
}

fn qemu_can_open(path: &Path, read_only: bool) -> bool {
    let mut command = Command::new("qemu-io");
    if read_only {
        command.arg("-r");
    }
    let output = command
        .args(["-c", "length"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || text.contains("lock"), "{text}");
    output.status.success()
}

fn open(path: &Path, mode: LockMode) -> OpenFile {
    OpenFile::open_image(path, mode == LockMode::Read, false).unwrap()
}

fn can_lock(path: &Path, mode: LockMode) -> bool {
    match open(path, mode).lock(mode) {
        Ok(()) => true,
        Err(error @ LockError::Held { .. }) => {
            let text = error.to_string();
            assert!(
                text.contains("base.qcow2") || text.contains("overlay.qcow2"),
                "{text}"
            );
            assert!(
                text.contains("locked by another process (conflicting lock: "),
                "{text}"
            );
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// The bytes of an image that are locked now, as /proc/locks says.
fn locked_bytes(path: &Path) -> Vec<u64> {
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    let mut bytes = Vec::new();
    for line in std::fs::read_to_string("/proc/locks").unwrap().lines() {
        let fields = line.split_whitespace().collect::<Vec<_>>();
        // Files of other file systems can have the same number, and are locked in other ways.
        if fields[1] == "OFDLCK" && fields[5].ends_with(&format!(":{inode}")) {
            assert_eq!(fields[3], "READ");
            bytes.extend(fields[6].parse::<u64>().unwrap()..=fields[7].parse().unwrap());
        }
    }
    bytes.sort_unstable();
    bytes
}

#[test]
fn the_same_bytes_as_qemu() {
    let Some(image) = image() else { return };
    for (mode, read_only) in [(LockMode::Read, true), (LockMode::Write, false)] {
        let holder = Holder::new(&image.path, read_only);
        let theirs = locked_bytes(&image.path);
        assert!(!theirs.is_empty());
        drop(holder);
        // A process's files may be let go of some time after its end.
        let end = Instant::now() + Duration::from_secs(20);
        while !locked_bytes(&image.path).is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let file = open(&image.path, mode);
        file.lock(mode).unwrap();
        assert_eq!(locked_bytes(&image.path), theirs);
        file.unlock().unwrap();
        assert_eq!(locked_bytes(&image.path), [0_u64; 0]);
        file.lock(mode).unwrap();
        assert_eq!(locked_bytes(&image.path), theirs);
        drop(file);
        assert_eq!(locked_bytes(&image.path), [0_u64; 0]);
    }
    // A backing file is locked as by a reader, whatever the overlay is.
    let _holder = Holder::new(&image.overlay, false);
    let theirs = locked_bytes(&image.path);
    let file = open(&image.path, LockMode::Read);
    file.lock(LockMode::Read).unwrap();
    let mut both = [theirs.clone(), theirs].concat();
    both.sort_unstable();
    assert_eq!(locked_bytes(&image.path), both);
}

#[test]
fn qemu_holds_and_urus_asks() {
    let Some(image) = image() else { return };
    {
        let _writer = Holder::new(&image.path, false);
        assert!(!can_lock(&image.path, LockMode::Write));
        assert!(!can_lock(&image.path, LockMode::Read));
    }
    {
        let _reader = Holder::new(&image.path, true);
        assert!(!can_lock(&image.path, LockMode::Write));
        assert!(can_lock(&image.path, LockMode::Read));
    }
    {
        let _overlay = Holder::new(&image.overlay, false);
        assert!(
            !can_lock(&image.path, LockMode::Write),
            "the backing file of a running guest"
        );
        assert!(can_lock(&image.path, LockMode::Read));
        assert!(!can_lock(&image.overlay, LockMode::Read));
    }
    assert!(can_lock(&image.path, LockMode::Write), "free again");
}

#[test]
fn urus_holds_and_qemu_asks() {
    let Some(image) = image() else { return };
    let file = open(&image.path, LockMode::Write);
    file.lock(LockMode::Write).unwrap();
    assert!(!qemu_can_open(&image.path, false));
    assert!(!qemu_can_open(&image.path, true));
    assert!(
        !qemu_can_open(&image.overlay, true),
        "nor may it be read through an overlay"
    );
    // Down to a reader, then nothing, then a writer again.
    file.lock(LockMode::Read).unwrap();
    assert!(!qemu_can_open(&image.path, false));
    assert!(qemu_can_open(&image.path, true));
    assert!(qemu_can_open(&image.overlay, false));
    file.unlock().unwrap();
    assert!(qemu_can_open(&image.path, false));
    file.lock(LockMode::Write).unwrap();
    assert!(!qemu_can_open(&image.path, true));
    drop(file);
    assert!(qemu_can_open(&image.path, false));
}

/// Two devices of one process exclude each other like two processes; a failed attempt leaves nothing behind.
#[test]
fn two_of_our_own() {
    let Some(image) = image() else { return };
    let reader = open(&image.path, LockMode::Read);
    reader.lock(LockMode::Read).unwrap();
    let held = locked_bytes(&image.path);
    assert!(can_lock(&image.path, LockMode::Read));
    let writer = open(&image.path, LockMode::Write);
    writer.lock(LockMode::Write).unwrap_err();
    assert_eq!(locked_bytes(&image.path), held);
    drop(reader);
    writer.lock(LockMode::Write).unwrap();
    assert!(!can_lock(&image.path, LockMode::Read) && !can_lock(&image.path, LockMode::Write));
}

/// A ring that is going away must not keep the image locked.
#[test]
fn a_closed_driver_frees_the_image_at_once() {
    use urus_engine::storage::{FileId, Op, OpKind, Storage};
    let Some(image) = image() else { return };
    for _ in 0..50 {
        let file = open(&image.path, LockMode::Write);
        file.lock(LockMode::Write).unwrap();
        let files = urus_ring::FileSet::new(vec![file]);
        let mut driver = urus_ring::Driver::open(files, urus_ring::DriverKind::Auto, 8).unwrap();
        let memory = driver.allocate(512).unwrap();
        assert!(
            driver
                .submit(
                    Op {
                        file: FileId(0),
                        kind: OpKind::Read { offset: 0, memory }
                    },
                    0
                )
                .is_ok()
        );
        driver.kick();
        drop(driver);
        assert_eq!(locked_bytes(&image.path), [0_u64; 0]);
    }
}
