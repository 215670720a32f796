//! A set of cluster numbers, kept as ranges.

use std::collections::BTreeMap;

/// A set of numbers as disjoint, non-adjacent ranges: start → end (exclusive).
#[derive(Debug, Default)]
pub(crate) struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds `[start, start + count)`.
    pub(crate) fn insert(&mut self, start: u64, count: u64) {
        if count == 0 {
            return;
        }
        let (mut first, mut end) = (start, start + count);
        if let Some((before, before_end)) =
            self.0.range(..=start).next_back().map(|(a, b)| (*a, *b))
            && before_end >= start
        {
            first = before;
            end = end.max(before_end);
        }
        while let Some((next, next_end)) = self.0.range(first..=end).next().map(|(a, b)| (*a, *b)) {
            self.0.remove(&next);
            end = end.max(next_end);
        }
        self.0.insert(first, end);
    }

    /// Takes `[start, start + count)` out.
    pub(crate) fn remove(&mut self, start: u64, count: u64) {
        let end = start + count;
        if let Some((before, before_end)) = self.0.range(..start).next_back().map(|(a, b)| (*a, *b))
            && before_end > start
        {
            self.0.insert(before, start);
            if before_end > end {
                self.0.insert(end, before_end);
            }
        }
        while let Some((next, next_end)) = self.0.range(start..end).next().map(|(a, b)| (*a, *b)) {
            self.0.remove(&next);
            if next_end > end {
                self.0.insert(end, next_end);
            }
        }
    }

    /// Whether a number is in the set.
    pub(crate) fn contains(&self, value: u64) -> bool {
        self.0
            .range(..=value)
            .next_back()
            .is_some_and(|(_, end)| *end > value)
    }
}

#[cfg(test)]
mod tests {
    use super::RangeSet;
    use std::collections::BTreeSet;

    /// Guards against ranges that are merged or split wrongly: compared with a plain set.
    #[test]
    fn behaves_like_a_set() {
        let mut state = 7u64;
        let mut random = move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        let mut ranges = RangeSet::default();
        let mut plain = BTreeSet::new();
        for _ in 0..5000 {
            let (start, count) = (random(100), random(12));
            if random(2) == 0 {
                ranges.insert(start, count);
                plain.extend(start..start + count);
            } else {
                ranges.remove(start, count);
                plain.retain(|value| !(start..start + count).contains(value));
            }
            for value in 0..115 {
                assert_eq!(
                    ranges.contains(value),
                    plain.contains(&value),
                    "{value} after [{start}, +{count})"
                );
            }
        }
    }
}
