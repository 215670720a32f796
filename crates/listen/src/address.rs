//! Addresses: as they are asked for, and as they are listened on.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;

/// Where to listen. As text: `unix:PATH` (a path with a slash needs no `unix:`) or `HOST:PORT`.
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
        parse(text).map_err(|why| Error::Address {
            text: text.into(),
            why,
        })
    }
}

/// NBD's registered port.
const NBD_PORT: u16 = 10809;

/// What is clear is understood; where it is not, the error says what may have been meant. Never is a network listened on that was not
/// named.
fn parse(text: &str) -> Result<Listen, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path {
            "" => Err("the path is missing".into()),
            path => Ok(Listen::Unix(path.into())),
        };
    }
    if let Some(uri) = text.split_once("://") {
        return Err(instead_of_uri(uri));
    }
    // No host has a slash in its name.
    if text.contains('/') {
        return Ok(Listen::Unix(text.into()));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(match text.parse::<u16>() {
            Ok(port) => for_port(port),
            Err(_) if text.is_empty() => "it is empty".into(),
            Err(_) if text.bytes().all(|byte| byte.is_ascii_digit()) => ports(text),
            Err(_) => format!(
                "for a unix socket give unix:{text}, for a host its port too ({text}:{NBD_PORT})"
            ),
        });
    };
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let Some(number) = port.parse::<u16>().ok().filter(|_| is_number) else {
        return Err(if is_number {
            ports(port)
        } else if port.is_empty() {
            format!("the port is missing, such as {text}{NBD_PORT}")
        } else {
            format!("the port '{port}' is not a number from 0 to 65535")
        });
    };
    let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    if host.is_empty() || host == "*" {
        return Err(for_port(number));
    }
    if bare_v6 {
        return Err(format!("an IPv6 address goes in brackets: [{host}]:{port}"));
    }
    Ok(Listen::Tcp(text.into()))
}

fn for_port(port: u16) -> String {
    format!(
        "a port alone does not say who can connect; give localhost:{port} for this machine only, 0.0.0.0:{port} for every network"
    )
}

fn ports(port: &str) -> String {
    format!("there is no port {port}: ports go up to 65535")
}

/// What a URI's author means as an address.
fn instead_of_uri((scheme, rest): (&str, &str)) -> String {
    if scheme.ends_with("+unix") {
        let socket = rest
            .split(['?', '&'])
            .find_map(|part| part.strip_prefix("socket="));
        return format!(
            "this is what clients use; here give unix:{}",
            socket.filter(|path| !path.is_empty()).unwrap_or("PATH")
        );
    }
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    match (host, has_port) {
        ("", _) => "this is what clients use; here give HOST:PORT".into(),
        (host, true) => format!("this is what clients use; here give {host}"),
        (host, false) => format!("this is what clients use; here give {host}:{NBD_PORT}"),
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
        for text in ["unix:/a b", "/a b"] {
            assert!(matches!(text.parse(), Ok(Listen::Unix(path)) if path == Path::new("/a b")));
        }
        for text in ["/a:1", "./a", "run/a"] {
            assert!(matches!(text.parse(), Ok(Listen::Unix(path)) if path == Path::new(text)));
        }
        for text in ["localhost:10809", "[::1]:0", "127.0.0.1:1"] {
            assert!(matches!(text.parse(), Ok(Listen::Tcp(same)) if same == text));
        }
    }

    #[test]
    fn what_is_no_address_is_answered_with_what_was_meant() {
        for (text, meant) in [
            ("", "empty"),
            ("unix:", "path is missing"),
            ("10809", "localhost:10809"),
            (":10809", "0.0.0.0:10809"),
            ("*:10809", "0.0.0.0:10809"),
            ("host:", "host:10809"),
            ("host", "host:10809"),
            ("a.sock", "unix:a.sock"),
            ("host:99999", "65535"),
            ("99999", "65535"),
            ("host:+1", "not a number"),
            ("host:nbd", "not a number"),
            ("::1:10809", "[::1]:10809"),
            ("nbd://host", "here give host:10809"),
            ("nbd://host:1/name", "here give host:1"),
            ("nbd+unix:///?socket=/run/a", "unix:/run/a"),
        ] {
            let error = text.parse::<Listen>().unwrap_err().to_string();
            assert!(error.contains("HOST:PORT"), "{text}: {error}");
            assert!(error.contains(meant), "{text}: {error}");
        }
    }
}
