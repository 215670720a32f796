//! Opening: from headers and files to a device whose mapping can be looked up. Reads L1 and the refcount table, nothing else of
//! the metadata: the cost is that of the tables that stay in memory.

use std::rc::Rc;

use urus_format::{
    Geometry, Header, HeaderChange, HostOffset, L1Entry, autoclear, incompatible, snapshot,
};

use crate::alloc::{Allocator, TablePlace};
use crate::chain::{
    Chain, Layer, LayerFormat, LayerId, LayerKind, LayerSpec, Meta, Owner, Owners, Qcow2Layer,
};
use crate::check::{self, CheckReport, Repair};
use crate::counters::Stats;
use crate::decoded::DecodedCache;
use crate::errno::EIO;
use crate::error::{Error, Result};
use crate::frames::Frames;
use crate::gate::Gate;
use crate::header;
use crate::image::Image;
use crate::limits::{self, Sizes};
use crate::maintenance::ImageState;
use crate::map::Map;
use crate::pins::Pins;
use crate::planted::{self, Bug};
use crate::refcounts::Refcounts;
use crate::shared::{Mail, Options, Shared};
use crate::storage::{FileId, Storage};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering};
use crate::to_usize;
use crate::worker::Worker;

type Opened<S> = (Rc<Worker<S>>, Option<ImageState>);

/// Opens the chain.
pub(crate) fn open<S: Storage>(
    storage: S,
    specs: Vec<LayerSpec>,
    options: Options,
) -> Result<Opened<S>> {
    let is_raw = |spec: &LayerSpec| matches!(spec.format, LayerFormat::Raw);
    if options.hooks.transform.is_some()
        && let Some(image) = specs.first().filter(|spec| is_raw(spec))
    {
        return Err(Error::Unsupported {
            what: format!(
                "{}: a raw image has no place that says that its data passes a cipher",
                image.name
            ),
        });
    }
    // Raw files have no tables to cache.
    let mapped = |spec: &&LayerSpec| matches!(spec.format, LayerFormat::Qcow2(_));
    let sharers = specs.iter().filter(mapped).count().max(1);
    let frame_budget = options.l2_cache_bytes / sharers as u64;
    let mut ids = (0..).map(LayerId);
    let mut make = |spec, image: Option<bool>| {
        let id = ids.next().expect("chains are short");
        layer_of(id, spec, &storage, image, frame_budget, options.sizes)
    };
    let mut specs = specs.into_iter();
    let image = specs.next().expect("a chain has a layer");
    let (image, header) = make(image, Some(!options.read_only))?;
    let backing = specs.map(|spec| make(spec, None));
    let backing = backing.collect::<Result<Vec<_>>>()?;
    let (below, below_headers): (Vec<_>, Vec<_>) = backing.into_iter().unzip();
    let shared = share(image, below, options);
    let worker = Worker::new(shared, storage);
    let opener = Rc::clone(&worker);
    let image = worker.reactor().block_on(async move {
        let image = match header {
            None => None,
            Some(mut header) => {
                repair_as_told(&opener, &mut header).await?;
                let image = open_image(&opener, (*header).clone()).await?;
                count_leaks(&opener, &header).await;
                image
            }
        };
        let beneath = opener.shared.chain.layers().skip(1);
        for (layer, header) in beneath.zip(below_headers) {
            if let Some(header) = header {
                load_l1(&opener, layer, &header).await?;
            }
        }
        Ok(image)
    })?;
    Ok((worker, image))
}

/// A device whose image is this, above these layers.
pub(crate) fn share(image: Layer, below: Vec<Layer>, options: Options) -> Arc<Shared> {
    let top = Arc::new(image);
    let below = below.into_iter().map(Arc::new).collect();
    Arc::new(Shared {
        image: Arc::new(Image::new(Arc::clone(&top))),
        chain: Arc::new(Chain::new(top, below, options.sizes.skips)),
        pins: Arc::new(Pins::new()),
        mail: Mutex::new(Mail::default()),
        decoded: DecodedCache::new(options.sizes.decoded_bytes),
        gate: Gate::new(),
        closed: AtomicBool::new(false),
        cut_short: AtomicBool::new(false),
        stats: Stats::default(),
        found: Mutex::new(None),
        options,
    })
}

/// Checks a qcow2 image that nobody has open, and repairs it as told. `header` is the header on disk; a repair
/// keeps it so. Backing files are not looked at. Waits for I/O.
///
/// # Errors
/// As the module [`check`](mod@crate::check) says: features that the check does not know, failed writes.
pub fn check_image<S: Storage>(
    storage: S,
    file: FileId,
    name: String,
    header: Header,
    repair: Repair,
) -> Result<CheckReport> {
    let options = Options {
        read_only: repair == Repair::None,
        ..Options::default()
    };
    let worker = file_of_bytes(storage, file, name, options)?;
    let checker = Rc::clone(&worker);
    let mut header = header;
    worker
        .reactor()
        .block_on(async move { check::check(&checker, &mut header, repair).await })
}

/// A file as it is, whatever it holds, for whoever knows better than a device what its bytes mean.
pub(crate) fn file_of_bytes<S: Storage>(
    storage: S,
    file: FileId,
    name: String,
    options: Options,
) -> Result<Rc<Worker<S>>> {
    let spec = LayerSpec {
        file,
        name,
        format: LayerFormat::Raw,
    };
    let (layer, _) = layer_of(LayerId(0), spec, &storage, None, 0, options.sizes)?;
    Ok(Worker::new(share(layer, Vec::new(), options), storage))
}

/// `image`: the layer is the chain's top, and whether it is written.
fn layer_of<S: Storage>(
    id: LayerId,
    spec: LayerSpec,
    storage: &S,
    image: Option<bool>,
    frame_budget: u64,
    mut sizes: Sizes,
) -> Result<(Layer, Option<Box<Header>>)> {
    let LayerSpec { file, name, format } = spec;
    match format {
        LayerFormat::Raw => {
            let size = storage.file_len(file).map_err(|error| Error::Io {
                operation: "find the length",
                file: name.clone(),
                offset: 0,
                bytes: 0,
                errno: error.raw_os_error().unwrap_or(EIO),
            })?;
            // Whole sectors, as QEMU has it: what the file does not have of the last one reads as
            // zeroes.
            let size = match size.checked_next_multiple_of(limits::SECTOR_BYTES) {
                Some(whole) if !planted::is(Bug::OddEndCutOff) => whole,
                _ => size - size % limits::SECTOR_BYTES,
            };
            let layer = Layer {
                id,
                file,
                name,
                size: AtomicU64::new(size),
                kind: LayerKind::Raw,
            };
            Ok((layer, None))
        }
        LayerFormat::Qcow2(header) => {
            let format_error = |source| Error::Format {
                file: name.clone(),
                source,
            };
            let writable = image.unwrap_or(false);
            header.check_supported(writable).map_err(format_error)?;
            let geometry = header.geometry();
            let alignment = u64::from(storage.properties(file).alignment);
            if alignment > geometry.cluster_bytes() {
                return Err(Error::Unsupported {
                    what: format!(
                        "{name}: clusters of {} bytes are smaller than the {alignment} bytes that direct I/O needs \
                         here; use buffered I/O",
                        geometry.cluster_bytes()
                    ),
                });
            }
            // A slice is read and written by itself.
            sizes.slice_bytes = sizes
                .slice_bytes
                .clamp(alignment, geometry.cluster_bytes().max(alignment));
            let max_frames = to_usize(frame_budget / sizes.slice_bytes).max(sizes.min_frames);
            let tables = u64::from(header.l1_entries);
            // The image may grow here, and in a pause by another process, also where it is only read.
            let max_tables = if image.is_some() {
                limits::L1_TABLE_BYTES / 8
            } else {
                tables
            };
            let kind = LayerKind::Qcow2(Qcow2Layer {
                geometry,
                compression: header.compression,
                map: Map::new(geometry, (tables, max_tables), max_frames, &sizes),
                meta: Mutex::new(Meta {
                    frames: Frames::new(max_frames, sizes.dirty_slices),
                    ..Meta::default()
                }),
            });
            let layer = Layer {
                id,
                file,
                name,
                size: AtomicU64::new(header.disk_bytes()),
                kind,
            };
            Ok((layer, Some(header)))
        }
    }
}

async fn open_image<S: Storage>(
    worker: &Rc<Worker<S>>,
    mut header: Header,
) -> Result<Option<ImageState>> {
    let writable = !worker.shared.read_only();
    // O11: once a sync has failed nothing more is written, also where the image is read again after a pause.
    let mends = writable && !worker.shared.is_poisoned();
    if mends && !planted::is(Bug::TrustsThePageCache) {
        // O29: whoever had the image before may have been killed. What it wrote last is read back, and need not be durable yet.
        worker.barrier().await?;
    }
    if mends && header.incompatible & incompatible::DIRTY != 0 {
        tracing::warn!(
            image = worker.shared.image_name(),
            "the image was not closed: repairing its refcounts"
        );
        // O22: before the first allocation.
        // On the heap: few images are dirty, and its future is many times as large as that of the rest.
        Box::pin(check::repair_dirty(worker, &mut header)).await?;
    }
    load_l1(worker, &worker.image.layer, &header).await?;
    if !writable {
        // A snapshot table that cannot be right is refused whether it is needed or not.
        if header.snapshot_count > 0 {
            read_snapshots(worker, &header).await?;
        }
        return Ok(None);
    }
    let image = writable_state(worker, &mut header).await?;
    if mends {
        clear_unknown_autoclear(worker, &image).await?;
    }
    Ok(Some(image))
}

/// Repairs what the user wants repaired, before the first allocation (O22). What cannot be repaired is left to opening to judge.
async fn repair_as_told<S: Storage>(worker: &Rc<Worker<S>>, header: &mut Header) -> Result<()> {
    let options = &worker.shared.options;
    if options.read_only || options.repair == Repair::None {
        return Ok(());
    }
    let report = Box::pin(check::check(worker, header, options.repair)).await?;
    *worker.shared.found.lock() = Some(report);
    Ok(())
}

/// Looks for leaked clusters where that is a matter of few tables. Nothing depends on it: what cannot be read is judged where it is
/// needed.
async fn count_leaks<S: Storage>(worker: &Rc<Worker<S>>, header: &Header) {
    let options = &worker.shared.options;
    if options.read_only || !options.count_leaks || worker.shared.found.lock().is_some() {
        return;
    }
    let report = Box::pin(check::check_few_tables(worker, header)).await;
    *worker.shared.found.lock() = report;
}

/// Reads the metadata again after a pause in which somebody else may have written the image.
pub(crate) async fn reload<S: Storage>(
    worker: &Rc<Worker<S>>,
    header: Header,
) -> Result<Option<ImageState>> {
    let shared = &worker.shared;
    let Some(image) = worker.image.layer.qcow2() else {
        return Ok(None);
    };
    let file = shared.image_name().to_owned();
    header
        .check_supported(!shared.read_only())
        .map_err(|source| Error::Format {
            file: file.clone(),
            source,
        })?;
    if header.geometry() != image.geometry || header.compression != image.compression {
        return Err(Error::Unsupported {
            what: format!(
                "{file} became another image while it was paused: its cluster size or format differs; reopen it"
            ),
        });
    }
    {
        let mut meta = image.meta.lock();
        meta.frames.forget_clean(&image.map);
        meta.owners.clear();
        for index in 0..image.map.max_tables() {
            if image.map.l1(index) != 0 {
                image.map.set_l1(index, 0);
            }
        }
    }
    if !planted::is(Bug::KeepsDecoded) {
        shared.decoded.clear();
    }
    if !planted::is(Bug::KeepsReserved) {
        worker.image.generation.fetch_add(1, Ordering::SeqCst);
    }
    shared.mail.lock().given_back.clear();
    let size = &worker.image.layer.size;
    size.store(header.disk_bytes(), Ordering::Release);
    open_image(worker, header).await
}

/// Reads the active L1 table of a layer into its map.
async fn load_l1<S: Storage>(worker: &Worker<S>, layer: &Layer, header: &Header) -> Result<()> {
    let qcow2 = layer.qcow2().expect("only qcow2 layers have a header");
    let map = &qcow2.map;
    if header.l1_entries == 0 {
        return Ok(());
    }
    let bytes = worker
        .files
        .read_bytes(
            layer.file,
            header.l1_table.0,
            u64::from(header.l1_entries) * 8,
        )
        .await?;
    for (index, entry) in bytes.chunks_exact(8).enumerate() {
        let raw = u64::from_be_bytes(entry.try_into().expect("chunks of eight"));
        // An entry of flags alone names no table. One that makes no sense is told when it is
        // needed.
        if L1Entry::decode(raw, &qcow2.geometry) != Ok(None) {
            map.set_l1(index as u64, raw);
        }
    }
    Ok(())
}

/// What writing needs: refcounts, allocator, and who owns which metadata cluster.
async fn writable_state<S: Storage>(
    worker: &Rc<Worker<S>>,
    header: &mut Header,
) -> Result<ImageState> {
    let geometry = header.geometry();
    let table_bytes = u64::from(header.refcount_table_clusters) << geometry.cluster_bits();
    let bytes = worker
        .files
        .read_bytes(worker.image.file(), header.refcount_table.0, table_bytes)
        .await?;
    let mut table: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|entry| u64::from_be_bytes(entry.try_into().expect("chunks of eight")))
        .collect();
    while table.last() == Some(&0) {
        table.pop();
    }
    let owners = collect_owners(worker, header, &geometry, &table).await?;
    worker.image.qcow2().meta.lock().owners = owners;
    let options = &worker.shared.options;
    let alignment = u64::from(worker.files.properties(worker.image.file()).alignment);
    let slice_bytes = options.sizes.refcount_slice_bytes.max(alignment);
    let refcounts = Refcounts::new(geometry, table, options.refcount_cache_slices, slice_bytes);
    let place = TablePlace {
        offset: header.refcount_table.0,
        clusters: u64::from(header.refcount_table_clusters),
    };
    let file_bytes = worker.files.length(worker.image.file())?;
    let regular = worker.files.properties(worker.image.file()).regular;
    let allocator = Allocator::new(refcounts, place, file_bytes, regular);
    Ok(ImageState {
        header: std::cell::RefCell::new(header.clone()),
        allocator,
        uncounted: Default::default(),
    })
}

/// Every metadata cluster with its owner; two owners for one cluster are corruption.
async fn collect_owners<S: Storage>(
    worker: &Rc<Worker<S>>,
    header: &Header,
    geometry: &Geometry,
    refcount_table: &[u64],
) -> Result<Owners> {
    let name = worker.shared.image_name();
    let mut owners = Owners::default();
    let file_bytes = worker.files.length(worker.image.file())?;
    let mut claim = |offset: u64, bytes: u64, owner: Owner, place: &dyn Fn() -> String| {
        if bytes > 0 && offset >= file_bytes {
            return Err(Error::Corrupt {
                file: name.to_owned(),
                what: format!(
                    "{} at {offset:#x} lies past the end of the file",
                    owner.describe()
                ),
                place: place(),
            });
        }
        let first = geometry.host_cluster(HostOffset(offset)).0;
        for cluster in first..first + geometry.clusters_for(bytes) {
            if let Some(other) = owners.insert(cluster, owner) {
                return Err(Error::Corrupt {
                    file: name.to_owned(),
                    what: format!(
                        "host cluster {cluster} holds {} and {}",
                        other.describe(),
                        owner.describe()
                    ),
                    place: place(),
                });
            }
        }
        Ok(())
    };
    claim(0, geometry.cluster_bytes(), Owner::Header, &|| {
        "the header".to_owned()
    })?;
    claim(
        header.l1_table.0,
        u64::from(header.l1_entries) * 8,
        Owner::L1Table,
        &|| "the header's L1 table".to_owned(),
    )?;
    let table_bytes = u64::from(header.refcount_table_clusters) << geometry.cluster_bits();
    claim(
        header.refcount_table.0,
        table_bytes,
        Owner::RefcountTable,
        &|| "the header's refcount table".to_owned(),
    )?;
    for (index, entry) in refcount_table.iter().enumerate() {
        let offset = entry & !0x1ff;
        let place = || format!("refcount table entry {index}");
        if geometry.in_cluster(offset) != 0 || entry & 0x1ff != 0 {
            return Err(Error::Corrupt {
                file: name.to_owned(),
                what: format!("refcount block offset {entry:#x} is invalid"),
                place: place(),
            });
        }
        if offset != 0 {
            claim(
                offset,
                geometry.cluster_bytes(),
                Owner::RefcountBlock,
                &place,
            )?;
        }
    }
    let map = &worker.image.qcow2().map;
    for index in 0..u64::from(header.l1_entries) {
        let place = || format!("L1 table entry {index}");
        let entry = L1Entry::decode(map.l1(index), geometry).map_err(|entry| Error::BadEntry {
            file: name.to_owned(),
            table: "L1 table, entry",
            index,
            entry,
        })?;
        if let Some(entry) = entry {
            claim(
                entry.table.0,
                geometry.cluster_bytes(),
                Owner::L2Table,
                &place,
            )?;
        }
    }
    if header.snapshot_count > 0 {
        let mut table = read_snapshots(worker, header).await?;
        if planted::is(Bug::OwnSnapshotTable)
            && let Ok(own) = snapshot::encode_table(&table.snapshots)
        {
            table.bytes = own.len() as u64;
        }
        claim(
            header.snapshot_table.0,
            table.bytes,
            Owner::Snapshots,
            &|| "the header's snapshot table".to_owned(),
        )?;
        for (index, snapshot) in table.snapshots.iter().enumerate() {
            snapshot
                .check_l1(geometry)
                .map_err(|source| Error::Format {
                    file: name.to_owned(),
                    source,
                })?;
            let place = || format!("L1 table of snapshot {index}");
            claim(
                snapshot.l1_table.0,
                u64::from(snapshot.l1_entries) * 8,
                Owner::L1Table,
                &place,
            )?;
        }
    }
    Ok(owners)
}

/// The snapshot table as it is on disk.
pub(crate) struct SnapshotTable {
    pub(crate) snapshots: Vec<snapshot::Snapshot>,
    /// Its length there: entries of other programs may be shorter or longer than those written here
    /// (O28).
    bytes: u64,
}

/// Reads the snapshot table, no more of it than there is.
pub(crate) async fn read_snapshots<S: Storage>(
    worker: &Worker<S>,
    header: &Header,
) -> Result<SnapshotTable> {
    let file = worker.shared.image_name();
    let format_error = |source| Error::Format {
        file: file.to_owned(),
        source,
    };
    let file_bytes = worker.files.length(worker.image.file())?;
    let rest = file_bytes.saturating_sub(header.snapshot_table.0);
    let mut step = 4096.min(rest);
    loop {
        let bytes = worker
            .files
            .read_bytes(worker.image.file(), header.snapshot_table.0, step)
            .await?;
        match snapshot::table_bytes(&bytes, header.snapshot_count).map_err(format_error)? {
            snapshot::TableBytes::Exactly(table_bytes) => {
                let snapshots =
                    snapshot::parse_table(&bytes, header.snapshot_count).map_err(format_error)?;
                return Ok(SnapshotTable {
                    snapshots,
                    bytes: table_bytes,
                });
            }
            snapshot::TableBytes::AtLeast(need_bytes) if need_bytes > rest => {
                let source = urus_format::Error::Truncated {
                    structure: "the snapshot table",
                    need_bytes,
                    have_bytes: rest,
                };
                return Err(format_error(source));
            }
            snapshot::TableBytes::AtLeast(bytes) => step = bytes.max(step * 2).min(rest),
        }
    }
}

/// Unknown autoclear bits promise something that this writer does not keep. Cleared only now, when the open is
/// known to succeed.
async fn clear_unknown_autoclear<S: Storage>(worker: &Worker<S>, image: &ImageState) -> Result<()> {
    let known = image.header.borrow().autoclear & autoclear::KNOWN;
    if image.header.borrow().autoclear == known {
        return Ok(());
    }
    // O28: nothing else of the header changes.
    let before = worker.read_header_sector().await?;
    let changes = [HeaderChange::Autoclear(known)];
    let name = worker.shared.image_name();
    let (after, header) = header::patch(name, &image.header.borrow(), &changes, &before)?;
    worker
        .files
        .write_bytes(worker.image.file(), 0, &after)
        .await?;
    worker.barrier().await?;
    *image.header.borrow_mut() = header;
    Ok(())
}
