//! Which frames of a layer's map are taken, dirty or being written: the bookkeeping behind the `meta` lock.

use std::collections::BTreeMap;

use crate::map::{Map, SliceId};
use crate::planted::{self, Bug};
use crate::seen::{Way, note};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    dirty: bool,
    /// Part of a sealed commit whose writes are not all seen (O19: it stays findable until then).
    committing: bool,
}

/// A slice being read from disk by some queue.
#[derive(Debug, Default)]
struct Load {
    loaders: u32,
    /// The youngest ticket at the time the slice was last installed: data read under an older ticket may be stale.
    installed_at: u64,
}

/// Replacement and write-back state of one layer's frames.
#[derive(Default)]
pub(crate) struct Frames {
    states: Vec<State>,
    free: Vec<u32>,
    hand: usize,
    max: usize,
    /// Dirty or being written at most, whatever there is room for.
    most_dirty: usize,
    /// Frames that are dirty or being written.
    busy: usize,
    dirty: BTreeMap<SliceId, u32>,
    loads: BTreeMap<SliceId, Load>,
    next_ticket: u64,
    evicted: u64,
}

/// Every frame is dirty or being written: a commit has to end first.
#[derive(Debug)]
pub(crate) struct NoCleanFrame;

/// What became of a finished read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Install {
    /// The slice is cached now.
    Cached,
    /// Somebody else cached it meanwhile, and it may have changed since: the data read is not used.
    Superseded,
}

impl Frames {
    /// At most `max` frames; at most `most_dirty` of them, and three quarters, change before a commit.
    pub(crate) fn new(max: usize, most_dirty: usize) -> Self {
        Self {
            max,
            most_dirty,
            ..Self::default()
        }
    }

    #[cfg(test)]
    fn dirty_count(&self) -> usize {
        self.dirty.len()
    }

    /// Slices that made room for others.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Whether a change of this slice may make another frame busy. A quarter stays for clean slices, so that what is on
    /// disk can be read also while no commit succeeds (a full disk).
    pub(crate) fn may_dirty(&self, slice: SliceId) -> bool {
        self.dirty.contains_key(&slice) || self.busy < self.most_busy()
    }

    /// Whether enough slices are dirty that a commit is worth its barriers.
    pub(crate) fn wants_commit(&self) -> bool {
        self.dirty.len() >= (self.max / 2).min(self.most_dirty / 2)
    }

    fn most_busy(&self) -> usize {
        (self.max - self.max / 4).min(self.most_dirty)
    }

    fn take_frame(&mut self, map: &Map) -> Result<u32, NoCleanFrame> {
        if let Some(frame) = self.free.pop() {
            return Ok(frame);
        }
        if self.states.len() < self.max {
            self.states.push(State::default());
            return Ok(u32::try_from(self.states.len() - 1).expect("the frame budget fits 32 bits"));
        }
        // Second chance: two rounds see every mark cleared once.
        for _ in 0..self.states.len() * 2 {
            let frame = self.hand;
            self.hand = (self.hand + 1) % self.states.len();
            let state = self.states[frame];
            if state.dirty || state.committing && !planted::is(Bug::EvictTooEarly) {
                continue;
            }
            let number = u32::try_from(frame).expect("the frame budget fits 32 bits");
            if map.take_used(number) {
                continue;
            }
            note(Way::EvictedBesideDirty, || {
                let tables = self.dirty.keys().map(|slice| map.table_of(*slice));
                map.owner_of(number).is_some_and(|slice| {
                    tables.into_iter().any(|table| table == map.table_of(slice))
                })
            });
            map.release(number);
            self.evicted += 1;
            return Ok(number);
        }
        Err(NoCleanFrame)
    }

    /// Announces a read of a slice from disk. Ended by [`end_load`](Self::end_load).
    pub(crate) fn begin_load(&mut self, slice: SliceId) -> u64 {
        self.next_ticket += 1;
        self.loads.entry(slice).or_default().loaders += 1;
        self.next_ticket
    }

    /// Ends a read: installs what was read (`None`: it failed), unless the slice was installed since the read
    /// began. Where it was not, nobody can have changed or written it, so what was read is current (O19).
    pub(crate) fn end_load(
        &mut self,
        map: &Map,
        slice: SliceId,
        ticket: u64,
        words: Option<&[u64]>,
    ) -> Result<Install, NoCleanFrame> {
        let load = self.loads.get_mut(&slice).expect("begin_load was called");
        let current = load.installed_at < ticket;
        load.loaders -= 1;
        if load.loaders == 0 {
            self.loads.remove(&slice);
        }
        let Some(words) = words else {
            return Ok(Install::Superseded);
        };
        if !current && !planted::is(Bug::StaleLoad) || map.frame_of(slice).is_some() {
            return Ok(Install::Superseded);
        }
        self.install(map, slice, words)?;
        Ok(Install::Cached)
    }

    /// Puts a slice into the cache.
    pub(crate) fn install(
        &mut self,
        map: &Map,
        slice: SliceId,
        words: &[u64],
    ) -> Result<u32, NoCleanFrame> {
        let frame = self.take_frame(map)?;
        self.states[frame as usize] = State::default();
        map.install(frame, slice, words);
        if let Some(load) = self.loads.get_mut(&slice) {
            load.installed_at = self.next_ticket;
        }
        Ok(frame)
    }

    /// The slice's frame has changed and must be written.
    pub(crate) fn mark_dirty(&mut self, slice: SliceId, frame: u32) {
        let state = &mut self.states[frame as usize];
        self.busy += usize::from(!state.dirty && !state.committing);
        state.dirty = true;
        self.dirty.insert(slice, frame);
    }

    /// Whether what the map says of a slice is durable: nothing of it waits for a commit or is being written by one.
    pub(crate) fn is_settled(&self, map: &Map, slice: SliceId) -> bool {
        map.frame_of(slice).is_none_or(|frame| {
            let state = self.states[frame as usize];
            !state.dirty && !state.committing
        })
    }

    /// Takes every dirty slice into a commit.
    pub(crate) fn seal(&mut self) -> BTreeMap<SliceId, u32> {
        let sealed = std::mem::take(&mut self.dirty);
        for frame in sealed.values() {
            self.states[*frame as usize] = State {
                dirty: false,
                committing: true,
            };
        }
        sealed
    }

    /// The commit's writes were all seen, and it was durable or not.
    pub(crate) fn unseal(&mut self, sealed: &BTreeMap<SliceId, u32>, durable: bool) {
        for (slice, frame) in sealed {
            let state = &mut self.states[*frame as usize];
            state.committing = false;
            self.busy -= usize::from(!state.dirty);
            if !durable {
                self.mark_dirty(*slice, *frame);
            }
        }
    }

    /// Frames in use, and the bound. The bookkeeping is looked over: what is wrong with it.
    pub(crate) fn looked_over(&self, map: &Map) -> Result<(usize, usize), String> {
        let busy = self.states.iter().filter(|s| s.dirty || s.committing);
        let dirty = |(slice, frame): (&SliceId, &u32)| {
            self.states[*frame as usize].dirty && map.owner_of(*frame) == Some(*slice)
        };
        if busy.count() != self.busy {
            return Err(format!("{} frames count as busy", self.busy));
        }
        if !self.dirty.iter().all(dirty) {
            return Err("a dirty slice is not in its frame".to_owned());
        }
        Ok((self.states.len(), self.max))
    }

    /// Forgets every clean slice (the file may have changed while the device was paused).
    pub(crate) fn forget_clean(&mut self, map: &Map) {
        self.free.clear();
        for (index, state) in self.states.iter().enumerate() {
            if !state.dirty && !state.committing {
                let frame = u32::try_from(index).expect("the frame budget fits 32 bits");
                map.release(frame);
                self.free.push(frame);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! Guards against a cache that lets go of what is not on disk yet, or takes an old read for the present.

    use urus_format::{Geometry, GuestCluster};

    use super::*;
    use crate::map::Lookup;

    /// Clusters of 512 bytes: each slice is a whole table of 64 entries.
    fn map() -> Map {
        let map = Map::new(
            Geometry::new(9, 4, 8, 3),
            (64, 64),
            8,
            &crate::limits::Sizes::default(),
        );
        (0..64).for_each(|table| map.set_l1(table, (table + 1) << 9));
        map
    }

    fn install(frames: &mut Frames, map: &Map, slice: u64) -> Option<u32> {
        frames.install(map, SliceId(slice), &[slice; 64]).ok()
    }

    /// The first entry of a slice, where it is cached.
    fn entry(map: &Map, slice: u64) -> Option<u64> {
        match map.lookup(GuestCluster(slice * 64)) {
            Lookup::Entry(raw) => Some(raw.entry),
            _ => None,
        }
    }

    #[test]
    fn a_quarter_stays_clean() {
        let (map, mut frames) = (map(), Frames::new(8, 64));
        for slice in 0..8 {
            assert_eq!(install(&mut frames, &map, slice), u32::try_from(slice).ok());
        }
        for slice in 0..6u32 {
            assert!(frames.may_dirty(SliceId(slice.into())));
            frames.mark_dirty(SliceId(slice.into()), slice);
        }
        assert_eq!(frames.dirty_count(), 6);
        assert!(!frames.may_dirty(SliceId(7)));
        assert!(frames.may_dirty(SliceId(5)), "it is dirty already");
        // What a commit is writing counts until that is seen.
        let sealed = frames.seal();
        assert_eq!((sealed.len(), frames.dirty_count()), (6, 0));
        assert!(!frames.may_dirty(SliceId(5)));
        frames.mark_dirty(SliceId(0), 0);
        frames.unseal(&sealed, true);
        assert_eq!(frames.dirty_count(), 1, "changed since it was sealed");
        for slice in 1..6 {
            assert!(frames.may_dirty(SliceId(slice.into())));
            frames.mark_dirty(SliceId(slice.into()), slice);
        }
        assert!(!frames.may_dirty(SliceId(7)), "six again");
        // Nothing of a commit that failed is forgotten.
        let sealed = frames.seal();
        frames.unseal(&sealed, false);
        assert_eq!(frames.seal(), sealed);
        frames.unseal(&sealed, true);
        assert!(frames.may_dirty(SliceId(7)));
        assert_eq!(frames.dirty_count(), 0);
    }

    #[test]
    fn only_clean_frames_change_hands() {
        let (map, mut frames) = (map(), Frames::new(2, 64));
        assert!(frames.is_settled(&map, SliceId(0)), "it is on disk alone");
        install(&mut frames, &map, 0);
        install(&mut frames, &map, 1);
        assert!(frames.is_settled(&map, SliceId(0)));
        frames.mark_dirty(SliceId(0), 0);
        assert!(!frames.is_settled(&map, SliceId(0)));
        assert_eq!(install(&mut frames, &map, 2), Some(1));
        assert_eq!((entry(&map, 1), entry(&map, 2)), (None, Some(2)));
        let sealed = frames.seal();
        assert!(!frames.is_settled(&map, SliceId(0)));
        frames.mark_dirty(SliceId(2), 1);
        assert_eq!(install(&mut frames, &map, 3), None);
        assert_eq!((entry(&map, 0), entry(&map, 2)), (Some(0), Some(2)));
        frames.unseal(&sealed, true);
        assert!(frames.is_settled(&map, SliceId(0)));
        assert_eq!(install(&mut frames, &map, 3), Some(0));
        assert_eq!((entry(&map, 0), entry(&map, 3)), (None, Some(3)));
    }

    /// Of two clean frames the one goes that was not looked up since the last round.
    #[test]
    fn what_is_used_gets_a_second_chance() {
        for used in 0..2 {
            let (map, mut frames) = (map(), Frames::new(2, 64));
            install(&mut frames, &map, 0);
            install(&mut frames, &map, 1);
            assert!(map.take_used(0) && map.take_used(1));
            assert_eq!(entry(&map, used), Some(used));
            install(&mut frames, &map, 2);
            assert_eq!(entry(&map, used), Some(used));
            assert_eq!(entry(&map, 1 - used), None);
        }
    }

    /// However many frames are dirty, and all of them used: the last clean one is found.
    #[test]
    fn a_clean_frame_behind_dirty_ones_is_found() {
        let (map, mut frames) = (map(), Frames::new(8, 64));
        (0..8).for_each(|slice| assert!(install(&mut frames, &map, slice).is_some()));
        for frame in 0..7 {
            frames.mark_dirty(SliceId(frame.into()), frame);
        }
        assert_eq!(install(&mut frames, &map, 8), Some(7));
        assert_eq!((entry(&map, 7), entry(&map, 8)), (None, Some(8)));
    }

    #[test]
    fn an_old_read_is_not_used() {
        let (map, mut frames) = (map(), Frames::new(2, 64));
        let end = |frames: &mut Frames, ticket, words: Option<&[u64]>| {
            frames.end_load(&map, SliceId(0), ticket, words)
        };
        let old: &[u64] = &[100; 64];
        let (first, second) = (frames.begin_load(SliceId(0)), frames.begin_load(SliceId(0)));
        assert_eq!(
            end(&mut frames, second, None).ok(),
            Some(Install::Superseded)
        );
        assert_eq!(entry(&map, 0), None, "that read failed");
        // Somebody installs the slice, and its frame changes hands again, while the read is under way.
        install(&mut frames, &map, 0);
        assert!(map.take_used(0));
        install(&mut frames, &map, 1);
        install(&mut frames, &map, 2);
        assert_eq!(entry(&map, 0), None);
        assert_eq!(
            end(&mut frames, first, Some(old)).ok(),
            Some(Install::Superseded)
        );
        assert_eq!(entry(&map, 0), None);
        // One that begins afterwards is as good as any.
        let third = frames.begin_load(SliceId(0));
        let fourth = frames.begin_load(SliceId(0));
        assert_eq!(
            end(&mut frames, third, Some(&[3; 64])).ok(),
            Some(Install::Cached)
        );
        assert_eq!(
            end(&mut frames, fourth, Some(old)).ok(),
            Some(Install::Superseded)
        );
        assert_eq!(entry(&map, 0), Some(3));
        // The read that began last before somebody installs the slice is an old one, too.
        let (map, mut frames) = (self::map(), Frames::new(2, 64));
        let only = frames.begin_load(SliceId(0));
        (0..3).for_each(|slice| assert!(install(&mut frames, &map, slice).is_some()));
        assert_eq!(entry(&map, 0), None);
        assert_eq!(
            frames.end_load(&map, SliceId(0), only, Some(old)).ok(),
            Some(Install::Superseded)
        );
        assert_eq!(entry(&map, 0), None);
    }

    #[test]
    fn only_clean_slices_are_forgotten() {
        let (map, mut frames) = (map(), Frames::new(4, 64));
        (0..4).for_each(|slice| assert!(install(&mut frames, &map, slice).is_some()));
        frames.mark_dirty(SliceId(1), 1);
        frames.mark_dirty(SliceId(2), 2);
        let sealed = frames.seal();
        frames.unseal(&BTreeMap::from([(SliceId(2), 2)]), true);
        frames.mark_dirty(SliceId(2), 2);
        // 1 is being written, 2 is dirty.
        frames.forget_clean(&map);
        let cached: Vec<_> = (0..4).map(|slice| entry(&map, slice)).collect();
        assert_eq!(cached, [None, Some(1), Some(2), None]);
        let two = [install(&mut frames, &map, 5), install(&mut frames, &map, 6)];
        assert!(two == [Some(0), Some(3)] || two == [Some(3), Some(0)]);
        frames.unseal(&BTreeMap::from([(SliceId(1), sealed[&SliceId(1)])]), true);
        assert_eq!(entry(&map, 1), Some(1));
    }
}
