//! A served image's process is confined, whichever driver it uses, and says so to the kernel: every thread has a filter and cannot gain
//! privileges. What a server is for goes on working then: clients that come late, several at once, decompression, the socket's removal at
//! the end. (That what is forbidden is refused is tested in the crate `urus-sandbox`.)

mod common;

use std::fs;

use common::{Scratch, Server};

/// What the kernel says of each thread: (filters, no new privileges).
fn threads(server: &Server) -> Vec<(u64, u64)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.0.id())).expect("a process");
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
    let seen = threads(&server);
    assert!(seen.len() > 4, "{seen:?}");
    for (filters, no_new_privileges) in &seen {
        assert!(*filters > inherited(), "{seen:?}");
        assert_eq!(*no_new_privileges, 1, "{seen:?}");
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
    for (filters, no_new_privileges) in threads(&server) {
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
    for (filters, _) in threads(&server) {
        assert_eq!(filters, inherited());
    }
    server.end();
}
