//! The log of dirty pages, by which a front end knows during a migration what to send again (vhost-user, "Migration").

use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::VolatileMemory;

use crate::shared::Shared;

/// Bytes of guest memory per bit.
const PAGE: u64 = 4096;

/// A bit per page of the guest's physical memory, shared with the front end.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    bits: Shared,
}

impl DirtyLog {
    pub(crate) fn new(bits: Shared) -> Self {
        Self { bits }
    }

    /// Whether its file was shortened.
    pub(crate) fn is_broken(&self) -> bool {
        self.bits.is_broken()
    }

    /// Notes that a range of the guest's memory was written: after it was, and before the guest is told. What the log
    /// has no bits for is outside the memory that is migrated.
    pub(crate) fn mark(&self, address: u64, len: usize) {
        let Some(last) = (len as u64).checked_sub(1) else {
            return;
        };
        for page in address / PAGE..=address.saturating_add(last) / PAGE {
            let Some(byte) = usize::try_from(page / 8)
                .ok()
                .and_then(|at| self.bits.slice(at, 1))
            else {
                return;
            };
            if let Ok(byte) = byte.get_atomic_ref::<AtomicU8>(0) {
                byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards the log: exactly the pages that a range touches, and nothing beyond its end.
    use super::*;
    use crate::memory::tests::memfd;

    #[test]
    fn a_range_marks_its_pages() {
        let file = memfd(8);
        let log = DirtyLog::new(Shared::map(file.try_clone().unwrap(), 0, 4).unwrap());
        log.mark(0, 0);
        log.mark(4095, 1);
        log.mark(2 * 4096 - 1, 2);
        log.mark(15 * 4096, 4096);
        // Beyond the log, and the address space.
        log.mark(31 * 4096, 3 * 4096);
        log.mark(u64::MAX, 7);
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [0b111, 0b1000_0000, 0, 0b1000_0000, 0, 0, 0, 0]);
    }
}
