//! The one place that names atomics, locks and `Arc`, so that loom and shuttle can take their place.
//!
//! The features `loom` (the mapping and the pins, every interleaving; `src/interleavings.rs`) and `shuttle` (the whole
//! engine, random schedules; the simulator's `tests/shuttle.rs`) are for those tests alone, and exclude each other. `Arc` and
//! `OnceLock` stay std's: wakers are made of the one, and what the other guards is filled once and then only read.
pub use std::sync::Arc;
pub use std::sync::OnceLock;
/// A counter by which nothing is decided: std's as well, so that no test spends its interleavings on it.
pub(crate) use std::sync::atomic::AtomicU64 as Tally;

#[cfg(feature = "loom")]
use loom::sync::Mutex as Inner;
#[cfg(feature = "loom")]
pub use loom::{
    hint::spin_loop,
    sync::MutexGuard,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

#[cfg(feature = "shuttle")]
use shuttle::sync::Mutex as Inner;
#[cfg(feature = "shuttle")]
pub use shuttle::{
    hint::spin_loop,
    sync::MutexGuard,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
use std::sync::Mutex as Inner;
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub use std::{
    hint::spin_loop,
    sync::MutexGuard,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

/// A mutex that does not know poisoning: a panic in the engine is a bug, and what it guards is written so that
/// every critical section leaves it whole.
#[derive(Debug, Default)]
pub struct Mutex<T>(Inner<T>);

#[cfg(not(feature = "loom"))]
impl<T> Mutex<T> {
    /// A mutex around `value`.
    pub const fn new(value: T) -> Self {
        Self(Inner::new(value))
    }
}

#[cfg(feature = "loom")]
impl<T> Mutex<T> {
    /// A mutex around `value`. (Loom's counts within one run only, so it is not for statics.)
    pub fn new(value: T) -> Self {
        Self(Inner::new(value))
    }
}

impl<T> Mutex<T> {
    /// Takes the lock. Held for a few instructions or a bounded copy, never across an await.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
