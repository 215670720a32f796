//! The one place that names atomics, locks and `Arc`, so that loom and shuttle can take their place.

pub use std::sync::Arc;
pub use std::sync::OnceLock;
pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// A mutex that does not know poisoning: a panic in the engine is a bug, and what it guards is written so that
/// every critical section leaves it whole.
#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// A mutex around `value`.
    pub const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    /// Takes the lock. Held for a few instructions or a bounded copy, never across an await.
    pub fn lock(&self) -> std::sync::MutexGuard<'_, T> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
