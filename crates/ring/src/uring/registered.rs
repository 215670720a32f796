//! Memory that is registered with a ring.

use std::io;
use std::ptr::NonNull;

use io_uring::IoUring;

use crate::memory::MemoryRegion;

/// The largest piece that the kernel takes.
const PIECE_BYTES: usize = 1 << 30;

/// Pieces at most: what a guest of 4 TiB is cut into.
const PIECES_MAX: usize = 4096;

/// What is registered, and what keeps it mapped.
///
/// That an address lies in a piece is enough to know that it means the pinned pages: the region holds its mapping, so nothing else can be mapped there.
#[derive(Default)]
pub(super) struct Registered {
    /// (first address, address past the end), ascending; the place is the index that the kernel knows.
    pieces: Vec<(usize, usize)>,
    regions: Vec<MemoryRegion>,
}

impl Registered {
    /// Replaces what is registered. On an error nothing is.
    pub(super) fn replace(&mut self, ring: &IoUring, regions: Vec<MemoryRegion>) -> io::Result<()> {
        if !self.pieces.is_empty() {
            self.pieces.clear();
            // Operations under way keep their pages, and their own hold on the mapping.
            ring.submitter().unregister_buffers()?;
            self.regions.clear();
        }
        let mut pieces: Vec<(usize, usize)> = regions.iter().flat_map(cut).collect();
        pieces.sort_unstable();
        if pieces.is_empty() {
            return Ok(());
        }
        let overlap = pieces.windows(2).any(|pair| pair[0].1 > pair[1].0);
        if overlap || pieces.len() > PIECES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "regions to register overlap, or are more than {PIECES_MAX} pieces of 1 GiB"
                ),
            ));
        }
        let iovecs: Vec<libc::iovec> = pieces
            .iter()
            .map(|&(start, end)| libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(start),
                iov_len: end - start,
            })
            .collect();
        // SAFETY: wants memory that is valid until it is unregistered or the ring is gone. `MemoryRegion::new` promises it as long as the region lives;
        // the regions are dropped after `unregister_buffers` above, or with `self`, which `Ring` drops after the ring itself.
        unsafe { ring.submitter().register_buffers(&iovecs) }?;
        self.pieces = pieces;
        self.regions = regions;
        Ok(())
    }

    /// The kernel's index of the piece that has all of this.
    #[inline]
    pub(super) fn find(&self, base: NonNull<u8>, len: u32) -> Option<u16> {
        if self.pieces.is_empty() {
            return None;
        }
        let start = base.as_ptr().addr();
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        let after = self.pieces.partition_point(|piece| piece.0 <= start);
        let index = after.checked_sub(1)?;
        (end <= self.pieces[index].1)
            .then(|| u16::try_from(index).expect("no more than PIECES_MAX"))
    }
}

/// The pieces of a region.
fn cut(region: &MemoryRegion) -> impl Iterator<Item = (usize, usize)> {
    let start = region.base().as_ptr().expose_provenance();
    let end = start + region.len();
    (start..end)
        .step_by(PIECE_BYTES)
        .map(move |piece| (piece, end.min(piece + PIECE_BYTES)))
}

#[cfg(test)]
mod tests {
    //! Guards the look-up: an operation must not be told to lie in memory that is not, or is no longer, registered.
    use super::*;
    use crate::Buffer;
    use crate::uring::setup;

    #[test]
    fn only_what_lies_in_one_piece_is_found() {
        let (buffers, region) = Buffer::pool(3, 4096);
        let ring = setup::build(4).unwrap();
        setup::enable(&ring, false, false).unwrap();
        let mut registered = Registered::default();
        let base = region.base();
        let at = |offset: usize| NonNull::new(base.as_ptr().wrapping_add(offset)).unwrap();
        assert_eq!(registered.find(base, 1), None);
        registered.replace(&ring, vec![region.clone()]).unwrap();
        assert_eq!(registered.find(base, 12_288), Some(0));
        assert_eq!(registered.find(at(12_287), 1), Some(0));
        assert_eq!(registered.find(base, 12_289), None);
        assert_eq!(registered.find(at(12_287), 2), None);
        assert_eq!(registered.find(at(0x1000_0000), 1), None);
        let error = registered
            .replace(&ring, vec![region.clone(), region])
            .unwrap_err();
        assert!(error.to_string().contains("overlap"), "{error}");
        assert_eq!(
            registered.find(base, 1),
            None,
            "nothing is registered after an error"
        );
        let (_others, other) = Buffer::pool(1, 1);
        registered.replace(&ring, vec![other.clone()]).unwrap();
        assert_eq!(registered.find(other.base(), 4096), Some(0));
        assert_eq!(registered.find(base, 1), None);
        registered.replace(&ring, Vec::new()).unwrap();
        assert_eq!(registered.find(other.base(), 1), None);
        drop(buffers);
    }

    #[test]
    fn largeregions_are_cut() {
        // Addresses only: nothing is there.
        let keep_alive = std::sync::Arc::new(());
        // SAFETY: the region is only cut, never registered.
        let region = unsafe { MemoryRegion::new(keep_alive, NonNull::dangling(), (2 << 30) + 5) };
        let lengths: Vec<_> = cut(&region).map(|(start, end)| end - start).collect();
        assert_eq!(lengths, [PIECE_BYTES, PIECE_BYTES, 5]);
    }
}
