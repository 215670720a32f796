//! Writing a new image into a file.
//!
//! O30: what was in the file before is no image any more, durably, before anything of the new one is written; its header comes last, when all
//! else is durable. So whatever a crash or an error leaves is what was there before, untouched, or no image, or the new one, whole.

use std::rc::Rc;

use urus_format::create::NewImage;

use crate::error::Result;
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
    Qcow2(Rc<NewImage>),
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
    let worker = open::file_of_bytes(storage, file, name, Options::default())?;
    let writer = Writer(Rc::clone(&worker));
    worker.reactor().block_on(async move {
        match new {
            New::Qcow2(image) => writer.write(&image, found).await,
            New::Raw(bytes) => writer.write_raw(bytes, found).await,
        }
    })
}

/// The file is the worker's image.
struct Writer<S: Storage>(Rc<Worker<S>>);

impl<S: Storage> Writer<S> {
    async fn write(&self, image: &NewImage, found: Found) -> Result<()> {
        let (header, tables) = image.writes.split_last().expect("an image has a header");
        if found == Found::Now {
            self.remove_old().await?;
        }
        if self.is_regular() {
            self.set_length(image.file_bytes).await?;
        } else {
            let (offset, bytes) = image.zeroes;
            self.clear(offset, bytes).await?;
        }
        for (offset, bytes) in tables {
            self.write_units(*offset, bytes).await?;
        }
        if found == Found::Now && !planted::is(Bug::EarlyNewHeader) {
            self.0.barrier().await?;
        }
        let (offset, bytes) = header;
        self.write_units(*offset, bytes).await?;
        self.0.barrier().await
    }

    async fn write_raw(&self, bytes: u64, found: Found) -> Result<()> {
        if self.is_regular() {
            if found == Found::Now {
                self.remove_old().await?;
            }
            self.set_length(bytes).await?;
        }
        self.0.barrier().await
    }

    fn is_regular(&self) -> bool {
        self.0.files.properties(self.0.image.file()).regular
    }

    /// What the file held is no image any more.
    async fn remove_old(&self) -> Result<()> {
        if planted::is(Bug::KeepsOldHeader) {
            return Ok(());
        }
        if self.is_regular() {
            // Through nothing, so that nothing of it stays.
            self.set_length(0).await?;
        } else {
            self.clear(0, self.0.sector_bytes()).await?;
        }
        self.0.barrier().await
    }

    async fn set_length(&self, len: u64) -> Result<()> {
        self.0
            .files
            .simple("set the length", self.0.image.file(), len, 0, || {
                OpKind::SetLen { len }
            })
            .await
    }

    /// Zeroes as data: on a device nothing else is sure to read so.
    async fn clear(&self, offset: u64, len: u64) -> Result<()> {
        let most = self.0.shared.options.sizes.zero_buffer_bytes;
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
        let len = (bytes.len() as u64).next_multiple_of(self.0.sector_bytes());
        let mut units = crate::file::zeroed(len)?;
        units[..bytes.len()].copy_from_slice(bytes);
        self.0
            .files
            .write_bytes(self.0.image.file(), offset, &units)
            .await
    }
}
