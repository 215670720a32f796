//! A stand-in for urus-engine under its coming names, for raw images only. Goes when the engine lands.
#![allow(
    missing_docs,
    dead_code,
    unreachable_pub,
    clippy::all,
    clippy::cast_possible_truncation
)]

pub mod error;
mod raw;
pub mod request;

pub use raw::{Control, ControlReply, LayerFormat, LayerSpec, Maintenance, Options, Queue, Shared};
