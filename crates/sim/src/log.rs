//! What happened to the files, in order: the material from which power cuts are made.

use urus_engine::storage::FileId;

use crate::contents::{Change, Contents, Keep};

/// Names an operation for the whole run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u32);

/// Something that matters to what survives a power cut.
#[derive(Clone, Debug)]
pub enum Event {
    /// A change was submitted. From here on, any part of it may be on the disk.
    Submitted {
        /// The operation.
        op: OpId,
        /// Its file.
        file: FileId,
        /// What it asks for, with the bytes that its memory held at that moment.
        change: Change,
        /// Whether it is durable when it is complete (RWF_DSYNC).
        sync: bool,
    },
    /// An fdatasync was submitted. It covers the changes whose completions were seen before.
    SyncSubmitted {
        /// The operation.
        op: OpId,
        /// Its file.
        file: FileId,
    },
    /// A change, or a part of it, took effect: reads see it.
    Applied {
        /// The operation.
        op: OpId,
        /// What it did, with the bytes that its memory held at that moment.
        change: Change,
        /// How much of it.
        keep: Keep,
        /// Whether more follows: the sectors that are left.
        left: Option<Keep>,
    },
    /// A change ended without a (further) effect.
    Dropped {
        /// The operation.
        op: OpId,
    },
    /// An fdatasync (or a synchronous write) took effect.
    Synced {
        /// The operation.
        op: OpId,
        /// Its file.
        file: FileId,
        /// Whether it succeeded. After a failure nothing that was pending is ever known to be durable.
        ok: bool,
    },
    /// The engine saw the completion.
    Seen {
        /// The operation.
        op: OpId,
    },
    /// Another process replaced all bytes of a file, durably, while nothing of the engine was in flight.
    Replaced {
        /// Its file.
        file: FileId,
        /// What it holds now.
        contents: Contents,
    },
}

/// All events of a run, each with its moment.
#[derive(Clone, Debug)]
pub struct Log {
    /// The files as they were, all of it durable.
    pub initial: Vec<Contents>,
    /// Moment and event, in order. Several events can share a moment.
    pub events: Vec<(u64, Event)>,
}
