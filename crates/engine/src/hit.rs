//! Requests that need no task (*hits*): from the look-up straight to the storage, and from there to the reply.
//!
//! A hit that is one piece of one file is kept by its operation alone; one of several pieces has an entry among the pending requests,
//! with a countdown. A read that has come *alone* is tried at once when it is to be started, where the storage can tell without
//! waiting: then it never was an operation.

use std::io;
use std::rc::Rc;

use urus_format::L2Entry;

use crate::chain::{LayerEntry, LayerKind, Piece};
use crate::file::{Direction, Next, Transfer};
use crate::limits;
use crate::queue::Core;
use crate::storage::{FileId, Memory, Storage};
use crate::to_usize;
use crate::write::writable_in_place;

/// A transfer of a request that needs no task.
pub(crate) struct Direct<M> {
    pub(crate) owner: Owner,
    pub(crate) transfer: Transfer<M>,
}

/// What such an operation is for.
#[derive(Clone, Copy)]
pub(crate) enum Owner {
    /// The whole of a request, which is known nowhere else.
    Whole {
        /// The caller's.
        token: u64,
        /// What `QueuePins::begin` returned.
        epoch: u64,
    },
    /// A part of the pending request with this index.
    Part { request: usize },
}

/// A part of a hit: one operation on adjacent bytes of one file.
#[derive(Clone, Copy)]
struct Part {
    file: FileId,
    host: u64,
    start: usize,
    len: usize,
}

/// Parts of a hit, without allocation.
pub(crate) struct Parts {
    parts: [Part; limits::DIRECT_PIECES],
    count: usize,
}

impl Parts {
    fn new() -> Self {
        Self {
            parts: [Part {
                file: FileId(0),
                host: 0,
                start: 0,
                len: 0,
            }; limits::DIRECT_PIECES],
            count: 0,
        }
    }

    /// Adds a part, joined to the last where both are adjacent; `false` when there are too many.
    fn push(&mut self, part: Part) -> bool {
        if let Some(last) = self.count.checked_sub(1).map(|last| &mut self.parts[last]) {
            let adjacent = last.file == part.file
                && last.host + last.len as u64 == part.host
                && last.start + last.len == part.start;
            if adjacent {
                last.len += part.len;
                return true;
            }
        }
        if self.count == self.parts.len() {
            return false;
        }
        self.parts[self.count] = part;
        self.count += 1;
        true
    }

    fn as_slice(&self) -> &[Part] {
        &self.parts[..self.count]
    }
}

impl<S: Storage> Core<S> {
    /// A read that nothing has been found out of yet.
    #[inline]
    pub(crate) fn begin_read(
        self: &Rc<Self>,
        token: u64,
        epoch: u64,
        offset: u64,
        memory: S::Memory,
    ) {
        let len = memory.len();
        if let Err(error) = self.worker.check_range(offset, len as u64) {
            return self.reply(token, epoch, Err(Box::new(error)), Some(memory));
        }
        if len == 0 {
            return self.reply(token, epoch, Ok(()), Some(memory));
        }
        let first = self.worker.resolve(offset, len as u64);
        match first {
            (Piece::Data { file, offset: host }, bytes)
                if bytes == len as u64 && self.worker.files.is_plain(file, host, &memory) =>
            {
                let direct = Direct {
                    owner: Owner::Whole { token, epoch },
                    transfer: Transfer::new(Direction::Read, file, host, memory),
                };
                if self.worker.reactor().has_unstarted() {
                    self.submit_direct(direct);
                } else {
                    *self.alone.borrow_mut() = Some(direct);
                }
            }
            (Piece::Zero, bytes) if bytes == len as u64 => {
                memory.zero(0, len);
                self.reply(token, epoch, Ok(()), Some(memory));
            }
            first => self.begin_long_read((token, epoch), offset, memory, first),
        }
    }

    /// A read whose first piece is not all of it.
    fn begin_long_read(
        self: &Rc<Self>,
        (token, epoch): (u64, u64),
        offset: u64,
        memory: S::Memory,
        first: (Piece<'_>, u64),
    ) {
        let request = self.insert(token, epoch, Some(memory.clone()));
        let mut parts = Parts::new();
        if self.pieces_to_read(offset, &memory, first, &mut parts) {
            self.submit_parts(request, &memory, &parts, Direction::Read);
        } else {
            self.spawn(request, move |core| async move {
                core.worker.read_guest(offset, memory).await
            });
        }
    }

    /// Whether a read is a hit. Zeroes are filled in at once.
    fn pieces_to_read(
        &self,
        offset: u64,
        memory: &S::Memory,
        first: (Piece<'_>, u64),
        parts: &mut Parts,
    ) -> bool {
        let len = memory.len();
        let (mut done, mut next) = (0, Some(first));
        while done < len {
            let (piece, bytes) = next.take().unwrap_or_else(|| {
                self.worker
                    .resolve(offset + done as u64, (len - done) as u64)
            });
            let bytes = to_usize(bytes);
            match piece {
                Piece::Data { file, offset: host } => {
                    let part = Part {
                        file,
                        host,
                        start: done,
                        len: bytes,
                    };
                    if !parts.push(part) {
                        return false;
                    }
                }
                Piece::Zero => memory.zero(done, bytes),
                Piece::Compressed { .. } | Piece::Miss { .. } | Piece::Bad(_) => return false,
            }
            done += bytes;
        }
        self.are_plain(parts, memory)
    }

    /// Starts a write when it is a hit: every cluster the image's own, nothing to change but data (and, where it is to outlive the
    /// process, nothing that waits for a commit: O23). Else gives its memory back.
    #[inline]
    pub(crate) fn write_hit(
        &self,
        (token, epoch): (u64, u64),
        offset: u64,
        memory: S::Memory,
        outlives: bool,
    ) -> Option<S::Memory> {
        let len = memory.len();
        if len == 0 {
            self.reply(token, epoch, Ok(()), Some(memory));
            return None;
        }
        let is_settled = || !outlives || self.worker.image.is_settled(offset, len as u64);
        let at_once = match &self.worker.image.layer.kind {
            LayerKind::Raw => Some(offset),
            LayerKind::Qcow2(image) => {
                let within = image.geometry.in_cluster(offset);
                match self.worker.layer_entry(&self.worker.image.layer, offset) {
                    _ if within + len as u64 > image.geometry.cluster_bytes() => None,
                    LayerEntry::Entry(L2Entry::Data { host, copied })
                        if writable_in_place(copied) =>
                    {
                        Some(host.0 + within)
                    }
                    _ => return Some(memory),
                }
            }
        };
        match at_once {
            Some(host)
                if self
                    .worker
                    .files
                    .is_plain(self.worker.image.file(), host, &memory)
                    && is_settled() =>
            {
                self.submit_direct(Direct {
                    owner: Owner::Whole { token, epoch },
                    transfer: Transfer::new(
                        Direction::Write,
                        self.worker.image.file(),
                        host,
                        memory,
                    ),
                });
                None
            }
            Some(_) => Some(memory),
            None => {
                let mut parts = Parts::new();
                if !self.pieces_to_write(offset, &memory, &mut parts) || !is_settled() {
                    return Some(memory);
                }
                let request = self.insert(token, epoch, Some(memory.clone()));
                self.submit_parts(request, &memory, &parts, Direction::Write);
                None
            }
        }
    }

    /// Whether a write that reaches into several clusters is a hit.
    fn pieces_to_write(&self, offset: u64, memory: &S::Memory, parts: &mut Parts) -> bool {
        let Some(image) = self.worker.image.layer.qcow2() else {
            return false;
        };
        let len = memory.len();
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = image.geometry.in_cluster(at);
            let bytes = to_usize(image.geometry.cluster_bytes() - within).min(len - done);
            match self.worker.layer_entry(&self.worker.image.layer, at) {
                LayerEntry::Entry(L2Entry::Data { host, copied }) if writable_in_place(copied) => {
                    let part = Part {
                        file: self.worker.image.file(),
                        host: host.0 + within,
                        start: done,
                        len: bytes,
                    };
                    if !parts.push(part) {
                        return false;
                    }
                }
                _ => return false,
            }
            done += bytes;
        }
        self.are_plain(parts, memory)
    }

    fn are_plain(&self, parts: &Parts, memory: &S::Memory) -> bool {
        parts.as_slice().iter().all(|part| {
            let memory = memory.slice(part.start, part.len);
            self.worker.files.is_plain(part.file, part.host, &memory)
        })
    }

    fn submit_parts(
        &self,
        request: usize,
        memory: &S::Memory,
        parts: &Parts,
        direction: Direction,
    ) {
        if parts.count == 0 {
            return self.part_done(request, None);
        }
        // At most DIRECT_PIECES.
        self.pending.borrow_mut()[request].remaining =
            u32::try_from(parts.count).unwrap_or(u32::MAX);
        for part in parts.as_slice() {
            let memory = memory.slice(part.start, part.len);
            self.submit_direct(Direct {
                owner: Owner::Part { request },
                transfer: Transfer::new(direction, part.file, part.host, memory),
            });
        }
    }

    #[inline]
    fn submit_direct(&self, direct: Direct<S::Memory>) {
        let op = direct.transfer.op();
        self.worker.reactor().submit_direct(op, direct);
    }

    /// The read that has come alone is so no more: it goes the way of the others.
    #[inline]
    pub(crate) fn join_alone(&self) {
        let direct = self.alone.borrow_mut().take();
        if let Some(direct) = direct {
            self.submit_direct(direct);
        }
    }

    /// Starts the read that has stayed alone: reads at once, or submits it. Its pin lasts until it has been read (O7).
    #[inline]
    pub(crate) fn start_alone(&self) {
        let Some(direct) = self.alone.borrow_mut().take() else {
            return;
        };
        let Transfer {
            file,
            offset,
            memory,
            ..
        } = &direct.transfer;
        let done = self
            .worker
            .reactor()
            .with_storage(|storage| storage.read_now(*file, *offset, memory));
        if done {
            self.done(direct);
        } else {
            self.submit_direct(direct);
        }
    }

    /// An operation of a hit has completed: whole, short, interrupted or failed.
    #[inline]
    pub(crate) fn direct_done(&self, direct: Direct<S::Memory>, result: io::Result<usize>) {
        if direct.transfer.is_whole(&result) {
            self.done(direct);
        } else {
            self.not_whole(direct, result);
        }
    }

    #[inline]
    fn done(&self, direct: Direct<S::Memory>) {
        match direct.owner {
            Owner::Whole { token, epoch } => {
                self.reply(token, epoch, Ok(()), Some(direct.transfer.memory));
            }
            Owner::Part { request } => self.part_done(request, None),
        }
    }

    /// An operation that was not done whole.
    #[cold]
    fn not_whole(&self, mut direct: Direct<S::Memory>, result: io::Result<usize>) {
        let request = match direct.owner {
            // The transfer's memory becomes shorter; the reply has all of it.
            Owner::Whole { token, epoch } => {
                self.insert(token, epoch, Some(direct.transfer.memory.clone()))
            }
            Owner::Part { request } => request,
        };
        direct.owner = Owner::Part { request };
        let files = &self.worker.files;
        match direct.transfer.not_whole(result, files) {
            Next::Over => self.part_done(request, None),
            Next::Again => self.submit_direct(direct),
            Next::Failed(error) => {
                let error = files.failed(&direct.transfer, &error);
                self.part_done(request, Some(Box::new(error)));
            }
        }
    }
}
