//! Replies on their way through a ring.
//!
//! A send owns what it sends until it has ended: the heads of the replies, copied next to each other, and their payloads. A socket may take a
//! part only; the rest goes with the next send, before anything else.

use std::collections::VecDeque;
use std::ops::Range;

use urus::{Buffer, Parts};

use crate::limits::{Load, SEND_PIECES, SEND_TURN_BYTES};
use crate::pool::Pool;
use crate::reply::{HEAD_BYTES, Payload, Reply};

/// Replies that one send takes, and what it needs for them.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    replies: VecDeque<Flying>,
    /// Bytes of the first reply that are sent already.
    sent: usize,
    /// What is left to be sent, while no operation has it.
    parts: Parts,
    /// For the heads, while none is on its way.
    heads: Option<Buffer>,
    /// Its number in the parts.
    heads_index: usize,
}

/// A reply of which some bytes are not yet sent.
#[derive(Debug)]
struct Flying {
    /// Where its head is.
    head: Range<usize>,
    payload: Option<Carried>,
    load: Load,
}

/// A payload on its way.
#[derive(Debug)]
struct Carried {
    /// Its number in the parts.
    index: usize,
    len: usize,
    /// It is the pool's.
    pooled: bool,
}

impl Flying {
    fn len(&self) -> usize {
        self.head.len() + self.payload.as_ref().map_or(0, |payload| payload.len)
    }
}

impl Flight {
    pub(crate) fn is_empty(&self) -> bool {
        self.replies.is_empty()
    }

    /// What is to be sent next: what is left of the last send, or replies of `queue`.
    pub(crate) fn begin(&mut self, queue: &mut VecDeque<Reply>) -> Option<Parts> {
        if self.replies.is_empty() {
            if queue.is_empty() {
                return None;
            }
            self.load(queue);
        }
        Some(std::mem::take(&mut self.parts))
    }

    fn load(&mut self, queue: &mut VecDeque<Reply>) {
        let heads = self.heads.take();
        let mut heads = heads.unwrap_or_else(|| Buffer::new(SEND_PIECES * HEAD_BYTES));
        let (mut at, mut pieces, mut bytes) = (0, 0, 0);
        // A reply has at most two pieces.
        while pieces + 2 <= SEND_PIECES && bytes < SEND_TURN_BYTES {
            let Some(reply) = queue.pop_front() else {
                break;
            };
            let head = at..at + reply.head().len();
            heads.as_mut_slice()[head.clone()].copy_from_slice(reply.head());
            at = head.end;
            let (payload, load) = reply.into_payload();
            let payload = match payload {
                Payload::None => None,
                Payload::Buffer(buffer) => Some((buffer, true)),
                Payload::Bytes(bytes) => Some((Buffer::from_vec(bytes), false)),
            };
            let payload = payload.map(|(buffer, pooled)| Carried {
                len: buffer.len(),
                index: self.parts.own(buffer),
                pooled,
            });
            let flying = Flying {
                head,
                payload,
                load,
            };
            pieces += 2;
            bytes += flying.len();
            self.replies.push_back(flying);
        }
        self.heads_index = self.parts.own(heads);
        for reply in &self.replies {
            self.parts.push(self.heads_index, reply.head.clone());
            if let Some(payload) = &reply.payload {
                self.parts.push(payload.index, 0..payload.len);
            }
        }
    }

    /// `count` bytes of `parts`, which come back, are sent.
    pub(crate) fn sent(&mut self, mut parts: Parts, count: usize, pool: &mut Pool) -> Load {
        let mut freed = Load::default();
        parts.advance(count);
        self.sent += count;
        while let Some(first) = self.replies.front() {
            let len = first.len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            freed.add(first.load);
            if let Some(Carried { index, pooled, .. }) = first.payload
                && let Some(buffer) = parts.take(index)
                && pooled
            {
                pool.give(buffer);
            }
            self.replies.pop_front();
        }
        if self.replies.is_empty() {
            self.heads = parts.take(self.heads_index);
            parts.clear();
        }
        self.parts = parts;
        freed
    }
}
