//! How the ranges of a disk are stored, by the files of its chain alone: what a block status must say. Sector by sector, through the naive
//! checker's reader, so that it shares no arithmetic with the engine.

use urus_engine::request::Extent;

use crate::checker::{GuestReader, State};
use crate::contents::{Contents, SECTOR, index};

/// The files of a chain, the image first, as they were at one moment.
#[derive(Clone, Debug)]
pub struct Chain {
    layers: Vec<(Contents, bool)>,
}

enum Layer<'a> {
    Raw(&'a Contents),
    Qcow2(Box<GuestReader<'a>>),
}

impl Layer<'_> {
    fn size(&self) -> u64 {
        match self {
            // Whole sectors: what the file does not have of the last one reads as zeroes.
            Self::Raw(contents) => contents.len().next_multiple_of(SECTOR),
            Self::Qcow2(reader) => reader.size(),
        }
    }
}

fn nothing(_: u64, _: usize) -> Vec<u8> {
    Vec::new()
}

impl Chain {
    /// These files, each with whether it is raw.
    #[must_use]
    pub fn new(layers: Vec<(Contents, bool)>) -> Self {
        Self { layers }
    }

    /// Extents of the whole disk, neighbours merged.
    ///
    /// # Errors
    /// Where the image makes no sense.
    pub fn map(&self) -> Result<Vec<Extent>, String> {
        let mut layers = Vec::new();
        for (contents, raw) in &self.layers {
            layers.push(if *raw {
                Layer::Raw(contents)
            } else {
                let reader = GuestReader::open(contents.bytes(), Some(&nothing));
                Layer::Qcow2(Box::new(reader.map_err(|error| error.to_string())?))
            });
        }
        let size = layers.first().map_or(0, Layer::size);
        let mut extents = Vec::new();
        let mut at = 0;
        while at < size {
            let extent = extent_at(&layers, at)?;
            at += extent.len;
            extents.push(extent);
        }
        Ok(merged(extents))
    }
}

/// What the first layer says that has something for the byte at `at`: up to the end of its sector, or of a layer.
fn extent_at(layers: &[Layer<'_>], at: u64) -> Result<Extent, String> {
    let mut len = SECTOR - at % SECTOR;
    let extent = |depth: usize, len: u64| Extent {
        start: at,
        len,
        depth: u32::try_from(depth).expect("chains are short"),
        present: false,
        zero: true,
        data: false,
        compressed: false,
        host: None,
    };
    for (depth, layer) in layers.iter().enumerate() {
        if at >= layer.size() {
            // Zeroes that no layer has, counted to the one above.
            return Ok(extent(depth.saturating_sub(1), len));
        }
        len = len.min(layer.size() - at);
        let mut found = Extent {
            present: true,
            ..extent(depth, len)
        };
        let reader = match layer {
            Layer::Raw(contents) => {
                if at < contents.len() {
                    found.len = len.min(contents.len() - at);
                }
                (found.data, found.host) = (is_data(contents, at), Some(at));
                found.zero = !found.data;
                return Ok(found);
            }
            Layer::Qcow2(reader) => reader,
        };
        let within = at % reader.cluster_bytes();
        match reader.state(at).map_err(|error| error.to_string())? {
            State::Unallocated => continue,
            State::Zero => {}
            State::ZeroAllocated(host) => found.host = Some(host + within),
            State::Data(host) => {
                (found.data, found.zero) = (true, false);
                found.host = Some(host + within);
            }
            State::Compressed => {
                (found.data, found.zero) = (true, false);
                found.compressed = true;
            }
        }
        return Ok(found);
    }
    Ok(extent(layers.len() - 1, len))
}

/// Whether the sector that holds this byte is data, as far as the simulated file system knows: what reads as zeroes is a hole. Devices have
/// none.
pub(crate) fn is_data(contents: &Contents, at: u64) -> bool {
    let (start, end) = (
        at - at % SECTOR,
        (at - at % SECTOR + SECTOR).min(contents.len()),
    );
    let bytes = &contents.bytes()[index(start.min(end))..index(end)];
    contents.is_fixed() || at < end && bytes.iter().any(|byte| *byte != 0)
}

/// Joins neighbours that say the same, at adjacent places of one file.
#[must_use]
pub fn merged(extents: impl IntoIterator<Item = Extent>) -> Vec<Extent> {
    let mut all: Vec<Extent> = Vec::new();
    for extent in extents {
        match all.last_mut() {
            Some(last) if goes_on(last, &extent) => last.len += extent.len,
            _ => all.push(extent),
        }
    }
    all
}

fn goes_on(last: &Extent, next: &Extent) -> bool {
    let moved = Extent {
        start: last.start,
        len: last.len,
        host: last.host,
        ..*next
    };
    moved == *last && next.host == last.host.map(|host| host + last.len)
}

/// The part of them that lies in `[start, end)`.
#[must_use]
pub fn within(extents: &[Extent], start: u64, end: u64) -> Vec<Extent> {
    let cut = |extent: &Extent| {
        let (from, to) = (
            extent.start.max(start),
            (extent.start + extent.len).min(end),
        );
        (from < to).then(|| Extent {
            start: from,
            len: to - from,
            host: extent.host.map(|host| host + (from - extent.start)),
            ..*extent
        })
    };
    let first = extents.partition_point(|extent| extent.start + extent.len <= start);
    let rest = extents[first..]
        .iter()
        .take_while(|extent| extent.start < end);
    rest.filter_map(cut).collect()
}

/// The answer to a block status of `[start, end)`: extents without gaps, none of them empty, none that says two things at once, and none
/// that goes on in the next one.
///
/// # Errors
/// What is wrong with it.
pub fn check_form(extents: &[Extent], start: u64, end: u64, layers: usize) -> Result<(), String> {
    let mut at = start;
    for extent in extents {
        if extent.start != at || extent.len == 0 {
            return Err(format!("a gap, an overlap or an empty extent at {at:#x}"));
        }
        at += extent.len;
        let contradicts = extent.zero == extent.data
            || extent.data && !extent.present
            || extent.compressed && (!extent.data || extent.host.is_some())
            || !extent.present && extent.host.is_some()
            || extent.data && !extent.compressed && extent.host.is_none()
            || extent.depth as usize >= layers;
        if contradicts {
            return Err(format!("an extent that contradicts itself: {extent:?}"));
        }
    }
    if at != end {
        return Err(format!("it ends at {at:#x}"));
    }
    if merged(extents.iter().copied()).len() != extents.len() {
        return Err("neighbours that are one extent".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Guards against a judge that takes anything for an answer.

    use super::*;
    use crate::config;
    use crate::judge::Scene;
    use crate::rng::Rng;

    fn extent(start: u64, len: u64, host: Option<u64>) -> Extent {
        Extent {
            start,
            len,
            depth: 0,
            present: true,
            zero: host.is_none(),
            data: host.is_some(),
            compressed: false,
            host,
        }
    }

    #[test]
    fn neighbours_are_joined_where_their_places_are() {
        let parts = [
            extent(0, 512, Some(1024)),
            extent(512, 512, Some(1536)),
            extent(1024, 512, Some(512)),
            extent(1536, 512, None),
            extent(2048, 100, None),
        ];
        let all = merged(parts);
        let expected = [
            extent(0, 1024, Some(1024)),
            extent(1024, 512, Some(512)),
            extent(1536, 612, None),
        ];
        assert_eq!(all, expected);
        assert_eq!(check_form(&all, 0, 2148, 1), Ok(()));
        assert!(check_form(&parts, 0, 2148, 1).is_err(), "not joined");
        assert!(check_form(&all, 0, 2149, 1).is_err(), "too short");
        assert!(check_form(&all[1..], 0, 2148, 1).is_err(), "a gap");
        let mut wrong = all.clone();
        wrong[2].depth = 1;
        assert!(check_form(&wrong, 0, 2148, 1).is_err(), "no such layer");
        wrong = all.clone();
        wrong[0].zero = true;
        assert!(check_form(&wrong, 0, 2148, 1).is_err(), "zero and data");
        let part = within(&all, 700, 1600);
        let cut = [
            extent(700, 324, Some(1724)),
            extent(1024, 512, Some(512)),
            extent(1536, 64, None),
        ];
        assert_eq!(part, cut);
    }

    /// The files of every configuration say of each sector what the reader finds there.
    #[test]
    fn the_map_agrees_with_what_the_guest_reads() {
        let mut kinds = std::collections::BTreeSet::new();
        for config in config::all() {
            let scene = Scene::new(&config, &mut Rng::new(3));
            let layers = scene.files().iter().cloned().zip(scene.fixture.raw.clone());
            let map = Chain::new(layers.collect()).map().expect("sound");
            let size = scene.fixture.initial.len() as u64 * 512;
            let layers = scene.files().len();
            let end = map.last().map_or(0, |last| last.start + last.len);
            assert_eq!(check_form(&map, 0, end, layers), Ok(()), "{}", config.name);
            assert!(end >= size || config.raw, "{}", config.name);
            let initial = &scene.fixture.initial;
            for (lba, content) in (0..).zip(initial) {
                for part in within(&map, lba * 512, (lba + 1) * 512) {
                    kinds.insert((part.depth, part.present, part.data, part.compressed));
                    let zero = content.is_zero_from(part.start - lba * 512);
                    assert!(!part.zero || zero, "{}: {lba}", config.name);
                }
            }
        }
        assert!(kinds.len() >= 9, "{kinds:?}");
    }
}
