//! What a server offers: devices under names.

use std::fmt;
use std::sync::Arc;

use crate::wire::transmission_flag as flag;

/// Place of an export in [`Exports`], and of its queue in each worker.
pub(crate) type ExportId = usize;

/// A device under a name.
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    pub(crate) read_only: bool,
    /// Bytes that the engine is asked about at once for a block status, so that other requests have their turn.
    pub(crate) status_step_bytes: u64,
    /// Size in bytes at this moment: a device can be resized while it is served.
    size: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl Export {
    pub(crate) fn new(
        name: String,
        read_only: bool,
        size: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            description: None,
            read_only,
            status_step_bytes: crate::limits::STATUS_STEP_MIN_BYTES,
            size: Arc::new(size),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        (self.size)()
    }

    /// The transmission flags of a connection.
    ///
    /// CAN_MULTI_CONN holds because a flush of the engine makes durable whatever was completed before it on any queue,
    /// and every connection sees every completed write.
    pub(crate) fn flags(&self, structured: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_CACHE
            | flag::CAN_MULTI_CONN;
        flags |= if self.read_only {
            flag::READ_ONLY
        } else {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES
        };
        if structured {
            flags |= flag::SEND_DF;
        }
        flags
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("size", &self.size())
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

/// All exports of a server, at least one.
#[derive(Debug)]
pub(crate) struct Exports {
    list: Vec<Export>,
}

impl Exports {
    /// One export; the structure takes more.
    pub(crate) fn one(export: Export) -> Self {
        Self { list: vec![export] }
    }

    /// The export of that name. The empty name stands for the default export, which is the first.
    pub(crate) fn find(&self, name: &[u8]) -> Option<ExportId> {
        self.list
            .iter()
            .position(|export| export.name.as_bytes() == name)
            .or_else(|| name.is_empty().then_some(0))
    }

    pub(crate) fn get(&self, id: ExportId) -> &Export {
        &self.list[id]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Export> {
        self.list.iter()
    }
}

#[cfg(test)]
mod tests {
    //! Guards what clients are told they may do.
    use super::*;

    #[test]
    fn flags_say_what_may_be_sent() {
        let writable = Export::new("a".into(), false, || 1);
        assert_eq!(writable.flags(true), 0b101_1110_1101);
        assert_eq!(writable.flags(false) & flag::SEND_DF, 0);
        let read_only = Export::new("a".into(), true, || 1);
        assert_eq!(
            read_only.flags(true) & (flag::SEND_TRIM | flag::SEND_WRITE_ZEROES),
            0
        );
        assert_ne!(read_only.flags(true) & flag::READ_ONLY, 0);
    }

    #[test]
    fn the_empty_name_is_the_first_export() {
        let exports = Exports::one(Export::new("disk".into(), false, || 1));
        assert_eq!(exports.find(b"disk"), Some(0));
        assert_eq!(exports.find(b""), Some(0));
        assert_eq!(exports.find(b"Disk"), None);
        assert_eq!(exports.find(b"\xff"), None);
    }
}
