//! Linux's error numbers, as far as the engine knows them by name. It asks no operating system.

/// Not permitted: what NBD and virtio are told of a read-only device.
pub(crate) const EPERM: i32 = 1;
/// An operation failed, and nothing more is known.
pub(crate) const EIO: i32 = 5;
/// No memory.
pub(crate) const ENOMEM: i32 = 12;
/// Invalid; of file systems that do not know an operation some say so.
pub(crate) const EINVAL: i32 = 22;
/// No space is left.
pub(crate) const ENOSPC: i32 = 28;
/// Not supported.
pub(crate) const EOPNOTSUPP: i32 = 95;
/// The device is gone.
pub(crate) const ESHUTDOWN: i32 = 108;
/// The user's share of the space is used up.
pub(crate) const EDQUOT: i32 = 122;
