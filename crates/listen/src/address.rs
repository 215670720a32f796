//! Addresses: as they are asked for, and as they are listened on.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;

/// Where to listen. As text: `unix:PATH` or `HOST:PORT`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Listen {
    /// A unix socket at this path, which must not exist. Who may connect is a matter of the directory's permissions and the
    /// process's umask.
    Unix(PathBuf),
    /// `HOST:PORT`: on every address that the host name stands for. Port 0 lets the system choose.
    Tcp(String),
    /// A socket that listens already, such as systemd passes.
    Fd(OwnedFd),
}

impl From<SocketAddr> for Listen {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address.to_string())
    }
}

impl FromStr for Listen {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let malformed = || Error::Address { text: text.into() };
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(malformed())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
        let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
        if host.is_empty() || host.contains('/') || bare_v6 || port.parse::<u16>().is_err() {
            return Err(malformed());
        }
        Ok(Self::Tcp(text.into()))
    }
}

/// An address that a server listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// The path of a unix socket.
    Unix(PathBuf),
    /// An internet address, with the port that is really used.
    Tcp(SocketAddr),
    /// A descriptor that was passed in, whose address has no name (such as an abstract unix socket).
    Unnamed,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
            Self::Unnamed => f.write_str("a descriptor"),
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards the texts that users give.
    use std::path::Path;

    use super::*;

    #[test]
    fn addresses_are_parsed() {
        for text in [
            "",
            "unix:",
            "10809",
            "host:",
            ":10809",
            "host:99999",
            "::1:10809",
            "/a:1",
        ] {
            let error = text.parse::<Listen>().unwrap_err();
            assert!(error.to_string().contains("HOST:PORT"), "{text}: {error}");
        }
        assert!(matches!("unix:/a b".parse(), Ok(Listen::Unix(path)) if path == Path::new("/a b")));
        for text in ["localhost:10809", "[::1]:0", "127.0.0.1:1"] {
            assert!(matches!(text.parse(), Ok(Listen::Tcp(same)) if same == text));
        }
    }
}
