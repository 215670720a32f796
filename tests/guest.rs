//! A real guest: Linux under QEMU, whose disk is `urus serve --vhost-user`.
//!
//! Guards what no client of ours can show: that the kernel's own driver likes the device, on two queues, that its
//! flushes really arrive, that a file system made, filled and left there is whole for e2fsck and debugfs on the host, and that one
//! whose machine dies amid writing is whole after its journal was replayed.
//!
//! No KVM is needed: QEMU interprets (TCG), which takes some ten seconds a boot. The kernel is Debian's, downloaded with apt-get and
//! never installed; the guest is an initial RAM disk of busybox and a few of this machine's own programs.

#[path = "guest_root.rs"]
mod root;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use urus_tests::program::urus_path;
use urus_tests::{MIB, Scratch, program, qemu};

const SIZE: u64 = 96 * MIB;

/// A boot and all of its work, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(240);

/// Modules that the guest needs, in this order; a kernel that has one built in has no file for it.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "jbd2",
    "ext4",
];

/// Programs of this machine that go into the guest, with their libraries: busybox has lesser ones.
const PROGRAMS: &[&str] = &[
    "/usr/sbin/blkdiscard",
    "/usr/sbin/mke2fs",
    "/usr/bin/dd",
    "/usr/bin/cmp",
];

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /etc
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/usr/sbin:/usr/bin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# In the order of Debian 12's kernel; where another one's is different, what was missing is there in the next round.
for round in 1 2 3; do for module in $(cat /modules/order); do insmod /modules/$module 2>/dev/null; done; done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries+1)); done
say() { echo "URUS $*"; }
must() { name=$1; shift; if "$@"; then say "$name ok"; else say "$name FAILED"; poweroff -f; fi; }
. /script
say end
poweroff -f
"#;

/// All that a disk is for. (Programs by their paths: busybox takes its own first, which have fewer options.)
const EVERYTHING: &str = r#"
say queues $(ls /sys/block/vda/mq | wc -l)
say cache $(cat /sys/block/vda/cache_type)
say serial $(cat /sys/block/vda/serial)
say sectors $(cat /sys/block/vda/size)
say base $(/usr/bin/dd if=/dev/vda bs=1M skip=64 count=8 iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1)
/usr/bin/dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
must write /usr/bin/dd if=/tmp/data of=/dev/vda bs=256k seek=64 oflag=direct conv=notrunc,fsync
/usr/bin/dd if=/dev/vda of=/tmp/back bs=256k skip=64 count=32 iflag=direct 2>/dev/null
must read /usr/bin/cmp /tmp/data /tmp/back
/usr/bin/dd if=/dev/zero of=/tmp/zero bs=1M count=4 2>/dev/null
must discard /usr/sbin/blkdiscard -o 16M -l 4M /dev/vda
/usr/bin/dd if=/dev/vda of=/tmp/back bs=1M skip=16 count=4 iflag=direct 2>/dev/null
must discarded /usr/bin/cmp /tmp/zero /tmp/back
must zero /usr/sbin/blkdiscard -z -o 20M -l 4M /dev/vda
/usr/bin/dd if=/dev/vda of=/tmp/back bs=1M skip=20 count=4 iflag=direct 2>/dev/null
must zeroed /usr/bin/cmp /tmp/zero /tmp/back
# Both processors at once, so that both queues work.
/usr/bin/dd if=/tmp/data of=/dev/vda bs=4k seek=8192 oflag=direct conv=notrunc 2>/dev/null &
/usr/bin/dd if=/dev/vda of=/dev/null bs=4k count=2048 iflag=direct 2>/dev/null
wait
must mkfs /usr/sbin/mke2fs -q -F -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda
must mount mount -t ext4 /dev/vda /mnt
must copy cp /tmp/data /mnt/data
cp -r /modules /mnt/
sync
say sum $(md5sum /mnt/data | cut -d' ' -f1)
must umount umount /mnt
"#;

/// Writes files, each durable before it says so, until somebody pulls the plug.
const UNTIL_KILLED: &str = r#"
must mkfs /usr/sbin/mke2fs -q -F -t ext4 /dev/vda
must mount mount -t ext4 /dev/vda /mnt
number=0
while true; do
  number=$((number+1))
  /usr/bin/dd if=/dev/urandom of=/mnt/$number bs=64k count=4 conv=fsync 2>/dev/null
  sync
  say durable $number $(md5sum /mnt/$number | cut -d' ' -f1)
  [ $number -gt 8 ] && rm /mnt/$((number-8))
done
"#;

/// Keeps both queues busy while somebody does something to the daemon, and then looks at what it has written.
const UNDETERRED: &str = r#"
must mkfs /usr/sbin/mke2fs -q -F -t ext4 /dev/vda
must mount mount -t ext4 /dev/vda /mnt
/usr/bin/dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
for number in $(seq 24); do
  /usr/bin/dd if=/tmp/data of=/mnt/a bs=64k oflag=direct conv=fsync 2>/dev/null &
  must copied /usr/bin/dd if=/tmp/data of=/mnt/b bs=256k conv=fsync
  wait
  echo 3 > /proc/sys/vm/drop_caches
  must same /usr/bin/cmp /tmp/data /mnt/a
  must same /usr/bin/cmp /tmp/data /mnt/b
  say round $number
done
must umount umount /mnt
"#;

/// Waits until its disk is larger, uses what is new, and goes on writing.
const GROWN: &str = r#"
size() { cat /sys/block/vda/size; }
old=$(size)
say sectors $old
tries=0
while [ $(size) = $old ] && [ $tries -lt 600 ]; do sleep 0.1; tries=$((tries+1)); done
say grown $(size)
/usr/bin/dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
must write /usr/bin/dd if=/tmp/data of=/dev/vda bs=1M seek=120 oflag=direct conv=notrunc,fsync
/usr/bin/dd if=/dev/vda of=/tmp/back bs=1M skip=120 count=8 iflag=direct 2>/dev/null
must read /usr/bin/cmp /tmp/data /tmp/back
for number in $(seq 200); do
  must round /usr/bin/dd if=/tmp/data of=/dev/vda bs=64k count=4 seek=$number oflag=direct conv=notrunc,fsync 2>/dev/null
done
"#;

/// Looks at what is left: mounting replays the journal.
const AFTERWARDS: &str = r#"
must mount mount -t ext4 /dev/vda /mnt
for file in /mnt/[0-9]*; do say found ${file#/mnt/} $(md5sum $file | cut -d' ' -f1); done
must umount umount /mnt
"#;

/// A kernel and its modules, unpacked.
struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

/// Debian's kernel for clouds, once per target directory.
fn kernel() -> Kernel {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _only = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let home = urus_tests::scratch::shared_directory("urus-guest-kernel");
    // Another test process may be at it.
    let lock = fs::File::create(home.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let unpacked = home.join("unpacked");
    if !unpacked.exists() {
        let depends = program("apt-cache")
            .words("depends linux-image-cloud-amd64")
            .ok()
            .stdout;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .filter(|name| name.starts_with("linux-image-"))
            .unwrap_or_else(|| panic!("apt-cache knows no kernel: {depends}"));
        let download = tempfile::tempdir_in(&home).unwrap();
        program("apt-get")
            .arg("download")
            .arg(package)
            .current_dir(download.path())
            .limit(PATIENCE)
            .ok();
        let archive = only_file(download.path());
        let fresh = download.path().join("unpacked");
        program("dpkg-deb").arg("-x").arg(archive).arg(&fresh).ok();
        fs::rename(fresh, &unpacked).unwrap();
    }
    let image = fs::read_dir(unpacked.join("boot"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("vmlinuz")
        })
        .expect("a kernel");
    // Merged /usr or not.
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|path| unpacked.join(path))
        .into_iter()
        .find(|path| path.is_dir())
        .expect("its modules");
    Kernel { image, modules }
}

fn only_file(directory: &Path) -> PathBuf {
    let mut entries = fs::read_dir(directory).unwrap();
    entries.next().expect("a file").unwrap().path()
}

/// The guest's initial RAM disk with a script.
fn ram_disk(scratch: &Scratch, kernel: &Kernel, script: &str) -> PathBuf {
    let root = scratch.file("root");
    let _ = fs::remove_dir_all(&root);
    let put = |bytes: &[u8], path: &str| {
        let to = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(&to, bytes).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
    };
    put(INIT.as_bytes(), "init");
    put(script.as_bytes(), "script");
    put(
        &fs::read("/bin/busybox").expect("busybox-static"),
        "bin/busybox",
    );
    let mut libraries = BTreeSet::new();
    for path in PROGRAMS {
        put(
            &fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}")),
            path,
        );
        for word in program("ldd").arg(path).ok().stdout.split_whitespace() {
            if word.starts_with('/') {
                libraries.insert(word.to_owned());
            }
        }
    }
    for library in libraries {
        put(&fs::read(&library).unwrap(), &library);
    }
    let mut order = String::new();
    for module in MODULES {
        if let Some(bytes) = module_bytes(&kernel.modules, module) {
            put(&bytes, &format!("modules/{module}.ko"));
            order.push_str(&format!("{module}.ko\n"));
        }
    }
    put(order.as_bytes(), "modules/order");
    let archive = scratch.file("initrd");
    let pack = format!(
        "cd '{}' && find . | cpio -o -H newc --quiet > '{}'",
        root.display(),
        archive.display()
    );
    program("sh").arg("-c").arg(pack).ok();
    archive
}

/// A module's file, whatever it is compressed with.
fn module_bytes(directory: &Path, name: &str) -> Option<Vec<u8>> {
    for (suffix, unpacker) in [
        (".ko", None),
        (".ko.xz", Some("xz")),
        (".ko.zst", Some("zstd")),
    ] {
        let found = program("find")
            .arg(directory)
            .arg("-name")
            .arg(format!("{name}{suffix}"))
            .ok()
            .stdout;
        let Some(path) = found.lines().next() else {
            continue;
        };
        return Some(match unpacker {
            None => fs::read(path).unwrap(),
            Some(unpacker) => {
                Command::new(unpacker)
                    .arg("-dc")
                    .arg(path)
                    .output()
                    .unwrap()
                    .stdout
            }
        });
    }
    None
}

/// `urus serve --vhost-user` as a child.
struct Daemon {
    child: Child,
    image: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Daemon {
    fn start(scratch: &Scratch, image: &Path, arguments: &[&str]) -> Self {
        // Not in the scratch directory, whose path may be too long for a socket.
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("disk.sock");
        let log = scratch.file("daemon.log");
        let arguments: Vec<_> = arguments.iter().map(|&word| word.to_owned()).collect();
        let daemon = Self {
            child: spawn(image, &socket, &arguments, &log),
            image: image.to_owned(),
            arguments,
            log,
            socket,
            _directory: directory,
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !daemon.socket.exists() {
            assert!(Instant::now() < deadline, "{}", daemon.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }

    /// Kills it and starts another one in its place.
    fn replace(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(&self.image, &self.socket, &self.arguments, &self.log);
    }

    /// `urus ctl`, which must be obeyed.
    fn control(&self, command: &str, argument: &str) {
        let program = urus_tests::program::urus().arg("ctl").arg(command);
        let program = program.arg(control_socket(&self.socket));
        program.words(argument).ok();
    }

    /// What its metrics say of operations of that kind, over all queues.
    fn operations(&self, kind: &str) -> u64 {
        let mut stream = UnixStream::connect(metrics_socket(&self.socket)).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let kind = format!("kind=\"{kind}\"}} ");
        text.lines()
            .filter(|line| line.starts_with("urus_operations_total{"))
            .filter_map(|line| line.split_once(&kind))
            .map(|(_, count)| count.parse::<u64>().unwrap())
            .reduce(std::ops::Add::add)
            .unwrap_or_else(|| panic!("no operations: {text}"))
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// A counter of what it has logged at its end.
    fn counter(log: &str, name: &str) -> u64 {
        let (_, rest) = log
            .rsplit_once(&format!(" {name}: "))
            .unwrap_or_else(|| panic!("no counter {name}: {log}"));
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }

    /// SIGTERM; it must end well. Its log.
    fn stop(mut self) -> String {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.log());
        self.log()
    }
}

fn metrics_socket(socket: &Path) -> PathBuf {
    socket.with_extension("metrics")
}

fn control_socket(socket: &Path) -> PathBuf {
    socket.with_extension("ctl")
}

fn spawn(image: &Path, socket: &Path, arguments: &[String], log: &Path) -> Child {
    Command::new(urus_path())
        .args(["-v", "serve"])
        .arg(image)
        .arg("--vhost-user")
        .arg(socket)
        .args(["--num-queues", "2", "--serial", "urus-guest-test"])
        .arg("--control")
        .arg(format!("unix:{}", control_socket(socket).display()))
        .arg("--metrics")
        .arg(format!("unix:{}", metrics_socket(socket).display()))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(fs::File::create(log).unwrap())
        .spawn()
        .unwrap()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that runs. Dropping it pulls the plug.
struct Guest {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: Vec<String>,
}

impl Guest {
    fn boot(scratch: &Scratch, daemon: &Daemon, script: &str) -> Self {
        let kernel = kernel();
        let initrd = ram_disk(scratch, &kernel, script);
        // Finds out whether it is there, and names its package if not.
        let _ = program("qemu-system-x86_64");
        let mut child = Command::new("qemu-system-x86_64")
            .args(
                "-M q35,memory-backend=mem -accel tcg,thread=multi -cpu max -smp 2 -m 512"
                    .split(' '),
            )
            .args("-object memory-backend-memfd,id=mem,size=512M,share=on".split(' '))
            .args("-nographic -nodefaults -no-reboot -serial stdio".split(' '))
            .arg("-kernel")
            .arg(kernel.image)
            .arg("-initrd")
            .arg(initrd)
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable",
            ])
            .arg("-chardev")
            .arg(format!(
                "socket,id=disk,reconnect=1,path={}",
                daemon.socket.display()
            ))
            .args([
                "-device",
                "vhost-user-blk-pci,chardev=disk,num-queues=2,config-wce=on",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line);
                // The firmware clears the screen without ending the line.
                let start = line.find("URUS ").unwrap_or(0);
                if sender.send(line[start..].trim_end().to_owned()).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            lines,
            seen: Vec::new(),
        }
    }

    /// Waits for a line that the script says, beginning with `what`; the words after that.
    fn says(&mut self, what: &str) -> String {
        let wanted = format!("URUS {what}");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| {
                panic!("the guest does not say {what:?}:\n{}", self.seen.join("\n"))
            });
            self.seen.push(line.clone());
            assert!(!line.ends_with("FAILED"), "{}", self.seen.join("\n"));
            if let Some(rest) = line.strip_prefix(&wanted) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Whether it says nothing for so long.
    fn is_silent(&mut self, time: Duration) -> bool {
        match self.lines.recv_timeout(time) {
            Ok(line) => {
                self.seen.push(line);
                false
            }
            Err(error) => error == mpsc::RecvTimeoutError::Timeout,
        }
    }

    /// What is said until the end, of lines that begin with `what`.
    fn all(&mut self, what: &str) -> Vec<String> {
        self.says("end");
        self.said(what)
    }

    /// What was said so far, of lines that begin with `what`.
    fn said(&self, what: &str) -> Vec<String> {
        let wanted = format!("URUS {what} ");
        self.seen
            .iter()
            .filter_map(|line| line.strip_prefix(&wanted))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The whole script over one image; `base` is the checksum of what its backing file has from 64 MiB on.
fn everything(scratch: &Scratch, image: &Path, arguments: &[&str], base: Option<&str>) {
    let daemon = Daemon::start(scratch, image, arguments);
    let mut guest = Guest::boot(scratch, &daemon, EVERYTHING);
    assert_eq!(guest.says("queues"), "2");
    assert_eq!(
        guest.says("cache"),
        "write back",
        "else the guest sends no flushes"
    );
    assert_eq!(guest.says("serial"), "urus-guest-test");
    assert_eq!(guest.says("sectors"), (SIZE / 512).to_string());
    let sum = guest.says("base");
    if let Some(base) = base {
        assert_eq!(sum, base, "what the backing file has");
    }
    for step in [
        "write",
        "read",
        "discard",
        "discarded",
        "zero",
        "zeroed",
        "mkfs",
        "mount",
        "copy",
    ] {
        assert_eq!(guest.says(step), "ok");
    }
    let sum = guest.says("sum");
    assert_eq!(guest.says("umount"), "ok");
    guest.says("end");
    drop(guest);
    for (kind, least) in [
        ("flush", 3),
        ("read", 100),
        ("write", 100),
        ("discard", 1),
        ("write_zeroes", 1),
    ] {
        let count = daemon.operations(kind);
        assert!(count >= least, "{kind}: {count}");
    }
    let log = daemon.stop();
    assert_eq!(Daemon::counter(&log, "failed"), 0, "{log}");
    let raw = judged(scratch, image);
    let copy = scratch.file("data");
    program("debugfs")
        .arg("-R")
        .arg(format!("dump /data {}", copy.display()))
        .arg(&raw)
        .ok();
    let md5 = program("md5sum").arg(&copy).ok().stdout;
    assert_eq!(md5.split(' ').next(), Some(sum.as_str()));
}

/// The image as a raw file, once qemu-img and e2fsck find nothing wrong.
fn judged(scratch: &Scratch, image: &Path) -> PathBuf {
    program("qemu-img").arg("check").arg(image).ok();
    let raw = scratch.file("disk.raw");
    program("qemu-img")
        .words("convert -O raw")
        .arg(image)
        .arg(&raw)
        .ok();
    program("e2fsck").arg("-fn").arg(&raw).ok();
    raw
}

#[test]
fn a_guest_works_on_a_plain_image() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    everything(&scratch, &image, &[], None);
}

#[test]
fn a_guest_works_past_the_page_cache() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    everything(&scratch, &image, &["--cache", "none"], None);
}

#[test]
fn a_guest_works_on_an_overlay_over_compressed_clusters() {
    let scratch = Scratch::new();
    let (raw, base, image) = (
        scratch.file("base.raw"),
        scratch.file("base.qcow2"),
        scratch.file("image.qcow2"),
    );
    // Text of a sort: it compresses, and no two clusters are the same.
    let content: Vec<u8> = (0..SIZE / 16)
        .flat_map(|line| format!("{line:015}\n").into_bytes())
        .collect();
    fs::write(&raw, &content).unwrap();
    program("qemu-img")
        .words("convert -c -f raw -O qcow2")
        .arg(&raw)
        .arg(&base)
        .ok();
    program("qemu-img")
        .words("create -q -f qcow2 -F qcow2 -b base.qcow2 image.qcow2")
        .current_dir(scratch.path())
        .ok();
    let part = scratch.file("part");
    fs::write(
        &part,
        &content[usize::try_from(64 * MIB).unwrap()..usize::try_from(72 * MIB).unwrap()],
    )
    .unwrap();
    let sum = program("md5sum").arg(&part).ok().stdout;
    everything(&scratch, &image, &[], sum.split(' ').next());
}

#[test]
fn a_file_system_survives_the_death_of_its_machine() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    let daemon = Daemon::start(&scratch, &image, &[]);
    let mut guest = Guest::boot(&scratch, &daemon, UNTIL_KILLED);
    let mut durable = Vec::new();
    for _ in 0..12 {
        durable.push(guest.says("durable"));
    }
    // Amid the next one.
    drop(guest);
    let mut guest = Guest::boot(&scratch, &daemon, AFTERWARDS);
    assert_eq!(guest.says("mount"), "ok");
    let found: BTreeSet<String> = guest.all("found").into_iter().collect();
    drop(guest);
    for file in &durable[durable.len() - 6..] {
        assert!(
            found.contains(file),
            "{file} was durable, and is lost: {found:?}"
        );
    }
    daemon.stop();
    judged(&scratch, &image);
}

/// The operator's hand on a disk in use: it grows, and it is held and let go on.
#[test]
fn a_guest_sees_its_disk_grow_and_waits_while_it_is_paused() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    let daemon = Daemon::start(&scratch, &image, &[]);
    let mut guest = Guest::boot(&scratch, &daemon, GROWN);
    assert_eq!(guest.says("sectors"), (SIZE / 512).to_string());
    daemon.control("resize", "+32M");
    assert_eq!(guest.says("grown"), (128 * MIB / 512).to_string());
    for step in ["write", "read", "round"] {
        assert_eq!(guest.says(step), "ok");
    }
    daemon.control("pause", "");
    // What was answered before may still be on its way through the guest.
    while !guest.is_silent(Duration::from_secs(3)) {}
    let rounds = guest.said("round").len();
    assert!(rounds < 200, "the pause came too late to show anything");
    // The daemon keeps its locks.
    qemu::img("check -U").arg(&image).ok();
    daemon.control("resume", "");
    assert_eq!(guest.all("round").len(), 200);
    drop(guest);
    let log = daemon.stop();
    assert_eq!(Daemon::counter(&log, "failed"), 0, "{log}");
    program("qemu-img").arg("check").arg(&image).ok();
}

/// The daemon is killed amid work, three times; to the guest the disk has been slow.
#[test]
fn a_guest_outlives_its_daemons() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", SIZE);
    let mut daemon = Daemon::start(&scratch, &image, &[]);
    let mut guest = Guest::boot(&scratch, &daemon, UNDETERRED);
    for round in [2, 7, 12] {
        while guest.says("round") != round.to_string() {}
        // Not at the same point each time.
        std::thread::sleep(Duration::from_millis(40 * round));
        daemon.replace();
    }
    assert_eq!(guest.says("umount"), "ok");
    guest.says("end");
    drop(guest);
    // Those of the last one.
    assert!(daemon.operations("flush") > 0);
    daemon.stop();
    // A killed daemon leaks clusters at most.
    program("qemu-img").words("check -r leaks").arg(&image).ok();
    judged(&scratch, &image);
}
