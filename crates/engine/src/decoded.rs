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

    /// Bytes that are kept, and those that count as kept; the budget, and the clusters.
    pub(crate) fn kept(&self) -> [u64; 4] {
        let inner = self.inner.lock();
        let lengths = inner.clusters.values().map(|(_, data)| data.len() as u64);
        let clusters = inner.clusters.len() as u64;
        [lengths.sum(), inner.bytes, self.most_bytes, clusters]
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
