//! A cipher that hides nothing and shows every mistake: bytes that pass it too often, not at all or at the wrong place are wrong.

use urus_engine::file::hooks::Transform;

/// Each sector of the file has a key of its own.
#[derive(Clone, Copy, Debug)]
pub struct Xor;

const SECTOR: u64 = 512;

impl Xor {
    /// Changes bytes that lie at `offset` of the file, or changes them back.
    ///
    /// # Panics
    /// When they are not whole sectors: a cipher could do nothing with them.
    pub fn apply(offset: u64, bytes: &mut [u8]) {
        assert!(
            offset.is_multiple_of(SECTOR) && (bytes.len() as u64).is_multiple_of(SECTOR),
            "{} bytes at {offset:#x} are no sectors",
            bytes.len()
        );
        let first = offset / SECTOR;
        for (number, sector) in (first..).zip(bytes.chunks_mut(512)) {
            // Never zero.
            let key = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).to_le_bytes()[0] | 1;
            sector.iter_mut().for_each(|byte| *byte ^= key);
        }
    }
}

impl Transform for Xor {
    fn before_write(&self, offset: u64, bytes: &mut [u8]) {
        Self::apply(offset, bytes);
    }

    fn after_read(&self, offset: u64, bytes: &mut [u8]) {
        Self::apply(offset, bytes);
    }
}
