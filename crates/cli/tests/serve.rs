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

    // A server that was killed leaves its socket, which is replaced, whoever chose its name.
    for line in [
        "a.qcow2",
        "a.qcow2 --nbd unix:chosen",
        "a.qcow2 --vhost-user unix:vm --control unix:ctl --metrics unix:metrics",
    ] {
        let mut server = Server::start(&scratch, line);
        server.child.kill().expect("a living server");
        server.child.wait().expect("waiting");
        let again = Server::start(&scratch, line);
        again.signal(Signal::TERM);
        again.ended();
    }
    scratch.sh("test ! -e chosen; test ! -e vm; test ! -e unix:vm");
    // A server that is alive is left in peace.
    let server = Server::start(&scratch, "a.qcow2");
    assert_eq!(scratch.urus("serve a.qcow2").code, Some(1));
    scratch.sh("nbdinfo --size 'nbd+unix:///?socket=a.qcow2.nbd.sock'");
    server.signal(Signal::TERM);
    server.ended();
}

#[test]
fn a_socket_of_a_living_server_is_left_alone() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 1M; cp a.qcow2 b.qcow2");
    let server = Server::start(&scratch, "a.qcow2 --nbd unix:one");
    let refused = scratch.urus("serve b.qcow2 --nbd unix:one");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("another server"), "{refused:?}");
    scratch.sh("nbdinfo --size 'nbd+unix:///?socket=one'");
    server.signal(Signal::TERM);
    server.ended();
}

/// `unix:` is the way in which all other sockets are named.
#[test]
fn a_vhost_user_socket_may_be_named_with_unix() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, "a.qcow2 --create 1M --vhost-user unix:vm");
    assert!(scratch.path("vm").exists() && !scratch.path("unix:vm").exists());
    assert!(server.banner.contains("path="), "{}", server.banner);
    server.signal(Signal::TERM);
    server.ended();
    let mut child = scratch
        .command(
            urus(),
            "vhost-user-blk --blk-file a.qcow2 --socket-path unix:vm",
        )
        .spawn()
        .expect("urus");
    wait_for(&scratch.path("vm"));
    kill_process(Pid::from_child(&child), Signal::TERM).expect("a living server");
    assert_eq!(child.wait().expect("waiting").code(), Some(0));
}

/// A server that is told to end says what is true: what was written is nowhere.
#[test]
fn an_image_that_was_deleted_meanwhile_is_not_on_disk() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 base.qcow2 1M; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    let renamed = "mv a.qcow2 b.qcow2";
    for (line, change, words) in [
        (
            "a.qcow2 --create 1M",
            "rm a.qcow2",
            Some("a.qcow2: the image was deleted or replaced"),
        ),
        (
            "a.qcow2 --create 1M",
            "cp base.qcow2 c; mv c a.qcow2",
            Some("a.qcow2: the image was deleted or replaced"),
        ),
        (
            "other.qcow2 --create 1M --image x=a.qcow2",
            "rm a.qcow2",
            Some("a.qcow2: the image was deleted or replaced"),
        ),
        ("top.qcow2", "rm base.qcow2", Some("backing file")),
        ("a.qcow2 --create 1M", renamed, None),
    ] {
        scratch.sh("test -e a.qcow2 || qemu-img create -q -f qcow2 a.qcow2 1M");
        let mut server = Server::start(&scratch, line);
        scratch.sh(change);
        server.signal(Signal::TERM);
        let mut said = String::new();
        server.stdout.read_to_string(&mut said).expect("text");
        let mut complaint = String::new();
        let stderr = server.child.stderr.as_mut().expect("piped");
        stderr.read_to_string(&mut complaint).expect("text");
        let code = server.child.wait().expect("waiting").code();
        match words {
            Some(words) => {
                assert_eq!(code, Some(1), "{change}: {said}{complaint}");
                assert!(complaint.contains(words), "{change}: {complaint}");
                assert!(!said.contains("everything is on disk"), "{change}: {said}");
            }
            None => {
                assert_eq!(code, Some(0), "{change}: {said}{complaint}");
                assert!(said.contains("everything is on disk"), "{change}: {said}");
            }
        }
    }
}

/// Two clusters at the end of a 64 KiB-cluster image whose refcount is 1 and to which nothing refers.
fn leak(scratch: &Scratch, name: &str) {
    let bytes = std::fs::read(scratch.path(name)).expect("an image");
    let field = |at: usize| {
        usize::try_from(u64::from_be_bytes(
            bytes[at..at + 8].try_into().expect("eight"),
        ))
        .expect("fits")
    };
    let clusters = bytes.len().div_ceil(65_536);
    let block = field(field(48));
    scratch.poke(name, block + 2 * clusters, &[0, 1, 0, 1]);
    scratch.sh(&format!("truncate -s {} {name}", (clusters + 2) * 65_536));
}

#[test]
fn leaked_clusters_are_counted_at_opening_and_given_back() {
    let scratch = Scratch::new();
    scratch.sh(
        "qemu-img create -q -f qcow2 a.qcow2 1G; qemu-io -c 'write -P 5 0 1M' a.qcow2 >/dev/null",
    );
    leak(&scratch, "a.qcow2");
    assert_eq!(scratch.qemu_img("check a.qcow2").code, Some(3));
    let said = |line: &str| {
        let mut server = Server::start(&scratch, line);
        let mut stderr = server.child.stderr.take().expect("piped");
        server.signal(Signal::TERM);
        server.ended();
        let mut text = String::new();
        stderr.read_to_string(&mut text).expect("text");
        text
    };
    let told = said("a.qcow2");
    for words in [
        "a.qcow2: 2 clusters (128 KiB) are leaked",
        "--repair leaks",
        "urus check -r leaks",
    ] {
        assert!(told.contains(words), "{told}");
    }
    // Who may not write cannot give them back.
    assert_eq!(said("a.qcow2 --read-only"), "");
    let told = said("a.qcow2 --repair leaks");
    assert!(
        told.contains("2 leaked clusters given back (128 KiB)"),
        "{told}"
    );
    assert_eq!(scratch.qemu_img("check a.qcow2").code, Some(0));
    assert_eq!(said("a.qcow2"), "");
    scratch.sh("qemu-io -c 'read -P 5 0 1M' a.qcow2 | grep -q '^read 1048576'");
}

/// The banner is about the queues, each of which has a ring of its own or has got none; and the cause is named.
#[test]
fn the_banner_says_where_io_uring_was_not_to_be_had() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 1M");
    // The kernel counts rings by user, and not the superuser's.
    scratch.sh(&format!(
        "cp {} urus; chmod 755 urus; chmod 777 .; chmod 666 a.qcow2",
        urus()
    ));
    let as_user = if rustix::process::geteuid().is_root() {
        "setpriv --reuid=54321 --regid=54321 --clear-groups"
    } else {
        ""
    };
    let (mut whole, mut mixed, mut none) = (0, 0, 0);
    for limit in (0..80).map(|step| step * 10_000) {
        let line = format!(
            "--memlock={limit}:{limit} {as_user} ./urus serve a.qcow2 --num-queues 4 --nbd unix:nbd"
        );
        let mut child = scratch
            .command("prlimit", &line)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("prlimit");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut banner = String::new();
        while !banner.contains("Ctrl-C") && stdout.read_line(&mut banner).expect("text") > 0 {}
        let started = banner.contains("Ctrl-C");
        if started {
            kill_process(Pid::from_child(&child), Signal::TERM).expect("a living server");
        }
        let output = child.wait_with_output().expect("waiting");
        let stderr = String::from_utf8(output.stderr).expect("text");
        if !started {
            continue;
        }
        let fell_back = stderr.contains("io_uring is not available");
        let io = banner
            .lines()
            .find(|line| line.contains("  I/O "))
            .expect("a line");
        assert_eq!(
            fell_back,
            io.contains("blocking"),
            "{limit}: {io}\n{stderr}"
        );
        if fell_back {
            let cause = format!("RLIMIT_MEMLOCK, {limit} bytes here");
            assert!(stderr.contains(&cause), "{limit}: {stderr}");
        }
        match (io.contains("io_uring"), fell_back) {
            (true, true) => mixed += 1,
            (true, false) => whole += 1,
            (false, _) => none += 1,
        }
        if whole > 0 {
            break;
        }
    }
    assert!(whole > 0 && mixed > 0 && none > 0, "{whole} {mixed} {none}");
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
