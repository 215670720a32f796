//! What a server offers: devices under names.

use std::fmt;
use std::sync::Arc;

use crate::contexts::Contexts;
use crate::wire::{Style, transmission_flag as flag};

/// Place of an export in [`Exports`], and of its queue in each worker.
pub(crate) type ExportId = usize;

/// A device under a name.
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    pub(crate) read_only: bool,
    /// Bytes that the engine is asked about at once for a block status, so that other requests have their turn.
    pub(crate) status_step_bytes: u64,
    /// Layers of the device's chain.
    pub(crate) layers: u32,
    /// Whether zeroes at an offset, of a length, with or without giving space back, are sure to be fast.
    pub(crate) fast_zero: Box<dyn Fn(u64, u64, bool) -> bool + Send + Sync>,
    /// Size in bytes at this moment: a device can be resized while it is served.
    size: Box<dyn Fn() -> u64 + Send + Sync>,
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
            layers: 1,
            fast_zero: Box::new(|_, _, _| false),
            size: Box::new(size),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        (self.size)()
    }

    pub(crate) fn zeroes_fast(&self, offset: u64, len: u64, unmap: bool) -> bool {
        (self.fast_zero)(offset, len, unmap)
    }

    /// The transmission flags of a connection that has selected `contexts`.
    ///
    /// CAN_MULTI_CONN holds because a flush of the engine makes durable whatever was completed before it on any queue,
    /// and every connection sees every completed write.
    pub(crate) fn flags(&self, style: Style, contexts: Contexts) -> u16 {
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_CACHE
            | flag::CAN_MULTI_CONN;
        flags |= if self.read_only {
            flag::READ_ONLY
        } else {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
        };
        if style > Style::Simple {
            flags |= flag::SEND_DF;
        }
        if style == Style::Extended && !contexts.is_empty() {
            flags |= flag::BLOCK_STAT_PAYLOAD;
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

/// All exports of a server, at least one, and how clients get at them.
#[derive(Debug)]
pub(crate) struct Exports {
    list: Vec<Export>,
    /// Exports are told and served over TLS only.
    tls: Option<Arc<rustls::ServerConfig>>,
}

impl Exports {
    /// The first of `list` is the default export.
    pub(crate) fn new(list: Vec<Export>, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        debug_assert!(!list.is_empty());
        Self { list, tls }
    }

    /// How to set up TLS, where it is required.
    pub(crate) fn tls(&self) -> Option<&Arc<rustls::ServerConfig>> {
        self.tls.as_ref()
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
        let none = Contexts::default();
        let flags = writable.flags(Style::Structured, none);
        assert_eq!(flags, 0b1101_1110_1101);
        assert_eq!(writable.flags(Style::Simple, none) & flag::SEND_DF, 0);
        assert_eq!(writable.flags(Style::Extended, none), flags);
        let some = [crate::contexts::Context::Depth].into_iter().collect();
        assert_eq!(writable.flags(Style::Structured, some), flags);
        assert_eq!(writable.flags(Style::Extended, some), flags | 1 << 12);
        let read_only = Export::new("a".into(), true, || 1);
        assert_eq!(
            read_only.flags(Style::Simple, none)
                & (flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO),
            0
        );
        assert_ne!(read_only.flags(Style::Simple, none) & flag::READ_ONLY, 0);
    }

    #[test]
    fn the_empty_name_is_the_first_export() {
        let export = |name: &str| Export::new(name.into(), false, || 1);
        let exports = Exports::new(vec![export("disk"), export("other")], None);
        assert_eq!(exports.find(b"disk"), Some(0));
        assert_eq!(exports.find(b"other"), Some(1));
        assert_eq!(exports.find(b""), Some(0));
        assert_eq!(exports.find(b"Disk"), None);
        assert_eq!(exports.find(b"\xff"), None);
    }
}
