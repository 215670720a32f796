//! What each guest sector may hold: the rules of a disk, kept as a history of requests.
//!
//! - Before a cut, a read returns what the last completed change left, or what one that overlaps it in time leaves.
//! - A flush covers the changes completed before it was issued. After a cut, a sector holds the last flushed
//!   state or that of any change issued later. Changes that overlapped in time may have come in either order.
//! - A discarded sector holds what it held before, or zeroes. A flush of a discard promises nothing.
//! - A failed change may have happened, wholly or in part; a flush promises nothing about it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::contents::{SECTOR_BYTES, index};
use crate::stamp::{Content, content, foreign_stamp};

/// Names a guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOp(usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// A write of stamps of this version.
    Write(u64),
    Zero,
    Discard,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    what: What,
    fua: bool,
    issued: u64,
    /// When, and whether with success.
    completed: Option<(u64, bool)>,
}

impl Request {
    /// The moment of success, if that was before `before`.
    fn succeeded_before(&self, before: u64) -> bool {
        matches!(self.completed, Some((at, true)) if at < before)
    }
}

/// A change of the disk's size, to so many sectors.
#[derive(Clone, Copy, Debug)]
struct Growth {
    sectors: u64,
    issued: u64,
    /// When, and whether with success.
    completed: Option<(u64, bool)>,
}

#[derive(Clone, Debug)]
struct Sector {
    initial: Content,
    /// The changes that touch it, in the order of issue.
    changes: Vec<GuestOp>,
}

/// A history of guest requests. Moments come from [`SimWorld::tick`](crate::world::SimWorld::tick).
#[derive(Clone, Debug)]
pub struct Model {
    /// As far as the disk may ever reach.
    sectors: Vec<Sector>,
    /// Sectors of the disk at first.
    at_first: u64,
    growths: Vec<Growth>,
    requests: Vec<Request>,
    next_version: u64,
    /// What a discard may show besides zeroes and the old content: version 2 images cannot hide their backing file.
    reveals: Option<Vec<Content>>,
    /// What the internal snapshot shows, where that is not what it showed at first.
    snapshot: Option<Arc<[u8]>>,
}

/// A sector that does not hold what it may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Its number.
    pub lba: u64,
    /// What it holds.
    pub found: Content,
    /// If that is a stamp of another place: whose.
    pub stamp: Option<(u64, u64)>,
    /// What it may hold.
    pub legal: Vec<Content>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            lba,
            found,
            stamp,
            legal,
        } = self;
        write!(f, "sector {lba} holds {found:?}")?;
        if let (Content::Foreign, Some((lba, version))) = (found, stamp) {
            write!(f, " (the stamp of sector {lba}, version {version})")?;
        }
        write!(f, ", but may hold {legal:?}")
    }
}

/// What every sector may hold at one moment; made once for all states of a cut point.
#[derive(Clone, Debug)]
pub struct View {
    legal: Vec<Vec<Content>>,
    sizes: Vec<u64>,
    snapshot: Option<Arc<[u8]>>,
}

impl Model {
    /// A disk that holds this. Versions below `first_version` belong to what was there before.
    #[must_use]
    pub fn new(initial: Vec<Content>, first_version: u64) -> Self {
        let sector = |initial| Sector {
            initial,
            changes: Vec::new(),
        };
        let sectors: Vec<Sector> = initial.into_iter().map(sector).collect();
        Self {
            at_first: sectors.len() as u64,
            growths: Vec::new(),
            sectors,
            requests: Vec::new(),
            next_version: first_version,
            reveals: None,
            snapshot: None,
        }
    }

    /// An empty disk.
    #[must_use]
    pub fn zeroed(sectors: u64) -> Self {
        Self::new(vec![Content::Zero; index(sectors)], 1)
    }

    /// The disk may grow to so many sectors. What is new is zero (O20).
    #[must_use]
    pub fn with_room(mut self, sectors: u64) -> Self {
        let zero = Sector {
            initial: Content::Zero,
            changes: Vec::new(),
        };
        let sectors = index(sectors).max(self.sectors.len());
        self.sectors.resize(sectors, zero);
        self
    }

    /// Discards may show this (what the backing file holds), as in version 2 images.
    #[must_use]
    pub fn discard_reveals(mut self, backing: Vec<Content>) -> Self {
        self.reveals = Some(backing);
        self
    }

    /// The disk as it is from now on, after another process has put these contents in its place; and its internal snapshot. What is in flight
    /// has waited, and is still to come.
    #[must_use]
    pub fn replaced(&self, contents: Vec<Content>, snapshot: Option<Arc<[u8]>>) -> Self {
        let room = self.sectors.len() as u64;
        let mut new = Self::new(contents, self.next_version).with_room(room);
        new.requests.clone_from(&self.requests);
        new.reveals.clone_from(&self.reveals);
        new.snapshot = snapshot;
        for (sector, old) in new.sectors.iter_mut().zip(&self.sectors) {
            let waits = |op: &&GuestOp| self.requests[op.0].completed.is_none();
            sector.changes = old.changes.iter().filter(waits).copied().collect();
        }
        new
    }

    /// The process was killed at this moment, and another finds this on the disk: that is what reads from now on. Completed changes that no flush
    /// covers may be gone (unless they outlive the process), and what is found may be gone after a cut.
    pub fn restart(&mut self, found: &[u8], at: u64, outlives: bool) {
        let flushed = self.flushed(at);
        for request in &mut self.requests {
            let kept = outlives || request.fua || request.what == What::Flush;
            match &mut request.completed {
                Some((completed, ok)) => *ok &= kept || *completed < flushed,
                None => request.completed = Some((at, false)),
            }
        }
        let mut restated: BTreeMap<Content, GuestOp> = BTreeMap::new();
        for (lba, sector) in (0..).zip(found.chunks(SECTOR_BYTES)) {
            let found = content(sector, lba);
            let what = match found {
                Content::Version(version) => What::Write(version),
                Content::Zero => What::Zero,
                Content::Cut(..) | Content::Foreign => continue,
            };
            if self.sectors[index(lba)].changes.is_empty() {
                continue;
            }
            let op = *restated
                .entry(found)
                .or_insert_with(|| self.issue(what, 0, 0, false, at));
            self.sectors[index(lba)].changes.push(op);
        }
        for op in restated.into_values() {
            self.complete(op, at, true);
        }
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        let grown = |growth: &&Growth| matches!(growth.completed, Some((_, true)));
        let last = self.growths.iter().rfind(grown);
        last.map_or(self.at_first, |growth| growth.sectors)
    }

    /// Sectors that the disk may ever have.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// The disk is to grow, within its [room](Self::with_room). One at a time.
    pub fn grow(&mut self, sectors: u64, at: u64) {
        assert!(sectors <= self.sectors.len() as u64, "there is room");
        self.growths.push(Growth {
            sectors,
            issued: at,
            completed: None,
        });
    }

    /// The growth under way has ended. One that failed may still be found after a cut.
    pub fn grown(&mut self, at: u64, ok: bool) {
        let last = self.growths.last_mut().expect("it was issued");
        last.completed = Some((at, ok));
    }

    /// The growth under way was refused: it never was.
    pub fn refused(&mut self) {
        self.growths.pop();
    }

    /// The sizes that a disk may have, in sectors, when it is found at this moment.
    fn sizes(&self, now: u64) -> Vec<u64> {
        let mut sizes = vec![self.at_first];
        for growth in self.growths.iter().filter(|growth| growth.issued <= now) {
            if matches!(growth.completed, Some((at, true)) if at <= now) {
                sizes.clear();
            }
            sizes.push(growth.sectors);
        }
        sizes
    }

    /// The version that the next write will have.
    #[must_use]
    pub fn next_version(&self) -> u64 {
        self.next_version
    }

    fn issue(&mut self, what: What, lba: u64, count: u64, fua: bool, at: u64) -> GuestOp {
        let op = GuestOp(self.requests.len());
        self.requests.push(Request {
            what,
            fua,
            issued: at,
            completed: None,
        });
        for sector in &mut self.sectors[index(lba)..index(lba + count)] {
            sector.changes.push(op);
        }
        op
    }

    /// A write was issued; its sectors are to be stamped with the version returned.
    pub fn write(&mut self, lba: u64, count: u64, fua: bool, at: u64) -> (GuestOp, u64) {
        let version = self.next_version;
        self.next_version += 1;
        (
            self.issue(What::Write(version), lba, count, fua, at),
            version,
        )
    }

    /// A write of zeroes was issued.
    pub fn zero(&mut self, lba: u64, count: u64, fua: bool, at: u64) -> GuestOp {
        self.issue(What::Zero, lba, count, fua, at)
    }

    /// A discard was issued.
    pub fn discard(&mut self, lba: u64, count: u64, at: u64) -> GuestOp {
        self.issue(What::Discard, lba, count, false, at)
    }

    /// A flush was issued.
    pub fn flush(&mut self, at: u64) -> GuestOp {
        self.issue(What::Flush, 0, 0, false, at)
    }

    /// A request was completed, with success or not.
    pub fn complete(&mut self, op: GuestOp, at: u64, ok: bool) {
        let request = &mut self.requests[op.0];
        assert!(request.completed.is_none(), "a request completes once");
        request.completed = Some((at, ok));
    }

    /// Requests that are issued and not completed.
    #[must_use]
    pub fn open_requests(&self) -> usize {
        self.requests
            .iter()
            .filter(|request| request.completed.is_none())
            .count()
    }

    /// Changes whenever what may be found after a cut may have become less: flushes and FUA writes that succeeded.
    #[must_use]
    pub fn promises(&self) -> u64 {
        let promise = |request: &&Request| {
            (request.what == What::Flush || request.fua)
                && matches!(request.completed, Some((_, true)))
        };
        let grown = |growth: &&Growth| matches!(growth.completed, Some((_, true)));
        (self.requests.iter().filter(promise).count() + self.growths.iter().filter(grown).count())
            as u64
    }

    /// As [`promises`](Self::promises), of what was acknowledged by `now`.
    #[must_use]
    pub fn promises_at(&self, now: u64) -> u64 {
        let promise = |request: &&Request| {
            (request.what == What::Flush || request.fua) && request.succeeded_before(now + 1)
        };
        let grown = |growth: &&Growth| matches!(growth.completed, Some((at, true)) if at <= now);
        (self.requests.iter().filter(promise).count() + self.growths.iter().filter(grown).count())
            as u64
    }

    /// What a sector may hold, when the changes that `settled` names have certainly happened and all those issued up
    /// to `now` may have.
    fn legal(&self, lba: u64, now: u64, settled: impl Fn(&Request) -> bool) -> Vec<Content> {
        let sector = &self.sectors[index(lba)];
        let changes = || {
            sector
                .changes
                .iter()
                .map(|op| &self.requests[op.0])
                .filter(|change| change.issued <= now)
        };
        // A discard promises nothing, so nothing before it is over because of it.
        let last_settled =
            changes().filter(|change| change.what != What::Discard && settled(change));
        // What ended before this moment was followed by something that certainly happened.
        let floor = last_settled.map(|change| change.issued).max();
        let mut legal = Vec::new();
        let mut add = |content| {
            if !legal.contains(&content) {
                legal.push(content);
            }
        };
        if floor.is_none() {
            add(sector.initial);
        }
        for change in changes() {
            let ended = change.completed.map_or(u64::MAX, |(at, _)| at);
            if floor.is_some_and(|floor| ended < floor) {
                continue;
            }
            match change.what {
                What::Write(version) => add(Content::Version(version)),
                What::Zero => add(Content::Zero),
                What::Discard => {
                    add(Content::Zero);
                    let revealed = self.reveals.as_ref();
                    if let Some(content) = revealed.and_then(|backing| backing.get(index(lba))) {
                        add(*content);
                    }
                }
                What::Flush => {}
            }
        }
        legal
    }

    /// The latest issue of a flush that was acknowledged by `now`.
    fn flushed(&self, now: u64) -> u64 {
        let acknowledged =
            |request: &&Request| request.what == What::Flush && request.succeeded_before(now + 1);
        self.requests
            .iter()
            .filter(acknowledged)
            .map(|flush| flush.issued)
            .max()
            .unwrap_or(0)
    }

    /// What every sector may hold when the power fails at this moment.
    #[must_use]
    pub fn after_cut(&self, now: u64) -> View {
        let flushed = self.flushed(now);
        let settled = |change: &Request| {
            change.succeeded_before(flushed) || (change.fua && change.succeeded_before(now + 1))
        };
        View {
            legal: (0..self.sectors.len() as u64)
                .map(|lba| self.legal(lba, now, settled))
                .collect(),
            sizes: self.sizes(now),
            snapshot: self.snapshot.clone(),
        }
    }

    /// What every sector may hold when the process is killed at this moment and completed changes outlive it.
    #[must_use]
    pub fn after_kill(&self, now: u64) -> View {
        let settled = |change: &Request| change.succeeded_before(now + 1);
        View {
            legal: (0..self.sectors.len() as u64)
                .map(|lba| self.legal(lba, now, settled))
                .collect(),
            sizes: self.sizes(now),
            snapshot: self.snapshot.clone(),
        }
    }

    /// Checks what a read returned that was issued and completed at these moments.
    ///
    /// # Errors
    /// The first sector that is wrong.
    pub fn check_read(
        &self,
        lba: u64,
        bytes: &[u8],
        issued: u64,
        completed: u64,
    ) -> Result<(), Mismatch> {
        for (lba, sector) in (lba..).zip(bytes.chunks(SECTOR_BYTES)) {
            let legal = self.legal(lba, completed, |change| change.succeeded_before(issued));
            judge(lba, sector, &legal)?;
        }
        Ok(())
    }

    /// Whether a read that was issued and completed at these moments could have returned this.
    #[must_use]
    pub fn may_read(&self, lba: u64, content: Content, issued: u64, completed: u64) -> bool {
        let settled = |change: &Request| change.succeeded_before(issued);
        self.legal(lba, completed, settled).contains(&content)
    }

    /// Whether a read with these moments may find zeroes in this sector, from a byte of it on.
    #[must_use]
    pub fn may_be_zero_from(&self, lba: u64, byte: u64, issued: u64, completed: u64) -> bool {
        let settled = |change: &Request| change.succeeded_before(issued);
        let legal = self.legal(lba, completed, settled);
        legal.iter().any(|content| content.is_zero_from(byte))
    }

    /// The changes that touch one of these sectors, less those that were over at `since`.
    fn changes_since(&self, lbas: Range<u64>, since: u64) -> impl Iterator<Item = &Request> {
        let sectors = &self.sectors[index(lbas.start)..index(lbas.end)];
        let changes = sectors.iter().flat_map(|sector| &sector.changes);
        let changes = changes.map(|op| &self.requests[op.0]);
        changes.filter(move |change| change.completed.is_none_or(|(at, _)| at > since))
    }

    /// Whether nothing has changed these sectors since that moment, and nothing is about to.
    #[must_use]
    pub fn is_untouched(&self, lbas: Range<u64>, since: u64) -> bool {
        self.changes_since(lbas, since).next().is_none()
    }

    /// Whether these sectors were only written to since that moment, with success at least once before `before`.
    #[must_use]
    pub fn is_written(&self, lbas: Range<u64>, since: u64, before: u64) -> bool {
        let writes = |change: &Request| matches!(change.what, What::Write(_));
        self.changes_since(lbas.clone(), since).all(writes)
            && self
                .changes_since(lbas, since)
                .any(|change| change.succeeded_before(before))
    }

    /// The disk as it is found after a cut or a new start: from now on it holds exactly this.
    ///
    /// # Errors
    /// The first sector that holds no stamp of its own and no zeroes.
    pub fn adopt(&self, bytes: &[u8]) -> Result<Self, Mismatch> {
        let mut initial = Vec::new();
        for (lba, sector) in (0..).zip(bytes.chunks(SECTOR_BYTES)) {
            let found = content(sector, lba);
            if found == Content::Foreign {
                return Err(Mismatch {
                    lba,
                    found,
                    stamp: foreign_stamp(sector),
                    legal: Vec::new(),
                });
            }
            initial.push(found);
        }
        let mut model = Self::new(initial, self.next_version).with_room(self.sectors.len() as u64);
        model.reveals.clone_from(&self.reveals);
        model.snapshot.clone_from(&self.snapshot);
        Ok(model)
    }
}

impl View {
    /// What the internal snapshot shows, where that is not what it showed at first.
    #[must_use]
    pub fn snapshot(&self) -> Option<&[u8]> {
        self.snapshot.as_deref()
    }

    /// The sizes that the disk may have, in sectors.
    #[must_use]
    pub fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    /// What a sector may hold.
    #[must_use]
    pub fn legal(&self, lba: u64) -> &[Content] {
        &self.legal[index(lba)]
    }

    /// Checks bytes read from `lba` on.
    ///
    /// # Errors
    /// The first sector that is wrong.
    pub fn check(&self, lba: u64, bytes: &[u8]) -> Result<(), Mismatch> {
        for (lba, sector) in (lba..).zip(bytes.chunks(SECTOR_BYTES)) {
            judge(lba, sector, self.legal(lba))?;
        }
        Ok(())
    }
}

fn judge(lba: u64, sector: &[u8], legal: &[Content]) -> Result<(), Mismatch> {
    let found = content(sector, lba);
    if legal.contains(&found) {
        return Ok(());
    }
    Err(Mismatch {
        lba,
        found,
        stamp: foreign_stamp(sector),
        legal: legal.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::Content::{Foreign, Version, Zero};
    use super::*;
    use crate::stamp::stamped;

    fn cut(model: &Model, now: u64) -> Vec<Content> {
        let mut legal = model.after_cut(now).legal(0).to_vec();
        legal.sort_unstable();
        legal
    }

    #[test]
    fn a_flush_covers_what_was_complete_when_it_was_issued() {
        let mut model = Model::zeroed(1);
        let (a, _) = model.write(0, 1, false, 1);
        assert_eq!(cut(&model, 0), [Zero], "not issued yet");
        assert_eq!(cut(&model, 1), [Zero, Version(1)]);
        model.complete(a, 2, true);
        let flush = model.flush(3);
        let (b, _) = model.write(0, 1, false, 4);
        model.complete(b, 5, true);
        assert_eq!(
            cut(&model, 5),
            [Zero, Version(1), Version(2)],
            "nothing is promised yet"
        );
        model.complete(flush, 6, true);
        assert_eq!(
            cut(&model, 5),
            [Zero, Version(1), Version(2)],
            "nor was it at 5"
        );
        assert_eq!(cut(&model, 6), [Version(1), Version(2)]);
        let flush = model.flush(7);
        model.complete(flush, 8, false);
        assert_eq!(
            cut(&model, 8),
            [Version(1), Version(2)],
            "a failed flush promises nothing"
        );
        let flush = model.flush(9);
        model.complete(flush, 10, true);
        assert_eq!(cut(&model, 10), [Version(2)]);
    }

    #[test]
    fn changes_that_overlap_in_time_come_in_any_order() {
        let mut model = Model::zeroed(1);
        let (a, _) = model.write(0, 1, false, 1);
        let b = model.zero(0, 1, false, 2);
        let (c, _) = model.write(0, 1, false, 3);
        model.complete(a, 4, true);
        model.complete(b, 5, true);
        let flush = model.flush(6);
        model.complete(flush, 7, true);
        assert_eq!(
            cut(&model, 7),
            [Zero, Version(1), Version(2)],
            "c is still open"
        );
        model.complete(c, 8, false);
        let (d, _) = model.write(0, 1, true, 9);
        model.complete(d, 10, true);
        assert_eq!(cut(&model, 10), [Version(3)], "FUA: durable when complete");
        let read = |version, issued, completed| {
            model.check_read(0, &stamped(0, 1, version), issued, completed)
        };
        assert!(read(3, 11, 12).is_ok() && read(2, 11, 12).is_err());
        assert!(read(2, 8, 12).is_ok() && read(3, 8, 12).is_ok());
        assert!(read(3, 6, 8).is_err(), "not issued when the read completed");
    }

    #[test]
    fn a_discard_shows_the_old_content_or_zeroes() {
        let mut model = Model::zeroed(1).discard_reveals(vec![Version(900)]);
        let settle = |model: &mut Model, op, at| {
            model.complete(op, at, true);
            let flush = model.flush(at + 1);
            model.complete(flush, at + 2, true);
        };
        let (a, _) = model.write(0, 1, false, 1);
        settle(&mut model, a, 2);
        let b = model.discard(0, 1, 5);
        settle(&mut model, b, 6);
        assert_eq!(cut(&model, 9), [Zero, Version(1), Version(900)]);
        model.reveals = None;
        assert_eq!(cut(&model, 9), [Zero, Version(1)]);
        let (c, _) = model.write(0, 1, false, 10);
        settle(&mut model, c, 11);
        assert_eq!(cut(&model, 20), [Version(2)]);
    }

    #[test]
    fn a_disk_has_the_size_that_it_has_grown_to() {
        let mut model = Model::zeroed(2).with_room(9);
        let sizes = |model: &Model, now| model.after_cut(now).sizes().to_vec();
        assert_eq!((model.sectors(), sizes(&model, 5)), (2, vec![2]));
        model.grow(4, 1);
        assert_eq!((model.sectors(), sizes(&model, 0)), (2, vec![2]));
        assert_eq!(sizes(&model, 1), [2, 4]);
        model.grown(3, true);
        assert_eq!((model.sectors(), sizes(&model, 2)), (4, vec![2, 4]));
        assert_eq!(sizes(&model, 3), [4]);
        assert_eq!((model.promises(), model.promises_at(2)), (1, 0));
        model.grow(9, 5);
        model.grown(6, false);
        assert_eq!((model.sectors(), sizes(&model, 7)), (4, vec![4, 9]));
        model.grow(8, 8);
        model.refused();
        assert_eq!(sizes(&model, 9), [4, 9]);
        let found = model.adopt(&stamped(0, 5, 3)).unwrap();
        assert_eq!((found.sectors(), sizes(&found, 0)), (5, vec![5]));
        assert_eq!(found.after_cut(0).legal(8), [Zero]);
    }

    /// Another process replaces the disk: what was is over, what waits is to come.
    #[test]
    fn a_replaced_disk_has_no_past() {
        let mut model = Model::zeroed(2).with_room(3);
        let (a, _) = model.write(0, 2, false, 1);
        model.complete(a, 2, true);
        let (b, _) = model.write(1, 1, false, 3);
        let snapshot: Arc<[u8]> = Arc::from([7; 4]);
        let mut new = model.replaced(vec![Version(900), Version(901)], Some(snapshot));
        assert_eq!(cut(&new, 9), [Version(900)]);
        assert_eq!(
            new.after_cut(9).legal(1),
            [Version(901), Version(2)],
            "b has waited"
        );
        assert_eq!(new.after_cut(9).snapshot(), Some(&[7; 4][..]));
        assert!(new.is_untouched(0..1, 4) && !new.is_untouched(0..2, 4));
        assert!(new.may_read(0, Version(900), 5, 6) && !new.may_read(0, Version(1), 5, 6));
        new.complete(b, 10, true);
        assert!(new.is_written(0..2, 4, 11) && !new.is_written(0..2, 4, 10));
        assert!(new.is_untouched(0..2, 10));
        let zero = new.zero(0, 1, false, 12);
        new.complete(zero, 13, true);
        assert!(!new.is_written(0..2, 4, 20) && new.is_written(1..2, 4, 20));
        assert_eq!(new.next_version(), 3);
    }

    #[test]
    fn foreign_content_is_never_legal() {
        let mut model = Model::zeroed(2);
        model.write(0, 2, false, 1);
        let error = model.after_cut(1).check(0, &stamped(1, 1, 1)).unwrap_err();
        assert_eq!(
            (error.lba, error.found, error.stamp),
            (0, Foreign, Some((1, 1)))
        );
        assert!(model.adopt(&stamped(1, 2, 1)).is_err());
        let adopted = model.adopt(&stamped(0, 2, 1)).unwrap();
        assert_eq!(cut(&adopted, 0), [Version(1)]);
        assert_eq!(adopted.next_version(), 2);
    }
}
