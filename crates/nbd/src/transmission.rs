//! What the requests of the transmission phase mean, and which are refused ("Request types" of the protocol).
//!
//! A header becomes a [`Command`] that the engine can be asked for without further checks, or a [`Refusal`].

use crate::export::Export;
use crate::handshake::Session;
use crate::limits::{CACHE_STEP_BYTES, PAYLOAD_BYTES};
use crate::wire::{ErrorCode, RequestHeader, command, command_flag as flag};

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
        let allowed = match command {
            command::READ if self.structured => flag::FUA | flag::DF,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE,
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
            command::WRITE_ZEROES => Ok(Command::WriteZeroes {
                offset,
                len,
                unmap: flags & flag::NO_HOLE == 0,
                fua,
            }),
            command::TRIM => Ok(Command::Trim { offset, len, fua }),
            command::CACHE => Ok(Command::Cache { offset, len }),
            _ => self.block_status(offset, len, flags & flag::REQ_ONE != 0),
        }
    }

    fn block_status(self, offset: u64, len: u64, one: bool) -> Result<Command, Refusal> {
        if !self.allocation {
            return refuse(ErrorCode::Inval, "no metadata context was selected");
        }
        if len == 0 {
            return refuse(ErrorCode::Inval, "a block status needs a range");
        }
        Ok(Command::BlockStatus { offset, len, one })
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
            Self::Flush | Self::Disconnect => false,
        }
    }

    /// Bytes of memory that it takes while it is served.
    pub(crate) fn held_bytes(&self) -> usize {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => len,
            Self::Cache { len, .. } => payload(len.min(CACHE_STEP_BYTES)).unwrap_or_default(),
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
            structured: true,
            allocation: true,
        }
    }

    fn export(read_only: bool) -> Export {
        Export::new("x".into(), read_only, || SIZE)
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
            structured: false,
            allocation: false,
            ..session()
        };
        for (session, command, allowed) in [
            (session(), command::READ, 0b00101),
            (plain, command::READ, 0b00001),
            (session(), command::WRITE, 0b00001),
            (session(), command::FLUSH, 0b00001),
            (session(), command::TRIM, 0b00001),
            (session(), command::CACHE, 0b00001),
            (session(), command::WRITE_ZEROES, 0b00011),
            (session(), command::BLOCK_STATUS, 0b01001),
        ] {
            for bit in 0..16 {
                let flags = 1u16 << bit;
                let len = u64::from(command != command::FLUSH);
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
            allocation: false,
            ..session()
        };
        let status = header(command::BLOCK_STATUS, 0, 0, 4096);
        assert_eq!(code(plain, false, status), Some(ErrorCode::Inval));
        let empty = header(command::BLOCK_STATUS, 0, 0, 0);
        assert_eq!(code(session(), false, empty), Some(ErrorCode::Inval));
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
        ) {
            match session().command(&header(command, flags, offset, len), &export(read_only)) {
                Ok(Command::Flush | Command::Disconnect) => {}
                Ok(command) => {
                    prop_assert!(offset + len <= SIZE);
                    prop_assert!(command.held_bytes() <= PAYLOAD_BYTES as usize);
                }
                Err(refusal) => prop_assert_ne!(refusal.why, ""),
            }
        }
    }
}
