//! How bytes travel between a connection and its client where epoll says when: as they are, or through TLS. (Where a ring moves them,
//! `connection/ringed.rs` does.)
//!
//! The TLS session stands between two buffers of its own: what came and is not yet decrypted (at most one record) or not yet taken, and
//! what is encrypted and not yet sent ([`TLS_OUTPUT_BYTES`]). It never waits: what a socket does not give or take is
//! [`WouldBlock`](io::ErrorKind::WouldBlock).

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::readv;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustls::{ServerConfig, ServerConnection};

use crate::limits::{TLS_OUTPUT_BYTES, TLS_RECEIVE_ROUNDS};

/// A connection's socket, and the TLS session over it if there is one.
pub(crate) struct Transport {
    socket: Arc<OwnedFd>,
    tls: Option<Box<ServerConnection>>,
}

impl Transport {
    /// Over a socket that does not block.
    pub(crate) fn plain(socket: OwnedFd) -> Self {
        Self {
            socket: Arc::new(socket),
            tls: None,
        }
    }

    /// From here on everything goes through TLS. The client speaks first.
    pub(crate) fn start_tls(&mut self, config: &Arc<ServerConfig>) -> Result<(), rustls::Error> {
        let mut session = ServerConnection::new(Arc::clone(config))?;
        session.set_buffer_limit(Some(TLS_OUTPUT_BYTES));
        self.tls = Some(Box::new(session));
        Ok(())
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// For an operation that keeps the socket open until it has ended.
    pub(crate) fn share_socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.socket)
    }

    /// Receives into the first of `slices`, or more of them. 0 at the end of the stream.
    pub(crate) fn receive(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return Ok(readv(&self.socket, slices)?);
        };
        for _ in 0..TLS_RECEIVE_ROUNDS {
            match tls.reader().read_vectored(slices) {
                // The end of the stream without the end of the session: what was not complete is not acted on anyway.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            tls.read_tls(&mut Socket(&self.socket))?;
            if let Err(error) = tls.process_new_packets() {
                // The alert that says why, as far as the socket takes it.
                let _ = tls.write_tls(&mut Socket(&self.socket));
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
        // Others have their turn; the socket still has something, so there will be another.
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Takes what the TLS session has decrypted already, of which the socket tells nothing. The bytes taken.
    pub(crate) fn take_decrypted(&mut self, space: &mut [u8]) -> usize {
        match &mut self.tls {
            Some(tls) => tls.reader().read(space).unwrap_or(0),
            None => 0,
        }
    }

    /// Sends what the socket takes of `slices`; with TLS, what the session takes, of which some may be [unsent](Self::has_unsent).
    pub(crate) fn send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.tls.is_none() {
            return Socket(&self.socket).write_vectored(slices);
        }
        self.flush()?;
        let Some(tls) = &mut self.tls else {
            return Ok(0);
        };
        let count = tls.writer().write_vectored(slices)?;
        match self.flush() {
            // The rest goes with the next attempt.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && count > 0 => Ok(count),
            Err(error) => Err(error),
            Ok(()) => Ok(count),
        }
    }

    /// Whether the TLS session has something that the socket did not take yet.
    pub(crate) fn has_unsent(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Sends what the TLS session has.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            return Ok(());
        };
        while tls.wants_write() {
            match tls.write_tls(&mut Socket(&self.socket)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => drop(result?),
            }
        }
        Ok(())
    }

    /// Tells the client that nothing more comes. Best effort: the client may be gone.
    pub(crate) fn finish(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = self.flush();
        }
    }
}

/// The socket as [`rustls`] wants it.
struct Socket<'a>(&'a OwnedFd);

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.0, buffer)?)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        // NOSIGNAL: a client that is gone is an error here, not a signal to the process this runs in.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut nothing = SendAncillaryBuffer::default();
        Ok(sendmsg(self.0, slices, &mut nothing, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
