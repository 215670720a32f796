//! From an NBD export to a mounted file system without any kernel module: nbdfuse shows the export as a file, a loop
//! device makes it a block device. Needs root. Everything is taken apart again, also when a test fails; a loop device
//! is detached only by the one who attached it.

use crate::Served;
use crate::program::{Program, poll, program, wait};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

/// An NBD export as a file.
#[derive(Debug)]
pub struct AsFile {
    child: Child,
    file: PathBuf,
}

impl AsFile {
    /// Shows the export of `served` as `file`, over so many connections.
    #[must_use]
    pub fn new(served: &Served, file: &Path, connections: usize) -> Self {
        Self::of_uri(&served.uri(), file, connections)
    }

    /// Shows any export as `file`.
    ///
    /// # Panics
    /// When nbdfuse does not come up.
    #[must_use]
    pub fn of_uri(uri: &str, file: &Path, connections: usize) -> Self {
        require_root("nbdfuse");
        std::fs::write(file, "").expect("a file to mount on");
        let log = file.with_extension("log");
        let nbdfuse = program("nbdfuse")
            .arg("-C")
            .arg(connections.to_string())
            .arg(file)
            .arg(uri);
        let (child, line) = nbdfuse.background(&log);
        let mut this = Self {
            child,
            file: file.to_owned(),
        };
        let up = poll(PATIENCE, || {
            let gone = this
                .child
                .try_wait()
                .expect("waiting for nbdfuse")
                .is_some();
            let there = std::fs::metadata(file).is_ok_and(|metadata| metadata.len() > 0);
            (gone || there).then_some(there)
        });
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        assert_eq!(up, Some(true), "{line} did not come up: {log}");
        this
    }

    /// Takes it away; the client flushes and says goodbye.
    ///
    /// # Panics
    /// When it does not end.
    pub fn close(mut self) {
        program("umount").arg(&self.file).ok();
        let status = wait(&mut self.child, PATIENCE).expect("nbdfuse ends once it is unmounted");
        assert!(status.success(), "nbdfuse: {status}");
    }
}

impl Drop for AsFile {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = program("umount").arg("-l").arg(&self.file).run();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A loop device.
#[derive(Debug)]
pub struct Loop {
    device: Option<String>,
}

impl Loop {
    /// Attaches a loop device to `file`.
    #[must_use]
    pub fn attach(file: &Path) -> Self {
        Self::attach_with(file, "")
    }

    /// The same with more arguments for losetup.
    ///
    /// # Panics
    /// When there is no loop device.
    #[must_use]
    pub fn attach_with(file: &Path, arguments: &str) -> Self {
        require_root("losetup");
        let finished = program("losetup")
            .words("--find --show")
            .words(arguments)
            .arg(file)
            .ok();
        Self {
            device: Some(finished.stdout.trim().to_owned()),
        }
    }

    /// Its name under /dev.
    ///
    /// # Panics
    /// Never: a device is there until `detach`.
    #[must_use]
    pub fn device(&self) -> &str {
        self.device.as_deref().expect("attached")
    }

    /// Detaches it.
    pub fn detach(mut self) {
        if let Some(device) = self.device.take() {
            program("losetup").arg("--detach").arg(device).ok();
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            let _ = program("losetup").arg("--detach").arg(device).run();
        }
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mount {
    directory: Option<PathBuf>,
}

impl Mount {
    /// Mounts `device` on `directory`, which is made.
    #[must_use]
    pub fn device(device: &str, directory: &Path) -> Self {
        Self::with(program("mount").arg(device), directory)
    }

    /// Mounts a tmpfs of so many bytes: a disk that is soon full.
    #[must_use]
    pub fn small(bytes: u64, directory: &Path) -> Self {
        Self::with(
            program("mount")
                .words("-t tmpfs -o")
                .arg(format!("size={bytes}"))
                .arg("tmpfs"),
            directory,
        )
    }

    fn with(mount: Program, directory: &Path) -> Self {
        require_root("mount");
        std::fs::create_dir_all(directory).expect("a directory to mount on");
        mount.arg(directory).ok();
        Self {
            directory: Some(directory.to_owned()),
        }
    }

    /// Where it is mounted.
    ///
    /// # Panics
    /// Never: it is mounted until `unmount`.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.as_deref().expect("mounted")
    }

    /// Unmounts it, which writes everything back.
    pub fn unmount(mut self) {
        if let Some(directory) = self.directory.take() {
            program("umount").arg(directory).ok();
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(directory) = self.directory.take() {
            let _ = program("umount").arg("-l").arg(directory).run();
        }
    }
}

/// Some other server, killed when it is dropped.
#[derive(Debug)]
pub struct Background {
    child: Child,
}

impl Background {
    /// Starts it and waits until `socket` is there.
    #[must_use]
    pub fn start(program: Program, log: &Path, socket: &Path) -> Self {
        Self::start_when(program, log, || socket.exists())
    }

    /// Starts it and waits until `ready`.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn start_when(program: Program, log: &Path, ready: impl Fn() -> bool) -> Self {
        let (child, line) = program.background(log);
        let this = Self { child };
        let up = poll(PATIENCE, || ready().then_some(()));
        assert!(
            up.is_some(),
            "{line}\n{}",
            std::fs::read_to_string(log).unwrap_or_default()
        );
        this
    }

    /// Sends SIGTERM and gives the exit code, if it ends with one in time.
    pub fn stop(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        wait(&mut self.child, PATIENCE)?.code()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn require_root(what: &str) {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test needs root for {what}"
    );
}
