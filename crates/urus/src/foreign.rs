//! What to tell users of a file that is not the image they take it for: its format by name, and the command that converts it.
//!
//! Nothing is decided by it: a format is stated or recorded, never guessed.

use std::path::Path;

use urus_format::foreign::{self, END_BYTES, ForeignFormat, START_BYTES};
use urus_ring::OpenFile;

/// What the file looks like. One that cannot be read looks like nothing.
pub(crate) fn recognise(file: &OpenFile) -> Option<ForeignFormat> {
    let start = file.read_prefix(START_BYTES).ok()?;
    let end_bytes = u64::try_from(END_BYTES).expect("a sector");
    let end = match file.file_len().ok()?.checked_sub(end_bytes) {
        Some(at) => file.read_at(at, END_BYTES).ok()?,
        None => Vec::new(),
    };
    foreign::recognise(&start, &end)
}

/// Whether its bytes can well be those of a disk.
pub(crate) fn is_disk(found: ForeignFormat) -> bool {
    use ForeignFormat as F;
    matches!(found, F::Disk | F::Iso9660 | F::Luks | F::Empty)
}

/// A file that is to be used as raw and looks like an image of another format. It may be meant: a guest can write such bytes onto its
/// disk.
pub(crate) fn warn_if_no_disk(file: &OpenFile, path: &Path) {
    match recognise(file) {
        Some(ForeignFormat::Qcow2) => tracing::warn!(
            image = %path.display(),
            "the file begins as a qcow2 image and is used as raw: its bytes are shown as the disk, header and all; \
             if that is not meant, give the format qcow2 (-f qcow2; for a backing file: qemu-img rebase -u -F qcow2)"
        ),
        Some(found) if !is_disk(found) => tracing::warn!(
            image = %path.display(),
            "the file looks like {} and is used as raw: its bytes are shown as the disk; {}",
            name(found),
            remedy(path, found)
        ),
        _ => {}
    }
}

/// Why a file is not a qcow2 image, and what to do with it.
pub(crate) fn explain(path: &Path, found: Option<ForeignFormat>) -> String {
    match found {
        None | Some(ForeignFormat::Qcow2) => {
            "not a qcow2 image (it does not begin with \"QFI\\xfb\"); if its bytes are the disk itself, add -f raw"
                .to_owned()
        }
        Some(found) => format!("not a qcow2 image: this is {}; {}", name(found), remedy(path, found)),
    }
}

/// With its article.
fn name(found: ForeignFormat) -> &'static str {
    use ForeignFormat as F;
    match found {
        F::Empty => "an empty file (0 bytes)",
        F::Qcow2 => "a qcow2 image",
        F::Qcow => "a qcow image of version 1",
        F::Vmdk => "a VMDK image (VMware)",
        F::Vdi => "a VDI image (VirtualBox)",
        F::Vhd => "a VHD image (Virtual PC, Hyper-V)",
        F::Vhdx => "a VHDX image (Hyper-V)",
        F::Qed => "a QED image (QEMU)",
        F::Parallels => "a Parallels image",
        F::Luks => "a LUKS volume",
        F::Dmg => "a DMG image (macOS)",
        F::Iso9660 => "an ISO 9660 image (CD or DVD)",
        F::Gzip => "compressed by gzip",
        F::Xz => "compressed by xz",
        F::Bzip2 => "compressed by bzip2",
        F::Zstd => "compressed by zstd",
        F::Zip => "a zip archive",
        F::Tar => "a tar archive (an OVA is one)",
        F::Html => "a web page",
        F::Xml => "an XML document",
        F::Disk => "what a raw disk begins with (a boot sector or partition table)",
        _ => "a file of another format",
    }
}

/// What to do, as a rule a command to paste.
fn remedy(path: &Path, found: ForeignFormat) -> String {
    use ForeignFormat as F;
    let file = shell(&path.display().to_string());
    let convert = |format: &str| {
        let converted = shell(&path.with_extension("qcow2").display().to_string());
        let converted = if converted == file {
            shell(&format!("{}.converted.qcow2", path.display()))
        } else {
            converted
        };
        format!("convert it: qemu-img convert -p -f {format} -O qcow2 {file} {converted}")
    };
    let unpack = |program: &str, suffixes: &[&str]| {
        let text = path.display().to_string();
        let shorter = suffixes.iter().find_map(|suffix| text.strip_suffix(suffix));
        let unpacked = match shorter {
            Some(shorter) if !shorter.is_empty() => shell(shorter),
            _ => shell(&format!("{text}.unpacked")),
        };
        format!("unpack it: {program} -dc {file} > {unpacked}")
    };
    match found {
        F::Empty => format!("make an image in its place: urus create -f qcow2 {file} SIZE"),
        F::Qcow => convert("qcow"),
        F::Vmdk => convert("vmdk"),
        F::Vdi => convert("vdi"),
        F::Vhd => convert("vpc"),
        F::Vhdx => convert("vhdx"),
        F::Qed => convert("qed"),
        F::Parallels => convert("parallels"),
        F::Dmg => convert("dmg"),
        F::Luks => format!(
            "decrypt it with its passphrase in a file: qemu-img convert -p --object secret,id=key,file=PASSPHRASE-FILE \
             --image-opts driver=luks,key-secret=key,file.filename={file} -O qcow2 {}",
            shell(&format!("{}.qcow2", path.display()))
        ),
        F::Iso9660 => "its bytes are the disk itself: add -f raw, and -r if nobody is to write it".to_owned(),
        F::Gzip => unpack("gzip", &[".gz"]),
        F::Xz => unpack("xz", &[".xz"]),
        F::Bzip2 => unpack("bzip2", &[".bz2"]),
        F::Zstd => unpack("zstd", &[".zst", ".zstd"]),
        F::Zip => format!("unpack it: unzip {file}"),
        F::Tar => format!("unpack it: tar -xf {file}"),
        F::Html | F::Xml => {
            "the download went wrong, and this is what the web server said instead: look into it, and download the image again"
                .to_owned()
        }
        _ => "its bytes are the disk itself: add -f raw".to_owned(),
    }
}

/// As one word of a shell command.
pub(crate) fn shell(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        text.to_owned()
    } else if text.starts_with('-') {
        format!("'./{}'", text.replace('\'', r"'\''"))
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    //! Guards the commands that users paste.
    use super::*;

    #[test]
    fn commands_name_the_file_and_never_write_over_it() {
        let text = |path: &str, found| explain(Path::new(path), Some(found));
        let vmdk = text("my disk.vmdk", ForeignFormat::Vmdk);
        assert!(
            vmdk.ends_with("-f vmdk -O qcow2 'my disk.vmdk' 'my disk.qcow2'"),
            "{vmdk}"
        );
        let misnamed = text("a.qcow2", ForeignFormat::Vdi);
        assert!(
            misnamed.ends_with("-O qcow2 a.qcow2 a.qcow2.converted.qcow2"),
            "{misnamed}"
        );
        let gzip = text("a.qcow2.gz", ForeignFormat::Gzip);
        assert!(gzip.ends_with("gzip -dc a.qcow2.gz > a.qcow2"), "{gzip}");
        let misnamed = text("a.qcow2", ForeignFormat::Xz);
        assert!(
            misnamed.ends_with("xz -dc a.qcow2 > a.qcow2.unpacked"),
            "{misnamed}"
        );
        let dashed = text("-x", ForeignFormat::Vhd);
        assert!(dashed.contains("'./-x'"), "{dashed}");
    }
}
