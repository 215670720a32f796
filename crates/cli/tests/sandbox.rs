//! A served image's process is confined, whichever driver it uses, and says so to the kernel: every thread has a filter and cannot gain
//! privileges. What a server is for goes on working then: clients that come late, several at once, decompression, the socket's removal at
//! the end. (That what is forbidden is refused is tested in the crate `urus-sandbox`.)

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

use common::{Scratch, urus};
use rustix::process::{Pid, Signal, kill_process};

/// `urus serve` that has said that it is ready.
struct Server(Child);

impl Server {
    fn start(scratch: &Scratch, line: &str) -> Self {
        let mut child = scratch
            .command(urus(), &format!("-v serve {line}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("urus");
        let mut lines = BufReader::new(child.stdout.as_mut().expect("piped")).lines();
        assert!(lines.any(|line| line.expect("text").contains("Ctrl-C")));
        Self(child)
    }

    /// What the kernel says of each thread: (filters, no new privileges).
    fn threads(&self) -> Vec<(u64, u64)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0.id())).expect("a process");
        tasks
            .map(|task| {
                let status = task.expect("a thread").path().join("status");
                let status = fs::read_to_string(status).expect("a thread");
                (
                    number(&status, "Seccomp_filters:"),
                    number(&status, "NoNewPrivs:"),
                )
            })
            .collect()
    }

    /// SIGTERM; it must end well. Its log.
    fn end(mut self) -> String {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("a living server");
        let status = self.0.wait().expect("waiting");
        let mut log = String::new();
        let stderr = self.0.stderr.as_mut().expect("piped");
        stderr.read_to_string(&mut log).expect("text");
        assert_eq!(status.code(), Some(0), "{log}");
        log
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn number(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line.unwrap_or_else(|| panic!("{name} {status}")).trim();
    value.parse().expect("a number")
}

/// The filters of this process, which those that it starts inherit.
fn inherited() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    number(&status, "Seccomp_filters:")
}

fn confined(io: &str) {
    let scratch = Scratch::new();
    // Compressed clusters are read on threads that start when they are needed.
    scratch.sh("yes 0123456789abcdef | head -c 16M > plain.raw");
    scratch.sh("qemu-img convert -c -O qcow2 plain.raw disk.qcow2");
    scratch.sh("mkdir sockets");
    let server = Server::start(
        &scratch,
        &format!(
            "disk.qcow2 --io {io} --nbd unix:sockets/nbd --nbd 127.0.0.1:0 --vhost-user sockets/vm"
        ),
    );
    let threads = server.threads();
    assert!(threads.len() > 4, "{threads:?}");
    for (filters, no_new_privileges) in &threads {
        assert!(*filters > inherited(), "{threads:?}");
        assert_eq!(*no_new_privileges, 1, "{threads:?}");
    }
    let nbd = "'nbd+unix:///?socket=sockets/nbd'";
    scratch.sh(&format!("qemu-img compare -f raw -F raw {nbd} plain.raw"));
    scratch.sh(&format!(
        "for client in 1 2 3; do qemu-io -f raw -c \"write -P $client ${{client}}M 1M\" -c 'write -z 8M 1M' \
         -c 'discard 9M 1M' -c flush {nbd} & done; wait"
    ));
    for client in 1..=3 {
        scratch.sh(&format!(
            "qemu-io -f raw -r -c 'read -P {client} {client}M 1M' {nbd} | grep -q '^read 1048576'"
        ));
    }
    // Those that have come since as well.
    for (filters, no_new_privileges) in server.threads() {
        assert!(filters > inherited());
        assert_eq!(no_new_privileges, 1);
    }
    let log = server.end();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
    assert!(!scratch.path("sockets/nbd").exists(), "{log}");
    assert!(!scratch.path("sockets/vm").exists(), "{log}");
    scratch.sh("qemu-img check -q disk.qcow2");
}

#[test]
fn a_server_with_io_uring_is_confined() {
    confined("io_uring");
}

#[test]
fn a_server_with_blocking_calls_is_confined() {
    confined("blocking");
}

#[test]
fn confinement_can_be_turned_off() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, "disk.qcow2 --create 1M --no-sandbox");
    for (filters, _) in server.threads() {
        assert_eq!(filters, inherited());
    }
    server.end();
}
