//! Where clients of urus's servers come from: sockets that listen ([`Listener`]), the files that unix sockets leave, and taking clients until
//! told to stop ([`Acceptor`]).
//!
//! Nothing here knows what is spoken over the connections.
#![forbid(unsafe_code)]

mod acceptor;
mod address;
mod error;
mod listener;
mod pressure;
mod socket_file;

pub use acceptor::{Acceptor, Next, Stopper};
pub use address::{Address, Listen};
pub use error::Error;
pub use listener::{Listener, Permissions};
pub use pressure::{Seldom, Spare};
