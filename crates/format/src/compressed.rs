//! Compressed clusters (specification: "Compressed Clusters Descriptor", "compression_type").
//!
//! A stream lies in whole sectors, so a reader has it with whatever follows in the last one: decoding stops
//! after one cluster of output and ignores the rest. Less output is corruption.
//!
//! [`Decoder`] and [`Encoder`] keep their contexts between clusters; [`decode`] and [`encode`] use one of each
//! thread's own.

use std::cell::RefCell;

use libdeflater::Decompressor;
use zlib_rs::{Deflate, DeflateConfig, DeflateFlush, Inflate, InflateFlush, Status};
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, ResetDirective};

use crate::{Compression, Error};

/// Readers inflate with a window of 4 KiB, so nothing may refer further back.
const DEFLATE_WINDOW_BITS: u8 = 12;
/// A reader's window may be larger than the writer's.
const INFLATE_WINDOW_BITS: u8 = 15;
const DEFLATE_LEVEL: i32 = 6;
const ZSTD_LEVEL: i32 = 3;
/// Decodes clusters, reusing its contexts. Memory: some 60 KiB for deflate, less than 256 KiB for zstd, whatever the
/// streams are like.
#[derive(Default)]
pub struct Decoder {
    whole: Option<Decompressor>,
    inflate: Option<Box<Inflate>>,
    zstd: Option<DCtx<'static>>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder; contexts are made when first needed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes one cluster: fills `dst` exactly. `src` is the stream, with or without what follows it in its last sector.
    ///
    /// # Errors
    /// [`Error::Compressed`] where the stream is damaged or decodes to less than `dst`, or a zstd frame to more
    /// (deflate streams are cut, as QEMU does). `dst` is then partly written.
    pub fn decode(
        &mut self,
        compression: Compression,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), Error> {
        match compression {
            Compression::Deflate => self.inflate(src, dst),
            Compression::Zstd => self.decode_zstd(src, dst),
        }
    }

    /// Streams that are one cluster and no more, as all writers make them, by libdeflate; it refuses those that go on, or are cut off once
    /// the cluster is whole, and says too little of damaged ones: all of these are decoded again by zlib.
    fn inflate(&mut self, src: &[u8], dst: &mut [u8]) -> Result<(), Error> {
        let whole = self.whole.get_or_insert_with(Decompressor::new);
        if whole.deflate_decompress(src, dst) == Ok(dst.len()) {
            return Ok(());
        }
        self.inflate_stream(src, dst)
    }

    fn inflate_stream(&mut self, src: &[u8], dst: &mut [u8]) -> Result<(), Error> {
        let inflate = self
            .inflate
            .get_or_insert_with(|| Box::new(Inflate::new(false, INFLATE_WINDOW_BITS)));
        // Also after an error: the state before counts for nothing.
        inflate.reset(false);
        let result = inflate.decompress(src, dst, InflateFlush::Finish);
        let have_bytes = inflate.total_out();
        let fault = |reason| Err(fault(Compression::Deflate, reason, have_bytes, dst));
        match result {
            Err(_) => fault("damaged stream"),
            Ok(_) if have_bytes == dst.len() as u64 => Ok(()),
            Ok(Status::StreamEnd) => fault("the stream ends early"),
            Ok(_) => fault("the stream is cut off"),
        }
    }

    /// Frame after frame, each straight into its place in `dst`. So matches are copied out of `dst` itself, no
    /// window is kept, and what a frame says of its window (with two bytes it can ask for gigabytes) decides
    /// nothing: frames made by `zstd --long` or `--ultra` are as good as any. QEMU takes windows up to 128 MiB.
    fn decode_zstd(&mut self, src: &[u8], dst: &mut [u8]) -> Result<(), Error> {
        let codec = Compression::Zstd;
        if self.zstd.is_none() {
            self.zstd = DCtx::try_create();
        }
        let Some(context) = &mut self.zstd else {
            return Err(fault(codec, "no memory for a decoder", 0, dst));
        };
        let (mut rest, mut done) = (src, 0);
        while done < dst.len() {
            // The decoder would take what follows a frame in its last sector for the next one.
            let Some(frame) = first_frame(rest) else {
                let reason = "the stream is damaged or cut off";
                return Err(fault(codec, reason, done as u64, dst));
            };
            match context.decompress(&mut dst[done..], frame) {
                Ok(bytes) => done += bytes,
                Err(code) => {
                    let reason = zstd_safe::get_error_name(code);
                    return Err(fault(codec, reason, done as u64, dst));
                }
            }
            rest = &rest[frame.len()..];
        }
        Ok(())
    }
}

/// The frame that `src` begins with, where all of it is there. Frames may be empty, or hold no data.
fn first_frame(src: &[u8]) -> Option<&[u8]> {
    let bytes = zstd_safe::find_frame_compressed_size(src).ok()?;
    src.get(..bytes).filter(|frame| !frame.is_empty())
}

fn fault(codec: Compression, reason: &'static str, have_bytes: u64, dst: &[u8]) -> Error {
    Error::Compressed {
        codec,
        reason,
        have_bytes,
        need_bytes: dst.len() as u64,
    }
}

/// Encodes clusters, reusing its contexts.
#[derive(Default)]
pub struct Encoder {
    deflate: Option<Box<Deflate>>,
    zstd: Option<CCtx<'static>>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder; contexts are made when first needed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Encodes one cluster in a way that every reader decodes. `None` where the result would pass
    /// `dst_capacity` bytes or not be smaller than `src`: the cluster is then stored as it is.
    pub fn encode(
        &mut self,
        compression: Compression,
        src: &[u8],
        dst_capacity: usize,
    ) -> Option<Vec<u8>> {
        let capacity = dst_capacity.min(src.len().checked_sub(1)?);
        let mut out = vec![0; capacity];
        let bytes = match compression {
            Compression::Deflate => self.deflate(src, &mut out),
            Compression::Zstd => self.encode_zstd(src, &mut out),
        }?;
        out.truncate(bytes);
        Some(out)
    }

    fn deflate(&mut self, src: &[u8], out: &mut [u8]) -> Option<usize> {
        let deflate = self.deflate.get_or_insert_with(|| {
            Box::new(Deflate::new_with_config(DeflateConfig {
                level: DEFLATE_LEVEL,
                // Negative: raw deflate.
                window_bits: -i32::from(DEFLATE_WINDOW_BITS),
                mem_level: 9,
                ..DeflateConfig::default()
            }))
        });
        deflate.reset();
        match deflate.compress(src, out, DeflateFlush::Finish) {
            Ok(Status::StreamEnd) => usize::try_from(deflate.total_out()).ok(),
            _ => None,
        }
    }

    fn encode_zstd(&mut self, src: &[u8], out: &mut [u8]) -> Option<usize> {
        if self.zstd.is_none() {
            let mut context = CCtx::try_create()?;
            context
                .set_parameter(CParameter::CompressionLevel(ZSTD_LEVEL))
                .ok()?;
            self.zstd = Some(context);
        }
        let context = self.zstd.as_mut()?;
        context.reset(ResetDirective::SessionOnly).ok()?;
        context.compress2(out, src).ok()
    }
}

thread_local! {
    static DECODER: RefCell<Decoder> = RefCell::default();
    static ENCODER: RefCell<Encoder> = RefCell::default();
}

/// [`Decoder::decode`] with a decoder of the calling thread's own.
///
/// # Errors
/// As [`Decoder::decode`].
pub fn decode(compression: Compression, src: &[u8], dst: &mut [u8]) -> Result<(), Error> {
    DECODER.with_borrow_mut(|decoder| decoder.decode(compression, src, dst))
}

/// [`Encoder::encode`] with an encoder of the calling thread's own.
#[must_use]
pub fn encode(compression: Compression, src: &[u8], dst_capacity: usize) -> Option<Vec<u8>> {
    ENCODER.with_borrow_mut(|encoder| encoder.encode(compression, src, dst_capacity))
}

#[cfg(test)]
mod tests {
    //! Guards against two decoders that disagree: whatever a stream is like, the fast one and the one that judges give the same bytes
    //! or none.
    use proptest::prelude::*;

    use super::*;

    fn content(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed | 1;
        (0..bytes)
            .map(|at| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Runs, text and noise.
                match at / 700 % 3 {
                    0 => 7,
                    1 => b"a cluster of text "[at % 18],
                    _ => state.to_le_bytes()[3],
                }
            })
            .collect()
    }

    /// A frame of one block, which repeats a byte 4096 times, with any window descriptor.
    fn frame_with_window(descriptor: u8) -> Vec<u8> {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, descriptor];
        let (last, repeated, bytes) = (1u32, 1 << 1, 4096 << 3);
        frame.extend_from_slice(&(last | repeated | bytes).to_le_bytes()[..3]);
        frame.push(0x5a);
        frame
    }

    /// Guards against a few bytes of an image that make the decoder ask for gigabytes: its memory is the same for
    /// every window that a frame can name.
    #[test]
    fn the_memory_of_zstd_does_not_follow_the_window() {
        let mut decoder = Decoder::new();
        let mut decoded = 0;
        for descriptor in 0..=u8::MAX {
            // Windows of 1 KiB to 3.75 TiB.
            let mut stream = frame_with_window(descriptor);
            stream.resize(512, 0);
            let mut out = vec![0; 4096];
            let result = decoder.decode(Compression::Zstd, &stream, &mut out);
            let bytes = decoder.zstd.as_ref().expect("made by now").sizeof();
            assert!(bytes < 256 << 10, "{bytes} bytes for {descriptor:#x}");
            if result.is_ok() {
                assert!(out.iter().all(|byte| *byte == 0x5a), "{descriptor:#x}");
                decoded += 1;
            }
        }
        // Blocks are no larger than the window, and the format's library ends at 2 GiB.
        assert!(decoded > 19 * 8, "{decoded} of 256 windows");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn the_fast_decoder_agrees(
            seed: u64,
            bytes in prop::sample::select(vec![512usize, 4096, 65_536]),
            asked in prop::sample::select(vec![-1i64, 0, 0, 0, 1]),
            cut in 0usize..40,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            tail in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            let plain = content(seed, bytes);
            let Some(mut stream) = encode(Compression::Deflate, &plain, bytes) else {
                return Ok(());
            };
            stream.truncate(stream.len() - cut.min(stream.len() - 1));
            for (place, value) in changes {
                let place = place.index(stream.len());
                stream[place] = value;
            }
            stream.extend(tail);
            let len = usize::try_from(i64::try_from(bytes).unwrap() + asked).unwrap();
            let (mut fast, mut sure) = (vec![0xee; len], vec![0xee; len]);
            let mut decoder = Decoder::new();
            let quick = decoder.inflate(&stream, &mut fast);
            let judged = decoder.inflate_stream(&stream, &mut sure);
            prop_assert_eq!(quick.is_ok(), judged.is_ok());
            if judged.is_ok() {
                prop_assert!(fast == sure);
            }
        }
    }
}
