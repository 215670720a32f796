//! Who waits for an operation: the return addresses on the stack where it is submitted. A future is polled through all that await it,
//! so these are the places that an error of the operation goes through. With the feature `callers` only; else nobody is known.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::fault::Action;

/// Return addresses, the innermost first.
pub(crate) type Callers = Vec<usize>;

/// Those of whoever calls this.
#[cfg(feature = "callers")]
pub(crate) fn callers() -> Callers {
    let mut callers = Vec::new();
    backtrace::trace(|frame| {
        callers.push(frame.ip().addr());
        true
    });
    callers
}

#[cfg(not(feature = "callers"))]
pub(crate) fn callers() -> Callers {
    Callers::new()
}

/// The callers of all that can fail in a workload, each in order of its number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) ops: Vec<Callers>,
    pub(crate) lengths: Vec<Callers>,
    pub(crate) memories: Vec<Callers>,
}

/// How often an error went to each place, over many workloads.
#[derive(Debug, Default)]
pub(crate) struct Failed(Mutex<BTreeMap<(usize, Action), u64>>);

/// So many errors of a kind are enough for a place.
const ENOUGH: u64 = 3;

impl Failed {
    /// Of some errors, each with its callers: the one that goes to the place which had fewest, if that had few. It counts as done.
    pub(crate) fn take_rarest<'a, T>(
        &self,
        errors: impl Iterator<Item = (T, Action, &'a Callers)>,
    ) -> Option<T> {
        let mut failed = self.counts();
        let count = |failed: &BTreeMap<_, u64>, address: usize, action| {
            failed.get(&(address, action)).copied().unwrap_or(0)
        };
        let rarity = |action, callers: &Callers| {
            let counts = callers.iter();
            counts.map(|at| count(&failed, *at, action)).min()
        };
        let (error, action, callers, _) = errors
            .filter_map(|(error, action, callers)| {
                let rarity = rarity(action, callers)?;
                (rarity < ENOUGH).then_some((error, action, callers, rarity))
            })
            .min_by_key(|(.., rarity)| *rarity)?;
        for address in callers {
            *failed.entry((*address, action)).or_default() += 1;
        }
        Some(error)
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<(usize, Action), u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    //! Guards against errors that go to the same places again and again.

    use super::*;

    #[test]
    fn each_place_has_its_errors_and_then_no_more() {
        let errors = [("a", vec![1, 2]), ("b", vec![1, 3]), ("c", vec![1])];
        let failed = Failed::default();
        let take = || {
            let errors = errors.iter();
            failed.take_rarest(errors.map(|(name, callers)| (*name, Action::Eio, callers)))
        };
        let taken: Vec<_> = std::iter::from_fn(take).collect();
        let count = |wanted| taken.iter().filter(|name| **name == wanted).count() as u64;
        // Place 1 has had enough with the others.
        assert_eq!([count("a"), count("b"), count("c")], [ENOUGH, ENOUGH, 0]);
        let callers = vec![2];
        let other = failed.take_rarest([((), Action::Enospc, &callers)].into_iter());
        assert_eq!(other, Some(()), "another kind of error is counted apart");
    }

    #[cfg(feature = "callers")]
    #[test]
    fn two_places_differ() {
        let (one, two) = (callers(), callers());
        assert!(one.len() > 1);
        assert_ne!(one, two);
    }
}
