//! The JSON of `info`: QEMU's BlockInfo schemas, with fields in the order in which qemu-img 10.0.2 prints them.

use serde::Serialize;
use urus::{Encryption, ImageInfo, Qcow2Info};

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Image {
    children: Vec<Child>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<Snapshot>,
    virtual_size: u64,
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    format: &'static str,
    actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Specific>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    dirty_flag: bool,
}

#[derive(Debug, Serialize)]
struct Child {
    name: &'static str,
    info: Image,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Snapshot {
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
    vm_clock_nsec: u64,
    name: String,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    id: String,
    vm_state_size: u64,
}

#[derive(Debug, Serialize)]
struct Specific {
    #[serde(rename = "type")]
    kind: &'static str,
    data: Data,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Data {
    #[serde(skip_serializing_if = "Option::is_none")]
    compat: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compression_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lazy_refcounts: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<Vec<Bitmap>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refcount_bits: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypt: Option<Encrypt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    corrupt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extended_l2: Option<bool>,
}

#[derive(Debug, Serialize)]
struct Bitmap {
    flags: Vec<&'static str>,
    name: String,
    granularity: u64,
}

#[derive(Debug, Serialize)]
struct Encrypt {
    format: &'static str,
}

/// An image with the file that it lies in.
pub(super) fn image(info: &ImageInfo) -> Image {
    let qcow2 = info.qcow2.as_deref();
    let backing = qcow2.and_then(|qcow2| qcow2.backing.as_ref());
    Image {
        children: vec![Child {
            name: "file",
            info: file(info),
        }],
        backing_filename_format: backing.and_then(|backing| backing.format.clone()),
        snapshots: qcow2.map_or_else(Vec::new, snapshots),
        virtual_size: info.virtual_size,
        filename: info.path.display().to_string(),
        cluster_size: qcow2.map(|qcow2| qcow2.cluster_bytes),
        format: info.format.name(),
        actual_size: info.actual_size,
        format_specific: qcow2.map(|qcow2| Specific {
            kind: "qcow2",
            data: data(qcow2),
        }),
        encrypted: qcow2.and_then(|qcow2| qcow2.encryption).map(|_| true),
        full_backing_filename: backing
            .and_then(|backing| backing.path.as_ref())
            .map(|path| path.display().to_string()),
        backing_filename: backing.map(|backing| backing.name.clone()),
        dirty_flag: qcow2.is_some_and(|qcow2| qcow2.dirty),
    }
}

fn file(info: &ImageInfo) -> Image {
    Image {
        children: Vec::new(),
        backing_filename_format: None,
        snapshots: Vec::new(),
        virtual_size: file_length(info),
        filename: info.path.display().to_string(),
        cluster_size: None,
        format: "file",
        actual_size: info.actual_size,
        format_specific: Some(Specific {
            kind: "file",
            data: Data::default(),
        }),
        encrypted: None,
        full_backing_filename: None,
        backing_filename: None,
        dirty_flag: false,
    }
}

/// QEMU counts files in sectors.
pub(super) fn file_length(info: &ImageInfo) -> u64 {
    info.file_size.next_multiple_of(512)
}

fn snapshots(qcow2: &Qcow2Info) -> Vec<Snapshot> {
    const SECOND: u64 = 1_000_000_000;
    qcow2
        .snapshots
        .iter()
        .map(|snapshot| Snapshot {
            icount: snapshot.icount,
            vm_clock_nsec: snapshot.vm_clock_nanoseconds % SECOND,
            name: snapshot.name.clone(),
            date_sec: snapshot.date_seconds,
            date_nsec: snapshot.date_nanoseconds,
            vm_clock_sec: snapshot.vm_clock_nanoseconds / SECOND,
            id: snapshot.id.clone(),
            vm_state_size: snapshot.vm_state_bytes,
        })
        .collect()
}

fn data(qcow2: &Qcow2Info) -> Data {
    let version_3 = qcow2.version >= 3;
    Data {
        compat: Some(qcow2.compat()),
        compression_type: Some(qcow2.compression.to_string()),
        lazy_refcounts: version_3.then_some(qcow2.lazy_refcounts),
        bitmaps: (!qcow2.bitmaps.is_empty()).then(|| bitmaps(qcow2)),
        refcount_bits: Some(qcow2.refcount_bits),
        encrypt: qcow2.encryption.map(|encryption| Encrypt {
            format: encryption_name(encryption),
        }),
        data_file: qcow2.data_file.clone(),
        data_file_raw: qcow2.external_data.then_some(qcow2.data_file_raw),
        corrupt: version_3.then_some(qcow2.corrupt),
        extended_l2: version_3.then_some(qcow2.extended_l2),
    }
}

fn bitmaps(qcow2: &Qcow2Info) -> Vec<Bitmap> {
    qcow2
        .bitmaps
        .iter()
        .map(|bitmap| Bitmap {
            flags: bitmap_flags(bitmap),
            name: bitmap.name.clone(),
            granularity: bitmap.granularity_bytes,
        })
        .collect()
}

pub(super) fn bitmap_flags(bitmap: &urus::BitmapInfo) -> Vec<&'static str> {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    flags
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect()
}

pub(super) fn encryption_name(encryption: Encryption) -> &'static str {
    match encryption {
        Encryption::Aes => "aes",
        Encryption::Luks => "luks",
        _ => "unknown",
    }
}
