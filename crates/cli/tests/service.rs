//! What a service manager counts on: it is told when the server is ready and when it ends, also by a process that is confined, and the
//! pid file is there in between.

mod common;

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{Child, Stdio};
use std::time::Duration;

use common::{Scratch, urus};
use rustix::process::{Pid, Signal, kill_process};

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn heard(socket: &UnixDatagram) -> String {
    let mut bytes = [0; 4096];
    let len = socket.recv(&mut bytes).expect("a message within a minute");
    String::from_utf8(bytes[..len].to_vec()).expect("text")
}

fn serve(notify: &str, socket: &UnixDatagram, scratch: &Scratch) {
    socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a time");
    let child = scratch
        .command(urus(), "serve disk.qcow2 --create 16M --pid-file pid")
        .env("NOTIFY_SOCKET", notify)
        .stdout(Stdio::null())
        .spawn()
        .expect("urus");
    let mut child = Running(child);
    let ready = heard(socket);
    assert!(ready.starts_with("READY=1\n"), "{ready}");
    assert!(ready.contains("disk.qcow2"), "{ready}");
    let pid = fs::read_to_string(scratch.path("pid")).expect("the pid file");
    assert_eq!(pid, format!("{}\n", child.0.id()));
    kill_process(Pid::from_child(&child.0), Signal::TERM).expect("a living server");
    assert!(heard(socket).starts_with("STOPPING=1\n"));
    assert_eq!(child.0.wait().expect("waiting").code(), Some(0));
    assert!(!scratch.path("pid").exists(), "the pid file stays");
}

#[test]
fn the_manager_is_told_at_its_path() {
    let scratch = Scratch::new();
    let path = scratch.path("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    serve(path.to_str().expect("text"), &socket, &scratch);
}

#[test]
fn the_manager_is_told_at_its_abstract_name() {
    let scratch = Scratch::new();
    let name = format!("urus-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let socket = UnixDatagram::bind_addr(&address).expect("a socket");
    serve(&format!("@{name}"), &socket, &scratch);
}

#[test]
fn a_pid_file_that_cannot_be_written_is_told() {
    let scratch = Scratch::new();
    let ran = scratch.urus("serve disk.qcow2 --create 16M --pid-file missing/pid");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("missing/pid"), "{ran:?}");
    let ran = scratch.urus("check disk.qcow2");
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

/// Two servers with one pid file: it belongs to the one that wrote it last, and stays until that ends.
#[test]
fn a_pid_file_is_removed_by_its_own_server_only() {
    let scratch = Scratch::new();
    let first = common::Server::start(&scratch, "a.qcow2 --create 1M --pid-file pid");
    let second = common::Server::start(&scratch, "b.qcow2 --create 1M --pid-file pid");
    let number = || fs::read_to_string(scratch.path("pid")).expect("the pid file");
    let expected = format!("{}\n", second.0.id());
    assert_eq!(number(), expected);
    first.end();
    assert_eq!(number(), expected);
    second.end();
    assert!(!scratch.path("pid").exists(), "the pid file stays");
    // Nor is one removed that somebody has made since.
    let server = common::Server::start(&scratch, "a.qcow2 --pid-file pid");
    scratch.sh("rm pid; echo 1 >pid");
    server.end();
    assert_eq!(number(), "1\n");
    // What is no file of ours to replace is written to.
    let server = common::Server::start(&scratch, "a.qcow2 --pid-file /dev/null");
    server.end();
    scratch.sh("test -c /dev/null; test $(ls | grep -c pid) = 1");
}
