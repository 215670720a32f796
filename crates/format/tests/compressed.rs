//! Compressed clusters: round trips, padding, and streams that lie. Guards against panics, unbounded memory and
//! clusters that decode to something else than one cluster.

use proptest::prelude::*;
use urus_format::compressed::{Decoder, Encoder, decode, encode};
use urus_format::{Compression, Error};

const CODECS: [Compression; 2] = [Compression::Deflate, Compression::Zstd];

fn text(bytes: usize) -> Vec<u8> {
    let mut out: Vec<u8> = (0u64..)
        .flat_map(|line| format!("{} {line}\n", line * line % 977).into_bytes())
        .take(bytes)
        .collect();
    out.shrink_to_fit();
    out
}

#[test]
fn clusters_round_trip_with_padding() {
    for codec in CODECS {
        for bits in 9..=21 {
            let cluster = text(1 << bits);
            let mut stream = encode(codec, &cluster, cluster.len() - 1).unwrap();
            assert!(stream.len() < cluster.len());
            let mut out = vec![0xee; cluster.len()];
            decode(codec, &stream, &mut out).unwrap();
            assert!(out == cluster, "{codec} {bits}");
            // What follows in the last sector may be anything, such as the next stream.
            for padding in [0, 0xff, 0x28] {
                let length = stream.len();
                stream.resize(length + 700, padding);
                out.fill(0xee);
                decode(codec, &stream, &mut out).unwrap();
                assert!(out == cluster, "{codec} {bits} {padding}");
                stream.truncate(length);
            }
        }
    }
}

#[test]
fn what_does_not_shrink_is_not_encoded() {
    let mut state = 1u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(65536)
    .collect();
    let cluster = text(65536);
    for codec in CODECS {
        assert_eq!(encode(codec, &noise, usize::MAX), None, "{codec}");
        assert_eq!(encode(codec, &[], 100), None);
        assert_eq!(encode(codec, &cluster, 0), None);
        let bytes = encode(codec, &cluster, usize::MAX).unwrap().len();
        assert_eq!(encode(codec, &cluster, bytes - 1), None, "{codec}");
        assert!(encode(codec, &cluster, bytes + 64).is_some());
    }
}

/// What a log shows of them is their name, not their contents.
#[test]
fn contexts_show_no_data() {
    assert_eq!(format!("{:?}", Decoder::new()), "Decoder { .. }");
    assert_eq!(format!("{:?}", Encoder::new()), "Encoder { .. }");
}

/// A reader's window of 4 KiB must be enough.
#[test]
fn deflate_refers_at_most_4_kib_back() {
    let cluster = [text(5000), text(5000), text(5000)].concat();
    let stream = encode(Compression::Deflate, &cluster, cluster.len()).unwrap();
    let mut narrow = zlib_rs::Inflate::new(false, 12);
    // In small steps, so that only the window can be referred to.
    let (mut out, mut source) = (Vec::new(), &stream[..]);
    while out.len() < cluster.len() {
        let mut step = [0; 100];
        let (read, written) = (narrow.total_in(), narrow.total_out());
        narrow
            .decompress(source, &mut step, zlib_rs::InflateFlush::NoFlush)
            .unwrap();
        source = &source[usize::try_from(narrow.total_in() - read).unwrap()..];
        out.extend_from_slice(&step[..usize::try_from(narrow.total_out() - written).unwrap()]);
    }
    assert!(out == cluster);
}

/// Writers with the full window of 32 KiB exist; their images must be readable.
#[test]
fn wide_windows_are_read() {
    let cluster = [text(30000), text(30000)].concat();
    let mut wide = zlib_rs::Deflate::new(9, false, 15);
    let mut stream = vec![0; cluster.len()];
    wide.compress(&cluster, &mut stream, zlib_rs::DeflateFlush::Finish)
        .unwrap();
    let mut out = vec![0; cluster.len()];
    decode(Compression::Deflate, &stream, &mut out).unwrap();
    assert!(out == cluster);
}

#[test]
fn wrong_lengths_are_corruption() {
    for codec in CODECS {
        let cluster = text(65536);
        let stream = encode(codec, &cluster, cluster.len()).unwrap();
        let mut longer = vec![0; cluster.len() + 1];
        match decode(codec, &stream, &mut longer) {
            Err(Error::Compressed {
                have_bytes,
                need_bytes,
                ..
            }) => {
                assert_eq!((have_bytes, need_bytes), (65536, 65537), "{codec}");
            }
            other => panic!("{codec}: {other:?}"),
        }
        assert!(
            decode(
                codec,
                &stream[..stream.len() / 2],
                &mut vec![0; cluster.len()]
            )
            .is_err(),
            "{codec}"
        );
        assert!(decode(codec, &[], &mut [0; 512]).is_err());
        // One cluster of output and no more: deflate is cut, a zstd frame must end.
        let shorter = decode(codec, &stream, &mut vec![0; cluster.len() - 1]);
        assert_eq!(shorter.is_ok(), codec == Compression::Deflate);
    }
}

/// A frame that asks for a window of 1 GiB, without telling its size.
#[test]
fn zstd_windows_are_bounded() {
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, (20 << 3), 0x01, 0x00, 0x00];
    assert!(decode(Compression::Zstd, &frame, &mut [0; 512]).is_err());
}

/// `zstd --long=27` and `--ultra -22` on a pipe: a window of 128 MiB, and no size. QEMU reads such clusters.
#[test]
fn zstd_windows_wider_than_a_cluster_are_read() {
    use std::io::Write as _;
    for bits in [9, 16, 21] {
        for window_log in [23, 24, 27] {
            let cluster = text(1 << bits);
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
            encoder.window_log(window_log).unwrap();
            encoder.long_distance_matching(true).unwrap();
            encoder.write_all(&cluster).unwrap();
            let mut stream = encoder.finish().unwrap();
            // The window that the frame asks for: 2 to the power of 10 and these five bits.
            assert_eq!(u32::from(stream[5] >> 3) + 10, window_log);
            stream.resize(stream.len().next_multiple_of(512), 0);
            let mut out = vec![0xee; cluster.len()];
            decode(Compression::Zstd, &stream, &mut out).unwrap();
            assert!(out == cluster, "{bits} {window_log}");
        }
    }
}

/// Several frames are one stream, skippable ones among them, as `pzstd` writes it.
#[test]
fn zstd_frames_follow_one_another() {
    let cluster = text(65536);
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let frame = |part: &[u8]| zstd::stream::encode_all(part, 3).unwrap();
    let parts = [
        &skippable[..],
        &frame(&cluster[..100]),
        &frame(&[]),
        &skippable,
        &frame(&cluster[100..]),
    ];
    let mut stream = parts.concat();
    stream.resize(stream.len().next_multiple_of(512), 0);
    let mut out = vec![0; cluster.len()];
    decode(Compression::Zstd, &stream, &mut out).unwrap();
    assert!(out == cluster);
    // No frame refers to what another one gave.
    let first = zstd::stream::encode_all(&cluster[..32768], 3).unwrap();
    let again = zstd::stream::encode_all(&cluster[..32768], 3).unwrap();
    let mut out = vec![0; cluster.len()];
    decode(Compression::Zstd, &[first, again].concat(), &mut out).unwrap();
    assert!(out[..32768] == cluster[..32768] && out[32768..] == cluster[..32768]);
}

/// Frames without content cost time and no memory; the stream's length bounds them.
#[test]
fn endless_empty_frames_end() {
    let empty = zstd::stream::encode_all(&[][..], 3).unwrap();
    let stream = empty.repeat((4 << 20) / empty.len());
    let fault = decode(Compression::Zstd, &stream, &mut vec![0; 2 << 20]).unwrap_err();
    assert!(
        matches!(fault, Error::Compressed { have_bytes: 0, .. }),
        "{fault}"
    );
}

/// A frame streamed without its size known, as writers other than QEMU may.
#[test]
fn zstd_streams_without_a_size_are_read() {
    let cluster = text(65536);
    let mut stream = zstd::stream::encode_all(&cluster[..], 19).unwrap();
    stream.resize(stream.len().next_multiple_of(512), 0);
    let mut out = vec![0; cluster.len()];
    decode(Compression::Zstd, &stream, &mut out).unwrap();
    assert!(out == cluster);
}

/// A context that met an error decodes and encodes the next cluster as if nothing had been.
#[test]
fn contexts_survive_errors() {
    let (mut decoder, mut encoder) = (Decoder::new(), Encoder::new());
    for codec in CODECS {
        let cluster = text(4096);
        assert_eq!(encoder.encode(codec, &cluster, 10), None);
        let stream = encoder.encode(codec, &cluster, 4095).unwrap();
        let mut out = vec![0; 4096];
        for broken in [
            &stream[..stream.len() / 2],
            &[0xff; 40][..],
            &[],
            &stream[1..],
        ] {
            let _ = decoder.decode(codec, broken, &mut out);
            out.fill(0);
            decoder.decode(codec, &stream, &mut out).unwrap();
            assert!(out == cluster);
        }
    }
}

proptest! {
    #[test]
    fn any_cluster_round_trips(cluster in prop::collection::vec(0u8..4, 1..5000), padding in 0usize..600) {
        for codec in CODECS {
            if let Some(mut stream) = encode(codec, &cluster, usize::MAX) {
                stream.resize(stream.len() + padding, 0);
                let mut out = vec![9; cluster.len()];
                decode(codec, &stream, &mut out).unwrap();
                prop_assert_eq!(&out, &cluster);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), length in 0usize..2000) {
        for codec in CODECS {
            let _ = decode(codec, &bytes, &mut vec![0; length]);
        }
    }

    /// Damage is found or yields another cluster: never a panic.
    #[test]
    fn damage_never_panics(at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let cluster = text(8192);
        for codec in CODECS {
            let mut stream = encode(codec, &cluster, usize::MAX).unwrap();
            *at.get_mut(&mut stream) = value;
            let _ = decode(codec, &stream, &mut vec![0; cluster.len()]);
        }
    }
}
