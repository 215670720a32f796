//! A load that knows what it may find afterwards: many requests in flight over several NBD connections, every written
//! sector stamped with its address and a version, every request in the simulator's model of a disk.
//!
//! What is promised, and so judged, is what the model says: a sector reads as its last flushed version, or as one
//! issued later; a discarded one as before or as zeroes; never as anything else. An acknowledged write that no flush
//! covers may be lost.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

use urus_sim::model::{GuestOp, Model};
use urus_sim::rng::Rng;
use urus_sim::stamp::{Content, stamped};

use crate::nbd::{self, Client, Command, NO_SPACE, Receiver, SHUTDOWN, Sender};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// How the load behaves.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Connections, each of which goes to a queue of the server.
    pub connections: usize,
    /// Requests in flight on each.
    pub depth: usize,
    /// Bytes of a cluster: what borders lie on.
    pub cluster: u64,
    /// The longest request in bytes.
    pub longest: u64,
    /// How often, relative to one another.
    pub weights: Weights,
    /// Changes may fail for want of space. (Reads and flushes never do.)
    pub may_fill_up: bool,
    /// The tester's own test: nothing is ever flushed, and the judge is told that it was.
    pub lies: bool,
}

/// How often each kind of request comes, relative to the others.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// Plain writes.
    pub write: u64,
    /// Writes that are durable when answered.
    pub fua: u64,
    /// Zeroes, kept allocated or not, one in eight of them durable when answered.
    pub zero: u64,
    /// Discards.
    pub trim: u64,
    /// Flushes.
    pub flush: u64,
    /// Reads, judged at once.
    pub read: u64,
}

impl Weights {
    /// Some of everything.
    pub const MIXED: Self = Self {
        write: 50,
        fua: 4,
        zero: 8,
        trim: 14,
        flush: 6,
        read: 18,
    };
    /// What fills a disk.
    pub const FILL: Self = Self {
        write: 85,
        fua: 1,
        zero: 2,
        trim: 0,
        flush: 2,
        read: 10,
    };
}

/// Where on a large disk the load happens: ranges far apart, in bytes. To the judge they are one small disk, and stamps say where on that
/// they belong, so that one that shows up in another range is foreign there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// All of a disk.
    #[must_use]
    pub fn whole(bytes: u64) -> Self {
        Self(vec![(0, bytes)])
    }

    /// These: first byte and length of each, whole sectors, in ascending order.
    ///
    /// # Panics
    /// When they are not.
    #[must_use]
    pub fn of(ranges: &[(u64, u64)]) -> Self {
        let mut end = 0;
        for (first, length) in ranges {
            assert!(*first >= end && first % SECTOR == 0 && length % SECTOR == 0 && *length > 0);
            end = first + length;
        }
        Self(ranges.to_vec())
    }

    /// First byte and length of each.
    #[must_use]
    pub fn parts(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(_, length)| length).sum()
    }

    /// Where sectors of the judge's disk lie on the real one, in bytes; all of them in one piece. A flush has none.
    fn offset(&self, lba: u64, count: u64) -> u64 {
        if count == 0 {
            return 0;
        }
        let mut at = lba * SECTOR;
        for (first, length) in &self.0 {
            if at < *length {
                assert!(count * SECTOR <= length - at, "a request leaves its range");
                return first + at;
            }
            at -= length;
        }
        panic!("sector {lba} lies in none of the ranges");
    }
}

/// The disk under load, as the judge knows it.
#[derive(Debug)]
pub struct Disk {
    ranges: Ranges,
    state: Mutex<State>,
    answered: AtomicU64,
    full: AtomicU64,
    /// The server is about to go: lost connections are no fault any more.
    ending: AtomicBool,
}

#[derive(Debug)]
struct State {
    model: Model,
    clock: u64,
    /// Reads and changes in flight: first sector, end, whether it changes anything.
    busy: HashMap<u64, (u64, u64, bool)>,
    next_cookie: u64,
    faults: Vec<String>,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
enum Pending {
    Change(GuestOp),
    Flush(GuestOp),
    Read { lba: u64, count: u64, issued: u64 },
}

struct Request {
    command: Command,
    cookie: u64,
    lba: u64,
    count: u64,
    bytes: Vec<u8>,
    pending: Pending,
}

impl Disk {
    /// A disk that holds this. Versions below `first_version` belong to what was there before.
    #[must_use]
    pub fn new(initial: Vec<Content>, first_version: u64) -> Self {
        let ranges = Ranges::whole(initial.len() as u64 * SECTOR);
        Self::of(Model::new(initial, first_version), ranges)
    }

    /// The same, of which only these ranges are used. They hold this, one after the other.
    ///
    /// # Panics
    /// When it is less or more.
    #[must_use]
    pub fn within(ranges: Ranges, initial: Vec<Content>, first_version: u64) -> Self {
        assert_eq!(ranges.bytes(), initial.len() as u64 * SECTOR);
        Self::of(Model::new(initial, first_version), ranges)
    }

    fn of(model: Model, ranges: Ranges) -> Self {
        Self {
            ranges,
            state: Mutex::new(State {
                model,
                clock: 0,
                busy: HashMap::new(),
                next_cookie: 0,
                faults: Vec::new(),
            }),
            answered: AtomicU64::new(0),
            full: AtomicU64::new(0),
            ending: AtomicBool::new(false),
        }
    }

    /// What of it is used.
    #[must_use]
    pub fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// Requests answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Requests that failed for want of space.
    #[must_use]
    pub fn full(&self) -> u64 {
        self.full.load(Ordering::Relaxed)
    }

    /// From here on connections may be lost, and requests refused because the server is going.
    pub fn expect_the_end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// The server closed the image cleanly: that made durable what was answered.
    pub fn closed_cleanly(&self) {
        let mut state = self.locked();
        let issued = state.tick();
        let flush = state.model.flush(issued);
        let completed = state.tick();
        state.model.complete(flush, completed, true);
    }

    /// The first thing that went wrong during the load.
    ///
    /// # Errors
    /// What it was.
    pub fn faultless(&self) -> Result<(), String> {
        let state = self.locked();
        match state.faults.first() {
            Some(first) => Err(format!("{} faults, the first: {first}", state.faults.len())),
            None => Ok(()),
        }
    }

    /// Judges all bytes as found after a kill, and goes on from them.
    ///
    /// # Errors
    /// The first sector that holds what it must not.
    pub fn judge_after_kill(&self, bytes: &[u8]) -> Result<Self, String> {
        let state = self.locked();
        let view = state.model.after_cut(state.clock);
        let found = view
            .check(0, bytes)
            .and_then(|()| state.model.adopt(bytes))
            .map_err(|mismatch| mismatch.to_string());
        found.map(|model| Self::of(model, self.ranges.clone()))
    }

    /// Judges all bytes as read while nothing is in flight.
    ///
    /// # Errors
    /// The first sector that holds what it must not.
    pub fn judge_live(&self, bytes: &[u8]) -> Result<(), String> {
        let mut state = self.locked();
        let (issued, completed) = (state.tick(), state.tick());
        let judged = state.model.check_read(0, bytes, issued, completed);
        judged.map_err(|mismatch| mismatch.to_string())
    }

    /// One change, made and answered while nothing else is in flight, and without an error.
    ///
    /// # Errors
    /// The server's, or the socket's.
    pub fn ask(
        &self,
        client: &mut Client,
        command: Command,
        lba: u64,
        count: u64,
    ) -> Result<(), String> {
        let (op, version) = {
            let mut state = self.locked();
            let issued = state.tick();
            match command {
                Command::Write { fua } => {
                    let (op, version) = state.model.write(lba, count, fua, issued);
                    (op, Some(version))
                }
                Command::Zero { fua, .. } => (state.model.zero(lba, count, fua, issued), None),
                Command::Trim => (state.model.discard(lba, count, issued), None),
                _ => (state.model.flush(issued), None),
            }
        };
        let bytes = version.map_or_else(Vec::new, |version| stamped(lba, count, version));
        let offset = self.ranges.offset(lba, count);
        let asked = client.ask(command, offset, count * SECTOR, &bytes);
        let mut state = self.locked();
        let completed = state.tick();
        state.model.complete(op, completed, asked.is_ok());
        asked.map(drop).map_err(|error| error.to_string())
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere is reported there; what it left is still the history.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Draws a request and enters it into the history; None where a liar's flush was all.
    fn issue(&self, rng: &mut Rng, habits: &Habits) -> Option<Request> {
        let mut state = self.locked();
        // Reads keep away from changes in flight: a page is not copied in one piece, and a sector half of the one and half
        // of the other would be the kernel's doing.
        let (command, lba, count) = (0..8)
            .map(|_| draw(rng, habits, &self.ranges))
            .find(|&(command, lba, count)| !state.meets(command, lba, count))
            .unwrap_or((Command::Flush, 0, 0));
        let issued = state.tick();
        let mut version = None;
        let pending = match command {
            Command::Read => Pending::Read { lba, count, issued },
            Command::Write { fua } => {
                let (op, drawn) = state.model.write(lba, count, fua, issued);
                version = Some(drawn);
                Pending::Change(op)
            }
            Command::Zero { fua, .. } => Pending::Change(state.model.zero(lba, count, fua, issued)),
            Command::Trim => Pending::Change(state.model.discard(lba, count, issued)),
            Command::Flush | Command::Disconnect => {
                let op = state.model.flush(issued);
                if habits.lies {
                    let completed = state.tick();
                    state.model.complete(op, completed, true);
                    return None;
                }
                Pending::Flush(op)
            }
        };
        let cookie = state.enter(command, lba, count);
        drop(state);
        Some(Request {
            command: honest(command, habits),
            cookie,
            lba,
            count,
            bytes: version.map_or_else(Vec::new, |version| stamped(lba, count, version)),
            pending,
        })
    }

    /// A reply, with the bytes of a read.
    fn answer(&self, cookie: u64, pending: Pending, error: u32, bytes: &[u8], habits: &Habits) {
        let mut state = self.locked();
        let completed = state.tick();
        state.busy.remove(&cookie);
        if error != 0 {
            let going = error == SHUTDOWN && self.ending.load(Ordering::Acquire);
            let changes = matches!(pending, Pending::Change(_));
            let full = error == NO_SPACE && habits.may_fill_up && changes;
            if full {
                self.full.fetch_add(1, Ordering::Relaxed);
            } else if !going {
                state
                    .faults
                    .push(format!("{pending:?} failed with error {error}"));
            }
        }
        match pending {
            Pending::Change(op) | Pending::Flush(op) => {
                state.model.complete(op, completed, error == 0);
            }
            Pending::Read { lba, issued, .. } if error == 0 => {
                if let Err(mismatch) = state.model.check_read(lba, bytes, issued, completed) {
                    state.faults.push(format!("under load: {mismatch}"));
                }
            }
            Pending::Read { .. } => {}
        }
        drop(state);
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    fn fault(&self, fault: String) {
        self.locked().faults.push(fault);
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn enter(&mut self, command: Command, lba: u64, count: u64) -> u64 {
        self.next_cookie += 1;
        if count > 0 {
            let changes = command != Command::Read;
            self.busy
                .insert(self.next_cookie, (lba, lba + count, changes));
        }
        self.next_cookie
    }

    fn meets(&self, command: Command, lba: u64, count: u64) -> bool {
        let changes = command != Command::Read;
        self.busy
            .values()
            .any(|&(first, end, other)| other != changes && first < lba + count && lba < end)
    }
}

/// What is sent: a liar never asks for anything durable.
fn honest(command: Command, habits: &Habits) -> Command {
    match command {
        Command::Write { .. } if habits.lies => Command::Write { fua: false },
        Command::Zero { keep, .. } if habits.lies => Command::Zero { fua: false, keep },
        other => other,
    }
}

fn draw(rng: &mut Rng, habits: &Habits, ranges: &Ranges) -> (Command, u64, u64) {
    let weights = habits.weights;
    let kinds = [
        (weights.write, Command::Write { fua: false }),
        (weights.fua, Command::Write { fua: true }),
        (
            weights.zero,
            Command::Zero {
                fua: rng.chance(32),
                keep: rng.chance(128),
            },
        ),
        (weights.trim, Command::Trim),
        (weights.flush, Command::Flush),
        (weights.read, Command::Read),
    ];
    let mut at = rng.below(kinds.iter().map(|(weight, _)| weight).sum());
    let mut command = Command::Flush;
    for (weight, kind) in kinds {
        if at < weight {
            command = kind;
            break;
        }
        at -= weight;
    }
    if command == Command::Flush {
        return (command, 0, 0);
    }
    // Half of all lies on cluster borders, half begins in an eighth of the range, so that requests meet in one cluster. Each range has its
    // share, however short it is.
    let number = match ranges.0.len() {
        1 => 0,
        several => rng.index(several),
    };
    let sectors = ranges.0[number].1 / SECTOR;
    let first: u64 = ranges.0[..number]
        .iter()
        .map(|(_, bytes)| bytes / SECTOR)
        .sum();
    let cluster = (habits.cluster / SECTOR).min(sectors);
    let window = if rng.chance(128) {
        sectors.div_ceil(8)
    } else {
        sectors
    };
    let longest = (habits.longest / SECTOR).clamp(1, sectors);
    let (lba, count) = if rng.chance(128) {
        let count = cluster * (1 + rng.below(longest.div_ceil(cluster)));
        (rng.below(window) / cluster * cluster, count)
    } else {
        let longest = if rng.chance(160) {
            longest.min(16)
        } else {
            longest
        };
        (rng.below(window), 1 + rng.below(longest))
    };
    (
        command,
        first + lba,
        count.min(longest.max(cluster)).min(sectors - lba),
    )
}

/// Runs the load until `stop` is set or the server is gone.
pub fn run(disk: &Disk, socket: &Path, habits: &Habits, seed: u64, stop: &AtomicBool) {
    let mut rng = Rng::new(seed);
    std::thread::scope(|scope| {
        for number in 0..habits.connections {
            let mut rng = rng.fork(number as u64);
            scope.spawn(
                move || match Connection::new(disk, socket, habits.clone()) {
                    Ok((connection, sender, receiver)) => std::thread::scope(|scope| {
                        scope.spawn(|| connection.receive(receiver));
                        connection.send(sender, &mut rng, stop);
                    }),
                    Err(error) if disk.ending.load(Ordering::Acquire) => drop(error),
                    Err(error) => disk.fault(format!("connecting: {error}")),
                },
            );
        }
    });
}

struct Connection<'a> {
    disk: &'a Disk,
    habits: Habits,
    flight: Mutex<Flight>,
    landed: Condvar,
}

#[derive(Default)]
struct Flight {
    pending: HashMap<u64, Pending>,
    gone: bool,
    done: bool,
}

impl<'a> Connection<'a> {
    fn new(disk: &'a Disk, socket: &Path, habits: Habits) -> io::Result<(Self, Sender, Receiver)> {
        let (sender, receiver, _) = nbd::connect(socket)?;
        let this = Self {
            disk,
            habits,
            flight: Mutex::default(),
            landed: Condvar::new(),
        };
        Ok((this, sender, receiver))
    }

    fn flight(&self) -> MutexGuard<'_, Flight> {
        self.flight
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wait_while(&self, wait: impl Fn(&Flight) -> bool) -> bool {
        let flight = self
            .landed
            .wait_while(self.flight(), |flight| !flight.gone && wait(flight))
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        !flight.gone
    }

    fn send(&self, mut sender: Sender, rng: &mut Rng, stop: &AtomicBool) {
        let depth = self.habits.depth;
        while !stop.load(Ordering::Acquire) && self.wait_while(|f| f.pending.len() >= depth) {
            let Some(request) = self.disk.issue(rng, &self.habits) else {
                continue;
            };
            self.flight()
                .pending
                .insert(request.cookie, request.pending);
            let Request {
                command,
                cookie,
                lba,
                count,
                bytes,
                ..
            } = request;
            let offset = self.disk.ranges.offset(lba, count);
            let sent = sender.send(command, cookie, offset, count * SECTOR, &bytes);
            if let Err(error) = sent {
                self.lost(&error);
                break;
            }
        }
        self.wait_while(|flight| !flight.pending.is_empty());
        self.flight().done = true;
        let _ = sender.send(Command::Disconnect, 0, 0, 0, &[]);
        sender.hang_up();
    }

    fn receive(&self, mut receiver: Receiver) {
        loop {
            if let Err(error) = self.receive_one(&mut receiver) {
                let idle = {
                    let flight = self.flight();
                    flight.pending.is_empty() && !flight.done
                };
                if error.kind() == io::ErrorKind::WouldBlock && idle {
                    continue;
                }
                self.lost(&error);
                return;
            }
        }
    }

    fn receive_one(&self, receiver: &mut Receiver) -> io::Result<()> {
        let reply = receiver.reply()?;
        let pending = self.flight().pending.get(&reply.cookie).copied();
        let pending =
            pending.ok_or_else(|| io::Error::other("a reply to a request that was not made"))?;
        let bytes = match pending {
            Pending::Read { count, .. } if reply.error == 0 => receiver.bytes(count * SECTOR)?,
            _ => Vec::new(),
        };
        self.disk
            .answer(reply.cookie, pending, reply.error, &bytes, &self.habits);
        self.flight().pending.remove(&reply.cookie);
        self.landed.notify_all();
        Ok(())
    }

    /// The connection is gone: a fault, unless it was over or the server was to go.
    fn lost(&self, error: &io::Error) {
        let mut flight = self.flight();
        if !flight.gone && !flight.done && !self.disk.ending.load(Ordering::Acquire) {
            let stuck = flight.pending.len();
            self.disk.fault(format!(
                "a connection was lost with {stuck} requests in flight: {error}"
            ));
        }
        flight.gone = true;
        drop(flight);
        self.landed.notify_all();
    }
}

/// What a disk of stamped bytes holds.
#[must_use]
pub fn contents(bytes: &[u8]) -> Vec<Content> {
    let sectors = bytes.chunks(usize::try_from(SECTOR).expect("small"));
    (0..)
        .zip(sectors)
        .map(|(lba, sector)| urus_sim::stamp::content(sector, lba))
        .collect()
}

#[cfg(test)]
mod tests {
    //! The judge must find what it is there for: a flushed sector that is lost, another sector's stamp, a torn one, zeroes
    //! that nobody asked for. The same history without the fault must pass.
    use super::*;

    /// Two sectors written and flushed, a third only written.
    fn history() -> (Disk, Vec<u8>) {
        let disk = Disk::new(vec![Content::Zero; 4], 1);
        {
            let mut state = disk.locked();
            let (a, version) = state.model.write(0, 2, false, 1);
            assert_eq!(version, 1);
            state.model.complete(a, 2, true);
            let flush = state.model.flush(3);
            state.model.complete(flush, 4, true);
            let (b, _) = state.model.write(2, 1, false, 5);
            state.model.complete(b, 6, true);
            state.clock = 6;
        }
        let mut bytes = stamped(0, 2, 1);
        bytes.extend(stamped(2, 1, 2));
        bytes.extend([0; 512]);
        (disk, bytes)
    }

    #[test]
    fn what_was_promised_is_accepted() {
        let (disk, mut bytes) = history();
        disk.judge_live(&bytes).expect("all of it is there");
        let next = disk.judge_after_kill(&bytes).expect("all of it is there");
        next.judge_after_kill(&bytes).expect("and stays");
        bytes[1024..1536].fill(0);
        let next = disk.judge_after_kill(&bytes).expect("it was not flushed");
        bytes[1024..1536].copy_from_slice(&stamped(2, 1, 2));
        next.judge_after_kill(&bytes)
            .expect_err("it was gone, it cannot come back");
    }

    #[test]
    fn a_lost_flushed_sector_is_found() {
        let (disk, mut bytes) = history();
        bytes[512..1024].fill(0);
        let said = disk.judge_after_kill(&bytes).expect_err("it was flushed");
        assert!(said.contains("sector 1 holds Zero"), "{said}");
    }

    #[test]
    fn foreign_and_torn_sectors_are_found() {
        let (disk, bytes) = history();
        for (at, wrong) in [
            (1024, stamped(0, 1, 1)),
            (1536, stamped(3, 1, 7)),
            (1536, stamped(2, 1, 2)),
            (0, vec![0xee; 512]),
            (0, [&bytes[..256], &[0; 256]].concat()),
        ] {
            let mut bytes = bytes.clone();
            bytes[at..at + 512].copy_from_slice(&wrong);
            disk.judge_after_kill(&bytes)
                .expect_err("nobody wrote that");
            disk.judge_live(&bytes).expect_err("nobody wrote that");
        }
    }

    /// Requests stay within a range, come to each of them, and each sector has a place of its own.
    #[test]
    fn ranges_far_apart_are_one_disk() {
        let ranges = Ranges::of(&[(0, 8192), (1 << 40, 1024), (5 << 40, 4096)]);
        assert_eq!(ranges.bytes(), 8192 + 1024 + 4096);
        for (lba, offset) in [
            (0, 0),
            (15, 7680),
            (16, 1 << 40),
            (17, (1 << 40) + 512),
            (18, 5 << 40),
            (25, (5 << 40) + 3584),
        ] {
            assert_eq!(ranges.offset(lba, 1), offset);
        }
        let habits = Habits {
            connections: 1,
            depth: 1,
            cluster: 2048,
            longest: 4096,
            weights: Weights::MIXED,
            may_fill_up: false,
            lies: false,
        };
        let (mut rng, mut seen) = (Rng::new(1), [false; 26]);
        for _ in 0..2000 {
            let (_, lba, count) = draw(&mut rng, &habits, &ranges);
            ranges.offset(lba, count);
            let touched = usize::try_from(lba).unwrap()..usize::try_from(lba + count).unwrap();
            seen[touched].fill(true);
        }
        assert_eq!(seen, [true; 26]);
    }

    #[test]
    fn a_clean_close_is_a_flush() {
        let (disk, mut bytes) = history();
        disk.closed_cleanly();
        disk.judge_after_kill(&bytes).expect("all of it is there");
        bytes[1024..1536].fill(0);
        disk.judge_after_kill(&bytes)
            .expect_err("closing has made it durable");
    }

    #[test]
    fn an_error_that_was_not_expected_is_a_fault() {
        let habits = Habits {
            connections: 1,
            depth: 1,
            cluster: 512,
            longest: 512,
            weights: Weights::FILL,
            may_fill_up: false,
            lies: false,
        };
        for (may_fill_up, error, faultless) in [
            (false, 0, true),
            (false, NO_SPACE, false),
            (true, NO_SPACE, true),
            (true, 5, false),
            (false, SHUTDOWN, false),
        ] {
            let (disk, _) = history();
            let op = disk.locked().model.zero(0, 1, false, 7);
            let habits = Habits {
                may_fill_up,
                ..habits.clone()
            };
            disk.answer(1, Pending::Change(op), error, &[], &habits);
            assert_eq!(disk.faultless().is_ok(), faultless, "error {error}");
        }
        let habits = Habits {
            may_fill_up: true,
            ..habits
        };
        let (disk, _) = history();
        let op = disk.locked().model.flush(7);
        disk.answer(1, Pending::Flush(op), NO_SPACE, &[], &habits);
        disk.faultless().expect_err("a flush needs no room");
    }
}
