//! A server under pressure: no memory left, no descriptors left, clients that say nothing. What cannot be served is refused; the server
//! stays, and so does all that other clients have written.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, Rlimit, prlimit};
use urus_tests::nbd::{Client, Command, Receiver, Sender, connect};
use urus_tests::served::Serve;
use urus_tests::{Driver, MIB, Scratch, Served, qemu, urus};

/// No memory, as it travels.
const NO_MEMORY: u32 = 12;

/// Allows the server so many bytes more than it has of the address space, or of data; all it likes, for None.
fn allow(served: &Served, resource: Resource, more: Option<u64>) {
    let field = match resource {
        Resource::As => "VmSize:",
        _ => "VmData:",
    };
    let status = format!("/proc/{}/status", served.pid().as_raw_nonzero());
    let status = std::fs::read_to_string(status).expect("reading the status");
    let size = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = size.and_then(|size| size.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let has = kib.expect("a size") << 10;
    let limit = Rlimit {
        current: more.map(|more| has + more),
        maximum: None,
    };
    prlimit(Some(served.pid()), resource, limit).expect("setting a limit");
}

/// Asks for reads of so many bytes on one connection, all at once, and takes the replies. How many were refused for want of memory.
fn read_all_at_once(socket: &Path, requests: u64, bytes: u64) -> usize {
    let (mut sender, mut receiver, size) = connect(socket).expect("connecting");
    let mut refused = 0;
    let asking = std::thread::spawn(move || {
        for cookie in 0..requests {
            let offset = cookie * bytes % (size - bytes);
            sender
                .send(Command::Read, cookie, offset, bytes, &[])
                .expect("asking");
        }
        sender
    });
    for _ in 0..requests {
        let reply = receiver.reply().expect("a reply");
        match reply.error {
            0 => drop(receiver.bytes(bytes).expect("what was read")),
            NO_MEMORY => refused += 1,
            other => panic!("error {other} is no want of memory"),
        }
    }
    asking.join().expect("asking").hang_up();
    refused
}

/// Six clients read 16 MiB at a time from a server that may take 24 MiB more than it has. One failed allocation used to abort the server,
/// and with it went what others had not flushed.
#[test]
fn a_server_without_memory_refuses_and_stays() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "", 256 * MIB);
        let mut served = Served::start(&image, driver);
        let mut other = Client::connect(&served.socket()).expect("connecting");
        let flushed = vec![0x11; 1 << 20];
        let unflushed = vec![0x22; 1 << 20];
        let write = Command::Write { fua: false };
        other.ask(write, 0, MIB, &flushed).expect("a write");
        other.ask(Command::Flush, 0, 0, &[]).expect("a flush");
        other
            .ask(write, 100 * MIB, MIB, &unflushed)
            .expect("a write");

        allow(&served, Resource::As, Some(24 * MIB));
        let refused = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let more = read_all_at_once(&served.socket(), 8, 16 * MIB);
                    refused.fetch_add(more, Ordering::Relaxed);
                });
            }
        });
        assert!(
            refused.into_inner() > 0,
            "{driver:?}: 24 MiB were enough for 6 times 16"
        );
        assert!(served.is_running(), "{driver:?}: {}", served.log());

        // What the others have written is there, and can be made durable, with no more memory than before.
        let read = other.ask(Command::Read, 100 * MIB, MIB, &[]);
        assert!(read.expect("a read") == unflushed, "{driver:?}");
        other.ask(Command::Flush, 0, 0, &[]).expect("a flush");
        allow(&served, Resource::As, None);
        assert_eq!(read_all_at_once(&served.socket(), 4, 32 * MIB), 0);
        served.kill();
        qemu::io_file(&image, &["read -P 0x11 0 1M", "read -P 0x22 100M 1M"]);
        qemu::assert_no_errors(&image);
    }
}

/// The same without a byte to spare, and with many requests of every kind.
#[test]
fn a_server_without_a_byte_to_spare_refuses_and_stays() {
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "cluster_size=4k", 256 * MIB);
        let mut served = Served::start(&image, driver);
        let mut other = Client::connect(&served.socket()).expect("connecting");
        let write = Command::Write { fua: false };
        let bytes = vec![0x33; 4 << 20];
        other.ask(write, 8 * MIB, 4 * MIB, &bytes).expect("a write");
        let besiegers: Vec<_> = (0..24)
            .map(|_| connect(&served.socket()).expect("connecting"))
            .collect();
        allow(&served, Resource::Data, Some(0));
        let refused = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for (client, (sender, receiver, _)) in (0..).zip(besiegers) {
                let refused = &refused;
                scope.spawn(move || {
                    refused.fetch_add(besiege(sender, receiver, client), Ordering::Relaxed);
                });
            }
        });
        assert!(refused.into_inner() > 0, "{driver:?}: there was memory");
        assert!(served.is_running(), "{driver:?}: {}", served.log());
        let log = served.log();
        assert!(log.lines().count() < 200, "{driver:?}: {log}");
        other.ask(Command::Flush, 0, 0, &[]).expect("a flush");
        allow(&served, Resource::Data, None);
        let read = other.ask(Command::Read, 8 * MIB, 4 * MIB, &[]);
        assert!(read.expect("a read") == bytes, "{driver:?}");
        drop(other);
        served.stop();
        qemu::assert_clean(&image);
    }
}

/// Small and large requests of every kind, of which each may be refused for want of memory; how many were. (Away from what others have
/// written.)
fn besiege(mut sender: Sender, mut receiver: Receiver, client: u64) -> usize {
    let mut refused = 0;
    let asked: Vec<Command> = (0..48)
        .map(|turn| match (turn + client) % 6 {
            0 => Command::Read,
            1 => Command::Write { fua: turn % 4 == 0 },
            2 => Command::Zero {
                fua: false,
                keep: turn % 4 == 0,
            },
            3 => Command::Trim,
            4 => Command::Write { fua: false },
            _ => Command::Flush,
        })
        .collect();
    let commands = asked.clone();
    let asking = std::thread::spawn(move || {
        let bytes = vec![0x44; 1 << 20];
        for (cookie, command) in (0..).zip(commands) {
            let offset = 32 * MIB + client * 8 * MIB + cookie * 12_345;
            let len = match command {
                Command::Flush => 0,
                Command::Write { fua: false } => MIB,
                _ => 70_000,
            };
            let payload = match command {
                Command::Write { .. } => &bytes[..usize::try_from(len).expect("short")],
                _ => &[],
            };
            let offset = if len == 0 { 0 } else { offset };
            let sent = sender.send(command, cookie, offset, len, payload);
            sent.expect("asking");
        }
    });
    for _ in &asked {
        let reply = receiver.reply().expect("a reply");
        assert!([0, NO_MEMORY].contains(&reply.error), "{reply:?}");
        refused += usize::from(reply.error == NO_MEMORY);
        let command = asked[usize::try_from(reply.cookie).expect("a number of ours")];
        if command == Command::Read && reply.error == 0 {
            receiver.bytes(70_000).expect("what was read");
        }
    }
    asking.join().expect("asking");
    refused
}

/// A server with a control socket and metrics.
fn reachable(image: &Path, sockets: &Path) -> Serve {
    let at = |name: &str| format!("unix:{}", sockets.join(name).display());
    let serve = Serve::new(image, Driver::IoUring);
    let serve = serve.arg("--control").arg(at("control"));
    serve.arg("--metrics").arg(at("metrics"))
}

/// Control and metrics answer.
fn assert_reachable(sockets: &Path) {
    let stats = urus().words("ctl stats").arg(sockets.join("control"));
    stats.ok();
    let mut scraper = UnixStream::connect(sockets.join("metrics")).expect("connecting");
    scraper
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: urus\r\n\r\n")
        .expect("asking");
    let mut text = String::new();
    scraper.read_to_string(&mut text).expect("an answer");
    assert!(text.contains("urus_"), "{text}");
}

/// More clients than there can be files: as many as fit are served, the others turned away, and control and metrics are within reach. What
/// does not fit is said at the start. (It used to be a line in the log for each tenth of a second, and nobody could get in.)
#[test]
fn more_clients_than_descriptors() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", 16 * MIB);
    let sockets = tempfile::tempdir().expect("a directory for sockets");
    let serve = reachable(&image, sockets.path()).with("--max-connections 2000");
    let served = serve.with_files(256, 256).start();
    let warned = "--max-connections 2000 needs";
    assert!(served.log().contains(warned), "{}", served.log());
    let mut first = Client::connect(&served.socket()).expect("connecting");
    let crowd: Vec<UnixStream> = (0..400)
        .map(|_| UnixStream::connect(served.socket()).expect("connecting"))
        .collect();
    for _ in 0..3 {
        assert_reachable(sockets.path());
    }
    first.ask(Command::Read, 0, 4096, &[]).expect("a read");
    let greeted = crowd
        .into_iter()
        .map(|mut client| client.read(&mut [0; 18]).unwrap_or(0))
        .filter(|count| *count > 0)
        .count();
    assert!((100..256).contains(&greeted), "{greeted} were greeted");
    drop(first);
    let log = served.stop();
    assert!(log.lines().count() < 40, "{log}");
}

/// A soft limit below the hard one is no limit.
#[test]
fn the_soft_limit_of_descriptors_is_raised() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", 16 * MIB);
    let sockets = tempfile::tempdir().expect("a directory for sockets");
    let serve = reachable(&image, sockets.path()).with("--max-connections 500");
    let served = serve.with_files(128, 4096).start();
    let clients: Vec<Client> = (0..300)
        .map(|_| Client::connect(&served.socket()).expect("connecting"))
        .collect();
    assert_reachable(sockets.path());
    assert!(!served.log().contains("WARN"), "{}", served.log());
    drop(clients);
    served.stop();
}

/// No descriptor is left at all, for whatever reason: control and metrics have some kept back, clients wait, and the log does not fill the disk.
#[test]
fn without_descriptors_control_is_within_reach() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", 16 * MIB);
    let sockets = tempfile::tempdir().expect("a directory for sockets");
    let served = reachable(&image, sockets.path()).start();
    let mut first = Client::connect(&served.socket()).expect("connecting");
    let open = format!("/proc/{}/fd", served.pid().as_raw_nonzero());
    let open = std::fs::read_dir(open).expect("listing").count() as u64;
    let limit = |current| Rlimit {
        current: Some(current),
        maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
    };
    let before = prlimit(Some(served.pid()), Resource::Nofile, limit(open)).expect("a limit");
    let crowd: Vec<UnixStream> = (0..50)
        .map(|_| UnixStream::connect(served.socket()).expect("connecting"))
        .collect();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    for _ in 0..3 {
        assert_reachable(sockets.path());
        first.ask(Command::Read, 0, 4096, &[]).expect("a read");
    }
    let log = served.log();
    assert!(log.contains("cannot accept a client"), "{log}");
    assert!(log.lines().count() < 30, "{log}");
    prlimit(Some(served.pid()), Resource::Nofile, before).expect("a limit");
    for mut client in crowd {
        assert_eq!(client.read(&mut [0; 18]).expect("a greeting"), 18);
    }
    drop(first);
    served.stop();
}

/// A control group of the server's own, for its pressure; removed with it.
struct Group(std::path::PathBuf);

impl Group {
    /// None where there are none, or none may be made.
    fn around(served: &Served) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
        let mount = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields.get(2) == Some(&"cgroup2")).then(|| fields[1].to_owned())
        })?;
        let pid = served.pid().as_raw_nonzero();
        let group = Self(Path::new(&mount).join(format!("urus-test-{pid}")));
        std::fs::create_dir(&group.0).ok()?;
        let moved = std::fs::write(group.0.join("cgroup.procs"), pid.to_string());
        moved.ok().map(|()| group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A server that waits for its clients waits for no disk. Before Linux could be told, an idle server counted as one task that is held up by
/// I/O all the time. (Where no control group can be made, this looks at the whole machine, and is content with a quiet moment.)
#[test]
fn an_idle_server_shows_no_pressure() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", 16 * MIB);
    let served = Served::start(&image, Driver::IoUring);
    let mut clients: Vec<Client> = (0..4)
        .map(|_| Client::connect(&served.socket()).expect("connecting"))
        .collect();
    let group = Group::around(&served);
    let file = group.as_ref().map_or_else(
        || "/proc/pressure/io".into(),
        |group| group.0.join("io.pressure"),
    );
    let stalled = || {
        let text = std::fs::read_to_string(&file).expect("pressure stall information");
        let total = text
            .lines()
            .next()
            .and_then(|line| line.split("total=").nth(1));
        let total = total.and_then(|total| total.parse::<u64>().ok());
        std::time::Duration::from_micros(total.expect("a total"))
    };
    // They have asked for something, and are waited for again.
    for client in &mut clients {
        client.ask(Command::Read, 0, 4096, &[]).expect("a read");
    }
    let second = std::time::Duration::from_secs(1);
    let least = (0..8)
        .map(|_| {
            let before = stalled();
            std::thread::sleep(second);
            stalled().saturating_sub(before)
        })
        .min();
    assert!(
        least < Some(second / 4),
        "held up for {least:?} of each second"
    );
    drop(clients);
    served.stop();
    drop(group);
}
