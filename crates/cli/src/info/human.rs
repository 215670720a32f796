//! The text of `info` for people, line by line what qemu-img 10.0.2 prints.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use urus::{ImageInfo, Qcow2Info, SnapshotInfo};

use super::json::{bitmap_flags, encryption_name, file_length};
use crate::size::human as size;

/// A paragraph on an image.
pub(super) fn text(info: &ImageInfo) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, info);
    text
}

fn write(out: &mut String, info: &ImageInfo) -> std::fmt::Result {
    let name = info.path.display();
    writeln!(out, "image: {name}")?;
    writeln!(out, "file format: {}", info.format)?;
    writeln!(
        out,
        "virtual size: {} ({} bytes)",
        size(info.virtual_size),
        info.virtual_size
    )?;
    writeln!(out, "disk size: {}", size(info.actual_size))?;
    if let Some(qcow2) = &info.qcow2 {
        write_qcow2(out, qcow2)?;
    }
    writeln!(out, "Child node '/file':")?;
    writeln!(out, "    filename: {name}")?;
    writeln!(out, "    protocol type: file")?;
    writeln!(
        out,
        "    file length: {} ({} bytes)",
        size(file_length(info)),
        file_length(info)
    )?;
    writeln!(out, "    disk size: {}", size(info.actual_size))
}

fn write_qcow2(out: &mut String, qcow2: &Qcow2Info) -> std::fmt::Result {
    if qcow2.encryption.is_some() {
        writeln!(out, "encrypted: yes")?;
    }
    writeln!(out, "cluster_size: {}", qcow2.cluster_bytes)?;
    if qcow2.dirty {
        writeln!(out, "cleanly shut down: no")?;
    }
    if let Some(backing) = &qcow2.backing {
        // Such a name is never opened; here it is shown whole.
        let shown = |text: &str| text.replace('\0', "\\0");
        write!(out, "backing file: {}", shown(&backing.name))?;
        match &backing.path {
            None => write!(out, " (cannot determine actual path)")?,
            Some(path) if path.display().to_string() != backing.name => {
                write!(out, " (actual path: {})", path.display())?;
            }
            Some(_) => {}
        }
        writeln!(out)?;
        if let Some(format) = &backing.format {
            writeln!(out, "backing file format: {}", shown(format))?;
        }
    }
    if !qcow2.snapshots.is_empty() {
        writeln!(out, "Snapshot list:")?;
        let heads = ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"];
        write_row(out, heads.map(str::to_owned))?;
        for snapshot in &qcow2.snapshots {
            write_row(out, snapshot_row(snapshot))?;
        }
    }
    writeln!(out, "Format specific information:")?;
    write_specific(out, qcow2)
}

fn write_row(out: &mut String, row: [String; 6]) -> std::fmt::Result {
    let [id, tag, vm_size, date, clock, icount] = row;
    writeln!(
        out,
        "{id:<7} {tag:<16} {vm_size:>8} {date:>19} {clock:>15} {icount:>10}"
    )
}

fn snapshot_row(snapshot: &SnapshotInfo) -> [String; 6] {
    let milliseconds = snapshot.vm_clock_nanoseconds / 1_000_000;
    let seconds = milliseconds / 1000;
    [
        snapshot.id.clone(),
        snapshot.name.clone(),
        size(snapshot.vm_state_bytes),
        date(snapshot.date_seconds),
        format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            milliseconds % 1000
        ),
        snapshot
            .icount
            .map_or_else(|| "--".to_owned(), |count| count.to_string()),
    ]
}

/// In the user's time zone.
fn date(seconds: u32) -> String {
    Timestamp::from_second(seconds.into()).map_or_else(
        |_| "?".to_owned(),
        |date| {
            date.to_zoned(TimeZone::system())
                .strftime("%Y-%m-%d %H:%M:%S")
                .to_string()
        },
    )
}

fn write_specific(out: &mut String, qcow2: &Qcow2Info) -> std::fmt::Result {
    let version_3 = qcow2.version >= 3;
    writeln!(out, "    compat: {}", qcow2.compat())?;
    writeln!(out, "    compression type: {}", qcow2.compression)?;
    if version_3 {
        writeln!(out, "    lazy refcounts: {}", qcow2.lazy_refcounts)?;
    }
    if !qcow2.bitmaps.is_empty() {
        writeln!(out, "    bitmaps:")?;
        for (index, bitmap) in qcow2.bitmaps.iter().enumerate() {
            writeln!(out, "        [{index}]:")?;
            writeln!(out, "            flags:")?;
            for (index, flag) in bitmap_flags(bitmap).iter().enumerate() {
                writeln!(out, "                [{index}]: {flag}")?;
            }
            writeln!(out, "            name: {}", bitmap.name)?;
            writeln!(out, "            granularity: {}", bitmap.granularity_bytes)?;
        }
    }
    writeln!(out, "    refcount bits: {}", qcow2.refcount_bits)?;
    if let Some(encryption) = qcow2.encryption {
        writeln!(out, "    encrypt:")?;
        writeln!(out, "        format: {}", encryption_name(encryption))?;
    }
    if let Some(data_file) = &qcow2.data_file {
        writeln!(out, "    data file: {data_file}")?;
    }
    if qcow2.external_data {
        writeln!(out, "    data file raw: {}", qcow2.data_file_raw)?;
    }
    if version_3 {
        writeln!(out, "    corrupt: {}", qcow2.corrupt)?;
        writeln!(out, "    extended l2: {}", qcow2.extended_l2)?;
    }
    Ok(())
}
