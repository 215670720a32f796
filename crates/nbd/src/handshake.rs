//! From the first byte to the transmission phase: fixed newstyle negotiation ("Newstyle negotiation" of the protocol).
//!
//! A state machine without input or output of its own: it is given what was received, and appends what is to be sent. What
//! single options mean is in [`options`](crate::options).

use std::sync::Arc;

use crate::contexts::Contexts;
use crate::export::{ExportId, Exports};
use crate::input::Input;
use crate::limits::{OPTION_BYTES, OPTION_SKIP_BYTES, OPTIONS};
use crate::options::{self, Negotiated, OptionReplies};
use crate::wire::{GREETING_MAGIC, OPTION_MAGIC, Style, handshake_flag, option, option_reply};

/// What was agreed with a client, once it has chosen an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    pub(crate) export: ExportId,
    pub(crate) style: Style,
    /// What a block status may be asked for.
    pub(crate) contexts: Contexts,
}

/// What comes of looking at the input once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Something was understood; look again.
    Again,
    /// More input is needed.
    More,
    /// TLS is to begin, once what was appended is sent. The handshake goes on over it.
    StartTls,
    /// The handshake is over.
    Enter(Session),
    /// The connection ends, after what was appended is sent. The client asked for it, or broke a rule.
    Close(&'static str),
}

/// The handshake of one connection.
#[derive(Debug)]
pub(crate) struct Handshake {
    exports: Arc<Exports>,
    state: State,
    no_zeroes: bool,
    fixed: bool,
    options: u32,
    negotiated: Negotiated,
    tls: Tls,
    /// Why the client was refused for TLS or its absence, until it was said.
    complaint: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tls {
    /// The server has no credentials.
    Off,
    /// Nothing is told before it.
    Required,
    Active,
}

#[derive(Debug)]
enum State {
    /// The client's flags come next.
    Flags,
    /// An option comes next.
    Option,
    /// The rest of an option that is too long to be looked at comes next.
    Skip { option: u32, remaining: usize },
}

const WITHOUT_TLS: &str = "it did not ask for TLS, which --tls-creds requires of all clients";

const SERVER_FLAGS: u16 = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
const OPTION_HEAD: usize = 16;

/// What the server says first.
pub(crate) fn greeting() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(18);
    bytes.extend(GREETING_MAGIC.to_be_bytes());
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(SERVER_FLAGS.to_be_bytes());
    bytes
}

impl Handshake {
    pub(crate) fn new(exports: Arc<Exports>) -> Self {
        Self {
            tls: match exports.tls() {
                Some(_) => Tls::Required,
                None => Tls::Off,
            },
            exports,
            state: State::Flags,
            no_zeroes: false,
            fixed: false,
            options: 0,
            negotiated: Negotiated::default(),
            complaint: None,
        }
    }

    /// Why the client was refused for TLS or its absence, where that is news.
    pub(crate) fn take_complaint(&mut self) -> Option<&'static str> {
        self.complaint.take()
    }

    pub(crate) fn is_over_tls(&self) -> bool {
        self.tls == Tls::Active
    }

    /// Understands the next piece of `input`, and appends the answer to `output`.
    pub(crate) fn advance(&mut self, input: &mut Input, output: &mut Vec<u8>) -> Progress {
        match self.state {
            State::Flags => self.flags(input),
            State::Option => self.option(input, output),
            State::Skip { option, remaining } => self.skip(option, remaining, input, output),
        }
    }

    fn flags(&mut self, input: &mut Input) -> Progress {
        let Some(head) = input.head::<4>() else {
            return Progress::More;
        };
        let flags = u32::from_be_bytes(*head);
        input.consume(4);
        if flags & !u32::from(SERVER_FLAGS) != 0 {
            return Progress::Close("the client set a handshake flag that was not offered");
        }
        self.fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Option;
        Progress::Again
    }

    fn option(&mut self, input: &mut Input, output: &mut Vec<u8>) -> Progress {
        let Some(head) = input.head::<OPTION_HEAD>() else {
            return Progress::More;
        };
        let [magic, second] = [&head[..8], &head[8..]].map(|half| {
            u64::from_be_bytes(half.try_into().expect("halves of sixteen bytes are eight"))
        });
        let [option, len] = split(second);
        if magic != OPTION_MAGIC {
            return Progress::Close("an option does not begin with its magic number");
        }
        if !self.fixed && option != option::EXPORT_NAME {
            return Progress::Close(
                "the client does not speak fixed newstyle, so it may only choose an export",
            );
        }
        let Some(len) = usize::try_from(len)
            .ok()
            .filter(|_| len <= OPTION_SKIP_BYTES)
        else {
            return Progress::Close("an option is longer than any server takes");
        };
        if len > OPTION_BYTES {
            if option == option::EXPORT_NAME {
                return Progress::Close("an export name is longer than the protocol allows");
            }
            input.consume(OPTION_HEAD);
            self.state = State::Skip {
                option,
                remaining: len,
            };
            return Progress::Again;
        }
        if input.data().len() < OPTION_HEAD + len {
            return Progress::More;
        }
        self.options += 1;
        if self.options > OPTIONS {
            return Progress::Close("the client haggles without end");
        }
        let data = &input.data()[OPTION_HEAD..OPTION_HEAD + len];
        let mut replies = OptionReplies::new(option, output);
        let progress = match option {
            option::EXPORT_NAME => self.export_name(data, output),
            option::STARTTLS => self.start_tls(data, &mut replies),
            _ if self.tls == Tls::Required && option != option::ABORT => {
                replies.error(
                    option_reply::ERR_TLS_REQD,
                    "this server serves over TLS only: use an nbds:// URI",
                );
                self.complaint = Some(WITHOUT_TLS);
                Progress::Again
            }
            _ => options::handle(
                option,
                data,
                &self.exports,
                &mut self.negotiated,
                &mut replies,
            ),
        };
        input.consume(OPTION_HEAD + len);
        if progress == Progress::StartTls && !input.data().is_empty() {
            // A client waits for the answer before it begins. What is here was slipped in by somebody in between, or is nonsense.
            return Progress::Close("the client went on before TLS had begun");
        }
        progress
    }

    fn start_tls(&mut self, data: &[u8], replies: &mut OptionReplies<'_>) -> Progress {
        if self.tls == Tls::Off {
            replies.error(
                option_reply::ERR_POLICY,
                "this server has no TLS: use an nbd:// URI, or have it started with --tls-creds",
            );
            self.complaint =
                Some("it asked for TLS, and there are no credentials (--tls-creds DIR)");
        } else if self.tls == Tls::Active {
            replies.error(option_reply::ERR_INVALID, "TLS has begun already");
        } else if !data.is_empty() {
            replies.error(option_reply::ERR_INVALID, "this option takes no data");
        } else {
            replies.ack();
            self.tls = Tls::Active;
            // What was agreed on in the clear does not hold any more.
            self.negotiated = Negotiated::default();
            return Progress::StartTls;
        }
        Progress::Again
    }

    fn skip(
        &mut self,
        option: u32,
        remaining: usize,
        input: &mut Input,
        output: &mut Vec<u8>,
    ) -> Progress {
        let skipped = remaining.min(input.data().len());
        input.consume(skipped);
        if skipped < remaining {
            self.state = State::Skip {
                option,
                remaining: remaining - skipped,
            };
            return Progress::More;
        }
        self.state = State::Option;
        self.options += 1;
        OptionReplies::new(option, output).error(
            option_reply::ERR_TOO_BIG,
            "the option is longer than this server takes",
        );
        Progress::Again
    }

    /// `NBD_OPT_EXPORT_NAME`: the only option without a reply of its own, so a wrong name can only end the connection.
    fn export_name(&mut self, name: &[u8], output: &mut Vec<u8>) -> Progress {
        if self.tls == Tls::Required {
            self.complaint = Some(WITHOUT_TLS);
            return Progress::Close("the client asked for an export without TLS");
        }
        let Some(export) = self.exports.find(name) else {
            return Progress::Close("the client asked for an export that is not there");
        };
        let session = self.negotiated.session(export);
        if session.style == Style::Extended {
            return Progress::Close("with extended headers the client must choose with GO");
        }
        let export = self.exports.get(export);
        output.extend(export.size().to_be_bytes());
        output.extend(export.flags(session.style, session.contexts).to_be_bytes());
        if !self.no_zeroes {
            output.extend([0; 124]);
        }
        Progress::Enter(session)
    }
}

/// The two halves of a 64-bit field.
fn split(field: u64) -> [u32; 2] {
    let bytes = field.to_be_bytes();
    let half =
        |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}

#[cfg(test)]
pub(crate) mod tests;
