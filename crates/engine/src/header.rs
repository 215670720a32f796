//! The header while a device is open: one copy in memory, changed by one write inside one sector (O8).

use urus_format::Header;

use crate::error::{Error, Result};
use crate::maintenance::Device;
use crate::shared::Owner;
use crate::storage::{IMAGE, Storage};
use crate::sync::Ordering;
use crate::to_usize;

impl<S: Storage> Device<S> {
    pub(crate) fn with_header<R>(&self, f: impl FnOnce(&Header) -> R) -> R {
        f(&self.image().header.borrow())
    }

    /// The unit in which metadata is changed in place: written whole or not at all.
    pub(crate) fn sector_bytes(&self) -> u64 {
        self.unit(crate::limits::SECTOR_BYTES)
    }

    /// The same for the L1 table and the refcount table, which are in memory: what is written where an entry has changed.
    pub(crate) fn table_unit_bytes(&self) -> u64 {
        self.unit(self.shared().options.sizes.table_unit_bytes)
    }

    fn unit(&self, least: u64) -> u64 {
        u64::from(self.worker.reactor.properties(IMAGE).alignment).max(least)
    }

    /// Changes the header on disk, durably. What changes lies in its first sector; the memory follows when it is
    /// durable.
    pub(crate) async fn switch_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        // O13: a commit that moves the refcount table and a resize may both want to.
        let _turn = self.header_turn.take().await;
        let image = self.image();
        let mut header = image.header.borrow().clone();
        change(&mut header);
        let bytes = header.encode().map_err(|source| Error::Format {
            file: self.shared().image_name().to_owned(),
            source,
        })?;
        let sector = to_usize(self.sector_bytes());
        if let Err(error) = self
            .write_metadata(0, &bytes[..sector], Owner::Header)
            .await
        {
            return Err(self.restore_header(error).await);
        }
        self.data_barrier().await?;
        *image.header.borrow_mut() = header;
        Ok(())
    }

    /// The header's write failed: the disk has the old or the new one (O15). Only when it surely has the old one again
    /// may what the new one names be used for something else; without that certainty the device is poisoned (O11).
    async fn restore_header(&self, failure: Error) -> Error {
        if failure.is_out_of_space() {
            // No space: nothing of the sector was written.
            return failure;
        }
        let sector = to_usize(self.sector_bytes());
        let restored = async {
            let bytes = self
                .with_header(Header::encode)
                .map_err(|source| Error::Format {
                    file: self.shared().image_name().to_owned(),
                    source,
                })?;
            self.write_metadata(0, &bytes[..sector], Owner::Header)
                .await?;
            self.data_barrier().await
        }
        .await;
        if let Err(error) = restored {
            self.shared().poisoned.store(true, Ordering::SeqCst);
            tracing::error!(
                image = self.shared().image_name(),
                %error,
                "the header could be neither changed nor restored: no more writes are taken"
            );
        }
        failure
    }
}
