//! Clusters already decoded, by where their compressed data lies.
//!
//! O19: what lies in a host cluster is forgotten before the cluster is handed out again. An entry is put in by a
//! request that still pins the old mapping (O7), so none can come late.

use std::collections::BTreeMap;

use crate::chain::LayerId;
use crate::seen::{Way, note};
use crate::sync::{Arc, Mutex};

/// Layer, and host offset of the compressed data.
type Key = (LayerId, u64);

#[derive(Default)]
struct Inner {
    /// Time of last use, and the decoded cluster.
    clusters: BTreeMap<Key, (u64, Arc<Vec<u8>>)>,
    /// The same by time of last use.
    ages: BTreeMap<u64, Key>,
    clock: u64,
    bytes: u64,
    hits: u64,
}

/// A least-recently-used cache of decoded clusters.
pub(crate) struct DecodedCache {
    inner: Mutex<Inner>,
    /// Its budget. One cluster is kept whatever it takes.
    most_bytes: u64,
}

impl DecodedCache {
    pub(crate) fn new(most_bytes: u64) -> Self {
        Self {
            inner: Mutex::default(),
            most_bytes,
        }
    }

    pub(crate) fn get(&self, layer: LayerId, offset: u64) -> Option<Arc<Vec<u8>>> {
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let now = inner.clock;
        let (age, data) = inner.clusters.get_mut(&(layer, offset))?;
        let old = std::mem::replace(age, now);
        let data = Arc::clone(data);
        inner.ages.remove(&old);
        inner.ages.insert(now, (layer, offset));
        inner.hits += 1;
        Some(data)
    }

    /// How often something was found.
    pub(crate) fn hits(&self) -> u64 {
        self.inner.lock().hits
    }

    pub(crate) fn insert(&self, layer: LayerId, offset: u64, data: Arc<Vec<u8>>) {
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let now = inner.clock;
        inner.bytes += data.len() as u64;
        if let Some((age, old)) = inner.clusters.insert((layer, offset), (now, data)) {
            inner.ages.remove(&age);
            inner.bytes -= old.len() as u64;
        }
        inner.ages.insert(now, (layer, offset));
        while inner.bytes > self.most_bytes && inner.clusters.len() > 1 {
            let Some((_, key)) = inner.ages.pop_first() else {
                break;
            };
            note(Way::DecodedDropped, || true);
            if let Some((_, old)) = inner.clusters.remove(&key) {
                inner.bytes -= old.len() as u64;
            }
        }
    }

    /// Bytes that are kept, and those that count as kept; the budget; the clusters, and their ages.
    pub(crate) fn kept(&self) -> [u64; 5] {
        let inner = self.inner.lock();
        let lengths = inner.clusters.values().map(|(_, data)| data.len() as u64);
        let clusters = inner.clusters.len() as u64;
        let ages = inner.ages.len() as u64;
        [lengths.sum(), inner.bytes, self.most_bytes, clusters, ages]
    }

    /// Forgets what starts in `[start, end)` of a layer's file.
    pub(crate) fn invalidate(&self, layer: LayerId, start: u64, end: u64) {
        let mut inner = self.inner.lock();
        let keys: Vec<_> = inner
            .clusters
            .range((layer, start)..(layer, end))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            if let Some((age, old)) = inner.clusters.remove(&key) {
                inner.ages.remove(&age);
                inner.bytes -= old.len() as u64;
            }
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        let mut inner = self.inner.lock();
        *inner = Inner {
            hits: inner.hits,
            ..Inner::default()
        };
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    fn cluster() -> Arc<Vec<u8>> {
        Arc::new(vec![0; 512])
    }

    /// Guards against ages that outlive their use: they would pile up for ever, and let a cluster go that was used just now.
    #[test]
    fn what_was_not_used_for_longest_goes_and_leaves_nothing_behind() {
        let cache = DecodedCache::new(4 * 512);
        for offset in 0..4 {
            cache.insert(LayerId(0), offset, cluster());
        }
        for _ in 0..100 {
            assert!(cache.get(LayerId(0), 0).is_some());
            // Decoded by two queues at once.
            cache.insert(LayerId(0), 2, cluster());
        }
        assert_eq!(cache.kept(), [2048, 2048, 2048, 4, 4]);
        cache.insert(LayerId(0), 4, cluster());
        cache.insert(LayerId(1), 0, cluster());
        let left = [(0, 0), (0, 2), (0, 4), (1, 0)];
        let gone = [(0, 1), (0, 3)];
        assert!(
            left.iter()
                .all(|(layer, at)| cache.get(LayerId(*layer), *at).is_some())
        );
        assert!(
            gone.iter()
                .all(|(layer, at)| cache.get(LayerId(*layer), *at).is_none())
        );
        assert_eq!(cache.kept(), [2048, 2048, 2048, 4, 4]);
        // O19: of that layer, all that begins in the range and nothing else.
        cache.invalidate(LayerId(0), 2, 4);
        assert!(cache.get(LayerId(0), 2).is_none() && cache.get(LayerId(0), 4).is_some());
        assert_eq!(cache.kept(), [1536, 1536, 2048, 3, 3]);
        cache.clear();
        assert_eq!(cache.kept(), [0, 0, 2048, 0, 0]);
    }
}
