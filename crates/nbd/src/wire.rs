//! Numbers and layouts of the NBD protocol, as its document (`doc/proto.md` of the NetworkBlockDevice project) names them.
//! All integers are big-endian.

/// The first eight bytes a server sends, "NBDMAGIC".
pub(crate) const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": the second eight, and the head of every option a client sends.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const CHUNK_MAGIC: u32 = 0x668e_33ef;
pub(crate) const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags: of the server (16 bits), and of the client's answer (32 bits) alike.
pub(crate) mod handshake_flag {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub(crate) const NO_ZEROES: u16 = 1 << 1;
}

/// `NBD_OPT_*`.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// `NBD_REP_*`.
pub(crate) mod option_reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = ERROR | 1;
    pub(crate) const ERR_POLICY: u32 = ERROR | 2;
    pub(crate) const ERR_INVALID: u32 = ERROR | 3;
    pub(crate) const ERR_TLS_REQD: u32 = ERROR | 5;
    pub(crate) const ERR_UNKNOWN: u32 = ERROR | 6;
    pub(crate) const ERR_TOO_BIG: u32 = ERROR | 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// `NBD_INFO_*`: what INFO and GO ask for and are told.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// `NBD_FLAG_*`: transmission flags, what an export can do.
pub(crate) mod transmission_flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
    pub(crate) const BLOCK_STAT_PAYLOAD: u16 = 1 << 12;
}

/// `NBD_CMD_*`.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// `NBD_CMD_FLAG_*`.
pub(crate) mod command_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    /// The length counts bytes that follow. With extended headers only.
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// `NBD_REPLY_FLAG_DONE`.
pub(crate) const CHUNK_DONE: u16 = 1 << 0;

/// `NBD_REPLY_TYPE_*`.
pub(crate) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    pub(crate) const ERROR: u16 = (1 << 15) | 1;
}

/// `NBD_STATE_*`: the flags of `base:allocation`.
pub(crate) mod state {
    pub(crate) const HOLE: u32 = 1 << 0;
    pub(crate) const ZERO: u32 = 1 << 1;
}

/// The error values that may travel. ("Error values" of the protocol.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorCode {
    /// Writing to a read-only export.
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

impl ErrorCode {
    /// The value that stands for an `errno` of the engine or the operating system.
    pub(crate) fn from_errno(errno: i32) -> Self {
        use rustix::io::Errno;
        match Errno::from_raw_os_error(errno) {
            Errno::PERM | Errno::ACCESS | Errno::ROFS => Self::Perm,
            Errno::NOMEM => Self::NoMem,
            Errno::INVAL => Self::Inval,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Self::NoSpc,
            Errno::OVERFLOW => Self::Overflow,
            Errno::OPNOTSUPP => Self::NotSup,
            Errno::SHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }

    pub(crate) fn number(self) -> u32 {
        self as u32
    }
}

/// How requests and replies look, as the client has negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Style {
    /// Simple replies.
    #[default]
    Simple,
    /// Structured replies where there is payload; errors carry text.
    Structured,
    /// Extended headers, both ways: lengths of 64 bits.
    Extended,
}

impl Style {
    /// Bytes of a request's header.
    pub(crate) const fn request_bytes(self) -> usize {
        match self {
            Self::Simple | Self::Structured => 28,
            Self::Extended => 32,
        }
    }
}

/// The header of a request ("Request message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    /// The client's own name for the request; every reply repeats it.
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// 32 bits on the wire; 64 once extended headers are negotiated.
    pub(crate) len: u64,
}

impl RequestHeader {
    /// None when it does not begin with the magic number, or is shorter than `style` has it.
    pub(crate) fn decode(bytes: &[u8], style: Style) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        let extended = style == Style::Extended;
        let magic = if extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        if fields.u32()? != magic {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: if extended {
                fields.u64()?
            } else {
                u64::from(fields.u32()?)
            },
        })
    }

    /// Bytes that follow the header. A write has them whatever its flags say, as existing servers take it.
    pub(crate) fn payload_len(&self, style: Style) -> u64 {
        let says_so = style == Style::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        if says_so || self.command == command::WRITE {
            self.len
        } else {
            0
        }
    }
}

/// Reads fields one after the other. Every read is None where the bytes run out.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string after its length in 32 bits.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.bytes(len)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// A length that is sent as 32 bits.
///
/// # Panics
/// When it does not fit: every caller has bounded it far below by `limits`.
pub(crate) fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("lengths on the wire are bounded by limits.rs")
}

#[cfg(test)]
mod tests {
    //! Guards the layouts against slips: they are compared with bytes written down by hand from the protocol's document.
    use super::*;

    #[test]
    fn request_header_has_the_layout_of_the_document() {
        let bytes = [
            0x25, 0x60, 0x95, 0x13, 0x00, 0x01, 0x00, 0x06, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0,
            0, 0, 0, 0xff, 0xff, 0xff, 0xff,
        ];
        assert_eq!(
            RequestHeader::decode(&bytes, Style::Structured),
            Some(RequestHeader {
                flags: command_flag::FUA,
                command: command::WRITE_ZEROES,
                cookie: 0x0102_0304_0506_0708,
                offset: 1 << 32,
                len: 0xffff_ffff,
            })
        );
        let mut garbage = bytes;
        garbage[0] = 0;
        assert_eq!(RequestHeader::decode(&garbage, Style::Simple), None);
        assert_eq!(RequestHeader::decode(&bytes, Style::Extended), None);
    }

    #[test]
    fn extended_request_header_has_the_layout_of_the_document() {
        let bytes = [
            0x21, 0xe4, 0x1c, 0x71, 0x00, 0x20, 0x00, 0x01, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0,
            0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3,
        ];
        let header = RequestHeader {
            flags: command_flag::PAYLOAD_LEN,
            command: command::WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 32,
            len: 0x2_0000_0003,
        };
        assert_eq!(RequestHeader::decode(&bytes, Style::Extended), Some(header));
        assert_eq!(RequestHeader::decode(&bytes, Style::Structured), None);
        assert_eq!(RequestHeader::decode(&bytes[..31], Style::Extended), None);
    }

    #[test]
    fn only_writes_carry_a_payload_unless_a_flag_says_otherwise() {
        for command in 0..20 {
            let mut header = RequestHeader {
                flags: 0,
                command,
                cookie: 0,
                offset: 0,
                len: 7,
            };
            let expected = if command == 1 { 7 } else { 0 };
            assert_eq!(header.payload_len(Style::Structured), expected);
            assert_eq!(header.payload_len(Style::Extended), expected);
            header.flags = command_flag::PAYLOAD_LEN;
            assert_eq!(header.payload_len(Style::Structured), expected);
            assert_eq!(header.payload_len(Style::Extended), 7);
        }
    }

    #[test]
    fn fields_end_where_the_bytes_end() {
        let mut fields = Fields::new(&[0, 0, 0, 3, b'a', b'b']);
        assert_eq!(fields.string(), None);
        let mut fields = Fields::new(&[0, 0, 0, 2, b'a', b'b', 0, 9]);
        assert_eq!(fields.string(), Some(&b"ab"[..]));
        assert_eq!(fields.u16(), Some(9));
        assert!(fields.is_empty());
        assert_eq!(fields.u32(), None);
        assert_eq!(
            Fields::new(&[0xff, 0xff, 0xff, 0xff]).string(),
            None,
            "a length of 4 GiB is not believed"
        );
    }

    #[test]
    fn every_errno_has_a_value_that_may_travel() {
        for (errno, code) in [
            (1, ErrorCode::Perm),
            (13, ErrorCode::Perm),
            (30, ErrorCode::Perm),
            (5, ErrorCode::Io),
            (12, ErrorCode::NoMem),
            (22, ErrorCode::Inval),
            (28, ErrorCode::NoSpc),
            (122, ErrorCode::NoSpc),
            (27, ErrorCode::NoSpc),
            (75, ErrorCode::Overflow),
            (95, ErrorCode::NotSup),
            (108, ErrorCode::Shutdown),
            (117, ErrorCode::Io),
        ] {
            assert_eq!(ErrorCode::from_errno(errno), code, "errno {errno}");
        }
    }
}
