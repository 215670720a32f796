//! urus and QEMU on the same image, in turn: for every cluster size and every refcount width, what one writes the other
//! reads, and `qemu-img check` finds nothing, not even a leak.
//!
//! Guards against geometry that was only thought of for 64 KiB clusters and 16-bit refcounts: entries smaller than a
//! byte, refcount blocks that cover less than they take, L1 tables of many clusters, a last cluster that is cut short.
//! The two drivers take turns through the matrix. A script is random but always the same one for the same cell.

use urus_tests::script::{self, Model};
use urus_tests::{Driver, KIB, MIB, Scratch, Served, qemu, urus};

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cluster_bits: u32,
    refcount_order: u32,
    version: u32,
}

impl Shape {
    /// What `-o` takes.
    fn options(self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let (cluster, width) = (self.cluster(), 1_u64 << self.refcount_order);
        format!("compat={compat},cluster_size={cluster},refcount_bits={width}")
    }

    fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Several L2 tables where clusters are small, some clusters where they are large, and a tail that fills no
    /// cluster.
    fn size(self) -> u64 {
        (self.cluster() * 80).clamp(3 * MIB, 24 * MIB) + 3 * 512
    }

    fn seed(self) -> u64 {
        u64::from(self.version * 10_000 + self.cluster_bits * 100 + self.refcount_order)
    }

    fn driver(self) -> Driver {
        Driver::ALL[usize::from(
            (self.cluster_bits + self.refcount_order + self.version).is_multiple_of(2),
        )]
    }

    fn script(self, turn: u64) -> Vec<script::Step> {
        script::random(self.seed() * 8 + turn, self.size(), self.cluster(), 60)
    }
}

/// The refcount widths of version 3 and the only one of version 2, for one cluster size.
fn shapes(cluster_bits: u32) -> impl Iterator<Item = Shape> {
    let version_3 = (0..=6).map(move |refcount_order| Shape {
        cluster_bits,
        refcount_order,
        version: 3,
    });
    version_3.chain([Shape {
        cluster_bits,
        refcount_order: 4,
        version: 2,
    }])
}

/// Of those that can count to two, every third one, so that neighbouring cluster sizes have different ones. (One bit
/// cannot count the active table and a snapshot: QEMU makes no snapshots in such images either.)
fn some_shapes(cluster_bits: u32) -> impl Iterator<Item = Shape> {
    shapes(cluster_bits).filter(|shape| {
        shape.refcount_order > 0
            && (shape.refcount_order + shape.cluster_bits + shape.version) % 3 == 0
    })
}

/// QEMU creates, urus writes over NBD, QEMU checks and reads; QEMU writes more, urus reads.
fn qemu_creates(shape: Shape) {
    let scratch = Scratch::new();
    let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
    qemu::create(&image, &shape.options(), shape.size());
    let mut model = Model::zeroes(shape.size());

    let steps = shape.script(1);
    let served = Served::start(&image, shape.driver());
    served.qemu_io(&script::commands(&steps));
    model.follow(&steps);
    served.copy_out(&raw);
    model.assert_equals_file(&raw, &format!("{shape:?}: read by urus, while it serves"));
    served.stop();
    qemu::assert_clean(&image);
    qemu::convert_to_raw(&image, &raw);
    model.assert_equals_file(&raw, &format!("{shape:?}: written by urus, read by QEMU"));

    let steps = shape.script(2);
    qemu::io_file(&image, &script::commands(&steps));
    model.follow(&steps);
    let served = Served::start(&image, shape.driver());
    served.copy_out(&raw);
    served.stop();
    model.assert_equals_file(&raw, &format!("{shape:?}: written by QEMU, read by urus"));
    qemu::assert_clean(&image);
}

/// urus creates, QEMU writes and checks, urus reads, checks and writes, QEMU reads.
fn urus_creates(shape: Shape) {
    let scratch = Scratch::new();
    let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
    let size = shape.size();
    urus()
        .words("create -f qcow2 -o")
        .arg(shape.options())
        .arg(&image)
        .arg(size.to_string())
        .ok();
    qemu::assert_clean(&image);
    let info = qemu::info(&image);
    assert_eq!(info["virtual-size"], size, "{shape:?}");
    assert_eq!(info["cluster-size"], shape.cluster(), "{shape:?}");
    if shape.version == 3 {
        assert_eq!(
            info["format-specific"]["data"]["refcount-bits"],
            1 << shape.refcount_order,
            "{shape:?}"
        );
    }
    let mut model = Model::zeroes(size);

    let steps = shape.script(3);
    qemu::io_file(&image, &script::commands(&steps));
    model.follow(&steps);
    urus().words("check -f qcow2").arg(&image).ok();
    let served = Served::start(&image, shape.driver());
    served.copy_out(&raw);
    model.assert_equals_file(
        &raw,
        &format!("{shape:?}: created by urus, written by QEMU, read by urus"),
    );
    let steps = shape.script(4);
    served.qemu_io(&script::commands(&steps));
    served.stop();
    model.follow(&steps);
    urus().words("check -f qcow2").arg(&image).ok();
    qemu::assert_clean(&image);
    qemu::convert_to_raw(&image, &raw);
    model.assert_equals_file(
        &raw,
        &format!("{shape:?}: created and written by urus, read by QEMU"),
    );
}

macro_rules! every_cluster_size {
    ($($name:ident: $bits:literal,)*) => {
        mod qemu_creates_urus_writes { $(
            #[test]
            fn $name() {
                super::shapes($bits).for_each(super::qemu_creates);
            }
        )* }
        mod urus_creates_qemu_writes { $(
            #[test]
            fn $name() {
                super::shapes($bits).for_each(super::urus_creates);
            }
        )* }
        mod over_a_backing_file { $(
            #[test]
            fn $name() {
                super::over_a_backing_file($bits);
            }
        )* }
        mod internal_snapshot { $(
            #[test]
            fn $name() {
                super::some_shapes($bits).for_each(super::internal_snapshot_survives);
            }
        )* }
    };
}

every_cluster_size! {
    clusters_512: 9,
    clusters_1k: 10,
    clusters_2k: 11,
    clusters_4k: 12,
    clusters_8k: 13,
    clusters_16k: 14,
    clusters_32k: 15,
    clusters_64k: 16,
    clusters_128k: 17,
    clusters_256k: 18,
    clusters_512k: 19,
    clusters_1m: 20,
    clusters_2m: 21,
}

/// An overlay whose backing file has another cluster size and another length: shorter in one case, longer in the
/// other, and ending in the middle of a cluster of both.
fn over_a_backing_file(cluster_bits: u32) {
    for (turn, longer) in [false, true].into_iter().enumerate() {
        let shape = Shape {
            cluster_bits,
            refcount_order: 4,
            version: 3,
        };
        let scratch = Scratch::new();
        let (base, top, raw) = (
            scratch.file("base.qcow2"),
            scratch.file("top.qcow2"),
            scratch.file("raw"),
        );
        let base_size = if longer {
            shape.size() + MIB
        } else {
            shape.size() / 3 / 512 * 512
        };
        // The backing file's clusters are 4 KiB to 64 KiB where the overlay's are large, and the other way round.
        let base_cluster = if cluster_bits > 14 { 4 * KIB } else { 64 * KIB };
        qemu::create(&base, &format!("cluster_size={base_cluster}"), base_size);
        let steps = script::random(shape.seed(), base_size, base_cluster, 40);
        // What the base holds where it was discarded is its own business; the model needs certainty.
        let steps: Vec<_> = steps
            .into_iter()
            .filter(|step| !matches!(step, script::Step::Discard(..)))
            .collect();
        qemu::io_file(&base, &script::commands(&steps));
        let mut whole = Model::zeroes(base_size.max(shape.size()));
        whole.follow(&steps);
        let visible = usize::try_from(shape.size()).expect("a small image");
        let mut model = Model::holding(whole.bytes()[..visible].to_vec());

        qemu::create(&top, &shape.options(), shape.size());
        qemu::img("rebase -u -f qcow2 -F qcow2 -b base.qcow2")
            .arg(&top)
            .ok();
        let before = std::fs::read(&base).expect("reading the base");
        let served = Served::start(&top, Driver::alternating(turn));
        served.copy_out(&raw);
        model.assert_equals_file(
            &raw,
            &format!("{shape:?}, longer base {longer}: before any write"),
        );
        let steps = shape.script(5);
        served.qemu_io(&script::commands(&steps));
        model.follow(&steps);
        served.copy_out(&raw);
        served.stop();
        model.assert_equals_file(
            &raw,
            &format!("{shape:?}, longer base {longer}: read by urus"),
        );
        qemu::assert_clean(&top);
        qemu::convert_to_raw(&top, &raw);
        model.assert_equals_file(
            &raw,
            &format!("{shape:?}, longer base {longer}: read by QEMU"),
        );
        assert!(
            before == std::fs::read(&base).expect("reading the base"),
            "{shape:?}: the base was changed"
        );
    }
}

/// A snapshot that qemu-img made must still hold what it held after urus has written over everything it shares.
fn internal_snapshot_survives(shape: Shape) {
    let scratch = Scratch::new();
    let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
    qemu::create(&image, &shape.options(), shape.size());
    let mut then = Model::zeroes(shape.size());
    let steps = shape.script(6);
    qemu::io_file(&image, &script::commands(&steps));
    then.follow(&steps);
    qemu::img("snapshot -c then").arg(&image).ok();

    let mut now = then.clone();
    let steps = shape.script(7);
    let served = Served::start(&image, shape.driver());
    served.qemu_io(&script::commands(&steps));
    served.stop();
    now.follow(&steps);
    qemu::assert_clean(&image);
    qemu::convert_to_raw(&image, &raw);
    now.assert_equals_file(&raw, &format!("{shape:?}: the active state"));
    qemu::img("convert -f qcow2 -O raw -l then")
        .arg(&image)
        .arg(&raw)
        .ok();
    then.assert_equals_file(&raw, &format!("{shape:?}: the snapshot"));

    qemu::img("snapshot -a then").arg(&image).ok();
    qemu::assert_clean(&image);
    let served = Served::start(&image, shape.driver());
    served.copy_out(&raw);
    served.stop();
    then.assert_equals_file(
        &raw,
        &format!("{shape:?}: the snapshot, applied by QEMU, read by urus"),
    );
}
