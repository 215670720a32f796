//! A request while the engine works on it: what the engine is asked, what comes next, and what the client is told at the end.
//!
//! Most requests are one question to the engine. Three are several, one after the other: a trim that must be durable (discard, then flush),
//! a block status (in steps, so that the engine's answers are bounded), and a cache request (reads in steps).

use urus::{Buffer, Completion, Error, Extent, Request};

use crate::limits::{CACHE_STEP_BYTES, Load, STATUS_DESCRIPTORS};
use crate::pool::Pool;
use crate::reply::Reply;
use crate::transmission::Command;
use crate::wire::{ErrorCode, state};

/// One request in flight.
#[derive(Debug)]
pub(crate) struct Operation {
    /// Which connection waits for it.
    pub(crate) connection: usize,
    pub(crate) command: Command,
    cookie: u64,
    structured: bool,
    load: Load,
    task: Task,
}

#[derive(Debug)]
enum Task {
    /// One question, and its answer is the reply.
    Plain,
    /// Discarded; a flush is to follow.
    Trim,
    Status(Status),
    Cache {
        next: u64,
        end: u64,
    },
}

/// What follows an answer of the engine.
#[derive(Debug)]
pub(crate) enum Step {
    /// Ask the engine this as well.
    Ask(Request),
    /// Tell the client.
    Answer(Reply),
    /// Tell the client that it failed ([`Operation::failure`]).
    Fail(Error),
}

/// Whose request it is, and how replies to it look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    pub(crate) connection: usize,
    pub(crate) cookie: u64,
    pub(crate) structured: bool,
    pub(crate) load: Load,
}

impl Operation {
    /// The operation and the first thing to ask the engine. `payload` is what a write brings; `status_step` bounds what the engine is
    /// asked at once for a block status.
    ///
    /// # Panics
    /// For a disconnect, which is no operation.
    pub(crate) fn begin(
        token: u64,
        origin: Origin,
        command: Command,
        payload: Option<Buffer>,
        status_step: u64,
        pool: &mut Pool,
    ) -> (Self, Request) {
        let mut task = Task::Plain;
        let request = match command {
            Command::Read { offset, len } => Request::read(token, offset, pool.take(len)),
            Command::Write { offset, len, fua } => {
                let payload = payload.unwrap_or_else(|| pool.take(len));
                Request::write(token, offset, payload).fua(fua)
            }
            Command::WriteZeroes {
                offset,
                len,
                unmap,
                fua,
            } => Request::write_zeroes(token, offset, len)
                .unmap(unmap)
                .fua(fua),
            Command::Trim { offset, len, fua } => {
                if fua {
                    task = Task::Trim;
                }
                Request::discard(token, offset, len)
            }
            Command::Flush => Request::flush(token),
            Command::BlockStatus { offset, len, one } => {
                let status = Status::new(offset, len, one, status_step);
                let request = status.request(token);
                task = Task::Status(status);
                request
            }
            Command::Cache { offset, len } => {
                let first = len.min(CACHE_STEP_BYTES);
                task = Task::Cache {
                    next: offset + first,
                    end: offset + len,
                };
                Request::read(token, offset, pool.take(step_len(first)))
            }
            Command::Disconnect => unreachable!("a disconnect asks the engine nothing"),
        };
        let operation = Self {
            connection: origin.connection,
            command,
            cookie: origin.cookie,
            structured: origin.structured,
            load: origin.load,
            task,
        };
        (operation, request)
    }

    /// Takes an answer of the engine.
    pub(crate) fn advance(&mut self, completion: Completion, pool: &mut Pool) -> Step {
        let token = completion.token;
        if let Err(error) = completion.result {
            completion
                .buffer
                .into_iter()
                .for_each(|buffer| pool.give(buffer));
            return Step::Fail(error);
        }
        match &mut self.task {
            Task::Plain => self.plain(completion.buffer, pool),
            Task::Trim => {
                self.task = Task::Plain;
                Step::Ask(Request::flush(token))
            }
            Task::Status(status) => {
                if status.take(&completion.extents) {
                    let descriptors = status.finish();
                    Step::Answer(Reply::block_status(self.cookie, descriptors, self.load))
                } else {
                    Step::Ask(status.request(token))
                }
            }
            Task::Cache { next, end } => {
                let (offset, len) = (*next, (*end - *next).min(CACHE_STEP_BYTES));
                *next += len;
                if len == 0 {
                    completion
                        .buffer
                        .into_iter()
                        .for_each(|buffer| pool.give(buffer));
                    return Step::Answer(Reply::done(self.cookie, self.load));
                }
                let buffer = match completion.buffer {
                    Some(buffer) if buffer.len() == step_len(len) => buffer,
                    _ => pool.take(step_len(len)),
                };
                Step::Ask(Request::read(token, offset, buffer))
            }
        }
    }

    fn plain(&self, buffer: Option<Buffer>, pool: &mut Pool) -> Step {
        let Command::Read { offset, .. } = self.command else {
            buffer.into_iter().for_each(|buffer| pool.give(buffer));
            return Step::Answer(Reply::done(self.cookie, self.load));
        };
        Step::Answer(Reply::data(
            self.cookie,
            self.structured,
            offset,
            buffer,
            self.load,
        ))
    }

    /// The reply to a request that the engine has failed. Its text says no more than its error value: the details are the
    /// host's affair, and in the log.
    pub(crate) fn failure(&self, error: &Error) -> Reply {
        let code = ErrorCode::from_errno(error.errno());
        let text = match code {
            ErrorCode::NoSpc => "no space is left where the image lies; try again once there is",
            ErrorCode::Shutdown => "the server is shutting down",
            _ => "the image could not be read or written; the server's log says why",
        };
        Reply::error(self.cookie, self.structured, code, text, self.load)
    }
}

fn step_len(len: u64) -> usize {
    usize::try_from(len).expect("steps are bounded by limits.rs")
}

/// A block status in the making.
#[derive(Debug)]
struct Status {
    /// What was not yet asked.
    next: u64,
    end: u64,
    step: u64,
    one: bool,
    /// The extent that may still grow: length and flags.
    run: Option<(u64, u32)>,
    descriptors: Vec<u8>,
}

impl Status {
    fn new(offset: u64, len: u64, one: bool, step: u64) -> Self {
        Self {
            next: offset,
            end: offset + len,
            step: step.max(1),
            one,
            run: None,
            descriptors: Vec::new(),
        }
    }

    fn request(&self, token: u64) -> Request {
        Request::block_status(token, self.next, (self.end - self.next).min(self.step))
    }

    /// Takes the extents from `next` on. True when nothing more is to be asked.
    fn take(&mut self, extents: &[Extent]) -> bool {
        let asked_from = self.next;
        let stop = self.end.min(asked_from.saturating_add(self.step));
        for extent in extents {
            // Taken is what follows without a gap and lies in what was asked, whatever the engine says besides.
            let end = extent.start.saturating_add(extent.len).min(stop);
            if extent.start > self.next || end <= self.next {
                continue;
            }
            if !self.append(end - self.next, flags(extent)) {
                return true;
            }
            self.next = end;
        }
        // The engine may answer for a part of what it was asked. One that answers nothing is not asked again.
        self.next == asked_from || self.next >= self.end
    }

    /// False when the descriptors are complete before this one.
    fn append(&mut self, len: u64, flags: u32) -> bool {
        match &mut self.run {
            Some((run, same)) if *same == flags => *run += len,
            Some(_) if self.one => return false,
            Some(_) => {
                // One place is kept for the run that `finish` writes.
                if self.descriptors.len() / 8 + 1 >= STATUS_DESCRIPTORS {
                    return false;
                }
                self.close_run();
                self.run = Some((len, flags));
            }
            None => self.run = Some((len, flags)),
        }
        true
    }

    fn close_run(&mut self) {
        if let Some((len, flags)) = self.run.take() {
            let len =
                u32::try_from(len).expect("a run lies within a request, whose length has 32 bits");
            self.descriptors.extend(len.to_be_bytes());
            self.descriptors.extend(flags.to_be_bytes());
        }
    }

    fn finish(&mut self) -> Vec<u8> {
        if self.run.is_none() && self.descriptors.is_empty() {
            // "A server MAY always safely report a status of 0 for any block", and must report at least one.
            self.run = Some(((self.end - self.next).max(1), 0));
        }
        self.close_run();
        std::mem::take(&mut self.descriptors)
    }
}

/// The flags of `base:allocation`, as qemu-nbd derives them.
fn flags(extent: &Extent) -> u32 {
    let mut flags = 0;
    if !extent.data {
        flags |= state::HOLE;
    }
    if extent.zero {
        flags |= state::ZERO;
    }
    flags
}

#[cfg(test)]
mod tests {
    //! Guards block status replies: consecutive, merged, bounded, never empty, whatever the engine answers.
    use super::*;
    use proptest::prelude::*;

    fn extent(start: u64, len: u64, data: bool) -> Extent {
        Extent {
            start,
            len,
            depth: 0,
            present: data,
            zero: !data,
            data,
            compressed: false,
            host: None,
        }
    }

    fn decode(descriptors: &[u8]) -> Vec<(u64, u32)> {
        descriptors
            .chunks(8)
            .map(|pair| {
                let number =
                    |at: usize| u32::from_be_bytes(pair[at..at + 4].try_into().expect("four"));
                (u64::from(number(0)), number(4))
            })
            .collect()
    }

    /// Asks a made-up engine, whose layout is `data(byte)`, until the status is complete.
    fn run(
        offset: u64,
        len: u64,
        one: bool,
        step: u64,
        unit: u64,
        data: impl Fn(u64) -> bool,
    ) -> Vec<(u64, u32)> {
        let mut status = Status::new(offset, len, one, step);
        loop {
            let stop = (status.next + step).min(offset + len);
            let mut extents = Vec::new();
            let mut at = status.next;
            while at < stop {
                let end = (at / unit * unit + unit).min(stop);
                extents.push(extent(at, end - at, data(at / unit)));
                at = end;
            }
            if status.take(&extents) {
                return decode(&status.finish());
            }
        }
    }

    #[test]
    fn neighbours_are_merged_across_steps() {
        let all = run(0, 1 << 30, false, 1 << 16, 4096, |unit| unit >= 1000);
        assert_eq!(all, [(1000 * 4096, 3), ((1 << 30) - 1000 * 4096, 0)]);
        let one = run(4096, 1 << 30, true, 1 << 16, 4096, |unit| unit >= 1000);
        assert_eq!(one, [(999 * 4096, 3)]);
    }

    #[test]
    fn descriptors_are_bounded() {
        let all = run(0, 1 << 30, false, 1 << 16, 512, |unit| unit % 2 == 0);
        assert_eq!(all.len(), STATUS_DESCRIPTORS);
        assert!(all.iter().all(|&(len, _)| len == 512));
    }

    #[test]
    fn an_engine_that_says_nothing_gives_status_zero() {
        let mut status = Status::new(512, 4096, false, 1 << 20);
        assert!(status.take(&[]));
        assert_eq!(decode(&status.finish()), [(4096, 0)]);
    }

    proptest! {
        #[test]
        fn replies_lie_within_the_request(
            offset in 0u64..1000, len in 1u64..5000, one in any::<bool>(), step in 1u64..3000,
            answers in prop::collection::vec(prop::collection::vec((any::<u8>(), 0u64..2000, 0u64..3000, any::<bool>()), 0..6), 1..20),
        ) {
            let mut status = Status::new(offset, len, one, step);
            for answer in &answers {
                let extents: Vec<_> = answer
                    .iter()
                    .map(|&(kind, start, len, data)| match kind {
                        0 => extent(u64::MAX - start, len, data),
                        _ => extent(start, len, data),
                    })
                    .collect();
                if status.take(&extents) {
                    break;
                }
            }
            let descriptors = decode(&status.finish());
            prop_assert!(!descriptors.is_empty());
            prop_assert!(!one || descriptors.len() == 1);
            prop_assert!(descriptors.iter().all(|&(len, _)| len > 0));
            prop_assert!(descriptors.iter().map(|&(len, _)| len).sum::<u64>() <= len);
            prop_assert!(descriptors.windows(2).all(|pair| pair[0].1 != pair[1].1));
        }
    }
}
