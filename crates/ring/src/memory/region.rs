//! Memory to be registered with rings: the kernel looks its pages up once, and not anew for each operation.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use urus_engine::sync::Arc;

use super::{BUFFER_ALIGNMENT, Block, Buffer, Owner};

/// A piece of this process's memory that a queue's ring may keep pinned, and what keeps it mapped. Reads and writes that lie
/// wholly inside it go without looking its pages up.
///
/// Pinned pages stay in memory and count against RLIMIT_MEMLOCK, once for each ring. They are those of the moment of registration: if they are replaced
/// later (MADV_DONTNEED, a hole punched into the file behind, as balloons do), I/O goes on to the old ones.
#[derive(Clone)]
pub struct MemoryRegion {
    base: NonNull<u8>,
    len: usize,
    _keep_alive: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is never read through, only told to the kernel; the memory behind it may be used from any thread by the
// contract of `new`, and its owner is `Send + Sync`.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above; a shared region gives out addresses only.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// The memory at `base`, of `len` bytes.
    ///
    /// # Safety
    /// It must be valid for reads and writes, from any thread, as long as `keep_alive` lives.
    #[must_use]
    pub unsafe fn new(
        keep_alive: Arc<dyn Any + Send + Sync>,
        base: NonNull<u8>,
        len: usize,
    ) -> Self {
        Self {
            base,
            len,
            _keep_alive: keep_alive,
        }
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion")
            .field("base", &self.base)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// One allocation from which buffers are cut.
pub(super) struct Slab {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the allocation is used through buffers cut from it, which share no byte; the slab itself only frees it.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1), BUFFER_ALIGNMENT)
            .expect("a slab fits the address space");
        // SAFETY: `alloc_zeroed` wants a layout of non-zero size: `max(1)` above.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else {
            handle_alloc_error(layout)
        };
        Self { base, layout }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: `new` made the allocation with this layout. Buffers, and the region that a ring has pinned, hold the slab.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

impl Buffer {
    /// `count` zeroed buffers of `bytes` bytes each, as [`Buffer::new`] makes them but cut from one allocation, and that allocation as a region to
    /// register with a queue.
    ///
    /// # Panics
    /// When they do not fit the address space.
    #[must_use]
    pub fn pool(count: usize, bytes: usize) -> (Vec<Self>, MemoryRegion) {
        let step = bytes.max(1).next_multiple_of(BUFFER_ALIGNMENT);
        let len = step
            .checked_mul(count)
            .expect("a pool fits the address space");
        let slab = Arc::new(Slab::new(len));
        let buffers = (0..count)
            .map(|index| Self {
                block: Rc::new(Block {
                    // SAFETY: `index < count`, so this is within the slab's `count * step` bytes.
                    base: unsafe { slab.base.add(index * step) },
                    len: bytes,
                    pieces: Vec::new(),
                    owner: Owner::Slab(Arc::clone(&slab)),
                }),
            })
            .collect();
        let base = slab.base;
        // SAFETY: the slab is valid as long as it lives.
        let region = unsafe { MemoryRegion::new(slab, base, len) };
        (buffers, region)
    }
}
