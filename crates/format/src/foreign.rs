//! Formats that are not ours, recognised by their magic numbers.
//!
//! For messages only: nothing is opened or trusted because of what is recognised here. A guest can write any bytes onto a raw disk,
//! so that a raw image may begin as whatever the guest likes.

use crate::bytes::be32;
use crate::header::MAGIC;

/// How many bytes of the start of a file are looked at: up to the first descriptor of an ISO 9660 image.
pub const START_BYTES: usize = 0x8006;
/// How many bytes of the end of a file are looked at: the footer of a VHD or DMG image.
pub const END_BYTES: usize = 512;

/// What a file looks like that is not a qcow2 image, or should not be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ForeignFormat {
    /// No bytes at all.
    Empty,
    /// QCOW2, version 2 or later: foreign only where another format was stated.
    Qcow2,
    /// QCOW, version 1.
    Qcow,
    /// VMware's disks, sparse or described in a text file.
    Vmdk,
    /// VirtualBox's disks.
    Vdi,
    /// Connectix's and Microsoft's virtual hard disk, of fixed or dynamic size ("vpc").
    Vhd,
    /// Hyper-V's virtual hard disk.
    Vhdx,
    /// QEMU's enhanced disk.
    Qed,
    /// Parallels' disks.
    Parallels,
    /// A bare LUKS volume.
    Luks,
    /// Apple's disk image.
    Dmg,
    /// A CD or DVD.
    Iso9660,
    /// Compressed by gzip.
    Gzip,
    /// Compressed by xz.
    Xz,
    /// Compressed by bzip2.
    Bzip2,
    /// Compressed by zstd.
    Zstd,
    /// A zip archive.
    Zip,
    /// A tar archive, such as an OVA.
    Tar,
    /// A web page.
    Html,
    /// An XML document, such as the error of a download service.
    Xml,
    /// A boot sector or partition table: the bytes of a disk.
    Disk,
}

/// Recognises a file by its first [`START_BYTES`] and last [`END_BYTES`] bytes (fewer where it is shorter).
#[must_use]
pub fn recognise(start: &[u8], end: &[u8]) -> Option<ForeignFormat> {
    use ForeignFormat as F;
    /// Where each magic number is, and what it means.
    const MAGICS: [(usize, &[u8], ForeignFormat); 23] = [
        (0, b"KDMV", F::Vmdk),
        (0, b"COWD", F::Vmdk),
        (0, b"# Disk DescriptorFile", F::Vmdk),
        (64, b"\x7f\x10\xda\xbe", F::Vdi),
        (0, b"conectix", F::Vhd),
        (0, b"vhdxfile", F::Vhdx),
        (0, b"QED\0", F::Qed),
        (0, b"WithoutFreeSpace", F::Parallels),
        (0, b"WithouFreSpacExt", F::Parallels),
        (0, b"LUKS\xba\xbe", F::Luks),
        (0, b"\x1f\x8b\x08", F::Gzip),
        (0, b"\xfd7zXZ\0", F::Xz),
        (0, b"BZh", F::Bzip2),
        (0, b"\x28\xb5\x2f\xfd", F::Zstd),
        (0, b"PK\x03\x04", F::Zip),
        (257, b"ustar", F::Tar),
        (0x8001, b"CD001", F::Iso9660),
        (0, b"<!doctype html", F::Html),
        (0, b"<html", F::Html),
        (0, b"<?xml", F::Xml),
        (0, b"<error>", F::Xml),
        (512, b"EFI PART", F::Disk),
        (510, b"\x55\xaa", F::Disk),
    ];
    if start.is_empty() {
        return Some(F::Empty);
    }
    if start.starts_with(&MAGIC) {
        return Some(match start.get(..8) {
            Some(head) if be32(head, 4) == 1 => F::Qcow,
            _ => F::Qcow2,
        });
    }
    let text = as_markup(start);
    let found = MAGICS.iter().find_map(|&(at, magic, format)| {
        let bytes = match format {
            F::Html | F::Xml => text.as_slice(),
            _ => start,
        };
        let there = bytes.get(at..).is_some_and(|rest| rest.starts_with(magic));
        there.then_some(format)
    });
    // A footer makes another format of what begins as a disk or as nothing known.
    let footer = match end.len().checked_sub(END_BYTES).map(|at| &end[at..]) {
        Some(footer) if footer.starts_with(b"conectix") => Some(F::Vhd),
        Some(footer) if footer.starts_with(b"koly") => Some(F::Dmg),
        _ => None,
    };
    match found {
        None | Some(F::Disk) => footer.or(found),
        found => found,
    }
}

/// The beginning as markup languages read it: without a byte order mark and leading blanks, in small letters.
fn as_markup(start: &[u8]) -> Vec<u8> {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    const LONGEST: usize = 32;
    let text = start.strip_prefix(MARK).unwrap_or(start).trim_ascii_start();
    text[..text.len().min(LONGEST)].to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    //! Guards against a name for what is none, and against looking past the end. (Images made by other programs are in the tests of
    //! the command line.)
    use super::*;

    #[test]
    fn short_and_strange_files_are_looked_at_safely() {
        assert_eq!(recognise(b"", b""), Some(ForeignFormat::Empty));
        for bytes in [&b"Q"[..], b"QFI", b"KDM", &[0; 511], &[0xff; 4096]] {
            assert_eq!(recognise(bytes, bytes), None, "{bytes:?}");
        }
        assert_eq!(recognise(b"QFI\xfb", b""), Some(ForeignFormat::Qcow2));
        let version_1 = b"QFI\xfb\0\0\0\x01";
        assert_eq!(recognise(version_1, b""), Some(ForeignFormat::Qcow));
        let page = b"\xef\xbb\xbf\r\n  <!DOCTYPE HTML PUBLIC";
        assert_eq!(recognise(page, page), Some(ForeignFormat::Html));
    }

    #[test]
    fn a_footer_counts_only_where_the_start_says_nothing_else() {
        let mut disk = vec![0; 4096];
        disk[510..512].copy_from_slice(b"\x55\xaa");
        assert_eq!(recognise(&disk, &disk), Some(ForeignFormat::Disk));
        disk[3584..3592].copy_from_slice(b"conectix");
        let end = disk[3584..].to_vec();
        assert_eq!(recognise(&disk, &end), Some(ForeignFormat::Vhd));
        disk[..4].copy_from_slice(b"KDMV");
        assert_eq!(recognise(&disk, &end), Some(ForeignFormat::Vmdk));
    }
}
