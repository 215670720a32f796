//! Every limit of the server, in one place: what a peer can make it hold or do.
//!
//! A connection holds at most [`CONNECTION_BYTES`] of payload (one request may be as large as that alone), [`INPUT_BYTES`] of unread input, a TLS session's buffers, and small
//! heads for [`CONNECTION_REQUESTS`] replies. A worker's pool keeps at most [`POOL_BYTES`] besides.

use std::time::Duration;

/// Payload of one READ or WRITE, told to clients as the maximum block size.
pub(crate) const PAYLOAD_BYTES: u32 = 32 << 20;

/// The smallest request worth telling clients about: any alignment is served.
pub(crate) const MIN_BLOCK: u32 = 1;

/// The unit in which clients should ask, as qemu-nbd tells them.
pub(crate) const PREFERRED_BLOCK: u32 = 4096;

/// Requests of one connection that are being served or whose reply is not yet sent. When reached, its socket is not read.
pub(crate) const CONNECTION_REQUESTS: usize = 64;

/// Payload bytes of those requests. A single request is let in at any size up to [`PAYLOAD_BYTES`].
pub(crate) const CONNECTION_BYTES: usize = 64 << 20;

/// Input of one connection that was read and not yet understood.
pub(crate) const INPUT_BYTES: usize = 128 << 10;

/// What one connection may receive before the others have their turn.
pub(crate) const RECEIVE_TURN_BYTES: usize = 2 << 20;

/// What one connection may be sent before the others have their turn.
pub(crate) const SEND_TURN_BYTES: usize = 4 << 20;

/// Payload submitted before the queue is kicked and replies are sent: large transfers stay in the processor's cache on their way, and the
/// client has something to do meanwhile. Small requests never come near it.
pub(crate) const SUBMIT_ROUND_BYTES: usize = 512 << 10;

/// Replies of one connection that wait to be sent, in bytes. When reached, its reads wait their turn (other requests do not): what is read
/// much earlier than it is sent has to be fetched from memory again. Small enough for the processor's cache, large enough to bridge the
/// time that a disk takes.
pub(crate) const READ_AHEAD_BYTES: usize = 1 << 20;

/// Pieces of one vectored send: 64 replies with payload.
pub(crate) const SEND_PIECES: usize = 128;

/// What a TLS session holds encrypted until the socket takes it.
pub(crate) const TLS_OUTPUT_BYTES: usize = 128 << 10;

/// Reads of one TLS session, each of at most a record, before the others have their turn: records without content do not count as
/// received.
pub(crate) const TLS_RECEIVE_ROUNDS: usize = 32;

/// Socket buffers asked for; the kernel doubles that for its own book-keeping, and gives less where `net.core.wmem_max` says so. A larger one
/// only holds what has left the processor's cache when the client takes it.
pub(crate) const SOCKET_BUFFER_BYTES: usize = 512 << 10;

/// Strings of the handshake ("Strings" of the protocol's document).
pub(crate) const STRING_BYTES: usize = 4096;

/// Data of one option that is looked at. Longer ones are skipped and refused.
pub(crate) const OPTION_BYTES: usize = 64 << 10;

/// Data of one option that is skipped. A client that announces more is cut off.
pub(crate) const OPTION_SKIP_BYTES: u32 = 32 << 20;

/// Options of one handshake, so that it ends.
pub(crate) const OPTIONS: u32 = 1024;

/// Replies of the handshake that wait to be sent, in bytes. When reached, no further option is looked at.
pub(crate) const HANDSHAKE_OUTPUT_BYTES: usize = 64 << 10;

/// From accepting a connection to its first request, unless the builder says otherwise.
pub(crate) const HANDSHAKE_TIME: Duration = Duration::from_secs(30);

/// How long a client may take for the last replies, when a connection or the server ends, unless the builder says otherwise.
pub(crate) const DRAIN_TIME: Duration = Duration::from_secs(10);

/// How long a connection that the server ends stays half open, so that the client gets the last replies.
pub(crate) const LINGER_TIME: Duration = Duration::from_millis(500);

/// Connections of one server, unless the builder says otherwise.
pub(crate) const CONNECTIONS: usize = 128;

/// Queues (threads) of one server.
pub(crate) const QUEUES: usize = 256;

/// Buffers that a worker keeps for the next requests.
pub(crate) const POOL_BYTES: usize = 32 << 20;

/// Different lengths of buffers that a worker keeps.
pub(crate) const POOL_CLASSES: usize = 8;

/// Descriptors of one block status reply, for each metadata context.
pub(crate) const STATUS_DESCRIPTORS: usize = 2048;

/// Bytes that the descriptors of one block status reply take at most: in the making, or as they travel.
pub(crate) const STATUS_BYTES: usize =
    STATUS_DESCRIPTORS * 16 * crate::contexts::Context::ALL.len();

/// Clusters that the engine is asked about at once for a block status, so that other requests have their turn.
pub(crate) const STATUS_STEP_CLUSTERS: u64 = 4096;

/// The same in bytes for an image without clusters, and at least.
pub(crate) const STATUS_STEP_MIN_BYTES: u64 = 16 << 20;

/// What a CACHE request reads at once.
pub(crate) const CACHE_STEP_BYTES: u64 = 256 << 10;

const _: () = {
    assert!(
        INPUT_BYTES >= 16 + OPTION_BYTES,
        "an option with its head must fit the input"
    );
    assert!(
        INPUT_BYTES >= crate::wire::Style::Extended.request_bytes(),
        "a request's head must fit the input"
    );
    assert!(
        OPTION_BYTES >= 3 * STRING_BYTES,
        "an export name and two queries must fit an option"
    );
    assert!(CONNECTION_BYTES >= PAYLOAD_BYTES as usize);
    assert!(CACHE_STEP_BYTES <= PAYLOAD_BYTES as u64);
    assert!(
        PAYLOAD_BYTES < u32::MAX - 64,
        "a structured reply's length covers the payload and its offset"
    );
    assert!(SEND_PIECES <= 1024, "IOV_MAX");
    assert!(MIN_BLOCK <= PREFERRED_BLOCK && PREFERRED_BLOCK <= PAYLOAD_BYTES);
};

/// What requests cost a connection until their replies are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) requests: usize,
    pub(crate) bytes: usize,
}

impl Load {
    /// One request with that much payload.
    pub(crate) fn request(bytes: usize) -> Self {
        Self { requests: 1, bytes }
    }

    /// Whether a connection that carries this may take `more` on.
    pub(crate) fn admits(self, more: Self) -> bool {
        self.requests + more.requests <= CONNECTION_REQUESTS
            && (self.bytes == 0 || self.bytes.saturating_add(more.bytes) <= CONNECTION_BYTES)
    }

    pub(crate) fn add(&mut self, more: Self) {
        self.requests += more.requests;
        self.bytes += more.bytes;
    }

    pub(crate) fn remove(&mut self, less: Self) {
        debug_assert!(self.requests >= less.requests && self.bytes >= less.bytes);
        self.requests = self.requests.saturating_sub(less.requests);
        self.bytes = self.bytes.saturating_sub(less.bytes);
    }
}

#[cfg(test)]
mod tests {
    //! Guards the bound on what one connection can make the server hold.
    use super::*;

    #[test]
    fn load_is_bounded_in_requests_and_bytes() {
        let mut load = Load::default();
        for _ in 0..CONNECTION_REQUESTS {
            assert!(load.admits(Load::request(0)));
            load.add(Load::request(0));
        }
        assert!(!load.admits(Load::request(0)));

        let mut load = Load::default();
        let largest = Load::request(PAYLOAD_BYTES as usize);
        load.add(largest);
        load.add(largest);
        assert!(!load.admits(Load::request(1)));
        load.remove(largest);
        assert!(load.admits(largest));
    }
}
