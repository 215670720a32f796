//! Saying in the log why clients were refused, without letting a hostile one fill it.

use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrAny, sockopt};
use tracing::warn;

/// How often it is said, at most.
const EVERY: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Said {
    last: Option<Instant>,
    /// Not said since.
    more: u64,
}

/// Reasons do not hide one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// TLS was refused, or not asked for.
    Policy,
    /// The TLS handshake has failed.
    Handshake,
}

static SAID: Mutex<[Said; 2]> = Mutex::new(
    [const {
        Said {
            last: None,
            more: 0,
        }
    }; 2],
);

/// How many complaints were left out before this one. None if this one is left out too.
fn turn(said: &mut Said, now: Instant) -> Option<u64> {
    let is_soon = said
        .last
        .is_some_and(|last| now.saturating_duration_since(last) < EVERY);
    if is_soon {
        said.more += 1;
        return None;
    }
    said.last = Some(now);
    Some(std::mem::take(&mut said.more))
}

/// A client was refused over TLS.
pub(crate) fn refused(connection: u64, socket: Option<impl AsFd>, reason: Reason, why: &str) {
    let left_out = {
        let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
        let said = match reason {
            Reason::Policy => &mut said[0],
            Reason::Handshake => &mut said[1],
        };
        turn(said, Instant::now())
    };
    if let Some(left_out) = left_out {
        let client = socket.map_or_else(|| "unknown".into(), peer);
        warn!(
            connection,
            client, left_out, "a client is not served: {why}"
        );
    }
}

/// Who is at the other end, for people.
pub(crate) fn peer(socket: impl AsFd) -> String {
    if sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX) {
        return match sockopt::socket_peercred(&socket) {
            Ok(peer) => format!(
                "process {}, user {}",
                peer.pid.as_raw_nonzero(),
                peer.uid.as_raw()
            ),
            Err(_) => "a process".into(),
        };
    }
    match rustix::net::getpeername(&socket) {
        Ok(Some(peer)) => address(peer),
        _ => "unknown".into(),
    }
}

fn address(peer: SocketAddrAny) -> String {
    std::net::SocketAddr::try_from(peer).map_or_else(|_| "unknown".into(), |peer| peer.to_string())
}

#[cfg(test)]
mod tests {
    //! Guards the log against clients that want to fill it.
    use super::*;

    #[test]
    fn complaints_are_counted_and_not_repeated() {
        let mut said = Said {
            last: None,
            more: 0,
        };
        let begin = Instant::now();
        assert_eq!(turn(&mut said, begin), Some(0));
        for _ in 0..7 {
            assert_eq!(turn(&mut said, begin), None);
        }
        assert_eq!(turn(&mut said, begin + EVERY), Some(7));
        assert_eq!(turn(&mut said, begin + EVERY), None);
    }
}
