//! urus: QCOW2 images as fast, safe block devices.
#![forbid(unsafe_code)]

mod blocking;
mod chain;
mod check;
mod create;
mod device;
mod error;
mod info;
mod limits;
mod options;
mod place;
mod queue;
mod request;

pub use blocking::BlockingIo;
pub use check::check;
pub use create::{CreateOptions, create};
pub use device::{Device, Layer, PauseOptions};
pub use error::{Error, Result};
pub use info::{
    BackingInfo, BitmapInfo, Encryption, ImageInfo, InfoOptions, Qcow2Info, SnapshotInfo, info,
};
pub use limits::MAX_QUEUE_DEPTH;
pub use options::{BackingPolicy, CacheMode, DiscardPolicy, Format, IoDriver, OpenOptions};
pub use queue::{Queue, QueueSeat};
pub use request::{Completion, Rejected, Request};
pub use urus_engine::Counters;
pub use urus_engine::check::{CheckReport, Finding, Repair, Severity};
pub use urus_engine::error::Error as EngineError;
pub use urus_engine::request::Extent;
pub use urus_format::Compression;
pub use urus_ring::{BUFFER_ALIGNMENT, Buffer};
