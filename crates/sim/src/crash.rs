//! Power cuts: from the log, the files as they could be found after the power failed.
//!
//! A [`CrashCursor`] walks the log. At each point it knows what is durable for certain, and which changes may or may
//! not have reached the disk. The assumptions are those of docs/ordering.md: a sector is written whole or not at
//! all; nothing else is ordered between two barriers, the file's length included; a barrier covers what was seen
//! complete before it was submitted.
//!
//! It is stricter than a page cache in one thing: two operations that write different bytes of one sector survive
//! independently.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::ControlFlow;

use urus_engine::storage::FileId;

use crate::checker::Owner;
use crate::contents::{Change, Contents, Keep};
use crate::log::{Event, Log, OpId};
use crate::rng::{Rng, mix};

/// A change that is not part of the durable files yet.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The operation.
    pub op: OpId,
    /// Its file.
    pub file: FileId,
    /// What it does.
    pub change: Change,
    /// How much of it, at most: it may have been done in parts, or failed half way.
    pub limit: Keep,
    /// It survives for certain, but could not be merged into the files yet, since something before it is not known.
    pub durable: bool,
    /// An fdatasync failed after it: no later one covers it.
    lost_track: bool,
}

impl Pending {
    /// The part of it that the mask lets through.
    fn torn(&self, mask: Vec<bool>, grown: bool) -> Keep {
        match &self.limit {
            Keep::All => Keep::Sectors {
                mask: mask.into(),
                grown,
            },
            Keep::Nothing => Keep::Nothing,
            Keep::Sectors {
                mask: limit,
                grown: may_grow,
            } => {
                let mask = mask
                    .iter()
                    .zip(limit.iter())
                    .map(|(a, b)| *a && *b)
                    .collect();
                Keep::Sectors {
                    mask,
                    grown: grown && *may_grow,
                }
            }
        }
    }
}

/// What kind of thing a change writes, for the adversarial cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The header.
    Header,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// An L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The snapshot table.
    Snapshots,
    /// Bitmaps.
    Bitmaps,
    /// Guest data.
    Data,
    /// Not referred to (yet), or only a length.
    Unknown,
}

impl From<Option<Owner>> for Class {
    fn from(owner: Option<Owner>) -> Self {
        match owner {
            None => Self::Unknown,
            Some(Owner::Header) => Self::Header,
            Some(Owner::RefcountTable) => Self::RefcountTable,
            Some(Owner::RefcountBlock(_)) => Self::RefcountBlock,
            Some(Owner::L1(_)) => Self::L1,
            Some(Owner::L2(..)) => Self::L2,
            Some(Owner::SnapshotTable) => Self::Snapshots,
            Some(Owner::BitmapDirectory | Owner::BitmapTable(_) | Owner::Bitmap(_)) => {
                Self::Bitmaps
            }
            Some(Owner::Data(..) | Owner::Compressed(..)) => Self::Data,
        }
    }
}

/// How many states to make at one cut point.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Every subset, when at most so many changes are pending.
    pub exhaustive: usize,
    /// Random subsets, when more are.
    pub random: usize,
    /// States with torn writes.
    pub torn: usize,
    /// Of each kind of adversarial state that exists once for every pending change, at most so many.
    pub each: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            exhaustive: 10,
            random: 64,
            torn: 24,
            each: 16,
        }
    }
}

/// One way in which the power can fail.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Why this one was chosen.
    pub name: &'static str,
    /// What survives of each pending change, in the order of [`CrashCursor::pending`].
    pub keeps: Vec<Keep>,
    /// The changes are applied last first.
    pub reversed: bool,
    /// Regular files end no later than they durably did.
    pub cut_length: bool,
}

/// The files after a power cut.
pub struct State<'a> {
    /// Each file.
    pub files: &'a [Contents],
    /// Hash of all of them.
    pub hash: u64,
    /// How it came about.
    pub choice: &'a Choice,
}

/// What [`CrashCursor::enumerate`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// States made.
    pub made: u64,
    /// Those that were not known before and were visited.
    pub visited: u64,
}

/// A place in the log: what is durable there, and what is pending.
#[derive(Clone)]
pub struct CrashCursor {
    files: Vec<Contents>,
    /// In the order in which they took effect.
    applied: Vec<Pending>,
    /// Submitted and not (wholly) in effect.
    in_flight: Vec<Pending>,
    seen: BTreeSet<OpId>,
    /// What each fdatasync in flight covers.
    covers: BTreeMap<OpId, Vec<OpId>>,
    synchronous: BTreeSet<OpId>,
    position: usize,
}

impl CrashCursor {
    /// At the beginning of the log.
    #[must_use]
    pub fn new(log: &Log) -> Self {
        Self {
            files: log.initial.clone(),
            applied: Vec::new(),
            in_flight: Vec::new(),
            seen: BTreeSet::new(),
            covers: BTreeMap::new(),
            synchronous: BTreeSet::new(),
            position: 0,
        }
    }

    /// Goes on by one event; false at the end of the log.
    pub fn advance(&mut self, log: &Log) -> bool {
        let Some((_, event)) = log.events.get(self.position) else {
            return false;
        };
        self.position += 1;
        self.take(event);
        true
    }

    /// Goes on to the end of the log.
    pub fn advance_to_end(&mut self, log: &Log) {
        while self.advance(log) {}
    }

    /// Events consumed so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// The files with everything that is durable and nothing else that was not yet merged.
    #[must_use]
    pub fn durable(&self) -> &[Contents] {
        &self.files
    }

    /// The changes that are not part of [`durable`](Self::durable), in the order in which they would be applied.
    pub fn pending(&self) -> impl Iterator<Item = &Pending> {
        self.applied.iter().chain(&self.in_flight)
    }

    /// How many of them may be lost.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending().filter(|pending| !pending.durable).count()
    }

    fn take(&mut self, event: &Event) {
        match event {
            Event::Submitted {
                op,
                file,
                change,
                sync,
            } => {
                if *sync {
                    self.synchronous.insert(*op);
                }
                let (op, file, change) = (*op, *file, change.clone());
                let limit = Keep::All;
                self.in_flight.push(Pending {
                    op,
                    file,
                    change,
                    limit,
                    durable: false,
                    lost_track: false,
                });
            }
            Event::SyncSubmitted { op, file } => {
                let covered =
                    |pending: &&Pending| pending.file == *file && self.seen.contains(&pending.op);
                self.covers.insert(
                    *op,
                    self.applied
                        .iter()
                        .filter(covered)
                        .map(|pending| pending.op)
                        .collect(),
                );
            }
            Event::Applied {
                op,
                change,
                keep,
                left,
            } => {
                let at = self
                    .in_flight
                    .iter()
                    .position(|pending| pending.op == *op)
                    .expect("it was submitted");
                let file = self.in_flight[at].file;
                match left {
                    Some(left) => {
                        // A write that is cut short has become shorter with its first part.
                        self.in_flight[at].change = change.clone();
                        self.in_flight[at].limit = left.clone();
                    }
                    None => drop(self.in_flight.remove(at)),
                }
                let (op, change, limit) = (*op, change.clone(), keep.clone());
                self.applied.push(Pending {
                    op,
                    file,
                    change,
                    limit,
                    durable: false,
                    lost_track: false,
                });
            }
            Event::Dropped { op } => self.in_flight.retain(|pending| pending.op != *op),
            Event::Synced { op, file, ok: true } => {
                let covered = self.covers.remove(op).unwrap_or_else(|| vec![*op]);
                for pending in self
                    .applied
                    .iter_mut()
                    .filter(|pending| pending.file == *file)
                {
                    pending.durable |= !pending.lost_track && covered.contains(&pending.op);
                }
                self.merge();
            }
            Event::Synced {
                op,
                file,
                ok: false,
            } => {
                self.covers.remove(op);
                for pending in self
                    .applied
                    .iter_mut()
                    .filter(|pending| pending.file == *file)
                {
                    pending.lost_track |= !pending.durable;
                }
            }
            Event::Seen { op } => drop(self.seen.insert(*op)),
            Event::Replaced { file, contents } => {
                self.files[usize::from(file.0)] = contents.clone();
                self.applied.retain(|pending| pending.file != *file);
                self.in_flight.retain(|pending| pending.file != *file);
            }
        }
    }

    /// Moves what is durable into the files, unless something before it may still come below it.
    fn merge(&mut self) {
        let mut at = 0;
        while at < self.applied.len() {
            let this = &self.applied[at];
            let waits = |before: &Pending| {
                before.file == this.file && before.change.conflicts(&this.change)
            };
            if this.durable && !self.applied[..at].iter().any(waits) {
                let this = self.applied.remove(at);
                self.files[usize::from(this.file.0)].apply(&this.change, &this.limit);
            } else {
                at += 1;
            }
        }
    }

    /// Makes the files as this choice leaves them, for as long as `f` runs.
    pub fn with_state<R>(&mut self, choice: &Choice, f: impl FnOnce(&State<'_>) -> R) -> R {
        let lengths: Vec<u64> = self.files.iter().map(Contents::len).collect();
        self.files.iter_mut().for_each(Contents::start_journal);
        let survivors = || {
            self.applied
                .iter()
                .chain(&self.in_flight)
                .zip(&choice.keeps)
        };
        let mut order: Vec<(&Pending, &Keep)> = survivors().collect();
        if choice.reversed {
            order.reverse();
        }
        for (pending, keep) in order {
            self.files[usize::from(pending.file.0)].apply(&pending.change, keep);
        }
        if choice.cut_length {
            for (file, len) in self.files.iter_mut().zip(lengths) {
                if file.len() > len {
                    file.set_len(len);
                }
            }
        }
        let hash = self
            .files
            .iter()
            .fold(0, |hash, file| mix(hash ^ file.hash()));
        let result = f(&State {
            files: &self.files,
            hash,
            choice,
        });
        self.files.iter_mut().for_each(Contents::undo);
        result
    }

    /// The process is killed here: all that has taken effect stays (the kernel has it), and of what is in flight each operation
    /// may still happen or not.
    #[must_use]
    pub fn killed(&self, rng: &mut Rng) -> Choice {
        let density = [0, 128, 256][rng.index(3)];
        let in_flight = self.in_flight.iter().map(|pending| {
            if rng.chance(density) {
                pending.limit.clone()
            } else {
                Keep::Nothing
            }
        });
        let applied = self.applied.iter().map(|pending| pending.limit.clone());
        Choice {
            name: "killed",
            keeps: applied.chain(in_flight).collect(),
            reversed: false,
            cut_length: false,
        }
    }

    /// Visits the states that a power cut at this point can leave, each once. `known` holds the hashes of states
    /// visited before, so that cut points that give the same files cost one check; `epoch` goes into them and must
    /// change whenever the visitor's judgement of equal files may become stricter (a flush was acknowledged).
    pub fn enumerate(
        &mut self,
        rng: &mut Rng,
        limits: &Limits,
        classify: &dyn Fn(FileId, &Change) -> Class,
        (known, epoch): (&mut HashSet<u64>, u64),
        visit: &mut dyn FnMut(&State<'_>) -> ControlFlow<()>,
    ) -> Tally {
        let mut tally = Tally::default();
        for choice in self.choices(rng, limits, classify) {
            tally.made += 1;
            let flow = self.with_state(&choice, |state| {
                if !known.insert(mix(state.hash ^ mix(epoch))) {
                    return ControlFlow::Continue(());
                }
                tally.visited += 1;
                visit(state)
            });
            if flow.is_break() {
                break;
            }
        }
        tally
    }

    /// The ways in which the power can fail here: all subsets or a choice of them, and torn writes.
    #[must_use]
    pub fn choices(
        &self,
        rng: &mut Rng,
        limits: &Limits,
        classify: &dyn Fn(FileId, &Change) -> Class,
    ) -> Vec<Choice> {
        let all: Vec<&Pending> = self.pending().collect();
        let open: Vec<usize> = (0..all.len()).filter(|at| !all[*at].durable).collect();
        let mut chooser = Chooser {
            all,
            open,
            rng,
            choices: Vec::new(),
        };
        let n = chooser.open.len();
        if n <= limits.exhaustive {
            for subset in 0..1u64 << n {
                chooser.subset("subset", |nth| subset >> nth & 1 != 0);
            }
        } else {
            chooser.adversarial(limits, classify);
            for _ in 0..limits.random {
                let density = [32, 128, 224][chooser.rng.index(3)];
                chooser.random("random", density);
            }
        }
        if n > 0 {
            chooser.reversed();
            chooser.lengths(limits);
            for _ in 0..limits.torn {
                chooser.torn();
            }
        }
        chooser.choices
    }
}

struct Chooser<'a> {
    all: Vec<&'a Pending>,
    /// Those in `all` that may be lost.
    open: Vec<usize>,
    rng: &'a mut Rng,
    choices: Vec<Choice>,
}

impl Chooser<'_> {
    /// What is durable survives; of the rest, what `survives` says of each by its place in `open`.
    fn keeps(&mut self, mut survives: impl FnMut(usize) -> bool) -> Vec<Keep> {
        let mut keeps: Vec<Keep> = self
            .all
            .iter()
            .map(|pending| pending.limit.clone())
            .collect();
        for (nth, at) in self.open.iter().enumerate() {
            if !survives(nth) {
                keeps[*at] = Keep::Nothing;
            }
        }
        keeps
    }

    fn push(&mut self, name: &'static str, keeps: Vec<Keep>) {
        self.choices.push(Choice {
            name,
            keeps,
            reversed: false,
            cut_length: false,
        });
    }

    fn subset(&mut self, name: &'static str, survives: impl FnMut(usize) -> bool) {
        let keeps = self.keeps(survives);
        self.push(name, keeps);
    }

    fn random(&mut self, name: &'static str, density: u32) {
        let drawn: Vec<bool> = self.open.iter().map(|_| self.rng.chance(density)).collect();
        self.subset(name, |nth| drawn[nth]);
    }

    /// Up to `most` of the numbers below `n`: all in order, or random ones.
    fn some(&mut self, n: usize, most: usize) -> Vec<usize> {
        if n <= most {
            (0..n).collect()
        } else {
            (0..most).map(|_| self.rng.index(n)).collect()
        }
    }

    fn adversarial(&mut self, limits: &Limits, classify: &dyn Fn(FileId, &Change) -> Class) {
        let n = self.open.len();
        self.subset("none", |_| false);
        self.subset("all", |_| true);
        for chosen in self.some(n, limits.each) {
            self.subset("all but one", |nth| nth != chosen);
        }
        for chosen in self.some(n, limits.each) {
            self.subset("only one", |nth| nth == chosen);
        }
        for chosen in self.some(n, limits.each) {
            self.subset("the first ones", |nth| nth <= chosen);
        }
        for chosen in self.some(n, limits.each) {
            self.subset("the last ones", |nth| nth >= chosen);
        }
        let classes: Vec<Class> = self
            .open
            .iter()
            .map(|at| classify(self.all[*at].file, &self.all[*at].change))
            .collect();
        let present: BTreeSet<Class> = classes.iter().copied().collect();
        for class in present {
            self.subset("only one kind", |nth| classes[nth] == class);
            self.subset("all but one kind", |nth| classes[nth] != class);
        }
        let is_data = |class: Class| matches!(class, Class::Data | Class::Unknown);
        self.subset("metadata only", |nth| !is_data(classes[nth]));
        self.subset("data only", |nth| is_data(classes[nth]));
        self.subset("refcounts only", |nth| {
            matches!(classes[nth], Class::RefcountBlock | Class::RefcountTable)
        });
    }

    /// Last first. Where something durable must stay on top of something that is not, the order is not free.
    fn reversed(&mut self) {
        if self.open.len() == self.all.len() {
            let keeps = self.keeps(|_| true);
            self.choices.push(Choice {
                name: "reverse order",
                keeps,
                reversed: true,
                cut_length: false,
            });
        }
    }

    /// The length did not follow the data, or the data did not follow the length.
    fn lengths(&mut self, limits: &Limits) {
        let growing: Vec<usize> = (0..self.open.len())
            .filter(|nth| self.all[self.open[*nth]].change.grows_to().is_some())
            .collect();
        if growing.is_empty() {
            return;
        }
        // With something durable in the list, its own length is durable too.
        if self.open.len() == self.all.len() {
            let keeps = self.keeps(|_| true);
            self.choices.push(Choice {
                name: "length not extended",
                keeps,
                reversed: false,
                cut_length: true,
            });
        }
        for chosen in self.some(growing.len(), limits.each / 2) {
            for density in [0, 128, 256] {
                let drawn: Vec<bool> = self.open.iter().map(|_| self.rng.chance(density)).collect();
                let mut keeps = self.keeps(|nth| drawn[nth]);
                let at = self.open[growing[chosen]];
                let pending = self.all[at];
                keeps[at] = pending.torn(vec![false; pending.change.sectors()], true);
                self.push("length without data", keeps);
            }
        }
    }

    /// One to three of the changes reached the disk in part.
    fn torn(&mut self) {
        let large: Vec<usize> = self
            .open
            .iter()
            .copied()
            .filter(|at| self.all[*at].change.sectors() > 1)
            .collect();
        if large.is_empty() {
            return;
        }
        let density = [0, 128, 224, 256][self.rng.index(4)];
        let drawn: Vec<bool> = self.open.iter().map(|_| self.rng.chance(density)).collect();
        let mut keeps = self.keeps(|nth| drawn[nth]);
        for _ in 0..=self.rng.index(3) {
            let at = large[self.rng.index(large.len())];
            let pending = self.all[at];
            let mask = torn_mask(self.rng, pending.change.sectors());
            keeps[at] = pending.torn(mask, self.rng.chance(128));
        }
        self.push("torn", keeps);
    }
}

fn torn_mask(rng: &mut Rng, sectors: usize) -> Vec<bool> {
    let chosen = rng.index(sectors);
    let kind = rng.index(5);
    (0..sectors)
        .map(|sector| match kind {
            0 => sector < chosen,
            1 => sector >= chosen,
            2 => sector == chosen,
            3 => sector != chosen,
            _ => rng.chance(128),
        })
        .collect()
}
