//! An error at every I/O: a workload is run again and again, each time with something going wrong at another operation.

use std::collections::BTreeMap;

use crate::callers::{Asked, Callers, Failed};
use crate::census::{Does, Kind, Place};
use crate::config::Config;
use crate::contents::index;
use crate::crash::Class;
use crate::fault::{ACTIONS, Action, Fault, Trigger};
use crate::rng::Rng;
use crate::runner::{Effort, Outcome, run_with};

/// How the errors come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// At one operation.
    Once(u64, Action),
    /// At one operation and all later ones, until the fault is lifted.
    From(u64, Action),
    /// At one operation in so many, from the first number on.
    Every(u64, u64, Action),
    /// At one fdatasync.
    Sync(u64, Action),
    /// At one question for a file's length.
    Length(u64),
    /// At so many operations in a row, from one on: what makes a failure good may fail, too.
    Row(u64, u64, Action),
    /// At one of the engine's requests for memory, and so many after it.
    Memory(u64, u64),
}

/// Of a [`Injection::Row`].
const ROW: u64 = 4;

/// What can happen to operations of almost every kind.
const COMMON: [Action; 7] = {
    let [common @ .., _] = ACTIONS;
    common
};

/// Opening asks for lengths, and so does every read that ends inside a sector: so many of the first questions fail in turn.
const LENGTHS: u64 = 24;

/// So many of the first requests for memory are refused in turn, alone and with all that follow.
const MEMORIES: u64 = 64;

impl Injection {
    /// As the world takes it.
    #[must_use]
    pub fn fault(self) -> Fault {
        let (trigger, action) = match self {
            Self::Once(op, action) => (Trigger::Op(op), action),
            Self::From(op, action) => (Trigger::Ops(op, u64::MAX), action),
            Self::Every(first, of, action) => (Trigger::Every(first, of), action),
            Self::Sync(sync, action) => (Trigger::Sync(sync), action),
            Self::Length(question) => (Trigger::Length(question), Action::Eio),
            Self::Row(op, count, action) => (Trigger::Ops(op, op + count), action),
            Self::Memory(first, count) => (Trigger::Memory(first, count), Action::Eio),
        };
        Fault { trigger, action }
    }

    /// Drawn by lot, for a workload of so many operations and fdatasyncs.
    #[must_use]
    pub fn random(rng: &mut Rng, ops: u64, syncs: u64) -> Self {
        let mut lot = rng.fork(ops);
        let op = lot.below(ops + 1);
        match lot.index(24) {
            0 => return Self::From(op, Action::Eopnotsupp),
            1 | 2 => return Self::Once(op, Action::Eopnotsupp),
            3 => return Self::Row(op, ROW, Action::Eio),
            _ => {}
        }
        let action = COMMON[rng.index(COMMON.len())];
        match rng.index(8) {
            0 => Self::From(rng.below(ops + 1), Action::Enospc),
            1 | 2 => Self::Sync(rng.below(syncs + 1), Action::Eio),
            _ => Self::Once(rng.below(ops + 1), action),
        }
    }

    /// Every operation with every action, every operation with ENOSPC or EIO from there on, errors again and again, every
    /// fdatasync failing, every one of the first questions for a length and of the first requests for memory.
    #[must_use]
    pub fn every(ops: u64, syncs: u64) -> Vec<Self> {
        let mut all = Vec::new();
        for op in 0..ops {
            all.extend(COMMON.map(|action| Self::Once(op, action)));
            all.extend([Action::Enospc, Action::Eio].map(|action| Self::From(op, action)));
        }
        for action in [Action::Eio, Action::Enospc] {
            let often = |of: u64| (0..of.min(ops)).map(move |first| Self::Every(first, of, action));
            all.extend([5, 11, 23].into_iter().flat_map(often));
        }
        all.extend((0..syncs).map(|sync| Self::Sync(sync, Action::Eio)));
        all.extend((0..LENGTHS).map(Self::Length));
        all.extend((0..MEMORIES).map(|request| Self::Memory(request, 1)));
        all.extend((0..MEMORIES).map(|request| Self::Memory(request, u64::MAX)));
        all
    }
}

/// A workload without errors: the number of its storage operations and fdatasyncs, and what its operations are.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Storage operations.
    pub ops: u64,
    /// Of them, fdatasyncs.
    pub syncs: u64,
    kinds: Vec<Kind>,
    asked: Asked,
}

/// Measures a workload. It goes as it does with an error, up to the error.
///
/// # Errors
/// What is wrong even without errors.
pub fn measure(config: &Config, seed: u64, effort: &Effort) -> Result<Measured, String> {
    let never = Injection::Sync(u64::MAX, Action::Eio);
    let outcome = run_with(config, seed, effort, Some(never));
    let measured = Measured {
        ops: outcome.ops,
        syncs: outcome.syncs,
        kinds: outcome.kinds,
        asked: outcome.asked,
    };
    outcome.violation.map_or(Ok(measured), Err)
}

/// Errors that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sort {
    Once(Kind, Hardness),
    From(Action),
    Every,
    Sync,
    /// The first ones are asked while it opens.
    Length(u64),
    Row(Kind),
    Memory,
}

/// What an operation makes of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Hardness {
    TriedAgain,
    Fails,
    TriedOtherwise,
}

impl Measured {
    /// Every error of this workload: those of any workload; then EOPNOTSUPP, once and from then on, where that can be; and errors in a row
    /// where metadata is read or written.
    #[must_use]
    pub fn every(&self) -> Vec<Injection> {
        let mut all = Injection::every(self.ops, self.syncs);
        for (op, (does, place, _)) in (0..).zip(&self.kinds) {
            if Action::Eopnotsupp.fits(does.class()) {
                all.push(Injection::Once(op, Action::Eopnotsupp));
                all.push(Injection::From(op, Action::Eopnotsupp));
            }
            let is_metadata =
                matches!(place, Place::On(class) if !matches!(class, Class::Data | Class::Unknown));
            if is_metadata && matches!(does, Does::Read | Does::Write | Does::DurableWrite) {
                all.push(Injection::Row(op, ROW, Action::Eio));
            }
        }
        all
    }

    /// The operations that do this, there.
    pub fn operations(&self, does: Does, place: Place) -> impl Iterator<Item = u64> {
        let kinds = (0..).zip(&self.kinds);
        kinds
            .filter(move |(_, kind)| (kind.0, kind.1) == (does, place))
            .map(|(op, _)| op)
    }

    /// Some of all errors, each with its number, by lot: as many of one sort as of another, since most operations are alike (reads and
    /// writes of data) and most code is about the others.
    #[must_use]
    pub fn some(&self, most: usize, rng: &mut Rng) -> Vec<(usize, Injection)> {
        let mut sorts: BTreeMap<Sort, Vec<(usize, Injection)>> = BTreeMap::new();
        for (number, injection) in (0..).zip(self.every()) {
            if let Some(sort) = self.sort(injection) {
                sorts.entry(sort).or_default().push((number, injection));
            }
        }
        let mut sorts: Vec<_> = sorts.into_values().collect();
        let mut drawn = Vec::new();
        while drawn.len() < most && !sorts.is_empty() {
            let at = rng.index(sorts.len());
            let sort = &mut sorts[at];
            drawn.push(sort.swap_remove(rng.index(sort.len())));
            if sort.is_empty() {
                sorts.swap_remove(at);
            }
        }
        drawn
    }

    /// Some of all errors, each with its number: those first that go to places where few have gone before, as far as callers are known;
    /// the rest by lot.
    #[must_use]
    pub(crate) fn rare(
        &self,
        most: usize,
        rng: &mut Rng,
        failed: &Failed,
    ) -> Vec<(usize, Injection)> {
        let mut alike: BTreeMap<(Action, &Callers), Vec<(usize, Injection)>> = BTreeMap::new();
        for (number, injection) in (0..).zip(self.every()) {
            if let Some(asked) = self.asked_by(injection) {
                alike.entry(asked).or_default().push((number, injection));
            }
        }
        let mut take = || {
            let errors = alike.iter();
            let errors = errors.map(|((action, callers), errors)| (errors, *action, *callers));
            let errors = failed.take_rarest(errors)?;
            Some(errors[rng.index(errors.len())])
        };
        let mut drawn: Vec<_> = std::iter::from_fn(&mut take).take(most).collect();
        drawn.extend(self.some(most - drawn.len(), rng));
        drawn
    }

    /// Whom an error goes to, if it ends what it hits.
    fn asked_by(&self, injection: Injection) -> Option<(Action, &Callers)> {
        let (action, callers) = match injection {
            Injection::Once(op, action) if action.is_hard() => {
                let does = self.kinds.get(index(op))?.0;
                if !action.fits(does.class()) {
                    return None;
                }
                (action, self.asked.ops.get(index(op)))
            }
            // Counted apart from single errors, and there is no such thing in a row.
            Injection::Row(op, ..) => (Action::ShortToZero, self.asked.ops.get(index(op))),
            Injection::Length(question) => (Action::Eio, self.asked.lengths.get(index(question))),
            Injection::Memory(request, 1) => (Action::Eio, self.asked.memories.get(index(request))),
            _ => return None,
        };
        callers.map(|callers| (action, callers))
    }

    /// Nothing where the operation cannot fail so.
    fn sort(&self, injection: Injection) -> Option<Sort> {
        Some(match injection {
            Injection::Once(op, action) => {
                let kind = *self.kinds.get(index(op))?;
                if !action.fits(kind.0.class()) {
                    return None;
                }
                let hardness = match action {
                    Action::Eopnotsupp => Hardness::TriedOtherwise,
                    _ if action.is_hard() => Hardness::Fails,
                    _ => Hardness::TriedAgain,
                };
                Sort::Once(kind, hardness)
            }
            Injection::From(_, action) => Sort::From(action),
            Injection::Every(..) => Sort::Every,
            Injection::Sync(..) => Sort::Sync,
            Injection::Length(question) => Sort::Length(question.min(8)),
            Injection::Row(op, ..) => Sort::Row(*self.kinds.get(index(op))?),
            Injection::Memory(..) => Sort::Memory,
        })
    }
}

/// Runs a workload with errors drawn by lot.
#[must_use]
pub fn run_random(config: &Config, seed: u64, effort: &Effort) -> Outcome {
    let mut rng = Rng::new(seed ^ 0x6572_726f_7273);
    // Workloads have some 2 to 6 operations for each request.
    let injection = Injection::random(&mut rng, effort.requests * 4, effort.requests / 4);
    run_with(config, seed, effort, Some(injection))
}

#[cfg(test)]
mod tests {
    //! Guards against a lot that falls on data only.

    use std::collections::BTreeSet;

    use super::*;
    use crate::config;

    #[test]
    fn few_errors_are_of_many_sorts() {
        let config = config::find("snapshot, three queues").expect("there is one");
        let measured = measure(&config, 1, &Effort::ERRORS).expect("sound without errors");
        let every = measured.every();
        let some = measured.some(40, &mut Rng::new(1));
        assert_eq!(some.len(), 40);
        let sorts: BTreeSet<Sort> = some
            .iter()
            .filter_map(|(number, injection)| {
                assert_eq!(every[*number], *injection);
                measured.sort(*injection)
            })
            .collect();
        assert!(sorts.len() > 15, "{sorts:?}");
        let all = measured.some(usize::MAX, &mut Rng::new(1));
        let numbers: BTreeSet<usize> = all.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers.len(), all.len(), "none comes twice");
        assert!(all.len() < every.len() && all.len() > 200);
    }
}
