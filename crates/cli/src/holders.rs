//! Which processes hold an image, for messages.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that has an image locked.
pub(crate) struct Holder {
    pub(crate) pid: u32,
    /// The program's name, as far as it can be known.
    pub(crate) name: String,
}

/// How many descriptors are looked at: a busy machine must not make an error message slow.
const DESCRIPTORS: usize = 100_000;

/// The processes that have locks on the file, as far as this user may see them (`/proc/PID/fdinfo`).
pub(crate) fn of(path: &Path) -> Vec<Holder> {
    let Ok(wanted) = fs::metadata(path) else {
        return Vec::new();
    };
    let mut left = DESCRIPTORS;
    let mut holders = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let descriptors = fs::read_dir(process.path().join("fd"));
        let holds = descriptors
            .into_iter()
            .flatten()
            .flatten()
            .any(|descriptor| {
                left = left.saturating_sub(1);
                left > 0
                    && fs::metadata(descriptor.path()).is_ok_and(|found| {
                        (found.dev(), found.ino()) == (wanted.dev(), wanted.ino())
                    })
                    && fs::read_to_string(
                        process.path().join("fdinfo").join(descriptor.file_name()),
                    )
                    .is_ok_and(|text| text.contains("OFDLCK"))
            });
        if holds {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            holders.push(Holder {
                pid,
                name: name.trim().to_owned(),
            });
        }
    }
    holders
}

/// Why an image is not to be had.
pub(crate) fn explain(path: &Path, by_writer: bool) -> String {
    let holders = of(path);
    let does = if by_writer {
        "has it open for writing"
    } else {
        "reads it and lets nobody write"
    };
    let image = path.display();
    if holders
        .iter()
        .any(|holder| holder.pid == std::process::id())
    {
        return format!(
            "{image}: this very process {does}: it is named twice, or is the backing file of another image here; name it once"
        );
    }
    let who = match &holders[..] {
        [] => "another process (perhaps of another user, or on another machine)".to_owned(),
        [holder] => holder.describe(),
        [first, ..] => format!("{}, and {} more", first.describe(), holders.len() - 1),
    };
    format!(
        "{image}: locked by {who}, which {does}; close it there first: several may read an image, but one that writes needs it alone"
    )
}

impl Holder {
    fn describe(&self) -> String {
        format!("{} (process {})", self.name, self.pid)
    }
}
