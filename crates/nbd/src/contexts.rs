//! Metadata contexts: what a client can ask about the extents of an export ("Metadata querying" of the protocol).

use urus::Extent;

use crate::wire::state;

/// A metadata context. Every export has all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Context {
    /// `base:allocation`: holes and zeroes.
    Allocation,
    /// `qemu:allocation-depth`: which layer of the chain an extent is in.
    Depth,
}

impl Context {
    pub(crate) const ALL: [Self; 2] = [Self::Allocation, Self::Depth];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Depth => "qemu:allocation-depth",
        }
    }

    /// Its number in replies. Any will do, but 0, which replies of LIST_META_CONTEXT have for all.
    pub(crate) const fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Depth => 2,
        }
    }

    /// Whether a query of LIST_META_CONTEXT finds it: its name, or its namespace with the colon.
    pub(crate) fn is_listed_by(self, query: &[u8]) -> bool {
        let name = self.name();
        let namespace = name.find(':').map_or(name, |at| &name[..=at]);
        query == name.as_bytes() || query == namespace.as_bytes()
    }

    /// What it says of `extent`, of a device with `layers` layers.
    pub(crate) fn flags(self, extent: &Extent, layers: u32) -> u32 {
        match self {
            Self::Allocation => {
                let mut flags = 0;
                if !extent.data {
                    flags |= state::HOLE;
                }
                if extent.zero {
                    flags |= state::ZERO;
                }
                flags
            }
            Self::Depth if extent.present => extent.depth + 1,
            // Beyond the end of a backing file: the engine names the layer above, QEMU counts these zeroes to the file that is short.
            Self::Depth if extent.depth + 1 < layers => extent.depth + 2,
            Self::Depth => 0,
        }
    }
}

/// A set of metadata contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contexts {
    bits: u8,
}

impl Contexts {
    pub(crate) fn insert(&mut self, context: Context) {
        self.bits |= 1 << context.id();
    }

    pub(crate) fn contains(self, context: Context) -> bool {
        self.bits & 1 << context.id() != 0
    }

    pub(crate) fn is_empty(self) -> bool {
        self.bits == 0
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL
            .into_iter()
            .filter(move |&context| self.contains(context))
    }

    /// The member with that number.
    pub(crate) fn find(self, id: u32) -> Option<Context> {
        self.iter().find(|context| context.id() == id)
    }
}

impl FromIterator<Context> for Contexts {
    fn from_iter<I: IntoIterator<Item = Context>>(contexts: I) -> Self {
        let mut set = Self::default();
        contexts.into_iter().for_each(|context| set.insert(context));
        set
    }
}

#[cfg(test)]
mod tests {
    //! Guards what clients are told of a chain's layers.
    use super::*;

    fn extent(depth: u32, present: bool) -> Extent {
        Extent {
            start: 0,
            len: 1,
            depth,
            present,
            zero: !present,
            data: present,
            compressed: false,
            host: None,
        }
    }

    #[test]
    fn depths_count_from_one_and_nowhere_is_zero() {
        let depth = |depth, present| Context::Depth.flags(&extent(depth, present), 3);
        assert_eq!(depth(0, true), 1);
        assert_eq!(depth(2, true), 3);
        assert_eq!(depth(2, false), 0, "in no layer");
        assert_eq!(
            depth(0, false),
            2,
            "beyond the end of the first backing file"
        );
        assert_eq!(depth(1, false), 3);
        assert_eq!(Context::Depth.flags(&extent(0, false), 1), 0);
    }

    #[test]
    fn sets_know_their_members() {
        let both: Contexts = Context::ALL.into_iter().collect();
        assert_eq!(both.iter().collect::<Vec<_>>(), Context::ALL);
        assert_eq!(both.find(2), Some(Context::Depth));
        assert_eq!(both.find(0), None);
        assert_eq!(both.find(3), None);
        let one: Contexts = [Context::Depth].into_iter().collect();
        assert!(!one.contains(Context::Allocation) && !one.is_empty());
        assert_eq!(one.find(1), None);
        assert!(Contexts::default().is_empty());
    }
}
