//! What is done to data between a guest and a file, and who is told of a guest's changes. Both are fixed when a device is opened, and
//! cost a request nothing where there are none.

use std::fmt;

use crate::sync::Arc;

/// Changes data on its way between a guest and a file, as a cipher does. Metadata and compressed clusters do not pass it.
///
/// It is given whole sectors of 512 bytes at a multiple of that, and may be called by several threads at once. What a
/// sector becomes depends on its bytes and its place in the file alone.
pub trait Transform: Send + Sync {
    /// Changes bytes that are about to be written at `offset` of the file.
    fn before_write(&self, offset: u64, bytes: &mut [u8]);
    /// Undoes that, after bytes were read from `offset` of the file.
    fn after_read(&self, offset: u64, bytes: &mut [u8]);
}

impl dyn Transform {
    /// Bytes of a unit.
    pub const UNIT_BYTES: u64 = crate::limits::SECTOR_BYTES;
}

/// Is told of everything that a guest changes.
pub trait Observer: Send + Sync {
    /// A write, write-zeroes or discard is about to change `[offset, offset + len)` of the virtual disk: nothing of it has
    /// reached a file. Called on the queue's thread, by several queues at once; it must not wait for anything. The change may still fail.
    fn changes(&self, offset: u64, len: u64);
}

/// The hooks of a device.
#[derive(Clone, Default)]
pub struct Hooks {
    /// For the data of the image itself, which must be qcow2. Its backing files are left as they are.
    pub transform: Option<Arc<dyn Transform>>,
    /// For the guest's changes.
    pub observer: Option<Arc<dyn Observer>>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("transform", &self.transform.is_some())
            .field("observer", &self.observer.is_some())
            .finish()
    }
}
