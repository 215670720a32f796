//! Operations on sockets that the kernel works on.
//!
//! They wait in a list until the ring is entered the next time, and take only those entries of the submission queue that operations on
//! files leave over.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::Fd;
use io_uring::{cqueue, opcode, squeue};

use super::ring::{Ring, io_len};
use crate::sockets::{Parts, SocketCompletion, Work};

/// Set in the `user_data` of all that is here; slots are smaller, and the driver's own are above.
const MARK: u64 = 1 << 62;
/// Bits of `user_data` for the index of an entry. Above them is its generation, so that a cancellation never hits an entry's next user.
const INDEX_BITS: u32 = 32;
const GENERATIONS: u64 = 1 << (62 - INDEX_BITS);

/// One operation.
struct Operation {
    token: u64,
    /// Open until the operation has ended: else its number could be another file's by the time the kernel looks at it.
    socket: Arc<OwnedFd>,
    work: Work,
    /// Whether it is in the submission queue, or the kernel.
    pushed: bool,
    cancelled: bool,
}

/// Where an operation lives, at an address that does not change.
struct Entry {
    operation: Option<Operation>,
    generation: u64,
    /// For pieces; kept for its capacity. Not touched while the operation is with the kernel.
    iovecs: Vec<libc::iovec>,
    /// Points to `iovecs`.
    header: libc::msghdr,
}

/// What is to go into the submission queue.
enum Pending {
    Operation(usize),
    /// Of the operation with this `user_data`.
    Cancellation(u64),
}

/// All operations on sockets of a ring.
pub(super) struct Table {
    #[allow(
        clippy::vec_box,
        reason = "submissions point into entries, which must not move when there come to be more"
    )]
    entries: Vec<Box<Entry>>,
    free: Vec<usize>,
    pending: VecDeque<Pending>,
    done: VecDeque<SocketCompletion>,
    /// Something pending should start soon.
    urgent: bool,
    /// Operations pushed whose completion was not seen.
    busy: usize,
    /// Entries of the submission queue that may be taken here, and those that may be taken by now.
    share: usize,
    taken: usize,
}

impl Table {
    pub(super) fn new(share: usize) -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            pending: VecDeque::new(),
            done: VecDeque::new(),
            urgent: false,
            busy: 0,
            share,
            taken: 0,
        }
    }

    /// Whether `user_data` is of something here.
    #[inline]
    pub(super) fn owns(user_data: u64) -> bool {
        user_data >> 62 == 1
    }

    pub(super) fn busy(&self) -> usize {
        self.busy
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether something pending should start soon: all but receives and polls, which have to wait for the peer as a rule.
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent
    }

    pub(super) fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    pub(super) fn pop_done(&mut self) -> Option<SocketCompletion> {
        self.done.pop_front()
    }

    pub(super) fn submit(&mut self, token: u64, socket: Arc<OwnedFd>, work: Work) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Box::new(Entry::new()));
            self.entries.len() - 1
        });
        self.urgent |= matches!(work, Work::Send(_));
        self.entries[index].operation = Some(Operation {
            token,
            socket,
            work,
            pushed: false,
            cancelled: false,
        });
        self.pending.push_back(Pending::Operation(index));
    }

    /// Asks for the end of all operations that `which` holds for.
    pub(super) fn cancel(&mut self, which: impl Fn(u64) -> bool) {
        for (index, entry) in self.entries.iter_mut().enumerate() {
            let user_data = user_data(index, entry.generation);
            if let Some(operation) = &mut entry.operation
                && which(operation.token)
            {
                operation.cancelled = true;
                self.urgent = true;
                if operation.pushed {
                    self.pending.push_back(Pending::Cancellation(user_data));
                }
            }
        }
    }

    /// Moves what is pending into the submission queue, as far as the kernel takes it off there.
    pub(super) fn push_pending(&mut self, ring: &mut Ring) {
        if ring.is_flushed() {
            self.taken = 0;
        }
        self.urgent = false;
        while let Some(pending) = self.pending.pop_front() {
            if self.taken >= self.share {
                ring.flush();
                if !ring.is_flushed() {
                    self.pending.push_front(pending);
                    self.urgent = true;
                    return;
                }
                self.taken = 0;
            }
            match pending {
                Pending::Operation(index) => self.push(index, ring),
                Pending::Cancellation(target) => {
                    self.taken += 1;
                    ring.push_cancellation(target);
                }
            }
        }
    }

    fn push(&mut self, index: usize, ring: &mut Ring) {
        let entry = &mut *self.entries[index];
        let Some(operation) = &mut entry.operation else {
            return;
        };
        if operation.cancelled {
            self.end(index, Err(io::Error::from_raw_os_error(libc::ECANCELED)));
            return;
        }
        operation.pushed = true;
        let submission = entry.submission(user_data(index, entry.generation));
        self.busy += 1;
        self.taken += 1;
        // SAFETY: `push_owned` wants what the entry points to valid until the operation has ended. That is the memory of the
        // operation's parts, which it owns; the iovecs and the header, which lie in a box that is neither moved nor touched while
        // it holds an operation. All of it is let go of in `end` only, with the completion in hand; `Uring`'s drop
        // waits for all completions or leaks the table, and forgetting the driver leaks it too.
        unsafe { ring.push_owned(&submission) }
    }

    /// Lets go of the operation that the kernel has ended.
    pub(super) fn finish(&mut self, entry: &cqueue::Entry) {
        let index = usize::try_from(entry.user_data() & ((1 << INDEX_BITS) - 1)).expect("32 bits");
        debug_assert_eq!(
            user_data(index, self.entries[index].generation),
            entry.user_data()
        );
        let result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        self.busy -= 1;
        self.end(index, result);
    }

    fn end(&mut self, index: usize, result: io::Result<usize>) {
        let entry = &mut *self.entries[index];
        let operation = entry.operation.take();
        let operation = operation.expect("the kernel completes what was pushed, once");
        entry.generation = (entry.generation + 1) % GENERATIONS;
        self.free.push(index);
        self.done.push_back(SocketCompletion {
            token: operation.token,
            parts: match operation.work {
                Work::Receive(parts) | Work::Send(parts) => Some(parts),
                Work::Poll => None,
            },
            result,
        });
    }
}

impl Entry {
    fn new() -> Self {
        Self {
            operation: None,
            generation: 0,
            iovecs: Vec::new(),
            header: libc::msghdr {
                msg_name: std::ptr::null_mut(),
                msg_namelen: 0,
                msg_iov: std::ptr::null_mut(),
                msg_iovlen: 0,
                msg_control: std::ptr::null_mut(),
                msg_controllen: 0,
                msg_flags: 0,
            },
        }
    }

    /// The submission of the operation that is here.
    fn submission(&mut self, user_data: u64) -> squeue::Entry {
        let operation = self.operation.as_ref().expect("an operation");
        let socket = Fd(operation.socket.as_raw_fd());
        let entry = match &operation.work {
            Work::Poll => {
                let events = u32::try_from(libc::POLLIN).expect("a flag");
                opcode::PollAdd::new(socket, events).build()
            }
            Work::Receive(parts) => {
                let single = point(parts, &mut self.iovecs, &mut self.header);
                match single {
                    Some((base, len)) => opcode::Recv::new(socket, base, len).build(),
                    None => opcode::RecvMsg::new(socket, &raw mut self.header).build(),
                }
            }
            Work::Send(parts) => {
                // A peer that is gone is an error here, not a signal to the process this runs in.
                let flags = libc::MSG_NOSIGNAL;
                match point(parts, &mut self.iovecs, &mut self.header) {
                    Some((base, len)) => opcode::Send::new(socket, base, len).flags(flags).build(),
                    None => opcode::SendMsg::new(socket, &raw const self.header)
                        .flags(flags.cast_unsigned())
                        .build(),
                }
            }
        };
        entry.user_data(user_data)
    }
}

/// Points `header` to the pieces of `parts`; the only one is returned instead.
fn point(
    parts: &Parts,
    iovecs: &mut Vec<libc::iovec>,
    header: &mut libc::msghdr,
) -> Option<(*mut u8, u32)> {
    parts.fill_iovecs(iovecs);
    if let [only] = iovecs[..] {
        return Some((only.iov_base.cast(), io_len(only.iov_len)));
    }
    header.msg_iov = iovecs.as_mut_ptr();
    // Its type depends on the C library.
    header.msg_iovlen = iovecs.len() as _;
    None
}

fn user_data(index: usize, generation: u64) -> u64 {
    MARK | generation << INDEX_BITS | u64::from(u32::try_from(index).expect("fewer operations"))
}
