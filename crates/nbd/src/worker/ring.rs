//! The worker's side of connections whose bytes a ring moves.

use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use urus::SocketCompletion;

use super::{Worker, list};
use crate::connection::Way;

/// The token of the poll on the epoll.
const EPOLL: u64 = u64::MAX;

/// The token of a connection's operation. A connection is kept until its operations have ended, so that its number is its own.
fn token(index: usize, way: Way) -> u64 {
    (index as u64) << 1 | u64::from(way == Way::Send)
}

fn of_token(token: u64) -> (usize, Way) {
    let index = usize::try_from(token >> 1);
    let way = if token & 1 == 1 {
        Way::Send
    } else {
        Way::Receive
    };
    (
        index.expect("made from an index that fits an address space"),
        way,
    )
}

impl Worker {
    /// Starts what is to be done with files and sockets, waits for the end of something of it, and takes what has ended.
    pub(super) fn sleep_in_ring(
        &mut self,
        events: &mut Vec<epoll::Event>,
        timeout: Option<Duration>,
    ) -> Result<(), Errno> {
        let queue = &mut self.lanes[0].queue;
        if !self.polled
            && let Some(mut sockets) = queue.sockets()
        {
            sockets.poll(EPOLL, Arc::clone(&self.epoll));
            self.polled = true;
        }
        match timeout {
            Some(Duration::ZERO) => queue.kick(),
            timeout => queue.wait(timeout),
        }
        self.look_again = false;
        // Also makes the kernel tell what it has put off.
        self.complete_lane(0);
        while let Some(completion) = self.socket_completion() {
            self.moved(completion);
        }
        if self.polled {
            return Ok(());
        }
        // As much as there is now; the next poll tells of the rest.
        self.sleep(events, Some(Duration::ZERO))
    }

    fn socket_completion(&mut self) -> Option<SocketCompletion> {
        self.lanes[0].queue.sockets()?.completion()
    }

    /// An operation on a socket has ended.
    fn moved(&mut self, completion: SocketCompletion) {
        let SocketCompletion {
            token,
            parts,
            result,
        } = completion;
        if token == EPOLL {
            self.polled = false;
            return;
        }
        let (index, way) = of_token(token);
        let (Some(connection), Some(parts)) = (self.connections.get_mut(index), parts) else {
            debug_assert!(false, "the end of an operation that is nobody's");
            return;
        };
        match way {
            Way::Receive => connection.received(parts, result),
            Way::Send => connection.sent(parts, result, &mut self.pool),
        }
        list(&mut self.ready, index, connection);
    }

    /// Gives the ring what a connection has for it.
    pub(super) fn drive(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let Some(mut sockets) = self.lanes[0].queue.sockets() else {
            return;
        };
        while let Some(way) = connection.take_cancellation() {
            sockets.cancel(token(index, way));
        }
        if let Some((socket, parts)) = connection.begin_send() {
            sockets.send(token(index, Way::Send), socket, parts);
            // The receive has to wait for the next turn: what the client sends meanwhile comes with it, where it would else come in
            // small pieces, the first of them while the replies are still being sent.
            list(&mut self.ready, index, connection);
        } else if let Some((socket, parts)) = connection.begin_receive() {
            sockets.receive(token(index, Way::Receive), socket, parts);
        }
    }
}
