//! Runs one program to its end, never longer than its time limit, and keeps everything it said.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The list of programs and packages that `cargo xtask test` installs from.
const PACKAGES: &str = include_str!("../packages.txt");

/// Long enough for every step on two busy cores; a step that needs longer says so.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);

/// A program about to run.
#[derive(Debug)]
pub struct Program {
    command: Command,
    limit: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Finished {
    /// How it was called, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
}

/// A program of this machine, by name.
///
/// # Panics
/// When it is not installed; the message names the Debian package.
#[must_use]
pub fn program(name: &str) -> Program {
    let path = find(name).unwrap_or_else(|| {
        panic!(
            "{name} is not installed: apt-get install {} (or run `cargo xtask test` as root)",
            package_of(name)
        )
    });
    Program::at(path)
}

/// The urus program.
#[must_use]
pub fn urus() -> Program {
    Program::at(urus_path())
}

/// The urus program with a limit on the memory that it may take for itself, in bytes. What an image asks for must not
/// decide what is allocated: past the limit allocation fails, and the program with it.
#[must_use]
pub fn urus_within(memory_bytes: u64) -> Program {
    program("prlimit")
        .arg(format!("--data={memory_bytes}"))
        .arg("--core=0")
        .arg("--")
        .arg(urus_path())
}

/// Where the urus program is: `URUS_BIN`, or else beside the tests in the target directory.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn urus_path() -> PathBuf {
    if let Some(path) = std::env::var_os("URUS_BIN") {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "URUS_BIN={} is not a file", path.display());
        return path;
    }
    let beside = crate::scratch::profile_directory().join("urus");
    assert!(
        beside.is_file(),
        "{} is not built: run `cargo xtask test`, or build urus-cli and set URUS_BIN",
        beside.display()
    );
    beside
}

impl Program {
    /// The program at `path`.
    pub fn at(path: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(path);
        // Debian's Python modules belong to Debian's Python, whatever else stands first in the caller's PATH.
        command
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
        Self {
            command,
            limit: DEFAULT_LIMIT,
        }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Several more arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// Several more arguments, written as one line and split at its spaces.
    #[must_use]
    pub fn words(self, line: &str) -> Self {
        self.args(line.split_whitespace())
    }

    /// The directory to run in.
    #[must_use]
    pub fn current_dir(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// How long it may take.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end, however that looks.
    ///
    /// # Panics
    /// When it cannot be started, or is still running at its time limit (it is killed then).
    #[must_use]
    pub fn run(mut self) -> Finished {
        let line = self.line();
        let started = Instant::now();
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        let stdout = drain(child.stdout.take());
        let stderr = drain(child.stderr.take());
        let Some(status) = wait(&mut child, self.limit) else {
            let _ = child.kill();
            let _ = child.wait();
            let (stdout, stderr) = (text(stdout), text(stderr));
            panic!(
                "{line}\nstill running after {:?}\nstdout: {stdout}\nstderr: {stderr}",
                self.limit
            );
        };
        Finished {
            line,
            status,
            stdout: text(stdout),
            stderr: text(stderr),
            elapsed: started.elapsed(),
        }
    }

    /// Runs it; it must succeed.
    pub fn ok(self) -> Finished {
        self.run().expect_code(0)
    }

    /// Starts it with piped standard input and output, for a conversation.
    pub(crate) fn converse(mut self) -> (Child, String) {
        let line = self.line();
        let child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        (child, line)
    }

    /// Starts it in the background with its output going to `log`.
    pub(crate) fn background(mut self, log: &Path) -> (Child, String) {
        let line = self.line();
        let out =
            std::fs::File::create(log).unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let err = out.try_clone().expect("a second descriptor of a log");
        let child = self
            .command
            .stdout(out)
            .stderr(err)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        (child, line)
    }

    fn line(&self) -> String {
        let mut line = self.command.get_program().to_string_lossy().into_owned();
        for arg in self.command.get_args() {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        line
    }
}

impl Finished {
    /// It must have ended with this exit code.
    ///
    /// # Panics
    /// When it did not; the message has all that it printed.
    #[must_use]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "{self}");
        self
    }

    /// It must have refused: any exit code but 0, and no death by signal.
    ///
    /// # Panics
    /// When it did not.
    #[must_use]
    pub fn expect_refusal(self) -> Self {
        match self.status.code() {
            Some(code) if code != 0 => {}
            Some(_) => panic!("this should have been refused: {self}"),
            None => panic!("died by a signal: {self}"),
        }
        assert!(
            !self.stderr.contains("panicked at"),
            "a panic is not an error message: {self}"
        );
        self
    }

    /// Its message must contain at least one of `words` (case does not matter).
    ///
    /// # Panics
    /// When it contains none of them.
    #[must_use]
    pub fn says_one_of(self, words: &[&str]) -> Self {
        let said = self.stderr.to_lowercase();
        assert!(
            words.iter().any(|word| said.contains(&word.to_lowercase())),
            "the message should mention one of {words:?}: {self}"
        );
        self
    }

    /// Standard output and standard error together.
    #[must_use]
    pub fn everything(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Its standard output as JSON.
    ///
    /// # Panics
    /// When that is not JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {self}"))
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}\n{} after {:?}\nstdout: {}\nstderr: {}",
            self.line,
            self.status,
            self.elapsed,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// Waits for the end of `child`, at most `limit`.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait().expect("waiting for a child") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Retries `attempt` until it yields something or `limit` is over.
pub fn poll<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = attempt() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

type Reader = std::thread::JoinHandle<Vec<u8>>;

fn drain(pipe: Option<impl Read + Send + 'static>) -> Reader {
    let mut pipe = pipe.expect("a piped stream");
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

fn text(reader: Reader) -> String {
    String::from_utf8_lossy(&reader.join().expect("a reader thread")).into_owned()
}

fn find(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.is_file())
        .or_else(|| find_in_path(name, &std::env::var_os("PATH")?))
}

fn find_in_path(name: &str, path: &OsString) -> Option<PathBuf> {
    std::env::split_paths(path)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

fn package_of(name: &str) -> &'static str {
    PACKAGES
        .lines()
        .filter(|line| !line.starts_with('#'))
        .find_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            (words.next() == Some(name)).then(|| words.next()).flatten()
        })
        .unwrap_or("(a package that packages.txt does not list)")
}
