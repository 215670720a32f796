//! I/O on one file, carried to its end.
//!
//! - `transfer`: one read or write, however often storage does only a part of it.
//! - `files`: one thread's way to the files of a device: transfers, widened and bounced where direct I/O needs it, operations without
//!   data, and errors that name the file.
//! - [`hooks`]: what is done to data on its way, and who is told of changes.

mod files;
pub mod hooks;
mod transfer;

pub(crate) use files::{Facts, Files, zeroed};
pub(crate) use transfer::{Direction, Ends, Next, Transfer};
