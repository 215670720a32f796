//! Contents of files: equality of large sparse ones, and bytes that are easy to tell apart.

use crate::script::Rng;
use rustix::fs::SeekFrom;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

const CHUNK: usize = 1 << 20;

/// Two files must hold the same bytes. Where both have holes nothing is read.
///
/// # Panics
/// At the first difference.
pub fn assert_same(left: &Path, right: &Path) {
    let (a, b) = (open(left), open(right));
    let (a_size, b_size) = (size(&a), size(&b));
    assert_eq!(
        a_size,
        b_size,
        "sizes of {} and {}",
        left.display(),
        right.display()
    );
    let mut buffers = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = next_data(&a, 0).min(next_data(&b, 0));
    while at < a_size {
        let length = usize::try_from(a_size - at).map_or(CHUNK, |left| left.min(CHUNK));
        let (x, y) = (&mut buffers.0[..length], &mut buffers.1[..length]);
        a.read_exact_at(x, at).expect("reading");
        b.read_exact_at(y, at).expect("reading");
        if x != y {
            let first = x.iter().zip(y.iter()).take_while(|(x, y)| x == y).count();
            let byte = at + first as u64;
            panic!(
                "{} and {} differ, first at byte {byte} ({byte:#x})",
                left.display(),
                right.display()
            );
        }
        at += length as u64;
        at = next_data(&a, at).min(next_data(&b, at));
    }
}

/// The bytes of a file, to hold it against later: "nothing changed on disk".
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn bytes(file: &Path) -> Vec<u8> {
    std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// How much of the disk a file takes, in bytes.
///
/// # Panics
/// When it cannot be examined.
#[must_use]
pub fn allocated_bytes(file: &Path) -> u64 {
    // Blocks given back are counted only once the file system has dealt with what is still delayed.
    let opened = open(file);
    opened.sync_all().expect("fsync");
    opened.metadata().expect("metadata").blocks() * 512
}

/// `length` bytes that do not compress and do not repeat, the same ones for the same seed.
#[must_use]
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&rng.draw().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// `length` bytes that compress to about half: noise and text in turn, no two clusters alike.
#[must_use]
pub fn compressible(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = noise(seed, length);
    for (number, piece) in bytes.chunks_mut(512).enumerate() {
        if number % 2 == 0 {
            piece.fill(b'a' + u8::try_from(number / 2 % 26).expect("a letter"));
        }
    }
    bytes
}

fn open(path: &Path) -> File {
    File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn size(file: &File) -> u64 {
    file.metadata().expect("metadata").len()
}

/// The first byte at or after `from` that may be other than zero; the end of the file where there is none.
fn next_data(file: &File, from: u64) -> u64 {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(found) => found,
        Err(rustix::io::Errno::NXIO) => size(file),
        Err(_) => from,
    }
}
