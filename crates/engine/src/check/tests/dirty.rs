//! Images that QEMU left dirty: written with lazy refcounts, and killed.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use urus_format::incompatible;

use super::qemu::{Directory, create, img, io};
use super::{Image, check};
use crate::check::Repair;
use crate::check::tests::memory::Memory;

/// Runs qemu-io on an image, and kills it once it has done the last command.
fn work_and_kill(path: &Path, commands: &[String]) {
    // Line by line: else its answers stay in its buffer.
    let mut child = Command::new("stdbuf")
        .args(["-oL", "qemu-io", "-d", "unmap", "-f", "qcow2"])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("these tests need `qemu-io` and `stdbuf` on the PATH");
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut said = Vec::new();
    let mut wait_for_prompt = || {
        said.clear();
        while !said.ends_with(b"qemu-io> ") {
            let mut byte = [0];
            stdout.read_exact(&mut byte).expect("it goes on");
            said.push(byte[0]);
        }
        assert!(!String::from_utf8_lossy(&said).contains("failed"));
    };
    wait_for_prompt();
    for command in commands {
        // One at a time: it would not see a second one that came with the first.
        writeln!(stdin, "{command}").expect("it reads");
        stdin.flush().expect("it reads");
        wait_for_prompt();
    }
    child.kill().expect("it runs");
    child.wait().expect("it ends");
}

fn assert_repaired_as_by_qemu(directory: &Directory, image: &Image, what: &str) {
    assert_ne!(
        image.header().incompatible & incompatible::DIRTY,
        0,
        "{what}"
    );
    let before = directory.assert_same(image, what);
    assert!(before.corruptions > 0, "{what}: the refcounts lag");

    let memory = Memory::new(&image.bytes);
    let report = check(&memory, Repair::All);
    let ours = memory.image();
    let mut theirs = image.clone();
    let verdict = directory.qemu_check(&mut theirs, Some("all"));
    assert_eq!(verdict.code, 0, "{what}: {}", verdict.said);
    assert!(report.is_clean(), "{what}: {:#?}", report.messages);
    assert_eq!(
        (report.corruptions_fixed, report.leaks_fixed),
        (verdict.corruptions_fixed, verdict.leaks_fixed),
        "{what}"
    );
    directory.assert_clean(&ours, what);

    // The same mapping with the same flags, the same data, and the same refcounts where QEMU has not moved
    // its refcount structures to.
    let (l1, entries) = (ours.l1(), u64::from(ours.header().l1_entries));
    assert_eq!(
        (theirs.l1(), u64::from(theirs.header().l1_entries)),
        (l1, entries)
    );
    for at in (0..entries).map(|index| l1 + index * 8) {
        assert_eq!(ours.word(at), theirs.word(at), "{what}: L1 at {at:#x}");
        let l2 = ours.word(at) & crate::check::entries::OFFSET_MASK;
        for at in (l2..l2 + ours.header().geometry().cluster_bytes()).step_by(8) {
            assert!(
                l2 == 0 || ours.word(at) == theirs.word(at),
                "{what}: L2 at {at:#x}"
            );
        }
    }
    let path = directory.path("theirs.qcow2");
    std::fs::write(&path, &theirs.bytes).unwrap();
    directory.with(&ours, |ours| {
        let theirs = path.to_str().unwrap();
        img(
            ours,
            &["compare", "-q", "-f", "qcow2", "-F", "qcow2", theirs],
            &[],
        );
    });
}

#[test]
fn killed_with_lazy_refcounts() {
    let directory = Directory::new();
    for options in [
        "lazy_refcounts=on",
        "lazy_refcounts=on,cluster_size=512",
        "lazy_refcounts=on,cluster_size=4k,refcount_bits=64",
        "lazy_refcounts=on,cluster_size=2M",
        "lazy_refcounts=on,refcount_bits=1,cluster_size=4k",
    ] {
        for snapshot in [false, true] {
            if snapshot && options.contains("refcount_bits=1") {
                continue;
            }
            let path = directory.path("lazy.qcow2");
            create(&path, options, "64M");
            io(&path, &["write -P 1 0 400k"]);
            if snapshot {
                img(&path, &["snapshot", "-c", "one"], &[]);
            }
            let mut commands: Vec<String> = Vec::new();
            // Large clusters make large files.
            let writes = if options.contains("2M") { 6 } else { 40 };
            for turn in 0..writes {
                let offset: u64 = turn * 7919 * 512 % (60 << 20);
                commands.push(format!("write -P {turn} {offset} {}k", 1 + turn * 3));
            }
            commands.push("discard 128k 192k".into());
            commands.push("flush".into());
            commands.push("write -P 77 33M 300k".into());
            work_and_kill(&path, &commands);
            let image = Image {
                bytes: std::fs::read(&path).unwrap(),
            };
            let what = format!("{options}, snapshot: {snapshot}");
            assert_repaired_as_by_qemu(&directory, &image, &what);
        }
    }
}

/// A dirty image whose refcounts happen to be right only loses its bit.
#[test]
fn dirty_and_right() {
    let directory = Directory::new();
    let image = directory.make("lazy_refcounts=on", "64M", &["write 0 1M"]);
    let dirty = image.poked(72, incompatible::DIRTY);
    for repair in [Repair::Leaks, Repair::All] {
        let memory = Memory::new(&dirty.bytes);
        assert!(check(&memory, repair).is_clean());
        assert_eq!(memory.image().bytes, image.bytes);
        // O29
        assert_eq!(
            memory.log.borrow().len(),
            3,
            "one write between two barriers"
        );
    }
}
