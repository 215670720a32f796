//! Refcounts in a refcount block (specification: "Host cluster management").
//!
//! A block is an array of counters of 1 to 64 bits. Counters narrower than a byte fill it from its least
//! significant bit on; wider ones are big-endian.

/// The counter at `index` of a block whose counters have `1 << order` bits.
///
/// # Panics
/// When `order` exceeds 6 or the block has no such counter.
#[must_use]
pub fn get(block: &[u8], index: u64, order: u32) -> u64 {
    match order {
        0..=2 => {
            let (byte, shift) = sub_byte(index, order);
            u64::from(block[byte] >> shift) & (u64::MAX >> (64 - (1u32 << order)))
        }
        3..=6 => {
            let (start, width) = whole_bytes(index, order);
            block[start..start + width]
                .iter()
                .fold(0, |value, &byte| (value << 8) | u64::from(byte))
        }
        _ => panic!("refcount_order {order} exceeds 6"),
    }
}

/// Sets the counter at `index`. The caller has checked `value` against
/// [`Geometry::refcount_max`](crate::Geometry::refcount_max).
///
/// # Panics
/// As [`get`], and when `value` does not fit.
pub fn set(block: &mut [u8], index: u64, order: u32, value: u64) {
    assert!(order <= 6, "refcount_order {order} exceeds 6");
    assert!(
        order == 6 || value >> (1u32 << order) == 0,
        "refcount {value} needs more than {} bits",
        1u32 << order
    );
    let bytes = value.to_be_bytes();
    if order < 3 {
        let (byte, shift) = sub_byte(index, order);
        let mask = (u8::MAX >> (8 - (1u32 << order))) << shift;
        block[byte] = (block[byte] & !mask) | (bytes[7] << shift);
    } else {
        let (start, width) = whole_bytes(index, order);
        block[start..start + width].copy_from_slice(&bytes[8 - width..]);
    }
}

/// Byte and shift of a counter of less than 8 bits.
fn sub_byte(index: u64, order: u32) -> (usize, usize) {
    let per_byte_bits = 3 - order;
    let in_byte = position(index) & ((1 << per_byte_bits) - 1);
    (position(index) >> per_byte_bits, in_byte << order)
}

/// First byte and width in bytes of a counter of 8 bits or more.
fn whole_bytes(index: u64, order: u32) -> (usize, usize) {
    (position(index) << (order - 3), 1 << (order - 3))
}

/// An index as a position. No block has more counters than a 2 MiB cluster has bits.
fn position(index: u64) -> usize {
    assert!(index < 1 << 24, "no refcount block has a counter {index}");
    #[allow(clippy::cast_possible_truncation)] // Just checked.
    let position = index as usize;
    position
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Guards against a wrong bit or byte order, against known bytes.
    #[test]
    fn known_bytes() {
        let mut block = [0; 16];
        for (order, bytes) in [
            (0, &[0b1001_0000][..]),
            (1, &[0, 0b0100_0001]),
            (2, &[0, 0, 1, 0x10]),
            (4, &[0, 0]),
        ] {
            block.fill(0);
            set(&mut block, 4, order, 1);
            set(&mut block, 7, order, 1);
            assert_eq!(&block[..bytes.len()], bytes, "order {order}");
        }
        assert_eq!(block[8..], [0, 1, 0, 0, 0, 0, 0, 1]);
        block.fill(0);
        set(&mut block, 1, 6, 0x0102_0304_0506_0708);
        assert_eq!(block[8..], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(get(&block, 3, 5), 0x0506_0708);
    }

    proptest! {
        /// A block behaves as an array: setting one counter changes that one and no other.
        #[test]
        fn is_an_array(order in 0u32..=6, sets in prop::collection::vec((any::<u64>(), any::<u64>()), 0..64)) {
            let mut block = vec![0; 64];
            let mut model = vec![0; (64 * 8) >> order];
            for (index, value) in sets {
                let index = index % model.len() as u64;
                let value = value & (u64::MAX >> (64 - (1u32 << order)));
                set(&mut block, index, order, value);
                model[usize::try_from(index).unwrap()] = value;
                let read: Vec<u64> = (0..model.len() as u64).map(|index| get(&block, index, order)).collect();
                prop_assert_eq!(&read, &model);
            }
        }
    }
}
