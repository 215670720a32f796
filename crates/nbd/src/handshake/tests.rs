//! The handshake against a scripted client, byte by byte as the protocol's document lays it out, and against clients that send whatever
//! they like: no panic, bounded output, and an end.
use super::*;
use crate::contexts::Context;
use crate::export::Export;
use crate::limits::{INPUT_BYTES, STRING_BYTES};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

pub(crate) fn exports() -> Arc<Exports> {
    let mut export = Export::new("disk".into(), false, || GIB);
    export.description = Some("a disk".into());
    Arc::new(Exports::new(vec![export], None))
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text);
    bytes
}

fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    for info in infos {
        data.extend(info.to_be_bytes());
    }
    data
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend(string(query.as_bytes()));
    }
    data
}

fn reply(kind: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(kind.to_be_bytes());
    bytes.extend(reply.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Kinds of the replies in `bytes`.
fn kinds(mut bytes: &[u8]) -> Vec<u32> {
    let mut kinds = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        kinds.push(u32::from_be_bytes(bytes[12..16].try_into().unwrap()));
        let len = u32::from_be_bytes(bytes[16..20].try_into().unwrap());
        bytes = &bytes[20 + usize::try_from(len).unwrap()..];
    }
    kinds
}

/// Feeds `bytes`, in pieces of `piece`, until the handshake ends or wants more than there is.
fn drive(
    handshake: &mut Handshake,
    input: &mut Input,
    mut bytes: &[u8],
    piece: usize,
) -> (Progress, Vec<u8>) {
    let mut output = Vec::new();
    loop {
        match handshake.advance(input, &mut output) {
            Progress::Again => {}
            Progress::More if !bytes.is_empty() => {
                assert!(
                    !input.is_full(),
                    "a full input must always be enough to go on"
                );
                let room = input.space();
                let count = piece.max(1).min(bytes.len()).min(room.len());
                room[..count].copy_from_slice(&bytes[..count]);
                input.received(count);
                bytes = &bytes[count..];
            }
            end => return (end, output),
        }
    }
}

/// A handshake after the client's flags.
fn after_flags(flags: u32) -> (Handshake, Input) {
    let mut handshake = Handshake::new(exports());
    let mut input = Input::new();
    let (progress, output) = drive(&mut handshake, &mut input, &flags.to_be_bytes(), 4);
    assert_eq!(progress, Progress::More);
    assert!(output.is_empty());
    (handshake, input)
}

fn exchange(handshake: &mut Handshake, input: &mut Input, bytes: &[u8]) -> (Progress, Vec<u8>) {
    drive(handshake, input, bytes, usize::MAX)
}

#[test]
fn the_greeting_offers_fixed_newstyle_and_no_zeroes() {
    assert_eq!(greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn unknown_client_flags_end_the_connection() {
    for flags in [4u32, 1 << 31, 0xffff_ffff] {
        let mut handshake = Handshake::new(exports());
        let (progress, output) = exchange(&mut handshake, &mut Input::new(), &flags.to_be_bytes());
        assert!(
            matches!(progress, Progress::Close(_)),
            "{flags:#x}: {progress:?}"
        );
        assert!(output.is_empty());
    }
}

#[test]
fn export_name_gives_size_flags_and_zeroes_unless_declined() {
    for (flags, zeroes) in [(1u32, 124), (3, 0), (0, 124)] {
        for name in [&b"disk"[..], b""] {
            let (mut handshake, mut input) = after_flags(flags);
            let (progress, output) = exchange(&mut handshake, &mut input, &option(1, name));
            assert_eq!(
                progress,
                Progress::Enter(Session {
                    export: 0,
                    style: Style::Simple,
                    contexts: Contexts::default()
                })
            );
            let mut expected = GIB.to_be_bytes().to_vec();
            expected.extend(0b1101_0110_1101_u16.to_be_bytes());
            expected.extend(vec![0; zeroes]);
            assert_eq!(output, expected);
        }
    }
    let (mut handshake, mut input) = after_flags(3);
    let (progress, output) = exchange(&mut handshake, &mut input, &option(1, b"other"));
    assert!(matches!(progress, Progress::Close(_)));
    assert!(output.is_empty());
}

#[test]
fn a_client_without_fixed_newstyle_can_only_choose_an_export() {
    let (mut handshake, mut input) = after_flags(0);
    let (progress, output) = exchange(&mut handshake, &mut input, &option(3, b""));
    assert!(matches!(progress, Progress::Close(_)));
    assert!(output.is_empty());
}

#[test]
fn go_describes_and_enters() {
    let (mut handshake, mut input) = after_flags(3);
    let data = go("disk", &[1, 2, 3, 77]);
    let (progress, output) = exchange(&mut handshake, &mut input, &option(7, &data));
    assert_eq!(
        progress,
        Progress::Enter(Session {
            export: 0,
            style: Style::Simple,
            contexts: Contexts::default()
        })
    );
    let mut export = vec![0, 0];
    export.extend(GIB.to_be_bytes());
    export.extend(0b1101_0110_1101_u16.to_be_bytes());
    let expected = [
        reply(7, 3, &export),
        reply(
            7,
            3,
            &[0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 0x02, 0x00, 0x00, 0x00],
        ),
        reply(7, 3, b"\x00\x01disk"),
        reply(7, 3, b"\x00\x02a disk"),
        reply(7, 1, b""),
    ]
    .concat();
    assert_eq!(output, expected);
}

#[test]
fn info_describes_and_stays() {
    let (mut handshake, mut input) = after_flags(3);
    let (progress, output) = exchange(&mut handshake, &mut input, &option(6, &go("", &[])));
    assert_eq!(progress, Progress::More);
    assert_eq!(kinds(&output), [3, 3, 1]);
    let (_, output) = exchange(&mut handshake, &mut input, &option(6, &go("other", &[])));
    assert_eq!(kinds(&output), [(1 << 31) + 6]);
}

#[test]
fn malformed_options_are_refused_and_the_handshake_goes_on() {
    let mut too_many_infos = go("disk", &[3]);
    too_many_infos[8..10].copy_from_slice(&[0xff, 0xff]);
    let mut trailing = go("disk", &[]);
    trailing.push(0);
    let mut endless_queries = contexts("disk", &[]);
    endless_queries[8..12].copy_from_slice(&[0xff; 4]);
    let long = "x".repeat(STRING_BYTES + 1);
    let cases: Vec<(u32, Vec<u8>)> = vec![
        (3, b"x".to_vec()),
        (8, b"x".to_vec()),
        (6, vec![]),
        (7, vec![0xff; 4]),
        (7, too_many_infos),
        (7, trailing),
        (7, go(&long, &[])),
        (9, endless_queries),
        (9, vec![]),
        (10, contexts("disk", &[&long])),
        (10, contexts(&long, &[])),
    ];
    for (kind, data) in cases {
        let (mut handshake, mut input) = after_flags(3);
        if kind != 8 {
            exchange(&mut handshake, &mut input, &option(8, b""));
        }
        let (progress, output) = exchange(&mut handshake, &mut input, &option(kind, &data));
        assert_eq!(progress, Progress::More, "option {kind}");
        assert_eq!(kinds(&output), [(1 << 31) + 3], "option {kind}");
        let (_, output) = exchange(&mut handshake, &mut input, &option(3, b""));
        assert_eq!(kinds(&output), [2, 1], "the next option is understood");
    }
}

#[test]
fn list_names_the_exports() {
    let (mut handshake, mut input) = after_flags(3);
    let (_, output) = exchange(&mut handshake, &mut input, &option(3, b""));
    let expected = [reply(3, 2, b"\x00\x00\x00\x04diska disk"), reply(3, 1, b"")].concat();
    assert_eq!(output, expected);
}

#[test]
fn unknown_options_are_unsupported() {
    // PEEK_EXPORT, and what nobody has defined.
    for kind in [0, 4, 12, 77, u32::MAX] {
        let (mut handshake, mut input) = after_flags(3);
        let (progress, output) = exchange(&mut handshake, &mut input, &option(kind, b"data"));
        assert_eq!(progress, Progress::More);
        assert_eq!(kinds(&output), [(1 << 31) + 1]);
    }
}

#[test]
fn abort_is_acknowledged() {
    let (mut handshake, mut input) = after_flags(3);
    let (progress, output) = exchange(&mut handshake, &mut input, &option(2, b""));
    assert!(matches!(progress, Progress::Close(_)));
    assert_eq!(output, reply(2, 1, b""));
}

#[test]
fn metadata_contexts_need_structured_replies() {
    for kind in [9, 10] {
        let (mut handshake, mut input) = after_flags(3);
        let data = contexts("disk", &["base:allocation"]);
        let (_, output) = exchange(&mut handshake, &mut input, &option(kind, &data));
        assert_eq!(kinds(&output), [(1 << 31) + 3]);
        exchange(&mut handshake, &mut input, &option(8, b""));
        let (_, output) = exchange(&mut handshake, &mut input, &option(kind, &data));
        assert_eq!(kinds(&output), [4, 1]);
    }
}

#[test]
fn metadata_contexts_are_found_by_query() {
    let (mut handshake, mut input) = after_flags(3);
    exchange(&mut handshake, &mut input, &option(8, b""));
    for (kind, queries, found) in [
        (9, &[][..], 2),
        (9, &["base:"], 1),
        (9, &["qemu:", "base:allocation"], 2),
        (9, &["qemu:"], 1),
        (9, &["base:other", "qemu", ""], 0),
        (10, &[], 0),
        (10, &["base:", "qemu:"], 0),
        (10, &["qemu:dirty-bitmap:x"], 0),
        (10, &["base:allocation", "base:allocation"], 1),
        (10, &["qemu:allocation-depth", "base:allocation"], 2),
    ] {
        let (_, output) = exchange(
            &mut handshake,
            &mut input,
            &option(kind, &contexts("", queries)),
        );
        let mut expected = vec![4; found];
        expected.push(1);
        assert_eq!(kinds(&output), expected, "{kind} {queries:?}");
    }
}

#[test]
fn the_last_selection_of_contexts_holds() {
    let select = |queries: &[&str]| option(10, &contexts("disk", queries));
    let (allocation, depth) = (Context::Allocation, Context::Depth);
    for (steps, contexts) in [
        (vec![select(&["base:allocation"])], vec![allocation]),
        (vec![select(&["qemu:allocation-depth"])], vec![depth]),
        (
            vec![select(&["qemu:allocation-depth", "base:allocation"])],
            vec![allocation, depth],
        ),
        (vec![select(&["base:allocation"]), select(&[])], vec![]),
        (
            vec![
                select(&["base:allocation"]),
                option(10, &self::contexts("other", &[])),
            ],
            vec![],
        ),
    ] {
        let (mut handshake, mut input) = after_flags(3);
        exchange(&mut handshake, &mut input, &option(8, b""));
        for step in steps {
            exchange(&mut handshake, &mut input, &step);
        }
        let (progress, _) = exchange(&mut handshake, &mut input, &option(7, &go("disk", &[])));
        assert_eq!(
            progress,
            Progress::Enter(Session {
                export: 0,
                style: Style::Structured,
                contexts: contexts.into_iter().collect()
            })
        );
    }
}

#[test]
fn extended_headers_take_the_place_of_structured_replies() {
    let (mut handshake, mut input) = after_flags(3);
    // Each row: option, its data, the expected reply.
    for (kind, data, expected) in [
        (11, &b"x"[..], (1 << 31) + 3),
        (8, b"", 1),
        (8, b"", (1 << 31) + 3),
        (11, b"", 1),
        (11, b"", (1 << 31) + 3),
        (8, b"", (1 << 31) + 10),
    ] {
        let (_, output) = exchange(&mut handshake, &mut input, &option(kind, data));
        assert_eq!(kinds(&output), [expected], "option {kind}");
    }
    let both = contexts("disk", &["base:allocation", "qemu:allocation-depth"]);
    let (_, output) = exchange(&mut handshake, &mut input, &option(10, &both));
    assert_eq!(kinds(&output), [4, 4, 1]);
    let (progress, output) = exchange(&mut handshake, &mut input, &option(7, &go("disk", &[])));
    let flags = u16::from_be_bytes(output[30..32].try_into().unwrap());
    assert_eq!(flags, 0b1_1101_1110_1101, "with BLOCK_STAT_PAYLOAD");
    assert_eq!(
        progress,
        Progress::Enter(Session {
            export: 0,
            style: Style::Extended,
            contexts: Context::ALL.into_iter().collect()
        })
    );
    // The old way to choose an export is not for them.
    let (mut handshake, mut input) = after_flags(3);
    exchange(&mut handshake, &mut input, &option(11, b""));
    let (progress, output) = exchange(&mut handshake, &mut input, &option(1, b"disk"));
    assert!(matches!(progress, Progress::Close(_)) && output.is_empty());
}

#[test]
fn without_credentials_there_is_no_tls() {
    let (mut handshake, mut input) = after_flags(3);
    let (progress, output) = exchange(&mut handshake, &mut input, &option(5, b""));
    assert_eq!(progress, Progress::More);
    assert_eq!(kinds(&output), [(1 << 31) + 2]);
}

/// A handshake after the client's flags with a server that requires TLS.
fn before_tls() -> (Handshake, Input) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::server::ResolvesServerCertUsingSni::new()));
    let export = Export::new("disk".into(), false, || GIB);
    let exports = Exports::new(vec![export], Some(Arc::new(config)));
    let mut handshake = Handshake::new(Arc::new(exports));
    let mut input = Input::new();
    exchange(&mut handshake, &mut input, &3u32.to_be_bytes());
    (handshake, input)
}

#[test]
fn nothing_is_told_before_tls() {
    let (mut handshake, mut input) = before_tls();
    for kind in [3, 6, 7, 8, 9, 10, 11, 77] {
        let (progress, output) = exchange(&mut handshake, &mut input, &option(kind, b""));
        assert_eq!(progress, Progress::More);
        assert_eq!(kinds(&output), [(1 << 31) + 5], "option {kind}");
    }
    let (progress, output) = exchange(&mut handshake, &mut input, &option(5, b"x"));
    assert_eq!(
        (progress, kinds(&output)),
        (Progress::More, vec![(1 << 31) + 3])
    );
    let (progress, output) = exchange(&mut handshake, &mut input, &option(5, b""));
    assert_eq!((progress, output), (Progress::StartTls, reply(5, 1, b"")));
    let (_, output) = exchange(&mut handshake, &mut input, &option(5, b""));
    assert_eq!(kinds(&output), [(1 << 31) + 3], "once is enough");
    let (progress, _) = exchange(&mut handshake, &mut input, &option(7, &go("disk", &[])));
    assert!(matches!(progress, Progress::Enter(_)));

    for (bytes, why) in [
        (option(1, b"disk"), "an export without TLS"),
        ([option(5, b""), option(3, b"")].concat(), "slipped in"),
    ] {
        let (mut handshake, mut input) = before_tls();
        let (progress, _) = exchange(&mut handshake, &mut input, &bytes);
        assert!(matches!(progress, Progress::Close(_)), "{why}");
    }
    let (mut handshake, mut input) = before_tls();
    let (progress, output) = exchange(&mut handshake, &mut input, &option(2, b""));
    assert!(matches!(progress, Progress::Close(_)));
    assert_eq!(output, reply(2, 1, b""));
}

#[test]
fn long_options_are_skipped_and_absurd_ones_end_the_connection() {
    let (mut handshake, mut input) = after_flags(3);
    let (progress, output) = exchange(
        &mut handshake,
        &mut input,
        &option(10, &vec![0; 3 * INPUT_BYTES]),
    );
    assert_eq!(progress, Progress::More);
    assert_eq!(kinds(&output), [(1 << 31) + 9]);
    let mut absurd = option(10, b"");
    absurd[12..16].copy_from_slice(&[0xff; 4]);
    let (progress, _) = exchange(&mut handshake, &mut input, &absurd);
    assert!(matches!(progress, Progress::Close(_)));
}

#[test]
fn a_client_cannot_haggle_for_ever() {
    let (mut handshake, mut input) = after_flags(3);
    let mut rounds = 0;
    loop {
        let (progress, _) = exchange(&mut handshake, &mut input, &option(3, b""));
        rounds += 1;
        if matches!(progress, Progress::Close(_)) {
            break;
        }
        assert!(rounds <= OPTIONS);
    }
}

/// Anything from plausible to garbage.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        Just(go("disk", &[1, 2, 3])),
        Just(contexts("disk", &["base:allocation"])),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(len, rest)| {
            let mut data = len.to_be_bytes().to_vec();
            data.extend(rest);
            data
        }),
    ];
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..64),
        8 => (prop_oneof![0u32..14, any::<u32>()], data, any::<bool>(), 0usize..80).prop_map(|(kind, data, cut, at)| {
            let mut bytes = option(kind, &data);
            if cut {
                bytes.truncate(at);
            }
            bytes
        }),
    ]
}

proptest! {
    #[test]
    fn hostile_bytes_are_survived(
        flags in prop_oneof![Just(3u32), Just(1), Just(0), any::<u32>()],
        parts in prop::collection::vec(hostile(), 0..12),
        piece in prop_oneof![Just(1usize), 2usize..50, Just(usize::MAX)],
    ) {
        let mut bytes = flags.to_be_bytes().to_vec();
        bytes.extend(parts.concat());
        let mut handshake = Handshake::new(exports());
        let (_, output) = drive(&mut handshake, &mut Input::new(), &bytes, piece);
        // Every option of at least 16 bytes gives at most a few hundred.
        prop_assert!(output.len() <= 300 * (parts.concat().len() / 16 + 1));
    }

    #[test]
    fn the_outcome_does_not_depend_on_how_the_bytes_arrive(
        parts in prop::collection::vec(hostile(), 0..8),
        piece in 1usize..60,
    ) {
        let mut bytes = 3u32.to_be_bytes().to_vec();
        bytes.extend(parts.concat());
        let whole = drive(&mut Handshake::new(exports()), &mut Input::new(), &bytes, usize::MAX);
        let pieces = drive(&mut Handshake::new(exports()), &mut Input::new(), &bytes, piece);
        prop_assert_eq!(whole, pieces);
    }
}
