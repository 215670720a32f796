//! Memory that I/O reads into and writes from.
//!
//! Two roles share one allocation, a `Block`:
//! * [`Buffer`] is what crosses threads: the only handle to its block, so it is `Send`.
//! * [`RingMemory`] is what a driver and the engine work on: any number of views of a block, all on one thread.
//!
//! Going from one to the other allocates nothing. Whatever keeps the bytes alive (a heap allocation, a guest's memory
//! map) is owned by the block, so an operation that holds a view holds the memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use urus_engine::storage::Memory;
use urus_engine::sync::Arc;

/// Every heap block starts at a multiple of this many bytes: enough for O_DIRECT on any disk.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// One contiguous piece of a scattered block.
#[derive(Clone, Copy)]
struct Piece {
    /// Where it starts in the block, in bytes.
    start: usize,
    base: NonNull<u8>,
    len: usize,
}

/// What keeps the bytes of a block alive.
enum Owner {
    /// A heap allocation of this layout at the block's base.
    Heap(Layout),
    /// The block's base points into this vector, which nothing touches any more.
    Vec(#[allow(dead_code, reason = "held for its Drop")] Vec<u8>),
    /// A part of this, which no other block has.
    Slab(#[allow(dead_code, reason = "held for its Drop")] Arc<region::Slab>),
    /// Memory of someone else, such as a guest, who may change it at any time.
    Foreign(#[allow(dead_code, reason = "held for its Drop")] Arc<dyn Any + Send + Sync>),
    /// The parts of a chain. Not `Send`, which is why a chain never becomes a [`Buffer`].
    Chain(#[allow(dead_code, reason = "held for its Drop")] Vec<RingMemory>),
}

/// Memory and its owner. Invariant: every piece is valid for reads and writes as long as the block lives.
struct Block {
    /// Start of the only piece, where `pieces` is empty.
    base: NonNull<u8>,
    /// All bytes of the block.
    len: usize,
    /// The pieces of a scattered block, in order, none of them empty; no entry where there is just one.
    pieces: Vec<Piece>,
    owner: Owner,
}

impl Block {
    /// None where there is no memory for it.
    fn heap(bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes.max(1), BUFFER_ALIGNMENT).ok()?;
        // SAFETY: `alloc_zeroed` wants a layout of non-zero size: `max(1)` above.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self {
            base,
            len: bytes,
            pieces: Vec::new(),
            owner: Owner::Heap(layout),
        })
    }

    /// Lays `segments` out one after the other, leaving out empty ones and joining neighbours.
    fn set_pieces(&mut self, segments: impl Iterator<Item = (NonNull<u8>, usize)>) {
        self.pieces.clear();
        self.len = 0;
        for (base, len) in segments.filter(|&(_, len)| len != 0) {
            match self.pieces.last_mut() {
                Some(last) if last.base.as_ptr().wrapping_add(last.len) == base.as_ptr() => {
                    last.len += len
                }
                _ => self.pieces.push(Piece {
                    start: self.len,
                    base,
                    len,
                }),
            }
            self.len = self
                .len
                .checked_add(len)
                .expect("segments fit the address space");
        }
        if let [only] = self.pieces[..] {
            self.base = only.base;
            self.pieces.clear();
        } else if self.pieces.is_empty() {
            self.base = NonNull::dangling();
        }
    }

    /// Whether nobody else (a guest) can change the bytes.
    fn is_private(&self) -> bool {
        match &self.owner {
            Owner::Heap(_) | Owner::Vec(_) | Owner::Slab(_) => true,
            Owner::Foreign(_) => false,
            Owner::Chain(parts) => parts.iter().all(|part| part.block.is_private()),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Owner::Heap(layout) = self.owner {
            // SAFETY: `dealloc` wants the pointer and layout of one live allocation: `heap` made both and nothing
            // changes them. No view is left (the block is being dropped), and a driver keeps a view of what the
            // kernel still works on.
            unsafe { dealloc(self.base.as_ptr(), layout) }
        }
    }
}

/// Owned memory for one request: unique, and free to move between threads.
///
/// Made by the caller, handed in with a request, given back with its completion.
pub struct Buffer {
    /// Invariant: the only reference to the block, strong or weak, and no [`Owner::Chain`].
    block: Rc<Block>,
}

// SAFETY: the reference count is touched by one thread at a time, because a `Buffer` holds the only reference (its
// invariant, upheld by its constructors and by `RingMemory::try_into_buffer`) and has no method that adds one without
// consuming it. What the block owns is `Send`: heap bytes, a `Vec<u8>`, a slab, or an `Arc<dyn Any + Send + Sync>`; chains
// never get here. Pointers of `from_segments` may be used from any thread by that function's contract.
unsafe impl Send for Buffer {}

impl Buffer {
    /// `bytes` zeroed bytes in one piece, aligned to [`BUFFER_ALIGNMENT`]. Where there is no memory the process aborts, as
    /// with `vec![0; bytes]`; [`try_new`](Self::try_new) is for sizes that somebody else decides.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        match Block::heap(bytes) {
            Some(block) => Self {
                block: Rc::new(block),
            },
            None => handle_alloc_error(
                Layout::from_size_align(bytes.max(1), BUFFER_ALIGNMENT)
                    .expect("a buffer fits the address space"),
            ),
        }
    }

    /// As [`new`](Self::new); None where there is no memory for it. The [reserve](crate::hold_reserve) is not used for it.
    #[must_use]
    pub fn try_new(bytes: usize) -> Option<Self> {
        let block = reserve::may_fail(|| Block::heap(bytes))?;
        Some(Self {
            block: Rc::new(block),
        })
    }

    /// The bytes of `vec`, without copying. Aligned as the vector happens to be: for buffered files.
    #[must_use]
    pub fn from_vec(mut vec: Vec<u8>) -> Self {
        let base = NonNull::new(vec.as_mut_ptr()).expect("a vector's pointer is not null");
        let len = vec.len();
        Self {
            block: Rc::new(Block {
                base,
                len,
                pieces: Vec::new(),
                owner: Owner::Vec(vec),
            }),
        }
    }

    /// A buffer over memory that belongs to someone else, such as the pieces of a guest's request.
    ///
    /// # Safety
    /// Each segment must be valid for reads and writes, from any thread, as long as `keep_alive` lives. Others may
    /// read and change the bytes at any time; here they are only copied through raw pointers, never borrowed.
    #[must_use]
    pub unsafe fn from_segments(
        keep_alive: Arc<dyn Any + Send + Sync>,
        segments: &[(NonNull<u8>, usize)],
    ) -> Self {
        let mut block = Block {
            base: NonNull::dangling(),
            len: 0,
            pieces: Vec::new(),
            owner: Owner::Foreign(keep_alive),
        };
        block.set_pieces(segments.iter().copied());
        Self {
            block: Rc::new(block),
        }
    }

    /// Points a used buffer at other memory of the same or another owner, without allocating where it had at least as
    /// many pieces before: for a transport that keeps a pool of buffers.
    ///
    /// # Safety
    /// As for [`from_segments`](Self::from_segments).
    ///
    /// # Panics
    /// When the buffer was not made by `from_segments`.
    pub unsafe fn set_segments(
        &mut self,
        keep_alive: Arc<dyn Any + Send + Sync>,
        segments: &[(NonNull<u8>, usize)],
    ) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.point_at(keep_alive, segments.iter().copied()) }
    }

    /// # Safety
    /// As for [`from_segments`](Self::from_segments).
    unsafe fn point_at(
        &mut self,
        keep_alive: Arc<dyn Any + Send + Sync>,
        segments: impl Iterator<Item = (NonNull<u8>, usize)>,
    ) {
        let block = self.block_mut();
        assert!(
            matches!(block.owner, Owner::Foreign(_)),
            "only a buffer of segments takes new ones"
        );
        block.set_pieces(segments);
        block.owner = Owner::Foreign(keep_alive);
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.block.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this buffer owns its bytes (`new`, `from_vec`), so that they can be borrowed.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        self.block.is_private()
    }

    /// The bytes.
    ///
    /// # Panics
    /// For a buffer of [`from_segments`](Self::from_segments): others may change that memory, so copy instead.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        assert!(self.is_owned(), "foreign memory can only be copied");
        // SAFETY: valid for `len` bytes (the block's invariant: heap and vector blocks have one initialised piece);
        // nobody writes while the borrow lives, as this is the only handle and it is borrowed, and the kernel works
        // only on blocks of which a driver holds a view.
        unsafe { std::slice::from_raw_parts(self.block.base.as_ptr(), self.block.len) }
    }

    /// The bytes, to change.
    ///
    /// # Panics
    /// As [`as_slice`](Self::as_slice).
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        assert!(self.is_owned(), "foreign memory can only be copied");
        // SAFETY: as in `as_slice`, and the exclusive borrow of the only handle makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.block.base.as_ptr(), self.block.len) }
    }

    /// Copies `dst.len()` bytes out, from `start`. Works for every buffer.
    ///
    /// # Panics
    /// When the range is out of bounds.
    pub fn copy_to(&self, start: usize, dst: &mut [u8]) {
        copy_out(&self.block, start, dst);
    }

    /// Copies `src` in, at `start`. Works for every buffer.
    ///
    /// # Panics
    /// When the range is out of bounds.
    pub fn copy_from(&mut self, start: usize, src: &[u8]) {
        copy_in(&self.block, start, src);
    }

    /// The view of the whole, for the thread that now owns it. Allocates nothing.
    #[must_use]
    pub fn into_memory(self) -> RingMemory {
        let len = self.block.len;
        RingMemory {
            block: self.block,
            start: 0,
            len,
        }
    }

    /// The contiguous pieces of a range, in order.
    pub(crate) fn pieces(&self, start: usize, len: usize) -> Pieces<'_> {
        Pieces::new(&self.block, start, len)
    }

    fn block_mut(&mut self) -> &mut Block {
        Rc::get_mut(&mut self.block).expect("a buffer is the only handle of its block")
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("len", &self.len())
            .field("owned", &self.is_owned())
            .finish_non_exhaustive()
    }
}

/// A view of a block, or of a part of one; all views of a block live on one thread. Cloning and slicing allocate
/// nothing, whether the block is scattered or not.
#[derive(Clone)]
pub struct RingMemory {
    block: Rc<Block>,
    /// Start of the view in the block, in bytes.
    start: usize,
    /// Bytes of the view. Invariant: `start + len <= block.len`.
    len: usize,
}

impl RingMemory {
    /// `bytes` zeroed bytes in one piece, aligned to [`BUFFER_ALIGNMENT`].
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Buffer::new(bytes).into_memory()
    }

    /// As [`new`](Self::new); None where there is no memory for it. A block of metadata must not fail if it can be helped:
    /// up to a page may come from the [reserve](crate::hold_reserve).
    pub(crate) fn try_new(bytes: usize) -> Option<Self> {
        let buffer = if bytes <= BUFFER_ALIGNMENT {
            Block::heap(bytes).map(|block| Buffer {
                block: Rc::new(block),
            })
        } else {
            Buffer::try_new(bytes)
        };
        buffer.map(Buffer::into_memory)
    }

    /// The buffer again, when this is the last view, covers the whole, and is no chain.
    ///
    /// # Errors
    /// The view itself, otherwise.
    pub fn try_into_buffer(mut self) -> Result<Buffer, Self> {
        let whole = self.start == 0 && self.len == self.block.len;
        // `get_mut` also sees weak references, of which there are never any.
        if whole
            && !matches!(self.block.owner, Owner::Chain(_))
            && Rc::get_mut(&mut self.block).is_some()
        {
            Ok(Buffer { block: self.block })
        } else {
            Err(self)
        }
    }

    /// Start and length when the view lies in one piece (always so for an empty one).
    #[inline]
    pub(crate) fn contiguous(&self) -> Option<(NonNull<u8>, usize)> {
        if self.block.pieces.is_empty() {
            // SAFETY: `start <= block.len` (the view's invariant), so the result stays in, or one past, the one piece.
            return Some((unsafe { self.block.base.add(self.start) }, self.len));
        }
        if self.len == 0 {
            return Some((NonNull::dangling(), 0));
        }
        let mut pieces = self.pieces();
        let first = pieces.next()?;
        (first.1 == self.len).then_some(first)
    }

    /// The contiguous pieces of the view, in order.
    pub(crate) fn pieces(&self) -> Pieces<'_> {
        Pieces::new(&self.block, self.start, self.len)
    }

    /// The absolute start in the block of the range `[start, start + len)` of this view.
    #[track_caller]
    fn range(&self, start: usize, len: usize) -> usize {
        let end = start.checked_add(len).expect("memory range overflows");
        assert!(
            end <= self.len,
            "memory range {start}+{len} is out of bounds of {} bytes",
            self.len
        );
        self.start + start
    }
}

/// Iterates over the pieces of a range of a block.
pub(crate) struct Pieces<'a> {
    block: &'a Block,
    /// Index of the next piece, for a scattered block.
    index: usize,
    position: usize,
    end: usize,
}

impl<'a> Pieces<'a> {
    /// `[start, start + len)` must lie in the block.
    fn new(block: &'a Block, start: usize, len: usize) -> Self {
        let end = start + len;
        assert!(end <= block.len, "a range lies within its block");
        let index = block
            .pieces
            .partition_point(|piece| piece.start + piece.len <= start);
        Self {
            block,
            index,
            position: start,
            end,
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = (NonNull<u8>, usize);

    fn next(&mut self) -> Option<Self::Item> {
        if self.position == self.end {
            return None;
        }
        let (base, start, piece_end) = if self.block.pieces.is_empty() {
            (self.block.base, 0, self.end)
        } else {
            let piece = self.block.pieces[self.index];
            self.index += 1;
            (piece.base, piece.start, piece.start + piece.len)
        };
        let len = piece_end.min(self.end) - self.position;
        // SAFETY: `position - start` is less than the length of the piece, which is valid memory (block invariant).
        let base = unsafe { base.add(self.position - start) };
        self.position += len;
        Some((base, len))
    }
}

fn copy_out(block: &Block, start: usize, dst: &mut [u8]) {
    let mut done = 0;
    for (base, len) in Pieces::new(block, start, dst.len()) {
        // SAFETY: `base` is valid for `len` bytes (the block's invariant); the slice index checks the destination's
        // bounds. They do not overlap: nobody borrows a block's bytes as a slice while a view can be used, and a
        // guest's memory is never borrowed.
        unsafe {
            std::ptr::copy_nonoverlapping(base.as_ptr(), dst[done..done + len].as_mut_ptr(), len)
        }
        done += len;
    }
}

fn copy_in(block: &Block, start: usize, src: &[u8]) {
    let mut done = 0;
    for (base, len) in Pieces::new(block, start, src.len()) {
        // SAFETY: as in `copy_out`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(src[done..done + len].as_ptr(), base.as_ptr(), len) }
        done += len;
    }
}

impl Memory for RingMemory {
    fn len(&self) -> usize {
        self.len
    }

    #[track_caller]
    fn slice(&self, start: usize, len: usize) -> Self {
        let start = self.range(start, len);
        Self {
            block: Rc::clone(&self.block),
            start,
            len,
        }
    }

    #[track_caller]
    fn read(&self, start: usize, dst: &mut [u8]) {
        copy_out(&self.block, self.range(start, dst.len()), dst);
    }

    #[track_caller]
    fn write(&self, start: usize, src: &[u8]) {
        copy_in(&self.block, self.range(start, src.len()), src);
    }

    #[track_caller]
    fn zero(&self, start: usize, len: usize) {
        for (base, len) in Pieces::new(&self.block, self.range(start, len), len) {
            // SAFETY: `base` is valid for `len` bytes (the block's invariant).
            unsafe { std::ptr::write_bytes(base.as_ptr(), 0, len) }
        }
    }

    fn is_zero(&self) -> bool {
        let private = self.block.is_private();
        self.pieces().all(|(base, len)| {
            if private {
                // SAFETY: `base` is valid and initialised for `len` bytes (the block's invariant). Nobody writes them
                // during this call: the block is private to this thread, and the engine does not look at memory
                // that the kernel is writing into (contract of `Storage::submit`).
                is_zero(unsafe { std::slice::from_raw_parts(base.as_ptr(), len) })
            } else {
                is_zero_foreign(base, len)
            }
        })
    }

    fn is_aligned(&self, align: usize) -> bool {
        debug_assert!(align.is_power_of_two());
        self.pieces()
            .all(|(base, len)| (base.as_ptr().addr() | len) & (align - 1) == 0)
    }

    fn chain(mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 {
            return parts.swap_remove(0);
        }
        let mut block = Block {
            base: NonNull::dangling(),
            len: 0,
            pieces: Vec::new(),
            owner: Owner::Chain(Vec::new()),
        };
        block.set_pieces(parts.iter().flat_map(RingMemory::pieces));
        block.owner = Owner::Chain(parts);
        let len = block.len;
        Self {
            block: Rc::new(block),
            start: 0,
            len,
        }
    }
}

impl fmt::Debug for RingMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingMemory")
            .field("start", &self.start)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Whether `bytes` are all zero. Looks at the first 16 bytes alone, since data mostly differs there, and then goes by
/// blocks of 128 bytes without a branch inside, which the compiler turns into vector instructions.
fn is_zero(bytes: &[u8]) -> bool {
    const STEP: usize = 128;
    let (head, rest) = bytes.split_at(bytes.len().min(16));
    if head.iter().any(|&byte| byte != 0) {
        return false;
    }
    let mut blocks = rest.chunks_exact(STEP);
    for block in blocks.by_ref() {
        let mut any = 0_u64;
        for word in block.chunks_exact(8) {
            any |= u64::from_ne_bytes(word.try_into().expect("eight bytes"));
        }
        if any != 0 {
            return false;
        }
    }
    blocks.remainder().iter().all(|&byte| byte == 0)
}

/// The same for memory that a guest may be changing: looks at copies.
fn is_zero_foreign(base: NonNull<u8>, len: usize) -> bool {
    let mut copy = [0_u8; 1024];
    let mut done = 0;
    while done < len {
        let step = copy.len().min(len - done);
        // SAFETY: the caller's `base` is valid for `len` bytes (the block's invariant), `done + step <= len`, and the
        // copy is a local of at least `step` bytes.
        unsafe { std::ptr::copy_nonoverlapping(base.as_ptr().add(done), copy.as_mut_ptr(), step) }
        if !is_zero(&copy[..step]) {
            return false;
        }
        done += step;
    }
    true
}

#[cfg(feature = "vm-memory")]
mod guest;
mod region;
pub(crate) mod reserve;
pub(crate) mod shrunk;
#[cfg(feature = "vm-memory")]
pub use guest::OutsideGuestMemory;
pub use region::MemoryRegion;
#[cfg(test)]
mod tests;
