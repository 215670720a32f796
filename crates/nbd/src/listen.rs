//! Where clients come from: sockets that listen, their addresses, and the files that unix sockets leave.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, getsockname, sockopt};
use tracing::warn;

use crate::Error;

/// Where to listen. As text: `unix:PATH` or `HOST:PORT`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Listen {
    /// A unix socket at this path, which must not exist. Who may connect is a matter of the directory's permissions and the
    /// process's umask.
    Unix(PathBuf),
    /// `HOST:PORT`: on every address that the host name stands for. Port 0 lets the system choose. NBD without TLS neither
    /// authenticates nor encrypts: keep it to `localhost` or a network that you trust.
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
    /// A descriptor that was passed in, whose address has no URI (such as an abstract unix socket).
    Unnamed,
}

impl Address {
    /// The NBD URI of an export at this address; None where there is none. An address that stands for all of the host's is given
    /// as `localhost`. With `tls` it says that TLS is needed.
    #[must_use]
    pub fn uri(&self, export: &str, tls: bool) -> Option<String> {
        let nbd = if tls { "nbds" } else { "nbd" };
        let export = escape(export.as_bytes());
        match self {
            Self::Unix(path) => {
                // The client may run in another directory.
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                let path = escape(path.as_os_str().as_bytes());
                Some(format!("{nbd}+unix:///{export}?socket={path}"))
            }
            Self::Tcp(address) => {
                let host = match address.ip() {
                    ip if ip.is_unspecified() => "localhost".into(),
                    std::net::IpAddr::V4(ip) => ip.to_string(),
                    std::net::IpAddr::V6(ip) => format!("[{ip}]"),
                };
                Some(match address.port() {
                    10809 => format!("{nbd}://{host}/{export}"),
                    port => format!("{nbd}://{host}:{port}/{export}"),
                })
            }
            Self::Unnamed => None,
        }
    }
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

/// Percent-encodes what a URI cannot carry as it is.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"/._-~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

/// Sockets that listen. Clients can connect from now on, and wait until a [`Server`](crate::Server) takes them up: bind before you open the image,
/// and an address that is taken costs nothing.
///
/// On drop, the file of a unix socket is removed, unless it has been replaced meanwhile.
#[derive(Debug)]
pub struct Listener {
    pub(crate) sockets: Vec<Bound>,
}

/// One listening socket.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) socket: OwnedFd,
    pub(crate) address: Address,
    _file: Option<SocketFile>,
}

impl Listener {
    /// Starts to listen.
    ///
    /// # Errors
    /// An address that is taken or not the host's, a path at which something is; nothing is changed then.
    pub fn bind(listen: Listen) -> Result<Self, Error> {
        let sockets = match listen {
            Listen::Unix(path) => vec![bind_unix(path)?],
            Listen::Tcp(address) => bind_tcp(&address)?,
            Listen::Fd(fd) => vec![adopt(fd)?],
        };
        for bound in &sockets {
            rustix::io::ioctl_fionbio(&bound.socket, true).map_err(|error| Error::Listen {
                address: bound.address.to_string(),
                source: error.into(),
            })?;
        }
        Ok(Self { sockets })
    }

    /// The addresses listened on.
    pub fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.sockets.iter().map(|bound| &bound.address)
    }
}

/// The longest path of a unix socket: `sun_path` less its final zero.
const UNIX_PATH_BYTES: usize = 107;

fn bind_unix(path: PathBuf) -> Result<Bound, Error> {
    let bytes = path.as_os_str().len();
    if bytes > UNIX_PATH_BYTES {
        return Err(Error::SocketPathTooLong {
            path,
            bytes,
            limit: UNIX_PATH_BYTES,
        });
    }
    let listener = UnixListener::bind(&path).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => in_the_way(path.clone()),
        _ => Error::Listen {
            address: format!("unix:{}", path.display()),
            source,
        },
    })?;
    let file = SocketFile::of(&path);
    Ok(Bound {
        socket: listener.into(),
        address: Address::Unix(path),
        _file: file,
    })
}

/// What is at a path where a socket should be made.
fn in_the_way(path: PathBuf) -> Error {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Error::NotASocket { path };
    }
    match UnixStream::connect(&path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Error::SocketStale { path }
        }
        _ => Error::SocketInUse { path },
    }
}

fn bind_tcp(text: &str) -> Result<Vec<Bound>, Error> {
    let failed = |source| Error::Listen {
        address: text.to_owned(),
        source,
    };
    let mut bound: Vec<Bound> = Vec::new();
    let mut last = None;
    for mut address in text.to_socket_addrs().map_err(failed)? {
        if address.port() == 0
            && let Some(Address::Tcp(first)) = bound.first().map(|bound| &bound.address)
        {
            // One port for all addresses of the name.
            address.set_port(first.port());
        }
        match TcpListener::bind(address)
            .and_then(|listener| listener.local_addr().map(|address| (listener, address)))
        {
            Ok((listener, address)) => bound.push(Bound {
                socket: listener.into(),
                address: Address::Tcp(address),
                _file: None,
            }),
            // `localhost` stands for ::1 also where there is no IPv6.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => last = Some(error),
            Err(error) => return Err(failed(error)),
        }
    }
    if bound.is_empty() {
        return Err(failed(
            last.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()),
        ));
    }
    Ok(bound)
}

/// A socket that somebody else has bound. Its file, if any, is theirs as well.
fn adopt(socket: OwnedFd) -> Result<Bound, Error> {
    let listens = sockopt::socket_acceptconn(&socket) == Ok(true)
        && sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
    if !listens {
        return Err(Error::NotListening {
            fd: socket.as_raw_fd(),
        });
    }
    let name = getsockname(&socket).map_err(|error| Error::system("name a socket", error))?;
    let address = match name.address_family() {
        AddressFamily::UNIX => SocketAddrUnix::try_from(name)
            .ok()
            .and_then(|name| {
                let path = name.path()?.into_owned();
                Some(Address::Unix(PathBuf::from(std::ffi::OsStr::from_bytes(
                    path.as_bytes(),
                ))))
            })
            .unwrap_or(Address::Unnamed),
        _ => SocketAddr::try_from(name).map_or(Address::Unnamed, Address::Tcp),
    };
    Ok(Bound {
        socket,
        address,
        _file: None,
    })
}

/// The file of a socket that we have made. Removed on drop if it is still the same.
#[derive(Debug)]
struct SocketFile {
    /// Absolute: the process may change its directory.
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> Option<Self> {
        let path = std::path::absolute(path).ok()?;
        let identity = identity(&path)?;
        Some(Self { path, identity })
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = path.symlink_metadata().ok()?;
    found
        .file_type()
        .is_socket()
        .then(|| (found.dev(), found.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) != Some(self.identity) {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards users' files: what is in the way is told and kept, and only our own socket is removed.
    use super::*;

    fn bind(path: &Path) -> Result<Listener, Error> {
        Listener::bind(Listen::Unix(path.into()))
    }

    #[test]
    fn what_is_in_the_way_is_told_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = bind(&path).unwrap();
        let taken = bind(&path).unwrap_err();
        assert!(matches!(taken, Error::SocketInUse { .. }), "{taken}");
        assert!(path.exists());
        drop(listener);
        assert!(!path.exists(), "our own socket is removed");

        drop(UnixListener::bind(&path).unwrap());
        let stale = bind(&path).unwrap_err();
        assert!(matches!(stale, Error::SocketStale { .. }), "{stale}");
        assert!(stale.to_string().contains(path.to_str().unwrap()));
        assert!(path.exists());

        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let file = bind(&path).unwrap_err();
        assert!(matches!(file, Error::NotASocket { .. }), "{file}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");

        let nowhere = bind(&dir.path().join("no/socket")).unwrap_err();
        assert!(nowhere.to_string().contains("no/socket"), "{nowhere}");
        let long = bind(&dir.path().join("x".repeat(108))).unwrap_err();
        assert!(matches!(long, Error::SocketPathTooLong { .. }), "{long}");
    }

    #[test]
    fn a_socket_that_was_replaced_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = bind(&path).unwrap();
        drop(listener);
        assert!(path.exists(), "somebody else's socket is kept");
        drop(other);
        assert!(!path.exists());
    }

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

    #[test]
    fn localhost_gets_one_port_on_each_of_its_addresses() {
        let listener = Listener::bind(Listen::Tcp("localhost:0".into())).unwrap();
        let mut ports: Vec<_> = listener
            .addresses()
            .map(|address| match address {
                Address::Tcp(address) => address.port(),
                other => panic!("{other}"),
            })
            .collect();
        ports.dedup();
        assert_eq!(ports.len(), 1);
        assert_ne!(ports[0], 0);
        let taken = Listener::bind(Listen::Tcp(format!("127.0.0.1:{}", ports[0]))).unwrap_err();
        assert!(taken.to_string().contains(&ports[0].to_string()), "{taken}");
    }

    #[test]
    fn descriptors_must_listen() {
        let (one, _other) = UnixStream::pair().unwrap();
        let error = Listener::bind(Listen::Fd(one.into())).unwrap_err();
        assert!(matches!(error, Error::NotListening { .. }), "{error}");

        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let expected = Address::Tcp(tcp.local_addr().unwrap());
        let listener = Listener::bind(Listen::Fd(tcp.into())).unwrap();
        assert_eq!(listener.addresses().collect::<Vec<_>>(), [&expected]);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        let listener = Listener::bind(Listen::Fd(unix.into())).unwrap();
        assert_eq!(
            listener.addresses().collect::<Vec<_>>(),
            [&Address::Unix(path.clone())]
        );
        drop(listener);
        assert!(
            path.exists(),
            "a socket that was passed in is not ours to remove"
        );
    }

    #[test]
    fn uris_are_as_the_nbd_project_defines_them() {
        let unix = Address::Unix("/run/my disk.sock".into());
        assert_eq!(
            unix.uri("", false).unwrap(),
            "nbd+unix:///?socket=/run/my%20disk.sock"
        );
        assert_eq!(
            unix.uri("a?b", true).unwrap(),
            "nbds+unix:///a%3Fb?socket=/run/my%20disk.sock"
        );
        for (address, uri) in [
            ("127.0.0.1:10809", "nbd://127.0.0.1/disk"),
            ("127.0.0.1:1234", "nbd://127.0.0.1:1234/disk"),
            ("[::1]:1234", "nbd://[::1]:1234/disk"),
            ("0.0.0.0:1234", "nbd://localhost:1234/disk"),
        ] {
            assert_eq!(
                Address::Tcp(address.parse().unwrap())
                    .uri("disk", false)
                    .unwrap(),
                uri
            );
        }
        assert_eq!(Address::Unnamed.uri("", false), None);
    }
}
