//! Buffers kept for the next requests, so that the usual request allocates none.

use urus::Buffer;

use crate::limits::POOL_CLASSES;

/// Free buffers of one worker, by length: clients keep to a few lengths.
///
/// The classes are in the order of their last use. Memory is bounded: what does not fit pushes out the class that was used longest ago.
#[derive(Debug)]
pub(crate) struct Pool {
    classes: Vec<Class>,
    bytes: usize,
    limit_bytes: usize,
}

#[derive(Debug)]
struct Class {
    len: usize,
    free: Vec<Buffer>,
}

impl Pool {
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self {
            classes: Vec::new(),
            bytes: 0,
            limit_bytes,
        }
    }

    /// A buffer of exactly `len` bytes, with any content. None where there is no memory for it.
    pub(crate) fn take(&mut self, len: usize) -> Option<Buffer> {
        if let Some(buffer) = self.find(len).and_then(|class| class.free.pop()) {
            self.bytes -= len;
            return Some(buffer);
        }
        Buffer::try_new(len).or_else(|| {
            // What is kept for later may be enough.
            self.classes = Vec::new();
            self.bytes = 0;
            Buffer::try_new(len)
        })
    }

    /// Keeps `buffer` for later, if there is room.
    pub(crate) fn give(&mut self, buffer: Buffer) {
        let len = buffer.len();
        if len == 0 || len > self.limit_bytes / 2 {
            return;
        }
        if self.find(len).is_none() {
            if self.classes.len() == POOL_CLASSES {
                self.forget_last();
            }
            self.classes.insert(
                0,
                Class {
                    len,
                    free: Vec::new(),
                },
            );
        }
        while self.bytes + len > self.limit_bytes {
            if self.classes.len() == 1 {
                return;
            }
            self.forget_last();
        }
        self.classes[0].free.push(buffer);
        self.bytes += len;
    }

    /// The class of that length, moved to the front.
    fn find(&mut self, len: usize) -> Option<&mut Class> {
        let at = self.classes.iter().position(|class| class.len == len)?;
        self.classes[..=at].rotate_right(1);
        self.classes.first_mut()
    }

    fn forget_last(&mut self) {
        if let Some(class) = self.classes.pop() {
            self.bytes -= class.len * class.free.len();
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards the pool's bound, and that a request gets a buffer of its own length.
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 100 << 10;

    #[test]
    fn buffers_come_back() {
        let mut pool = Pool::new(1 << 20);
        let mut buffer = pool.take(4096).unwrap();
        buffer.as_mut_slice()[0] = 7;
        pool.give(buffer);
        assert_eq!(pool.take(512).unwrap().as_slice()[0], 0);
        assert_eq!(pool.take(4096).unwrap().as_slice()[0], 7);
        assert_eq!(pool.bytes, 0);
    }

    #[test]
    fn a_buffer_for_which_there_is_no_memory_is_none() {
        let mut pool = Pool::new(1 << 20);
        pool.give(Buffer::new(4096));
        assert!(pool.take(usize::MAX / 4).is_none());
        assert_eq!((pool.bytes, pool.classes.len()), (0, 0));
        assert!(pool.take(4096).is_some());
    }

    proptest! {
        #[test]
        fn memory_is_bounded(lens in prop::collection::vec(prop_oneof![0usize..20, Just(1 << 12), Just(8 << 12), Just(LIMIT)], 1..60)) {
            let mut pool = Pool::new(LIMIT);
            for &len in &lens {
                pool.give(Buffer::new(len));
                let held: usize = pool.classes.iter().map(|class| class.len * class.free.len()).sum();
                prop_assert_eq!(held, pool.bytes);
                prop_assert!(held <= LIMIT);
                prop_assert!(pool.classes.len() <= POOL_CLASSES);
            }
            for len in lens {
                prop_assert_eq!(pool.take(len).unwrap().len(), len);
            }
        }
    }
}
