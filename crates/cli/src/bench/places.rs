//! Where requests go. `crates/bench-compare` sends its requests to the same places.

/// What there is to choose from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) block_bytes: u64,
    /// Multiple of the block size.
    pub(super) span: u64,
    pub(super) is_random: bool,
    /// Queues that have a part of it each, where requests follow one another.
    pub(super) queues: u16,
}

/// The same for both slices of a pair.
pub(super) struct Places {
    block_bytes: u64,
    blocks: u64,
    is_random: bool,
    /// State of the random numbers, or the next block.
    state: u64,
}

impl Places {
    /// Those of a queue in the pair of slices that has this seed.
    pub(super) fn new(area: Area, queue: u16, seed: u64) -> Self {
        let blocks = area.span / area.block_bytes;
        let mut places = Self {
            block_bytes: area.block_bytes,
            blocks,
            is_random: area.is_random,
            state: seed << 16 | u64::from(queue),
        };
        if !places.is_random {
            // Each queue in a part of its own, each pair from somewhere else.
            let part = blocks / u64::from(area.queues);
            let start = places.draw() % part.max(1);
            places.state = (part * u64::from(queue) + start) % blocks;
        }
        places
    }

    pub(super) fn next(&mut self) -> u64 {
        let block = if self.is_random {
            let draw = self.draw();
            u64::try_from((u128::from(draw) * u128::from(self.blocks)) >> 64)
                .expect("less than the number of blocks")
        } else {
            let block = self.state;
            self.state = (block + 1) % self.blocks;
            block
        };
        block * self.block_bytes
    }

    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    //! Guards the comparison: both sides must be asked for the same places, all of them in the span.
    use super::*;

    #[test]
    fn places_lie_in_the_span_and_repeat() {
        for is_random in [true, false] {
            let area = Area {
                block_bytes: 4096,
                span: 4096 * 100,
                is_random,
                queues: 3,
            };
            for queue in 0..3 {
                let draw = |seed| {
                    let mut places = Places::new(area, queue, seed);
                    (0..1000).map(|_| places.next()).collect::<Vec<_>>()
                };
                assert_eq!(draw(5), draw(5));
                assert_ne!(draw(5), draw(6));
                assert!(draw(5).iter().all(|at| at % 4096 == 0 && *at < 4096 * 100));
                let mut all = draw(5);
                all.sort_unstable();
                all.dedup();
                assert_eq!(all.len(), 100, "every block has its turn");
            }
        }
    }
}
