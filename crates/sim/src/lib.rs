//! Simulated storage, crash enumerator and naive checker for urus. Test code: never published.
#![forbid(unsafe_code)]

pub mod checker;
