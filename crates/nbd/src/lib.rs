//! An NBD server over a [`urus::Device`].
//!
//! ```no_run
//! use urus_nbd::{Listen, Server};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = urus::OpenOptions::new().open("disk.qcow2")?;
//! let server = Server::builder(device.clone())
//!     .queues(2)
//!     .listen(Listen::Unix("disk.sock".into()))
//!     .start()?;
//! println!("nbdinfo '{}'", server.uris()[0]);
//! // ... until it is time to end:
//! server.shutdown()?;
//! device.close()?;
//! # Ok(()) }
//! ```
//!
//! # What clients get
//! Fixed newstyle negotiation (`EXPORT_NAME`, `GO`, `INFO`, `LIST`, `ABORT`, `STARTTLS`, `STRUCTURED_REPLY`, `EXTENDED_HEADERS`, `LIST_META_CONTEXT`,
//! `SET_META_CONTEXT`), simple, structured and extended replies, READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS with `base:allocation` and
//! `qemu:allocation-depth`, FUA, NO_HOLE, FAST_ZERO, DF. Several exports ([`ServerBuilder::export`]), and TLS ([`TlsCredentials`]): once it is configured,
//! nothing is told or served without it.
//!
//! * **FLUSH** makes durable every write whose reply was sent before it, on this or any other connection: a flush of the engine covers
//!   all its queues. So the export says CAN_MULTI_CONN.
//! * **FUA** makes the one request durable; with TRIM, that it has happened.
//! * **TRIM** gives whole clusters back; what it does not give back keeps its content.
//! * **WRITE_ZEROES** gives space back unless NO_HOLE is set. FAST_ZERO fails with ENOTSUP where [`urus::Device::zeroes_fast`] says no.
//! * **CACHE** reads the range, so that it is in the host's page cache and the engine's caches.
//! * **BLOCK_STATUS**: HOLE where no data is stored in any layer, ZERO where the range reads as zeroes, as qemu-nbd says it; so are holes of
//!   raw files. `qemu:allocation-depth` is 0 for what is in no layer, 1 in the image, 2 in its backing file, and so on. One reply has at
//!   most 2048 descriptors of each, and may cover less than was asked.
//! * A request of no bytes succeeds. One that goes beyond the end fails: with ENOSPC if it would write, else with EINVAL.
//!
//! # What a peer can cost
//! A peer is not trusted. It can hold a place among the connections, 64 requests or 64 MiB of payload (whichever is less), and some 200 KiB
//! besides (400 with TLS); beyond, its socket is not read. A handshake ends after 30 seconds, TLS included, or 1024 options. A request's payload is at most 32 MiB.
//! Breaking the protocol ends the connection, and no other. All limits are in `limits.rs`.
#![forbid(unsafe_code)]

mod complaints;
mod connection;
mod contexts;
mod error;
mod export;
mod flight;
mod handshake;
mod input;
mod limits;
mod operation;
mod options;
mod pool;
mod reply;
mod server;
mod status;
mod tls;
mod transmission;
mod transport;
mod uri;
mod wire;
mod worker;

pub use error::Error;
pub use server::{Monitor, Server, ServerBuilder};
pub use tls::TlsCredentials;
pub use urus_listen::{Address, Error as ListenError, Listen, Listener};
