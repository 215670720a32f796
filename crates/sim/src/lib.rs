//! Simulated storage, crash enumerator and naive checker for urus. Test code: never published.
//!
//! - [`storage::SimStorage`] implements the engine's `Storage` over a [`world::SimWorld`]: files in memory, a scheduler
//!   that draws lots, planned errors ([`fault`]), and a [`log`] of what became durable when.
//! - [`crash::CrashCursor`] walks that log and makes the files as a power cut could leave them.
//! - [`checker`] judges an image's structure; [`stamp`] and [`model`] judge what the guest reads.
#![forbid(unsafe_code)]

mod callers;
pub mod census;
pub mod checker;
pub mod cipher;
pub mod config;
mod configurations;
pub mod contents;
pub mod crash;
pub mod errors;
pub mod extents;
pub mod fault;
pub mod flat;
pub mod foreign;
pub mod image;
pub mod judge;
pub mod log;
pub mod machine;
pub mod memory;
pub mod model;
mod op;
pub mod plants;
pub mod qemu;
pub mod rng;
pub mod runner;
pub mod sequences;
pub mod space;
pub mod stamp;
pub mod storage;
pub mod sweep;
pub mod workload;
pub mod world;
