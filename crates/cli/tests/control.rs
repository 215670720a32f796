//! A served image under control (`--control`, `urus ctl`): what is asked happens, to the image that is meant, and is durable when it is answered; a
//! pause neither loses a request nor keeps the server from ending; a client that breaks the rules costs the server nothing.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Ran, Scratch, Server};
use rustix::process::{Pid, Signal, kill_process};

const NBD: &str = "'nbd+unix:///?socket=nbd'";

/// `urus serve` with its sockets `nbd` and `ctl`.
fn start(scratch: &Scratch, line: &str) -> Server {
    Server::start(
        scratch,
        &format!("{line} --nbd unix:nbd --control unix:ctl"),
    )
}

fn ctl(scratch: &Scratch, line: &str) -> Ran {
    scratch.urus(&format!("ctl {line}"))
}

/// What must be done, and is answered with nothing.
fn done(scratch: &Scratch, line: &str) {
    let ran = ctl(scratch, line);
    assert_eq!(
        (ran.code, &*ran.stdout, &*ran.stderr),
        (Some(0), "", ""),
        "{line}"
    );
}

/// What must be refused, for that reason.
fn refused(scratch: &Scratch, line: &str, reason: &str) {
    let ran = ctl(scratch, line);
    assert_eq!(ran.code, Some(1), "{line}: {ran:?}");
    assert!(
        ran.stderr.starts_with("urus: ") && ran.stderr.contains(reason),
        "{line}: {ran:?}"
    );
}

fn stats(scratch: &Scratch, line: &str) -> serde_json::Value {
    let ran = ctl(scratch, &format!("stats --output json ctl {line}"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    serde_json::from_str(&ran.stdout).expect("JSON")
}

/// qemu-io over NBD, not waited for.
fn writer(scratch: &Scratch, command: &str) -> Child {
    scratch
        .command(
            "qemu-io",
            &format!("-f raw -c '{command}' -c flush 'nbd+unix:///?socket=nbd'"),
        )
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io")
}

/// Requests are held, not answered: half a second tells, and a second look that nothing is there.
fn is_waiting(child: &mut Child) -> bool {
    std::thread::sleep(Duration::from_millis(500));
    child.try_wait().expect("a child").is_none()
}

fn wrote(child: Child) {
    let output = child.wait_with_output().expect("waiting");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("wrote"),
        "{output:?}"
    );
}

fn commands_on(io: &str) {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 data.qcow2 32M");
    let server = start(
        &scratch,
        &format!("disk.qcow2 --create 64M --image data=data.qcow2 --io {io}"),
    );
    let mode = scratch.path("ctl").symlink_metadata().expect("a socket");
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);

    done(&scratch, "resize ctl 1G");
    done(&scratch, "resize unix:ctl +1G");
    scratch.sh(&format!(
        "qemu-img info --output json -f raw {NBD} | grep -q '\"virtual-size\": 2147483648'"
    ));
    done(&scratch, "resize --image data ctl 48M");
    assert_eq!(stats(&scratch, "")["size"], 2_u64 << 30);
    assert_eq!(stats(&scratch, "--image data")["size"], 48 << 20);
    refused(&scratch, "resize ctl +7E", "");
    refused(&scratch, "resize ctl 1M", "cannot shrink");
    refused(
        &scratch,
        "flush --image moon ctl",
        "'moon'; there are '', 'data'",
    );

    let allocated = || stats(&scratch, "")["allocated-clusters"].as_u64();
    let before = allocated().expect("a number");
    scratch.sh(&format!(
        "qemu-io -f raw -c 'write -P 7 1G 64k' {NBD} >/dev/null"
    ));
    // The cluster and its L2 table.
    assert_eq!(allocated(), Some(before + 2));
    let queues = stats(&scratch, "")["queues"].clone();
    let written = |queue: &serde_json::Value| queue["write"]["bytes"].as_u64().unwrap_or(0);
    let queues = queues.as_array().expect("a list");
    assert_eq!(
        queues.iter().map(written).sum::<u64>(),
        64 << 10,
        "{queues:?}"
    );
    let before = stats(&scratch, "")["commits"].as_u64().expect("a number");
    done(&scratch, "flush ctl");
    assert!(stats(&scratch, "")["commits"].as_u64().expect("a number") > before);
    // Durable: the file alone is the disk.
    scratch.sh("cp disk.qcow2 flushed.qcow2; qemu-io -c 'read -P 7 1G 64k' flushed.qcow2 | grep -q '^read 65536'");

    let human = ctl(&scratch, "stats ctl").stdout;
    assert!(
        human.contains("size: 2147483648\n") && human.contains("paused: false\n"),
        "{human}"
    );
    let log = server.end();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    assert!(!scratch.path("ctl").exists());
    scratch.sh("qemu-img check -q disk.qcow2; qemu-img check -q data.qcow2");
}

#[test]
fn commands_do_what_they_say() {
    commands_on("io_uring");
}

#[test]
fn commands_do_what_they_say_with_blocking_calls() {
    commands_on("blocking");
}

/// Relative sizes are resolved where the size is known, one after the other: what is added at once adds up.
#[test]
fn what_is_added_at_once_adds_up() {
    const CLIENTS: u64 = 6;
    const ROUNDS: u64 = 5;
    let scratch = Scratch::new();
    let server = start(&scratch, "disk.qcow2 --create 64M");
    for _ in 0..ROUNDS {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scratch
                    .command(common::urus(), "ctl resize ctl +1M")
                    .spawn()
                    .expect("urus")
            })
            .collect();
        for mut client in clients {
            assert_eq!(client.wait().expect("waiting").code(), Some(0));
        }
    }
    let size = (64 + CLIENTS * ROUNDS) << 20;
    assert_eq!(stats(&scratch, "")["size"], size);
    // The result tells the size that came of it.
    let mut stream = UnixStream::connect(scratch.path("ctl")).expect("a server");
    stream
        .write_all(b"{\"version\":1,\"command\":{\"resize\":{\"add\":512}}}\n")
        .expect("writing");
    let mut line = String::new();
    BufReader::new(&stream)
        .read_line(&mut line)
        .expect("a line");
    let reply: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(reply["result"]["size"], size + 512);
    server.end();
    scratch.sh("qemu-img check -q disk.qcow2");
}

#[test]
fn a_pause_holds_requests_and_leaves_a_whole_file() {
    let scratch = Scratch::new();
    let server = start(&scratch, "disk.qcow2 --create 64M");
    wrote(writer(&scratch, "write -P 1 0 3M"));
    done(&scratch, "pause ctl");
    // Again: it is so already.
    done(&scratch, "pause ctl");
    assert_eq!(stats(&scratch, "")["paused"], true);
    let mut waiting = writer(&scratch, "write -P 2 1M 1M");
    assert!(is_waiting(&mut waiting));
    scratch.sh("cp disk.qcow2 copy.qcow2; qemu-img check -q copy.qcow2; \
         qemu-io -c 'read -P 1 0 3M' copy.qcow2 | grep -q '^read 3145728'");
    refused(&scratch, "resize ctl 1G", "resume it first");
    done(&scratch, "resume ctl");
    wrote(waiting);
    done(&scratch, "resume ctl");
    server.end();
    scratch.sh("qemu-io -c 'read -P 2 1M 1M' -c 'read -P 1 2M 1M' disk.qcow2 | grep -c '^read 1048576' | grep -qx 2");
}

#[test]
fn a_server_that_is_paused_ends_and_answers_what_has_waited() {
    let scratch = Scratch::new();
    let server = start(&scratch, "disk.qcow2 --create 64M");
    done(&scratch, "pause ctl");
    let mut waiting = writer(&scratch, "write -P 3 0 1M");
    assert!(is_waiting(&mut waiting));
    let begin = Instant::now();
    server.end();
    assert!(begin.elapsed() < Duration::from_secs(20));
    // The write that was held was done; a client that sends its flush after the end may be cut off.
    let output = waiting.wait_with_output().expect("waiting");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("wrote 1048576"), "{text}");
    scratch.sh("qemu-img check -q disk.qcow2; qemu-io -c 'read -P 3 0 1M' disk.qcow2 | grep -q '^read 1048576'");
}

#[test]
fn another_process_may_write_between_pause_and_resume() {
    let scratch = Scratch::new();
    let server = start(&scratch, "disk.qcow2 --create 64M");
    wrote(writer(&scratch, "write -P 1 0 1M"));
    done(&scratch, "pause --release-locks ctl");
    scratch.sh("qemu-io -c 'write -P 4 512k 4M' disk.qcow2 >/dev/null");
    done(&scratch, "resume ctl");
    scratch.sh(&format!(
        "qemu-io -f raw -c 'read -P 1 0 512k' -c 'read -P 4 512k 4M' {NBD} | grep -c '^read' | grep -qx 2"
    ));
    server.end();
    scratch.sh("qemu-img check -q disk.qcow2");
}

#[test]
fn a_server_whose_image_another_process_has_taken_ends_and_leaves_it_alone() {
    let scratch = Scratch::new();
    let server = start(&scratch, "disk.qcow2 --create 64M");
    wrote(writer(&scratch, "write -P 1 0 1M"));
    done(&scratch, "pause --release-locks ctl");
    let mut waiting = writer(&scratch, "write -P 9 0 64k");
    assert!(is_waiting(&mut waiting));
    let mut taker = scratch
        .command("qemu-nbd", "-f qcow2 -t disk.qcow2 -k")
        .arg(scratch.path("taken"))
        .spawn()
        .expect("qemu-nbd");
    let begin = Instant::now();
    while !scratch.path("taken").exists() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    refused(&scratch, "resume ctl", "locked by another process");
    scratch.sh("qemu-io -f raw -c 'write -P 5 0 8M' -c flush 'nbd+unix:///?socket=taken' >/dev/null; cp disk.qcow2 before.qcow2");
    server.end();
    // It has failed, not been lost in silence.
    let output = waiting.wait_with_output().expect("waiting");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("wrote"), "{text}");
    scratch.sh("cmp disk.qcow2 before.qcow2");
    kill_process(Pid::from_child(&taker), Signal::TERM).expect("a living server");
    taker.wait().expect("waiting");
    scratch.sh("qemu-img check -q disk.qcow2; qemu-io -c 'read -P 5 0 8M' disk.qcow2 | grep -q '^read 8388608'");
}

#[test]
fn sockets_that_are_none_are_told() {
    let scratch = Scratch::new();
    refused(&scratch, "flush nowhere", "--control");
    scratch.sh("echo precious >file");
    refused(&scratch, "flush file", "file: ");
    let server = start(&scratch, "disk.qcow2 --create 1M");
    // A second server is refused before it has changed anything.
    let ran = scratch.urus("serve other.qcow2 --create 1M --control unix:ctl");
    assert!(
        ran.code == Some(1) && ran.stderr.contains("another server"),
        "{ran:?}"
    );
    assert!(!scratch.path("other.qcow2").exists());
    drop(server);
    refused(&scratch, "flush ctl", "no server listens there");
    // What the killed one left is replaced.
    start(&scratch, "disk.qcow2").end();
    let ran = scratch.urus("serve disk.qcow2 --control 127.0.0.1:1");
    assert!(
        ran.code == Some(2) && ran.stderr.contains("unix:PATH"),
        "{ran:?}"
    );
}

#[test]
fn clients_without_manners_cost_nothing() {
    let scratch = Scratch::new();
    let server = start(&scratch, "disk.qcow2 --create 1M");
    let connect = || {
        let stream = UnixStream::connect(scratch.path("ctl")).expect("a server");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a time");
        stream
    };
    let reply = |stream: &UnixStream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("a line");
        line
    };
    let mut rude = connect();
    rude.write_all(b"hello\n").expect("writing");
    assert!(reply(&rude).contains("\"request\""));
    // The connection goes on.
    rude.write_all(b"{\"version\":7}\n").expect("writing");
    assert!(reply(&rude).contains("\"version\""));
    // One line without end.
    rude.write_all(&[b'['; 4096]).expect("writing");
    assert!(reply(&rude).contains("4096"));
    let mut rest = Vec::new();
    let _ = rude.read_to_end(&mut rest);
    assert_eq!(rest, b"", "and it is closed");
    // One who asks and does not listen.
    let mut deaf = connect();
    deaf.write_all(&b"{\"version\":1,\"command\":{\"stats\":{}}}\n".repeat(3))
        .expect("writing");
    drop(deaf);
    // Each has a place for sure, also where those before give theirs back late.
    let admitted = || loop {
        let mut stream = connect();
        let _ = stream.write_all(b"{\"version\":1,\"command\":{\"stats\":{}}}\n");
        if reply(&stream).contains("\"result\"") {
            return stream;
        }
    };
    let idle: Vec<_> = (0..8).map(|_| admitted()).collect();
    refused(&scratch, "flush ctl", "8 control connections");
    drop(idle);
    let begin = Instant::now();
    while ctl(&scratch, "flush ctl").code != Some(0) {
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    // Half a request keeps nobody from ending.
    let mut half = connect();
    half.write_all(b"{\"version\":1,").expect("writing");
    server.end();
}

/// After a failed sync nothing that is tried again can succeed, whatever failed it: the advice is not to free space and retry.
#[test]
fn a_sync_that_finds_no_space_says_what_helps() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 disk.qcow2 64M");
    let line = format!(
        "-f -qq -o trace -e trace=fdatasync -e inject=fdatasync:error=ENOSPC:when=2+ {} serve disk.qcow2 --io blocking --no-sandbox \
         --nbd unix:nbd --control unix:ctl --pid-file pid",
        common::urus()
    );
    let mut command = scratch.command("strace", &line);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut tracer = command.spawn().expect("strace");
    let mut lines = BufReader::new(tracer.stdout.as_mut().expect("piped")).lines();
    assert!(lines.any(|line| line.expect("text").contains("Ctrl-C")));
    scratch.sh("qemu-io -f raw -c 'write 0 64k' 'nbd+unix:///?socket=nbd' >/dev/null || true");
    for word in ["flush ctl", "flush ctl"] {
        let ran = ctl(&scratch, word);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains("reopen it"), "{ran:?}");
        assert!(!ran.stderr.contains("retry"), "{ran:?}");
    }
    assert_eq!(stats(&scratch, "")["poisoned"], true);
    scratch.sh("kill $(cat pid)");
    let output = tracer.wait_with_output().expect("waiting");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let checked = scratch.qemu_img("check disk.qcow2").code;
    assert!(matches!(checked, Some(0 | 3)), "{checked:?}");
}
