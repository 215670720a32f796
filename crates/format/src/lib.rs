//! QCOW2 on-disk types and their codecs.
//!
//! Bytes come in, types that cannot hold a wrong value come out, and the other way round. Nothing here does I/O
//! or knows an operating system; every function is total on hostile input: it returns an [`Error`] that says
//! what, where and what was expected, and never allocates more than the input justifies.
#![forbid(unsafe_code)]

pub mod bitmap;
mod bytes;
pub mod compressed;
pub mod create;
mod entry;
mod error;
pub mod foreign;
mod geometry;
pub mod header;
pub mod names;
mod offset;
pub mod refcount;
pub mod snapshot;

pub use entry::{CompressedExtent, EntryError, L1Entry, L2Entry, L2Raw};
pub use error::Error;
pub use geometry::{Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
pub use header::{
    BackingName, BitmapsExtension, Compression, FaultKind, FeatureKind, FeatureName, Header,
    HeaderChange, HeaderFault, autoclear, compatible, incompatible,
};
pub use offset::{ClusterIndex, GuestCluster, GuestOffset, HostOffset};
