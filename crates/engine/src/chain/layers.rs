//! The chain: an immutable list of layers.

use crate::chain::skips::Skips;
use crate::chain::{Layer, LayerId};
use crate::sync::Arc;

/// Layers one above the other: what one says nothing of, the next one below it tells.
pub(crate) struct Chain {
    /// What the guest sees first. (Apart, as a hit needs no other.)
    top: Arc<Layer>,
    /// The topmost first.
    below: Box<[Arc<Layer>]>,
    /// Where it is long.
    pub(super) skips: Option<Skips>,
}

impl Chain {
    /// Of these layers, `below` from above; at most `skips` parts of the disk are remembered.
    pub(crate) fn new(top: Arc<Layer>, below: Vec<Arc<Layer>>, skips: u64) -> Self {
        Self {
            skips: Skips::of(&top, &below, skips),
            top,
            below: below.into(),
        }
    }

    /// What the guest sees first.
    #[inline]
    pub(crate) fn top(&self) -> &Layer {
        &self.top
    }

    /// What shows where the top has nothing, the topmost first.
    pub(super) fn below(&self) -> &[Arc<Layer>] {
        &self.below
    }

    /// All of them, the topmost first.
    pub(crate) fn layers(&self) -> impl Iterator<Item = &Layer> {
        let below = self.below.iter().map(|layer| &**layer);
        std::iter::once(&*self.top).chain(below)
    }

    /// How many.
    pub(crate) fn depth(&self) -> usize {
        1 + self.below.len()
    }

    /// The layer below this one; none below the last, or one that is not of this chain.
    pub(crate) fn beneath(&self, layer: LayerId) -> Option<&Layer> {
        self.layers().skip_while(|other| other.id != layer).nth(1)
    }
}
