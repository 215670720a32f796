//! What people meet who come from elsewhere: each mistake is answered with what is wrong, where, and what to do; options of qemu-nbd
//! are understood or answered.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use common::{Scratch, Server};

/// Every refusal: nothing of Rust's, no number of an error, and these words.
fn says(scratch: &Scratch, line: &str, words: &[&str]) -> String {
    let ran = scratch.urus(line);
    assert_ne!(ran.code, Some(0), "{line}: {ran:?}");
    for word in words {
        assert!(
            ran.stderr.contains(word),
            "{line}: no {word:?} in {}",
            ran.stderr
        );
    }
    for word in ["os error", "Policy::", "CharacterDevice", "tip:"] {
        assert!(!ran.stderr.contains(word), "{line}: {}", ran.stderr);
    }
    ran.stderr
}

fn image(scratch: &Scratch, name: &str) {
    scratch.sh(&format!("qemu-img create -q -f qcow2 {name} 8M"));
}

#[test]
fn other_formats_are_named_with_the_command_that_converts_them() {
    let scratch = Scratch::new();
    for (format, name) in [
        ("vmdk", "VMDK"),
        ("vdi", "VDI"),
        ("vpc", "VHD image"),
        ("vhdx", "VHDX"),
        ("qed", "QED"),
        ("qcow", "version 1"),
    ] {
        scratch.sh(&format!("qemu-img create -q -f {format} x.{format} 8M"));
        let line = format!("serve x.{format}");
        let text = says(
            &scratch,
            &line,
            &[&format!("x.{format}: "), name, "convert it: "],
        );
        let command = text.split("convert it: ").nth(1).expect("a command");
        scratch.sh(&format!(
            "{}; qemu-img check -q x.qcow2; rm x.qcow2",
            command.trim()
        ));
        // Shown as raw, but not as if that were all.
        let shown = scratch.urus(&format!("info x.{format}"));
        if format != "qcow" {
            assert!(shown.stderr.contains(name), "{shown:?}");
            let checked = scratch.urus(&format!("check x.{format}"));
            assert!(
                checked.code == Some(63) && checked.stderr.contains(name),
                "{checked:?}"
            );
        }
    }
    // A VHD of fixed size is known by its last sector.
    scratch.sh("qemu-img create -q -f vpc -o subformat=fixed fixed.vhd 8M");
    says(&scratch, "serve fixed.vhd", &["VHD image", "-f vpc"]);
    image(&scratch, "a.qcow2");
    for (program, suffix) in [
        ("gzip", "gz"),
        ("xz", "xz"),
        ("bzip2", "bz2"),
        ("zstd", "zst"),
    ] {
        let there = std::process::Command::new(program)
            .arg("--version")
            .output()
            .is_ok();
        if !there {
            // Not on this machine: its magic number is.
            continue;
        }
        scratch.sh(&format!("{program} -c a.qcow2 > b.qcow2.{suffix}"));
        let line = format!("serve b.qcow2.{suffix}");
        let text = says(&scratch, &line, &["compressed by", "unpack it: "]);
        let command = text.split("unpack it: ").nth(1).expect("a command");
        scratch.sh(&format!(
            "{}; cmp a.qcow2 b.qcow2; rm b.qcow2",
            command.trim()
        ));
    }
    fs::write(scratch.path("page.qcow2"), "<!DOCTYPE html>\n<html>404").expect("writing");
    says(&scratch, "serve page.qcow2", &["web page", "download"]);
    fs::write(scratch.path("empty.qcow2"), "").expect("writing");
    says(
        &scratch,
        "serve empty.qcow2",
        &["empty", "urus create -f qcow2"],
    );
    let mut disc = vec![0; 40_000];
    disc[0x8001..0x8006].copy_from_slice(b"CD001");
    fs::write(scratch.path("cd.iso"), disc).expect("writing");
    says(&scratch, "serve cd.iso", &["ISO 9660", "-f raw"]);
}

#[test]
fn raw_that_begins_as_an_image_is_warned_of() {
    let scratch = Scratch::new();
    image(&scratch, "a.qcow2");
    let server = Server::start(&scratch, "a.qcow2 -f raw -r");
    let log = server.end();
    assert!(log.contains("begins as a qcow2 image"), "{log}");
    scratch.sh("truncate -s 1M plain.raw");
    let log = Server::start(&scratch, "plain.raw -f raw -r").end();
    assert!(!log.contains("WARN"), "{log}");
}

#[test]
fn a_lock_says_who_holds_it() {
    let scratch = Scratch::new();
    image(&scratch, "a.qcow2");
    image(&scratch, "b.qcow2");
    let server = Server::start(&scratch, "a.qcow2 --control unix:c");
    let holder = format!("urus (process {})", server.0.id());
    says(
        &scratch,
        "serve a.qcow2 -k other",
        &[&holder, "open for writing"],
    );
    for command in ["info", "map"] {
        says(&scratch, &format!("{command} a.qcow2"), &[&holder, "-U"]);
        assert_eq!(scratch.urus(&format!("{command} -U a.qcow2")).code, Some(0));
    }
    server.end();
    let reader = Server::start(&scratch, "a.qcow2 -r");
    says(
        &scratch,
        "serve a.qcow2 -k other",
        &["reads it and lets nobody write"],
    );
    reader.end();
    // By itself: the same file twice, and a backing file that is served too.
    says(
        &scratch,
        "serve a.qcow2 --image b=./a.qcow2",
        &["--image b", "same file"],
    );
    scratch.sh("qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 top.qcow2");
    says(
        &scratch,
        "serve b.qcow2 --image top=top.qcow2",
        &["b.qcow2: this very process"],
    );
}

#[test]
fn errors_name_the_file_that_they_are_about() {
    let scratch = Scratch::new();
    image(&scratch, "a.qcow2");
    scratch.sh("qemu-img create -q -f vmdk b 8M");
    let text = says(&scratch, "serve a.qcow2 --image b=b", &["VMDK"]);
    assert!(text.starts_with("urus: b: "), "{text}");
    scratch.sh("truncate -s 1M base; qemu-img create -q -f qcow2 -u -b base -F qcow2 top.qcow2 1M");
    let text = says(&scratch, "serve top.qcow2", &["not a qcow2 image"]);
    assert!(!text.contains("top.qcow2: /"), "{text}");
    says(
        &scratch,
        "serve /dev/null",
        &["/dev/null", "a character device"],
    );
}

#[test]
fn the_directory_to_allow_is_the_right_one() {
    let scratch = Scratch::new();
    scratch.sh(
        "mkdir base vm; qemu-img create -q -f qcow2 base/b.qcow2 8M; \
                qemu-img create -q -f qcow2 -b ../base/b.qcow2 -F qcow2 vm/o.qcow2",
    );
    let text = says(&scratch, "serve vm/o.qcow2", &["--backing-dir"]);
    let advice = text
        .split("--backing-dir ")
        .nth(1)
        .expect("a directory")
        .trim();
    assert!(advice.ends_with("/base"), "{text}");
    Server::start(&scratch, &format!("vm/o.qcow2 --backing-dir {advice}")).end();
    says(&scratch, "serve vm/o.qcow2 --no-backing", &["--no-backing"]);
}

#[test]
fn unsupported_features_have_a_way_out() {
    let scratch = Scratch::new();
    for (name, options) in [
        ("e.qcow2", "extended_l2=on"),
        ("d.qcow2", "data_file=data.raw"),
    ] {
        scratch.sh(&format!(
            "qemu-img create -q -f qcow2 -o {options} {name} 8M"
        ));
        let text = says(&scratch, &format!("serve {name}"), &["qemu-img convert"]);
        let command = text.split("without it: ").nth(1).expect("a command").trim();
        let command = command
            .replace("NEW-IMAGE", "new.qcow2")
            .replace("IMAGE", name);
        scratch.sh(&format!("{command} >/dev/null"));
        Server::start(&scratch, "new.qcow2").end();
    }
}

#[test]
fn what_is_missing_or_twice_is_told() {
    let scratch = Scratch::new();
    image(&scratch, "a.qcow2");
    says(
        &scratch,
        "serve missing.qcow2",
        &["missing.qcow2", "--create 8G"],
    );
    says(
        &scratch,
        "serve no/missing.qcow2",
        &["there is no directory no"],
    );
    for line in [
        "serve a.qcow2 --nbd unix:s --nbd unix:s",
        "serve a.qcow2 --nbd unix:s -k ./s",
        "serve a.qcow2 --nbd localhost:1 -p 1",
    ] {
        says(&scratch, line, &["given twice"]);
    }
    says(
        &scratch,
        "serve a.qcow2 -k s --control unix:s",
        &["--nbd and --control"],
    );
    says(&scratch, "serve a.qcow2 -k a.qcow2", &["path of its own"]);
    for (address, meant) in [
        ("10809", "localhost:10809"),
        (":10809", "0.0.0.0:10809"),
        ("localhost:99999", "65535"),
    ] {
        says(
            &scratch,
            &format!("serve a.qcow2 --nbd {address}"),
            &[meant],
        );
    }
}

#[test]
fn ctl_says_what_it_was_given_instead() {
    let scratch = Scratch::new();
    image(&scratch, "a.qcow2");
    says(
        &scratch,
        "ctl resize a.qcow2 +1M",
        &["no socket", "--control unix:PATH", "qemu-img resize"],
    );
    says(&scratch, "ctl stats nothing", &["no such socket"]);
    says(
        &scratch,
        "resize a.qcow2 +1M",
        &["qemu-img resize", "urus ctl resize"],
    );
    let server = Server::start(
        &scratch,
        "a.qcow2 -k nbd --metrics unix:metrics --control ./control",
    );
    says(&scratch, "ctl stats nbd", &["for NBD clients", "--control"]);
    says(&scratch, "ctl stats metrics", &["for metrics", "--control"]);
    assert_eq!(scratch.urus("ctl stats control").code, Some(0));
    server.end();
}

#[test]
fn options_of_qemu_nbd_are_understood() {
    let scratch = Scratch::new();
    image(&scratch, "a.qcow2");
    let socket = scratch.path("s");
    let line = format!(
        "-x disk -k {} -e 5 -t -A -D text --cache=writeback --aio=io_uring --discard=on --detect-zeroes=off -f qcow2 \
         --pid-file pid a.qcow2",
        socket.display()
    );
    let server = Server::start(&scratch, &line);
    scratch.sh("qemu-io -f raw -c 'write -P 1 0 4k' 'nbd+unix:///disk?socket=s' | grep -qv failed");
    server.end();
    let server = Server::start(
        &scratch,
        "-n --shared=0 --aio threads --socket=s --persistent --discard off -r a.qcow2",
    );
    scratch.sh("qemu-io -r -f raw -c 'read -P 1 0 4k' 'nbd+unix:///?socket=s' | grep -qv failed");
    server.end();
    for (options, words) in [
        ("--fork", "foreground"),
        ("-c /dev/nbd0", "nbd-client"),
        ("-d /dev/nbd0", "nbd-client -d"),
        ("-L", "nbdinfo --list"),
        ("-P 1", "partition"),
        ("-o 512", "offset"),
        ("-B bitmap", "bitmaps"),
        ("-l snap", "qemu-img convert -l"),
        ("--image-opts", "-f"),
        ("--object x", "--tls-creds DIR"),
        ("--cache=unsafe", "--snapshot"),
        ("--cache writethrough", "writeback"),
        ("--aio=native", "io_uring"),
        ("--detect-zeroes=unmap", "does not look for zeroes"),
        ("-f vmdk", "qemu-img convert"),
        ("--no-such-option", "--no-such-option"),
    ] {
        says(&scratch, &format!("serve a.qcow2 {options}"), &[words]);
    }
}

#[test]
fn a_snapshot_leaves_the_image_as_it_was() {
    let scratch = Scratch::new();
    scratch.sh(
        "qemu-img create -q -f qcow2 a.qcow2 8M; qemu-io -c 'write -P 7 0 1M' a.qcow2 >/dev/null; \
                truncate -s 4M b.raw; mkdir tmp; sha256sum a.qcow2 b.raw > sums",
    );
    for (image, format) in [("a.qcow2", "qcow2"), ("b.raw", "raw")] {
        for flag in ["-s", "--snapshot --no-sandbox"] {
            let line = format!("{image} -f {format} {flag} -k s");
            let server = Server::start(&scratch, &line);
            // A reader may look meanwhile; a writer may not.
            scratch.sh(&format!(
                "qemu-io -f raw -c 'write -P 9 64k 1M' -c flush -c 'read -P 9 64k 1M' 'nbd+unix:///?socket=s' > out; \
                 grep -q 'read 1048576' out; test $(grep -c failed out) = 0; qemu-img info -f {format} {image} >/dev/null; \
                 test -z \"$(ls tmp)\""
            ));
            server.end();
            scratch.sh("sha256sum -c --quiet sums");
        }
    }
    says(
        &scratch,
        "serve a.qcow2 --snapshot --read-only",
        &["--read-only"],
    );
    let ran = scratch
        .command(common::urus(), "serve a.qcow2 --snapshot")
        .env("TMPDIR", scratch.path("missing"))
        .output()
        .expect("urus");
    let text = String::from_utf8_lossy(&ran.stderr);
    assert!(!ran.status.success() && text.contains("missing"), "{text}");
}

#[test]
fn sockets_have_the_mode_and_group_that_were_given() {
    let scratch = Scratch::new();
    image(&scratch, "a.qcow2");
    let own = rustix::process::getgid().as_raw();
    for (options, mode) in [
        (format!("--socket-mode 0660 --socket-group {own}"), 0o660),
        (format!("--socket-group {own}"), 0o660),
        ("--socket-mode 0666".to_owned(), 0o666),
        ("--socket-mode 600".to_owned(), 0o600),
    ] {
        let server = Server::start(&scratch, &format!("a.qcow2 -k s --vhost-user v {options}"));
        for name in ["s", "v"] {
            let file = fs::symlink_metadata(scratch.path(name)).expect("a socket");
            assert_eq!(file.permissions().mode() & 0o777, mode, "{options} {name}");
            assert_eq!(file.gid(), own);
        }
        scratch.sh("qemu-io -f raw -c 'read 0 4k' 'nbd+unix:///?socket=s' | grep -q 'read 4096'");
        server.end();
        assert!(!scratch.path("s").exists());
    }
    says(&scratch, "serve a.qcow2 --socket-mode 0999", &["octal"]);
    says(
        &scratch,
        "serve a.qcow2 --socket-group no-such-group",
        &["no-such-group", "getent"],
    );
}
