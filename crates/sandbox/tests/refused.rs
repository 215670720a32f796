//! Guards the sandbox by trying what is forbidden: a process that has confined itself, as `urus serve` does, with a socket, files and a
//! thread of before. Each attempt must fail, on threads of before and after.

mod common;

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use common::in_a_process;
use memmap2::MmapMut;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use urus_sandbox::{Enforced, FileAccess, restrict_calls};

#[track_caller]
fn refused<T>(what: &str, result: std::io::Result<T>) {
    let error = result.err().unwrap_or_else(|| panic!("{what} has worked"));
    assert!(
        error.kind() == std::io::ErrorKind::PermissionDenied,
        "{what}: {error}"
    );
}

#[track_caller]
fn refused_nix<T>(what: &str, result: nix::Result<T>) {
    refused(what, result.map_err(std::io::Error::from));
}

#[test]
fn what_a_server_does_not_do_is_refused() {
    in_a_process("what_a_server_does_not_do_is_refused", |directory| {
        let kept = directory.join("kept");
        let mut open = File::create(&kept).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let unix = UnixListener::bind(directory.join("socket")).unwrap();
        FileAccess::none().sockets_in(directory).restrict().unwrap();
        // A thread that runs already when the calls are restricted.
        let (go, gone) = mpsc::channel();
        let early = thread::spawn(move || {
            gone.recv().unwrap();
            everything_is_refused(&kept, address);
        });
        restrict_calls().unwrap();
        go.send(()).unwrap();
        early.join().unwrap();
        let kept = directory.join("kept");
        everything_is_refused(&kept, address);
        thread::spawn(move || everything_is_refused(&kept, address))
            .join()
            .unwrap();

        // What a server does.
        open.write_all(b"still").unwrap();
        open.sync_all().unwrap();
        assert_eq!(open.metadata().unwrap().len(), 5);
        drop((listener, unix));
        fs::remove_file(directory.join("socket")).unwrap();
    });
}

fn everything_is_refused(file: &Path, address: std::net::SocketAddr) {
    refused("reading a file", File::open("/etc/passwd"));
    refused("reading a directory", fs::read_dir("/"));
    refused("reading /proc", fs::read("/proc/self/status"));
    refused("opening what was made before", File::open(file));
    refused("making a file", File::create(file.with_file_name("new")));
    refused("renaming", fs::rename(file, file.with_file_name("other")));
    refused("linking", fs::hard_link(file, file.with_file_name("other")));
    refused(
        "making a directory",
        fs::create_dir(file.with_file_name("d")),
    );
    refused(
        "changing a mode",
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o777)),
    );
    refused(
        "truncating by name",
        nix::unistd::truncate(file, 0).map_err(Into::into),
    );

    refused("connecting", TcpStream::connect(address));
    refused("listening", TcpListener::bind("127.0.0.1:0"));
    refused(
        "connecting to a unix socket",
        UnixStream::connect(file.with_file_name("socket")),
    );
    refused("a datagram socket", UnixDatagram::unbound());

    refused(
        "running a program",
        Err::<(), _>(Command::new("/bin/true").exec()),
    );
    refused("starting a program", Command::new("/bin/true").spawn());
    refused_nix("being traced", nix::sys::ptrace::traceme());
    refused_nix(
        "mounting",
        nix::mount::mount(
            None::<&CStr>,
            "/tmp",
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            None::<&CStr>,
        ),
    );
    refused_nix(
        "leaving namespaces",
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS),
    );
    refused_nix("changing the root", nix::unistd::chroot("/tmp"));
    refused_nix(
        "another user",
        nix::unistd::setuid(nix::unistd::Uid::from_raw(65534)),
    );
    refused("a ring", io_uring::IoUring::new(8));
    refused(
        "code of one's own",
        MmapMut::map_anon(4096).unwrap().make_exec(),
    );
    refused_nix("killing others", kill(Pid::from_raw(1), None::<Signal>));
    assert_eq!(kill(Pid::this(), Some(Signal::SIGKILL)), Err(Errno::EPERM));
}

#[test]
fn landlock_alone_keeps_files_and_network_away() {
    in_a_process("landlock_alone_keeps_files_and_network_away", |directory| {
        let (ours, theirs) = (directory.join("ours"), directory.join("theirs"));
        for directory in [&ours, &theirs] {
            fs::create_dir(directory).unwrap();
            File::create(directory.join("file")).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let access = FileAccess::none()
            .sockets_in(&ours)
            .removed_in(directory.join("missing"));
        // In a thread, as it would be in the main one: its own are restricted too.
        let confined = thread::spawn(move || {
            let enforced = access.restrict().unwrap();
            let inherited = thread::spawn(move || {
                refused("reading", File::open("/etc/passwd"));
                refused("reading what may be removed", File::open(ours.join("file")));
                refused("making a file", File::create(ours.join("new")));
                refused("removing", fs::remove_file(theirs.join("file")));
                refused(
                    "a socket elsewhere",
                    UnixListener::bind(theirs.join("socket")),
                );
                fs::remove_file(ours.join("file")).unwrap();
                drop(UnixListener::bind(ours.join("socket")).unwrap());
                fs::remove_file(ours.join("socket")).unwrap();
                // What newer kernels have.
                if enforced == Enforced::Fully {
                    refused("connecting", TcpStream::connect(address));
                    refused("listening", TcpListener::bind("127.0.0.1:0"));
                    refused_nix("signals to others", kill(Pid::from_raw(1), None::<Signal>));
                }
                enforced
            });
            inherited.join().unwrap()
        });
        let enforced = confined.join().unwrap();
        assert_ne!(enforced, Enforced::Not, "no Landlock on this machine");
    });
}
