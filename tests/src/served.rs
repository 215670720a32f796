//! `urus serve` as a child process.

use crate::Finished;
use crate::program::{Program, poll, program, urus, urus_path, urus_within, wait};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

/// How long a server may take until clients can connect, and until it has gone after a polite signal.
const PATIENCE: Duration = Duration::from_secs(60);

/// See [`Served::nbdsh_with_connections`].
const SEVERAL_HANDLES: &str = r"
import nbd

hs = [nbd.NBD() for _ in range(connections)]
for h in hs:
    h.connect_uri(uri)
errors = []

def put(n, offset, data):
    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    def done(error):
        if error.value:
            errors.append((error.value, offset))
        return 1
    hs[n].aio_pwrite(buffer, offset, done)

def settle():
    while any(h.aio_in_flight() for h in hs):
        for h in hs:
            if h.aio_in_flight():
                h.poll(1)
    assert not errors, errors

def flush(n):
    hs[n].flush()
";

/// The value of `--io`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// One ring a queue.
    IoUring,
    /// System calls.
    Blocking,
}

impl Driver {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::IoUring, Self::Blocking];

    /// As the command line has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Blocking => "blocking",
        }
    }

    /// One or the other in turn: the matrix tests take both drivers without running everything twice.
    #[must_use]
    pub fn alternating(turn: usize) -> Self {
        Self::ALL[turn % 2]
    }
}

/// How to serve; ends in [`Serve::start`] or [`Serve::refused`].
#[derive(Debug)]
pub struct Serve {
    image: PathBuf,
    driver: Driver,
    args: Vec<String>,
    memory_bytes: Option<u64>,
    files: Option<(u64, u64)>,
}

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct Served {
    child: Child,
    line: String,
    image: PathBuf,
    // The sockets' directory; removed after the server is gone.
    directory: tempfile::TempDir,
    /// From the start of the process until the first connection was accepted.
    pub ready_after: Duration,
}

impl Serve {
    /// Serves `image`, which is qcow2 unless an argument says otherwise.
    #[must_use]
    pub fn new(image: &Path, driver: Driver) -> Self {
        Self {
            image: image.to_owned(),
            driver,
            args: Vec::new(),
            memory_bytes: None,
            files: None,
        }
    }

    /// More arguments, written as one line and split at its spaces.
    #[must_use]
    pub fn with(mut self, line: &str) -> Self {
        self.args.extend(line.split_whitespace().map(str::to_owned));
        self
    }

    /// One more argument, which may contain spaces.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// The most memory that the server may take for itself, in bytes.
    #[must_use]
    pub fn within(mut self, memory_bytes: u64) -> Self {
        self.memory_bytes = Some(memory_bytes);
        self
    }

    /// The limits of open files that the server begins with, soft and hard.
    #[must_use]
    pub fn with_files(mut self, soft: u64, hard: u64) -> Self {
        self.files = Some((soft, hard));
        self
    }

    /// Starts the server and waits until it accepts connections.
    ///
    /// # Panics
    /// When it does not come up; the message has its log.
    #[must_use]
    pub fn start(self) -> Served {
        self.start_or_refused()
            .unwrap_or_else(|refused| panic!("did not come up: {refused}"))
    }

    /// Starts a server that may come up or refuse, where both are right.
    ///
    /// # Errors
    /// How it refused, with an exit code other than 0.
    pub fn start_or_refused(self) -> Result<Served, Finished> {
        let directory = tempfile::Builder::new()
            .prefix("urus-")
            .tempdir()
            .expect("a directory for a socket");
        let socket = directory.path().join("nbd");
        let log = directory.path().join("log");
        let started = Instant::now();
        let (mut child, line) = self.command(&socket).background(&log);
        let gone = poll(PATIENCE, || {
            let gone = child.try_wait().expect("waiting for the server");
            (gone.is_some() || UnixStream::connect(&socket).is_ok()).then_some(gone)
        });
        let elapsed = started.elapsed();
        match gone {
            Some(None) => Ok(Served {
                child,
                line,
                image: self.image,
                directory,
                ready_after: elapsed,
            }),
            Some(Some(status)) => {
                let finished = Finished {
                    line,
                    status,
                    stdout: String::new(),
                    stderr: read(&log),
                    elapsed,
                };
                Err(finished.expect_refusal())
            }
            None => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{line}\nneither came up nor refused:\n{}", read(&log));
            }
        }
    }

    /// Starts a server and kills it so long after, wherever it is by then.
    ///
    /// # Panics
    /// When it cannot be killed, or its locks stay.
    pub fn killed_after(self, delay: Duration) {
        let directory = tempfile::Builder::new()
            .prefix("urus-")
            .tempdir()
            .expect("a directory for a socket");
        let socket = directory.path().join("nbd");
        let (child, line) = self
            .command(&socket)
            .background(&directory.path().join("log"));
        std::thread::sleep(delay);
        let served = Served {
            child,
            line,
            image: self.image,
            directory,
            ready_after: delay,
        };
        served.kill();
    }

    /// Starts a server that must give up by itself, within ten seconds, with an exit code other than 0.
    #[must_use]
    pub fn refused(self) -> Finished {
        let directory = tempfile::Builder::new()
            .prefix("urus-")
            .tempdir()
            .expect("a directory for a socket");
        let socket = directory.path().join("nbd");
        let finished = self
            .command(&socket)
            .limit(Duration::from_secs(10))
            .run()
            .expect_refusal();
        assert!(
            !socket.exists(),
            "a refused server left its socket: {finished}"
        );
        finished
    }

    fn command(&self, socket: &Path) -> Program {
        let program = match self.files {
            Some((soft, hard)) => program("prlimit")
                .arg(format!("--nofile={soft}:{hard}"))
                .arg("--")
                .arg(urus_path()),
            None => self.memory_bytes.map_or_else(urus, urus_within),
        };
        let program = program
            .arg("serve")
            .arg(&self.image)
            .arg("--io")
            .arg(self.driver.name());
        program
            .arg("--nbd")
            .arg(format!("unix:{}", socket.display()))
            .args(&self.args)
    }
}

impl Served {
    /// Serves `image` with nothing but the driver chosen.
    #[must_use]
    pub fn start(image: &Path, driver: Driver) -> Self {
        Serve::new(image, driver).start()
    }

    /// The NBD URI of the export.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// The path of the unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    /// The server's process id.
    ///
    /// # Panics
    /// Never: process ids are positive and fit.
    #[must_use]
    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// All that the server has printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        read(&self.directory.path().join("log"))
    }

    /// Where each of the server's threads is in the kernel, for a server that hangs.
    #[must_use]
    pub fn threads(&self) -> String {
        let tasks = format!("/proc/{}/task", self.child.id());
        let mut text = String::new();
        for task in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
            for what in ["comm", "syscall", "stack"] {
                text.push_str(&read(&task.path().join(what)));
            }
        }
        text
    }

    /// Sends the server a signal.
    ///
    /// # Panics
    /// When the server is gone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("signalling the server");
    }

    /// Stops the server as a service manager does. It must finish, exit 0 and take its socket away.
    ///
    /// # Panics
    /// When it does not.
    pub fn stop(self) -> String {
        self.signal(rustix::process::Signal::TERM);
        self.ended()
    }

    /// Waits for a server that was told to stop.
    ///
    /// # Panics
    /// When it does not exit with code 0.
    #[must_use]
    pub fn ended(mut self) -> String {
        let status = wait(&mut self.child, PATIENCE);
        let log = self.log();
        match status {
            Some(status) => assert_eq!(status.code(), Some(0), "{}\n{status}\n{log}", self.line),
            None => panic!(
                "{}\nstill there {PATIENCE:?} after the signal\n{log}\n{}",
                self.line,
                self.threads()
            ),
        }
        assert!(!log.contains("panicked at"), "{}\n{log}", self.line);
        assert!(
            !self.socket().exists(),
            "{}\nleft its socket behind\n{log}",
            self.line
        );
        log
    }

    /// Sends SIGTERM to a server whose image is damaged: it must go, by itself and without a panic, but may complain.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn stop_complaining(mut self) -> String {
        self.signal(rustix::process::Signal::TERM);
        let status = wait(&mut self.child, PATIENCE);
        let log = self.log();
        let code = status.and_then(|status| status.code());
        assert!(
            code.is_some() && !log.contains("panicked at"),
            "{}\n{status:?}\n{log}",
            self.line
        );
        log
    }

    /// Kills the server where it stands: no signal handler runs, nothing is flushed. The kernel takes the rings of a
    /// dead process apart in its own time, and until then they hold its files, and with them the locks on the image; so
    /// this waits until the locks are gone.
    ///
    /// # Panics
    /// When the server cannot be killed, or its locks stay.
    pub fn kill(mut self) {
        self.child.kill().expect("killing the server");
        self.child.wait().expect("waiting for the killed server");
        let free = poll(PATIENCE, || (!is_locked(&self.image)).then_some(()));
        assert!(
            free.is_some(),
            "{}: still locked by a dead process",
            self.image.display()
        );
    }

    /// Whether the server is still there.
    ///
    /// # Panics
    /// When the system cannot say.
    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("waiting for the server")
            .is_none()
    }

    /// Copies the export into `file` with nbdcopy.
    pub fn copy_out(&self, file: &Path) {
        let _ = std::fs::remove_file(file);
        program("nbdcopy")
            .arg(self.uri())
            .arg(file)
            .limit(Duration::from_secs(240))
            .ok();
    }

    /// Runs qemu-io as an NBD client: one connection, the commands in order.
    pub fn qemu_io<C: AsRef<str>>(&self, commands: &[C]) -> Finished {
        crate::qemu::io("raw", &self.uri(), commands)
    }

    /// The same, where the export is read-only.
    pub fn qemu_io_read_only<C: AsRef<str>>(&self, commands: &[C]) -> Finished {
        crate::qemu::io_program("raw", &self.uri(), commands)
            .arg("-r")
            .ok()
    }

    /// Runs a Python script with the connected handle `h`; it must end without an exception.
    pub fn nbdsh(&self, script: &str) -> Finished {
        self.nbdsh_program(script).ok()
    }

    /// The same, for scripts that are to fail or to run long.
    #[must_use]
    pub fn nbdsh_program(&self, script: &str) -> Program {
        program("nbdsh")
            .arg("-u")
            .arg(self.uri())
            .arg("-c")
            .arg(script)
    }

    /// Runs a Python script with so many connected handles in the list `hs`, and these helpers: `put(n, offset, bytes)`
    /// starts a write on connection `n` and does not wait for it; `settle()` waits for all that was started and raises
    /// the first error; `flush(n)`.
    pub fn nbdsh_with_connections(&self, connections: usize, script: &str) -> Finished {
        let uri = self.uri();
        let prelude = format!("connections, uri = {connections}, '{uri}'\n{SEVERAL_HANDLES}");
        program("nbdsh")
            .arg("-n")
            .arg("-c")
            .arg(format!("{prelude}\n{script}"))
            .ok()
    }

    /// Starts a Python script that prints `ready` and waits for a line of input: it holds its connection open, with
    /// no flush and no farewell, until the test has done what it wants to the server.
    ///
    /// # Panics
    /// When the script does not get as far as `ready`.
    #[must_use]
    pub fn holding(&self, script: &str) -> Holding {
        let script =
            format!("{script}\nimport sys\nprint('ready', flush=True)\nsys.stdin.readline()\n");
        Holding::until_prompt(self.nbdsh_program(&script), "ready")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let running = matches!(self.child.try_wait(), Ok(None));
        if running {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!(
                "log of {} ({}):\n{}",
                self.line,
                self.image.display(),
                self.log()
            );
        }
    }
}

/// A program that has got where it should and waits for input: a client that holds its connection
/// ([`Served::holding`]), or QEMU with an image open.
#[derive(Debug)]
pub struct Holding {
    child: Child,
}

impl Holding {
    /// Starts a program and waits until it has printed `prompt`.
    ///
    /// # Panics
    /// When it ends before.
    #[must_use]
    pub fn until_prompt(program: Program, prompt: &str) -> Self {
        let (mut child, line) = program.converse();
        let mut stdout = child.stdout.take().expect("a piped stream");
        let mut said = Vec::new();
        let mut byte = [0];
        while !said.ends_with(prompt.as_bytes()) {
            let read = stdout.read(&mut byte).expect("reading from a child");
            assert_eq!(
                read,
                1,
                "{line}\nended without {prompt:?}: {}",
                String::from_utf8_lossy(&said)
            );
            said.push(byte[0]);
        }
        Self { child }
    }

    /// Lets the client go on to its end, whatever it makes of a server that may be gone.
    pub fn release(mut self) {
        if let Some(mut stdin) = self.child.stdin.take() {
            let _ = stdin.write_all(b"\n");
        }
        if wait(&mut self.child, Duration::from_secs(20)).is_none() {
            let _ = self.child.kill();
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether anybody holds a lock on `file`.
fn is_locked(file: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(file).expect("metadata of an image");
    // The sixth word is MAJOR:MINOR:INODE. All three count: on a small file system of a test's own the number of an inode is
    // one that many others have.
    let (device, inode) = (metadata.dev(), metadata.ino());
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let id = format!("{major:02x}:{minor:02x}:{inode}");
    let ours = |line: &str| line.split_whitespace().nth(5) == Some(id.as_str());
    std::fs::read_to_string("/proc/locks")
        .expect("the list of locks")
        .lines()
        .any(ours)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| format!("({}: {error})", path.display()))
}
