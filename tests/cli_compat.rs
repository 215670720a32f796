//! `urus create`, `info`, `check` and `map` beside qemu-img: same flags, same JSON, same text, same exit codes, so that a
//! script that says qemu-img works with urus in its place.
//!
//! Both programs run in the same directory with the same words, on the same files; the comparison is field by field
//! and names the field. What QEMU reports about the file node below an image (an extent size hint, a lock of its own) is
//! left out; so is the whole list of child nodes where qemu-img is too old to have it.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use urus_tests::program::{Finished, Program};
use urus_tests::{GIB, KIB, MIB, Scratch, content, header, program, qemu, urus};

/// Runs the same words with both programs: (qemu-img's result, urus's result).
fn both(directory: &Path, line: &str) -> (Finished, Finished) {
    let run = |program: Program| program.words(line).current_dir(directory).run();
    (run(program("qemu-img")), run(urus()))
}

/// Exit codes must be equal, and so must the JSON.
fn assert_same_json(directory: &Path, line: &str) {
    let (theirs, ours) = both(directory, line);
    assert_eq!(
        theirs.status.code(),
        ours.status.code(),
        "{line}\n{theirs}\n{ours}"
    );
    let (mut theirs, mut ours) = (theirs.json(), ours.json());
    without_file_details(&mut theirs);
    without_file_details(&mut ours);
    without_news(&theirs, &mut ours);
    let differences = differences("", &theirs, &ours);
    assert!(differences.is_empty(), "{line}\n{}", differences.join("\n"));
}

/// Exit codes must be equal, and the text but for what QEMU says of child nodes.
fn assert_same_text(directory: &Path, line: &str) {
    let (theirs, ours) = both(directory, line);
    assert_eq!(
        theirs.status.code(),
        ours.status.code(),
        "{line}\n{theirs}\n{ours}"
    );
    let above_children = |text: &str| {
        text.split("Child node")
            .next()
            .map(str::trim_end)
            .map(str::to_owned)
    };
    assert_eq!(
        above_children(&theirs.stdout),
        above_children(&ours.stdout),
        "{line}"
    );
}

/// Takes out what belongs to QEMU's own view of the file below an image.
fn without_file_details(info: &mut Value) {
    let children = info.get_mut("children").and_then(Value::as_array_mut);
    for child in children.into_iter().flatten() {
        if let Some(info) = child.get_mut("info").and_then(Value::as_object_mut) {
            info.remove("format-specific");
        }
    }
}

/// Takes out of ours what an older qemu-img (Debian 12 has 7.2) does not print yet: child nodes in info, compressed in
/// map.
fn without_news(theirs: &Value, ours: &mut Value) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for field in ["children", "compressed"] {
                if !theirs.contains_key(field) {
                    ours.remove(field);
                }
            }
        }
        (Value::Array(theirs), Value::Array(ours)) => {
            theirs
                .iter()
                .zip(ours)
                .for_each(|(theirs, ours)| without_news(theirs, ours));
        }
        _ => {}
    }
}

/// Each field in which the two differ.
fn differences(path: &str, theirs: &Value, ours: &Value) -> Vec<String> {
    match (theirs, ours) {
        (Value::Object(left), Value::Object(right)) => {
            let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
            let at =
                |fields: &serde_json::Map<String, Value>, name: &str| fields.get(name).cloned();
            let absent = || Value::String("(absent)".to_owned());
            names
                .into_iter()
                .flat_map(|name| {
                    let theirs = at(left, name).unwrap_or_else(absent);
                    let ours = at(right, name).unwrap_or_else(absent);
                    differences(&format!("{path}.{name}"), &theirs, &ours)
                })
                .collect()
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            let pairs = left.iter().zip(right).enumerate();
            pairs
                .flat_map(|(number, (left, right))| {
                    differences(&format!("{path}[{number}]"), left, right)
                })
                .collect()
        }
        (left, right) if left == right => Vec::new(),
        (left, right) => vec![format!("{path}: qemu-img has {left}, urus has {right}")],
    }
}

/// Images of many kinds, all in one directory.
fn zoo(directory: &Path) -> Vec<&'static str> {
    let at = |name: &str| directory.join(name);
    let create = |name: &str, options: &str| qemu::create(&at(name), options, 64 * MIB);
    create("default.qcow2", "");
    create("v2.qcow2", "compat=0.10");
    create("lazy.qcow2", "lazy_refcounts=on");
    create("zstd.qcow2", "compression_type=zstd");
    create("narrow.qcow2", "refcount_bits=1,cluster_size=512");
    create("wide.qcow2", "refcount_bits=64,cluster_size=2M");
    create("written.qcow2", "");
    let writes = [
        "write -q -P 1 0 3M",
        "write -q -P 2 10M 64k",
        "write -q -z 11M 1M",
        "write -q -z -u 12M 1M",
    ];
    qemu::io_file(&at("written.qcow2"), &writes);
    qemu::io_file(
        &at("written.qcow2"),
        &[
            "discard 1M 128k",
            "write -q -P 3 40M 4M",
            "write -q -P 3 63M 1M",
        ],
    );
    create("snapshots.qcow2", "");
    qemu::io_file(&at("snapshots.qcow2"), &["write -q -P 1 0 3M"]);
    for name in ["first", "second"] {
        qemu::img("snapshot -c")
            .arg(name)
            .arg(at("snapshots.qcow2"))
            .ok();
        qemu::io_file(&at("snapshots.qcow2"), &["write -q -P 2 1M 1M"]);
    }
    create("bitmaps.qcow2", "");
    for name in ["one", "two"] {
        qemu::img("bitmap --add -g 32768")
            .arg(at("bitmaps.qcow2"))
            .arg(name)
            .ok();
    }
    create("dirty.qcow2", "");
    header::set_bits(&at("dirty.qcow2"), header::INCOMPATIBLE, header::DIRTY);
    create("corrupt.qcow2", "");
    header::set_bits(&at("corrupt.qcow2"), header::INCOMPATIBLE, header::CORRUPT);
    std::fs::write(at("noise"), content::compressible(1, 4 << 20)).expect("writing");
    let compress = |name: &str, kind: &str| {
        let convert =
            qemu::img("convert -c -f raw -O qcow2 -o").arg(format!("compression_type={kind}"));
        convert.arg(at("noise")).arg(at(name)).ok();
    };
    compress("zlib.qcow2", "zlib");
    compress("zstd-written.qcow2", "zstd");
    qemu::create_overlay(&at("overlay.qcow2"), "", "written.qcow2", "qcow2");
    qemu::io_file(
        &at("overlay.qcow2"),
        &[
            "write -q -P 9 2M 2M",
            "write -q -z 41M 1M",
            "write -q -P 9 50M 100k",
        ],
    );
    qemu::create_overlay(
        &at("second-overlay.qcow2"),
        "cluster_size=4k",
        "overlay.qcow2",
        "qcow2",
    );
    qemu::io_file(
        &at("second-overlay.qcow2"),
        &["write -q -P 9 3M 12k", "write -q -P 9 51M 4k"],
    );
    qemu::create_overlay(&at("over-raw.qcow2"), "", "noise", "raw");
    qemu::io_file(&at("over-raw.qcow2"), &["write -q -P 9 1M 64k"]);
    qemu::create(&at("odd.qcow2"), "", 10 * MIB + 1536);
    // Longer than what lies below, which itself is longer than what lies below it.
    for (name, below, format, size) in [
        ("longer.qcow2", "noise", "raw", 6 * MIB + 512),
        ("longest.qcow2", "longer.qcow2", "qcow2", 80 * MIB),
    ] {
        qemu::create_overlay(&at(name), "", below, format);
        let resize = qemu::img("resize -q -f qcow2").arg(at(name));
        resize.arg(size.to_string()).ok();
    }
    vec![
        "default.qcow2",
        "v2.qcow2",
        "lazy.qcow2",
        "zstd.qcow2",
        "narrow.qcow2",
        "wide.qcow2",
        "written.qcow2",
        "snapshots.qcow2",
        "bitmaps.qcow2",
        "dirty.qcow2",
        "corrupt.qcow2",
        "zlib.qcow2",
        "zstd-written.qcow2",
        "overlay.qcow2",
        "second-overlay.qcow2",
        "over-raw.qcow2",
        "odd.qcow2",
        "longer.qcow2",
        "longest.qcow2",
    ]
}

#[test]
fn info_json_and_text() {
    let scratch = Scratch::new();
    for name in zoo(scratch.path()) {
        for format in ["", "-f qcow2"] {
            assert_same_json(
                scratch.path(),
                &format!("info --output=json {format} {name}"),
            );
        }
        assert_same_text(scratch.path(), &format!("info {name}"));
    }
    assert_same_json(scratch.path(), "info --output=json -f raw noise");
    assert_same_text(scratch.path(), "info -f raw noise");
    let absolute = scratch.file("written.qcow2");
    assert_same_json(
        scratch.path(),
        &format!("info --output=json {}", absolute.display()),
    );
}

#[test]
fn check_json_and_text_of_healthy_images() {
    let scratch = Scratch::new();
    for name in zoo(scratch.path()) {
        let before = content::bytes(&scratch.file(name));
        assert_same_json(
            scratch.path(),
            &format!("check --output=json -f qcow2 {name}"),
        );
        assert_same_text(scratch.path(), &format!("check {name}"));
        assert!(
            before == content::bytes(&scratch.file(name)),
            "{name}: checking changed it"
        );
    }
}

#[test]
fn map_json_and_text() {
    let scratch = Scratch::new();
    for name in zoo(scratch.path()) {
        assert_same_json(
            scratch.path(),
            &format!("map --output=json -f qcow2 {name}"),
        );
        assert_same_text(scratch.path(), &format!("map {name}"));
    }
    for part in [
        "--start-offset=1M --max-length=1M",
        "--start-offset=10M",
        "--max-length=100k",
    ] {
        assert_same_json(
            scratch.path(),
            &format!("map --output=json {part} overlay.qcow2"),
        );
    }
}

/// Makes leaks: refcounts of two clusters past everything that is used.
fn leak(image: &Path) {
    let table = header::u64_at(image, header::REFCOUNT_TABLE_OFFSET);
    let block = header::u64_at(image, table);
    let clusters = std::fs::metadata(image)
        .expect("metadata")
        .len()
        .div_ceil(64 * KIB);
    header::patch(image, block + clusters * 2, &[0, 1, 0, 1]);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(image)
        .expect("opening");
    file.set_len((clusters + 2) * 64 * KIB).expect("growing");
}

/// Makes errors: the refcount of the first data cluster is 0.
fn lose_a_refcount(image: &Path) {
    let table = header::u64_at(image, header::REFCOUNT_TABLE_OFFSET);
    let block = header::u64_at(image, table);
    header::patch(
        image,
        block + header::first_data(image) / (64 * KIB) * 2,
        &[0, 0],
    );
}

/// Exit codes 0, 2 and 3, the counts, and what `-r` mends; `qemu-img check` is satisfied afterwards and the data is what
/// it was.
#[test]
fn check_finds_and_repairs() {
    let scratch = Scratch::new();
    type Damage = fn(&Path);
    let damages: [(&str, &[Damage], i32); 3] = [
        ("leaks", &[leak], 3),
        ("errors", &[lose_a_refcount], 2),
        ("both", &[lose_a_refcount, leak], 2),
    ];
    for (what, damage, code) in damages {
        let broken = scratch.file("broken.qcow2");
        let _ = std::fs::remove_file(&broken);
        qemu::create(&broken, "", 16 * MIB);
        qemu::io_file(&broken, &["write -q -P 1 0 3M"]);
        damage.iter().for_each(|damage| damage(&broken));
        let before = content::bytes(&broken);
        assert_same_json(scratch.path(), "check --output=json -f qcow2 broken.qcow2");
        assert_same_text(scratch.path(), "check broken.qcow2");
        let ours = urus().words("check -f qcow2").arg(&broken).run();
        assert_eq!(ours.status.code(), Some(code), "{what}: {ours}");
        assert!(
            before == content::bytes(&broken),
            "{what}: checking changed the image"
        );

        for repair in ["leaks", "all"] {
            let (theirs, ours) = (scratch.file("theirs.qcow2"), scratch.file("ours.qcow2"));
            for copy in [&theirs, &ours] {
                std::fs::copy(&broken, copy).expect("copying");
            }
            let arguments = format!("check --output=json -f qcow2 -r {repair}");
            let mended = urus().words(&arguments).arg(&ours).run();
            if repair == "leaks" && code != 3 {
                // qemu-img gives up here without a word of JSON. The leaks are mended, the errors remain.
                let _ = mended.expect_code(2);
                continue;
            }
            let theirs = qemu::img(&arguments).arg(&theirs).run();
            let context = format!("{what}, -r {repair}\n{theirs}\n{mended}");
            assert_eq!(theirs.status.code(), mended.status.code(), "{context}");
            for field in [
                "check-errors",
                "corruptions",
                "leaks",
                "corruptions-fixed",
                "leaks-fixed",
            ] {
                assert_eq!(
                    theirs.json().get(field),
                    mended.json().get(field),
                    "{field}: {context}"
                );
            }
            qemu::assert_clean(&ours);
            qemu::io_file(&ours, &["read -P 1 0 3M", "read -P 0 3M 13M"]);
            urus().words("check -f qcow2").arg(&ours).ok();
        }
    }
    // What has no refcounts cannot be checked: qemu-img has an exit code of its own for that.
    std::fs::write(scratch.file("raw"), [0; 4096]).expect("writing");
    let (theirs, ours) = both(scratch.path(), "check -f raw raw");
    assert_eq!(
        (theirs.status.code(), ours.status.code()),
        (Some(63), Some(63)),
        "{theirs}\n{ours}"
    );
}

/// Repair of what power cuts and other programs leave: a dirty image; one whose refcount block is gone.
#[test]
fn check_repairs_a_dirty_image_and_a_lost_refcount_block() {
    let scratch = Scratch::new();
    let image = scratch.file("image.qcow2");
    qemu::create(&image, "lazy_refcounts=on", 16 * MIB);
    let commands = ["write -q -P 1 0 3M", "flush", "abort"];
    let _ = qemu::io_program("qcow2", &image.display().to_string(), &commands).run();
    assert_ne!(
        header::u64_at(&image, header::INCOMPATIBLE) & header::DIRTY,
        0,
        "the image should be dirty"
    );
    let checked = urus().words("check -f qcow2").arg(&image).run();
    assert_eq!(checked.status.code(), Some(2), "{checked}");
    urus().words("check -f qcow2 -r all").arg(&image).ok();
    assert_eq!(
        header::u64_at(&image, header::INCOMPATIBLE),
        0,
        "still dirty"
    );
    qemu::assert_clean(&image);
    qemu::io_file(&image, &["read -P 1 0 3M"]);

    let table = header::u64_at(&image, header::REFCOUNT_TABLE_OFFSET);
    header::set_u64(&image, table, 0);
    urus().words("check -f qcow2 -r all").arg(&image).ok();
    qemu::assert_clean(&image);
    qemu::io_file(&image, &["read -P 1 0 3M"]);
}

/// Each combination of options gives an image that qemu-img describes in the same words as its own; the announcement
/// is the same too.
#[test]
fn create_options() {
    let scratch = Scratch::new();
    let at = |name: &str| scratch.file(name);
    std::fs::create_dir_all(at("theirs")).expect("a directory");
    std::fs::create_dir_all(at("ours")).expect("a directory");
    for directory in ["theirs", "ours"] {
        qemu::create(&at(directory).join("base.qcow2"), "", 3 * MIB);
        std::fs::write(at(directory).join("base.raw"), vec![1; 5 << 20]).expect("writing");
    }
    for arguments in [
        "image.qcow2 1G",
        "image.qcow2 1T",
        "image.qcow2 1000",
        "image.qcow2 1.5G",
        "image.qcow2 0",
        "-o cluster_size=512 image.qcow2 64M",
        "-o cluster_size=4k,refcount_bits=1 image.qcow2 1G",
        "-o cluster_size=2M,refcount_bits=64 image.qcow2 1G",
        "-o compat=0.10 image.qcow2 1G",
        "-o compat=v2 image.qcow2 1G",
        "-o compat=v3,lazy_refcounts=on image.qcow2 1G",
        "-o compat=1.1,compression_type=zstd image.qcow2 1G",
        "-b base.qcow2 -F qcow2 image.qcow2",
        "-b base.raw -F raw image.qcow2",
        "-b base.raw -F raw -o cluster_size=1k,lazy_refcounts=on image.qcow2 64M",
        "-b base.qcow2 -F qcow2 -o compat=0.10 image.qcow2 1G",
    ] {
        let line = format!("create -f qcow2 {arguments}");
        let theirs = program("qemu-img")
            .words(&line)
            .current_dir(&at("theirs"))
            .ok();
        let ours = urus().words(&line).current_dir(&at("ours")).ok();
        assert_eq!(theirs.stdout.trim(), ours.stdout.trim(), "{line}");
        let describe = |directory: &str| {
            let info = qemu::img("info --output=json image.qcow2")
                .current_dir(&at(directory))
                .ok();
            let mut info = info.json();
            // Their directories differ, and how much of the file is a hole.
            for field in ["actual-size", "full-backing-filename", "children"] {
                info.as_object_mut().expect("an object").remove(field);
            }
            info
        };
        let differences = differences("", &describe("theirs"), &describe("ours"));
        assert!(differences.is_empty(), "{line}\n{}", differences.join("\n"));
        qemu::assert_clean(&at("ours").join("image.qcow2"));
        assert_same_layout(
            &line,
            &at("theirs").join("image.qcow2"),
            &at("ours").join("image.qcow2"),
        );
        for directory in ["theirs", "ours"] {
            std::fs::remove_file(at(directory).join("image.qcow2")).expect("removing");
        }
    }
    let quiet = urus()
        .words("create -q -f qcow2")
        .arg(at("quiet.qcow2"))
        .arg("1M")
        .ok();
    assert_eq!(quiet.stdout, "");
    urus()
        .words("create -q -f raw")
        .arg(at("image.raw"))
        .arg("3M")
        .ok();
    assert_eq!(
        std::fs::metadata(at("image.raw")).expect("metadata").len(),
        3 * MIB
    );
}

/// New images have QEMU's layout, since tools dump and poke those bytes: the same first cluster, the tables at the same
/// places.
fn assert_same_layout(line: &str, theirs: &Path, ours: &Path) {
    let head = |image: &Path| {
        let mut bytes = content::bytes(image);
        bytes.truncate(1 << header::u32_at(image, header::CLUSTER_BITS).min(16));
        bytes
    };
    let (theirs, ours) = (head(theirs), head(ours));
    let first = theirs
        .iter()
        .zip(&ours)
        .position(|(theirs, ours)| theirs != ours);
    assert_eq!(
        first, None,
        "{line}: the first cluster differs from that byte on"
    );
}

/// What qemu-img refuses to create is not created, and what exists is not replaced by a failed attempt.
#[test]
fn create_refusals() {
    let scratch = Scratch::new();
    let new = scratch.file("new.qcow2");
    for (arguments, words) in [
        (
            "-b missing.qcow2 -F qcow2 new.qcow2",
            &["missing.qcow2"][..],
        ),
        ("-b base.qcow2 new.qcow2", &["format"]),
        ("new.qcow2", &["size"]),
        (
            "-o compat=0.10,lazy_refcounts=on new.qcow2 1G",
            &["lazy_refcounts", "compat"],
        ),
        (
            "-o compat=0.10,compression_type=zstd new.qcow2 1G",
            &["compression_type", "compat"],
        ),
        ("-o cluster_size=512 new.qcow2 2T", &["size", "cluster"]),
        ("missing/new.qcow2 1G", &["missing/new.qcow2"]),
    ] {
        qemu::create(&scratch.file("base.qcow2"), "", MIB);
        let create = urus()
            .words("create -f qcow2")
            .words(arguments)
            .current_dir(scratch.path());
        let _ = create.run().expect_refusal().says_one_of(words);
        assert!(!new.exists(), "{arguments}: something was created");
    }
    // An image that another process holds is not overwritten.
    let held = scratch.file("held.qcow2");
    qemu::create(&held, "", GIB);
    let holder = program("qemu-io").words("-f qcow2").arg(&held);
    let holder = urus_tests::served::Holding::until_prompt(holder, "qemu-io>");
    let before = content::bytes(&held);
    let _ = urus()
        .words("create -f qcow2")
        .arg(&held)
        .arg("1M")
        .run()
        .expect_refusal();
    assert!(
        before == content::bytes(&held),
        "a held image was overwritten"
    );
    drop(holder);
}

/// `info`, `check` and `map` on files that are not there or are no images: exit code 1, as qemu-img.
#[test]
fn commands_on_what_is_no_image() {
    let scratch = Scratch::new();
    std::fs::write(scratch.file("text"), "no image\n").expect("writing");
    for line in [
        "info missing",
        "check missing",
        "map missing",
        "info -f qcow2 text",
        "check -f qcow2 text",
        "map -f qcow2 text",
    ] {
        let (theirs, ours) = both(scratch.path(), line);
        assert_eq!(theirs.status.code(), Some(1), "{theirs}");
        assert_eq!(ours.status.code(), Some(1), "{ours}");
        let _ = ours.says_one_of(&[line.split(' ').next_back().expect("a name")]);
    }
}
