//! What is opened as an image, and what is refused.

mod common;

use std::io;
use std::path::Path;
use std::time::Instant;

use common::{LONG, directory};
use urus_ring::OpenFile;

/// Files that are no images, names that lead out of a directory.
#[test]
fn only_files_and_disks_are_opened() {
    let directory = directory();
    let inside = directory.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(directory.path().join("secret"), b"secret").unwrap();
    std::fs::write(inside.join("base"), b"base").unwrap();
    std::os::unix::fs::symlink("../secret", inside.join("out")).unwrap();
    std::os::unix::fs::symlink("base", inside.join("link")).unwrap();
    std::os::unix::fs::symlink(directory.path().join("secret"), inside.join("absolute")).unwrap();
    let fifo = inside.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();

    let start = Instant::now();
    for path in [fifo.as_path(), inside.as_path(), Path::new("/dev/null")] {
        let error = OpenFile::open_image(path, true, false).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::InvalidInput,
            "{}: {error}",
            path.display()
        );
    }
    let dir = std::fs::File::open(&inside).unwrap().into();
    for name in ["base", "link", "./base"] {
        let file = OpenFile::open_beneath(&dir, Path::new(name), false).unwrap();
        assert_eq!(file.read_prefix(100).unwrap(), b"base");
        assert!(!file.is_writable());
    }
    for name in [
        "out",
        "absolute",
        "../secret",
        "/etc/passwd",
        "../inside/base",
    ] {
        let error = OpenFile::open_beneath(&dir, Path::new(name), false).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::CrossesDevices,
            "{name}: {error}"
        );
    }
    let error = OpenFile::open_beneath(&dir, Path::new("fifo"), false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(start.elapsed() < LONG, "a FIFO did not make it hang");

    let append = std::fs::OpenOptions::new()
        .append(true)
        .read(true)
        .open(inside.join("base"))
        .unwrap();
    assert!(OpenFile::from_fd(append.into(), "appended".into()).is_err());
    let write_only = std::fs::OpenOptions::new()
        .write(true)
        .open(inside.join("base"))
        .unwrap();
    assert!(OpenFile::from_fd(write_only.into(), "write-only".into()).is_err());
    let error = OpenFile::create_image(&inside.join("base"), false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    let created = OpenFile::create_image(&inside.join("new"), false).unwrap();
    assert!(created.is_writable() && created.file_len().unwrap() == 0);
    let error = created.read_exact_at(0, 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(
        OpenFile::open_image(&inside.join("base"), true, false)
            .unwrap()
            .read_at(3, 10)
            .unwrap(),
        b"e"
    );
}

/// procfs has no O_DIRECT: the error must say what to do.
#[test]
fn a_refused_o_direct_is_named() {
    let error = OpenFile::open_image(Path::new("/proc/self/status"), true, true).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    assert!(error.to_string().contains("O_DIRECT"), "{error}");
}
