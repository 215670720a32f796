//! Memory kept back for the moment when there is no more.
//!
//! A server must survive the moment in which the process gets no memory (RLIMIT_AS, strict overcommit). What a client
//! or a guest decides the size of is asked for by calls that can fail, inside [`may_fail`]. Everything else is small,
//! and Rust aborts when it is refused: for that there is a reserve. [`ReservingAllocator`] lets the reserve go when such
//! an allocation fails, and tries again. From then on [`memory_is_short`] is true, so that servers take no more work that
//! costs memory, until as much is free again as the reserve needs.
//!
//! A process that does not make it its `#[global_allocator]`, or holds no reserve, aborts as usual.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What a server keeps back: enough for the small things of all requests that are under way. It is address space, and
/// no memory as long as nobody touches it.
pub const RESERVE_BYTES: usize = 32 << 20;

/// How long after one attempt to give free memory back to the system the next one is made.
const TRIM_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes that are kept back; 0 before [`hold_reserve`].
static BYTES: AtomicUsize = AtomicUsize::new(0);
/// Where; null while they are let go.
static HELD: AtomicPtr<u8> = AtomicPtr::new(null_mut());
/// The reserve was let go.
static SHORT: AtomicBool = AtomicBool::new(false);
/// How often that has happened.
static TIMES: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Whether this thread can do without what it asks for. (Without a destructor, so that it costs no allocation.)
    static MAY_FAIL: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, with a reserve for allocations that must not fail.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReservingAllocator;

// SAFETY: every method hands its arguments to `System`, which keeps the contract, and returns what that returned. A second
// attempt is made only after the first one returned null, which has changed nothing. Nothing here unwinds or allocates:
// atomics, a thread-local without destructor, and munmap(2).
unsafe impl GlobalAlloc for ReservingAllocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the same.
        let attempt = || unsafe { System.alloc(layout) };
        or_with_reserve(layout.size(), attempt)
    }

    #[inline]
    unsafe fn dealloc(&self, base: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same: all memory comes from `System`.
        unsafe { System.dealloc(base, layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the same.
        let attempt = || unsafe { System.alloc_zeroed(layout) };
        or_with_reserve(layout.size(), attempt)
    }

    #[inline]
    unsafe fn realloc(&self, base: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise is the same; an attempt that failed has left the block as it was.
        let attempt = || unsafe { System.realloc(base, layout, new_size) };
        or_with_reserve(new_size, attempt)
    }
}

#[inline]
fn or_with_reserve(bytes: usize, attempt: impl Fn() -> *mut u8) -> *mut u8 {
    let base = attempt();
    if base.is_null() {
        again(bytes, attempt)
    } else {
        base
    }
}

#[cold]
fn again(bytes: usize, attempt: impl Fn() -> *mut u8) -> *mut u8 {
    let reserve = BYTES.load(Ordering::Relaxed);
    if bytes > reserve / 2 || MAY_FAIL.try_with(Cell::get).unwrap_or(false) {
        return null_mut();
    }
    SHORT.store(true, Ordering::SeqCst);
    let held = HELD.swap(null_mut(), Ordering::SeqCst);
    if !held.is_null() {
        TIMES.fetch_add(1, Ordering::Relaxed);
        unmap(held, reserve);
    }
    // Where another thread has let it go a moment ago, there is room as well.
    attempt()
}

/// Runs what asks for memory and can do without: it fails while the reserve stays.
pub fn may_fail<R>(ask: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            MAY_FAIL.set(self.0);
        }
    }
    let _restore = Restore(MAY_FAIL.replace(true));
    ask()
}

/// Keeps [`RESERVE_BYTES`] back from now on. Doing it again does nothing.
///
/// # Errors
/// ENOMEM: there is not as much now. Nothing is kept back then.
pub fn hold_reserve() -> io::Result<()> {
    let first = BYTES
        .compare_exchange(0, RESERVE_BYTES, Ordering::SeqCst, Ordering::SeqCst)
        .is_ok();
    if !first || regain() {
        return Ok(());
    }
    BYTES.store(0, Ordering::SeqCst);
    Err(io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Whether the reserve is in use: no work should be taken that costs memory. Looks whether it can be had back.
#[inline]
#[must_use]
pub fn memory_is_short() -> bool {
    SHORT.load(Ordering::Relaxed) && is_still_short()
}

/// How often the reserve had to be let go.
#[must_use]
pub fn shortages() -> u64 {
    TIMES.load(Ordering::Relaxed)
}

#[cold]
fn is_still_short() -> bool {
    static TOLD: AtomicU64 = AtomicU64::new(0);
    let times = TIMES.load(Ordering::Relaxed);
    if TOLD.swap(times, Ordering::Relaxed) != times {
        tracing::warn!(
            "no memory is left: new requests are refused (ENOMEM) until there is some; raise the limit of the process's memory, or \
             allow fewer connections"
        );
    }
    if !(regain() || trim() && regain()) {
        return true;
    }
    tracing::info!("there is memory again");
    false
}

/// Tries to have the whole reserve.
fn regain() -> bool {
    let bytes = BYTES.load(Ordering::SeqCst);
    if bytes == 0 {
        return true;
    }
    // SAFETY: `mmap` of new anonymous memory, at an address that the kernel chooses, changes no other mapping.
    let base = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(null_mut(), bytes, protection, flags, -1, 0)
    };
    if base == libc::MAP_FAILED {
        return false;
    }
    let base = base.cast::<u8>();
    let placed = HELD.compare_exchange(null_mut(), base, Ordering::SeqCst, Ordering::SeqCst);
    if placed.is_err() {
        // Another thread was faster.
        unmap(base, bytes);
    }
    SHORT.store(false, Ordering::SeqCst);
    true
}

/// Gives memory that was freed back to the system, which allocators put off. Whether it was tried.
fn trim() -> bool {
    static LAST: std::sync::Mutex<Option<Instant>> = std::sync::Mutex::new(None);
    let Ok(mut last) = LAST.try_lock() else {
        return false;
    };
    let now = Instant::now();
    if last.is_some_and(|last| now.duration_since(last) < TRIM_INTERVAL) {
        return false;
    }
    *last = Some(now);
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
    true
}

fn unmap(base: *mut u8, bytes: usize) {
    // SAFETY: the callers have taken the mapping out of `HELD`, or not put it there, so it is theirs alone; it has this
    // length, and nobody has ever looked into it.
    let unmapped = unsafe { libc::munmap(base.cast(), bytes) };
    debug_assert!(unmapped == 0);
}

#[cfg(test)]
mod tests {
    //! Guards the last resort: it is let go once for what must not fail, not at all for what may, and is had again.
    use super::*;

    /// Of the whole process, so one test.
    #[test]
    fn the_reserve_is_for_what_must_not_fail_and_comes_back() {
        let refused = |bytes: usize| {
            let first = Cell::new(true);
            // An allocator that is out of memory once.
            let attempt = || {
                if first.replace(false) {
                    return null_mut();
                }
                std::ptr::dangling_mut()
            };
            or_with_reserve(bytes, attempt).is_null()
        };
        assert!(refused(16), "nothing is held yet");
        assert!(!memory_is_short());
        hold_reserve().unwrap();
        hold_reserve().unwrap();
        let held = HELD.load(Ordering::SeqCst);
        assert!(!held.is_null());
        assert!(may_fail(|| refused(16)), "it can do without");
        assert!(refused(RESERVE_BYTES), "it would use everything up");
        assert_eq!((shortages(), HELD.load(Ordering::SeqCst)), (0, held));
        assert!(!refused(16));
        assert_eq!(shortages(), 1);
        assert!(HELD.load(Ordering::SeqCst).is_null() && SHORT.load(Ordering::SeqCst));
        assert!(!refused(16), "what is let go is let go once");
        assert_eq!(shortages(), 1);
        assert!(!memory_is_short(), "there is memory here");
        assert!(!HELD.load(Ordering::SeqCst).is_null());
        assert!(!may_fail(|| may_fail(|| 0) == 1) && !MAY_FAIL.get());
    }
}
