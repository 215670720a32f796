//! What a killed test run may leave behind below the scratch directory: mounts, loop devices, gigabytes. Only what lies
//! there is touched; loop devices and mounts of others are none of our business.

use std::path::Path;
use std::process::{Command, Stdio};

/// The least free space that the tests can do with: the fixtures take about 3 GiB, copies of them come and go.
const FREE_GIB: u64 = 6;

/// Removes what an earlier run left, and says early when the disk is too full for this one.
pub(crate) fn make_room(scratch: &Path) -> Result<(), String> {
    clean(scratch);
    std::fs::create_dir_all(scratch).map_err(|error| format!("{}: {error}", scratch.display()))?;
    let output = Command::new("df").args(["-Pk"]).arg(scratch).output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let free = text
        .lines()
        .nth(1)
        .and_then(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
    match free {
        Some(kib) if kib < FREE_GIB << 20 => Err(format!(
            "{} has {} MiB free; the tests with images of real files need {FREE_GIB} GiB",
            scratch.display(),
            kib >> 10
        )),
        _ => Ok(()),
    }
}

/// Takes apart and removes what is below `scratch`.
pub(crate) fn clean(scratch: &Path) {
    let below = |path: &str| Path::new(path).starts_with(scratch);
    let mut mounts = mounts();
    // A file system that lies on a loop device before the file that the loop device shows.
    mounts.reverse();
    for mount in mounts.iter().filter(|mount| below(mount)) {
        quietly(Command::new("umount").arg(mount));
    }
    for (device, file) in loop_devices() {
        if below(&file) {
            quietly(Command::new("losetup").args(["--detach", &device]));
        }
    }
    for mount in self::mounts().iter().filter(|mount| below(mount)) {
        quietly(Command::new("umount").args(["-l", mount]));
    }
    let _ = std::fs::remove_dir_all(scratch);
}

fn mounts() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned))
        .collect()
}

fn loop_devices() -> Vec<(String, String)> {
    let list = Command::new("losetup")
        .args(["--list", "--noheadings", "--output", "NAME,BACK-FILE"])
        .output();
    let text = list
        .map(|list| String::from_utf8_lossy(&list.stdout).into_owned())
        .unwrap_or_default();
    let pair = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    };
    text.lines().filter_map(pair).collect()
}

fn quietly(command: &mut Command) {
    let _ = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
