//! A vhost-user-blk back end over a [`urus::Device`]: a virtual machine attaches the image through one unix socket.
//!
//! ```no_run
//! use urus_vhost_user::{Listener, Server};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let listener = Listener::bind("disk.sock")?;
//! let device = urus::OpenOptions::new().open("disk.qcow2")?;
//! let server = Server::builder(device.clone(), listener).queues(2).serial("urus-0").start()?;
//! // ... until it is time to end:
//! server.shutdown()?;
//! device.close()?;
//! # Ok(()) }
//! ```
//!
//! # What drivers get
//! VERSION_1, MQ, FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES (with unmap), SEG_MAX, SIZE_MAX, BLK_SIZE, TOPOLOGY, RO, GET_ID; split rings
//! with INDIRECT_DESC and EVENT_IDX. No packed rings.
//!
//! * **A write** is durable after a flush, or when it completes while the cache is off: the driver has switched it off
//!   (CONFIG_WCE), or has not taken FLUSH. Switching it off flushes.
//!   For a front end that has handed over memory for requests in flight, whose guest may outlive this process, it is still
//!   there when this process was killed ([`ServerBuilder::volatile_cache`] turns that off).
//! * **Discard** gives whole clusters back; **write-zeroes** keeps them allocated unless it may unmap.
//! * **A request** of any length and cut is taken: up to 1024 descriptors. Data goes straight from and to the guest's memory,
//!   as one vectored operation where it is stored in one piece.
//!
//! # What front ends get
//! Protocol features MQ, CONFIG, BACKEND_REQ (a change of size is announced), INFLIGHT_SHMFD, REPLY_ACK,
//! CONFIGURE_MEM_SLOTS (509), RESET_DEVICE, LOG_SHMFD. One front end at a time; others wait for their turn. One may go
//! and come back, to this back end or, with INFLIGHT_SHMFD, to another one after this was killed: then what was in
//! flight is done again.
//!
//! A virtqueue starts as soon as all of it is known, without waiting for the first kick.
//!
//! # What a guest can do
//! Nothing but fail its own requests. Descriptors are copied before they are judged, and bounds are checked against the
//! memory that the front end has shared. What has a place for a status gets one; a ring or chain that makes no sense stops its
//! queue, says so in the log and on the front end's error eventfd, until it is set up again. A front end that breaks
//! the protocol is cut off, as is one that does not begin a session within ten seconds.
//! One that shortens a file that it has shared (memory, notes of requests in flight, dirty log) stops its own virtqueues: a handler of SIGBUS, installed
//! with the first memory that is mapped, puts zeroes in the place of what is gone. A write that was under way then may store zeroes instead of
//! the data that its own machine took away; it is not said to be done. No other disk of the process is concerned. A file that is sealed against
//! shortening (F_SEAL_SHRINK, as QEMU's memory backends are) cannot come to that.
#![forbid(unsafe_code)]

mod backchannel;
mod chain;
mod config;
mod control;
mod dirty;
mod error;
mod frontend;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod inflight;
mod limits;
mod listen;
mod memory;
mod request;
mod ring;
mod server;
mod shared;
mod stats;
#[cfg(test)]
mod testing;
mod vring;
mod worker;

pub use error::Error;
pub use listen::Listener;
pub use server::{Monitor, Server, ServerBuilder};
pub use stats::Stats;
