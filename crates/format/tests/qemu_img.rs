//! Against the real `qemu-img`: what it writes is understood here, what is written here it finds flawless.
//!
//! Guards against a reading of the specification that nobody shares. It is a failure, not a reason to skip, when
//! `qemu-img` is missing: without it these promises are not tested at all.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use urus_format::create::{CreateOptions, NewImage, layout};
use urus_format::header::default_feature_names;
use urus_format::snapshot::TableBytes;
use urus_format::{
    BackingName, Compression, Geometry, Header, HostOffset, L1Entry, L2Entry, L2Raw, bitmap,
    compressed, refcount, snapshot,
};

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("these tests need `qemu-img` (Debian: qemu-utils) on the PATH");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let fault = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {} {text} {fault}",
        output.status
    );
    text
}

/// A directory for one test's images.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn write_image(path: &Path, image: &NewImage) {
    let file = File::create(path).unwrap();
    for (offset, bytes) in &image.writes {
        file.write_all_at(bytes, *offset).unwrap();
    }
    assert!(
        file.metadata().unwrap().len()
            <= image
                .file_bytes
                .next_multiple_of(1 << image.header.cluster_bits)
    );
    file.set_len(image.file_bytes).unwrap();
}

fn parse(path: &Path) -> Header {
    let bytes = fs::read(path).unwrap();
    Header::parse(&bytes[..bytes.len().min(2 << 20)], bytes.len() as u64).unwrap()
}

fn qemu_options(options: &CreateOptions) -> String {
    let mut text = format!(
        "cluster_size={},refcount_bits={},compat={}",
        1u64 << options.cluster_bits,
        1 << options.refcount_order,
        if options.version == 2 { "0.10" } else { "1.1" }
    );
    if options.compression == Compression::Zstd {
        text += ",compression_type=zstd";
    }
    if options.lazy_refcounts {
        text += ",lazy_refcounts=on";
    }
    text
}

/// Both make the same image; compares the bytes.
fn assert_same_bytes(options: &CreateOptions) {
    let images = Images::new();
    let (theirs, ours) = (images.path("theirs"), images.path("ours"));
    let (chosen, size) = (qemu_options(options), options.size.to_string());
    let mut arguments = vec!["create", "-q", "-u", "-f", "qcow2", "-o", &chosen];
    let backing = options.backing.clone().unwrap_or(BackingName {
        name: vec![],
        format: None,
    });
    let (name, format) = (
        String::from_utf8(backing.name).unwrap(),
        backing.format.unwrap_or_default(),
    );
    if options.backing.is_some() {
        arguments.extend(["-b", &name, "-F", &format]);
    }
    arguments.extend([text(&theirs), &size]);
    qemu_img(&arguments);
    write_image(&ours, &layout(options).unwrap());
    let (theirs, ours) = (fs::read(&theirs).unwrap(), fs::read(&ours).unwrap());
    assert_eq!(ours.len(), theirs.len(), "length of {options:?}");
    let different = ours
        .iter()
        .zip(&theirs)
        .position(|(ours, theirs)| ours != theirs);
    assert_eq!(different, None, "first different byte of {options:?}");
}

#[test]
fn new_images_have_the_same_bytes() {
    let backing = BackingName {
        name: b"dir/base.img".to_vec(),
        format: Some("raw".into()),
    };
    for size in [
        0,
        1,
        512,
        1000,
        1 << 20,
        1 << 30,
        (1 << 30) + 512,
        10 << 30,
        1 << 40,
    ] {
        assert_same_bytes(&CreateOptions::new(size));
    }
    let base = CreateOptions::new(1 << 30);
    assert_same_bytes(&CreateOptions {
        version: 2,
        ..base.clone()
    });
    assert_same_bytes(&CreateOptions {
        backing: Some(backing.clone()),
        ..base.clone()
    });
    assert_same_bytes(&CreateOptions {
        backing: Some(backing.clone()),
        version: 2,
        ..base.clone()
    });
    assert_same_bytes(&CreateOptions {
        backing: Some(backing),
        cluster_bits: 9,
        size: 1 << 20,
        ..base.clone()
    });
    assert_same_bytes(&CreateOptions {
        compression: Compression::Zstd,
        lazy_refcounts: true,
        ..base
    });
}

#[test]
fn new_images_of_every_geometry_have_the_same_bytes() {
    for cluster_bits in 9..=21 {
        for refcount_order in 0..=6 {
            // Few enough clusters for one refcount block, even of 512 bytes with 64-bit counters.
            let size = 50 << (2 * cluster_bits - 6);
            let size = size.min(1 << 40);
            assert_same_bytes(&CreateOptions {
                cluster_bits,
                refcount_order,
                ..CreateOptions::new(size)
            });
        }
    }
}

/// Includes the largest size of each geometry, where refcount blocks and the refcount table grow.
#[test]
fn new_images_of_every_geometry_and_size_are_clean() {
    let images = Images::new();
    let path = images.path("image");
    for cluster_bits in 9..=21 {
        let largest = Geometry::new(cluster_bits, 4, 8, 3).l2_coverage_bytes() << 22;
        for refcount_order in 0..=6 {
            for size in [0, 1 << 20, largest >> 7, largest] {
                let options = CreateOptions {
                    cluster_bits,
                    refcount_order,
                    ..CreateOptions::new(size)
                };
                let image = layout(&options).unwrap();
                write_image(&path, &image);
                let verdict = qemu_img(&["check", "-f", "qcow2", text(&path)]);
                assert!(
                    verdict.contains("No errors were found"),
                    "{options:?}: {verdict}"
                );
                let header = parse(&path);
                assert_eq!(header, image.header);
                assert_eq!(header.check_supported(true), Ok(()));
            }
            let too_large = CreateOptions {
                cluster_bits,
                refcount_order,
                ..CreateOptions::new(largest + 1)
            };
            assert!(layout(&too_large).is_err());
        }
    }
}

/// What other features' headers hold is read, and written back byte for byte.
#[test]
fn headers_round_trip() {
    let images = Images::new();
    let path = images.path("image");
    for (options, supported) in [
        ("compat=1.1", true),
        ("compat=0.10", true),
        ("compat=1.1,lazy_refcounts=on,refcount_bits=64", true),
        ("compression_type=zstd,cluster_size=2M", true),
        ("cluster_size=512", true),
        ("extended_l2=on,cluster_size=128k", false),
        ("data_file=DIR/data,data_file_raw=on", false),
        (
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
            false,
        ),
        ("backing_file=base,backing_fmt=qcow2", true),
    ] {
        let options = options.replace("DIR", text(images.0.path()));
        let secret = ["--object", "secret,id=key,data=secret"];
        let create = [
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-o",
            &options,
            text(&path),
            "64M",
        ];
        qemu_img(&[&create[..1], &secret, &create[1..]].concat());
        let header = parse(&path);
        assert_eq!(header.check_supported(true).is_ok(), supported, "{options}");
        let bytes = fs::read(&path).unwrap();
        let encoded = header.encode().unwrap();
        assert!(encoded[..] == bytes[..encoded.len()], "{options}");
    }
    assert_eq!(parse(&path).feature_names, default_feature_names());
}

#[test]
fn snapshots_are_read_and_written() {
    let images = Images::new();
    let path = images.path("image");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "64M"]);
    for name in ["first", "the second, with a longer name", "\u{3b3}"] {
        qemu_img(&["snapshot", "-c", name, text(&path)]);
    }
    let header = parse(&path);
    let bytes = fs::read(&path).unwrap();
    let table = &bytes[usize::try_from(header.snapshot_table.0).unwrap()..];
    let snapshots = snapshot::parse_table(table, header.snapshot_count).unwrap();
    let listed: Vec<_> = snapshots
        .iter()
        .map(|entry| (entry.id_text(), entry.name_text(), entry.disk_bytes))
        .collect();
    let expect = |id: &str, name: &str| (id.to_owned(), name.to_owned(), Some(64 << 20));
    let third = expect("3", "\u{3b3}");
    assert_eq!(
        listed,
        [
            expect("1", "first"),
            expect("2", "the second, with a longer name"),
            third
        ]
    );
    for entry in &snapshots {
        entry.check_l1(&header.geometry()).unwrap();
    }
    let encoded = snapshot::encode_table(&snapshots).unwrap();
    assert!(table.starts_with(&encoded));
    let exactly = TableBytes::Exactly(encoded.len() as u64);
    assert_eq!(
        snapshot::table_bytes(table, header.snapshot_count).unwrap(),
        exactly
    );
}

#[test]
fn bitmaps_are_read() {
    let images = Images::new();
    let path = images.path("image");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "64M"]);
    qemu_img(&["bitmap", "--add", text(&path), "daily"]);
    qemu_img(&[
        "bitmap",
        "--add",
        "--disable",
        "-g",
        "4k",
        text(&path),
        "weekly",
    ]);
    let header = parse(&path);
    assert_eq!(header.check_supported(false), Ok(()));
    assert!(header.check_supported(true).is_err());
    let bytes = fs::read(&path).unwrap();
    assert!(bytes.starts_with(&header.encode().unwrap()));
    let extension = header.bitmaps.unwrap();
    let start = usize::try_from(extension.directory.0).unwrap();
    let directory = &bytes[start..start + usize::try_from(extension.directory_bytes).unwrap()];
    let bitmaps = bitmap::parse_directory(directory, extension.count, &header.geometry()).unwrap();
    let listed: Vec<_> = bitmaps
        .iter()
        .map(|entry| (entry.name_text(), entry.granularity_bits, entry.flags))
        .collect();
    assert_eq!(
        listed,
        [
            ("daily".into(), 16, bitmap::flags::AUTO),
            ("weekly".into(), 12, 0)
        ]
    );
}

/// A disk of which the clusters compress well, badly and not at all.
fn disk(clusters: usize, cluster_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut disk = Vec::with_capacity(clusters * cluster_bytes);
    for cluster in 0..clusters {
        let end = (cluster + 1) * cluster_bytes;
        while disk.len() < end {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match cluster % 3 {
                0 => disk.extend_from_slice(format!("line {} of a log\n", state % 1000).as_bytes()),
                1 => disk.extend_from_slice(&(state & 0x0f00_ff0f_0000_ffff).to_le_bytes()),
                _ => disk.extend_from_slice(&state.to_le_bytes()),
            }
        }
        disk.truncate(end);
    }
    disk
}

const CODECS: [Compression; 2] = [Compression::Deflate, Compression::Zstd];

#[test]
fn qemu_reads_our_compressed_clusters() {
    let images = Images::new();
    let (path, raw) = (images.path("image"), images.path("raw"));
    for cluster_bits in [9, 12, 16, 21] {
        for compression in CODECS {
            let cluster_bytes = 1usize << cluster_bits;
            let disk = disk(9, cluster_bytes);
            let options = CreateOptions {
                cluster_bits,
                compression,
                ..CreateOptions::new(disk.len() as u64)
            };
            write_image(&path, &layout(&options).unwrap());
            compress_into(&path, &disk, compression);
            let verdict = qemu_img(&["check", "-f", "qcow2", text(&path)]);
            assert!(
                verdict.contains("No errors were found"),
                "{options:?}: {verdict}"
            );
            qemu_img(&[
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                text(&path),
                text(&raw),
            ]);
            assert!(fs::read(&raw).unwrap() == disk, "{options:?}");
        }
    }
}

/// Fills a new image: L2 table in cluster 4, then each cluster's data in a cluster of its own, not aligned.
fn compress_into(path: &Path, disk: &[u8], compression: Compression) {
    let header = parse(path);
    let geometry = header.geometry();
    let cluster_bytes = usize::try_from(geometry.cluster_bytes()).unwrap();
    let mut image = fs::read(path).unwrap();
    let mut compressed = 0;
    let data_start = 5 * cluster_bytes;
    image.resize(data_start, 0);
    let put = |image: &mut Vec<u8>, at: usize, raw: u64| {
        image[at..at + 8].copy_from_slice(&raw.to_be_bytes())
    };
    let l2 = L1Entry {
        table: HostOffset(4 * geometry.cluster_bytes()),
        copied: true,
    };
    put(&mut image, 3 * cluster_bytes, l2.encode());
    for (index, cluster) in disk.chunks_exact(cluster_bytes).enumerate() {
        let start = data_start + index * cluster_bytes;
        let host = HostOffset(start as u64);
        let entry =
            if let Some(stream) = compressed::encode(compression, cluster, cluster_bytes - 1) {
                compressed += 1;
                // At the end of its cluster, where it starts and ends inside sectors.
                image.resize(start + cluster_bytes - 1 - stream.len(), 0);
                let (offset, bytes) = (HostOffset(image.len() as u64), stream.len() as u64);
                image.extend_from_slice(&stream);
                L2Entry::Compressed(urus_format::CompressedExtent { offset, bytes })
            } else {
                image.extend_from_slice(cluster);
                L2Entry::Data { host, copied: true }
            };
        image.resize(start + cluster_bytes, 0xa5);
        put(
            &mut image,
            4 * cluster_bytes + index * 8,
            entry.encode(&geometry).entry,
        );
        let block = &mut image[2 * cluster_bytes..3 * cluster_bytes];
        refcount::set(block, 5 + index as u64, geometry.refcount_order(), 1);
    }
    refcount::set(
        &mut image[2 * cluster_bytes..],
        4,
        geometry.refcount_order(),
        1,
    );
    assert!(
        compressed >= 3,
        "only {compressed} clusters were compressed"
    );
    fs::write(path, image).unwrap();
}

#[test]
fn we_read_qemus_compressed_clusters() {
    let images = Images::new();
    let (path, raw) = (images.path("image"), images.path("raw"));
    for cluster_bits in [9, 12, 16, 21] {
        for compression in CODECS {
            let disk = disk(9, 1 << cluster_bits);
            fs::write(&raw, &disk).unwrap();
            let options = qemu_options(&CreateOptions {
                cluster_bits,
                compression,
                ..CreateOptions::new(disk.len() as u64)
            });
            let convert = [
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &options,
                text(&raw),
                text(&path),
            ];
            qemu_img(&convert);
            let (read, compressed) = read_image(&path);
            assert!(read == disk, "{options}");
            assert!(compressed >= 3, "only {compressed} clusters are compressed");
        }
    }
}

/// The virtual disk, and how many clusters are compressed.
fn read_image(path: &Path) -> (Vec<u8>, u32) {
    let header = parse(path);
    let geometry = header.geometry();
    let image = fs::read(path).unwrap();
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let word =
        |offset: u64| u64::from_be_bytes(image[at(offset)..at(offset) + 8].try_into().unwrap());
    let cluster_bytes = at(geometry.cluster_bytes());
    let mut disk = vec![0; at(header.size)];
    let mut compressed = 0;
    for (cluster, dst) in disk.chunks_exact_mut(cluster_bytes).enumerate() {
        let cluster = urus_format::GuestCluster(cluster as u64);
        let l1 = word(header.l1_table.0 + geometry.l1_index(cluster) * 8);
        let Some(l1) = L1Entry::decode(l1, &geometry).unwrap() else {
            continue;
        };
        let entry = word(l1.table.0 + geometry.l2_index(cluster) * 8);
        match L2Entry::decode(
            L2Raw {
                entry,
                subclusters: 0,
            },
            &geometry,
        )
        .unwrap()
        {
            L2Entry::Unallocated | L2Entry::Zero | L2Entry::ZeroAllocated { .. } => {}
            L2Entry::Data { host, .. } => {
                dst.copy_from_slice(&image[at(host.0)..at(host.0) + cluster_bytes])
            }
            L2Entry::Compressed(extent) => {
                let end = at(extent.offset.0 + extent.bytes).min(image.len());
                compressed::decode(header.compression, &image[at(extent.offset.0)..end], dst)
                    .unwrap();
                compressed += 1;
            }
        }
    }
    (disk, compressed)
}
