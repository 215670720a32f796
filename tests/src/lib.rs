//! What the end-to-end tests share.
//!
//! These tests know nothing of the engine's Rust interfaces. They start the `urus` program as a user would, and let
//! programs that urus did not write judge the result: qemu-img and qemu-io, the libnbd tools, fio, e2fsck, the
//! kernel's own file systems. Only the stamps and the model of a disk, with which [`load`] judges, come from the
//! simulator. `urus-proofs` (in `proofs/`) is the long-running part: kill -9, QEMU in turn, full disks, large sectors.
//!
//! - [`mod@program`] runs a program with a time limit and keeps what it printed.
//! - [`served`] runs `urus serve` and takes it down again, politely or not.
//! - [`qemu`] is the second opinion: create, check, convert, compare, JSON.
//! - [`script`] makes random write scripts and the contents that they must lead to.
//! - [`content`] compares large sparse files and prepares small ones.
//! - [`header`] pokes bytes of an image, for inputs that no well-meaning program writes.
//! - [`fixture`] builds the images of real files, once, and keeps them in the target directory.
//! - [`mounted`] turns an NBD export into a mounted file system and always takes it apart again.
//! - [`nbd`] is an NBD client of our own, for loads that are to lose their server.
//! - [`load`] is such a load: it knows what each sector may hold afterwards.
//! - [`scratch`] says where all of this may put its files.
//!
//! `cargo xtask test` builds the program, installs the packages listed in `packages.txt` and passes the program's path
//! in `URUS_BIN`. A test that lacks something fails and says what; none is skipped.

pub mod content;
pub mod fixture;
pub mod header;
pub mod load;
pub mod mounted;
pub mod nbd;
pub mod program;
pub mod qemu;
pub mod scratch;
pub mod script;
pub mod served;

pub use program::{Finished, program, urus, urus_within};
pub use scratch::Scratch;
pub use served::{Driver, Served};

/// One kibibyte.
pub const KIB: u64 = 1 << 10;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;
/// One tebibyte.
pub const TIB: u64 = 1 << 40;
