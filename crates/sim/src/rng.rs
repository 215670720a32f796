//! The one source of chance: a seed gives one run, on every machine and with every compiler.

/// xoshiro256**, seeded through splitmix64.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

/// Spreads the bits of a number (splitmix64's output function).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// A generator for a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut at = seed;
        let mut next = || {
            at = at.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(at)
        };
        Self {
            state: [next(), next(), next(), next()],
        }
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound != 0, "no number is below 0");
        // The bias is 2^-64 × bound: of no matter here.
        #[allow(clippy::cast_possible_truncation)]
        let high = ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64;
        high
    }

    /// An index below `len`, which must not be 0.
    pub fn index(&mut self, len: usize) -> usize {
        #[allow(clippy::cast_possible_truncation)]
        let index = self.below(len as u64) as usize;
        index
    }

    /// True `part` times in 256.
    pub fn chance(&mut self, part: u32) -> bool {
        self.below(256) < u64::from(part)
    }

    /// A generator of its own for one part of a run, so that what one part draws does not shift the others.
    #[must_use]
    pub fn fork(&mut self, label: u64) -> Self {
        Self::new(self.next_u64() ^ mix(label))
    }
}

/// FNV-1a over 64-bit words: names a run, so that two runs of one seed can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceHash(u64);

impl Default for TraceHash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl TraceHash {
    /// Adds a number.
    pub fn add(&mut self, value: u64) {
        // A plain FNV step moves information only upwards; the rotation brings it down again.
        self.0 = (self.0 ^ value)
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(29);
    }

    /// Adds bytes.
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        self.add(bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word));
        }
    }

    /// The hash of everything added so far.
    #[must_use]
    pub fn value(self) -> u64 {
        mix(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_sequence() {
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            [
                rng.next_u64(),
                rng.below(10),
                rng.fork(1).next_u64(),
                rng.next_u64(),
            ]
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn below_reaches_every_number() {
        let mut rng = Rng::new(3);
        let mut seen = [0; 7];
        for _ in 0..7000 {
            seen[rng.index(7)] += 1;
        }
        assert!(
            seen.iter().all(|count| (800..1200).contains(count)),
            "{seen:?}"
        );
    }
}
