//! The suites of the protocol, of hostile peers and of the server's life once more, over sockets that epoll watches: what is served where there
//! is no ring must not differ.

#![allow(
    clippy::duplicate_mod,
    reason = "each suite has what they share, as it has in its own binary"
)]

#[path = "extended.rs"]
mod extended;
#[path = "hostile.rs"]
mod hostile;
#[path = "lifecycle.rs"]
mod lifecycle;
#[path = "protocol.rs"]
mod protocol;
