//! Holes of raw files. The engine takes all of a raw file for data; its file system knows better.

use std::fs::File;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use urus::{Extent, Format, Layer};

use crate::failure::Failure;

/// The raw layers of a chain, opened once more.
pub(super) struct Holes {
    /// In the order of the layers; none for other formats.
    files: Vec<Option<File>>,
}

impl Holes {
    /// Where a file cannot be opened, it is all data.
    pub(super) fn open(layers: &[Layer]) -> Self {
        let files = layers
            .iter()
            .map(|layer| {
                let is_raw = layer.format == Format::Raw;
                is_raw.then(|| File::open(&layer.path).ok()).flatten()
            })
            .collect();
        Self { files }
    }

    /// Calls `each` with the extent, taken apart into data and holes.
    pub(super) fn split(
        &self,
        extent: Extent,
        mut each: impl FnMut(Extent) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let file = usize::try_from(extent.depth)
            .ok()
            .and_then(|depth| self.files.get(depth))
            .and_then(Option::as_ref);
        let (Some(file), Some(host), true) = (file, extent.host, extent.data && !extent.zero)
        else {
            return each(extent);
        };
        let end = host + extent.len;
        let mut at = host;
        while at < end {
            let data = next(file, SeekFrom::Data(at), end);
            let (is_data, until) = if data > at {
                (false, data)
            } else {
                (true, next(file, SeekFrom::Hole(at), end))
            };
            // Whatever the file system says, it goes on.
            let until = if until > at { until } else { end };
            each(Extent {
                start: extent.start + (at - host),
                len: until - at,
                zero: !is_data,
                data: is_data,
                host: Some(at),
                ..extent
            })?;
            at = until;
        }
        Ok(())
    }
}

/// Where the next data, or the next hole, begins; `end` where there is none before. A file system that knows no holes, has none.
fn next(file: &File, place: SeekFrom, end: u64) -> u64 {
    match (seek(file, place), place) {
        (Ok(found), _) => found.min(end),
        (Err(Errno::NXIO), _) => end,
        (Err(_), SeekFrom::Data(at)) => at,
        (Err(_), _) => end,
    }
}

#[cfg(test)]
mod tests {
    //! Guards against holes that are shown as data, and the other way round.
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_found_between_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 65536], 256 << 10).unwrap();
        let holes = Holes {
            files: vec![None, Some(file)],
        };
        let whole = Extent {
            start: 1000,
            len: 1 << 20,
            depth: 1,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            host: Some(0),
        };
        let mut found = Vec::new();
        let split = holes.split(whole, |extent| {
            found.push((extent.start, extent.len, extent.data, extent.host));
            Ok(())
        });
        assert!(split.is_ok());
        assert_eq!(
            found,
            [
                (1000, 256 << 10, false, Some(0)),
                (1000 + (256 << 10), 64 << 10, true, Some(256 << 10)),
                (
                    1000 + (320 << 10),
                    (1 << 20) - (320 << 10),
                    false,
                    Some(320 << 10)
                ),
            ]
        );
    }
}
