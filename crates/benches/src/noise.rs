//! Places and bytes that look random, and are the same in each run.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Noise(u64);

impl Noise {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    #[inline]
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Places on a disk.
#[derive(Clone, Debug)]
pub struct Places {
    noise: Noise,
    mask: u64,
}

impl Places {
    /// Anywhere on a disk of `size` bytes, a power of two.
    ///
    /// # Panics
    /// Where it is none.
    #[must_use]
    pub fn new(seed: u64, size: u64) -> Self {
        assert!(size.is_power_of_two(), "a power of two");
        Self {
            noise: Noise::new(seed),
            mask: size - 1,
        }
    }

    /// The next place.
    #[inline]
    pub fn next_place(&mut self) -> u64 {
        self.noise.draw() & self.mask
    }
}

/// Of each 512 bytes one half noise, the other text, so that compressors have work and success.
#[must_use]
pub fn half_noise(len: usize) -> Vec<u8> {
    let mut noise = Noise::new(1);
    let mut bytes = Vec::with_capacity(len + 512);
    while bytes.len() < len {
        for _ in 0..32 {
            bytes.extend(noise.draw().to_le_bytes());
        }
        bytes.extend(b"content of a disk ".iter().cycle().take(256));
    }
    bytes.truncate(len);
    bytes
}
