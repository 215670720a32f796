//! Confinement is for good, so each test that confines itself has a process of its own: this program, started once more for one test, whose
//! environment says so.

use std::path::Path;
use std::process::Command;

const CONFINED: &str = "URUS_SANDBOX_TEST_DIRECTORY";

/// Runs this program's test `name` once more, in a process of its own with a directory of its own.
pub(crate) fn in_a_process(name: &str, work: impl FnOnce(&Path)) {
    if let Some(directory) = std::env::var_os(CONFINED) {
        return work(Path::new(&directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CONFINED, directory.path())
        .output()
        .unwrap();
    let told = format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{told}");
    assert!(told.contains("1 passed"), "{told}");
}
