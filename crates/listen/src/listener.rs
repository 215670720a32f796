//! Sockets that listen.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, chmod, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, getsockname, listen, socket_with,
    sockopt,
};
use tracing::info;

use crate::socket_file::{SocketFile, in_the_way};
use crate::{Address, Error, Listen};

/// The longest path of a unix socket: `sun_path` less its final zero.
const UNIX_PATH_BYTES: usize = 107;

/// What becomes of a unix socket that a killed server has left at the path to listen at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stale {
    Refuse,
    Replace,
}

/// Sockets that listen, without blocking. Clients can connect from now on, and wait until an [`Acceptor`](crate::Acceptor) takes them: bind before
/// you open the image, and an address that is taken costs nothing.
///
/// On drop, the file of a unix socket is removed, unless it has been replaced meanwhile.
#[derive(Debug)]
pub struct Listener {
    sockets: Vec<Bound>,
}

/// One listening socket.
#[derive(Debug)]
struct Bound {
    socket: OwnedFd,
    address: Address,
    file: Option<SocketFile>,
}

impl Listener {
    /// Starts to listen.
    ///
    /// # Errors
    /// An address that is taken or not the host's, a path at which something is; nothing is changed then.
    pub fn bind(listen: Listen) -> Result<Self, Error> {
        Self::listen(listen, Stale::Refuse)
    }

    /// The same, where a unix socket that a killed server has left is replaced, so that the server can be started again at the same place.
    ///
    /// # Errors
    /// As [`bind`](Self::bind): anything else that is in the way.
    pub fn bind_replacing_stale(listen: Listen) -> Result<Self, Error> {
        Self::listen(listen, Stale::Replace)
    }

    /// A unix socket for nobody but the process's user (mode 0600). One that a killed server has left is replaced.
    ///
    /// # Errors
    /// As [`bind_replacing_stale`](Self::bind_replacing_stale).
    pub fn bind_private(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Self::of(vec![bind_unix(path.into(), Stale::Replace, Access::Owner)?])
    }

    /// As [`bind`](Self::bind), or where `replace_stale` is set as [`bind_replacing_stale`](Self::bind_replacing_stale), with a unix
    /// socket for those whom `permissions` let: nobody can connect before it has them. Other sockets have no permissions.
    ///
    /// # Errors
    /// As those two, and a group that the process may not give a file to. No socket is left then.
    pub fn bind_with(
        listen: Listen,
        permissions: Permissions,
        replace_stale: bool,
    ) -> Result<Self, Error> {
        let stale = if replace_stale {
            Stale::Replace
        } else {
            Stale::Refuse
        };
        match listen {
            Listen::Unix(path) if permissions != Permissions::default() => {
                let access = Access::Given(permissions);
                Self::of(vec![bind_unix(path, stale, access)?])
            }
            listen => Self::listen(listen, stale),
        }
    }

    fn listen(listen: Listen, stale: Stale) -> Result<Self, Error> {
        Self::of(match listen {
            Listen::Unix(path) => vec![bind_unix(path, stale, Access::Umask)?],
            Listen::Tcp(address) => bind_tcp(&address)?,
            Listen::Fd(fd) => vec![adopt(fd)?],
        })
    }

    fn of(sockets: Vec<Bound>) -> Result<Self, Error> {
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

    /// The sockets themselves, to be waited for.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|bound| bound.socket.as_fd())
    }

    /// The absolute path of the first unix socket that was made here.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.sockets
            .iter()
            .find_map(|bound| Some(bound.file.as_ref()?.path()))
    }
}

/// The permissions of a unix socket's file: who can write it can connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// The mode, such as 0o660. By default 0o660 where there is a group, else 0o777 less the umask.
    pub mode: Option<u32>,
    /// The group, by number. By default the process's.
    pub group: Option<u32>,
}

/// Who may connect to a unix socket, apart from the superuser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Whom the process's umask lets.
    Umask,
    /// The process's user.
    Owner,
    /// Whom these let.
    Given(Permissions),
}

fn bind_unix(path: PathBuf, stale: Stale, access: Access) -> Result<Bound, Error> {
    let bytes = path.as_os_str().len();
    if bytes > UNIX_PATH_BYTES {
        return Err(Error::SocketPathTooLong {
            path,
            bytes,
            limit: UNIX_PATH_BYTES,
        });
    }
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => in_the_way(path.clone()),
        _ => Error::Listen {
            address: format!("unix:{}", path.display()),
            source,
        },
    };
    let bind = || {
        let socket = make_socket(&path, access).map_err(failed)?;
        let Access::Given(permissions) = access else {
            return Ok(socket);
        };
        // It does not listen yet: nobody has connected, whatever its permissions were.
        let given = permit(&path, permissions)
            .and_then(|()| listen(&socket, WAITING).map_err(|error| failed(error.into())));
        if given.is_err() {
            // The first error is the one to tell.
            let _ = std::fs::remove_file(&path);
        }
        given.map(|()| socket)
    };
    let socket = match bind() {
        Err(Error::SocketStale { .. }) if stale == Stale::Replace => {
            info!(path = %path.display(), "replacing the socket that a killed server left behind");
            std::fs::remove_file(&path).map_err(failed)?;
            bind()?
        }
        bound => bound?,
    };
    let file = SocketFile::of(&path);
    Ok(Bound {
        socket,
        address: Address::Unix(path),
        file,
    })
}

/// Connections that wait to be accepted. As std has it: more wait in vain.
const WAITING: i32 = 128;

/// The mode of a socket of which only the group was given.
const GROUP_MODE: u32 = 0o660;

/// Gives a socket's file its group and mode, by a descriptor: another file that takes the path meanwhile is not touched.
fn permit(path: &Path, permissions: Permissions) -> Result<(), Error> {
    let failed = |operation: String| {
        move |source: rustix::io::Errno| Error::Permissions {
            path: path.to_owned(),
            operation,
            source: source.into(),
        }
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map_err(failed("open the socket's file".into()))?;
    if let Some(group) = permissions.group {
        let what = format!(
            "give the socket to the group {group} (that takes a member of the group, or root)"
        );
        rustix::fs::chownat(
            &file,
            "",
            None,
            Some(Gid::from_raw(group)),
            AtFlags::EMPTY_PATH,
        )
        .map_err(failed(what))?;
    }
    // A group that may not use the socket has nothing from it.
    let mode = permissions.mode.or(permissions.group.map(|_| GROUP_MODE));
    if let Some(mode) = mode {
        // fchmod(2) takes no O_PATH descriptor; the path in /proc is the same file.
        let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
        chmod(itself, Mode::from_raw_mode(mode & 0o777))
            .map_err(failed(format!("give the socket the mode {mode:04o}")))?;
    }
    Ok(())
}

fn make_socket(path: &Path, access: Access) -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    if access != Access::Umask {
        // Before it has a name: nobody can be faster. The kernel takes the file's mode from the socket (unix(7)), less the umask.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    }
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    if !matches!(access, Access::Given(_)) {
        listen(&socket, WAITING)?;
    }
    Ok(socket)
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
                file: None,
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
        file: None,
    })
}

#[cfg(test)]
mod tests {
    //! Guards users' files: what is in the way is told and kept, and only our own socket is removed.
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

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
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let replace = || Listener::bind_replacing_stale(Listen::Unix(path.clone()));
        drop(UnixListener::bind(&path).unwrap());
        let listener = replace().unwrap();
        assert_eq!(listener.path(), Some(path.as_path()));
        let taken = replace().unwrap_err();
        assert!(matches!(taken, Error::SocketInUse { .. }), "{taken}");
        drop(listener);
        std::fs::write(&path, "precious").unwrap();
        let file = replace().unwrap_err();
        assert!(matches!(file, Error::NotASocket { .. }), "{file}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_private_socket_is_for_its_owner_from_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let _listener = Listener::bind_private(&path).unwrap();
        let mode = path.symlink_metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_socket_has_the_mode_and_the_group_that_were_given() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let own = rustix::process::getgid().as_raw();
        for mode in [0o660, 0o666, 0o600] {
            let permissions = Permissions {
                mode: Some(mode),
                group: Some(own),
            };
            let listener =
                Listener::bind_with(Listen::Unix(path.clone()), permissions, false).unwrap();
            let file = path.symlink_metadata().unwrap();
            assert_eq!(file.permissions().mode() & 0o777, mode);
            assert_eq!(file.gid(), own);
            assert!(UnixStream::connect(&path).is_ok());
            drop(listener);
        }
        // The group alone: for its members.
        let group = Permissions {
            mode: None,
            group: Some(own),
        };
        let _listener = Listener::bind_with(Listen::Unix(path.clone()), group, false).unwrap();
        let file = path.symlink_metadata().unwrap();
        assert_eq!(
            (file.permissions().mode() & 0o777, file.gid()),
            (0o660, own)
        );
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
        let again = Listen::Tcp(format!("127.0.0.1:{}", ports[0]));
        let taken = Listener::bind(again).unwrap_err();
        assert!(taken.to_string().contains(&ports[0].to_string()), "{taken}");
    }

    #[test]
    fn descriptors_must_listen() {
        let adopt = |fd: OwnedFd| Listener::bind(Listen::Fd(fd));
        let (one, _other) = UnixStream::pair().unwrap();
        let error = adopt(one.into()).unwrap_err();
        assert!(matches!(error, Error::NotListening { .. }), "{error}");

        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let expected = Address::Tcp(tcp.local_addr().unwrap());
        let listener = adopt(tcp.into()).unwrap();
        assert_eq!(listener.addresses().collect::<Vec<_>>(), [&expected]);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        let listener = adopt(unix.into()).unwrap();
        assert_eq!(
            listener.addresses().collect::<Vec<_>>(),
            [&Address::Unix(path.clone())]
        );
        assert_eq!(listener.path(), None);
        drop(listener);
        assert!(
            path.exists(),
            "a socket that was passed in is not ours to remove"
        );
    }
}
