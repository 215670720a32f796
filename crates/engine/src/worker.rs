//! What every task needs, on whichever executor it runs: storage operations carried to their end, slices
//! brought into the cache, clusters to write into.

use std::cell::{Cell, RefCell, RefMut};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::Poll;

use crate::counters::HitCount;
use crate::error::{EDQUOT, ENOSPC, Error, Result};
use crate::frames::{Install, NoCleanFrame};
use crate::hit::Direct;
use crate::limits;
use crate::map::SliceId;
use crate::planted::{self, Bug};
use crate::reactor::Reactor;
use crate::seen::{Way, note};
use crate::shared::{Owner, Run, Shared};
use crate::storage::{FileId, IMAGE, Memory, OpKind, Storage};
use crate::sync::{Arc, Ordering};
use crate::to_usize;
use crate::wake::{Flights, WaitList};

/// One thread's way to do the engine's work.
pub(crate) struct Worker<S: Storage> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) hits: HitCount,
    pub(crate) reactor: Reactor<S, Direct<S::Memory>>,
    /// By file: what offsets and lengths, and what memory, have to be multiples of.
    alignments: Box<[(u64, usize)]>,
    /// Clusters reserved for this worker, and not used yet.
    runs: RefCell<Vec<Run>>,
    /// The device's generation when they were reserved.
    runs_generation: Cell<u64>,
    reserving: RefCell<Option<WaitList>>,
    /// Slices that a task of this worker reads just now: the others wait for it.
    loading: Flights<(usize, SliceId)>,
    /// Compressed clusters (layer, host offset) that a task of this worker decodes just now.
    pub(crate) decoding: Flights<(usize, u64)>,
}

/// `len` zeroed bytes for a table or a cluster of the image, whose length the image decides.
pub(crate) fn zeroed(len: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(to_usize(len));
    reserved.map_err(|_| Error::OutOfMemory { bytes: len })?;
    bytes.resize(to_usize(len), 0);
    Ok(bytes)
}

/// Whether an interrupted operation deserves another try.
pub(crate) fn interrupted(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

impl<S: Storage> Worker<S> {
    pub(crate) fn new(shared: Arc<Shared>, storage: S) -> Rc<Self> {
        let files = shared.layers.iter().map(|layer| layer.file.0);
        let alignments = (0..=files.max().unwrap_or(0))
            .map(|file| {
                let properties = storage.properties(FileId(file));
                let memory = to_usize(u64::from(properties.memory_alignment));
                (u64::from(properties.alignment), memory)
            })
            .collect();
        Rc::new(Self {
            alignments,
            hits: HitCount::new(Arc::clone(&shared)),
            shared,
            reactor: Reactor::new(storage),
            runs: RefCell::new(Vec::new()),
            runs_generation: Cell::new(0),
            reserving: RefCell::new(None),
            loading: Flights::default(),
            decoding: Flights::default(),
        })
    }

    /// What offsets and lengths of operations on a file, and what their memory, have to be multiples of.
    #[inline]
    pub(crate) fn alignments(&self, file: FileId) -> (u64, usize) {
        self.alignments[usize::from(file.0)]
    }

    pub(crate) fn io_error(
        &self,
        operation: &'static str,
        file: FileId,
        offset: u64,
        bytes: u64,
        error: &io::Error,
    ) -> Error {
        const EIO: i32 = 5;
        let name = self
            .shared
            .layers
            .iter()
            .find(|layer| layer.file == file)
            .map_or("file", |layer| &layer.name)
            .to_owned();
        match error.raw_os_error() {
            Some(ENOSPC | EDQUOT) => Error::OutOfSpace {
                operation,
                file: name,
                offset,
            },
            errno => Error::Io {
                operation,
                file: name,
                offset,
                bytes,
                errno: errno.unwrap_or(EIO),
            },
        }
    }

    /// Reads all of `memory`; what lies past the end of the file reads as zeroes.
    pub(crate) async fn read(&self, file: FileId, offset: u64, memory: S::Memory) -> Result<()> {
        let align = u64::from(self.reactor.properties(file).alignment);
        let memory_align = to_usize(u64::from(self.reactor.properties(file).memory_alignment));
        let len = memory.len() as u64;
        if !offset.is_multiple_of(align)
            || !len.is_multiple_of(align)
            || !memory.is_aligned(memory_align)
        {
            // O_DIRECT: through memory of our own, widened to whole blocks.
            let start = offset - offset % align;
            let end = (offset + len).next_multiple_of(align);
            let bounce = self.reactor.allocate(end - start)?;
            self.read_plain(file, start, bounce.clone()).await?;
            copy(&bounce, to_usize(offset - start), &memory);
            return Ok(());
        }
        self.read_plain(file, offset, memory).await
    }

    async fn read_plain(&self, file: FileId, offset: u64, memory: S::Memory) -> Result<()> {
        let mut done = 0;
        let mut retries = 0;
        while done < memory.len() {
            let at = offset + done as u64;
            let rest = memory.slice(done, memory.len() - done);
            match self
                .reactor
                .run(
                    file,
                    OpKind::Read {
                        offset: at,
                        memory: rest,
                    },
                )
                .await
            {
                Ok(0) if self.is_past_end(file, at) => {
                    memory.zero(done, memory.len() - done);
                    return Ok(());
                }
                // The file has grown meanwhile; or it is broken, and then its bytes are no zeroes.
                Ok(0) if retries < limits::RETRIES => retries += 1,
                Ok(0) => {
                    let error = io::Error::from_raw_os_error(5);
                    let left = (memory.len() - done) as u64;
                    return Err(self.io_error("read", file, at, left, &error));
                }
                Ok(bytes) if self.ends_file(file, at + bytes as u64) => {
                    memory.zero(done + bytes, memory.len() - done - bytes);
                    return Ok(());
                }
                Ok(bytes)
                    if bytes > self.whole_blocks(file, at, bytes) && retries < limits::RETRIES =>
                {
                    done += self.whole_blocks(file, at, bytes);
                    retries += 1;
                }
                Ok(bytes) => done += bytes,
                Err(error) if interrupted(&error) && retries < limits::RETRIES => retries += 1,
                Err(error) => {
                    return Err(self.io_error(
                        "read",
                        file,
                        at,
                        (memory.len() - done) as u64,
                        &error,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether there is nothing from this offset on.
    pub(crate) fn is_past_end(&self, file: FileId, offset: u64) -> bool {
        self.reactor
            .with_storage(|storage| storage.file_len(file))
            .is_ok_and(|bytes| bytes <= offset)
    }

    /// Where a short read or write may go on: at a whole sector, or the guest sees a sector of which one half is older
    /// than the other; under O_DIRECT at a whole block, or it is refused.
    fn resume_unit(&self, file: FileId) -> u64 {
        u64::from(self.reactor.properties(file).alignment).max(limits::SECTOR_BYTES)
    }

    /// Whether a read that stopped here has met the end of the file inside a sector or block.
    pub(crate) fn ends_file(&self, file: FileId, end: u64) -> bool {
        let ends = !end.is_multiple_of(self.resume_unit(file)) && self.is_past_end(file, end);
        note(Way::OddEnd, || {
            ends && !end.is_multiple_of(limits::SECTOR_BYTES)
        });
        ends
    }

    /// The part of a short read or write at `offset` after which one can go on.
    pub(crate) fn whole_blocks(&self, file: FileId, offset: u64, bytes: usize) -> usize {
        let end = offset + bytes as u64;
        to_usize((end - end % self.resume_unit(file)).saturating_sub(offset))
    }

    /// Writes all of `memory`. Offset and length obey the file's alignment.
    pub(crate) async fn write(&self, file: FileId, offset: u64, memory: S::Memory) -> Result<()> {
        let memory_align = to_usize(u64::from(self.reactor.properties(file).memory_alignment));
        let memory = if memory.is_aligned(memory_align) {
            memory
        } else {
            let bounce = self.reactor.allocate(memory.len() as u64)?;
            copy(&memory, 0, &bounce);
            bounce
        };
        let mut done = 0;
        let mut retries = 0;
        while done < memory.len() {
            let at = offset + done as u64;
            let rest = memory.slice(done, memory.len() - done);
            match self
                .reactor
                .run(
                    file,
                    OpKind::Write {
                        offset: at,
                        memory: rest,
                        sync: false,
                    },
                )
                .await
            {
                // A device that takes nothing and says no error is full.
                Ok(0) => {
                    let full = io::Error::from_raw_os_error(28);
                    return Err(self.io_error(
                        "write",
                        file,
                        at,
                        (memory.len() - done) as u64,
                        &full,
                    ));
                }
                Ok(bytes)
                    if bytes > self.whole_blocks(file, at, bytes) && retries < limits::RETRIES =>
                {
                    done += self.whole_blocks(file, at, bytes);
                    retries += 1;
                }
                Ok(bytes) => done += bytes,
                Err(error) if interrupted(&error) && retries < limits::RETRIES => retries += 1,
                Err(error) => {
                    return Err(self.io_error(
                        "write",
                        file,
                        at,
                        (memory.len() - done) as u64,
                        &error,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Writes bytes of metadata.
    pub(crate) async fn write_bytes(&self, file: FileId, offset: u64, bytes: &[u8]) -> Result<()> {
        let memory = self.reactor.allocate(bytes.len() as u64)?;
        memory.write(0, bytes);
        self.write(file, offset, memory).await
    }

    /// Reads bytes of metadata.
    pub(crate) async fn read_bytes(&self, file: FileId, offset: u64, len: u64) -> Result<Vec<u8>> {
        let memory = self.reactor.allocate(len)?;
        self.read(file, offset, memory.clone()).await?;
        let mut bytes = zeroed(len)?;
        memory.read(0, &mut bytes);
        Ok(bytes)
    }

    /// Runs an operation without data, retrying where it was interrupted.
    pub(crate) async fn simple(
        &self,
        operation: &'static str,
        file: FileId,
        offset: u64,
        bytes: u64,
        kind: impl Fn() -> OpKind<S::Memory>,
    ) -> Result<()> {
        let mut retries = 0;
        loop {
            match self.reactor.run(file, kind()).await {
                Ok(_) => return Ok(()),
                Err(error) if interrupted(&error) && retries < limits::RETRIES => retries += 1,
                Err(error) => return Err(self.io_error(operation, file, offset, bytes, &error)),
            }
        }
    }

    /// Reserves room for a range of the image file, which grows where it is shorter.
    pub(crate) async fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        let kind = || OpKind::Allocate { offset, len };
        self.simple("allocate", IMAGE, offset, len, kind).await
    }

    /// Takes the room that metadata will need once a commit writes it. A full disk then refuses the request that needs it, and not the
    /// commit, which would let nobody go on: neither flushes nor the discards that could give room back.
    pub(crate) async fn take_room(&self, offset: u64, len: u64) -> Result<()> {
        if !self.reactor.properties(IMAGE).regular {
            return Ok(());
        }
        match self.allocate(offset, len).await {
            Err(error) if error.is_out_of_space() => {
                // What was freed and not committed may be enough for the next one.
                self.shared.request_commit();
                Err(error)
            }
            // A file system that cannot say so beforehand may have the room.
            _ => Ok(()),
        }
    }

    /// Brings a slice into the cache. It may be gone again when this returns: the caller looks it up again.
    pub(crate) async fn load(&self, layer: usize, slice: SliceId) -> Result<()> {
        match self.loading.join((layer, slice)).await {
            None => Ok(()),
            Some(_flight) => self.load_alone(layer, slice).await,
        }
    }

    async fn load_alone(&self, layer_index: usize, slice: SliceId) -> Result<()> {
        let layer = &self.shared.layers[layer_index];
        let qcow2 = layer.qcow2().expect("only qcow2 layers have slices");
        let map = &qcow2.map;
        let table = map.table_of(slice);
        loop {
            // Where the slice lies, and the announcement of the read, belong together: a table that moves
            // between them would make the read one of another table.
            let (ticket, source) = {
                let mut meta = self.shared.meta.lock();
                if map.frame_of(slice).is_some() {
                    return Ok(());
                }
                let source = match self.shared.l1_entry(layer_index, table)? {
                    None => return Ok(()),
                    Some(entry) => match meta.new_tables.get(&table).filter(|_| layer_index == 0) {
                        Some(new) => new.copy_from,
                        None => Some(entry.table.0),
                    },
                };
                (meta.frames[layer_index].begin_load(slice), source)
            };
            let words = match source {
                None => Ok(vec![0; to_usize(map.slice_bytes() / 8)]),
                Some(offset) => self.read_slice(layer_index, slice, offset).await,
            };
            let outcome = {
                let mut meta = self.shared.meta.lock();
                let words = words.and_then(|words: Vec<u64>| {
                    if layer_index == 0 && !self.shared.options.read_only {
                        self.check_slice(&meta.owners, slice, &words)?;
                    }
                    Ok(words)
                });
                let outcome = meta.frames[layer_index].end_load(
                    map,
                    slice,
                    ticket,
                    words.as_ref().ok().map(Vec::as_slice),
                );
                words?;
                outcome
            };
            match outcome {
                Ok(Install::Cached | Install::Superseded) => return Ok(()),
                Err(NoCleanFrame) => self.wait_for_frame(layer_index).await?,
            }
        }
    }

    /// Reads a slice of the L2 table at a host offset.
    async fn read_slice(&self, layer: usize, slice: SliceId, offset: u64) -> Result<Vec<u64>> {
        Shared::count(&self.shared.stats.slice_loads, 1);
        let layer = &self.shared.layers[layer];
        let map = &layer.qcow2().expect("only qcow2 layers have slices").map;
        let place = offset + map.offset_in_table(slice);
        note(Way::LaterSliceRead, || map.is_later_slice(slice));
        let bytes = self
            .read_bytes(layer.file, place, map.slice_bytes())
            .await?;
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight")))
            .collect();
        // What lies past the end of the file reads as zeroes, and is no table.
        if words.iter().all(|word| *word == 0) && self.is_past_end(layer.file, offset) {
            return Err(Error::Corrupt {
                file: layer.name.clone(),
                what: format!("an L2 table at {offset:#x} lies past the end of the file"),
                place: format!("L1 table entry {}", map.table_of(slice)),
            });
        }
        Ok(words)
    }

    /// Waits until a commit has cleaned some frames.
    async fn wait_for_frame(&self, layer: usize) -> Result<()> {
        if self.shared.is_poisoned() {
            return Err(Error::Poisoned {
                file: self.shared.image_name().to_owned(),
            });
        }
        let _ = layer;
        self.shared
            .request_flush()
            .receive()
            .await
            .unwrap_or(Err(Error::Closed))
    }

    /// Data entries must not lead into metadata, or a guest's write would land there.
    fn check_slice(
        &self,
        owners: &crate::shared::Owners,
        slice: SliceId,
        words: &[u64],
    ) -> Result<()> {
        let layer = &self.shared.layers[0];
        let qcow2 = layer.qcow2().expect("a slice belongs to a qcow2 layer");
        let step = to_usize(qcow2.geometry.l2_entry_bytes() / 8);
        for (index, word) in words.iter().step_by(step).enumerate() {
            let raw = urus_format::L2Raw {
                entry: *word,
                subclusters: 0,
            };
            let host = match urus_format::L2Entry::decode(raw, &qcow2.geometry) {
                Ok(
                    urus_format::L2Entry::Data { host, .. }
                    | urus_format::L2Entry::ZeroAllocated { host, .. },
                ) => host,
                // Compressed data is never written in place, and freeing it gives no metadata back (`Device::settle`);
                // invalid entries fail when they are used.
                _ => continue,
            };
            if let Some(owner) = owners.get(&qcow2.geometry.host_cluster(host).0) {
                return Err(Error::Corrupt {
                    file: layer.name.clone(),
                    what: format!(
                        "a guest cluster is mapped to {host}, which holds {}",
                        owner.describe()
                    ),
                    place: format!(
                        "L2 table {}, entry {}",
                        qcow2.map.table_of(slice),
                        qcow2.map.offset_in_table(slice) / qcow2.geometry.l2_entry_bytes()
                            + index as u64
                    ),
                });
            }
        }
        Ok(())
    }

    /// Takes up to `count` adjacent clusters to write into.
    pub(crate) async fn take_clusters(&self, count: u64) -> Result<Run> {
        loop {
            if let Some(run) = self.take_reserved(count) {
                return Ok(run);
            }
            let mut waited = false;
            let mine = poll_fn(|cx| {
                let mut reserving = self.reserving.borrow_mut();
                match reserving.as_mut() {
                    Some(waiters) => {
                        waiters.register(cx.waker());
                        waited = true;
                        Poll::Pending
                    }
                    None if waited => Poll::Ready(false),
                    None => {
                        *reserving = Some(WaitList::default());
                        Poll::Ready(true)
                    }
                }
            })
            .await;
            if !mine {
                continue;
            }
            let cluster_bytes = self
                .shared
                .geometry()
                .map_or(1, |geometry| geometry.cluster_bytes());
            let sizes = &self.shared.options.sizes;
            let want = (sizes.run_bytes / cluster_bytes)
                .clamp(1, sizes.run_clusters)
                .max(count);
            let result = self
                .shared
                .reserve(want)
                .receive()
                .await
                .unwrap_or(Err(Error::Closed));
            if let Ok(run) = result {
                self.current_runs().push(run);
            }
            let waiters = self.reserving.borrow_mut().take();
            for waker in waiters.map(|mut list| list.take()).unwrap_or_default() {
                waker.wake();
            }
            result?;
        }
    }

    fn take_reserved(&self, count: u64) -> Option<Run> {
        let mut runs = self.current_runs();
        let run = runs.last_mut()?;
        let taken = Run {
            count: count.min(run.count),
            ..*run
        };
        run.first += taken.count;
        run.count -= taken.count;
        if run.count == 0 {
            runs.pop();
        }
        Some(taken)
    }

    /// Puts back clusters that were taken and not written to.
    pub(crate) fn put_back(&self, run: Run) {
        if run.count > 0 {
            self.current_runs().push(run);
        }
    }

    /// Gives everything reserved back to the allocator.
    pub(crate) fn release_runs(&self) {
        for run in self.current_runs().drain(..) {
            self.shared.give_back(run);
        }
    }

    /// The reserved runs, less those of a generation that has passed.
    fn current_runs(&self) -> RefMut<'_, Vec<Run>> {
        let mut runs = self.runs.borrow_mut();
        let generation = self.shared.generation.load(Ordering::SeqCst);
        if self.runs_generation.replace(generation) != generation {
            runs.clear();
        }
        runs
    }

    /// fdatasync of the image. One that fails poisons the device, whoever asked for it (O11, O17): a repair and the opening after a pause too.
    pub(crate) async fn barrier(&self) -> Result<()> {
        Shared::count(&self.shared.stats.barriers, 1);
        // A failed sync is not tried again: what it covered is unknown (ordering.md, assumptions).
        match self.reactor.run(IMAGE, OpKind::SyncData).await {
            Ok(_) => Ok(()),
            Err(error) => {
                if !planted::is(Bug::NoPoison) {
                    self.shared.poisoned.store(true, Ordering::SeqCst);
                }
                Err(self.io_error("fdatasync", IMAGE, 0, 0, &error))
            }
        }
    }
}

/// Copies from `source` at `start` into all of `target`, where the shorter ends it.
pub(crate) fn copy<M: Memory>(source: &M, start: usize, target: &M) {
    let mut buffer = [0; 16 << 10];
    let total = target.len().min(source.len() - start);
    let mut done = 0;
    while done < total {
        let step = buffer.len().min(total - done);
        source.read(start + done, &mut buffer[..step]);
        target.write(done, &buffer[..step]);
        done += step;
    }
}

impl Owner {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1Table => "an L1 table",
            Self::L2Table => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::Snapshots => "the snapshot table",
        }
    }
}
