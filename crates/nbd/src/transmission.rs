//! What the requests of the transmission phase mean, and which are refused ("Request types" of the protocol).
//!
//! A header becomes a [`Command`] that the engine can be asked for without further checks, or a [`Refusal`].

use crate::contexts::{Context, Contexts};
use crate::export::Export;
use crate::handshake::Session;
use crate::limits::{CACHE_STEP_BYTES, PAYLOAD_BYTES, STATUS_BYTES};
use crate::reply::NO_MEMORY;
use crate::wire::{ErrorCode, Fields, RequestHeader, Style, command, command_flag as flag};

/// A request that has passed all checks: the range lies within the export, and the flags fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read {
        offset: u64,
        len: usize,
    },
    Write {
        offset: u64,
        len: usize,
        fua: bool,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        /// The space may be given back.
        unmap: bool,
        fua: bool,
    },
    Trim {
        offset: u64,
        len: u64,
        fua: bool,
    },
    Flush,
    Cache {
        offset: u64,
        len: u64,
    },
    BlockStatus {
        offset: u64,
        len: u64,
        /// The client wants to hear of the first extent only.
        one: bool,
        contexts: Contexts,
    },
    /// A block status whose range and contexts follow in a payload of `len` bytes: [`Session::query`] understands it.
    Query {
        offset: u64,
        len: usize,
        one: bool,
    },
    /// The client is done: no reply.
    Disconnect,
}

/// Why a request is answered with an error. Its payload, if it has one, still follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: ErrorCode,
    pub(crate) why: &'static str,
}

impl Refusal {
    /// The process has no memory for what is asked.
    pub(crate) const NO_MEMORY: Self = Self {
        code: ErrorCode::NoMem,
        why: NO_MEMORY,
    };
}

const fn refuse<T>(code: ErrorCode, why: &'static str) -> Result<T, Refusal> {
    Err(Refusal { code, why })
}

impl Session {
    /// What `header` asks of `export`.
    pub(crate) fn command(
        self,
        header: &RequestHeader,
        export: &Export,
    ) -> Result<Command, Refusal> {
        let &RequestHeader {
            flags,
            command,
            offset,
            len,
            ..
        } = header;
        let extended = self.style == Style::Extended;
        let allowed = match command {
            command::READ if self.style > Style::Simple => flag::FUA | flag::DF,
            command::WRITE if extended => flag::FUA | flag::PAYLOAD_LEN,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS if extended => flag::FUA | flag::REQ_ONE | flag::PAYLOAD_LEN,
            command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
            // Existing clients set FUA on anything.
            _ => flag::FUA,
        };
        let changes = matches!(
            command,
            command::WRITE | command::WRITE_ZEROES | command::TRIM
        );
        if command == command::DISC {
            return Ok(Command::Disconnect);
        }
        if command > command::BLOCK_STATUS {
            return refuse(ErrorCode::Inval, "this server does not know the command");
        }
        if flags & !allowed != 0 {
            return refuse(ErrorCode::Inval, "a flag does not go with the command");
        }
        if changes && export.read_only {
            return refuse(ErrorCode::Perm, "the export is read-only");
        }
        if command == command::FLUSH {
            return if offset == 0 && len == 0 {
                Ok(Command::Flush)
            } else {
                refuse(ErrorCode::Inval, "a flush has no range")
            };
        }
        let one = flags & flag::REQ_ONE != 0;
        if command == command::BLOCK_STATUS && flags & flag::PAYLOAD_LEN != 0 {
            return self.query_announced(offset, len, one);
        }
        if offset
            .checked_add(len)
            .is_none_or(|end| end > export.size())
        {
            let code = match command {
                command::WRITE | command::WRITE_ZEROES => ErrorCode::NoSpc,
                _ => ErrorCode::Inval,
            };
            return refuse(code, "the range ends beyond the end of the export");
        }
        let fua = flags & flag::FUA != 0;
        match command {
            command::READ | command::WRITE => {
                let Some(bytes) = payload(len) else {
                    return refuse(
                        ErrorCode::Inval,
                        "the request is longer than the maximum block size",
                    );
                };
                Ok(if command == command::READ {
                    Command::Read { offset, len: bytes }
                } else {
                    Command::Write {
                        offset,
                        len: bytes,
                        fua,
                    }
                })
            }
            command::WRITE_ZEROES => {
                let unmap = flags & flag::NO_HOLE == 0;
                if flags & flag::FAST_ZERO != 0 && !export.zeroes_fast(offset, len, unmap) {
                    return refuse(
                        ErrorCode::NotSup,
                        "zeroes would have to be written as data there",
                    );
                }
                Ok(Command::WriteZeroes {
                    offset,
                    len,
                    unmap,
                    fua,
                })
            }
            command::TRIM => Ok(Command::Trim { offset, len, fua }),
            command::CACHE => Ok(Command::Cache { offset, len }),
            _ => self.block_status(offset, len, one, self.contexts),
        }
    }

    fn block_status(
        self,
        offset: u64,
        len: u64,
        one: bool,
        contexts: Contexts,
    ) -> Result<Command, Refusal> {
        if contexts.is_empty() {
            return refuse(ErrorCode::Inval, "no metadata context was selected");
        }
        if len == 0 {
            return refuse(ErrorCode::Inval, "a block status needs a range");
        }
        Ok(Command::BlockStatus {
            offset,
            len,
            one,
            contexts,
        })
    }

    /// A block status with payload: a length, and the numbers of some of the selected contexts, each at most once.
    fn query_announced(self, offset: u64, len: u64, one: bool) -> Result<Command, Refusal> {
        const LONGEST: u64 = 8 + 4 * Context::ALL.len() as u64;
        match payload(len) {
            Some(bytes) if (12..=LONGEST).contains(&len) => Ok(Command::Query {
                offset,
                len: bytes,
                one,
            }),
            _ => refuse(
                ErrorCode::Inval,
                "the payload of a block status has a wrong length",
            ),
        }
    }

    /// What `payload` asks, the payload of a [`Command::Query`].
    pub(crate) fn query(
        self,
        offset: u64,
        one: bool,
        payload: &[u8],
        export: &Export,
    ) -> Result<Command, Refusal> {
        let mut fields = Fields::new(payload);
        let len = fields.u64().unwrap_or_default();
        let mut contexts = Contexts::default();
        while !fields.is_empty() {
            match fields.u32().and_then(|id| self.contexts.find(id)) {
                Some(context) if !contexts.contains(context) => contexts.insert(context),
                _ => {
                    return refuse(
                        ErrorCode::Inval,
                        "a block status asks for a metadata context that was not selected",
                    );
                }
            }
        }
        if offset
            .checked_add(len)
            .is_none_or(|end| end > export.size())
        {
            return refuse(
                ErrorCode::Inval,
                "the range ends beyond the end of the export",
            );
        }
        self.block_status(offset, len, one, contexts)
    }
}

/// `len` as the length of a buffer, where one request may be that long.
pub(crate) fn payload(len: u64) -> Option<usize> {
    usize::try_from(len)
        .ok()
        .filter(|_| len <= u64::from(PAYLOAD_BYTES))
}

impl Command {
    /// Whether there is nothing to do: a range of no bytes. The protocol leaves open what such a request means; here it succeeds.
    pub(crate) fn is_empty(&self) -> bool {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => len == 0,
            Self::WriteZeroes { len, .. }
            | Self::Trim { len, .. }
            | Self::Cache { len, .. }
            | Self::BlockStatus { len, .. } => len == 0,
            Self::Query { .. } | Self::Flush | Self::Disconnect => false,
        }
    }

    /// Bytes of memory that it takes while it is served.
    pub(crate) fn held_bytes(&self) -> usize {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => len,
            Self::Cache { len, .. } => payload(len.min(CACHE_STEP_BYTES)).unwrap_or_default(),
            Self::BlockStatus { .. } | Self::Query { .. } => STATUS_BYTES,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards the engine against requests that no export can serve, and clients against wrong error values.
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 40;

    fn session() -> Session {
        Session {
            export: 0,
            style: Style::Structured,
            contexts: Context::ALL.into_iter().collect(),
        }
    }

    /// Whole clusters of 64 KiB can be zeroed fast.
    fn export(read_only: bool) -> Export {
        let mut export = Export::new("x".into(), read_only, || SIZE);
        export.fast_zero = Box::new(|offset, len, _| (offset | len) & 0xffff == 0);
        export
    }

    fn header(command: u16, flags: u16, offset: u64, len: u64) -> RequestHeader {
        RequestHeader {
            flags,
            command,
            cookie: 1,
            offset,
            len,
        }
    }

    fn code(session: Session, read_only: bool, header: RequestHeader) -> Option<ErrorCode> {
        session
            .command(&header, &export(read_only))
            .err()
            .map(|refusal| refusal.code)
    }

    #[test]
    fn ranges_beyond_the_end_are_refused() {
        for (command, expected) in [
            (command::READ, ErrorCode::Inval),
            (command::WRITE, ErrorCode::NoSpc),
            (command::WRITE_ZEROES, ErrorCode::NoSpc),
            (command::TRIM, ErrorCode::Inval),
            (command::CACHE, ErrorCode::Inval),
            (command::BLOCK_STATUS, ErrorCode::Inval),
        ] {
            for (offset, len) in [(SIZE - 1, 2), (SIZE, 1), (u64::MAX, 1), (u64::MAX - 1, 2)] {
                assert_eq!(
                    code(session(), false, header(command, 0, offset, len)),
                    Some(expected),
                    "command {command} at {offset}"
                );
            }
            assert_eq!(
                code(session(), false, header(command, 0, SIZE - 1, 1)),
                None
            );
        }
    }

    #[test]
    fn changes_of_a_read_only_export_are_not_permitted() {
        for command in 0..8 {
            let expected =
                [command::WRITE, command::WRITE_ZEROES, command::TRIM].contains(&command);
            let len = u64::from(command != command::FLUSH);
            assert_eq!(
                code(session(), true, header(command, 0, 0, len)),
                expected.then_some(ErrorCode::Perm),
                "command {command}"
            );
        }
    }

    #[test]
    fn flags_must_go_with_the_command() {
        let plain = Session {
            style: Style::Simple,
            contexts: Contexts::default(),
            ..session()
        };
        let extended = Session {
            style: Style::Extended,
            ..session()
        };
        for (session, command, allowed) in [
            (extended, command::READ, 0b00101),
            (extended, command::WRITE, 0b10_0001),
            (extended, command::TRIM, 0b00001),
            (session(), command::READ, 0b00101),
            (plain, command::READ, 0b00001),
            (session(), command::WRITE, 0b00001),
            (session(), command::FLUSH, 0b00001),
            (session(), command::TRIM, 0b00001),
            (session(), command::CACHE, 0b00001),
            (session(), command::WRITE_ZEROES, 0b10011),
            (session(), command::BLOCK_STATUS, 0b01001),
        ] {
            for bit in 0..16 {
                let flags = 1u16 << bit;
                let len = u64::from(command != command::FLUSH) << 16;
                let expected = (flags & !allowed != 0).then_some(ErrorCode::Inval);
                assert_eq!(
                    code(session, false, header(command, flags, 0, len)),
                    expected,
                    "command {command}, flags {flags:#x}"
                );
            }
        }
    }

    #[test]
    fn block_status_needs_a_context_and_a_range() {
        let plain = Session {
            contexts: Contexts::default(),
            ..session()
        };
        let status = header(command::BLOCK_STATUS, 0, 0, 4096);
        assert_eq!(code(plain, false, status), Some(ErrorCode::Inval));
        let empty = header(command::BLOCK_STATUS, 0, 0, 0);
        assert_eq!(code(session(), false, empty), Some(ErrorCode::Inval));
    }

    #[test]
    fn fast_zeroes_are_refused_where_they_would_be_slow() {
        let zeroes = |flags, len| header(command::WRITE_ZEROES, flags, 1 << 16, len);
        let fast = flag::FAST_ZERO;
        assert_eq!(code(session(), false, zeroes(fast, 1 << 20)), None);
        assert_eq!(
            code(session(), false, zeroes(fast, 1000)),
            Some(ErrorCode::NotSup)
        );
        assert_eq!(code(session(), false, zeroes(0, 1000)), None);
    }

    #[test]
    fn a_block_status_can_name_its_contexts_in_a_payload() {
        let extended = Session {
            style: Style::Extended,
            ..session()
        };
        let announced = |len| {
            let header = header(command::BLOCK_STATUS, flag::PAYLOAD_LEN, SIZE - 1000, len);
            extended.command(&header, &export(false)).is_ok()
        };
        assert!(announced(12) && announced(16));
        assert!(!announced(8) && !announced(11) && !announced(17) && !announced(u64::MAX));
        let ask = |len: u64, ids: &[u32]| {
            let mut payload = len.to_be_bytes().to_vec();
            ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
            extended.query(SIZE - 1000, true, &payload, &export(false))
        };
        for (ids, contexts) in [
            (&[1][..], vec![Context::Allocation]),
            (&[2], vec![Context::Depth]),
            (&[2, 1], Context::ALL.to_vec()),
        ] {
            assert_eq!(
                ask(1000, ids),
                Ok(Command::BlockStatus {
                    offset: SIZE - 1000,
                    len: 1000,
                    one: true,
                    contexts: contexts.into_iter().collect(),
                })
            );
        }
        for (len, ids) in [
            (1001, &[1][..]),
            (u64::MAX, &[1]),
            (0, &[1]),
            (1000, &[]),
            (1000, &[1, 1]),
            (1000, &[0]),
            (1000, &[3]),
        ] {
            let refusal = ask(len, ids).unwrap_err();
            assert_eq!(refusal.code, ErrorCode::Inval, "{len} {ids:?}");
        }
        // A payload cut short, as none is that was announced.
        assert!(extended.query(0, true, &[0; 3], &export(false)).is_err());
    }

    #[test]
    fn payloads_are_bounded() {
        for command in [command::READ, command::WRITE] {
            let largest = header(command, 0, 0, u64::from(PAYLOAD_BYTES));
            assert_eq!(code(session(), false, largest), None);
            let larger = header(command, 0, 0, u64::from(PAYLOAD_BYTES) + 1);
            assert_eq!(code(session(), false, larger), Some(ErrorCode::Inval));
        }
        // What moves no payload may be as long as it likes.
        let zeroes = header(command::WRITE_ZEROES, 0, 0, u64::from(u32::MAX));
        assert_eq!(code(session(), false, zeroes), None);
    }

    proptest! {
        #[test]
        fn accepted_commands_lie_within_the_export(
            command in 0u16..10, flags in any::<u16>(), offset in any::<u64>(), len in any::<u64>(), read_only in any::<bool>(),
            style in prop::sample::select(vec![Style::Simple, Style::Structured, Style::Extended]),
        ) {
            match (Session { style, ..session() }).command(&header(command, flags, offset, len), &export(read_only)) {
                Ok(Command::Flush | Command::Disconnect | Command::Query { .. }) => {}
                Ok(command) => {
                    prop_assert!(offset + len <= SIZE);
                    prop_assert!(command.held_bytes() <= PAYLOAD_BYTES as usize);
                }
                Err(refusal) => prop_assert_ne!(refusal.why, ""),
            }
        }
    }
}
