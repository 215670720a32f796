//! `urus serve` as a user meets it: what it prints, how it ends, what it refuses. (What clients read and write is the business of the
//! end-to-end tests.)

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use common::{Scratch, urus};
use rustix::process::{Pid, Signal, kill_process};

struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// What it has printed until it was ready.
    banner: String,
}

impl Server {
    /// Starts it and waits until it has said what to paste.
    fn start(scratch: &Scratch, line: &str) -> Self {
        let mut child = scratch
            .command(urus(), &format!("serve {line}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("urus");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut banner = String::new();
        while !banner.contains("Ctrl-C") {
            if stdout.read_line(&mut banner).expect("text") == 0 {
                let mut stderr = String::new();
                child
                    .stderr
                    .take()
                    .expect("piped")
                    .read_to_string(&mut stderr)
                    .expect("text");
                panic!("{line}: {banner}{stderr}");
            }
        }
        Self {
            child,
            stdout,
            banner,
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a living server");
    }

    /// Waits for its end; returns what it still said.
    fn ended(mut self) -> String {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("text");
        let status = self.child.wait().expect("waiting");
        assert_eq!(status.code(), Some(0), "{rest}");
        rest
    }

    /// A line to paste.
    fn example(&self, program: &str) -> String {
        let line = self
            .banner
            .lines()
            .find(|line| line.trim_start().starts_with(program));
        line.unwrap_or_else(|| panic!("{program}: {}", self.banner))
            .trim()
            .to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_lines_to_paste_work() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, "'a disk.qcow2' --create 64M");
    for words in [
        "a disk.qcow2: serving 64 MiB (67108864 bytes), qcow2, read-write",
        "64 KiB",
    ] {
        assert!(server.banner.contains(words), "{}", server.banner);
    }
    for program in ["nbdcopy", "qemu-img", "fio"] {
        let line = server
            .example(program)
            .replace("--runtime=10", "--runtime=1");
        scratch.sh(&format!("{line} >/dev/null"));
    }
    scratch.sh("test $(stat -c %s copy.raw) = 67108864; qemu-img check -q copy.qcow2");
    server.signal(Signal::INT);
    let rest = server.ended();
    assert!(
        rest.contains("SIGINT") && rest.contains("everything is on disk"),
        "{rest}"
    );
    assert!(!scratch.path("a disk.qcow2.nbd.sock").exists());
    assert_eq!(scratch.qemu_img("check 'a disk.qcow2'").code, Some(0));
}

#[test]
fn signals_close_the_image_with_what_was_written() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let scratch = Scratch::new();
        let server = Server::start(
            &scratch,
            "a.qcow2 --create 64M --nbd unix:one --nbd localhost:0 --num-queues 2",
        );
        scratch.sh("qemu-io -f raw -c 'write -P 0x5a 1M 3M' 'nbd+unix:///?socket=one' >/dev/null");
        server.signal(signal);
        // A second one changes nothing.
        let _ = kill_process(Pid::from_child(&server.child), signal);
        server.ended();
        assert!(!scratch.path("one").exists());
        assert_eq!(scratch.qemu_img("check a.qcow2").code, Some(0));
        scratch.sh("qemu-io -c 'read -P 0x5a 1M 3M' a.qcow2 | grep -qv failed");
        let info = scratch.urus("info --output=json a.qcow2").stdout;
        assert!(info.contains("\"dirty-flag\": false"), "{info}");
    }
}

#[test]
fn a_closed_standard_output_does_not_stop_it() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 1M");
    let mut child = scratch
        .command(urus(), "-vvv serve a.qcow2")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("urus");
    drop((child.stdout.take(), child.stderr.take()));
    wait_for(&scratch.path("a.qcow2.nbd.sock"));
    scratch.sh("qemu-io -f raw -c 'write 0 4k' 'nbd+unix:///?socket=a.qcow2.nbd.sock' >/dev/null");
    kill_process(Pid::from_child(&child), Signal::TERM).expect("a living server");
    assert_eq!(child.wait().expect("waiting").code(), Some(0));
}

fn wait_for(path: &Path) {
    let begin = Instant::now();
    while !path.exists() {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{}",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn create_opens_what_is_there_if_it_has_the_size() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 3M; cp a.qcow2 before.qcow2");
    let same = Server::start(&scratch, "a.qcow2 --create 3M");
    same.signal(Signal::TERM);
    same.ended();
    let refused = scratch.urus("serve a.qcow2 --create 4M");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("3145728 bytes"), "{refused:?}");
    assert!(!scratch.path("a.qcow2.nbd.sock").exists());
    scratch.sh("cmp a.qcow2 before.qcow2");
    let raw = Server::start(&scratch, "flat.raw --format raw --create 1M");
    raw.signal(Signal::TERM);
    raw.ended();
    scratch.sh("test $(stat -c %s flat.raw) = 1048576");
}

#[test]
fn a_socket_in_the_way() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 1M; echo precious > file");
    let refused = scratch.urus("serve new.qcow2 --create 1M --nbd unix:file");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("file"), "{refused:?}");
    scratch.sh("grep -q precious file; test ! -e new.qcow2");

    // A server that was killed leaves its socket: beside the image it is replaced, elsewhere not.
    for (line, is_default) in [("a.qcow2", true), ("a.qcow2 --nbd unix:chosen", false)] {
        let mut server = Server::start(&scratch, line);
        server.child.kill().expect("a living server");
        server.child.wait().expect("waiting");
        if is_default {
            let again = Server::start(&scratch, line);
            again.signal(Signal::TERM);
            again.ended();
        } else {
            let refused = scratch.urus(&format!("serve {line}"));
            assert_eq!(refused.code, Some(1));
            assert!(refused.stderr.contains("rm "), "{refused:?}");
        }
    }
    // A server that is alive is left in peace.
    let server = Server::start(&scratch, "a.qcow2");
    assert_eq!(scratch.urus("serve a.qcow2").code, Some(1));
    scratch.sh("nbdinfo --size 'nbd+unix:///?socket=a.qcow2.nbd.sock'");
    server.signal(Signal::TERM);
    server.ended();
}

#[test]
fn log_lines_name_the_image() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 1M");
    let mut server = Server::start(&scratch, "-v a.qcow2");
    let mut stderr = server.child.stderr.take().expect("piped");
    server.signal(Signal::TERM);
    server.ended();
    let mut log = String::new();
    stderr.read_to_string(&mut log).expect("text");
    assert!(log.lines().count() >= 2, "{log}");
    for line in log.lines() {
        assert!(line.contains(" INFO a.qcow2: "), "{line}");
        assert!(!line.contains("image="), "{line}");
    }
}

#[test]
fn bench_compares_and_leaves_nothing() {
    let scratch = Scratch::new();
    scratch.sh(
        "qemu-img create -q -f qcow2 a.qcow2 16M; qemu-io -c 'write -P 7 0 16M' a.qcow2 >/dev/null",
    );
    let common = "--seconds 0.6 --pairs 3";
    for flags in [
        "",
        "--mode read --block-size 64k --depth 4 --queues 2",
        "--io blocking --span 1M",
        "--cache none",
    ] {
        let ran = scratch.urus(&format!("bench a.qcow2 {common} {flags}"));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stdout.contains("image / raw"), "{ran:?}");
    }
    let ran = scratch.urus(&format!("bench a.qcow2 {common} --json"));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert!(report["iops-ratio"]["median"].as_f64().expect("a number") > 0.0);
    assert_eq!(report["stored"], 16 << 20);
    scratch.sh("qemu-io -c 'read -P 7 0 16M' a.qcow2 | grep -qv failed");

    let refused = scratch.urus("bench a.qcow2 --mode randwrite");
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("--overwrite"), "{refused:?}");
    let ran = scratch.urus(&format!(
        "bench a.qcow2 {common} --mode randwrite --overwrite"
    ));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(scratch.qemu_img("check a.qcow2").code, Some(0));
    scratch.sh("test $(ls | wc -l) = 1");
}
