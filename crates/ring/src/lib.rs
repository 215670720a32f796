//! Storage drivers for urus: the only crate that talks to the kernel about data, and the only one with `unsafe`.
//!
//! * [`memory`]: buffers that own their bytes until the kernel is done with them.
//! * [`files`]: the open files of a device, and what they can do; [`locks`]: image locks, as QEMU takes them.
//! * [`Sockets`]: what a ring sends and receives beside its work on files, for servers.
//! * [`Driver`]: io_uring (Linux 5.13 or later) or blocking system calls behind one
//!   [`Storage`](urus_engine::storage::Storage) implementation.
//! * [`RawFile`]: one file without engine or driver, for measurements to compare with.
//!
//! # Kernels
//! The ring needs features up to Linux 5.13 (extended wait arguments, native workers, multishot poll), checked at
//! open. It uses more where there is more: COOP_TASKRUN and SUBMIT_ALL (5.19), SINGLE_ISSUER and DEFER_TASKRUN (6.1),
//! NO_SQARRAY (6.6), FTRUNCATE (6.9). Only recent kernels are tested.
//!
//! # Threads
//! A [`Driver`] belongs to the thread that opened it. [`Buffer`] and [`FileSet`] cross threads, and so does a driver's
//! notifier. Offloaded jobs run on a pool that all drivers of the process share.

mod bell;
mod blocking;
mod driver;
pub mod files;
pub mod locks;
pub mod memory;
mod offload;
mod probe;
mod raw;
mod refusal;
mod sockets;
mod uring;

pub use driver::{DEPTH_MAX, Driver, DriverKind};
pub use files::{FileSet, OpenFile};
pub use locks::{LockError, LockMode};
#[cfg(feature = "vm-memory")]
pub use memory::OutsideGuestMemory;
pub use memory::reserve::{
    RESERVE_BYTES, ReservingAllocator, hold_reserve, may_fail, memory_is_short, shortages,
};
pub use memory::shrunk::{Guard, faults};
pub use memory::{BUFFER_ALIGNMENT, Buffer, MemoryRegion, RingMemory};
pub use raw::{RawDirection, RawFile, RawMethod};
pub use refusal::explain_refusal;
pub use sockets::{Parts, SocketCompletion, Sockets};
