//! Errors that storage gives back on request.

use std::io;

use crate::callers::{Asked, callers};
use crate::census::Touch;

/// Numbers of the errors that the simulator gives, as on Linux.
pub(crate) mod errno {
    pub(crate) const EINTR: i32 = 4;
    pub(crate) const EIO: i32 = 5;
    pub(crate) const EBADF: i32 = 9;
    pub(crate) const EAGAIN: i32 = 11;
    pub(crate) const EINVAL: i32 = 22;
    pub(crate) const EFBIG: i32 = 27;
    pub(crate) const ENOSPC: i32 = 28;
    pub(crate) const EOPNOTSUPP: i32 = 95;
}

pub(crate) fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// Which operations a fault hits. Storage operations are numbered from 0 in order of submission; jobs do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The operation with this number.
    Op(u64),
    /// Every operation from the first number up to, not including, the second.
    Ops(u64, u64),
    /// One in so many, counted from the first number, except fdatasyncs.
    Every(u64, u64),
    /// The fdatasync with this number (they are also counted apart, from 0).
    Sync(u64),
    /// The question for a file's length with this number (no operation, and counted apart, from 0).
    Length(u64),
    /// The engine's request for memory with this number, and so many after it (no operation, and counted apart, from 0).
    Memory(u64, u64),
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// It fails with EIO. A change may have taken effect in any part. A failed fdatasync makes nothing durable, ever.
    Eio,
    /// It fails with ENOSPC if it may take space; nothing is changed.
    Enospc,
    /// It fails with EINTR; nothing is changed.
    Eintr,
    /// It fails with EAGAIN; nothing is changed.
    Eagain,
    /// A read or write that ends one sector (or one byte, if it is shorter than that) early.
    ShortBySector,
    /// A read or write that does half.
    ShortByHalf,
    /// A read or write that does nothing and reports 0.
    ShortToZero,
    /// It fails with EOPNOTSUPP: the file system cannot do it, and nothing is changed. A failed fdatasync makes nothing durable, ever.
    Eopnotsupp,
}

impl Action {
    /// Whether it ends the operation, and is not tried again.
    pub(crate) fn is_hard(self) -> bool {
        matches!(self, Self::Eio | Self::Enospc | Self::Eopnotsupp)
    }

    /// Whether it can happen to such an operation.
    pub(crate) fn fits(self, class: OpClass) -> bool {
        match self {
            Self::Eio | Self::Eintr | Self::Eagain => true,
            Self::Enospc => matches!(class, OpClass::Write | OpClass::Space),
            Self::ShortBySector | Self::ShortByHalf | Self::ShortToZero => {
                matches!(class, OpClass::Read | OpClass::Write)
            }
            Self::Eopnotsupp => matches!(class, OpClass::Space | OpClass::Punch | OpClass::Sync),
        }
    }
}

/// All actions, for sweeps.
pub const ACTIONS: [Action; 8] = [
    Action::Eio,
    Action::Enospc,
    Action::Eintr,
    Action::Eagain,
    Action::ShortBySector,
    Action::ShortByHalf,
    Action::ShortToZero,
    Action::Eopnotsupp,
];

/// A planned error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub trigger: Trigger,
    /// What.
    pub action: Action,
}

/// Kind of a storage operation, as far as faults care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpClass {
    Read,
    Write,
    /// Zero range, allocate, set length: may take space.
    Space,
    Punch,
    Sync,
}

/// The planned errors and how far the run has come.
#[derive(Clone, Debug, Default)]
pub(crate) struct FaultPlan {
    pub(crate) faults: Vec<Fault>,
    pub(crate) ops: u64,
    pub(crate) syncs: u64,
    lengths: u64,
    pub(crate) memories: u64,
    /// How often a fault really hit.
    pub(crate) injected: u64,
    /// How often it hit an fdatasync.
    pub(crate) injected_syncs: u64,
    /// Every operation, where errors were ever planned.
    pub(crate) touches: Option<Vec<Touch>>,
    /// Who asked for all this, from then on.
    pub(crate) asked: Asked,
}

impl FaultPlan {
    /// Counts an operation and says what goes wrong with it.
    pub(crate) fn next(&mut self, class: OpClass) -> Option<Action> {
        if self.touches.is_some() {
            self.asked.ops.push(callers());
        }
        let (op, sync) = (self.ops, self.syncs);
        self.ops += 1;
        self.syncs += u64::from(class == OpClass::Sync);
        let hit = |fault: &&Fault| {
            let now = match fault.trigger {
                Trigger::Op(k) => k == op,
                Trigger::Ops(from, to) => (from..to).contains(&op),
                Trigger::Every(first, of) => {
                    class != OpClass::Sync && op >= first && (op - first).is_multiple_of(of)
                }
                Trigger::Sync(k) => class == OpClass::Sync && k == sync,
                Trigger::Length(_) | Trigger::Memory(..) => false,
            };
            now && fault.action.fits(class)
        };
        let action = self.faults.iter().find(hit).map(|fault| fault.action);
        self.injected += u64::from(action.is_some());
        self.injected_syncs += u64::from(action.is_some() && class == OpClass::Sync);
        action
    }

    /// Counts a question for a file's length, and says whether it fails.
    pub(crate) fn next_length(&mut self) -> bool {
        if self.touches.is_some() {
            self.asked.lengths.push(callers());
        }
        let number = self.lengths;
        self.lengths += 1;
        let fails = |fault: &Fault| fault.trigger == Trigger::Length(number);
        let fails = self.faults.iter().any(fails);
        self.injected += u64::from(fails);
        fails
    }

    /// Counts a request for memory, and says whether it is refused.
    pub(crate) fn next_memory(&mut self) -> bool {
        if self.touches.is_some() {
            self.asked.memories.push(callers());
        }
        let number = self.memories;
        self.memories += 1;
        let refuses = |fault: &Fault| match fault.trigger {
            Trigger::Memory(first, count) => (first..first.saturating_add(count)).contains(&number),
            _ => false,
        };
        let refuses = self.faults.iter().any(refuses);
        self.injected += u64::from(refuses);
        refuses
    }
}
