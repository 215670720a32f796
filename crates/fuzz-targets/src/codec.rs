//! The codecs of `urus-format`: whatever the bytes, they answer; and what they accept survives a round trip.

use urus_format::snapshot::TableBytes;
use urus_format::{
    Compression, Error, Geometry, Header, HeaderChange, L1Entry, L2Entry, L2Raw, bitmap,
    compressed, names, refcount, snapshot,
};

use crate::Verdict;
use crate::bases::base;
use crate::input::Input;
use crate::require;

/// The header of a base with patches, or plain bytes: what parses, encodes, and parses again to the same.
///
/// # Errors
/// What is wrong.
pub fn header(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let number = input.u8();
    let file_bytes = match input.u8() % 4 {
        0 => u64::MAX >> 1,
        1 => u64::from(input.u32()),
        _ => 16 << 20,
    };
    let bytes = if number == 0xff {
        input.rest().to_vec()
    } else {
        let base = base(number);
        let image = &base.files[0].contents;
        let cluster_bits = usize::from(image[23]);
        let mut bytes = image[..image.len().min(1 << cluster_bits)].to_vec();
        while !input.is_empty() {
            // Everything of interest lies in the first bytes; now and then the last ones of the cluster.
            let at = usize::from(input.u16());
            let at = if at & 0x8000 != 0 {
                bytes.len().saturating_sub(at & 0x1ff)
            } else {
                at % 1200
            };
            let len = usize::from(input.u8() % 64);
            let patch = input.take(len);
            let at = at.min(bytes.len());
            let end = (at + patch.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&patch[..end - at]);
        }
        bytes
    };
    // What is only shown has no more than what is used, and no less.
    let strict = Header::parse(&bytes, file_bytes);
    match Header::parse_leniently(&bytes, file_bytes) {
        Err(error) => require!(
            strict == Err(error),
            "lenient and strict differ: {strict:?}"
        ),
        Ok((header, faults)) => match faults.into_iter().next() {
            None => require!(strict.as_ref() == Ok(&header), "two headers: {strict:?}"),
            Some(fault) => require!(strict == Err(fault.error), "a fault lost: {strict:?}"),
        },
    }
    let Ok(parsed) = strict else {
        return Ok(());
    };
    let _ = (parsed.check_supported(false), parsed.check_supported(true));
    if let Some(backing) = &parsed.backing {
        let _ = names::judge(&backing.name);
    }
    let cluster = parsed.geometry().cluster_bytes();
    match parsed.encode() {
        Ok(encoded) => {
            require!(
                encoded.len() as u64 == cluster,
                "{} bytes encoded for clusters of {cluster}",
                encoded.len()
            );
            let again = Header::parse(&encoded, file_bytes)
                .map_err(|error| format!("an encoded header does not parse: {error}"))?;
            require!(
                again == parsed,
                "another header: {parsed:?}, then {again:?}"
            );
            require!(
                again.encode().as_ref() == Ok(&encoded),
                "encoding twice gives two results"
            );
            changed(&parsed, &bytes, file_bytes)?;
        }
        // Written by somebody who packed it more tightly.
        Err(Error::NoSpace { .. }) => {}
        Err(error) => return Err(format!("a parsed header does not encode: {error}")),
    }
    Ok(())
}

/// A change of a header on disk: the same header but for the fields that change, and the same bytes but for theirs (O28).
fn changed(header: &Header, bytes: &[u8], file_bytes: u64) -> Verdict {
    let mut after = bytes.to_vec();
    let sector = after.len().min(HeaderChange::SECTOR_BYTES);
    let size = header.size - header.size % 7;
    let changes = [HeaderChange::Size(size)];
    let patched = header
        .patch(&changes, &mut after[..sector])
        .map_err(|error| format!("a smaller size is refused: {error}"))?;
    let again = Header::parse(&after, file_bytes)
        .map_err(|error| format!("a changed header does not parse: {error}"))?;
    require!(
        again == patched,
        "another header: {patched:?}, then {again:?}"
    );
    require!(
        Header {
            size,
            ..header.clone()
        } == patched,
        "more than the size has changed"
    );
    after[24..32].copy_from_slice(&bytes[24..32]);
    require!(after == bytes, "bytes beside the size have changed");
    Ok(())
}

/// L1 and L2 entries and refcounts, in every geometry.
///
/// # Errors
/// What is wrong.
pub fn tables(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let shape = input.u16();
    let cluster_bits = 9 + u32::from(shape & 0xff) % 13;
    let version = 2 + u32::from(shape >> 8 & 1);
    let order = if version == 2 {
        4
    } else {
        u32::from(shape >> 9 & 7) % 7
    };
    let l2_entry_bytes = if shape & 1 << 12 != 0 && version == 3 && cluster_bits >= 14 {
        16
    } else {
        8
    };
    let geometry = Geometry::new(cluster_bits, order, l2_entry_bytes, version);
    let block: Vec<u8> = input.clone().rest().to_vec();
    while !input.is_empty() {
        let raw = input.u64();
        // Round trips lose nothing but COPIED where it means nothing: of a compressed cluster, and of none.
        for raw in [
            raw,
            raw & 0x80ff_ffff_ffff_fe01,
            raw & !((1 << cluster_bits) - 1),
        ] {
            if let Ok(Some(entry)) = L1Entry::decode(raw, &geometry) {
                require!(entry.encode() == raw, "L1 entry {raw:#x}: {entry:?}");
            }
            let entry = L2Raw {
                entry: raw,
                subclusters: 0,
            };
            if let Ok(decoded) = L2Entry::decode(entry, &geometry) {
                let flagless = matches!(
                    decoded,
                    L2Entry::Compressed(_) | L2Entry::Zero | L2Entry::Unallocated
                );
                let mask = if flagless { !(1 << 63) } else { u64::MAX };
                let encoded = decoded.encode(&geometry);
                require!(
                    encoded.entry == raw & mask,
                    "L2 entry {raw:#x}: {decoded:?} encodes as {:#x}",
                    encoded.entry
                );
            }
        }
        let _ = geometry.l1_entries_for(raw);
        let _ = geometry.clusters_for(raw);
    }
    refcounts(block, order)
}

/// A block is an array: each counter is read as it was set, and no other changes.
fn refcounts(mut block: Vec<u8>, order: u32) -> Verdict {
    block.truncate(256);
    block.truncate(block.len() & !7);
    let count = ((block.len() * 8) >> order) as u64;
    let all = |block: &[u8]| -> Vec<u64> {
        (0..count)
            .map(|index| refcount::get(block, index, order))
            .collect()
    };
    let before = all(&block);
    for (index, value) in (0..count).zip(before.iter().rev()).step_by(3) {
        let mut expected = all(&block);
        refcount::set(&mut block, index, order, *value);
        expected[usize::try_from(index).expect("small")] = *value;
        require!(all(&block) == expected, "refcount {index} of order {order}");
    }
    Ok(())
}

/// A compressed cluster: damaged streams, and damaged images of good ones. Both give one cluster or an error, and the
/// decoder keeps nothing from one to the next.
///
/// # Errors
/// What is wrong.
pub fn compressed(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let shape = input.u8();
    let codec = if shape & 1 == 0 {
        Compression::Deflate
    } else {
        Compression::Zstd
    };
    let bytes = 1usize << (9 + u32::from(shape >> 2) % 13);
    let mut stream = Vec::new();
    if shape & 2 == 0 {
        stream.extend_from_slice(input.rest());
    } else {
        // A good stream, then damage.
        let damage = input.u8() % 8;
        let damage: Vec<_> = (0..damage).map(|_| (input.u16(), input.u8())).collect();
        let pattern = input.rest();
        let mut plain = pattern.repeat(bytes.div_ceil(pattern.len().max(1)).min(bytes));
        plain.resize(bytes, 0x5a);
        if let Some(good) = compressed::encode(codec, &plain, bytes) {
            let mut out = vec![0; bytes];
            compressed::decode(codec, &good, &mut out)
                .map_err(|error| format!("an encoded cluster does not decode: {error}"))?;
            require!(out == plain, "an encoded cluster decodes to something else");
            stream = good;
        }
        for (at, value) in damage {
            let len = stream.len().max(1);
            if let Some(byte) = stream.get_mut(usize::from(at) % len) {
                *byte ^= value;
            }
        }
    }
    let mut first = vec![0xee; bytes];
    let result = compressed::decode(codec, &stream, &mut first);
    // What follows in the last sector must not matter to deflate; the context must not matter to anybody.
    let mut second = vec![0xdd; bytes];
    let again = compressed::Decoder::new().decode(codec, &stream, &mut second);
    require!(
        result == again,
        "used and new decoders differ: {result:?}, {again:?}"
    );
    if result.is_ok() {
        require!(first == second, "used and new decoders give other bytes");
        if codec == Compression::Deflate {
            stream.extend_from_slice(&[0xff; 64]);
            // A damaged stream that fills the cluster without an end may go on in what follows, and be refused then.
            let further = compressed::decode(codec, &stream, &mut second);
            let full = matches!(further, Err(Error::Compressed { have_bytes, need_bytes, .. })
                if have_bytes == need_bytes);
            require!(
                further.is_ok() || full,
                "with something behind the stream: {further:?}"
            );
            require!(
                first == second,
                "what follows a stream shows in the cluster"
            );
        }
    }
    Ok(())
}

/// The snapshot table.
///
/// # Errors
/// What is wrong.
pub fn snapshots(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let count = match input.u8() {
        0xff => input.u32(),
        small => u32::from(small % 32),
    };
    let geometry = Geometry::new(9 + u32::from(input.u8()) % 13, 4, 8, 3);
    let bytes = input.rest();
    let parsed = snapshot::parse_table(bytes, count);
    let length = snapshot::table_bytes(bytes, count);
    let parsed = match (parsed, length) {
        (Ok(parsed), Ok(TableBytes::Exactly(length))) => {
            require!(
                length <= bytes.len() as u64,
                "a table of {length} bytes in {}",
                bytes.len()
            );
            parsed
        }
        (Err(Error::Truncated { .. }), Ok(TableBytes::AtLeast(more))) => {
            require!(
                more > bytes.len() as u64,
                "at least {more} bytes of {}",
                bytes.len()
            );
            return Ok(());
        }
        // Past what is there one may see an illegal length before the other sees the end.
        (Err(_), _) => return Ok(()),
        (parsed, length) => return Err(format!("{parsed:?}, but {length:?}")),
    };
    for snapshot in &parsed {
        let _ = snapshot.check_l1(&geometry);
        let _ = (snapshot.id_text(), snapshot.name_text());
    }
    let encoded = snapshot::encode_table(&parsed)
        .map_err(|error| format!("a parsed table does not encode: {error}"))?;
    let again = snapshot::parse_table(&encoded, count);
    require!(again.as_ref() == Ok(&parsed), "another table: {again:?}");
    Ok(())
}

/// The bitmap directory.
///
/// # Errors
/// What is wrong.
pub fn bitmaps(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let count = match input.u8() {
        0xff => input.u32(),
        small => u32::from(small % 32),
    };
    let geometry = Geometry::new(9 + u32::from(input.u8()) % 13, 4, 8, 3);
    let bytes = input.rest();
    let Ok(bitmaps) = bitmap::parse_directory(bytes, count, &geometry) else {
        return Ok(());
    };
    require!(
        bitmaps.len() as u64 == u64::from(count),
        "{} bitmaps of {count}",
        bitmaps.len()
    );
    for bitmap in &bitmaps {
        let _ = bitmap.name_text();
        let legal = (1..=names::MAX_NAME_BYTES).contains(&bitmap.name.len())
            && (bitmap::MIN_GRANULARITY_BITS..=bitmap::MAX_GRANULARITY_BITS)
                .contains(&bitmap.granularity_bits)
            && (1..=bitmap::MAX_TABLE_ENTRIES).contains(&bitmap.table_entries)
            && bitmap.table.0 != 0
            && geometry.in_cluster(bitmap.table.0) == 0
            && i64::try_from(bitmap.table.0 + u64::from(bitmap.table_entries) * 8).is_ok();
        require!(legal, "accepted: {bitmap:?}");
    }
    Ok(())
}
