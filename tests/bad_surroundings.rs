//! What surrounds an image: backing files that are missing, forbidden or a trap; sockets that exist; images that
//! another process holds; arguments that make no sense. Each is refused with a message that says what and where, with
//! an exit code other than 0, and nothing changes on disk.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;
use urus_tests::program::Program;
use urus_tests::served::Serve;
use urus_tests::{Driver, KIB, MIB, Scratch, Served, content, header, program, qemu, urus};

/// An overlay that names `backing` without asking whether it is there.
fn overlay_naming(image: &Path, backing: &str, format: &str) {
    let _ = std::fs::remove_file(image);
    let create = qemu::img("create -q -u -f qcow2 -F")
        .arg(format)
        .arg("-b")
        .arg(backing);
    create.arg(image).arg("16M").ok();
}

/// Serving `image` must fail and say one of `words`; neither it nor anything beside it changes.
fn assert_refused(image: &Path, arguments: &str, words: &[&str]) {
    let before = content::bytes(image);
    for driver in Driver::ALL {
        let refused = Serve::new(image, driver).with(arguments).refused();
        println!("{}", refused.stderr.trim());
        let _ = refused.says_one_of(words);
    }
    assert!(
        before == content::bytes(image),
        "{} was changed",
        image.display()
    );
}

/// By default a backing file lies beneath the directory of the image that names it. What does not is not opened,
/// whatever it is called.
#[test]
fn backing_files_out_of_bounds() {
    let scratch = Scratch::new();
    let inner = scratch.file("inner");
    std::fs::create_dir_all(inner.join("deeper")).expect("a directory");
    let outside = scratch.file("outside.qcow2");
    qemu::create(&outside, "", 16 * MIB);
    qemu::io_file(&outside, &["write -q -P 0x66 0 1M"]);
    let untouched = content::bytes(&outside);
    symlink(&outside, inner.join("link.qcow2")).expect("a link");
    symlink(scratch.path(), inner.join("directory")).expect("a link");
    let top = inner.join("top.qcow2");
    let absolute = outside.display().to_string();
    for name in [
        &absolute,
        "../outside.qcow2",
        "deeper/../../outside.qcow2",
        "link.qcow2",
        "directory/outside.qcow2",
    ] {
        overlay_naming(&top, name, "qcow2");
        assert_refused(
            &top,
            "",
            &["outside", "beneath", "not allowed", "backing-dir"],
        );
        assert_refused(
            &top,
            "--read-only",
            &["outside", "beneath", "not allowed", "backing-dir"],
        );
    }
    // A chain: each image's own directory counts.
    overlay_naming(&inner.join("deeper/middle.qcow2"), "../base.qcow2", "qcow2");
    qemu::create(&inner.join("base.qcow2"), "", 16 * MIB);
    overlay_naming(&top, "deeper/middle.qcow2", "qcow2");
    assert_refused(
        &top,
        "",
        &["outside", "beneath", "not allowed", "backing-dir"],
    );

    // --backing-dir widens the bounds, to that directory and no further.
    let widened = format!("--backing-dir {}", scratch.path().display());
    for name in [&absolute, "../outside.qcow2"] {
        overlay_naming(&top, name, "qcow2");
        let served = Serve::new(&top, Driver::IoUring).with(&widened).start();
        served.qemu_io(&["read -P 0x66 0 1M", "write -P 0x77 512k 4k"]);
        served.stop();
        let elsewhere = format!("--backing-dir {}", inner.join("deeper").display());
        assert_refused(
            &top,
            &elsewhere,
            &["outside", "beneath", "not allowed", "backing-dir"],
        );
    }
    // --no-backing forbids even what would be in bounds.
    overlay_naming(&top, "base.qcow2", "qcow2");
    assert_refused(&top, "--no-backing", &["backing"]);
    assert!(
        untouched == content::bytes(&outside),
        "the backing file was changed"
    );
}

/// A backing file's name is the name of a file: never a protocol, a JSON description or a descriptor.
#[test]
fn backing_names_that_are_no_file_names() {
    let scratch = Scratch::new();
    let (top, secret) = (scratch.file("top.qcow2"), scratch.file("secret"));
    std::fs::write(&secret, "secret").expect("writing");
    // QEMU would not create some of these, so the names are put into an image that has a longer one.
    overlay_naming(&top, &"x".repeat(200), "raw");
    let at = header::u64_at(&top, header::BACKING_FILE_OFFSET);
    for name in [
        "json:{\"driver\":\"file\",\"filename\":\"secret\"}",
        "nbd://localhost:1/",
        "nbd:unix:/tmp/x",
        "http://localhost:1/x",
        "ssh://localhost/x",
        "fd:0",
        "file:secret",
        "sec\0ret",
        "",
    ] {
        header::patch(
            &top,
            at,
            &[name.as_bytes(), &[0; 200][name.len()..]].concat(),
        );
        header::set_u32(
            &top,
            header::BACKING_FILE_SIZE,
            u32::try_from(name.len()).expect("a short name"),
        );
        if name.is_empty() {
            // No name means no backing file, as for QEMU.
            continue;
        }
        assert_refused(&top, "", &["backing", "name"]);
    }
}

/// The format of a backing file is recorded, never guessed.
#[test]
fn backing_format_not_recorded() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.file("base.qcow2"), scratch.file("top.qcow2"));
    qemu::create(&base, "", 16 * MIB);
    overlay_naming(&top, "base.qcow2", "qcow2");
    // Turn the backing format's extension into one that nobody knows.
    let at = u64::from(header::u32_at(&top, header::HEADER_LENGTH));
    assert_eq!(
        header::u32_at(&top, at),
        0xe279_2aca,
        "the backing format should come first"
    );
    header::set_u32(&top, at, 0x1234_5678);
    assert_refused(&top, "", &["format"]);
    overlay_naming(&top, "base.qcow2", "qcow2");
    header::patch(&top, at + 8, b"vmdk\0");
    assert_refused(&top, "", &["format", "vmdk"]);
}

/// Backing files that are not there, or are no files. A FIFO must not make the program wait for a writer.
#[test]
fn backing_files_that_are_no_files() {
    let scratch = Scratch::new();
    let top = scratch.file("top.qcow2");
    overlay_naming(&top, "missing.qcow2", "qcow2");
    assert_refused(&top, "", &["missing.qcow2"]);
    std::fs::create_dir(scratch.file("directory")).expect("a directory");
    overlay_naming(&top, "directory", "raw");
    assert_refused(&top, "", &["directory"]);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        scratch.file("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("a FIFO");
    overlay_naming(&top, "fifo", "raw");
    assert_refused(&top, "", &["fifo"]);
    // The same for the image itself.
    for name in ["missing.qcow2", "directory", "fifo"] {
        for driver in Driver::ALL {
            let _ = Serve::new(&scratch.file(name), driver)
                .refused()
                .says_one_of(&[name]);
        }
        let _ = urus()
            .arg("info")
            .arg(scratch.file(name))
            .run()
            .expect_refusal()
            .says_one_of(&[name]);
    }
}

/// A chain that bites its tail, and one that does not end within reason.
#[test]
fn loops_and_very_long_chains() {
    let scratch = Scratch::new();
    let (one, two) = (scratch.file("one.qcow2"), scratch.file("two.qcow2"));
    overlay_naming(&one, "one.qcow2", "qcow2");
    assert_refused(&one, "", &["loop", "cycle", "itself"]);
    overlay_naming(&one, "two.qcow2", "qcow2");
    overlay_naming(&two, "one.qcow2", "qcow2");
    assert_refused(&one, "", &["loop", "cycle", "itself"]);
    // By another name it is the same file.
    std::fs::hard_link(&one, scratch.file("alias.qcow2")).expect("a link");
    overlay_naming(&two, "alias.qcow2", "qcow2");
    assert_refused(&one, "", &["loop", "cycle", "itself"]);

    let image = |number: usize| scratch.file(&format!("c{number:04}.qcow2"));
    let create = qemu::img("create -q -u -f qcow2 -o cluster_size=512 -F qcow2 -b c0001.qcow2");
    create.arg(image(0)).arg("1M").ok();
    let template = content::bytes(&image(0));
    let name =
        usize::try_from(header::u64_at(&image(0), header::BACKING_FILE_OFFSET)).expect("an offset");
    for number in 1..2000 {
        let mut bytes = template.clone();
        bytes[name..name + 11].copy_from_slice(format!("c{:04}.qcow2", number + 1).as_bytes());
        std::fs::write(image(number), bytes).expect("writing");
    }
    assert_refused(&image(0), "", &["depth", "deep", "long", "more than"]);
}

/// A socket's path that exists is somebody's: a file is not replaced, a running server not cut off.
#[test]
fn socket_path_exists() {
    let scratch = Scratch::new();
    let (image, other) = (scratch.file("image.qcow2"), scratch.file("other.qcow2"));
    qemu::create(&image, "", MIB);
    qemu::create(&other, "", MIB);
    let sockets = tempfile::Builder::new()
        .prefix("urus-")
        .tempdir()
        .expect("a directory for a socket");
    let file = sockets.path().join("file");
    std::fs::write(&file, "precious").expect("writing");
    let serve = |image: &Path, socket: &Path| {
        let program = urus()
            .arg("serve")
            .arg(image)
            .arg("--nbd")
            .arg(format!("unix:{}", socket.display()));
        program.limit(Duration::from_secs(10))
    };
    let _ = serve(&image, &file)
        .run()
        .expect_refusal()
        .says_one_of(&[&file.display().to_string()]);
    assert_eq!(std::fs::read_to_string(&file).expect("reading"), "precious");

    let served = Served::start(&other, Driver::IoUring);
    let socket = served.socket();
    let _ = serve(&image, &socket)
        .run()
        .expect_refusal()
        .says_one_of(&[&socket.display().to_string()]);
    served.qemu_io(&["write -P 0x11 0 4k", "read -P 0x11 0 4k"]);
    served.stop();
    let nowhere = sockets.path().join("missing/directory/nbd");
    let _ = serve(&image, &nowhere)
        .run()
        .expect_refusal()
        .says_one_of(&["missing"]);
    // A TCP port that is taken.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let taken = urus()
        .arg("serve")
        .arg(&image)
        .arg("--nbd")
        .arg(&address)
        .limit(Duration::from_secs(10));
    let _ = taken.run().expect_refusal().says_one_of(&[&address]);
}

/// QEMU, holding an image until it is dropped.
struct Holder {
    _held: urus_tests::served::Holding,
}

fn qemu_holds(image: &Path, arguments: &str) -> Holder {
    let program = program("qemu-io")
        .words("-f qcow2")
        .words(arguments)
        .words("-c quit")
        .arg(image);
    // The image can be opened at all; then it is opened again, and held.
    program.ok();
    let program = urus_tests::program("qemu-io")
        .words("-f qcow2")
        .words(arguments)
        .arg(image);
    Holder {
        _held: urus_tests::served::Holding::until_prompt(program, "qemu-io>"),
    }
}

/// QEMU and urus keep each other off one image: one writer and nobody else, or any number of readers.
#[test]
fn image_held_by_another_process() {
    let held = &["lock", "in use", "held", "another process"];
    for driver in Driver::ALL {
        let scratch = Scratch::new();
        let image = scratch.file("image.qcow2");
        qemu::create(&image, "", 16 * MIB);
        let before = content::bytes(&image);
        let path = image.display().to_string();
        {
            let _writer = qemu_holds(&image, "");
            let _ = Serve::new(&image, driver)
                .refused()
                .says_one_of(held)
                .says_one_of(&["image.qcow2"]);
            let _ = Serve::new(&image, driver)
                .with("--read-only")
                .refused()
                .says_one_of(held);
        }
        {
            let _reader = qemu_holds(&image, "-r");
            let _ = Serve::new(&image, driver).refused().says_one_of(held);
            Serve::new(&image, driver)
                .with("--read-only")
                .start()
                .stop();
        }
        assert!(
            before == content::bytes(&image),
            "{driver:?}: the image was changed"
        );

        let served = Served::start(&image, driver);
        for arguments in ["-r", ""] {
            let qemu = program("qemu-io")
                .words("-f qcow2 -c quit")
                .words(arguments)
                .arg(&path)
                .run();
            assert!(
                qemu.everything().contains("lock"),
                "{driver:?}: QEMU could open it: {qemu}"
            );
        }
        let _ = Serve::new(&image, Driver::IoUring)
            .refused()
            .says_one_of(held);
        let _ = Serve::new(&image, Driver::Blocking)
            .with("--read-only")
            .refused()
            .says_one_of(held);
        served.stop();

        let served = Serve::new(&image, driver).with("--read-only").start();
        let writing = program("qemu-io")
            .words("-f qcow2 -c quit")
            .arg(&path)
            .run();
        assert!(
            writing.everything().contains("lock"),
            "{driver:?}: QEMU could write to it: {writing}"
        );
        let reading = program("qemu-io")
            .words("-f qcow2 -c quit -r")
            .arg(&path)
            .run();
        assert!(
            !reading.everything().contains("lock"),
            "{driver:?}: QEMU could not read it: {reading}"
        );
        let second = Serve::new(&image, Driver::alternating(1))
            .with("--read-only")
            .start();
        second.stop();
        let _ = Serve::new(&image, driver).refused().says_one_of(held);
        served.kill();
        // Nothing is left of a killed process's locks.
        qemu_holds(&image, "");
        Served::start(&image, driver).stop();
    }
}

/// While an overlay is served nobody may write to its backing file, and several overlays may share one.
#[test]
fn backing_file_held() {
    let scratch = Scratch::new();
    let base = scratch.file("base.qcow2");
    qemu::create(&base, "", 16 * MIB);
    for name in ["one.qcow2", "two.qcow2"] {
        overlay_naming(&scratch.file(name), "base.qcow2", "qcow2");
    }
    let one = Served::start(&scratch.file("one.qcow2"), Driver::IoUring);
    let two = Served::start(&scratch.file("two.qcow2"), Driver::Blocking);
    let writing = program("qemu-io")
        .words("-f qcow2 -c quit")
        .arg(&base)
        .run();
    assert!(
        writing.everything().contains("lock"),
        "QEMU could write to a backing file in use: {writing}"
    );
    let _ = Serve::new(&base, Driver::IoUring)
        .refused()
        .says_one_of(&["lock", "in use", "held"]);
    one.stop();
    two.stop();
    qemu_holds(&base, "");
}

/// `--create` never destroys what is there.
#[test]
fn create_over_an_existing_image() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", 16 * MIB);
    qemu::io_file(&image, &["write -q -P 0x11 0 1M"]);
    if let Ok(served) = Serve::new(&image, Driver::IoUring)
        .with("--create 8M")
        .start_or_refused()
    {
        served.stop();
    }
    qemu::io_file(&image, &["read -P 0x11 0 1M"]);
    assert_eq!(qemu::info(&image)["virtual-size"], 16 * MIB);
}

/// Arguments that make no sense are refused before anything is opened, with exit code 1 or 2 and the argument's name.
#[test]
fn arguments_that_make_no_sense() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "", MIB);
    let path = image.display().to_string();
    let before = content::bytes(&image);
    let serve = |line: &str| {
        urus()
            .arg("serve")
            .arg(&path)
            .words(line)
            .limit(Duration::from_secs(10))
    };
    let cases: [(Program, &str); 11] = [
        (serve("--num-queues 0"), "num-queues"),
        (serve("--num-queues many"), "num-queues"),
        (serve("--io sync"), "io"),
        (serve("--cache writethrough"), "cache"),
        (serve("--discard maybe"), "discard"),
        (serve("--format vmdk"), "format"),
        (serve("--backing-dir / --no-backing"), "no-backing"),
        (serve("--l2-cache-size -1"), "l2-cache-size"),
        (serve("--nbd unix:"), "nbd"),
        (serve("--frobnicate"), "frobnicate"),
        (serve("another.qcow2"), "another.qcow2"),
    ];
    for (program, word) in cases {
        let _ = program.run().expect_refusal().says_one_of(&[word]);
    }
    assert!(before == content::bytes(&image), "the image was changed");
    let new = scratch.file("new.qcow2").display().to_string();
    for size in ["0x", "-1", "8Q", "99999999999999999999", "9E", "ten"] {
        let _ = urus()
            .words("create -f qcow2")
            .arg(&new)
            .arg(size)
            .run()
            .expect_refusal();
        assert!(!Path::new(&new).exists(), "{size}: something was created");
    }
    for options in [
        "cluster_size=513",
        "cluster_size=4M",
        "cluster_size=256",
        "refcount_bits=3",
        "compat=7",
        "x=y",
    ] {
        let create = urus()
            .words("create -f qcow2 -o")
            .arg(options)
            .arg(&new)
            .arg("1M");
        let _ = create
            .run()
            .expect_refusal()
            .says_one_of(&[options.split('=').next().expect("a name")]);
        assert!(
            !Path::new(&new).exists(),
            "{options}: something was created"
        );
    }
    // What is bound for a raw image or a tiny one is still an image.
    let _ = urus()
        .words("create -f qcow2 -o compat=0.10,refcount_bits=8")
        .arg(&new)
        .arg("1M")
        .run()
        .expect_refusal();
    urus()
        .words("create -f qcow2")
        .arg(&new)
        .arg((KIB / 2).to_string())
        .ok();
    qemu::assert_clean(Path::new(&new));
}
