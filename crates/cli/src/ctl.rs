//! `urus ctl`: asks something of a server that holds an image, over its control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;

use crate::common::OutputArg;
use crate::control::path_or_address;
use crate::control::protocol::{
    Command, Kind, Lines, NewSize, Outcome, REPLY_BYTES, Reply, Request, VERSION, write_line,
};
use crate::failure::{Failure, Outcome as Ended};
use crate::output::{print, print_json};
use crate::size::Size;

/// Control an image that a server holds
///
/// SOCKET is where the server was told to take commands: `urus serve … --control unix:PATH`. It can be used by the server's user. Exit code 0: done,
/// 1: refused or failed, with the reason.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Change the size of the disk while it is used: a virtual machine is told, NBD clients see it when they connect next
    Resize {
        #[command(flatten)]
        to: To,
        /// The new size (8G), or what to add (+2G)
        size: String,
    },
    /// Hold new requests, finish those in flight and make everything durable: the image's file is then complete, and can be copied
    Pause {
        #[command(flatten)]
        to: To,
        /// Let go of the image locks too, so that another process may write the image until `resume`
        #[arg(long)]
        release_locks: bool,
    },
    /// Go on after `pause`, with the requests that have waited
    Resume {
        #[command(flatten)]
        to: To,
    },
    /// Make everything durable that was written so far
    Flush {
        #[command(flatten)]
        to: To,
    },
    /// Print what the server has and what it has done
    Stats {
        #[command(flatten)]
        to: To,
        /// How it is printed
        #[arg(long, value_name = "FORMAT", default_value = "human")]
        output: OutputArg,
    },
}

/// Which image.
#[derive(Debug, clap::Args)]
struct To {
    /// The control socket: unix:PATH or PATH
    #[arg(value_name = "SOCKET", value_parser = path_or_address)]
    socket: PathBuf,

    /// The export's name, where the server has several images [default: the first]
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
}

impl Args {
    /// What it is about, for logs.
    pub(crate) fn socket(&self) -> &Path {
        match &self.what {
            What::Resize { to, .. }
            | What::Pause { to, .. }
            | What::Resume { to }
            | What::Flush { to }
            | What::Stats { to, .. } => &to.socket,
        }
    }
}

pub(crate) fn run(args: Args) -> Ended {
    match args.what {
        What::Resize { to, size } => {
            let size = new_size(&size)?;
            to.connect()?.ask(Command::Resize(size))?;
        }
        What::Pause { to, release_locks } => {
            to.connect()?.ask(Command::Pause { release_locks })?;
        }
        What::Resume { to } => {
            to.connect()?.ask(Command::Resume {})?;
        }
        What::Flush { to } => {
            to.connect()?.ask(Command::Flush {})?;
        }
        What::Stats { to, output } => {
            let stats = to.connect()?.ask(Command::Stats {})?;
            match output {
                OutputArg::Json => print_json(&stats),
                OutputArg::Human => print(&human(&stats)),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// As qemu-img resize reads it, in whole sectors. What is to be added is added by the server, which alone knows to what.
fn new_size(text: &str) -> Result<NewSize, Failure> {
    let size: Size = text.parse().map_err(Failure::usage)?;
    let bytes = size.0.next_multiple_of(512);
    Ok(if text.trim_start().starts_with('+') {
        NewSize::Add(bytes)
    } else {
        NewSize::Size(bytes)
    })
}

/// Said to those who name an image.
const NO_SOCKET: &str = "this is a file, and no socket: give the control socket of the server that has the image \
                         (urus serve … --control unix:PATH). An image that nobody has open grows by qemu-img resize IMAGE +SIZE";

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    // What cannot be looked at may be one.
    path.metadata()
        .is_ok_and(|found| found.file_type().is_socket())
        || path.metadata().is_err()
}

/// What servers say, that are no control sockets, as their first words.
const OTHERS: [(&[u8], &str); 2] = [
    (
        b"NBDMAGIC",
        "this socket is for NBD clients: give the one of --control (urus serve … --control unix:PATH)",
    ),
    (
        b"HTTP/",
        "this socket is for metrics: give the one of --control (urus serve … --control unix:PATH)",
    ),
];

impl To {
    fn connect(self) -> Result<Server, Failure> {
        let stream = UnixStream::connect(&self.socket).map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::NotFound => {
                    "there is no such socket; is the server running with --control?".into()
                }
                _ if !is_socket(&self.socket) => NO_SOCKET.into(),
                io::ErrorKind::ConnectionRefused => {
                    "no server listens there any more; it was killed, and is to be started again".into()
                }
                io::ErrorKind::PermissionDenied => {
                    "permission denied: a control socket is for the server's user (and root); use sudo, or sudo -u USER".into()
                }
                _ => error.to_string(),
            };
            Failure::complete(format!("{}: {why}", self.socket.display()))
        })?;
        Ok(Server {
            stream,
            lines: Lines::new(REPLY_BYTES),
            to: self,
        })
    }
}

/// The other side.
struct Server {
    stream: UnixStream,
    lines: Lines,
    to: To,
}

impl Server {
    /// Waits for the answer as long as the disk takes.
    fn ask(&mut self, command: Command) -> Result<Value, Failure> {
        let request = Request {
            version: VERSION,
            image: self.to.image.clone(),
            command,
        };
        // A server that turns a connection away answers without reading: the reply says more than the broken pipe.
        let written = write_line(&mut self.stream, &request);
        let line = self.line().map_err(|error| {
            if error
                .get_ref()
                .is_some_and(|what| OTHERS.iter().any(|(_, text)| *text == what.to_string()))
            {
                return self.failed(&error.to_string());
            }
            let error = written.err().unwrap_or(error);
            self.failed(&format!(
                "the server has not answered: {error}; is this the socket of --control?"
            ))
        })?;
        let reply: Reply = serde_json::from_slice(&line).map_err(|error| {
            self.failed(&format!("what the server says makes no sense: {error}"))
        })?;
        match reply.outcome {
            Outcome::Result(value) => Ok(value),
            Outcome::Error(problem) if problem.kind == Kind::Device => {
                Err(Failure::new(problem.message))
            }
            Outcome::Error(problem) => Err(self.failed(&problem.message)),
        }
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some((_, what)) = OTHERS
                .iter()
                .find(|(words, _)| self.lines.begin_with(words))
            {
                return Err(io::Error::other(*what));
            }
            if let Some(line) = self.lines.take() {
                return Ok(line);
            }
            if !self.lines.fill(&mut self.stream)? {
                return Err(io::Error::other("the connection was closed"));
            }
        }
    }

    fn failed(&self, what: &str) -> Failure {
        Failure::complete(format!("{}: {what}", self.to.socket.display()))
    }
}

/// `name: value` for each field; lists and objects with their fields further in.
fn human(value: &Value) -> String {
    let mut text = String::new();
    lines(&mut text, value, 0);
    text
}

fn lines(text: &mut String, value: &Value, level: usize) {
    let indent = "  ".repeat(level);
    let fields: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| (name.clone(), value))
            .collect(),
        Value::Array(items) => (0..)
            .zip(items)
            .map(|(index, value): (usize, _)| (index.to_string(), value))
            .collect(),
        _ => Vec::new(),
    };
    for (name, value) in fields {
        match value {
            Value::Object(_) | Value::Array(_) => {
                text.push_str(&format!("{indent}{name}:\n"));
                lines(text, value, level + 1);
            }
            Value::String(plain) => text.push_str(&format!("{indent}{name}: {plain}\n")),
            other => text.push_str(&format!("{indent}{name}: {other}\n")),
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards the sizes that users give, and what they are shown.
    use serde_json::json;

    use super::*;

    #[test]
    fn sizes_are_absolute_or_added() {
        let at = |text| new_size(text).ok();
        assert_eq!(at("2G"), Some(NewSize::Size(2 << 30)));
        assert_eq!(at("+1G"), Some(NewSize::Add(1 << 30)));
        assert_eq!(at(" +1000"), Some(NewSize::Add(1024)));
        assert_eq!(at("1000"), Some(NewSize::Size(1024)));
        assert!(at("-1G").is_none() && at("much").is_none());
        assert_eq!(NewSize::Add(512).resolve(1024), Some(1536));
        assert_eq!(NewSize::Size(512).resolve(1024), Some(512));
        assert_eq!(NewSize::Add(512).resolve(u64::MAX - 511), None);
    }

    #[test]
    fn nested_values_are_indented() {
        let text = human(&json!({"size": 1, "queues": [{"reads": 2}], "name": "a"}));
        assert_eq!(text, "name: a\nqueues:\n  0:\n    reads: 2\nsize: 1\n");
    }
}
