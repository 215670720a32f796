//! One operation's life: submitted, in effect (maybe in two parts), arrived.

use std::io;
use std::rc::Rc;

use urus_engine::storage::{FileId, Memory, Op, OpKind, Slot};

use crate::census::{Does, Touch};
use crate::contents::{Change, Keep, SECTOR, index};
use crate::fault::{Action, errno, error};
use crate::log::{Event, OpId};
use crate::memory::SimMemory;
use crate::storage::bytes_of;
use crate::world::{File, MAX_FILE_BYTES, STUCK_STEPS_BITS, World};

pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// What a step did.
pub(crate) enum Outcome {
    Idle,
    Done,
    /// To be run when the world is released; then its completion lands.
    Job(Job, Landed),
}

/// An operation that has ended; its completion is on the way.
pub(crate) struct Landed {
    pub(crate) op: OpId,
    pub(crate) handle: usize,
    pub(crate) slot: Slot,
    pub(crate) result: io::Result<usize>,
    /// Whether the log knows it (changes and syncs).
    pub(crate) logged: bool,
    /// It is not delivered before this step.
    pub(crate) held_until: u64,
}

/// An operation that has not ended.
pub(crate) struct Running {
    pub(crate) op: OpId,
    pub(crate) handle: usize,
    pub(crate) slot: Slot,
    pub(crate) file: FileId,
    pub(crate) kind: OpKind<SimMemory>,
    pub(crate) kicked: bool,
    pub(crate) slow: bool,
    /// Nothing happens before this step.
    pub(crate) stuck_until: u64,
    /// Its completion is not delivered before this step.
    held_until: u64,
    fault: Option<Action>,
    /// The sectors still to do, once a first part is done.
    left: Option<Rc<[bool]>>,
    /// What a write's memory held when it was submitted.
    at_submission: Option<Rc<[u8]>>,
    /// A read in two parts reports no more than the file held at its first one.
    most: u64,
}

/// The bytes that a read's memory holds until it is read: whoever looks before the completion sees these.
const JUNK: u8 = 0xd5;

/// Number, offset and length, for the trace.
fn outline(kind: &OpKind<SimMemory>) -> (u64, u64, u64) {
    match kind {
        OpKind::Read { offset, memory } => (1, *offset, bytes_of(memory)),
        OpKind::Write {
            offset,
            memory,
            sync,
        } => (2 + u64::from(*sync), *offset, bytes_of(memory)),
        OpKind::Punch { offset, len } => (4, *offset, *len),
        OpKind::ZeroRange { offset, len } => (5, *offset, *len),
        OpKind::Allocate { offset, len } => (6, *offset, *len),
        OpKind::SyncData => (7, 0, 0),
        OpKind::SetLen { len } => (8, 0, *len),
        OpKind::Job(_) => (9, 0, 0),
    }
}

/// The change that an operation asks for; `data` is what a write's memory holds.
fn change_of(kind: &OpKind<SimMemory>, data: Option<&Rc<[u8]>>) -> Option<Change> {
    match kind {
        OpKind::Write { offset, .. } => Some(Change::Write {
            offset: *offset,
            data: Rc::clone(data.expect("a write has data")),
        }),
        OpKind::Punch { offset, len } => Some(Change::Zero {
            offset: *offset,
            len: *len,
            extends: false,
        }),
        OpKind::ZeroRange { offset, len } => Some(Change::Zero {
            offset: *offset,
            len: *len,
            extends: true,
        }),
        OpKind::Allocate { offset, len } => Some(Change::Allocate { end: offset + len }),
        OpKind::SetLen { len } => Some(Change::SetLen(*len)),
        OpKind::Read { .. } | OpKind::SyncData | OpKind::Job(_) => None,
    }
}

impl World {
    /// Takes an operation from a handle, or gives it back.
    pub(crate) fn submit(
        &mut self,
        handle: usize,
        op: Op<SimMemory>,
        slot: Slot,
    ) -> Result<(), Op<SimMemory>> {
        let in_flight = self.handles[handle].in_flight.len();
        let refuse = self.config.refuse;
        if in_flight >= self.config.depth || (in_flight > 0 && self.rng.chance(refuse)) {
            return Err(op);
        }
        assert!(
            !self.handles[handle].in_flight.contains(&slot),
            "slot {slot} is in flight"
        );
        self.handles[handle].in_flight.push(slot);
        self.idle_waits = 0;

        let Op { file, kind } = op;
        let id = self.new_op();
        let (number, offset, len) = outline(&kind);
        for value in [
            handle as u64,
            slot as u64,
            u64::from(file.0),
            number,
            offset,
            len,
        ] {
            self.trace.add(value);
        }
        let mut at_submission = None;
        match &kind {
            OpKind::Write { memory, .. } => {
                let data = memory.to_vec();
                self.trace.add_bytes(&data);
                at_submission = Some(data.into());
            }
            OpKind::Read { memory, .. } => memory.write(0, &vec![JUNK; memory.len()]),
            _ => {}
        }
        let does = Does::of(&kind);
        let fault = does.and_then(|does| self.faults.next(does.class()));
        if let (Some(does), Some(touches)) = (does, &mut self.faults.touches) {
            touches.push(Touch {
                does,
                handle,
                file,
                offset,
                action: fault,
            });
        }
        if let Some(change) = change_of(&kind, at_submission.as_ref()) {
            let sync = matches!(kind, OpKind::Write { sync: true, .. });
            self.record(Event::Submitted {
                op: id,
                file,
                change,
                sync,
            });
        } else if matches!(kind, OpKind::SyncData) {
            self.record(Event::SyncSubmitted { op: id, file });
        }
        let slow = self.rng.chance(self.config.slow);
        let (mut stuck_until, mut held_until) = (0, 0);
        if self.rng.chance(self.config.stuck) {
            let most = 1 << self.rng.below(STUCK_STEPS_BITS);
            let until = self.steps + self.rng.below(most);
            // Before it takes effect, or after.
            if self.rng.chance(128) {
                stuck_until = until;
            } else {
                held_until = until;
            }
        }
        let left = None;
        self.running.push(Running {
            op: id,
            handle,
            slot,
            file,
            kind,
            kicked: false,
            slow,
            stuck_until,
            held_until,
            fault,
            left,
            at_submission,
            most: u64::MAX,
        });
        Ok(())
    }

    /// A read that is no operation, made by lot. Never where errors are planned: those are for operations.
    pub(crate) fn read_now(&mut self, file: FileId, offset: u64, memory: &SimMemory) -> bool {
        let plan = &self.faults;
        if !plan.faults.is_empty() || plan.touches.is_some() || self.rng.chance(128) {
            return false;
        }
        let File {
            contents,
            properties,
            ..
        } = &self.files[usize::from(file.0)];
        let len = bytes_of(memory);
        let alignment = u64::from(properties.alignment);
        let bad = !offset.is_multiple_of(alignment)
            || !len.is_multiple_of(alignment)
            || !memory.is_aligned(properties.memory_alignment as usize);
        if !bad && offset + len <= contents.len() {
            let bytes = &contents.bytes()[index(offset)..index(offset + len)];
            memory.write(0, bytes);
            self.idle_waits = 0;
            for value in [0x9e, u64::from(file.0), offset, len] {
                self.trace.add(value);
            }
            return true;
        }
        if bad {
            self.complain(format!(
                "{file:?}: a read at {offset}, {len} bytes, is not aligned to {alignment}"
            ));
        }
        // Nobody may take this for what was read.
        memory.write(0, &vec![JUNK; memory.len()]);
        false
    }

    /// An operation takes effect, wholly or in part.
    pub(crate) fn advance(&mut self, op: Running) -> Outcome {
        self.trace.add(0xef ^ u64::from(op.op.0) << 8);
        if matches!(op.kind, OpKind::Job(_)) {
            let landed = op.landed(Ok(0));
            let OpKind::Job(job) = op.kind else {
                unreachable!("matched above")
            };
            return Outcome::Job(job, landed);
        }
        match &op.kind {
            OpKind::SyncData => self.sync(op),
            OpKind::Read { .. } => self.read(op),
            _ => self.change(op),
        }
        Outcome::Done
    }

    fn land(&mut self, op: &Running, result: io::Result<usize>) {
        match &result {
            Ok(bytes) => self.trace.add(*bytes as u64),
            Err(error) => self
                .trace
                .add(!0 ^ u64::from(error.raw_os_error().unwrap_or(0).unsigned_abs())),
        }
        self.landed.push(op.landed(result));
    }

    fn sync(&mut self, op: Running) {
        let result = op
            .fault
            .map_or(Ok(0), |action| Err(error(errno_of(action))));
        // EINTR and EAGAIN are no verdict about the data: as if the call had not been made.
        let transient = matches!(op.fault, Some(Action::Eintr | Action::Eagain));
        if !transient {
            self.record(Event::Synced {
                op: op.op,
                file: op.file,
                ok: result.is_ok(),
            });
        }
        self.land(&op, result);
    }

    fn is_misaligned(&mut self, op: &Running) -> bool {
        let (OpKind::Read { offset, memory } | OpKind::Write { offset, memory, .. }) = &op.kind
        else {
            return false;
        };
        let properties = self.files[usize::from(op.file.0)].properties;
        let alignment = u64::from(properties.alignment);
        let bad = !offset.is_multiple_of(alignment)
            || !bytes_of(memory).is_multiple_of(alignment)
            || !memory.is_aligned(properties.memory_alignment as usize);
        if bad {
            let len = memory.len();
            self.complain(format!(
                "{:?}: I/O at {offset}, {len} bytes, is not aligned to {alignment}",
                op.file
            ));
        }
        bad
    }

    fn read(&mut self, mut op: Running) {
        if self.is_misaligned(&op) {
            return self.land(&op, Err(error(errno::EINVAL)));
        }
        if let Some(action @ (Action::Eio | Action::Eintr | Action::Eagain | Action::Enospc)) =
            op.fault
        {
            return self.land(&op, Err(error(errno_of(action))));
        }
        let OpKind::Read { offset, memory } = &op.kind else {
            unreachable!("only reads come here")
        };
        let len = shortened(bytes_of(memory), op.fault);
        let contents = &self.files[usize::from(op.file.0)].contents;
        let available = contents.len().saturating_sub(*offset).min(len).min(op.most);
        let first = offset / SECTOR;
        let sectors = if len == 0 {
            0
        } else {
            index((offset + len - 1) / SECTOR - first + 1)
        };
        let split = op.left.is_none() && sectors > 1 && self.rng.chance(self.config.split);
        let now = if split {
            self.rng_mask(sectors)
        } else {
            op.left.take().unwrap_or_else(|| vec![true; sectors].into())
        };
        let contents = &self.files[usize::from(op.file.0)].contents;
        for sector in (0..sectors).filter(|sector| now[*sector]) {
            let from = ((first + sector as u64) * SECTOR).max(*offset);
            let to = ((first + sector as u64 + 1) * SECTOR).min(offset + available);
            if from < to {
                memory.write(
                    index(from - offset),
                    &contents.bytes()[index(from)..index(to)],
                );
            }
        }
        if split {
            op.most = available;
            op.left = Some(now.iter().map(|done| !done).collect());
            self.running.push(op);
        } else {
            self.land(&op, Ok(index(available)));
        }
    }

    /// Some sectors, at least one and not all.
    fn rng_mask(&mut self, sectors: usize) -> Rc<[bool]> {
        let mut mask: Vec<bool> = (0..sectors).map(|_| self.rng.chance(128)).collect();
        let first = self.rng.index(sectors);
        let second = (first + 1 + self.rng.index(sectors - 1)) % sectors;
        mask[first] = true;
        mask[second] = false;
        mask.into()
    }

    fn change(&mut self, mut op: Running) {
        if let Some(errno) = self.refusal(&op) {
            self.record(Event::Dropped { op: op.op });
            return self.land(&op, Err(error(errno)));
        }
        let mut data: Option<Rc<[u8]>> = None;
        let mut done = 0;
        if let OpKind::Write { offset, memory, .. } = &op.kind {
            let bytes = memory.to_vec();
            if op.at_submission.as_deref() != Some(&bytes[..]) {
                self.complain(format!(
                    "{:?}: memory changed under the write in slot {}",
                    op.file, op.slot
                ));
            }
            done = index(shortened_write(*offset, bytes.len() as u64, op.fault));
            data = Some(bytes[..done].into());
        }
        let change = change_of(&op.kind, data.as_ref()).expect("only changes come here");
        let sectors = change.sectors();
        let failed = op.fault == Some(Action::Eio);
        let split =
            op.left.is_none() && !failed && sectors > 1 && self.rng.chance(self.config.split);
        let (keep, left) = if failed {
            // Nobody knows how much of a failed change was done.
            let mask: Rc<[bool]> = (0..sectors).map(|_| self.rng.chance(128)).collect();
            let keep = match self.rng.index(3) {
                0 => Keep::Nothing,
                1 => Keep::All,
                _ => Keep::Sectors {
                    mask,
                    grown: self.rng.chance(128),
                },
            };
            (keep, None)
        } else if split {
            let now = self.rng_mask(sectors);
            let later: Rc<[bool]> = now.iter().map(|done| !done).collect();
            op.left = Some(Rc::clone(&later));
            let left = Keep::Sectors {
                mask: later,
                grown: true,
            };
            (
                Keep::Sectors {
                    mask: now,
                    grown: false,
                },
                Some(left),
            )
        } else {
            // The mask was drawn for the change as it was then; a write's memory that changed size cannot be.
            (
                op.left
                    .take()
                    .map_or(Keep::All, |mask| Keep::Sectors { mask, grown: true }),
                None,
            )
        };
        self.files[usize::from(op.file.0)]
            .contents
            .apply(&change, &keep);
        let event = if matches!(keep, Keep::Nothing) {
            Event::Dropped { op: op.op }
        } else {
            Event::Applied {
                op: op.op,
                change,
                keep,
                left,
            }
        };
        self.record(event);
        if split {
            self.running.push(op);
            return;
        }
        if matches!(op.kind, OpKind::Write { sync: true, .. }) {
            self.record(Event::Synced {
                op: op.op,
                file: op.file,
                ok: !failed,
            });
        }
        self.land(
            &op,
            if failed {
                Err(error(errno::EIO))
            } else {
                Ok(done)
            },
        );
    }

    /// Why a change is not made at all.
    fn refusal(&mut self, op: &Running) -> Option<i32> {
        if self.is_misaligned(op) {
            return Some(errno::EINVAL);
        }
        let file = &self.files[usize::from(op.file.0)];
        let (properties, len, capacity) = (file.properties, file.contents.len(), file.capacity);
        if !file.writable {
            self.complain(format!("{:?} is read-only, but was to be changed", op.file));
            return Some(errno::EBADF);
        }
        if matches!(op.kind, OpKind::Punch { .. }) && !self.config.gives_back {
            self.complain(format!("{:?} was punched, and was not to be", op.file));
        }
        if let Some(
            action @ (Action::Enospc | Action::Eintr | Action::Eagain | Action::Eopnotsupp),
        ) = op.fault
        {
            return Some(errno_of(action));
        }
        let can = match op.kind {
            OpKind::Punch { .. } => Some(properties.can_punch),
            OpKind::ZeroRange { .. } => Some(properties.can_zero_range),
            OpKind::Allocate { .. } => Some(properties.regular),
            _ => None,
        };
        let most = self.config.unsupported;
        // Decided when it begins, not in its middle.
        let refused = most > 0 && can.is_some() && op.left.is_none() && self.rng.chance(most);
        let unsupported = refused || can == Some(false);
        if unsupported {
            return Some(errno::EOPNOTSUPP);
        }
        let end = match &op.kind {
            OpKind::Write { offset, memory, .. } => offset.saturating_add(bytes_of(memory)),
            OpKind::ZeroRange { offset, len } | OpKind::Allocate { offset, len } => {
                offset.saturating_add(*len)
            }
            OpKind::Punch { offset, len } => offset.saturating_add(*len).min(MAX_FILE_BYTES),
            OpKind::SetLen { len } => *len,
            _ => 0,
        };
        if !properties.regular {
            let set_len = matches!(op.kind, OpKind::SetLen { .. });
            if set_len {
                return Some(errno::EINVAL);
            }
            return (end > len).then_some(errno::ENOSPC);
        }
        if end > MAX_FILE_BYTES {
            self.complain(format!("{:?}: a change that ends at {end}", op.file));
            return Some(errno::EFBIG);
        }
        let takes_space = !matches!(op.kind, OpKind::Punch { .. });
        if takes_space && end > capacity && end > len {
            return Some(errno::ENOSPC);
        }
        let space = self.files[usize::from(op.file.0)].space.as_mut();
        space.and_then(|space| (!space.account(&op.kind)).then_some(errno::ENOSPC))
    }
}

impl Running {
    fn landed(&self, result: io::Result<usize>) -> Landed {
        let logged = !matches!(self.kind, OpKind::Read { .. } | OpKind::Job(_));
        Landed {
            op: self.op,
            handle: self.handle,
            slot: self.slot,
            result,
            logged,
            held_until: self.held_until,
        }
    }
}

fn errno_of(action: Action) -> i32 {
    match action {
        Action::Enospc => errno::ENOSPC,
        Action::Eintr => errno::EINTR,
        Action::Eagain => errno::EAGAIN,
        Action::Eopnotsupp => errno::EOPNOTSUPP,
        _ => errno::EIO,
    }
}

/// How many bytes of a read or write are done.
fn shortened(len: u64, fault: Option<Action>) -> u64 {
    match fault {
        Some(Action::ShortBySector) => {
            if len > SECTOR {
                len - SECTOR
            } else {
                len.saturating_sub(1)
            }
        }
        Some(Action::ShortByHalf) => len / 2,
        Some(Action::ShortToZero) => 0,
        _ => len,
    }
}

/// A write that stops early stops between two sectors: what is left of a sector that was written in halves is not
/// what this simulates. (A write within one sector is then done whole, or not at all.)
fn shortened_write(offset: u64, len: u64, fault: Option<Action>) -> u64 {
    let short = shortened(len, fault);
    let end = offset + short;
    if short == 0 || short == len {
        short
    } else if end - end % SECTOR > offset {
        end - end % SECTOR - offset
    } else {
        len
    }
}
