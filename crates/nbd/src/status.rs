//! A block status in the making: extents of the engine, merged into the descriptors of a reply.

use urus::{Extent, Request, may_fail};

use crate::contexts::{Context, Contexts};
use crate::limits::STATUS_DESCRIPTORS;

/// What one metadata context says of consecutive extents: their lengths in bytes, and their flags.
pub(crate) type Descriptors = Vec<(u64, u32)>;

/// A block status in the making.
#[derive(Debug)]
pub(crate) struct Status {
    /// What was not yet asked.
    next: u64,
    end: u64,
    step: u64,
    one: bool,
    /// Of the device's chain.
    layers: u32,
    lists: Vec<List>,
}

/// One context's part of it.
#[derive(Debug)]
struct List {
    context: Context,
    /// The extent that may still grow is the last.
    descriptors: Descriptors,
    /// The last is complete as well.
    full: bool,
}

impl Status {
    /// Of `len` bytes at `offset`, asking the engine about `step` of them at once. Only the first extent, if `one`.
    pub(crate) fn new(
        offset: u64,
        len: u64,
        one: bool,
        contexts: Contexts,
        step: u64,
        layers: u32,
    ) -> Self {
        let list = |context| List {
            context,
            descriptors: Vec::new(),
            full: false,
        };
        Self {
            next: offset,
            end: offset + len,
            step: step.max(1),
            one,
            layers,
            lists: contexts.iter().map(list).collect(),
        }
    }

    /// The next question to the engine.
    pub(crate) fn request(&self, token: u64) -> Request {
        Request::block_status(token, self.next, (self.end - self.next).min(self.step))
    }

    /// Takes the extents from `next` on. True when nothing more is to be asked.
    pub(crate) fn take(&mut self, extents: &[Extent]) -> bool {
        let asked_from = self.next;
        let stop = self.end.min(asked_from.saturating_add(self.step));
        for extent in extents {
            // Taken is what follows without a gap and lies in what was asked, whatever the engine says besides.
            let end = extent.start.saturating_add(extent.len).min(stop);
            if extent.start > self.next || end <= self.next {
                continue;
            }
            let len = end - self.next;
            for list in &mut self.lists {
                let flags = list.context.flags(extent, self.layers);
                list.append(len, flags, self.one);
            }
            self.next = end;
            if self.lists.iter().all(|list| list.full) {
                return true;
            }
        }
        // The engine may answer for a part of what it was asked. One that answers nothing is not asked again.
        self.next == asked_from || self.next >= self.end
    }

    /// What each context says: at least one descriptor.
    pub(crate) fn finish(&mut self) -> Vec<(Context, Descriptors)> {
        let rest = (self.end - self.next).max(1);
        self.lists
            .drain(..)
            .map(|mut list| {
                if list.descriptors.is_empty() {
                    // "A server MAY always safely report a status of 0 for any block", and must report at least one.
                    list.descriptors.push((rest, 0));
                }
                (list.context, list.descriptors)
            })
            .collect()
    }
}

impl List {
    fn append(&mut self, len: u64, flags: u32, one: bool) {
        if self.full {
            return;
        }
        let most = if one { 1 } else { STATUS_DESCRIPTORS };
        if let Some((run, same)) = self.descriptors.last_mut()
            && *same == flags
        {
            *run += len;
            return;
        }
        let complete = self.descriptors.len() == most;
        // Without memory the answer is shorter; `finish` sees to it that it is not empty.
        if complete || may_fail(|| self.descriptors.try_reserve(1)).is_err() {
            self.full = true;
        } else {
            self.descriptors.push((len, flags));
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards block status replies: consecutive, merged, bounded, never empty, whatever the engine answers.
    use super::*;
    use proptest::prelude::*;

    fn extent(start: u64, len: u64, data: bool) -> Extent {
        Extent {
            start,
            len,
            depth: 0,
            present: data,
            zero: !data,
            data,
            compressed: false,
            host: None,
        }
    }

    fn status(offset: u64, len: u64, one: bool, step: u64) -> Status {
        let contexts = [Context::Allocation].into_iter().collect();
        Status::new(offset, len, one, contexts, step, 1)
    }

    fn only(mut status: Status) -> Descriptors {
        let mut lists = status.finish();
        assert_eq!(lists.len(), 1);
        lists.remove(0).1
    }

    /// Asks a made-up engine, whose layout is `data(byte)`, until the status is complete.
    fn run(
        offset: u64,
        len: u64,
        one: bool,
        step: u64,
        unit: u64,
        data: impl Fn(u64) -> bool,
    ) -> Descriptors {
        let mut status = status(offset, len, one, step);
        loop {
            let stop = (status.next + step).min(offset + len);
            let mut extents = Vec::new();
            let mut at = status.next;
            while at < stop {
                let end = (at / unit * unit + unit).min(stop);
                extents.push(extent(at, end - at, data(at / unit)));
                at = end;
            }
            if status.take(&extents) {
                return only(status);
            }
        }
    }

    #[test]
    fn neighbours_are_merged_across_steps() {
        let all = run(0, 1 << 30, false, 1 << 16, 4096, |unit| unit >= 1000);
        assert_eq!(all, [(1000 * 4096, 3), ((1 << 30) - 1000 * 4096, 0)]);
        let one = run(4096, 1 << 30, true, 1 << 16, 4096, |unit| unit >= 1000);
        assert_eq!(one, [(999 * 4096, 3)]);
    }

    #[test]
    fn lengths_can_exceed_32_bits() {
        let all = run(0, 1 << 40, false, 1 << 33, 1 << 34, |unit| unit >= 3);
        assert_eq!(all, [(3 << 34, 3), ((1 << 40) - (3 << 34), 0)]);
    }

    #[test]
    fn descriptors_are_bounded() {
        let all = run(0, 1 << 30, false, 1 << 16, 512, |unit| unit % 2 == 0);
        assert_eq!(all.len(), STATUS_DESCRIPTORS);
        assert!(all.iter().all(|&(len, _)| len == 512));
    }

    #[test]
    fn an_engine_that_says_nothing_gives_status_zero() {
        let mut status = status(512, 4096, false, 1 << 20);
        assert!(status.take(&[]));
        assert_eq!(only(status), [(4096, 0)]);
    }

    #[test]
    fn each_context_merges_for_itself() {
        let both = Context::ALL.into_iter().collect();
        for (one, allocation, depth) in [
            (
                false,
                vec![(300, 0), (200, 3)],
                vec![(100, 1), (200, 2), (100, 1), (100, 0)],
            ),
            (true, vec![(300, 0)], vec![(100, 1)]),
        ] {
            let mut status = Status::new(0, 500, one, both, 1 << 20, 2);
            let layer = |start, len, depth| Extent {
                depth,
                ..extent(start, len, true)
            };
            let zero = Extent {
                present: true,
                ..extent(300, 100, false)
            };
            let nowhere = Extent {
                depth: 1,
                ..extent(400, 100, false)
            };
            let extents = [layer(0, 100, 0), layer(100, 200, 1), zero, nowhere];
            assert!(status.take(&extents));
            assert_eq!(
                status.finish(),
                [(Context::Allocation, allocation), (Context::Depth, depth)]
            );
        }
    }

    proptest! {
        #[test]
        fn replies_lie_within_the_request(
            offset in 0u64..1000, len in 1u64..5000, one in any::<bool>(), step in 1u64..3000,
            answers in prop::collection::vec(prop::collection::vec((any::<u8>(), 0u64..2000, 0u64..3000, any::<bool>()), 0..6), 1..20),
        ) {
            let mut status = status(offset, len, one, step);
            for answer in &answers {
                let extents: Vec<_> = answer
                    .iter()
                    .map(|&(kind, start, len, data)| match kind {
                        0 => extent(u64::MAX - start, len, data),
                        _ => extent(start, len, data),
                    })
                    .collect();
                if status.take(&extents) {
                    break;
                }
            }
            let descriptors = only(status);
            prop_assert!(!descriptors.is_empty());
            prop_assert!(!one || descriptors.len() == 1);
            prop_assert!(descriptors.iter().all(|&(len, _)| len > 0));
            prop_assert!(descriptors.iter().map(|&(len, _)| len).sum::<u64>() <= len);
            prop_assert!(descriptors.windows(2).all(|pair| pair[0].1 != pair[1].1));
        }
    }
}
