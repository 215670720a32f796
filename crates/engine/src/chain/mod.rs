//! Where a range of the virtual disk comes from.
//!
//! - `layer`: one file of a chain, and for qcow2 its mapping.
//! - `layers`: the chain itself, an immutable list of them.
//! - `resolve`: the walk down the chain, without waiting; `skips` makes it short.
//! - `read`, `status`: reads and block status that may have to wait.

mod layer;
mod layers;
mod read;
mod resolve;
mod skips;
mod status;

pub(crate) use layer::{
    Layer, LayerId, LayerKind, Meta, NewTable, Owner, Owners, Qcow2Layer, Removed,
};
pub use layer::{LayerFormat, LayerSpec};
pub(crate) use layers::Chain;
pub(crate) use resolve::{LayerEntry, Piece};
