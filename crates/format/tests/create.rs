//! New images count themselves. Guards against a cluster that a new image uses and does not count, or counts and does not use, for every
//! cluster size and refcount width; QEMU is asked about some of them in `qemu_img.rs`.

use proptest::prelude::*;
use urus_format::create::{CreateOptions, NewImage, layout};
use urus_format::{Compression, Error, Header, compatible, incompatible, refcount};

/// Reads the refcounts of an image from what is written.
fn check(options: &CreateOptions) {
    let image = layout(options).unwrap();
    let NewImage {
        header,
        writes,
        zeroes,
        file_bytes,
    } = &image;
    let geometry = header.geometry();
    let cluster = geometry.cluster_bytes();
    let [table, blocks, cluster0] = &writes[..] else {
        panic!("{} writes", writes.len());
    };
    assert_eq!(cluster0.0, 0);
    assert_eq!(Header::parse(&cluster0.1, *file_bytes).as_ref(), Ok(header));
    assert_eq!(header.size, options.size.next_multiple_of(512));

    // One after the other, without gaps: header, table, blocks, L1 table.
    let len = |bytes: &[u8]| bytes.len() as u64;
    assert_eq!(table.0, cluster);
    assert_eq!(header.refcount_table.0, cluster);
    let table_clusters = u64::from(header.refcount_table_clusters);
    assert_eq!(len(&table.1), table_clusters * cluster);
    assert_eq!(blocks.0, table.0 + len(&table.1));
    let l1 = blocks.0 + len(&blocks.1);
    let entries = header.size.div_ceil(cluster * cluster / 8);
    assert_eq!(u64::from(header.l1_entries), entries);
    assert_eq!(header.l1_table.0, if entries == 0 { 0 } else { l1 });
    assert_eq!(*zeroes, (header.l1_table.0, entries * 8));
    assert_eq!(*file_bytes, l1 + entries * 8);

    // The table names the blocks in order, and nothing else.
    let count = len(&blocks.1) / cluster;
    let named = table.1.chunks(8).map(|entry| {
        let entry: [u8; 8] = entry.try_into().unwrap();
        u64::from_be_bytes(entry)
    });
    let used: Vec<u64> = named.clone().take_while(|&entry| entry != 0).collect();
    let expected: Vec<u64> = (0..count).map(|block| blocks.0 + block * cluster).collect();
    assert_eq!(used, expected);
    assert!(named.skip(used.len()).all(|entry| entry == 0));

    // One reference to each cluster of the file, none to any other; no block or cluster of the table more than it takes.
    let (order, width) = (options.refcount_order, 1u64 << options.refcount_order);
    let per_block = cluster * 8 / width;
    let clusters = file_bytes.div_ceil(cluster);
    for (number, block) in (0..).zip(blocks.1.chunks(usize::try_from(cluster).unwrap())) {
        for index in 0..per_block {
            let expected = u64::from(number * per_block + index < clusters);
            assert_eq!(refcount::get(block, index, order), expected, "{options:?}");
        }
    }
    assert_eq!(count, clusters.div_ceil(per_block), "{options:?}");
    assert_eq!(table_clusters, (count * 8).div_ceil(cluster));
}

#[test]
fn the_largest_images_count_themselves() {
    // 32 MiB of L1 table in clusters of 512 bytes: 1024 blocks of 64-bit refcounts, and a table of many clusters.
    for (cluster_bits, refcount_order) in [(9, 6), (9, 0), (12, 6), (21, 0)] {
        let largest = (4u64 << 20) << (2 * cluster_bits - 3);
        let options = CreateOptions {
            cluster_bits,
            refcount_order,
            ..CreateOptions::new(largest)
        };
        check(&options);
        let size = largest + 1;
        let fault = layout(&CreateOptions { size, ..options });
        assert_eq!(
            fault.unwrap_err(),
            Error::Invalid {
                field: "size",
                value: size,
                expected: format!(
                    "at most {largest} with clusters of {} bytes",
                    1 << cluster_bits
                )
            }
        );
    }
}

#[test]
fn options_become_features() {
    for version in [2, 3] {
        for cluster_bits in [12, 13] {
            let header = layout(&CreateOptions {
                version,
                cluster_bits,
                ..CreateOptions::new(0)
            })
            .unwrap()
            .header;
            assert_eq!(header.header_bytes, if version == 2 { 72 } else { 112 });
            let named = version == 3 && cluster_bits == 13;
            assert_eq!(header.feature_names.len(), if named { 8 } else { 0 });
            let bits = [header.incompatible, header.compatible, header.autoclear];
            assert_eq!(bits, [0; 3]);
        }
    }
    let header = layout(&CreateOptions {
        lazy_refcounts: true,
        compression: Compression::Zstd,
        ..CreateOptions::new(0)
    })
    .unwrap()
    .header;
    assert_eq!(header.compatible, compatible::LAZY_REFCOUNTS);
    assert_eq!(header.incompatible, incompatible::COMPRESSION);
}

proptest! {
    #[test]
    fn new_images_count_themselves(cluster_bits in 9u32..=16, refcount_order in 0u32..=6, size in 0u64..1 << 34) {
        // An L1 table of at most a MiB, to be quick.
        let size = size.min((1 << 17) << (2 * cluster_bits - 3));
        check(&CreateOptions { cluster_bits, refcount_order, ..CreateOptions::new(size) });
    }
}
