//! Which errors were injected into what: kind of operation, what lies there, kind of error. An error sweep that only ever
//! hits guest data would look as thorough as one that hits everything.

use std::collections::BTreeSet;
use std::fmt;

use urus_engine::storage::{FileId, OpKind};

use crate::checker::Owners;
use crate::crash::Class;
use crate::fault::{ACTIONS, Action, OpClass};
use crate::memory::SimMemory;
use crate::world::IMAGE;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Does {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Writes, and is durable when it has ended.
    DurableWrite,
    /// Gives room back.
    Punch,
    /// Makes zeroes.
    Zero,
    /// Takes room.
    Allocate,
    /// Makes what was written durable.
    Sync,
    /// Changes the file's length.
    SetLength,
}

impl Does {
    pub(crate) fn of(kind: &OpKind<SimMemory>) -> Option<Self> {
        Some(match kind {
            OpKind::Read { .. } => Self::Read,
            OpKind::Write { sync: false, .. } => Self::Write,
            OpKind::Write { sync: true, .. } => Self::DurableWrite,
            OpKind::Punch { .. } => Self::Punch,
            OpKind::ZeroRange { .. } => Self::Zero,
            OpKind::Allocate { .. } => Self::Allocate,
            OpKind::SyncData => Self::Sync,
            OpKind::SetLen { .. } => Self::SetLength,
            OpKind::Job(_) => return None,
        })
    }

    pub(crate) fn class(self) -> OpClass {
        match self {
            Self::Read => OpClass::Read,
            Self::Write | Self::DurableWrite => OpClass::Write,
            Self::Zero | Self::Allocate | Self::SetLength => OpClass::Space,
            Self::Punch => OpClass::Punch,
            Self::Sync => OpClass::Sync,
        }
    }
}

/// Where an operation works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// On the image as a whole.
    Image,
    /// Where this lies.
    On(Class),
    /// In a backing file.
    Behind,
}

/// An operation that was submitted, and what went wrong with it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch {
    pub(crate) does: Does,
    pub(crate) handle: usize,
    pub(crate) file: FileId,
    pub(crate) offset: u64,
    pub(crate) action: Option<Action>,
}

/// A kind of operation: what it does, where, and whether maintenance does it or a queue.
pub(crate) type Kind = (Does, Place, bool);

impl Touch {
    pub(crate) fn kind(&self, owners: &Owners) -> Kind {
        // Maintenance opens the device, before there is a queue.
        (self.does, self.place(owners), self.handle == 0)
    }

    /// A write of the header that fails, and is not tried again.
    pub(crate) fn fails_header(&self) -> bool {
        let transient = |action| matches!(action, Action::Eintr | Action::Eagain);
        self.file == IMAGE
            && self.offset == 0
            && matches!(self.does, Does::Write | Does::DurableWrite)
            && self.action.is_some_and(|action| !transient(action))
    }

    fn place(&self, owners: &Owners) -> Place {
        match self.does {
            _ if self.file != IMAGE => Place::Behind,
            Does::Sync | Does::SetLength => Place::Image,
            _ => Place::On(Class::from(owners.at(self.offset))),
        }
    }
}

/// Operations seen in runs with errors, and the errors that hit them.
#[derive(Clone, Debug, Default)]
pub struct Census {
    met: BTreeSet<(Does, Place)>,
    hit: BTreeSet<(Does, Place, Action)>,
}

impl Census {
    /// What a machine did; `owners` says what lies where.
    pub(crate) fn take(&mut self, touches: &[Touch], owners: &Owners) {
        for touch in touches {
            let place = touch.place(owners);
            self.met.insert((touch.does, place));
            self.hit
                .extend(touch.action.map(|action| (touch.does, place, action)));
        }
    }

    /// Adds what another one has seen.
    pub fn add(&mut self, other: Self) {
        self.met.extend(other.met);
        self.hit.extend(other.hit);
    }

    /// Of all that occurred, with each error that it can have: those that were never injected.
    fn missed(&self) -> Vec<(Does, Place, Action)> {
        let possible = self.met.iter().flat_map(|(does, place)| {
            let fitting = ACTIONS
                .into_iter()
                .filter(|action| action.fits(does.class()));
            fitting.map(|action| (*does, *place, action))
        });
        possible
            .filter(|triple| !self.hit.contains(triple))
            .collect()
    }

    /// Whether errors were injected at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hit.is_empty()
    }
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missed = self.missed();
        let hit = self.hit.len();
        write!(
            f,
            "injected: {hit} of {} kinds of error, at {} kinds of operation (what it does, and where)",
            hit + missed.len(),
            self.met.len()
        )?;
        for (does, place, action) in missed {
            write!(f, "\n  not injected: {action:?} at {does:?} of {place:?}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Guards against a share of 100 % that comes from counting nothing.

    use super::*;

    fn touch(does: Does, action: Option<Action>) -> Touch {
        Touch {
            does,
            handle: 0,
            file: IMAGE,
            offset: 0,
            action,
        }
    }

    #[test]
    fn what_was_met_and_not_hit_is_told() {
        let mut census = Census::default();
        assert!(census.is_empty());
        let owners = Owners::default();
        census.take(&[touch(Does::Sync, Some(Action::Eio))], &owners);
        census.take(&[touch(Does::Read, None)], &owners);
        // A sync has four errors, a read six.
        assert_eq!(census.missed().len(), 3 + 6);
        assert!(census.to_string().starts_with("injected: 1 of 10 kinds"));
        let mut other = Census::default();
        other.take(
            &[
                touch(Does::Sync, Some(Action::Eintr)),
                touch(Does::Sync, Some(Action::Eagain)),
                touch(Does::Sync, Some(Action::Eopnotsupp)),
            ],
            &owners,
        );
        census.add(other);
        assert_eq!(census.missed().len(), 6);
    }
}
