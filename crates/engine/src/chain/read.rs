//! Reads that need more than the ring: slices not cached, compressed clusters, many pieces.

use urus_format::CompressedExtent;

use crate::chain::{Layer, Piece};
use crate::error::{Error, Result};
use crate::file::zeroed;
use crate::shared::Shared;
use crate::storage::{FileId, Memory, Op, OpKind, Storage};
use crate::sync::{Arc, Mutex};
use crate::to_usize;
use crate::wake::Window;
use crate::worker::Worker;

impl<S: Storage> Worker<S> {
    /// Reads a range as the guest sees it. Neighbouring host ranges become one operation, separate
    /// ones run side by side.
    pub(crate) async fn read_guest(&self, offset: u64, memory: S::Memory) -> Result<()> {
        let total = memory.len() as u64;
        let mut running = Window::new(self.shared.options.sizes.parts_at_once);
        // (file, host offset, start in memory, bytes) that may still grow.
        let mut open: Option<(FileId, u64, u64, u64)> = None;
        let mut done = 0;
        let mut failed = None;
        while done < total {
            let (piece, len) = self.resolve(offset + done, total - done);
            match piece {
                Piece::Data { file, offset: host } => {
                    open = match open {
                        Some((f, h, start, bytes))
                            if f == file && h + bytes == host && start + bytes == done =>
                        {
                            Some((f, h, start, bytes + len))
                        }
                        other => {
                            if let Some(part) = other {
                                running.start(self.read_part(part, &memory)).await;
                            }
                            Some((file, host, done, len))
                        }
                    };
                }
                Piece::Zero => memory.zero(to_usize(done), to_usize(len)),
                Piece::Compressed {
                    layer,
                    extent,
                    within,
                } => {
                    let target = memory.slice(to_usize(done), to_usize(len));
                    running
                        .start(self.read_compressed(layer, extent, within, target))
                        .await;
                }
                Piece::Miss { layer, slice } => {
                    // The request's pin keeps what was resolved before valid (O7), so nothing starts over.
                    if let Err(error) = running.during(self.load(layer, slice)).await {
                        failed = Some(error);
                        break;
                    }
                    continue;
                }
                Piece::Bad(error) => {
                    failed = Some(*error);
                    break;
                }
            }
            done += len;
        }
        if let Some(part) = open {
            running.start(self.read_part(part, &memory)).await;
        }
        let result = running.end().await;
        failed.map_or(result, Err)
    }

    fn read_part(
        &self,
        (file, host, start, bytes): (FileId, u64, u64, u64),
        memory: &S::Memory,
    ) -> impl Future<Output = Result<()>> + use<'_, S> {
        self.files
            .read_data(file, host, memory.slice(to_usize(start), to_usize(bytes)))
    }

    /// Reads part of a compressed cluster.
    async fn read_compressed(
        &self,
        layer: &Layer,
        extent: CompressedExtent,
        within: u64,
        target: S::Memory,
    ) -> Result<()> {
        let cluster = self.cluster_content(layer, extent).await?;
        let start = to_usize(within);
        target.write(0, &cluster[start..start + target.len()]);
        Ok(())
    }

    /// A compressed cluster's content: from the cache, or decoded once for all requests of this queue that want it. All of
    /// them pin the old mapping (O7), so what one of them put into the cache is right for the others.
    async fn cluster_content(
        &self,
        layer: &Layer,
        extent: CompressedExtent,
    ) -> Result<Arc<Vec<u8>>> {
        loop {
            if let Some(cluster) = self.shared.decoded.get(layer.id, extent.offset.0) {
                return Ok(cluster);
            }
            if let Some(_flight) = self.decoding.join((layer.id, extent.offset.0)).await {
                return self.decode_cluster(layer, extent).await;
            }
        }
    }

    /// Decodes a compressed cluster on another thread, and puts it into the cache.
    async fn decode_cluster(
        &self,
        layer: &Layer,
        extent: CompressedExtent,
    ) -> Result<Arc<Vec<u8>>> {
        let qcow2 = layer
            .qcow2()
            .expect("only qcow2 layers have compressed clusters");
        // The last sector may pass the end of the file: it reads as zeroes there.
        let source = self
            .files
            .read_bytes(layer.file, extent.offset.0, extent.bytes)
            .await?;
        Shared::count(&self.shared.stats.decoded_clusters, 1);
        let compression = qcow2.compression;
        let mut cluster = zeroed(qcow2.geometry.cluster_bytes())?;
        let outcome = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&outcome);
        let job = Box::new(move || {
            let result = urus_format::compressed::decode(compression, &source, &mut cluster);
            *slot.lock() = Some(result.map(|()| Arc::new(cluster)));
        });
        let op = Op {
            file: layer.file,
            kind: OpKind::Job(job),
        };
        self.reactor().run(op).await.map_err(|error| {
            self.files
                .error("decode", layer.file, extent.offset.0, extent.bytes, &error)
        })?;
        let result = outcome.lock().take().expect("a job that completed has run");
        let cluster: Arc<Vec<u8>> = result.map_err(|source| Error::Decompress {
            file: layer.name.clone(),
            offset: extent.offset.0,
            source,
        })?;
        self.shared
            .decoded
            .insert(layer.id, extent.offset.0, Arc::clone(&cluster));
        Ok(cluster)
    }

    /// Whether a range is known to read as zeroes without reading data.
    pub(crate) async fn reads_zero(&self, offset: u64, len: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let (piece, bytes) = self.resolve(offset + done, len - done);
            match piece {
                Piece::Zero => done += bytes,
                Piece::Data { .. } | Piece::Compressed { .. } => return Ok(false),
                Piece::Miss { layer, slice } => self.load(layer, slice).await?,
                Piece::Bad(error) => return Err(*error),
            }
        }
        Ok(true)
    }
}
