//! What every task needs, on whichever executor it runs: storage operations carried to their end, slices
//! brought into the cache, clusters to write into.

use std::cell::{Cell, RefCell, RefMut};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use crate::chain::{Chain, Layer, LayerId, Owners};
use crate::counters::HitCount;
use crate::error::{Error, Result};
use crate::file::{Ends, Files};
use crate::frames::{Install, NoCleanFrame};
use crate::hit::Direct;
use crate::image::Image;
use crate::map::SliceId;
use crate::planted::{self, Bug};
use crate::reactor::Reactor;
use crate::seen::{Way, note};
use crate::shared::{Run, Shared};
use crate::storage::{OpKind, Storage};
use crate::sync::{Arc, Ordering};
use crate::to_usize;
use crate::wake::{Flights, WaitList};

/// One thread's way to do the engine's work.
pub(crate) struct Worker<S: Storage> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) chain: Arc<Chain>,
    pub(crate) image: Arc<Image>,
    pub(crate) hits: HitCount,
    pub(crate) files: Files<S, Direct<S::Memory>>,
    /// Clusters reserved for this worker, and not used yet.
    runs: RefCell<Vec<Run>>,
    /// The device's generation when they were reserved.
    runs_generation: Cell<u64>,
    reserving: RefCell<Option<WaitList>>,
    /// Slices that a task of this worker reads just now: the others wait for it.
    loading: Flights<(LayerId, SliceId)>,
    /// Compressed clusters (layer, host offset) that a task of this worker decodes just now.
    pub(crate) decoding: Flights<(LayerId, u64)>,
}

impl<S: Storage> Worker<S> {
    /// The executor of this thread.
    #[inline]
    pub(crate) fn reactor(&self) -> &Reactor<S, Direct<S::Memory>> {
        &self.files.reactor
    }

    pub(crate) fn new(shared: Arc<Shared>, storage: S) -> Rc<Self> {
        Rc::new(Self {
            files: Files::new(storage, shared.file_facts()),
            hits: HitCount::new(Arc::clone(&shared)),
            chain: Arc::clone(&shared.chain),
            image: Arc::clone(&shared.image),
            shared,
            runs: RefCell::new(Vec::new()),
            runs_generation: Cell::new(0),
            reserving: RefCell::new(None),
            loading: Flights::default(),
            decoding: Flights::default(),
        })
    }

    /// Reserves room for a range of the image file, which grows where it is shorter.
    pub(crate) async fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        let kind = || OpKind::Allocate { offset, len };
        self.files
            .simple("allocate", self.image.file(), offset, len, kind)
            .await
    }

    /// Takes the room that metadata will need once a commit writes it. A full disk then refuses the request that needs it, and not the
    /// commit, which would let nobody go on: neither flushes nor the discards that could give room back.
    pub(crate) async fn take_room(&self, offset: u64, len: u64) -> Result<()> {
        if !self.files.properties(self.image.file()).regular {
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
    pub(crate) async fn load(&self, layer: &Layer, slice: SliceId) -> Result<()> {
        match self.loading.join((layer.id, slice)).await {
            None => Ok(()),
            Some(_flight) => self.load_alone(layer, slice).await,
        }
    }

    async fn load_alone(&self, layer: &Layer, slice: SliceId) -> Result<()> {
        let qcow2 = layer.qcow2().expect("only qcow2 layers have slices");
        let map = &qcow2.map;
        let table = map.table_of(slice);
        loop {
            // Where the slice lies, and the announcement of the read, belong together: a table that moves
            // between them would make the read one of another table.
            let (ticket, source) = {
                let mut meta = qcow2.meta.lock();
                if map.frame_of(slice).is_some() {
                    return Ok(());
                }
                let source = match layer.l1_entry(table)? {
                    None => return Ok(()),
                    Some(entry) => match meta.new_tables.get(&table) {
                        Some(new) => new.copy_from,
                        None => Some(entry.table.0),
                    },
                };
                (meta.frames.begin_load(slice), source)
            };
            let words = match source {
                None => Ok(vec![0; to_usize(map.slice_bytes() / 8)]),
                Some(offset) => self.read_slice(layer, slice, offset).await,
            };
            let outcome = {
                let mut meta = qcow2.meta.lock();
                let words = words.and_then(|words: Vec<u64>| {
                    check_slice(layer, &meta.owners, slice, &words)?;
                    Ok(words)
                });
                let outcome = meta.frames.end_load(
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
                Err(NoCleanFrame) => self.wait_for_frame().await?,
            }
        }
    }

    /// Reads a slice of the L2 table at a host offset.
    async fn read_slice(&self, layer: &Layer, slice: SliceId, offset: u64) -> Result<Vec<u64>> {
        Shared::count(&self.shared.stats.slice_loads, 1);
        let map = &layer.qcow2().expect("only qcow2 layers have slices").map;
        let place = offset + map.offset_in_table(slice);
        note(Way::LaterSliceRead, || map.is_later_slice(slice));
        let bytes = self
            .files
            .read_bytes(layer.file, place, map.slice_bytes())
            .await?;
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight")))
            .collect();
        // What lies past the end of the file reads as zeroes, and is no table.
        if words.iter().all(|word| *word == 0) && self.files.is_past_end(layer.file, offset) {
            return Err(Error::Corrupt {
                file: layer.name.clone(),
                what: format!("an L2 table at {offset:#x} lies past the end of the file"),
                place: format!("L1 table entry {}", map.table_of(slice)),
            });
        }
        Ok(words)
    }

    /// Waits until a commit has cleaned some frames.
    async fn wait_for_frame(&self) -> Result<()> {
        if self.shared.is_poisoned() {
            return Err(Error::Poisoned {
                file: self.shared.image_name().to_owned(),
            });
        }
        self.shared
            .request_flush()
            .receive()
            .await
            .unwrap_or(Err(Error::Closed))
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
        let generation = self.image.generation.load(Ordering::SeqCst);
        if self.runs_generation.replace(generation) != generation {
            runs.clear();
        }
        runs
    }

    /// fdatasync of the image. One that fails poisons the device, whoever asked for it (O11, O17): a repair and the opening after a pause too.
    pub(crate) async fn barrier(&self) -> Result<()> {
        Shared::count(&self.shared.stats.barriers, 1);
        // A failed sync is not tried again: what it covered is unknown (ordering.md, assumptions).
        match self.files.sync(self.image.file()).await {
            Ok(_) => Ok(()),
            Err(error) => {
                if !planted::is(Bug::NoPoison) {
                    self.image.poisoned.store(true, Ordering::SeqCst);
                }
                Err(self
                    .files
                    .error("fdatasync", self.image.file(), 0, 0, &error))
            }
        }
    }
}

/// Data entries of an image that is written must not lead into its metadata, or a guest's write would land there.
fn check_slice(layer: &Layer, owners: &Owners, slice: SliceId, words: &[u64]) -> Result<()> {
    if owners.is_empty() {
        return Ok(());
    }
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
