//! The header while a device is open: fields of it are changed by one write inside one sector (O8,
//! O28).

use urus_format::{Header, HeaderChange};

use crate::chain::Owner;
use crate::error::{Error, Result};
use crate::maintenance::Device;
use crate::planted::{self, Bug};
use crate::storage::Storage;
use crate::sync::Ordering;
use crate::to_usize;
use crate::worker::Worker;

// O28: what changes together lies in what storage writes whole or not at all.
const _: () = assert!(HeaderChange::SECTOR_BYTES as u64 == crate::limits::SECTOR_BYTES);

/// O28: puts changed fields into the header's first bytes, as they are on disk now. Everything else
/// in them stays: what is not known here, and how another program laid it out. Returns the bytes to
/// write, and the header that they make.
pub(crate) fn patch(
    file: &str,
    header: &Header,
    changes: &[HeaderChange],
    on_disk: &[u8],
) -> Result<(Vec<u8>, Header)> {
    let mut bytes = on_disk.to_vec();
    let changed = header
        .patch(changes, &mut bytes)
        .map_err(|source| Error::Format {
            file: file.to_owned(),
            source,
        })?;
    if planted::is(Bug::WholeHeader)
        && let Ok(own) = changed.encode()
    {
        bytes.copy_from_slice(&own[..on_disk.len()]);
    }
    if planted::is(Bug::FeatureBitsAnyVersion) {
        bytes[72..80].copy_from_slice(&changed.incompatible.to_be_bytes());
        bytes[88..96].copy_from_slice(&changed.autoclear.to_be_bytes());
    }
    Ok((bytes, changed))
}

impl<S: Storage> Worker<S> {
    /// The unit in which metadata is changed in place: its sectors of 512 bytes are written whole
    /// or not at all, and a change of the header lies in the first of them.
    pub(crate) fn sector_bytes(&self) -> u64 {
        u64::from(self.files.properties(self.image.file()).alignment)
            .max(crate::limits::SECTOR_BYTES)
    }

    /// The first bytes of the image as they are on disk.
    pub(crate) async fn read_header_sector(&self) -> Result<Vec<u8>> {
        self.files
            .read_bytes(self.image.file(), 0, self.sector_bytes())
            .await
    }
}

impl<S: Storage> Device<S> {
    pub(crate) fn with_header<R>(&self, f: impl FnOnce(&Header) -> R) -> R {
        f(&self.image().header.borrow())
    }

    pub(crate) fn sector_bytes(&self) -> u64 {
        self.worker.sector_bytes()
    }

    /// The same for the L1 table and the refcount table, which are in memory: what is written where an entry has changed.
    pub(crate) fn table_unit_bytes(&self) -> u64 {
        let least = self.shared().options.sizes.table_unit_bytes;
        u64::from(
            self.worker
                .files
                .properties(self.worker.image.file())
                .alignment,
        )
        .max(least)
    }

    /// Changes the header on disk, durably: all of `changes` with one write. The memory follows
    /// when it is durable.
    pub(crate) async fn switch_header(&self, changes: &[HeaderChange]) -> Result<()> {
        // O13: a commit that moves the refcount table and a resize may both want to.
        let _turn = self.header_turn.take().await;
        let image = self.image();
        // O28: read at its turn, so no copy is older than another change, ours or another
        // program's.
        let before = match planted::kept() {
            Some(stale) => stale,
            None => self.worker.read_header_sector().await?,
        };
        let (after, header) = {
            let header = image.header.borrow();
            patch(self.shared().image_name(), &header, changes, &before)?
        };
        debug_assert_eq!(before.len(), to_usize(self.sector_bytes()));
        if let Err(error) = self.write_metadata(0, &after, Owner::Header).await {
            return Err(self.restore_header(error, &before).await);
        }
        self.data_barrier().await?;
        *image.header.borrow_mut() = header;
        Ok(())
    }

    /// The header's write failed: the disk has the old or the new one (O15). Only when it surely
    /// has the old one again, byte for byte as it was read (O28), may what the new one names be
    /// used for something else; without that certainty the device is poisoned (O11).
    async fn restore_header(&self, failure: Error, before: &[u8]) -> Error {
        if matches!(
            failure,
            Error::OutOfSpace { .. } | Error::OutOfMemory { .. }
        ) {
            // No space for the sector, or no memory for its bytes: nothing of it was written.
            return failure;
        }
        let mut bytes = before.to_vec();
        if planted::is(Bug::RestoredAnew)
            && let Ok(own) = self.with_header(Header::encode)
        {
            bytes.copy_from_slice(&own[..before.len()]);
        }
        let restored = async {
            self.write_metadata(0, &bytes, Owner::Header).await?;
            self.data_barrier().await
        }
        .await;
        if let Err(error) = restored {
            self.worker.image.poisoned.store(true, Ordering::SeqCst);
            tracing::error!(
                image = self.shared().image_name(),
                %error,
                "the header could be neither changed nor restored: no more writes are taken"
            );
        }
        failure
    }
}
