//! What the options of the handshake mean, and their replies ("Option types" and "Option reply types" of the protocol).

use crate::contexts::{Context, Contexts};
use crate::export::{ExportId, Exports};
use crate::handshake::{Progress, Session};
use crate::limits::{MIN_BLOCK, PAYLOAD_BYTES, PREFERRED_BLOCK, STRING_BYTES};
use crate::wire::{Fields, OPTION_REPLY_MAGIC, Style, info, len32, option, option_reply as reply};

/// What the client has switched on so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Negotiated {
    style: Style,
    /// The export for which metadata contexts were selected, and which.
    selected: Option<(ExportId, Contexts)>,
}

impl Negotiated {
    /// What holds from now on, for a client that has chosen `export`. Metadata contexts hold for the export they were selected for, and no
    /// other.
    pub(crate) fn session(&self, export: ExportId) -> Session {
        Session {
            export,
            style: self.style,
            contexts: match self.selected {
                Some((selected, contexts)) if selected == export => contexts,
                _ => Contexts::default(),
            },
        }
    }
}

/// Appends the replies to one option.
pub(crate) struct OptionReplies<'a> {
    option: u32,
    output: &'a mut Vec<u8>,
}

impl<'a> OptionReplies<'a> {
    pub(crate) fn new(option: u32, output: &'a mut Vec<u8>) -> Self {
        Self { option, output }
    }

    fn send(&mut self, kind: u32, data: &[&[u8]]) {
        let len: usize = data.iter().map(|piece| piece.len()).sum();
        self.output.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.output.extend(self.option.to_be_bytes());
        self.output.extend(kind.to_be_bytes());
        self.output.extend(len32(len).to_be_bytes());
        for piece in data {
            self.output.extend_from_slice(piece);
        }
    }

    pub(crate) fn ack(&mut self) {
        self.send(reply::ACK, &[]);
    }

    /// An error, with text for a person.
    pub(crate) fn error(&mut self, kind: u32, text: &str) {
        self.send(kind, &[text.as_bytes()]);
    }

    fn info(&mut self, kind: u16, data: &[&[u8]]) {
        let kind = kind.to_be_bytes();
        let mut pieces: Vec<&[u8]> = vec![&kind];
        pieces.extend_from_slice(data);
        self.send(reply::INFO, &pieces);
    }

    fn context(&mut self, id: u32, context: Context) {
        self.send(
            reply::META_CONTEXT,
            &[&id.to_be_bytes(), context.name().as_bytes()],
        );
    }
}

/// Answers one option other than EXPORT_NAME and STARTTLS. `data` is at most `OPTION_BYTES` long.
pub(crate) fn handle(
    option: u32,
    data: &[u8],
    exports: &Exports,
    negotiated: &mut Negotiated,
    replies: &mut OptionReplies<'_>,
) -> Progress {
    match option {
        option::ABORT => {
            replies.ack();
            return Progress::Close("the client ended the negotiation");
        }
        option::LIST => list(data, exports, replies),
        option::INFO | option::GO => {
            let found = describe(data, exports, negotiated, replies);
            if let (Some(export), option::GO) = (found, option) {
                return Progress::Enter(negotiated.session(export));
            }
        }
        option::STRUCTURED_REPLY => {
            style(Style::Structured, data, negotiated, replies);
        }
        option::EXTENDED_HEADERS => style(Style::Extended, data, negotiated, replies),
        option::LIST_META_CONTEXT => {
            contexts(data, exports, *negotiated, replies, Purpose::List);
        }
        option::SET_META_CONTEXT => {
            // Whatever comes of it, what was selected before is void.
            negotiated.selected = None;
            negotiated.selected = contexts(data, exports, *negotiated, replies, Purpose::Set);
        }
        _ => replies.error(reply::ERR_UNSUP, "this server does not know the option"),
    }
    Progress::Again
}

/// STRUCTURED_REPLY and EXTENDED_HEADERS: each once, and no way back.
fn style(wanted: Style, data: &[u8], negotiated: &mut Negotiated, replies: &mut OptionReplies<'_>) {
    if !data.is_empty() {
        replies.error(reply::ERR_INVALID, "this option takes no data");
    } else if negotiated.style > wanted {
        replies.error(
            reply::ERR_EXT_HEADER_REQD,
            "extended headers are negotiated already",
        );
    } else if negotiated.style == wanted {
        replies.error(reply::ERR_INVALID, "this is negotiated already");
    } else {
        negotiated.style = wanted;
        replies.ack();
    }
}

fn list(data: &[u8], exports: &Exports, replies: &mut OptionReplies<'_>) {
    if !data.is_empty() {
        replies.error(reply::ERR_INVALID, "this option takes no data");
        return;
    }
    for export in exports.iter() {
        let name = export.name.as_bytes();
        let description = export.description.as_deref().unwrap_or_default();
        replies.send(
            reply::SERVER,
            &[
                &len32(name.len()).to_be_bytes(),
                name,
                description.as_bytes(),
            ],
        );
    }
    replies.ack();
}

/// INFO and GO: what an export is like. The export, if all is well.
fn describe(
    data: &[u8],
    exports: &Exports,
    negotiated: &Negotiated,
    replies: &mut OptionReplies<'_>,
) -> Option<ExportId> {
    let Some((name, wanted)) = parse_describe(data) else {
        replies.error(reply::ERR_INVALID, "the option's data is malformed");
        return None;
    };
    let id = find(name, exports, replies)?;
    let export = exports.get(id);
    let session = negotiated.session(id);
    let flags = export.flags(session.style, session.contexts);
    replies.info(
        info::EXPORT,
        &[&export.size().to_be_bytes(), &flags.to_be_bytes()],
    );
    let [min, preferred, max] = [MIN_BLOCK, PREFERRED_BLOCK, PAYLOAD_BYTES].map(u32::to_be_bytes);
    replies.info(info::BLOCK_SIZE, &[&min, &preferred, &max]);
    if wanted.contains(&info::NAME) {
        replies.info(info::NAME, &[export.name.as_bytes()]);
    }
    if let (true, Some(description)) = (wanted.contains(&info::DESCRIPTION), &export.description) {
        replies.info(info::DESCRIPTION, &[description.as_bytes()]);
    }
    replies.ack();
    Some(id)
}

fn parse_describe(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields::new(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    // The count is believed only as far as the data goes.
    let wanted = (0..count)
        .map(|_| fields.u16())
        .collect::<Option<Vec<u16>>>()?;
    fields.is_empty().then_some((name, wanted))
}

fn find(name: &[u8], exports: &Exports, replies: &mut OptionReplies<'_>) -> Option<ExportId> {
    if name.len() > STRING_BYTES {
        replies.error(reply::ERR_INVALID, "the export name is too long");
        return None;
    }
    let found = exports.find(name);
    if found.is_none() {
        replies.error(reply::ERR_UNKNOWN, "there is no export of that name");
    }
    found
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    List,
    Set,
}

/// LIST_META_CONTEXT and SET_META_CONTEXT. The export, and what was found for it.
fn contexts(
    data: &[u8],
    exports: &Exports,
    negotiated: Negotiated,
    replies: &mut OptionReplies<'_>,
    purpose: Purpose,
) -> Option<(ExportId, Contexts)> {
    if negotiated.style == Style::Simple {
        replies.error(
            reply::ERR_INVALID,
            "structured replies must be negotiated first",
        );
        return None;
    }
    let Some((name, queries)) = parse_contexts(data) else {
        replies.error(reply::ERR_INVALID, "the option's data is malformed");
        return None;
    };
    let id = find(name, exports, replies)?;
    let is_found = |context: &Context| match purpose {
        // "If zero queries are sent, then the server MUST return all the metadata contexts".
        Purpose::List => {
            queries.is_empty() || queries.iter().any(|query| context.is_listed_by(query))
        }
        Purpose::Set => queries.contains(&context.name().as_bytes()),
    };
    let found: Contexts = Context::ALL.into_iter().filter(is_found).collect();
    for context in found.iter() {
        let number = match purpose {
            Purpose::List => 0,
            Purpose::Set => context.id(),
        };
        replies.context(number, context);
    }
    replies.ack();
    Some((id, found))
}

fn parse_contexts(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields::new(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        // The count is believed only as far as the data goes: each query takes at least four bytes.
        queries.push(
            fields
                .string()
                .filter(|query| query.len() <= STRING_BYTES)?,
        );
    }
    fields.is_empty().then_some((name, queries))
}
