//! Writing a new image into a file.
//!
//! O30: what was in the file before is no image any more, durably, before anything of the new one is written; its header comes last, when all
//! else is durable. So whatever a crash or an error leaves is what was there before, untouched, or no image, or the new one, whole.

use std::rc::Rc;

use urus_format::create::NewImage;

use crate::chain::{LayerFormat, LayerId, LayerSpec};
use crate::error::Result;
use crate::limits;
use crate::open;
use crate::planted::{self, Bug};
use crate::shared::Options;
use crate::storage::{FileId, OpKind, Storage};
use crate::worker::Worker;

/// Whether somebody can find the file before it is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nobody: it is empty, and gets its name later.
    Later,
    /// It has a name, and may hold anything. Nobody else uses it.
    Now,
}

/// What a file becomes.
#[derive(Clone, Debug)]
pub enum New {
    /// A qcow2 image.
    Qcow2(Box<NewImage>),
    /// A raw image of so many bytes: zeroes in a file. On a block device its content stays.
    Raw(u64),
}

/// Makes the file a new image, durably. It becomes as long as the image; a block device has to be so already. Waits for I/O.
///
/// # Errors
/// What the storage says. Where [`Found::Now`], the file holds what it did, or no image, then.
pub fn create<S: Storage>(
    storage: S,
    file: FileId,
    name: String,
    new: New,
    found: Found,
) -> Result<()> {
    // To this the file is bytes.
    let spec = LayerSpec {
        file,
        name,
        format: LayerFormat::Raw,
    };
    let layer = open::layer_of(
        LayerId(0),
        spec,
        &storage,
        None,
        0,
        limits::Sizes::default(),
    )?
    .0;
    let shared = open::share(layer, Vec::new(), Options::default());
    let worker = Worker::new(shared, storage);
    let writer = Writer {
        worker: Rc::clone(&worker),
        file,
    };
    worker.reactor().block_on(async move {
        match new {
            New::Qcow2(image) => writer.write(&image, found).await,
            New::Raw(bytes) => writer.write_raw(bytes, found).await,
        }
    })
}

struct Writer<S: Storage> {
    worker: Rc<Worker<S>>,
    file: FileId,
}

impl<S: Storage> Writer<S> {
    async fn write(&self, image: &NewImage, found: Found) -> Result<()> {
        let (header, tables) = image.writes.split_last().expect("an image has a header");
        if found == Found::Now {
            self.remove_old().await?;
        }
        if self.worker.files.properties(self.file).regular {
            self.set_length(image.file_bytes).await?;
        } else {
            let (offset, bytes) = image.zeroes;
            self.clear(offset, bytes).await?;
        }
        for (offset, bytes) in tables {
            self.write_units(*offset, bytes).await?;
        }
        if found == Found::Now && !planted::is(Bug::EarlyNewHeader) {
            self.worker.barrier().await?;
        }
        let (offset, bytes) = header;
        self.write_units(*offset, bytes).await?;
        self.worker.barrier().await
    }

    async fn write_raw(&self, bytes: u64, found: Found) -> Result<()> {
        if self.worker.files.properties(self.file).regular {
            if found == Found::Now {
                self.remove_old().await?;
            }
            self.set_length(bytes).await?;
        }
        self.worker.barrier().await
    }

    /// What the file held is no image any more.
    async fn remove_old(&self) -> Result<()> {
        if planted::is(Bug::KeepsOldHeader) {
            return Ok(());
        }
        if self.worker.files.properties(self.file).regular {
            // Through nothing, so that nothing of it stays.
            self.set_length(0).await?;
        } else {
            self.clear(0, self.unit()).await?;
        }
        self.worker.barrier().await
    }

    async fn set_length(&self, len: u64) -> Result<()> {
        self.worker
            .files
            .simple("set the length", self.file, len, 0, || OpKind::SetLen {
                len,
            })
            .await
    }

    /// Zeroes as data: on a device nothing else is sure to read so.
    async fn clear(&self, offset: u64, len: u64) -> Result<()> {
        let most = self.worker.shared.options.sizes.zero_buffer_bytes;
        let mut done = 0;
        while done < len {
            let zeroes = crate::file::zeroed((len - done).min(most))?;
            self.write_units(offset + done, &zeroes).await?;
            done += zeroes.len() as u64;
        }
        Ok(())
    }

    /// Writes whole units: what follows the bytes in the last of them is nobody's yet.
    async fn write_units(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = (bytes.len() as u64).next_multiple_of(self.unit());
        let mut units = crate::file::zeroed(len)?;
        units[..bytes.len()].copy_from_slice(bytes);
        self.worker
            .files
            .write_bytes(self.file, offset, &units)
            .await
    }

    /// Bytes that the file takes, and writes whole or not at all.
    fn unit(&self) -> u64 {
        u64::from(self.worker.files.properties(self.file).alignment).max(limits::SECTOR_BYTES)
    }
}
