//! Where backing files may lie: from a recorded name to an open file, without leaving the allowed directory.
//!
//! What is allowed is decided by the kernel (`openat2` with RESOLVE_BENEATH): here a name is only brought into
//! the form "relative to the allowed directory". Getting that wrong can refuse a good name; it cannot let a bad
//! one through.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use urus_ring::OpenFile;

use crate::BackingPolicy;

/// A directory under its two names: as the caller wrote it, made absolute, and without symbolic links. Images
/// record either.
#[derive(Clone, Debug)]
struct Names {
    given: PathBuf,
    canonical: PathBuf,
}

impl Names {
    fn of(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            given: std::path::absolute(dir)?,
            canonical: fs::canonicalize(dir)?,
        })
    }

    /// `path` as seen from this directory, if it begins with one of its names.
    fn strip<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        path.strip_prefix(&self.canonical)
            .or_else(|_| path.strip_prefix(&self.given))
            .ok()
    }

    fn join(&self, relative: &Path) -> Self {
        Self {
            given: self.given.join(relative),
            canonical: self.canonical.join(relative),
        }
    }
}

/// A directory beneath which files may be opened.
struct Root {
    fd: OwnedFd,
    names: Names,
}

/// Where the backing file of one image is looked for.
pub(crate) struct Place {
    root: Root,
    /// The directory of the image that names the file: where relative names start.
    from: Names,
    /// Whether the root follows the images down the chain.
    follow: bool,
}

/// Why a backing file was not opened.
pub(crate) enum Refusal {
    /// It does not lie beneath the allowed directory.
    Outside,
    /// The operating system would not.
    Io(io::Error),
}

impl Place {
    /// Where the backing file of `image` is looked for; `None` where none is allowed.
    ///
    /// # Errors
    /// A directory that is not there, with its name.
    pub(crate) fn new(
        image: &Path,
        policy: &BackingPolicy,
    ) -> Result<Option<Self>, (PathBuf, io::Error)> {
        let image_dir = directory_of(image);
        let root_dir = match policy {
            BackingPolicy::Beneath => image_dir,
            BackingPolicy::Dir(dir) => dir,
            BackingPolicy::Forbid => return Ok(None),
        };
        let root = Root::open(root_dir).map_err(|error| (root_dir.to_owned(), error))?;
        let from = Names::of(image_dir).map_err(|error| (image_dir.to_owned(), error))?;
        Ok(Some(Self {
            root,
            from,
            follow: *policy == BackingPolicy::Beneath,
        }))
    }

    /// The allowed directory, for messages.
    pub(crate) fn root(&self) -> &Path {
        &self.root.names.given
    }

    /// Opens the file of that name, read-only; also returns its path, and the place of its own backing file.
    pub(crate) fn open(
        self,
        name: &Path,
        direct: bool,
    ) -> Result<(OpenFile, PathBuf, Self), Refusal> {
        let relative = self.relative(name).ok_or(Refusal::Outside)?;
        let file = OpenFile::open_beneath(&self.root.fd, &relative, direct).map_err(refusal)?;
        let path = self.root.names.given.join(&relative);
        let parent = directory_of(&relative);
        let from = self.root.names.join(parent);
        let root = if self.follow && parent != Path::new(".") {
            self.root.descend(parent).map_err(refusal)?
        } else {
            self.root
        };
        Ok((
            file,
            path,
            Self {
                root,
                from,
                follow: self.follow,
            },
        ))
    }

    /// Whether a name leads to something here. Nothing is opened for it.
    fn reaches(&self, name: &Path) -> bool {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        self.relative(name).is_some_and(|relative| {
            rustix::fs::openat2(&self.root.fd, &relative, flags, Mode::empty(), resolve).is_ok()
        })
    }

    /// The name as seen from the root. What `..` leads to is left to the kernel, except where the image itself
    /// lies outside of the root: there it has to be followed to get in.
    fn relative(&self, name: &Path) -> Option<PathBuf> {
        let names = &self.root.names;
        let path = if name.is_absolute() {
            names.strip(name)?.to_owned()
        } else if let Some(from) = names
            .strip(&self.from.canonical)
            .or_else(|| names.strip(&self.from.given))
        {
            from.join(name)
        } else {
            names.strip(&climb(&self.from.canonical, name))?.to_owned()
        };
        (!path.as_os_str().is_empty()).then_some(path)
    }
}

impl Root {
    fn open(dir: &Path) -> io::Result<Self> {
        let fd = rustix::fs::openat(CWD, dir, DIRECTORY, Mode::empty())?;
        Ok(Self {
            fd,
            names: Names::of(dir)?,
        })
    }

    fn descend(&self, relative: &Path) -> io::Result<Self> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(&self.fd, relative, DIRECTORY, Mode::empty(), resolve) {
                // A rename raced with the look-up of "..".
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => {
                    return Ok(Self {
                        fd: result?,
                        names: self.names.join(relative),
                    });
                }
            }
        }
    }
}

/// The directory that has to be allowed for the backing file `name` of `image`, and for the chain's backing files above it: the deepest
/// that does. None where no directory does.
pub(crate) fn directory_for<'a>(
    image: &Path,
    name: &Path,
    others: impl Iterator<Item = &'a Path>,
) -> Option<PathBuf> {
    let image_dir = fs::canonicalize(directory_of(image)).ok()?;
    let target = climb(&image_dir, name);
    let target = fs::canonicalize(&target).unwrap_or(target);
    let above = others
        .filter_map(|other| fs::canonicalize(directory_of(other)).ok())
        .fold(directory_of(&target).to_owned(), |one, other| {
            common(&one, &other)
        });
    // A link beside the image that leads elsewhere needs both.
    let both = common(&above, &image_dir);
    let candidates = [above, both];
    candidates.into_iter().find(|dir| {
        let policy = BackingPolicy::Dir(dir.clone());
        let place = Place::new(image, &policy).ok().flatten();
        place.is_some_and(|place| place.reaches(name) || !target.exists())
    })
}

/// The deepest directory above both.
fn common(one: &Path, other: &Path) -> PathBuf {
    let same = one.components().zip(other.components());
    same.take_while(|(one, other)| one == other)
        .map(|(component, _)| component)
        .collect()
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The directory that a file's path names: "." where it names none.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Follows the leading `..` of `name` from `dir`, which is free of symbolic links.
fn climb(dir: &Path, name: &Path) -> PathBuf {
    let mut dir = dir.to_owned();
    let mut rest = name.components();
    loop {
        let here = rest.clone();
        match rest.next() {
            Some(Component::ParentDir) => {
                dir.pop();
            }
            Some(Component::CurDir) => {}
            _ => return dir.join(here.as_path()),
        }
    }
}

fn refusal(error: io::Error) -> Refusal {
    if error.raw_os_error() == Some(Errno::XDEV.raw_os_error()) {
        Refusal::Outside
    } else {
        Refusal::Io(error)
    }
}

#[cfg(test)]
mod tests {
    //! Guards the way from a recorded name to one relative to the allowed directory.
    use super::*;

    fn names(path: &str) -> Names {
        Names {
            given: path.into(),
            canonical: path.into(),
        }
    }

    fn relative(root: &str, from: &str, name: &str) -> Option<PathBuf> {
        let fd = rustix::fs::open("/", DIRECTORY, Mode::empty()).unwrap();
        let root = Root {
            fd,
            names: names(root),
        };
        Place {
            root,
            from: names(from),
            follow: false,
        }
        .relative(Path::new(name))
    }

    #[test]
    fn names_become_relative_to_the_root() {
        for (root, from, name, expected) in [
            ("/a", "/a", "base", Some("base")),
            ("/a", "/a", "sub/base", Some("sub/base")),
            ("/a", "/a/vm", "../base", Some("vm/../base")),
            ("/a", "/a", "/a/base", Some("base")),
            ("/a", "/a", "/ab/base", None),
            ("/a", "/b", "base", None),
            ("/a", "/b", "../a/base", Some("base")),
            ("/a", "/b/c", ".././../a/x/../base", Some("x/../base")),
            ("/a", "/a", "/a", None),
            // Refused by the kernel, not here.
            ("/a", "/a", "../b", Some("../b")),
            ("/a", "/a", "/a/../b", Some("../b")),
        ] {
            assert_eq!(
                relative(root, from, name),
                expected.map(PathBuf::from),
                "{root} {from} {name}"
            );
        }
    }
}
