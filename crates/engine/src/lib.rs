//! The urus engine.
#![forbid(unsafe_code)]
pub mod storage;
pub mod sync;
