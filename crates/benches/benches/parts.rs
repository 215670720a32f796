//! What each part costs by itself: `cargo bench -p urus-benches --bench parts`. The engine's parts work on files in memory, so no time is
//! the kernel's, and a guest's bytes are never copied.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use urus_benches::disk::{CLUSTER_BYTES, DEPTH, Disk, new_file, read, write};
use urus_benches::hits::{Case, Hits};
use urus_benches::noise::{Places, half_noise};
use urus_engine::request::RequestKind;
use urus_engine::storage::Memory;
use urus_engine::{Options, limits, parts};
use urus_format::Compression;
use urus_format::compressed::{Decoder, encode};
use urus_ring::RingMemory;

const GIB: u64 = 1 << 30;
const BATCH: u64 = DEPTH as u64;
/// Guest bytes that a cached slice maps.
const SLICE_SPAN: u64 = limits::SLICE_BYTES / 8 * CLUSTER_BYTES;

/// The mapping alone, and whole requests that find everything in it.
fn hits(criterion: &mut Criterion) {
    let disk = mapped(GIB, Options::default());
    let shared = disk.shared();
    let mut places = Places::new(1, GIB);
    criterion.bench_function("look-up", |bench| {
        bench.iter(|| parts::look_up(&shared, places.next_place()).expect("cached"));
    });
    let mut group = criterion.benchmark_group("hit");
    group.throughput(Throughput::Elements(BATCH));
    for case in Case::ALL {
        let mut hits = Hits::new(case);
        group.bench_function(case.name(), |bench| bench.iter(|| hits.run(BATCH)));
    }
    group.finish();
}

/// A disk of which a part is mapped in every slice.
fn mapped(size: u64, options: Options) -> Disk {
    let file = new_file(size);
    let mut disk = Disk::open(std::slice::from_ref(&file), Options::default());
    disk.run((0..size / SLICE_SPAN).map(|slice| write(slice * SLICE_SPAN, 4096)));
    disk.close();
    let mut disk = Disk::open(&[file], options);
    disk.run((0..size / SLICE_SPAN).map(|slice| read(slice * SLICE_SPAN, 4096)));
    disk
}

/// Reads of which each needs a slice that is not cached.
fn slice_load(criterion: &mut Criterion) {
    let mut options = Options::default();
    options.l2_cache_bytes = 0;
    let slices = 4 * limits::MIN_FRAMES as u64;
    let mut disk = mapped(slices * SLICE_SPAN, options);
    let mut next = 0;
    criterion.bench_function("slice load", |bench| {
        bench.iter(|| {
            let before = disk.shared().counters().slice_loads;
            disk.run([read(next % slices * SLICE_SPAN, 4096)].into_iter());
            next += 1;
            assert_eq!(disk.shared().counters().slice_loads, before + 1);
        });
    });
}

/// Runs of clusters from the allocator, and writes to new clusters with everything that they take.
fn allocation(criterion: &mut Criterion) {
    /// Before a new image is begun: what was reserved is never given back.
    const RUNS: u64 = 4096;
    criterion.bench_function("reserve 64 clusters", |bench| {
        bench.iter_custom(|iterations| {
            let mut time = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                let mut disk = Disk::open(&[new_file(GIB)], Options::default());
                let now = left.min(RUNS);
                let start = Instant::now();
                for _ in 0..now {
                    let count = parts::reserve(disk.maintenance(), limits::RUN_CLUSTERS);
                    assert!(count.expect("there is room") > 0);
                }
                time += start.elapsed();
                left -= now;
            }
            time
        });
    });
    let mut group = criterion.benchmark_group("allocating write");
    group.throughput(Throughput::Elements(BATCH));
    group.bench_function("4 KiB", |bench| {
        bench.iter_custom(|iterations| {
            let mut time = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                let mut disk = Disk::open(&[new_file(GIB)], Options::default());
                let now = left.min(GIB / CLUSTER_BYTES / BATCH);
                let start = Instant::now();
                disk.run((0..now * BATCH).map(|number| write(number * CLUSTER_BYTES, 4096)));
                time += start.elapsed();
                left -= now;
            }
            time
        });
    });
    group.finish();
}

/// Flushes after so many slices have changed.
fn commit(criterion: &mut Criterion) {
    for slices in [1, 16] {
        let mut disk = mapped(16 * SLICE_SPAN, Options::default());
        let mut turn = 0;
        criterion.bench_function(&format!("commit of {slices} changed slices"), |bench| {
            bench.iter_custom(|iterations| {
                let mut time = Duration::ZERO;
                for _ in 0..iterations {
                    // Zeroes and data in turn: each changes the entry and nothing else.
                    disk.run((0..slices).map(|slice| {
                        if turn % 2 == 0 {
                            zeroes(slice * SLICE_SPAN)
                        } else {
                            write(slice * SLICE_SPAN, 4096)
                        }
                    }));
                    turn += 1;
                    let start = Instant::now();
                    disk.run([RequestKind::Flush].into_iter());
                    time += start.elapsed();
                }
                time
            });
        });
    }
}

fn zeroes(offset: u64) -> RequestKind<urus_benches::memory::Bytes> {
    RequestKind::WriteZeroes {
        offset,
        len: CLUSTER_BYTES,
        unmap: false,
        fua: false,
    }
}

/// A request over several places of the file, and a guest's scattered memory.
fn splitting(criterion: &mut Criterion) {
    let pieces = limits::DIRECT_PIECES as u64;
    let mut disk = Disk::open(&[new_file(GIB)], Options::default());
    // From the last to the first: so no two lie side by side in the file.
    for cluster in (0..pieces).rev() {
        disk.run([write(cluster * CLUSTER_BYTES, 4096)].into_iter());
    }
    let len = usize::try_from(pieces * CLUSTER_BYTES).expect("half a MiB");
    criterion.bench_function("read of 8 places in the file", |bench| {
        bench.iter(|| disk.hits(1, [read(0, len)].into_iter()));
    });
    let scattered = RingMemory::chain((0..64).map(|_| RingMemory::new(4096)).collect());
    criterion.bench_function("part of 16 of 64 pieces of memory", |bench| {
        bench.iter(|| {
            let part = scattered.slice(100_000, 64 << 10);
            assert_eq!(part.len(), 64 << 10);
            part
        });
    });
    criterion.bench_function("alignment of 64 pieces of memory", |bench| {
        bench.iter(|| assert!(scattered.is_aligned(512)));
    });
}

/// Decoding a cluster.
fn inflate(criterion: &mut Criterion) {
    let cluster = half_noise(usize::try_from(CLUSTER_BYTES).expect("64 KiB"));
    let mut group = criterion.benchmark_group("inflate 64 KiB");
    group.throughput(Throughput::Bytes(CLUSTER_BYTES));
    for (name, compression) in [("zlib", Compression::Deflate), ("zstd", Compression::Zstd)] {
        let packed = encode(compression, &cluster, cluster.len()).expect("half of it is text");
        let (mut decoder, mut out) = (Decoder::new(), vec![0; cluster.len()]);
        // Not after the bench, which may have been told to do nothing.
        let decoded = decoder.decode(compression, &packed, &mut out);
        assert!(decoded.is_ok() && out == cluster, "{name}");
        group.bench_function(name, |bench| {
            bench.iter(|| {
                decoder
                    .decode(compression, &packed, &mut out)
                    .expect("as it was encoded");
            });
        });
    }
    group.finish();
}

criterion_group!(
    benches, hits, slice_load, allocation, commit, splitting, inflate
);
criterion_main!(benches);
