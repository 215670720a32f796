//! The urus engine: QCOW2 and raw images as block devices, on any [`storage::Storage`].
//!
//! - [`Maintenance::open`] opens a chain and becomes the device's own executor: commit, allocation, punching.
//! - Any number of [`Queue`]s take [`request::Request`]s, each on its own thread with its own storage.
//! - [`check`](mod@check) finds and repairs what does not fit together.
//!
//! The way of a request, the layers and the rules O1 to O22 are in ARCHITECTURE.md and docs/ordering.md. Nothing
//! here knows an operating system or starts a thread; nothing blocks but [`Maintenance::open`], the two `wait`s and
//! dropping a queue.
#![forbid(unsafe_code)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("urus is for 64-bit machines");

pub mod check;
pub mod create;
pub mod error;
pub mod file;
pub mod limits;
#[doc(hidden)]
pub mod parts;
pub mod planted;
pub mod request;
#[doc(hidden)]
pub mod seen;
pub mod storage;
pub mod sync;

mod alloc;
mod chain;
mod change;
mod cluster_locks;
mod commit;
mod counters;
mod decoded;
mod errno;
mod frames;
mod gate;
mod header;
mod hit;
mod image;
#[cfg(all(test, feature = "loom"))]
mod interleavings;
mod maintenance;
mod map;
mod open;
mod pins;
mod queue;
mod ranges;
mod reactor;
mod refcounts;
mod resize;
mod settle;
mod shared;
mod wake;
mod worker;
mod write;
mod zero;

pub use chain::{LayerFormat, LayerSpec};
pub use counters::Counters;
pub use error::Error;
pub use maintenance::Maintenance;
pub use open::check_image;
pub use queue::Queue;
pub use shared::{Control, ControlReply, Options, Shared};

/// A byte count or index as `usize`: lossless, because this is a 64-bit program.
#[allow(clippy::cast_possible_truncation)]
pub(crate) const fn to_usize(value: u64) -> usize {
    value as usize
}
