//! What `urus` prints for image commands, against the qemu-img of this machine: byte for byte where both agree on principle.
//!
//! Guards scripts that say `urus` where they said `qemu-img`: field names, layout, rounding, exit codes.

mod common;

use common::{Ran, Scratch};

/// Images of many kinds. Returns their names.
fn images(scratch: &Scratch) -> Vec<&'static str> {
    scratch.sh(
        "qemu-img create -q -f qcow2 plain.qcow2 1.5G
         qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1000
         qemu-img create -q -f qcow2 -o compression_type=zstd,lazy_refcounts=on,cluster_size=4k,refcount_bits=64 -b plain.qcow2 -F qcow2 over.qcow2
         qemu-img create -q -f qcow2 -o cluster_size=2M,refcount_bits=1 big.qcow2 9T
         qemu-img create -q -f raw flat.raw 10M
         qemu-img create -q -f qcow2 -b flat.raw -F raw over_raw.qcow2
         mkdir sub
         qemu-img create -q -f qcow2 -b ../plain.qcow2 -F qcow2 sub/below.qcow2
         qemu-img create -q -f qcow2 -b $PWD/plain.qcow2 -F qcow2 absolute.qcow2
         qemu-img create -q -u -f qcow2 -b nowhere.qcow2 -F qcow2 lost.qcow2 1G
         qemu-img create -q -f qcow2 shots.qcow2 64M
         qemu-io -c 'write 0 1M' shots.qcow2 >/dev/null
         qemu-img snapshot -c first shots.qcow2
         qemu-io -c 'write 512k 1M' shots.qcow2 >/dev/null
         qemu-img snapshot -c 'a name that is longer than its column' shots.qcow2
         qemu-img create -q -f qcow2 maps.qcow2 64M
         qemu-img bitmap --add maps.qcow2 one
         qemu-img bitmap --add -g 1M maps.qcow2 two
         qemu-img bitmap --disable maps.qcow2 two
         qemu-img create -q -f qcow2 -o data_file=outside.raw,data_file_raw=on outside.qcow2 1M
         qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k sub.qcow2 1M
         qemu-img create -q --object secret,id=s,data=abc -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s secret.qcow2 1M
         yes | head -c 8M > yes.raw
         qemu-img convert -c -O qcow2 yes.raw packed.qcow2
         qemu-io -c 'write 0 1M' -c 'write -z 2M 1M' -c 'write 4M 4k' -c 'write -z -u 6M 64k' over.qcow2 >/dev/null
         qemu-io -c 'write 1M 1M' plain.qcow2 >/dev/null
         qemu-io -f raw -c 'write 1M 1M' flat.raw >/dev/null
         qemu-io -c 'write 0 64k' over_raw.qcow2 >/dev/null",
    );
    vec![
        "plain.qcow2",
        "old.qcow2",
        "over.qcow2",
        "big.qcow2",
        "flat.raw",
        "over_raw.qcow2",
        "sub/below.qcow2",
        "absolute.qcow2",
        "shots.qcow2",
        "packed.qcow2",
        "lost.qcow2",
        "maps.qcow2",
        "outside.qcow2",
        "sub.qcow2",
        "secret.qcow2",
    ]
}

/// The same standard output and exit code.
fn assert_same(scratch: &Scratch, line: &str) {
    let theirs = scratch.qemu_img(line);
    let ours = scratch.urus(line);
    assert_eq!(ours.stdout, theirs.stdout, "{line}\n{}", ours.stderr);
    assert_eq!(ours.code, theirs.code, "{line}\n{}", ours.stderr);
}

#[test]
fn info_prints_the_same() {
    let scratch = Scratch::new();
    for image in images(&scratch) {
        for flags in ["", "--output json", "-U --output=human"] {
            assert_same(&scratch, &format!("info {flags} {image}"));
        }
        if image != "lost.qcow2" {
            assert_same(&scratch, &format!("info --backing-chain {image}"));
            assert_same(
                &scratch,
                &format!("info --backing-chain --output=json {image}"),
            );
        }
    }
    assert_same(&scratch, "info -f raw plain.qcow2");
    assert_same(&scratch, "info -f raw --output=json plain.qcow2");
    // Marked dirty and corrupt.
    scratch.poke("plain.qcow2", 79, &[3]);
    assert_same(&scratch, "info plain.qcow2");
    assert_same(&scratch, "info --output=json plain.qcow2");
}

#[test]
fn info_fails_where_qemu_img_fails() {
    let scratch = Scratch::new();
    images(&scratch);
    scratch.sh("qemu-img create -q -u -f qcow2 -b poop.qcow2 -F qcow2 loop.qcow2 1M");
    let loop_image = std::fs::read(scratch.path("loop.qcow2")).expect("reading");
    let name = loop_image
        .windows(10)
        .position(|bytes| bytes == b"poop.qcow2");
    scratch.poke("loop.qcow2", name.expect("a name"), b"loop.qcow2");
    for line in [
        "info missing.qcow2",
        "info -f qcow2 flat.raw",
        "info --backing-chain lost.qcow2",
        "info --backing-chain loop.qcow2",
    ] {
        assert_eq!(scratch.qemu_img(line).code, Some(1), "{line}");
        let ours = scratch.urus(line);
        assert_eq!(ours.code, Some(1), "{line}: {ours:?}");
        assert!(ours.stderr.starts_with("urus: "), "{line}: {ours:?}");
        assert_eq!(ours.stderr.lines().count(), 1, "{line}: {ours:?}");
    }
}

#[test]
fn map_prints_the_same() {
    let scratch = Scratch::new();
    images(&scratch);
    for image in [
        "plain.qcow2",
        "old.qcow2",
        "over.qcow2",
        "flat.raw",
        "over_raw.qcow2",
        "shots.qcow2",
        "packed.qcow2",
        "maps.qcow2",
    ] {
        for flags in [
            "",
            "--output json",
            "--output=json --start-offset=512k --max-length=1M",
            "-s 100 -l 3M",
            "--start-offset 100 --max-length 1000 --output json",
            "--start-offset 1P --output json",
        ] {
            assert_same(&scratch, &format!("map {flags} {image}"));
        }
    }
    // Backing files lie beneath the image's directory, or are allowed.
    for image in ["sub/below.qcow2", "absolute.qcow2"] {
        let theirs = scratch.qemu_img(&format!("map {image}"));
        let ours = scratch.urus(&format!("map --backing-dir . {image}"));
        assert_eq!(ours.stdout, theirs.stdout, "{image}: {ours:?}");
    }
    let refused = scratch.urus("map sub/below.qcow2");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("--backing-dir"), "{refused:?}");
}

#[test]
fn check_prints_the_same() {
    let scratch = Scratch::new();
    for image in images(&scratch) {
        if image == "big.qcow2" || image == "lost.qcow2" || image == "secret.qcow2" {
            // Large only in name, and images that qemu-img cannot open for a check.
            continue;
        }
        for flags in ["", "--output json", "-q"] {
            assert_same(&scratch, &format!("check {flags} {image}"));
        }
    }
}

#[test]
fn check_and_repair_of_damage_print_the_same() {
    /// Refcount of a cluster, in an image with 64 KiB clusters.
    const fn refcount(cluster: usize) -> usize {
        0x20000 + 2 * cluster
    }
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 good.qcow2 64M
         qemu-io -c 'write 0 10M' good.qcow2 >/dev/null
         cp good.qcow2 leak.qcow2
         truncate -s 14417920 leak.qcow2
         cp good.qcow2 low.qcow2");
    scratch.poke("leak.qcow2", refcount(205), &[0, 1]);
    scratch.poke("low.qcow2", refcount(7), &[0, 0]);
    for image in ["leak.qcow2", "low.qcow2"] {
        for flags in ["", "--output json", "-q"] {
            assert_same(&scratch, &format!("check {flags} {image}"));
        }
    }
    for (flags, image) in [
        ("-r leaks", "leak.qcow2"),
        ("-r all", "leak.qcow2"),
        ("-r leaks --output=json", "leak.qcow2"),
    ] {
        scratch.sh(&format!("cp {image} theirs.qcow2; cp {image} ours.qcow2"));
        let theirs = scratch.qemu_img(&format!("check {flags} theirs.qcow2"));
        let ours = scratch.urus(&format!("check {flags} ours.qcow2"));
        assert_eq!(ours.stdout.replace("ours", "theirs"), theirs.stdout);
        assert_eq!(ours.code, theirs.code);
    }
    // How it is repaired is each program's own business; that it is, is not.
    let ours = scratch.urus("check -r all low.qcow2");
    assert_eq!(ours.code, Some(0), "{ours:?}");
    assert!(ours.stdout.contains("were found and repaired"), "{ours:?}");
    assert_eq!(scratch.qemu_img("check low.qcow2").code, Some(0));
}

#[test]
fn check_fails_where_qemu_img_fails() {
    let scratch = Scratch::new();
    scratch.sh("truncate -s 1M flat.raw");
    for line in [
        "check flat.raw",
        "check missing.qcow2",
        "check -f qcow2 flat.raw",
    ] {
        let (theirs, ours) = (scratch.qemu_img(line), scratch.urus(line));
        assert_eq!(ours.code, theirs.code, "{line}: {ours:?}");
    }
}

/// Creates with both; the line printed and the bytes of the file are the same.
fn assert_creates_the_same(scratch: &Scratch, line: &str, name: &str) {
    let theirs = scratch.qemu_img(line);
    let image = std::fs::read(scratch.path(name)).unwrap_or_else(|error| panic!("{line}: {error}"));
    std::fs::remove_file(scratch.path(name)).expect("removing");
    let ours = scratch.urus(line);
    assert_eq!(ours, theirs, "{line}");
    let made = std::fs::read(scratch.path(name)).unwrap_or_else(|error| panic!("{line}: {error}"));
    // QEMU ends its files at the last byte written; what matters is what is there.
    let end = image.len().min(made.len());
    assert!(image[..end] == made[..end], "{line}: the files differ");
    assert!(
        image[end..]
            .iter()
            .chain(&made[end..])
            .all(|&byte| byte == 0),
        "{line}: one has more"
    );
}

#[test]
fn create_makes_the_same() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 base.qcow2 3M
         qemu-img create -q -f raw base.raw 1000k
         mkdir sub");
    for (options, name, size) in [
        ("-f qcow2", "a.qcow2", "1G"),
        ("-f qcow2", "a.qcow2", "1000"),
        ("-f qcow2", "a.qcow2", "0"),
        ("-f qcow2", "'with, comma'", "1.5M"),
        ("-f qcow2 -o compat=0.10", "a.qcow2", "10M"),
        ("-f qcow2 -o compat=v3,cluster_size=512", "a.qcow2", "10M"),
        (
            "-f qcow2 -o cluster_size=2M,refcount_bits=64",
            "a.qcow2",
            "10G",
        ),
        (
            "-f qcow2 -o refcount_bits=1,lazy_refcounts=on",
            "a.qcow2",
            "1T",
        ),
        (
            "-f qcow2 -o compression_type=zstd -o preallocation=off",
            "a.qcow2",
            "1T",
        ),
        ("-f qcow2 -o size=2M,lazy_refcounts=off", "a.qcow2", ""),
        ("-f qcow2 -b base.qcow2 -F qcow2", "a.qcow2", ""),
        ("-f qcow2 -b base.raw -F raw", "a.qcow2", "5M"),
        ("-f qcow2 -b ../base.raw -F raw", "sub/a.qcow2", ""),
        (
            "-f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2",
            "a.qcow2",
            "",
        ),
        ("-f qcow2 -u -b no,where -F qcow2", "a.qcow2", "5M"),
        ("-q -f qcow2", "a.qcow2", "5M"),
        ("", "a.raw", "5M"),
        ("-f raw -o preallocation=off,size=1M", "a.raw", ""),
    ] {
        let line = format!("create {options} {name} {size}");
        assert_creates_the_same(&scratch, &line, name.trim_matches('\''));
    }
}

#[test]
fn create_fails_where_qemu_img_fails() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 base.qcow2 3M");
    for line in [
        "create -f qcow2 new",
        "create -f qcow2 new 1e3",
        "create -f qcow2 new 8E",
        "create -f qcow2 new 1.5",
        "create -f qcow2 -o size=1M new 2M",
        "create -f qcow2 -o nosuch=1 new 1M",
        "create -f qcow2 -o cluster_size=100 new 1M",
        "create -f qcow2 -o cluster_size=4M new 1M",
        "create -f qcow2 -o refcount_bits=3 new 1M",
        "create -f qcow2 -o compat=9 new 1M",
        "create -f qcow2 -o compat=0.10,lazy_refcounts=on new 1M",
        "create -f qcow2 -o compat=0.10,compression_type=zstd new 1M",
        "create -f qcow2 -o compat=0.10,refcount_bits=8 new 1M",
        "create -f qcow2 -b base.qcow2 new",
        "create -f qcow2 -u -b base.qcow2 new 1M",
        "create -f qcow2 -F qcow2 new 1M",
        "create -f qcow2 -b missing.qcow2 -F qcow2 new",
        "create -f raw -b base.qcow2 -F qcow2 new",
        "create -f qcow2 -b base.qcow2 -F qcow2 base.qcow2",
        "create -f qcow2 missing/new 1M",
    ] {
        let theirs = scratch.qemu_img(line);
        assert_ne!(theirs.code, Some(0), "{line}");
        scratch.sh("rm -f new");
        let ours = scratch.urus(line);
        assert!(matches!(ours.code, Some(1 | 2)), "{line}: {ours:?}");
        assert!(!ours.stderr.is_empty(), "{line}");
        assert!(
            !scratch.path("new").exists(),
            "{line}: something was created"
        );
    }
    // The backing file has survived the attempt to overwrite it.
    assert_eq!(scratch.qemu_img("check base.qcow2").code, Some(0));
    let unsupported = scratch.urus("create -f qcow2 -o preallocation=full new 1M");
    assert_eq!(unsupported.code, Some(1));
    assert!(
        unsupported.stderr.contains("preallocation=full"),
        "{unsupported:?}"
    );
    // An image in use is not overwritten.
    let held = std::process::Command::new("sh")
        .current_dir(scratch.path(""))
        .args([
            "-c",
            "(echo 'write 0 4k'; sleep 2; echo quit) | qemu-io base.qcow2",
        ])
        .stdout(std::process::Stdio::null())
        .spawn();
    let mut held = held.expect("qemu-io");
    std::thread::sleep(std::time::Duration::from_millis(700));
    let ours = scratch.urus("create -f qcow2 base.qcow2 5M");
    assert_eq!(ours.code, Some(1), "{ours:?}");
    held.wait().expect("qemu-io");
    assert!(
        scratch
            .urus("info base.qcow2")
            .stdout
            .contains("virtual size: 3 MiB")
    );
}

#[test]
fn sizes_mean_the_same() {
    let scratch = Scratch::new();
    for size in [
        "1.5G",
        "10M",
        "512b",
        "1K",
        "0x1000",
        "2.5k",
        "' 1G'",
        "+512",
        ".5G",
        "1.G",
        "1.0000001k",
        "3t",
        "1e3",
        "0x1k",
        "abc",
        "1.5",
        "16E",
        "8E",
        "1G5",
        "'1 G'",
        "1s",
        "''",
        "9223372036854775808",
    ] {
        let line = format!("create -f raw size.raw {size}");
        let (theirs, ours) = (scratch.qemu_img(&line), scratch.urus(&line));
        assert_eq!(ours.stdout, theirs.stdout, "{size}");
        assert_eq!(
            ours.code == Some(0),
            theirs.code == Some(0),
            "{size}: {ours:?}"
        );
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 1M");
    for command in ["info a.qcow2", "map --output json a.qcow2", "--help"] {
        let Ran { stdout, stderr, .. } = scratch.run(
            "sh",
            &format!("-c '{} {command} | true; echo done'", common::urus()),
        );
        assert_eq!(
            (stdout.as_str(), stderr.as_str()),
            ("done\n", ""),
            "{command}"
        );
    }
}

/// What was not understood exits with 1, as from qemu-img: 2 from `check` means a corrupt image. And what qemu-img understands is understood.
#[test]
fn command_lines_exit_as_those_of_qemu_img() {
    let scratch = Scratch::new();
    scratch.sh("qemu-img create -q -f qcow2 a.qcow2 1M");
    for line in [
        "check -U a.qcow2",
        "check --force-share a.qcow2",
        "check -T none a.qcow2",
        "check -T directsync -U a.qcow2",
        "check --cache=writethrough -r all a.qcow2",
        "check -T bogus a.qcow2",
        "check -U -r all a.qcow2",
        "check",
        "check --bogus a.qcow2",
        "check -p a.qcow2",
        "check a.qcow2 b.qcow2",
        "check -r some a.qcow2",
        "check -f vmdk a.qcow2",
        "check --output=xml a.qcow2",
        "check --help",
        "info",
        "info --bogus a.qcow2",
        "info -T none a.qcow2",
        "info -U a.qcow2",
        "info a.qcow2 b.qcow2",
        "map",
        "map --bogus a.qcow2",
        "map -T none a.qcow2",
        "map -s zz a.qcow2",
        "map -U a.qcow2",
        "create",
        "create --bogus b.qcow2 1M",
        "create -f qcow2",
        "create -f vhs b.qcow2 1M",
        "create -f qcow2 b.qcow2 1Q",
        "create -f qcow2 b.qcow2 1M c",
    ] {
        let (ours, theirs) = (scratch.urus(line), scratch.qemu_img(line));
        assert_eq!(ours.code, theirs.code, "{line}: {ours:?} {theirs:?}");
    }
    let refused = scratch.urus("--bogus check a.qcow2");
    assert_eq!(refused.code, Some(1), "{refused:?}");
    // Under a writer: refused, unless -U says not to care.
    let server = common::Server::start(&scratch, "a.qcow2");
    assert_eq!(scratch.urus("check a.qcow2").code, Some(1));
    assert_eq!(scratch.urus("check -U a.qcow2").code, Some(0));
    server.end();
}
