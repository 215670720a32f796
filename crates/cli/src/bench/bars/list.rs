//! The bars by number and name.

use urus::CacheMode::{None as Direct, Writeback as Buffered};

use super::super::images::{Kind, Missing};
use super::super::writes;
use super::report::{Asked, Measured};
use super::{
    Bench, Pages, allocation, barriers, compressed, lookups, misses, nbd, opening, overwrites,
    reads,
};

/// One thing that is asked for.
pub(super) struct Bar {
    /// P1 to P16.
    pub(super) id: &'static str,
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) asked: Asked,
    pub(super) measure: fn(&mut Bench<'_>) -> Result<Measured, Missing>,
}

const PEERS: &str =
    "measured by `cargo run --release --manifest-path crates/bench-compare/Cargo.toml`";
const VHOST_USER: &str = "measured by `cargo run --release -p urus-vhost-user --example compare -- --start target/release/urus IMAGE`";
const LOOK_UP: &str =
    "the look-up alone is measured by `cargo bench`; this is what one adds to a request";
const CONVERT: &str = "waits for the convert command";

/// A bar that something else measures.
fn elsewhere(why: &str) -> Result<Measured, Missing> {
    Err(Missing::Program(why.to_owned()))
}

macro_rules! bars {
    ($($id:ident $name:ident $asked:expr, $what:expr, $measure:expr;)*) => {
        &[$(Bar {
            id: stringify!($id),
            name: stringify!($name),
            what: $what,
            asked: $asked,
            measure: $measure,
        }),*]
    };
}

use Asked::{AtLeast, AtMost, Nothing};

pub(super) const BARS: &[Bar] = bars! {
    P1 direct_random_read AtLeast(0.97), "4 KiB random reads, O_DIRECT, 32 in flight, beside the raw file through the same driver",
        |bench| reads::beside_raw(bench, Direct, reads::RANDOM);
    P1 direct_random_read_fio AtLeast(0.97), "the same beside fio's io_uring engine on the raw file",
        reads::beside_fio;
    P2 direct_sequential_read AtLeast(0.97), "1 MiB reads one after the other, O_DIRECT, 4 in flight, beside the raw file through the same driver",
        |bench| reads::beside_raw(bench, Direct, reads::SEQUENTIAL);
    P3 warm_random_read_depth_1 AtLeast(0.95), "4 KiB random reads from the page cache, one at a time, beside the best raw method",
        |bench| reads::beside_best_raw(bench, 1);
    P3 warm_random_read_depth_32 AtLeast(0.95), "the same, 32 in flight",
        |bench| reads::beside_best_raw(bench, 32);
    P3 warm_random_read_imago AtLeast(1.1), "the same beside imago", |_| elsewhere(PEERS);
    P3 warm_random_read_qcow2_rs AtLeast(1.1), "the same beside qcow2-rs", |_| elsewhere(PEERS);
    P4 warm_random_read_2_queues AtLeast(0.95), "what a second queue on a second core gains, beside what it gains the best raw method",
        reads::second_queue;
    P5 overlay_on_qcow2 AtLeast(0.95), "4 KiB random reads, warm, 32 in flight, through an overlay, beside the same without backing",
        |bench| reads::beside_flat(bench, Buffered, reads::Backing::Kind(Kind::BackingQcow2));
    P5 overlay_on_raw AtLeast(0.95), "the same over a raw file",
        |bench| reads::beside_flat(bench, Buffered, reads::Backing::Kind(Kind::BackingRaw));
    P5 chain_of_10 AtLeast(0.95), "the same through ten layers, each with its share",
        |bench| reads::beside_flat(bench, Buffered, reads::Backing::Chain);
    P5 overlay_on_qcow2_direct AtLeast(0.95), "O_DIRECT, through an overlay, beside the same without backing",
        |bench| reads::beside_flat(bench, Direct, reads::Backing::Kind(Kind::BackingQcow2));
    P5 overlay_on_raw_direct AtLeast(0.95), "the same over a raw file",
        |bench| reads::beside_flat(bench, Direct, reads::Backing::Kind(Kind::BackingRaw));
    P5 chain_of_10_direct AtLeast(0.95), "the same through ten layers, each with its share",
        |bench| reads::beside_flat(bench, Direct, reads::Backing::Chain);
    P6 buffered_overwrite AtLeast(0.95), "4 KiB random overwrites through the page cache, 32 in flight, beside the best raw method",
        |bench| overwrites::beside_best_raw(bench, Pages::Small);
    P6 buffered_overwrite_large_folios AtLeast(0.95), "the same where long reads have brought the file into the page cache",
        |bench| overwrites::beside_best_raw(bench, Pages::Large);
    P6 direct_overwrite AtLeast(0.95), "the same, O_DIRECT",
        |bench| overwrites::beside_best_raw(bench, Pages::None);
    P6 buffered_overwrite_imago AtLeast(1.1), "overwrites through the page cache beside imago", |_| elsewhere(PEERS);
    P6 buffered_overwrite_qcow2_rs AtLeast(1.1), "the same beside qcow2-rs", |_| elsewhere(PEERS);
    P6 direct_overwrite_qcow2_rs AtLeast(0.97), "the same, O_DIRECT, and with less CPU per write", |_| elsewhere(PEERS);
    P7 allocate AtLeast(writes::BAR), "4 KiB writes to new clusters, 32 in flight, a flush every 256, page cache, beside qemu-img bench",
        |bench| allocation::beside_qemu(bench, writes::Test::of(None, Buffered));
    P7 allocate_direct AtLeast(writes::BAR), "the same, O_DIRECT",
        |bench| allocation::beside_qemu(bench, writes::Test::of(None, Direct));
    P7 allocate_beside_raw Nothing, "the same into a raw file's holes, with two fdatasyncs for each flush",
        allocation::beside_raw;
    P7 allocate_2_queues AtLeast(0.95), "two queues beside one, page cache", allocation::two_queues;
    P8 copy_on_write AtLeast(writes::BAR), "4 KiB writes into an overlay, page cache, beside qemu-img bench",
        |bench| allocation::beside_qemu(bench, writes::Test::of(Some(Kind::Qcow2), Buffered));
    P8 copy_on_write_direct AtLeast(writes::BAR), "the same, O_DIRECT",
        |bench| allocation::beside_qemu(bench, writes::Test::of(Some(Kind::Qcow2), Direct));
    P8 copy_on_write_beside_raw Nothing, "page cache, beside reading and writing as many whole clusters without any format",
        |bench| allocation::beside_raw_copies(bench, Buffered);
    P8 copy_on_write_beside_raw_direct Nothing, "the same, O_DIRECT",
        |bench| allocation::beside_raw_copies(bench, Direct);
    P9 random_read_beside_writer AtLeast(0.95), "4 KiB random reads while another queue writes and flushes every 256, page cache, beside the same on raw",
        |bench| overwrites::beside_writer(bench, Buffered);
    P9 random_read_beside_writer_direct AtLeast(0.95), "the same, O_DIRECT",
        |bench| overwrites::beside_writer(bench, Direct);
    P10 zlib_window AtLeast(10.0), "4 KiB random reads in 64 MiB of a zlib image, warm, beside qemu-img bench",
        |bench| compressed::window(bench, Kind::Zlib);
    P10 zstd_window AtLeast(10.0), "the same, zstd", |bench| compressed::window(bench, Kind::Zstd);
    P10 zlib_uniform AtLeast(1.2), "4 KiB random reads all over a zlib image, warm, beside qemu-img bench",
        |bench| compressed::uniform(bench, Kind::Zlib, 1);
    P10 zstd_uniform AtLeast(1.2), "the same, zstd", |bench| compressed::uniform(bench, Kind::Zstd, 1);
    P10 zlib_uniform_2_queues AtLeast(1.2), "the same on two queues, beside one qemu-img bench",
        |bench| compressed::uniform(bench, Kind::Zlib, 2);
    P10 zstd_uniform_2_queues AtLeast(1.2), "the same, zstd", |bench| compressed::uniform(bench, Kind::Zstd, 2);
    P10 zlib_sequential AtLeast(1.5), "1 MiB reads one after the other of a zlib image: bytes per second of CPU, beside qemu-img bench",
        |bench| compressed::sequential(bench, Kind::Zlib);
    P10 zstd_sequential AtLeast(1.5), "the same, zstd", |bench| compressed::sequential(bench, Kind::Zstd);
    P11 vhost_user AtLeast(1.3), "vhost-user-blk, warm, 4 KiB random reads, 32 in flight, beside qemu-storage-daemon",
        |_| elsewhere(VHOST_USER);
    P12 nbd_random_read AtLeast(1.3), "NBD over a unix socket, warm, 4 KiB scattered reads, 32 in flight, beside qemu-nbd, by QEMU's client; or the next",
        nbd::random_read;
    P12 nbd_random_read_cpu AtMost(0.77), "the servers' CPU time per read, where the client is the limit",
        nbd::random_read_cpu;
    P12 nbdcopy AtLeast(1.3), "nbdcopy of the whole image; or the next", nbd::copy;
    P12 nbdcopy_cpu AtMost(0.77), "the servers' CPU time per copy, where the client is the limit",
        nbd::copy_cpu;
    P13 open_1t AtMost(10.0), "opening a clean image of 1 TiB with all metadata, none of it in the page cache, in ms",
        |bench| opening::with_all_metadata(bench, 1 << 40);
    P13 open_16t AtMost(10.0), "opening an empty image of 16 TiB, likewise, in ms",
        |bench| opening::empty(bench, 16 << 40);
    P14 look_up AtMost(20.0), LOOK_UP, lookups::added;
    P14 look_up_2_queues AtLeast(0.9), "look-ups on two queues of one device, beside two devices that share nothing",
        lookups::sharing;
    P14 missed_look_ups AtLeast(misses::BAR), "4 KiB random reads, O_DIRECT, 32 in flight, with a cache for an eighth of the mapping, beside qemu-img bench with the same",
        |bench| misses::random(bench, Direct);
    P14 missed_look_ups_warm Nothing, "the same from the page cache",
        |bench| misses::random(bench, Buffered);
    P15 convert_to_qcow2 AtLeast(1.0), "raw to qcow2, beside qemu-img convert -W -m 16", |_| elsewhere(CONVERT);
    P15 convert_to_raw AtLeast(1.0), "qcow2 to raw", |_| elsewhere(CONVERT);
    P15 convert_to_zlib AtLeast(1.5), "raw to compressed qcow2, zlib", |_| elsewhere(CONVERT);
    P15 convert_to_zstd AtLeast(1.5), "raw to compressed qcow2, zstd", |_| elsewhere(CONVERT);
    P16 barriers_new_table AtMost(2.0), "fdatasyncs of a write and a flush where an L2 table is missing, beside qemu-io",
        |bench| barriers::count(bench, barriers::Case::NewTable);
    P16 barriers_new_cluster AtMost(2.0), "the same where a cluster is missing",
        |bench| barriers::count(bench, barriers::Case::NewCluster);
    P16 barriers_overwrite AtMost(1.0), "the same where nothing is missing",
        |bench| barriers::count(bench, barriers::Case::Overwrite);
};

#[cfg(test)]
mod tests {
    //! Guards the list: no bar of the design is forgotten, and results of different versions are compared by name.
    use super::*;

    #[test]
    fn all_bars_are_there_in_order_under_names_of_their_own() {
        let mut ids: Vec<_> = BARS.iter().map(|bar| bar.id).collect();
        ids.dedup();
        let expected: Vec<_> = (1..=16).map(|number| format!("P{number}")).collect();
        assert_eq!(ids, expected);
        let mut names: Vec<_> = BARS.iter().map(|bar| bar.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), BARS.len());
    }

    #[test]
    fn what_is_asked_is_what_the_design_says() {
        let asked = |name| {
            BARS.iter()
                .find(|bar| bar.name == name)
                .map(|bar| bar.asked)
        };
        for (name, bar) in [
            ("direct_random_read", AtLeast(0.97)),
            ("warm_random_read_depth_1", AtLeast(0.95)),
            ("chain_of_10", AtLeast(0.95)),
            ("allocate", AtLeast(2.0)),
            ("zlib_window", AtLeast(10.0)),
            ("nbd_random_read_cpu", AtMost(0.77)),
            ("open_1t", AtMost(10.0)),
            ("barriers_overwrite", AtMost(1.0)),
        ] {
            assert_eq!(asked(name), Some(bar), "{name}");
        }
    }
}
