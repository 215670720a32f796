//! The urus engine.
#![forbid(unsafe_code)]
pub mod error;
pub mod request;
pub mod storage;
pub mod sync;
