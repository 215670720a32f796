//! Judging the file names that an image stores: its backing file's and its data file's.
//!
//! Other tools give some names a meaning beyond "a path": a driver's name or a URL before a colon, a JSON
//! description of a whole block graph, a descriptor number. In an image from a stranger each is a way to reach
//! what the image has no business with (CVE-2024-4467, CVE-2026-27211), so such names are told apart here,
//! before anything is opened.

use std::fmt;

/// Longest name of a backing or data file, in bytes (specification: "Header", backing_file_size).
pub const MAX_NAME_BYTES: usize = 1023;

/// Why a stored name is not a plain file name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameFault {
    /// No bytes at all.
    Empty,
    /// Longer than [`MAX_NAME_BYTES`].
    TooLong {
        /// Its length in bytes.
        bytes: u64,
    },
    /// A NUL byte, where C programs and others disagree about the end.
    Nul {
        /// Its position.
        at: usize,
    },
    /// Not UTF-8, where text is needed (a format's name).
    NotText,
    /// `json:`: describes a block graph.
    Json,
    /// `fd:`: names a descriptor of the process.
    Descriptor,
    /// A colon before the first slash: other tools take what precedes it for a protocol or driver.
    Scheme {
        /// What precedes the colon.
        scheme: String,
    },
}

impl fmt::Display for NameFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the name is empty"),
            Self::TooLong { bytes } => write!(
                f,
                "the name has {bytes} bytes; at most {MAX_NAME_BYTES} are allowed"
            ),
            Self::Nul { at } => write!(f, "the name has a NUL byte at position {at}"),
            Self::NotText => f.write_str("the name is not UTF-8"),
            Self::Json => {
                f.write_str("the name starts with 'json:', so it is a description and no file name")
            }
            Self::Descriptor => {
                f.write_str("the name starts with 'fd:', so it is a descriptor and no file name")
            }
            Self::Scheme { scheme } => {
                write!(
                    f,
                    "the name starts with '{}:', so it is a protocol and no file name",
                    scheme.escape_debug()
                )
            }
        }
    }
}

impl std::error::Error for NameFault {}

/// Judges the name of a backing or data file: only a path passes. (A relative path with a colon in its first
/// part can be written `./a:b`.)
///
/// # Errors
/// The first fault found. The stored form's own faults (empty, length, NUL) come first.
pub fn judge(name: &[u8]) -> Result<(), NameFault> {
    judge_stored(name)?;
    let first_part = name.split(|&byte| byte == b'/').next().unwrap_or_default();
    let Some(colon) = first_part.iter().position(|&byte| byte == b':') else {
        return Ok(());
    };
    let scheme = &first_part[..colon];
    if scheme.eq_ignore_ascii_case(b"json") {
        Err(NameFault::Json)
    } else if scheme.eq_ignore_ascii_case(b"fd") {
        Err(NameFault::Descriptor)
    } else {
        Err(NameFault::Scheme {
            scheme: String::from_utf8_lossy(scheme).into_owned(),
        })
    }
}

/// What every stored name must keep, also one that is only shown: not empty, not too long, no NUL.
pub(crate) fn judge_stored(name: &[u8]) -> Result<(), NameFault> {
    if name.is_empty() {
        return Err(NameFault::Empty);
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(NameFault::TooLong {
            bytes: name.len() as u64,
        });
    }
    match name.iter().position(|&byte| byte == 0) {
        Some(at) => Err(NameFault::Nul { at }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_pass() {
        for name in [
            "base.qcow2",
            "/var/lib/a:b.img",
            "./a:b",
            "../x/y",
            "dir/nbd://x",
            "a b",
            "\u{fc}.img",
        ] {
            assert_eq!(judge(name.as_bytes()), Ok(()), "{name}");
        }
        assert_eq!(judge(&[b'x'; MAX_NAME_BYTES]), Ok(()));
        assert_eq!(judge(b"\xff\xfe"), Ok(()));
    }

    #[test]
    fn everything_else_is_named() {
        let scheme = |scheme: &str| NameFault::Scheme {
            scheme: scheme.into(),
        };
        for (name, fault) in [
            (&b""[..], NameFault::Empty),
            (b"a\0b", NameFault::Nul { at: 1 }),
            (b"json:{}", NameFault::Json),
            (b"JSON:{}", NameFault::Json),
            (b"fd:3", NameFault::Descriptor),
            (b"nbd://host/x", scheme("nbd")),
            (b"file:x", scheme("file")),
            (b":x", scheme("")),
            (
                &[b'x'; MAX_NAME_BYTES + 1],
                NameFault::TooLong { bytes: 1024 },
            ),
        ] {
            assert_eq!(judge(name), Err(fault), "{name:?}");
        }
    }
}
