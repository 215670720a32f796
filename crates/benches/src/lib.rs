//! A device over files in memory, all of it on one thread: what remains is the engine's own work. For `benches/`, and for `hits`, whose
//! instructions `cargo xtask instructions` counts.
#![forbid(unsafe_code)]

pub mod disk;
pub mod hits;
pub mod memory;
pub mod noise;
