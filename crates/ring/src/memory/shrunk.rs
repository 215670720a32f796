//! Mappings of files that somebody else can shorten.
//!
//! Touching a mapping beyond the end of its file is a SIGBUS, which ends the process, and every other disk with it. A mapping that is
//! [guarded](Guard) costs its owner only: the first such access puts memory of zeroes in place of the mapping and marks the guard
//! broken, and the access goes on. (The kernel's own accesses, in system calls and rings, fail with EFAULT.) Whoever uses such a
//! mapping asks from time to time whether [`faults`] has moved, then which guard is [broken](Guard::is_broken), and believes nothing that
//! was read through it.
//!
//! The handler for SIGBUS is installed with the first guard. A signal that is no guard's goes to the handler that was there before, or
//! ends the process as usual.

use std::any::Any;
use std::ffi::{c_int, c_void};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Mappings that can be guarded at once.
const GUARDS: usize = 8192;

/// `si_code` of an access beyond the end of a file (BUS_ADRERR).
const BEYOND_END: c_int = 2;

/// What the handler knows of a guarded mapping. It reads while others write, so a version tells what belongs together: odd while the slot
/// changes. A slot whose mapping is being accessed does not change, for that mapping's guard lives.
struct Slot {
    version: AtomicUsize,
    /// 0 in a free slot.
    start: AtomicUsize,
    end: AtomicUsize,
    broken: AtomicBool,
}

static SLOTS: [Slot; GUARDS] = [const {
    Slot {
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    }
}; GUARDS];

/// Slots that were ever used: the handler looks no further.
static USED: AtomicUsize = AtomicUsize::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);
/// Held by whoever changes slots; the handler does not.
static CHANGES: Mutex<()> = Mutex::new(());
/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// How many guarded mappings were found broken so far, in the whole process.
#[inline]
#[must_use]
pub fn faults() -> u64 {
    FAULTS.load(Ordering::Acquire)
}

/// Keeps the process alive when the file behind a mapping is shortened.
pub struct Guard {
    slot: usize,
    /// Dropped after `drop` has freed the slot: no address of the slot is ever another mapping's.
    _mapping: Arc<dyn Any + Send + Sync>,
}

impl Guard {
    /// Guards the mapping of `len` bytes at `base`, which is of a file, shared, and begins at a page.
    ///
    /// # Errors
    /// Too many are guarded, or the handler cannot be installed.
    ///
    /// # Safety
    /// The whole pages of this range must be `mapping`'s alone, readable and writable, as long as it lives, and nobody may hold references
    /// (slices) into them: their content is replaced at any time.
    pub unsafe fn new(
        mapping: Arc<dyn Any + Send + Sync>,
        base: NonNull<u8>,
        len: usize,
    ) -> io::Result<Self> {
        install()?;
        let start = base.as_ptr().addr();
        let page = page_bytes();
        let end = start
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(page));
        let end = end.filter(|end| start.is_multiple_of(page) && *end > start);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let _changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        let free = SLOTS
            .iter()
            .position(|slot| slot.start.load(Ordering::Relaxed) == 0);
        let free = free.ok_or_else(|| {
            io::Error::other(format!(
                "{GUARDS} mappings of shared files are in use; no more are possible"
            ))
        })?;
        SLOTS[free].set(start, end);
        USED.fetch_max(free + 1, Ordering::SeqCst);
        Ok(Self {
            slot: free,
            _mapping: mapping,
        })
    }

    /// Whether the file was shortened and the mapping was touched where it no longer is. What was read from it since may be zeroes, and
    /// what was written to it is lost.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        SLOTS[self.slot].broken.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        SLOTS[self.slot].set(0, 0);
    }
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard")
            .field("broken", &self.is_broken())
            .finish_non_exhaustive()
    }
}

impl Slot {
    /// Only with `CHANGES` held.
    fn set(&self, start: usize, end: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// The range, if it has this address.
    fn range_of(&self, address: usize) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let range = (
            self.start.load(Ordering::Relaxed),
            self.end.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        let whole = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (whole && (range.0..range.1).contains(&address)).then_some(range)
    }
}

fn page_bytes() -> usize {
    // SAFETY: `sysconf` has no conditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

/// Installs the handler, once.
fn install() -> io::Result<()> {
    let _changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: a `sigaction` of zero bytes is one (SIG_DFL, no flags, an empty mask); `sigaction` wants valid pointers or null, and a handler that
    // does what a signal handler may: see `on_sigbus`.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before) != 0 {
            return Err(io::Error::last_os_error());
        }
        // Before the handler is there that reads it.
        let _ = BEFORE.set(before);
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        if libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Runs on the thread that touched the mapping, amid whatever it was doing: it takes no lock, allocates nothing, and leaves errno as it was.
extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid `siginfo_t`, and errno is the thread's own.
    let (code, address, errno) = unsafe {
        let errno = *libc::__errno_location();
        ((*info).si_code, (*info).si_addr().addr(), errno)
    };
    let contained = code == BEYOND_END && contain(address);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !contained {
        forward(signal, info, context);
    }
}

/// Puts zeroes in the place of the guarded mapping that has this address. False if there is none, or it cannot be done.
fn contain(address: usize) -> bool {
    let used = USED.load(Ordering::SeqCst);
    for slot in &SLOTS[..used] {
        let Some((start, end)) = slot.range_of(address) else {
            continue;
        };
        slot.broken.store(true, Ordering::Release);
        FAULTS.fetch_add(1, Ordering::Release);
        // SAFETY: MAP_FIXED replaces what is mapped at these pages. They are the guarded mapping's alone (the contract of `Guard::new`), it is
        // there (this thread is just using it), and nobody has references into it, so other content is no surprise to the compiler.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::with_exposed_provenance_mut(start),
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        return mapped != libc::MAP_FAILED;
    }
    false
}

/// Does with a SIGBUS what would have been done without us.
fn forward(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let before = BEFORE
        .get()
        .map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    let with_info = BEFORE
        .get()
        .is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
    // SAFETY: what is neither SIG_DFL nor SIG_IGN is the handler that was installed before, of the type that its flag says.
    unsafe {
        if before == libc::SIG_DFL || before == libc::SIG_IGN {
            let mut default: libc::sigaction = std::mem::zeroed();
            default.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            // The access is made again, and ends the process. A signal that was sent is sent again.
            if (*info).si_code <= 0 {
                libc::raise(signal);
            }
        } else if with_info {
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                std::mem::transmute(before);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(c_int) = std::mem::transmute(before);
            handler(signal);
        }
    }
}

#[cfg(feature = "vm-memory")]
mod vm {
    //! Guards for mappings as the rust-vmm crates make them. They are safe: such a mapping is unmapped by its owner alone, which the guard
    //! keeps, and gives out volatile slices and no references.
    use super::*;
    use vm_memory::{GuestRegionMmap, MmapRegion};

    impl Guard {
        /// Guards a region of a guest's memory.
        ///
        /// # Errors
        /// As [`new`](Self::new).
        pub fn of_guest_region(region: &Arc<GuestRegionMmap>) -> io::Result<Self> {
            let mapping: &MmapRegion = region;
            Self::of(Arc::clone(region) as _, mapping)
        }

        /// Guards a mapping.
        ///
        /// # Errors
        /// As [`new`](Self::new).
        pub fn of_mapping(mapping: &Arc<MmapRegion>) -> io::Result<Self> {
            Self::of(Arc::clone(mapping) as _, mapping)
        }

        fn of(owner: Arc<dyn Any + Send + Sync>, mapping: &MmapRegion) -> io::Result<Self> {
            if !mapping.owned() {
                // Somebody else may unmap it.
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            let base = NonNull::new(mapping.as_ptr());
            let base = base.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            // SAFETY: the mapping is the owner's, from a page on, for `size` bytes rounded up to pages, until the owner is dropped; it is readable and
            // writable as `MmapRegion::from_file` makes it, and handed out as volatile slices only.
            unsafe { Self::new(owner, base, mapping.size()) }
        }
    }
}

#[cfg(all(test, feature = "vm-memory"))]
mod tests {
    //! Guards the process against files that are shortened, and other faults against being hidden.
    use super::*;
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    fn mapped() -> (File, Arc<MmapRegion>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let mapping = MmapRegion::from_file(offset, 8192).unwrap();
        (file, Arc::new(mapping))
    }

    #[test]
    fn a_shortened_file_breaks_its_own_guard_alone() {
        let (file, mapping) = mapped();
        let (_other_file, other) = mapped();
        let guard = Guard::of_mapping(&mapping).unwrap();
        let other_guard = Guard::of_mapping(&other).unwrap();
        let slice = |mapping: &Arc<MmapRegion>, at: usize| {
            let slice = mapping.get_slice(at, 8).unwrap();
            let mut bytes = [1; 8];
            slice.read_slice(&mut bytes, 0).unwrap();
            slice.write_slice(&[7; 8], 0).unwrap();
            bytes
        };
        slice(&mapping, 4096);
        assert_eq!(slice(&mapping, 4096), [7; 8]);
        let before = faults();
        file.set_len(4096).unwrap();
        assert!(!guard.is_broken());
        assert_eq!(slice(&mapping, 4096), [0; 8]);
        assert!(guard.is_broken() && !other_guard.is_broken() && faults() > before);
        assert_eq!(slice(&mapping, 4096), [7; 8], "memory like any other");
        slice(&other, 0);
        assert_eq!(slice(&other, 0), [7; 8]);
        drop(guard);
        let again = Guard::of_mapping(&other).unwrap();
        assert!(!again.is_broken(), "the slot is used again");
    }

    /// Does what must end the process, in a process of its own.
    #[test]
    fn a_fault_that_is_no_guards_ends_the_process() {
        const CHILD: &str = "URUS_TEST_FAULT";
        let (file, mapping) = mapped();
        if std::env::var_os(CHILD).is_some() {
            let (_guarded_file, guarded) = mapped();
            let _guard = Guard::of_mapping(&guarded).unwrap();
            drop(Guard::of_mapping(&mapping).unwrap());
            file.set_len(0).unwrap();
            let slice = mapping.get_slice(0, 8).unwrap();
            let _ = slice.read_slice(&mut [0; 8], 0);
            std::process::exit(0);
        }
        let name = "memory::shrunk::tests::a_fault_that_is_no_guards_ends_the_process";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, "1")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }
}
