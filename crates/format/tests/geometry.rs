//! Sizes and places, reckoned once more by multiplication and division. Guards against a shift that is off by one: each of these numbers
//! decides where something is read or written.

use std::panic::catch_unwind;

use proptest::prelude::*;
use urus_format::{ClusterIndex, Geometry, GuestCluster, GuestOffset, HostOffset};

/// Bytes of an entry and version, as they go together.
const KINDS: [(u32, u32); 3] = [(8, 2), (8, 3), (16, 3)];

#[test]
fn sizes_follow_from_the_header() {
    for bits in 9..=21 {
        for order in 0..=6 {
            for (entry, version) in KINDS {
                let geometry = Geometry::new(bits, order, entry, version);
                let (cluster, width) = (2u64.pow(bits), 2u32.pow(order));
                assert_eq!(geometry.cluster_bits(), bits);
                assert_eq!(geometry.cluster_bytes(), cluster);
                assert_eq!(geometry.refcount_order(), order);
                let most = 2u128.pow(width) - 1;
                assert_eq!(u128::from(geometry.refcount_max()), most);
                let per_block = cluster * 8 / u64::from(width);
                assert_eq!(2u64.pow(geometry.refcount_block_bits()), per_block);
                assert_eq!(geometry.l2_entry_bytes(), u64::from(entry));
                assert_eq!(geometry.has_zero_flag(), version == 3 && entry == 8);
                let entries = cluster / u64::from(entry);
                assert_eq!(geometry.l2_entries(), entries);
                assert_eq!(2u64.pow(geometry.l2_bits()), entries);
                assert_eq!(geometry.l2_coverage_bytes(), entries * cluster);
                for (count, one) in [
                    (Geometry::clusters_for as fn(&Geometry, u64) -> u64, cluster),
                    (Geometry::l1_entries_for, entries * cluster),
                ] {
                    let counts = [0, 1, one, one + 1, 3 * one].map(|bytes| count(&geometry, bytes));
                    assert_eq!(counts, [0, 1, 1, 2, 3]);
                }
            }
        }
    }
}

#[test]
fn parts_out_of_range_are_no_geometry() {
    for (bits, order, entry, version) in [
        (8, 4, 8, 3),
        (22, 4, 8, 3),
        (16, 7, 8, 3),
        (16, 4, 4, 3),
        (16, 4, 32, 3),
        (16, 4, 8, 1),
        (16, 4, 8, 4),
    ] {
        assert!(
            catch_unwind(|| Geometry::new(bits, order, entry, version)).is_err(),
            "{bits} {order} {entry} {version}"
        );
    }
}

#[test]
fn places_are_shown() {
    assert_eq!(GuestOffset(0x5_0000).to_string(), "0x50000");
    assert_eq!(HostOffset(10).to_string(), "0xa");
    assert_eq!(GuestCluster(10).to_string(), "10");
    assert_eq!(ClusterIndex(17).to_string(), "17");
}

proptest! {
    #[test]
    fn places_follow_from_offsets(offset: u64, bits in 9u32..=21, kind in 0usize..3) {
        let (entry, version) = KINDS[kind];
        let geometry = Geometry::new(bits, 4, entry, version);
        let cluster = 2u64.pow(bits);
        let (index, start) = (offset / cluster, offset / cluster * cluster);
        prop_assert_eq!(geometry.in_cluster(offset), offset % cluster);
        prop_assert_eq!(geometry.guest_cluster(GuestOffset(offset)), GuestCluster(index));
        prop_assert_eq!(geometry.guest_offset(GuestCluster(index)), GuestOffset(start));
        prop_assert_eq!(geometry.host_cluster(HostOffset(offset)), ClusterIndex(index));
        prop_assert_eq!(geometry.host_offset(ClusterIndex(index)), HostOffset(start));
        let entries = cluster / u64::from(entry);
        prop_assert_eq!(geometry.l1_index(GuestCluster(index)), index / entries);
        prop_assert_eq!(geometry.l2_index(GuestCluster(index)), index % entries);
    }
}
