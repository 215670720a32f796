//! What is said over a control socket: a request is a line of JSON, and so is its reply, in the same order (docs/CONTROL.md).

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Of the protocol. It changes when a client of before would misunderstand; new commands and new fields of replies do not change it.
pub(crate) const VERSION: u32 = 1;

/// The longest request in bytes, its end included.
pub(crate) const REQUEST_BYTES: usize = 4096;

/// The longest reply in bytes that a client takes.
pub(crate) const REPLY_BYTES: usize = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    pub(crate) version: u32,
    /// The export's name, where the server has several; the first image otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<String>,
    pub(crate) command: Command,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Command {
    /// Change the size of the disk.
    Resize(NewSize),
    /// Hold new requests, finish those in flight, make everything durable.
    #[serde(rename_all = "kebab-case")]
    Pause {
        /// Let go of the image locks too.
        #[serde(default)]
        release_locks: bool,
    },
    /// Go on.
    Resume {},
    /// Make everything durable that was completed.
    Flush {},
    /// What the device is, and has done.
    Stats {},
}

/// The size that a disk gets, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NewSize {
    /// This size.
    Size(u64),
    /// So much more than it has when the command's turn has come. Only the server knows that size: a client that added by
    /// itself would undo what another client did meanwhile.
    Add(u64),
}

impl NewSize {
    /// The new size of a disk that has `present` bytes; None where no disk can be that large.
    pub(crate) fn resolve(self, present: u64) -> Option<u64> {
        match self {
            Self::Size(size) => Some(size),
            Self::Add(bytes) => present.checked_add(bytes),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub(crate) version: u32,
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// Done.
    Result(Value),
    /// Not done.
    Error(Problem),
}

/// Why something was not done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Problem {
    pub(crate) kind: Kind,
    /// For people.
    pub(crate) message: String,
}

/// What sort of problem it is, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// The request cannot be understood.
    Request,
    /// It is of another version of the protocol.
    Version,
    /// There is no image of that name.
    Image,
    /// The device has refused, or failed.
    Device,
    /// The server has too many connections, or is ending.
    Busy,
    /// A kind that a newer server has.
    #[serde(other)]
    Other,
}

impl Problem {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }
}

impl Request {
    /// Understands a line.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, Problem> {
        let value: Value = serde_json::from_slice(line)
            .map_err(|error| Problem::new(Kind::Request, format!("this is not JSON: {error}")))?;
        // First of all: the rest of another version's request means nothing here.
        match value.get("version").and_then(Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => {
                let message = format!(
                    "version {version} of the protocol is not spoken here; this server speaks {VERSION}"
                );
                return Err(Problem::new(Kind::Version, message));
            }
            None => {
                let message = format!("a request needs \"version\": {VERSION}");
                return Err(Problem::new(Kind::Version, message));
            }
        }
        serde_json::from_value(value)
            .map_err(|error| Problem::new(Kind::Request, error.to_string()))
    }
}

/// Writes a message and the end of its line at once.
pub(crate) fn write_line(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Takes lines off a stream, of a bounded length.
#[derive(Debug)]
pub(crate) struct Lines {
    bytes: Vec<u8>,
    limit: usize,
}

impl Lines {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
        }
    }

    /// A line without its end, if one is there already.
    pub(crate) fn take(&mut self) -> Option<Vec<u8>> {
        let end = self.bytes.iter().position(|&byte| byte == b'\n')?;
        let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
        line.pop();
        Some(line)
    }

    /// Whether what has come begins with `words`.
    pub(crate) fn begin_with(&self, words: &[u8]) -> bool {
        self.bytes.starts_with(words)
    }

    /// Reads once; whether anything came.
    ///
    /// # Errors
    /// The stream's, and `InvalidData` for a line that is too long.
    pub(crate) fn fill(&mut self, stream: &mut impl Read) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        let most = bytes.len().min(self.limit - self.bytes.len());
        if most == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a line may have at most {} bytes", self.limit),
            ));
        }
        let count = stream.read(&mut bytes[..most])?;
        self.bytes.extend_from_slice(&bytes[..count]);
        Ok(count > 0)
    }
}

#[cfg(test)]
mod tests {
    //! Guards what clients were told in docs/CONTROL.md, and the server against what it was not told.
    use super::*;

    fn parse(text: &str) -> Result<Request, Problem> {
        Request::parse(text.as_bytes())
    }

    #[test]
    fn requests_are_as_documented() {
        let document = include_str!("../../../../docs/CONTROL.md");
        let examples: Vec<_> = document
            .lines()
            .filter_map(|line| line.strip_prefix("> "))
            .collect();
        let commands: Vec<_> = examples
            .iter()
            .map(|line| parse(line).unwrap_or_else(|problem| panic!("{line}: {problem:?}")))
            .map(|request| request.command)
            .collect();
        for command in [
            Command::Resize(NewSize::Size(17_179_869_184)),
            Command::Resize(NewSize::Add(2_147_483_648)),
            Command::Pause {
                release_locks: false,
            },
            Command::Resume {},
            Command::Flush {},
            Command::Stats {},
        ] {
            assert!(commands.contains(&command), "{command:?}");
        }
    }

    #[test]
    fn what_was_not_agreed_is_refused() {
        for (text, kind) in [
            ("", Kind::Request),
            ("{", Kind::Request),
            ("{}", Kind::Version),
            (r#"{"version":2,"command":"unheard of"}"#, Kind::Version),
            (r#"{"version":"1","command":{"flush":{}}}"#, Kind::Version),
            (r#"{"version":1}"#, Kind::Request),
            (r#"{"version":1,"command":{"format":{}}}"#, Kind::Request),
            (r#"{"version":1,"command":{"resize":{}}}"#, Kind::Request),
            (
                r#"{"version":1,"command":{"resize":{"size":-1}}}"#,
                Kind::Request,
            ),
            (
                r#"{"version":1,"command":{"resize":{"size":1e3}}}"#,
                Kind::Request,
            ),
            (
                r#"{"version":1,"command":{"resize":{"add":-1}}}"#,
                Kind::Request,
            ),
            (
                r#"{"version":1,"command":{"resize":{"size":1,"add":1}}}"#,
                Kind::Request,
            ),
            (
                r#"{"version":1,"command":{"pause":{"release":true}}}"#,
                Kind::Request,
            ),
            (
                r#"{"version":1,"command":{"flush":{"x":1}}}"#,
                Kind::Request,
            ),
            (
                r#"{"version":1,"command":{"flush":{}},"x":1}"#,
                Kind::Request,
            ),
            (
                r#"{"version":1,"command":{"flush":{},"stats":{}}}"#,
                Kind::Request,
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().kind, kind, "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let deep = "[".repeat(REQUEST_BYTES - 1);
        assert_eq!(parse(&deep).unwrap_err().kind, Kind::Request);
    }

    #[test]
    fn kinds_of_a_newer_server_are_understood() {
        let reply = r#"{"version":1,"error":{"kind":"moon","message":"m"},"more":1}"#;
        let reply: Reply = serde_json::from_str(reply).unwrap();
        assert!(
            matches!(
                reply.outcome,
                Outcome::Error(Problem {
                    kind: Kind::Other,
                    ..
                })
            ),
            "{reply:?}"
        );
    }

    #[test]
    fn lines_are_bounded() {
        let mut lines = Lines::new(8);
        let mut stream: &[u8] = b"abc\ndefghijklm\n";
        assert!(lines.fill(&mut stream).unwrap());
        assert_eq!(lines.take().unwrap(), b"abc");
        assert_eq!(lines.take(), None);
        assert!(lines.fill(&mut stream).unwrap());
        let error = lines.fill(&mut stream).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let mut lines = Lines::new(8);
        assert!(!lines.fill(&mut &b""[..]).unwrap());
    }
}
