//! What becomes of removed references once their removal is durable: wait for requests in flight (O7), punch (O5),
//! lower the refcount (O6), hand out again (O4).

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::task::Poll;

use crate::chain::Removed;
use crate::errno::EOPNOTSUPP;
use crate::error::{Error, Result};
use crate::maintenance::Device;
use crate::planted::{self, Bug};
use crate::shared::Shared;
use crate::storage::{OpKind, Storage};
use crate::wake::Window;

/// What is left of a cluster that lost references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// So many of them.
    References(u64),
    Nothing,
    /// It had fewer than it lost: the image is damaged.
    LessThanNothing,
    /// It counted as free all along, so it may be somebody else's by now.
    Foreign,
}

impl Left {
    fn is_too_few(self) -> bool {
        matches!(self, Self::LessThanNothing | Self::Foreign)
    }
}

fn left(refcount: u64, lost: u64) -> Left {
    match refcount.checked_sub(lost) {
        Some(0) => Left::Nothing,
        Some(count) => Left::References(count),
        None if refcount == 0 => Left::Foreign,
        None => Left::LessThanNothing,
    }
}

/// Takes what is over off the front: each removal waits for its own mark (O7), and for those before it.
fn take_passed(settling: &mut VecDeque<Removed>, passed: impl Fn(u64) -> bool) -> Vec<Removed> {
    let mut ready = Vec::new();
    while let Some(removed) = settling.front().copied() {
        if !passed(removed.mark) {
            break;
        }
        settling.pop_front();
        ready.push(removed);
    }
    ready
}

/// Takes clusters of one step off the front of `todo`: how many references each has lost.
fn take_step(todo: &mut VecDeque<(u64, u64)>, mut room: u64) -> BTreeMap<u64, u64> {
    let mut lost = BTreeMap::new();
    while room > 0
        && let Some((first, count)) = todo.front_mut()
    {
        let taken = room.min(*count);
        for cluster in *first..*first + taken {
            *lost.entry(cluster).or_default() += 1;
        }
        *first += taken;
        *count -= taken;
        room -= taken;
        if *count == 0 {
            todo.pop_front();
        }
    }
    lost
}

impl<S: Storage> Device<S> {
    /// Takes removals that have become durable (O4).
    pub(crate) fn settle_later(&self, removed: Vec<Removed>) {
        if removed.is_empty() || planted::is(Bug::EarlyDecrement) {
            return;
        }
        self.settling.borrow_mut().extend(removed);
        self.wake_settler();
    }

    /// Metadata that nothing on disk refers to any more, durably.
    pub(crate) fn metadata_removed(&self, first: u64, count: u64) {
        let mark = {
            let mut meta = self.worker.image.qcow2().meta.lock();
            for cluster in first..first + count {
                meta.owners.remove(&cluster);
            }
            self.shared().pins.mark()
        };
        self.settle_later(vec![Removed { first, count, mark }]);
    }

    pub(crate) fn wake_settler(&self) {
        if let Some(waker) = self.settler.borrow_mut().take() {
            waker.wake();
        }
    }

    /// The service that settles removals and answers who waits for requests in flight.
    pub(crate) async fn settle_forever(&self) {
        loop {
            let ready = self.next_settled().await;
            let result = self.settle(&ready).await;
            if let Err(error) = result {
                // They stay referenced until it is tried again: with what is removed next, or with a pause or close.
                tracing::warn!(image = self.shared().image_name(), %error, "freed clusters could not be reclaimed");
            }
            self.settled.set(true);
            for waker in self.settled_waiters.borrow_mut().take() {
                waker.wake();
            }
        }
    }

    async fn next_settled(&self) -> Vec<Removed> {
        let pins = &self.shared().pins;
        poll_fn(|cx| {
            *self.settler.borrow_mut() = Some(cx.waker().clone());
            pins.set_waiter(cx.waker());
            // Before the queues are looked at, so that none ends unheard (Dekker with `QueuePins::end`).
            pins.set_waiting(true);
            let answered = {
                let mut mail = self.shared().mail.lock();
                mail.settler.register(cx.waker());
                let (passed, waiting) = std::mem::take(&mut mail.pins)
                    .into_iter()
                    .partition(|(mark, _)| pins.passed(*mark));
                mail.pins = waiting;
                let passed: Vec<_> = passed;
                passed
            };
            for (_, sender) in answered {
                sender.send(());
            }
            let mut settling = self.settling.borrow_mut();
            let ready = take_passed(&mut settling, |mark| {
                pins.passed(mark) || planted::is(Bug::NoInFlightPins)
            });
            if ready.is_empty() {
                let idle = settling.is_empty() && self.shared().mail.lock().pins.is_empty();
                pins.set_waiting(!idle);
                return Poll::Pending;
            }
            self.settled.set(false);
            Poll::Ready(ready)
        })
        .await
    }

    /// Waits until nothing is left to settle.
    pub(crate) async fn wait_settled(&self) {
        poll_fn(|cx| {
            if self.settled.get() && self.settling.borrow().is_empty() {
                return Poll::Ready(());
            }
            self.settled_waiters.borrow_mut().register(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Settles what could not be settled before. Nothing else is to be settled.
    pub(crate) async fn settle_rest(&self) -> Result<()> {
        if self.unsettled.borrow().is_empty() {
            return Ok(());
        }
        self.settle(&[]).await
    }

    /// Settles removals in steps of bounded size. What fails is kept for the next time.
    async fn settle(&self, ready: &[Removed]) -> Result<()> {
        let kept = std::mem::take(&mut *self.unsettled.borrow_mut());
        let ready = ready.iter().map(|removed| (removed.first, removed.count));
        let mut todo: VecDeque<(u64, u64)> = ready.chain(kept).collect();
        let step = self.shared().options.sizes.settle_step_clusters;
        while !todo.is_empty() {
            let result = self.settle_step(take_step(&mut todo, step)).await;
            if result.is_err() {
                if !planted::is(Bug::ForgetsLaterSteps) {
                    self.unsettled.borrow_mut().extend(todo);
                }
                return result;
            }
            let (_, dirty, most) = self.image().allocator.refcounts.cached();
            // Not within a commit, as the planted bug O6 has it.
            if dirty > most && !planted::is(Bug::EarlyDecrement) {
                // A failed commit is told to those who flush; the refcounts stay dirty.
                let _: Result<()> = self.flush().await;
            }
        }
        Ok(())
    }

    /// Keeps a cluster that lost so many references for the next time.
    fn keep_unsettled(&self, cluster: u64, references: u64) {
        let mut unsettled = self.unsettled.borrow_mut();
        for _ in 0..references {
            match unsettled.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => unsettled.push((cluster, 1)),
            }
        }
    }

    /// Settles clusters, each of which has lost so many references. O4: a cluster whose last reference is
    /// gone is free, unless it holds metadata: what owns that gives it up before it removes it.
    async fn settle_step(&self, lost: BTreeMap<u64, u64>) -> Result<()> {
        let image = self.image();
        let refcounts = &image.allocator.refcounts;
        let mut result = Ok(());
        let keep = |cluster: u64| self.keep_unsettled(cluster, lost[&cluster]);
        let mut free: Vec<(u64, u64)> = Vec::new();
        for (cluster, references) in &lost {
            if result.is_err() {
                keep(*cluster);
                continue;
            }
            let refcount = match refcounts.load(&self.worker, *cluster).await {
                Ok(refcount) => refcount,
                Err(error) => {
                    keep(*cluster);
                    result = Err(error);
                    continue;
                }
            };
            let left = left(refcount, *references);
            if left.is_too_few() {
                tracing::warn!(
                    image = self.shared().image_name(),
                    cluster,
                    refcount,
                    references,
                    "a cluster lost more references than it had: run `urus check`"
                );
            }
            match left {
                Left::References(count) => {
                    refcounts.set(*cluster, count);
                    continue;
                }
                Left::Foreign => continue,
                Left::Nothing | Left::LessThanNothing => {}
            }
            if let Some(owner) = self.worker.image.qcow2().meta.lock().owners.get(cluster) {
                // A broken entry referred to it (compressed data is not looked at before). Counted, it stays out of
                // the allocator's hands.
                tracing::warn!(
                    image = self.shared().image_name(),
                    cluster,
                    "a guest's cluster was said to lie in {}, which stays: run `urus check`",
                    owner.describe()
                );
                continue;
            }
            match free.last_mut() {
                Some((first, count)) if *first + *count == *cluster => *count += 1,
                _ => free.push((*cluster, 1)),
            }
        }
        let punched = if planted::is(Bug::EarlyPunch) || planted::is(Bug::LatePunch) {
            vec![false; free.len()]
        } else {
            self.punch(&free).await
        };
        let bits = refcounts.geometry.cluster_bits();
        for ((first, count), punched) in free.iter().zip(punched) {
            // O19: what was decoded from here is forgotten before anybody else writes here. O5: the punch is over
            // before the allocator sees the clusters.
            self.shared().decoded.invalidate(
                self.worker.image.layer.id,
                first << bits,
                (first + count) << bits,
            );
            for cluster in *first..first + count {
                if let Err(error) = refcounts.load(&self.worker, cluster).await {
                    keep(cluster);
                    result = Err(error);
                    continue;
                }
                // Free from here on: what the allocator knows of it changes in the same moment.
                refcounts.set(cluster, 0);
                image.allocator.released(cluster, 1, punched);
                Shared::count(&self.shared().stats.freed_clusters, 1);
            }
        }
        if planted::is(Bug::LatePunch) {
            self.punch(&free).await;
        }
        result
    }

    /// Gives ranges back to the file system; says of each whether that worked.
    async fn punch(&self, ranges: &[(u64, u64)]) -> Vec<bool> {
        let properties = self.worker.files.properties(self.worker.image.file());
        let possible = properties.can_punch && !self.no_punch.get();
        if !self.shared().options.discard || !possible {
            return vec![false; ranges.len()];
        }
        let bits = self.image().allocator.refcounts.geometry.cluster_bits();
        let outcomes = std::cell::RefCell::new(vec![false; ranges.len()]);
        let mut running: Window<'_, Error> = Window::new(self.shared().options.sizes.parts_at_once);
        for (index, (first, count)) in ranges.iter().enumerate() {
            let (offset, len) = (first << bits, count << bits);
            let outcomes = &outcomes;
            let part = async move {
                match self
                    .worker
                    .files
                    .simple("punch", self.worker.image.file(), offset, len, || {
                        OpKind::Punch { offset, len }
                    })
                    .await
                {
                    Ok(()) => outcomes.borrow_mut()[index] = true,
                    Err(error) => {
                        // Not punched is no harm: the cluster is free all the same, and not taken for zero.
                        tracing::debug!(image = self.shared().image_name(), %error, "punch failed");
                        if error.errno() == EOPNOTSUPP {
                            outcomes.borrow_mut()[index] = planted::is(Bug::PunchTakenForDone);
                            self.no_punch.set(true);
                        }
                    }
                }
                Ok(())
            };
            running.start(part).await;
        }
        let _: Result<()> = running.end().await;
        outcomes.into_inner()
    }

    /// The planted bug O5: punches before the removal is durable.
    pub(crate) async fn punch_early(&self, removed: &[Removed]) {
        let ranges: Vec<_> = removed
            .iter()
            .map(|removed| (removed.first, removed.count))
            .collect();
        self.punch(&ranges).await;
    }

    /// The planted bug O6: lowers refcounts with the commit that removes the pointer.
    pub(crate) async fn decrement_early(&self, removed: &[Removed]) -> Result<()> {
        self.settle(removed).await
    }
}

#[cfg(test)]
mod tests {
    //! Guards against a cluster of a damaged image that is freed though it may be somebody else's.

    use super::*;

    /// A step is bounded, whatever the runs are; a cluster that occurs twice has lost two references.
    #[test]
    fn a_step_takes_a_bounded_part_of_what_was_removed() {
        let step = 4096;
        let mut todo = VecDeque::from([(10, 3), (11, 1), (100, 2 * step)]);
        let first = take_step(&mut todo, step);
        assert_eq!(first.values().sum::<u64>(), step);
        assert_eq!((first[&10], first[&11], first[&12]), (1, 2, 1));
        assert_eq!(first.keys().last().copied(), Some(100 + step - 5));
        assert_eq!(take_step(&mut todo, step).len() as u64, step);
        assert_eq!(todo, [(96 + 2 * step, 4)]);
        let last = take_step(&mut todo, step);
        assert_eq!((last.len(), last[&(96 + 2 * step)]), (4, 1));
        assert!(todo.is_empty() && take_step(&mut todo, step).is_empty());
    }

    /// O7: a request that began between two removals may use what the second took away, though the first is over.
    #[test]
    fn each_removal_waits_for_its_own_mark() {
        let removed = |mark| Removed {
            first: mark * 10,
            count: 1,
            mark,
        };
        let mut settling: VecDeque<_> = [1, 2, 2, 4, 3].map(removed).into();
        let mut take = |passed: u64| -> Vec<u64> {
            let ready = take_passed(&mut settling, |mark| mark <= passed);
            ready.iter().map(|removed| removed.mark).collect()
        };
        assert_eq!(take(0), []);
        assert_eq!(take(1), [1]);
        assert_eq!(take(2), [2, 2]);
        assert_eq!(take(3), [], "in order");
        assert_eq!(take(4), [4, 3]);
        assert_eq!(take(9), []);
    }

    #[test]
    fn what_was_free_all_along_is_left_alone() {
        for (refcount, lost, expected) in [
            (3, 1, Left::References(2)),
            (2, 1, Left::References(1)),
            (1, 1, Left::Nothing),
            (2, 2, Left::Nothing),
            (1, 2, Left::LessThanNothing),
            (0, 1, Left::Foreign),
            (0, 2, Left::Foreign),
        ] {
            let found = left(refcount, lost);
            assert_eq!(found, expected, "{refcount} - {lost}");
            assert_eq!(found.is_too_few(), refcount < lost);
        }
    }
}
