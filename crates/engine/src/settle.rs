//! What becomes of removed references once their removal is durable: wait for requests in flight (O7), punch (O5),
//! lower the refcount (O6), hand out again (O4).

use std::future::poll_fn;
use std::task::Poll;

use crate::error::{Error, Result};
use crate::maintenance::Device;
use crate::planted::{self, Bug};
use crate::shared::{Removed, Shared};
use crate::storage::{IMAGE, OpKind, Storage};
use crate::wake::{Parts, join_all};

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
            let mut meta = self.shared().meta.lock();
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
            let mut ready = Vec::new();
            while let Some(removed) = settling.front().copied() {
                if !pins.passed(removed.mark) && !planted::is(Bug::NoInFlightPins) {
                    break;
                }
                settling.pop_front();
                ready.push(removed);
            }
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

    /// O4: a cluster whose last reference is gone is free, unless it holds metadata: what owns that gives it up before it removes it.
    /// What fails is kept for the next time.
    async fn settle(&self, ready: &[Removed]) -> Result<()> {
        let image = self.image();
        let refcounts = &image.allocator.refcounts;
        let mut lost = std::mem::take(&mut *self.unsettled.borrow_mut());
        for removed in ready {
            for cluster in removed.first..removed.first + removed.count {
                *lost.entry(cluster).or_default() += 1;
            }
        }
        let mut result = Ok(());
        let keep = |cluster: u64| {
            let mut unsettled = self.unsettled.borrow_mut();
            *unsettled.entry(cluster).or_default() += lost[&cluster];
        };
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
            if let Some(owner) = self.shared().meta.lock().owners.get(cluster) {
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
            self.shared()
                .decoded
                .invalidate(0, first << bits, (first + count) << bits);
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
        let properties = self.worker.reactor.properties(IMAGE);
        let possible = properties.can_punch && !self.no_punch.get();
        if !self.shared().options.discard || !possible {
            return vec![false; ranges.len()];
        }
        let bits = self.image().allocator.refcounts.geometry.cluster_bits();
        let outcomes = std::cell::RefCell::new(vec![false; ranges.len()]);
        let mut running: Parts<'_, Error> = Vec::new();
        for (index, (first, count)) in ranges.iter().enumerate() {
            let (offset, len) = (first << bits, count << bits);
            let outcomes = &outcomes;
            running.push(Box::pin(async move {
                match self
                    .worker
                    .simple("punch", IMAGE, offset, len, || OpKind::Punch {
                        offset,
                        len,
                    })
                    .await
                {
                    Ok(()) => outcomes.borrow_mut()[index] = true,
                    Err(error) => {
                        // Not punched is no harm: the cluster is free all the same, and not taken for zero.
                        tracing::debug!(image = self.shared().image_name(), %error, "punch failed");
                        if error.errno() == 95 {
                            outcomes.borrow_mut()[index] = planted::is(Bug::PunchTakenForDone);
                            self.no_punch.set(true);
                        }
                    }
                }
                Ok(())
            }));
        }
        let _: Result<()> = join_all(running).await;
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
