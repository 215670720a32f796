//! `urus serve --vhost-user` and `urus vhost-user-blk` as processes: killed amid work and started again, told to stop
//! amid work, started as management software starts them.
//!
//! Guards against requests that a restart loses or does at the wrong place, against an end under load that is not clean,
//! and against conventions kept only in spirit.

#[path = "../../vhost-user/tests/machine/mod.rs"]
mod machine;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use machine::{FEATURES, FLUSH, Machine, READ, SLOTS, WRITE};
use rustix::process::{Pid, Signal, kill_process};
use vhost::vhost_user::Frontend;

const URUS: &str = env!("CARGO_BIN_EXE_urus");
const OK: u8 = 0;
const BYTES: usize = 16 << 10;

fn urus(arguments: &[&str]) -> Output {
    Command::new(URUS).args(arguments).output().unwrap()
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let image = place.image();
        let made = urus(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            image.to_str().unwrap(),
            "32M",
        ]);
        assert!(made.status.success(), "{made:?}");
        place
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image.qcow2")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn serve(&self) -> Daemon {
        let child = Command::new(URUS)
            .arg("serve")
            .arg(self.image())
            .arg("--vhost-user")
            .arg(self.socket())
            .args(["--num-queues", "2"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Daemon(child)
    }

    fn assert_clean(&self) {
        let checked = urus(&["check", self.image().to_str().unwrap()]);
        assert!(checked.status.success(), "{checked:?}");
    }
}

struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// SIGTERM; the exit code.
    fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.0.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a slot's place on the disk has after its `count`th write: every sector says whose it is.
fn content(slot: u16, count: u32) -> Vec<u8> {
    (0..BYTES / 8)
        .flat_map(|word| {
            let word = u32::try_from(word).unwrap();
            let [a, b] = slot.to_le_bytes();
            let [c, d, e, _] = count.to_le_bytes();
            let [f, g, _, _] = word.to_le_bytes();
            [a, b, c, d, e, f, g, 0x5a]
        })
        .collect()
}

/// Where a slot's `count`th write goes: its own place, apart from the others' so that clusters are shared by some and
/// not by all, and a new one now and then, so that clusters are allocated all the time.
fn sector(slot: u16, count: u32) -> u64 {
    let turn = u64::from(count / 8 % 16);
    (turn * u64::from(SLOTS) + u64::from(slot)) * 3 * (BYTES as u64 / 512)
}

fn offer_write(machine: &mut Machine, slot: u16, count: u32) {
    machine.fill(slot, &content(slot, count));
    machine.prepare(
        slot,
        WRITE,
        sector(slot, count),
        u32::try_from(BYTES).unwrap(),
    );
    machine.offer(slot);
}

fn assert_reads(machine: &mut Machine, counts: &[u32]) {
    for (slot, &count) in (0..).zip(counts) {
        machine.fill(slot, &vec![0; BYTES]);
        machine.prepare(
            slot,
            READ,
            sector(slot, count),
            u32::try_from(BYTES).unwrap(),
        );
        machine.offer(slot);
    }
    machine.kick();
    machine.settle();
    for (slot, &count) in (0..).zip(counts) {
        assert_eq!(machine.status(slot), OK);
        assert!(
            machine.data(slot, BYTES) == content(slot, count),
            "slot {slot} after write {count}"
        );
    }
}

/// Keeps the queue full for a while. The front end is not asked: this is the guest's doing.
fn load(machine: &mut Machine, counts: &mut [u32], rounds: u32) {
    for round in 0..rounds {
        for slot in machine.answered() {
            assert_eq!(machine.status(slot), OK);
        }
        for slot in 0..SLOTS {
            if !machine.outstanding.contains(&slot) {
                let count = &mut counts[usize::from(slot)];
                *count += 1;
                offer_write(machine, slot, *count);
                machine.kick();
            }
        }
        if round % 8 == 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

#[test]
fn a_kill_loses_no_request() {
    let place = Place::new();
    let mut machine = Machine::new();
    let mut counts = vec![0; SLOTS.into()];
    let mut daemon = place.serve();
    let mut front_end = machine.connect(&place.socket());
    machine.start(&mut front_end, FEATURES, 0);
    let mut left = 0;
    for round in 0..25 {
        load(&mut machine, &mut counts, 20 + 37 * round);
        daemon.kill();
        drop(front_end);
        for slot in machine.answered() {
            assert_eq!(machine.status(slot), OK);
        }
        left += machine.outstanding.len();
        if round % 2 == 0 {
            // The guest goes on meanwhile: nobody tells it. (Else what had completed is not written over.)
            load(&mut machine, &mut counts, 1);
        }
        daemon = place.serve();
        front_end = machine.connect(&place.socket());
        // A base that makes no sense: the notes know better than a front end can.
        machine.start(&mut front_end, FEATURES, 12_345);
        machine.kick();
        machine.settle();
        for slot in 0..SLOTS {
            assert_eq!(machine.status(slot), OK);
        }
        assert_reads(&mut machine, &counts);
    }
    println!("{left} requests were outstanding at the kills");
    assert!(left > 25, "the kills were amid work");
    assert_reads(&mut machine, &counts);
    assert_eq!(daemon.stop(), Some(0));
    // A kill leaks clusters at most (exit code 3).
    let checked = urus(&["check", place.image().to_str().unwrap()]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
}

#[test]
fn an_end_under_load_is_clean() {
    let place = Place::new();
    let mut machine = Machine::new();
    let mut counts = vec![0; SLOTS.into()];
    for round in 0..5 {
        let mut daemon = place.serve();
        let mut front_end = machine.connect(&place.socket());
        machine.start(&mut front_end, FEATURES, 0);
        load(&mut machine, &mut counts, 100 + round);
        daemon.signal(Signal::TERM);
        load(&mut machine, &mut counts, 50);
        assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
        assert!(!place.socket().exists(), "its socket is gone");
        for slot in machine.answered() {
            assert_eq!(machine.status(slot), OK);
        }
        drop(front_end);
        place.assert_clean();
        // What it had not taken is for the next one.
        let mut daemon = place.serve();
        let mut front_end: Frontend = machine.connect(&place.socket());
        machine.start(&mut front_end, FEATURES, 0);
        machine.kick();
        machine.settle();
        assert_reads(&mut machine, &counts);
        drop(front_end);
        assert_eq!(daemon.stop(), Some(0));
    }
}

#[test]
fn beside_nbd_in_one_process() {
    let place = Place::new();
    let nbd = place.dir.path().join("nbd");
    let child = Command::new(URUS)
        .arg("serve")
        .arg(place.image())
        .arg("--vhost-user")
        .arg(place.socket())
        .arg("--nbd")
        .arg(format!("unix:{}", nbd.display()))
        .args(["--poll-us", "50", "--serial", "both"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut daemon = Daemon(child);
    let mut machine = Machine::new();
    let mut front_end = machine.connect(&place.socket());
    machine.start(&mut front_end, FEATURES, 0);
    machine.fill(0, &content(0, 7));
    assert_eq!(machine.request(WRITE, 0, u32::try_from(BYTES).unwrap()), OK);
    while UnixStream::connect(&nbd).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(machine.request(FLUSH, 0, 0), OK);
    drop(front_end);
    assert_eq!(daemon.stop(), Some(0));
    assert!(!nbd.exists());
}

/// Called by its other name, as management software does.
fn program(dir: &Path) -> PathBuf {
    let link = dir.join("urus-vhost-user-blk");
    let _ = std::os::unix::fs::symlink(URUS, &link);
    link
}

#[test]
fn capabilities_are_printed_whatever_else_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let expected = serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]});
    let lines: [&[&str]; 3] = [
        &["--print-capabilities"],
        &["--socket-path", "a", "--fd", "3", "--print-capabilities"],
        &[
            "--print-capabilities",
            "--no-such-option",
            "--blk-file=/nonexistent",
        ],
    ];
    for arguments in lines {
        let output = Command::new(program(dir.path()))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json, expected);
        let output = Command::new(URUS)
            .arg("vhost-user-blk")
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let descriptor = include_str!("../../../dist/50-urus-vhost-user-blk.json");
    let descriptor: serde_json::Value = serde_json::from_str(descriptor).unwrap();
    assert_eq!(descriptor["type"], expected["type"]);
    assert_eq!(descriptor["features"], expected["features"]);
    assert_eq!(descriptor["binary"], "/usr/libexec/urus-vhost-user-blk");
}

#[test]
fn what_cannot_work_ends_early_and_says_why() {
    let place = Place::new();
    let (image, socket) = (place.image(), place.socket());
    let (image, socket) = (image.to_str().unwrap(), socket.to_str().unwrap());
    for (arguments, word) in [
        (vec!["--blk-file", image], "--socket-path"),
        (vec!["--socket-path", socket], "--blk-file"),
        (
            vec!["--socket-path", socket, "--fd", "3", "--blk-file", image],
            "--fd",
        ),
        (
            vec!["--socket-path", socket, "--blk-file", "/nonexistent"],
            "/nonexistent",
        ),
        (vec!["--fd", "999", "--blk-file", image], "999"),
        (vec!["--fd", "0", "--blk-file", image], "socket"),
        (
            vec!["--socket-path", image, "--blk-file", image],
            "not a socket",
        ),
    ] {
        let output = Command::new(program(place.dir.path()))
            .args(&arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains(word),
            "{arguments:?}: {output:?}"
        );
        assert!(
            !place.socket().exists(),
            "{arguments:?} leaves nothing behind"
        );
    }
}

#[test]
fn as_a_back_end_program_with_a_path() {
    let place = Place::new();
    let child = Command::new(program(place.dir.path()))
        .arg(format!("--socket-path={}", place.socket().display()))
        .arg(format!("--blk-file={}", place.image().display()))
        .arg("--read-only")
        .spawn()
        .unwrap();
    let mut daemon = Daemon(child);
    for _ in 0..2 {
        let mut machine = Machine::new();
        let mut front_end = machine.connect(&place.socket());
        machine.start(&mut front_end, FEATURES, 0);
        assert_eq!(machine.request(READ, 0, 512), OK);
        assert_eq!(machine.request(WRITE, 0, 512), 1, "read-only");
    }
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn as_a_back_end_program_with_a_connection() {
    let place = Place::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The child inherits it: its copies are made without the flag that closes them.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
    let child = Command::new(program(place.dir.path()))
        .arg(format!("--fd={}", theirs.as_raw_fd()))
        .arg("--blk-file")
        .arg(place.image())
        .spawn()
        .unwrap();
    let mut daemon = Daemon(child);
    drop(theirs);
    let mut machine = Machine::new();
    let mut front_end = Frontend::from_stream(ours, 1);
    machine.start(&mut front_end, FEATURES, 0);
    machine.fill(0, &content(1, 1));
    assert_eq!(
        machine.request(WRITE, 64, u32::try_from(BYTES).unwrap()),
        OK
    );
    drop(front_end);
    assert_eq!(
        daemon.0.wait().unwrap().code(),
        Some(0),
        "it ends with its only connection"
    );
    place.assert_clean();
}
