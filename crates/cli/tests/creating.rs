//! A new image appears whole under its name or not at all, whenever the process that makes it is killed. Guards against files that can
//! neither be served nor created again, and against another file that is damaged on the way.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Scratch, urus};
use rustix::process::{Pid, Signal, kill_process};

/// An image of many small clusters, so that its tables are large.
const LARGE: &str = "-f qcow2 -o cluster_size=512,refcount_bits=64 new.qcow2 128G";

/// Runs it and kills it after that time; whether it was killed before its end.
fn killed_after(scratch: &Scratch, line: &str, time: Duration) -> bool {
    let mut child = scratch
        .command(urus(), line)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("urus");
    let begin = Instant::now();
    while begin.elapsed() < time {
        std::hint::spin_loop();
    }
    let _ = kill_process(Pid::from_child(&child), Signal::KILL);
    child.wait().expect("waiting").code().is_none()
}

/// What is there is a whole image, or nothing is; and nothing else was left.
fn is_whole_or_absent(scratch: &Scratch, context: &str) -> bool {
    let names: Vec<String> = fs::read_dir(scratch.path("."))
        .expect("a directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("text")
        })
        // The socket of a server that got that far.
        .filter(|name| !name.ends_with(".sock"))
        .collect();
    if names.is_empty() {
        return false;
    }
    assert_eq!(names, ["new.qcow2"], "{context}");
    // The kernel takes a killed server's locks away in the background.
    let checked = scratch.qemu_img("check -U -f qcow2 new.qcow2");
    assert_eq!(checked.code, Some(0), "{context}: {checked:?}");
    true
}

#[test]
fn a_killed_creation_leaves_a_whole_image_or_nothing() {
    let mut killed = 0;
    for (line, steps) in [
        ("serve new.qcow2 --create 8G", 40_u32),
        (&*format!("create -q {LARGE}"), 20),
    ] {
        let scratch = Scratch::new();
        let begin = Instant::now();
        let mut child = scratch
            .command(urus(), line)
            .stdout(Stdio::null())
            .spawn()
            .expect("urus");
        while !scratch.path("new.qcow2").exists() {
            assert!(begin.elapsed() < Duration::from_secs(60));
        }
        let time = begin.elapsed();
        let _ = child.kill();
        let _ = child.wait();
        let (mut whole, mut absent) = (0, 0);
        for step in 0..steps {
            let scratch = Scratch::new();
            let after = time.mul_f64(0.3 + 1.4 * f64::from(step) / f64::from(steps));
            killed += u64::from(killed_after(&scratch, line, after));
            if is_whole_or_absent(&scratch, &format!("{line} killed after {after:?}")) {
                whole += 1;
            } else {
                absent += 1;
            }
        }
        assert!(
            absent > 0,
            "{line}: {whole} {absent}: it was never early enough"
        );
    }
    assert!(killed > 0);
}

/// SIGXFSZ kills the process when it passes the limit: in the middle of the creation, always at the same place.
#[test]
fn a_creation_that_is_killed_halfway_leaves_what_was_there() {
    for limit in [0, 64] {
        for before in [None, Some("precious")] {
            let scratch = Scratch::new();
            if let Some(content) = before {
                fs::write(scratch.path("new.qcow2"), content).expect("writing");
            }
            let line = format!(
                "ulimit -c 0; ulimit -f {limit}; exec {} create {LARGE}",
                urus()
            );
            let status = Command::new("sh")
                .current_dir(scratch.path("."))
                .args(["-c", &line])
                .stdout(Stdio::null())
                .status()
                .expect("a shell");
            assert_eq!(
                status.code(),
                None,
                "{limit}: it was not killed: {status:?}"
            );
            let there = fs::read_to_string(scratch.path("new.qcow2")).ok();
            assert_eq!(there.as_deref(), before, "{limit}");
            let count = fs::read_dir(scratch.path("."))
                .expect("a directory")
                .count();
            assert_eq!(
                count,
                usize::from(before.is_some()),
                "{limit}: something was left"
            );
            // And then it can be made.
            scratch.sh(&format!(
                "{} create -q {LARGE}; qemu-img check -q new.qcow2",
                urus()
            ));
        }
    }
}

#[test]
fn an_empty_file_is_no_image_in_the_way() {
    let scratch = Scratch::new();
    scratch.sh("touch a.qcow2 b.raw; ln -s there.qcow2 link.qcow2; mkdir dir");
    for line in [
        "a.qcow2 --create 8M",
        "b.raw --format raw --create 8M",
        // A link whose target is still to be made.
        "link.qcow2 --create 8M",
    ] {
        common::Server::start(&scratch, line).end();
        // It is there now, and of that size.
        common::Server::start(&scratch, line).end();
    }
    scratch.sh("qemu-img check -q a.qcow2; test $(stat -c %s b.raw) = 8388608; test -L link.qcow2; qemu-img check -q there.qcow2");
    // One byte is somebody's.
    scratch.sh("printf x >c.qcow2");
    let refused = scratch.urus("serve c.qcow2 --create 8M");
    assert_eq!(refused.code, Some(1), "{refused:?}");
    scratch.sh("test $(cat c.qcow2) = x");
    assert_eq!(scratch.urus("serve dir --create 8M").code, Some(1));
    assert_eq!(scratch.urus("serve no/dir.qcow2 --create 8M").code, Some(1));
}

/// Of several servers that are started at once, one has the image; nobody's was replaced.
#[test]
fn servers_that_create_at_once_make_one_image() {
    for empty in [false, true] {
        let scratch = Scratch::new();
        if empty {
            scratch.sh("touch new.qcow2");
        }
        let mut servers: Vec<_> = (0..6)
            .map(|number| {
                let line = format!("serve new.qcow2 --create 64M --nbd unix:{number}");
                let mut command = scratch.command(urus(), &line);
                command.stdout(Stdio::null()).stderr(Stdio::piped());
                command.spawn().expect("urus")
            })
            .collect();
        let begin = Instant::now();
        // All but one give up.
        loop {
            let alive = |server: &mut Child| server.try_wait().expect("a child").is_none();
            if servers.iter_mut().map(alive).filter(|alive| *alive).count() <= 1 {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut ended_well = 0;
        for server in servers {
            let _ = kill_process(Pid::from_child(&server), Signal::TERM);
            let output = server.wait_with_output().expect("waiting");
            let stderr = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) => ended_well += 1,
                _ => assert!(stderr.contains("locked by"), "{stderr}"),
            }
        }
        assert_eq!(ended_well, 1);
        scratch.sh("qemu-img check -q new.qcow2");
    }
}

/// `create` replaces a file as qemu-img does: by that name the same file as before in all but content.
#[test]
fn what_is_replaced_keeps_owner_mode_names_and_links() {
    let scratch = Scratch::new();
    let create = |name: &str| scratch.sh(&format!("{} create -q -f qcow2 {name} 8M", urus()));
    fs::write(scratch.path("a"), "old").expect("writing");
    fs::set_permissions(scratch.path("a"), fs::Permissions::from_mode(0o640)).expect("a mode");
    let owner = rustix::process::geteuid().as_raw();
    if owner == 0 {
        scratch.sh("chown 12345:54321 a");
    }
    symlink("a", scratch.path("link")).expect("a link");
    let before = fs::metadata(scratch.path("a")).expect("metadata");
    create("link");
    let after = fs::metadata(scratch.path("a")).expect("metadata");
    let look = |file: &fs::Metadata| (file.mode(), file.uid(), file.gid(), file.nlink());
    assert_eq!(look(&before), look(&after));
    assert_ne!(before.ino(), after.ino(), "it was not replaced at once");
    assert!(
        scratch
            .path("link")
            .symlink_metadata()
            .expect("a link")
            .is_symlink()
    );
    scratch.sh("qemu-img check -q a; test $(ls -A | wc -l) = 2");
    // A second name goes on naming it, so it is written in place.
    scratch.sh("ln a second; qemu-io -c 'write 0 1M' a >/dev/null");
    create("a");
    let names =
        ["a", "second"].map(|name| fs::metadata(scratch.path(name)).expect("metadata").ino());
    assert_eq!(names[0], names[1]);
    scratch.sh("qemu-img check -q a; cmp a second; test $(qemu-img map --output=json a | grep -c '\"data\": true') = 0");
    // A device is written in place by nature.
    if owner == 0 {
        scratch.sh("truncate -s 16M disk");
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(scratch.path("disk"))
            .output()
            .expect("losetup");
        let device = String::from_utf8(output.stdout)
            .expect("text")
            .trim()
            .to_owned();
        assert!(device.starts_with("/dev/loop"), "{device}");
        let made = scratch.urus(&format!("create -q -f qcow2 {device} 8M"));
        // The kernel takes a killed server's locks away in the background.
        let checked = scratch.qemu_img(&format!("check -f qcow2 {device}"));
        let detached = Command::new("losetup").args(["-d", &device]).status();
        assert!(detached.expect("losetup").success());
        assert_eq!(
            (made.code, checked.code),
            (Some(0), Some(0)),
            "{made:?} {checked:?}"
        );
    }
}
