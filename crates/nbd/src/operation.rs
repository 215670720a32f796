//! A request while the engine works on it: what the engine is asked, what comes next, and what the client is told at the end.
//!
//! Most requests are one question to the engine. Three are several, one after the other: a trim that must be durable (discard, then flush),
//! a block status (in steps, so that the engine's answers are bounded), and a cache request (reads in steps).

use urus::{Buffer, Completion, Error, Request};

use crate::export::Export;
use crate::limits::{CACHE_STEP_BYTES, Load};
use crate::pool::Pool;
use crate::reply::{NO_MEMORY, Reply, Tag};
use crate::status::Status;
use crate::transmission::Command;
use crate::wire::ErrorCode;

/// One request in flight.
#[derive(Debug)]
pub(crate) struct Operation {
    /// Which connection waits for it.
    pub(crate) connection: usize,
    pub(crate) command: Command,
    tag: Tag,
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
    pub(crate) tag: Tag,
    pub(crate) load: Load,
}

impl Operation {
    /// The operation and the first thing to ask the engine; None where there is no memory for it. `payload` is what a write
    /// brings.
    ///
    /// # Panics
    /// For a disconnect and for a query in its payload's form, which are no operations.
    pub(crate) fn begin(
        token: u64,
        origin: Origin,
        command: Command,
        payload: Option<Buffer>,
        export: &Export,
        pool: &mut Pool,
    ) -> Option<(Self, Request)> {
        let mut task = Task::Plain;
        let request = match command {
            Command::Read { offset, len } => Request::read(token, offset, pool.take(len)?),
            Command::Write { offset, len, fua } => {
                let payload = payload.or_else(|| pool.take(len))?;
                Request::write(token, offset, payload).fua(fua)
            }
            Command::WriteZeroes {
                offset,
                len,
                unmap,
                fua,
                ..
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
            Command::BlockStatus {
                offset,
                len,
                one,
                contexts,
            } => {
                let step = export.status_step_bytes;
                let status = Status::new(offset, len, one, contexts, step, export.layers);
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
                Request::read(token, offset, pool.take(step_len(first))?)
            }
            Command::Query { .. } | Command::Disconnect => {
                unreachable!("asks the engine nothing")
            }
        };
        let operation = Self {
            connection: origin.connection,
            command,
            tag: origin.tag,
            load: origin.load,
            task,
        };
        Some((operation, request))
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
                    let lists = status.finish();
                    Step::Answer(Reply::block_status(self.tag, &lists, self.load))
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
                    return Step::Answer(Reply::done(self.tag, self.load));
                }
                let buffer = match completion.buffer {
                    Some(buffer) if buffer.len() == step_len(len) => Some(buffer),
                    _ => pool.take(step_len(len)),
                };
                let Some(buffer) = buffer else {
                    return Step::Answer(Reply::no_memory(self.tag, self.load));
                };
                Step::Ask(Request::read(token, offset, buffer))
            }
        }
    }

    fn plain(&self, buffer: Option<Buffer>, pool: &mut Pool) -> Step {
        let Command::Read { .. } = self.command else {
            buffer.into_iter().for_each(|buffer| pool.give(buffer));
            return Step::Answer(Reply::done(self.tag, self.load));
        };
        Step::Answer(Reply::data(self.tag, buffer, self.load))
    }

    /// The reply to a request that the engine has failed. Its text says no more than its error value: the details are the
    /// host's affair, and in the log.
    pub(crate) fn failure(&self, error: &Error) -> Reply {
        let code = ErrorCode::from_errno(error.errno());
        let text = match code {
            ErrorCode::NoSpc => "no space is left where the image lies; try again once there is",
            ErrorCode::NoMem => NO_MEMORY,
            ErrorCode::Shutdown => "the server is shutting down",
            _ => "the image could not be read or written; the server's log says why",
        };
        Reply::error(self.tag, code, text, self.load)
    }
}

fn step_len(len: u64) -> usize {
    usize::try_from(len).expect("steps are bounded by limits.rs")
}
