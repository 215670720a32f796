//! A second opinion: QEMU checks a state that a power cut has left, and reads it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::contents::Contents;

/// Whether `qemu-img` is there. Looked for once.
#[must_use]
pub fn is_installed() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let version = Command::new("qemu-img").arg("--version").output();
        version.is_ok_and(|output| output.status.success())
    })
}

/// A directory that goes away with this.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, String> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("urus-sim-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left in the temporary directory harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(directory: &Path, arguments: &[&str]) -> Result<(Option<i32>, String), String> {
    let output = Command::new("qemu-img")
        .args(arguments)
        .current_dir(directory)
        .output()
        .map_err(|error| format!("qemu-img does not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.code(), said))
}

/// QEMU finds no corruption in the image, and reads from it what the guest is to read. `copied_clear` says that
/// COPIED is clear somewhere at refcount 1: allowed (O10), and what QEMU calls an error.
///
/// # Errors
/// What QEMU says, or where it reads something else.
pub fn judge(files: &[Contents], guest: &[u8], copied_clear: bool) -> Result<(), String> {
    let scratch = Scratch::new()?;
    // As the images name their backing files (`image::backing_name`).
    for (name, bytes) in ["image", "base", "bottom"].iter().zip(files) {
        fs::write(scratch.0.join(name), bytes).map_err(|error| error.to_string())?;
    }
    let (code, said) = run(&scratch.0, &["check", "-f", "qcow2", "image"])?;
    // 3: leaks, which a cut may leave.
    let sound = matches!(code, Some(0 | 3)) || copied_clear && code == Some(2);
    if !sound {
        let said: String = said.chars().take(400).collect();
        return Err(format!("qemu-img check ends with {code:?}: {said}"));
    }
    let (code, said) = run(
        &scratch.0,
        &["convert", "-f", "qcow2", "-O", "raw", "image", "read"],
    )?;
    if code != Some(0) {
        return Err(format!("qemu-img cannot read it: {said}"));
    }
    let read = fs::read(scratch.0.join("read")).map_err(|error| error.to_string())?;
    if read == guest {
        return Ok(());
    }
    let differs = read.iter().zip(guest).position(|(a, b)| a != b);
    Err(format!(
        "QEMU reads {} bytes, not {}, and other ones from {differs:?} on",
        read.len(),
        guest.len()
    ))
}
