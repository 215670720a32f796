//! What `info` shows, against qemu-img. Guards against images that are shown wrong, or not at all because they
//! cannot be opened, and against an inspection that touches anything.

mod common;

use std::fs;
use std::path::Path;

use common::{QemuIo, Scratch, make, overlay, qemu_img, text};
use serde_json::Value;
use urus::{Encryption, Error, Format, ImageInfo, InfoOptions, Qcow2Info, info};
use urus_format::snapshot::{Snapshot, encode_table, parse_table};

fn show(path: &Path) -> (ImageInfo, Qcow2Info) {
    let before = fs::read(path).unwrap();
    let shown = info(path, &InfoOptions::new()).unwrap_or_else(|error| panic!("{error}"));
    assert!(
        before == fs::read(path).unwrap(),
        "inspecting changes nothing"
    );
    let qcow2 = shown.qcow2.clone().expect("qcow2");
    (shown, *qcow2)
}

/// Compares everything that qemu-img says.
fn compare(path: &Path) -> Qcow2Info {
    let theirs: Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json", text(path)])).unwrap();
    let (shown, qcow2) = show(path);
    assert_eq!(theirs["format"], shown.format.name());
    assert_eq!(theirs["virtual-size"], shown.virtual_size);
    assert_eq!(theirs["actual-size"], shown.actual_size);
    assert_eq!(theirs["cluster-size"], qcow2.cluster_bytes);
    assert_eq!(theirs["dirty-flag"], qcow2.dirty);
    let backing = qcow2.backing.as_ref();
    assert_eq!(
        theirs["backing-filename"].as_str(),
        backing.map(|backing| backing.name.as_str())
    );
    assert_eq!(
        theirs["full-backing-filename"].as_str(),
        backing
            .and_then(|backing| backing.path.as_deref())
            .map(text)
    );
    assert_eq!(
        theirs["backing-filename-format"].as_str(),
        backing.and_then(|backing| backing.format.as_deref())
    );
    let data = &theirs["format-specific"]["data"];
    assert_eq!(data["compat"], qcow2.compat());
    assert_eq!(data["compression-type"], qcow2.compression.to_string());
    assert_eq!(data["refcount-bits"], qcow2.refcount_bits);
    let flag = |name: &str| data[name].as_bool().unwrap_or(false);
    assert_eq!(flag("lazy-refcounts"), qcow2.lazy_refcounts);
    assert_eq!(flag("corrupt"), qcow2.corrupt);
    assert_eq!(flag("extended-l2"), qcow2.extended_l2);
    assert_eq!(flag("data-file-raw"), qcow2.data_file_raw);
    assert_eq!(data["data-file"].as_str(), qcow2.data_file.as_deref());
    compare_snapshots(&theirs, &qcow2);
    compare_bitmaps(data, &qcow2);
    qcow2
}

fn compare_snapshots(theirs: &Value, qcow2: &Qcow2Info) {
    let snapshots = theirs["snapshots"].as_array().cloned().unwrap_or_default();
    assert_eq!(snapshots.len(), qcow2.snapshots.len());
    for (theirs, ours) in snapshots.iter().zip(&qcow2.snapshots) {
        assert_eq!(theirs["id"], ours.id.as_str());
        assert_eq!(theirs["name"], ours.name.as_str());
        assert_eq!(theirs["vm-state-size"], ours.vm_state_bytes);
        assert_eq!(theirs["date-sec"], ours.date_seconds);
        assert_eq!(theirs["date-nsec"], ours.date_nanoseconds);
    }
}

fn compare_bitmaps(data: &Value, qcow2: &Qcow2Info) {
    let bitmaps = data["bitmaps"].as_array().cloned().unwrap_or_default();
    assert_eq!(bitmaps.len(), qcow2.bitmaps.len());
    for (theirs, ours) in bitmaps.iter().zip(&qcow2.bitmaps) {
        assert_eq!(theirs["name"], ours.name.as_str());
        assert_eq!(theirs["granularity"], ours.granularity_bytes);
        let flags = theirs["flags"].as_array().unwrap();
        let has = |flag: &str| flags.iter().any(|value| value == flag);
        assert_eq!((has("auto"), has("in-use")), (ours.auto, ours.in_use));
    }
}

#[test]
fn every_option_of_qemu_img() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    for option in [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "lazy_refcounts=on",
        "compression_type=zstd",
        "preallocation=metadata",
        "extended_l2=on,cluster_size=128k",
    ] {
        make(&path, "12345k", &["-o", option]);
        let qcow2 = compare(&path);
        assert_eq!(
            qcow2.unsupported.is_some(),
            option.starts_with("extended_l2"),
            "{option}"
        );
    }
}

#[test]
fn snapshots_and_bitmaps() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(&path, "1M", &[]);
    for name in ["first", "zweiter Schnappschu\u{df}"] {
        qemu_img(&["snapshot", "-c", name, text(&path)]);
    }
    qemu_img(&["bitmap", "--add", text(&path), "fine", "-g", "512"]);
    qemu_img(&[
        "bitmap",
        "--add",
        "--disable",
        text(&path),
        "coarse",
        "-g",
        "1M",
    ]);
    let qcow2 = compare(&path);
    assert_eq!((qcow2.snapshots.len(), qcow2.bitmaps.len()), (2, 2));
    assert_eq!(qcow2.snapshots[0].virtual_size, 1 << 20);
    multiply_first_snapshot(&path, 300);
    // More than the first read of the table holds.
    assert_eq!(compare(&path).snapshots.len(), 300);
}

/// Puts a snapshot table of `count` entries with long names at the end of the file.
fn multiply_first_snapshot(path: &Path, count: u32) {
    let mut bytes = fs::read(path).unwrap();
    let table = usize::try_from(u64::from_be_bytes(bytes[64..72].try_into().unwrap())).unwrap();
    let first = parse_table(&bytes[table..], 1).unwrap().remove(0);
    let snapshots = (0..count)
        .map(|index| Snapshot {
            id: index.to_string().into_bytes(),
            name: format!("{index}{}", "x".repeat(200)).into_bytes(),
            ..first.clone()
        })
        .collect::<Vec<_>>();
    bytes.resize(bytes.len().next_multiple_of(65536), 0);
    let at = bytes.len() as u64;
    bytes.extend(encode_table(&snapshots).unwrap());
    bytes[60..64].copy_from_slice(&count.to_be_bytes());
    bytes[64..72].copy_from_slice(&at.to_be_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_cannot_be_opened_can_be_shown() {
    let scratch = Scratch::new();
    let path = scratch.path("luks.qcow2");
    let secret = "secret,id=s,data=x";
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    make(&path, "1M", &["--object", secret, "-o", luks]);
    let qcow2 = compare(&path);
    assert_eq!(qcow2.encryption, Some(Encryption::Luks));
    assert!(qcow2.unsupported.unwrap().contains("LUKS"));

    // The data file is not even there.
    let path = scratch.path("external.qcow2");
    let data = scratch.path("data.raw");
    make(
        &path,
        "1M",
        &["-o", &format!("data_file={},data_file_raw=on", text(&data))],
    );
    fs::remove_file(&data).unwrap();
    let (_, qcow2) = show(&path);
    assert!(qcow2.external_data && qcow2.data_file_raw && qcow2.unsupported.is_some());
    assert_eq!(qcow2.data_file.as_deref(), Some(text(&data)));

    // Nor is the backing file; and its name may be no file name.
    let path = scratch.path("overlay.qcow2");
    overlay(&path, "missing.raw", Some("raw"));
    assert_eq!(
        compare(&path).backing.unwrap().path,
        Some(scratch.path("missing.raw"))
    );
    overlay(&path, "json:{}", Some("raw"));
    let backing = show(&path).1.backing.unwrap();
    assert_eq!((backing.name.as_str(), backing.path), ("json:{}", None));

    // Unknown features, dirty and corrupt.
    let path = scratch.path("flags.qcow2");
    make(&path, "1M", &[]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[79] |= 0b11;
    fs::write(&path, &bytes).unwrap();
    let qcow2 = compare(&path);
    assert!(qcow2.dirty && qcow2.corrupt && qcow2.unsupported.is_none());
    bytes[72] |= 0x80;
    fs::write(&path, &bytes).unwrap();
    assert!(show(&path).1.unsupported.unwrap().contains("bit 63"));
}

#[test]
fn formats_and_damage() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.raw");
    fs::write(&path, vec![5; 3000]).unwrap();
    let shown = info(&path, &InfoOptions::new()).unwrap();
    assert_eq!(
        (shown.format, shown.virtual_size, shown.file_size),
        // Whole sectors, as QEMU has it.
        (Format::Raw, 3072, 3000)
    );
    let error = info(&path, InfoOptions::new().format(Format::Qcow2)).unwrap_err();
    assert!(matches!(error, Error::NotQcow2 { .. }), "{error:?}");
    make(&path, "1M", &[]);
    assert_eq!(
        info(&path, &InfoOptions::new()).unwrap().format,
        Format::Qcow2
    );
    assert_eq!(
        info(&path, InfoOptions::new().format(Format::Raw))
            .unwrap()
            .format,
        Format::Raw
    );
    let bytes = fs::read(&path).unwrap();
    for length in [4, 71, 103, 512, 65535] {
        fs::write(&path, &bytes[..length]).unwrap();
        let error = info(&path, &InfoOptions::new()).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{length}: {error:?}");
    }
    // A snapshot table that is said to lie past the end of file, too many snapshots, tables past the end or nowhere: told,
    // and no reason to say nothing else.
    for (at, value, told) in [
        (60, 65536 << 32, "snapshots are not shown"),
        (60, u64::MAX, "nb_snapshots"),
        (48, 1 << 40, "refcount table is cut off"),
        (48, 77, "refcount_table_offset"),
        (40, 1 << 40, "L1 table is cut off"),
    ] {
        let mut wild = bytes.clone();
        wild[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
        if at == 60 {
            wild[64..72].copy_from_slice(&(1_u64 << 40).to_be_bytes());
        }
        fs::write(&path, &wild).unwrap();
        let (shown, qcow2) = show(&path);
        assert_eq!(shown.virtual_size, 1 << 20);
        assert!(qcow2.snapshots.is_empty());
        let faults = qcow2.faults.join("; ");
        assert!(faults.contains(told), "{faults}");
        assert!(qcow2.unsupported.is_some() || told.starts_with("snapshots"));
    }
}

/// A bitmap directory of 64 MiB that the file does not have, and one that makes no sense.
#[test]
fn broken_bitmaps_are_told() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(&path, "1M", &[]);
    qemu_img(&["bitmap", "--add", text(&path), "b0"]);
    let bytes = fs::read(&path).unwrap();
    let at = bytes
        .windows(4)
        .position(|part| part == [0x23, 0x85, 0x28, 0x75]);
    let at = at.expect("the extension") + 8;
    for (from, value) in [(16, 1u64 << 40), (16, 1), (8, u64::MAX)] {
        let mut wild = bytes.clone();
        wild[at + from..at + from + 8].copy_from_slice(&value.to_be_bytes());
        fs::write(&path, &wild).unwrap();
        let (shown, qcow2) = show(&path);
        assert_eq!(shown.virtual_size, 1 << 20);
        assert!(qcow2.bitmaps.is_empty());
        assert_eq!(qcow2.faults.len(), 1, "{:?}", qcow2.faults);
    }
}

#[test]
fn an_image_in_use_is_shown_on_demand() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    make(&path, "1M", &[]);
    let _writer = QemuIo::open(&path, &[]);
    let error = info(&path, &InfoOptions::new()).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    assert_eq!(
        info(&path, InfoOptions::new().lock(false))
            .unwrap()
            .virtual_size,
        1 << 20
    );
}
