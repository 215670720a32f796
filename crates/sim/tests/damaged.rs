//! Devices over damaged images. Found by fuzzing (crates/fuzz-targets).

use urus_engine::request::RequestKind;
use urus_engine::{Control, Options};
use urus_format::{CompressedExtent, Header, HostOffset, L2Entry, refcount};
use urus_sim::checker::{self, Owner, Violation};
use urus_sim::config::layers;
use urus_sim::image;
use urus_sim::machine::{Driving, Machine};
use urus_sim::memory::SimMemory;
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

const DISK: u64 = 128 << 10;

fn image(refcount_order: u32) -> Vec<u8> {
    let mut plan = image::plan(DISK, 9, 3, refcount_order);
    plan.fill = 128;
    image::build(&plan, &mut Rng::new(1)).bytes
}

fn open(bytes: &[u8]) -> Machine {
    let files = vec![FileSpec::new(bytes.to_vec())];
    let world = SimWorld::new(1, SimConfig::default(), files);
    let driving = Driving {
        errors: true,
        ..Driving::plain(1)
    };
    let layers = layers(&[bytes], &[false]).expect("its header parses");
    let model = Model::new(Vec::new(), 1);
    let options = Options::default();
    Machine::open(&world, layers, options, model, driving, Rng::new(1)).expect("it opens")
}

/// Guards against guest data on top of metadata whose refcount is wrongly 0: it was handed out as free, and the next
/// open found garbage for an L1 table.
#[test]
fn metadata_with_refcount_0_is_not_handed_out() {
    let whole = image(4);
    let owners = checker::check(&whole).owners;
    let header = Header::parse(&whole, whole.len() as u64).expect("valid");
    let block_entry = usize::try_from(header.refcount_table.0).expect("small");
    let block = u64::from_be_bytes(whole[block_entry..][..8].try_into().expect("eight bytes"));
    let block = usize::try_from(block).expect("small");
    let mut damaged = whole.clone();
    let mut freed = 0;
    for cluster in 0..256 {
        let owner = owners.at(cluster << 9);
        if matches!(owner, Some(owner) if owner.is_metadata()) {
            refcount::set(&mut damaged[block..block + 512], cluster, 4, 0);
            freed += 1;
        }
    }
    assert!(freed >= 4, "the image has metadata: {freed}");
    let mut machine = open(&damaged);
    for round in 0..3u8 {
        for at in (0..DISK).step_by(8192) {
            let kind = RequestKind::Write {
                offset: at,
                memory: SimMemory::from_vec(vec![0xd0 + round; 8192]),
                fua: round == 1,
            };
            machine.submit_kind(kind).expect("there is room");
            machine.drain().expect("no hang");
        }
    }
    let _ = machine.close();
    let after = machine.world.contents(IMAGE).bytes().to_vec();
    let report = checker::check(&after);
    for violation in &report.violations {
        let about_counts = matches!(
            violation,
            Violation::RefcountTooLow { .. } | Violation::Copied { .. }
        );
        assert!(about_counts, "{violation}");
    }
    let l1 = |bytes: &[u8]| {
        let header = Header::parse(bytes, bytes.len() as u64).expect("valid");
        assert_eq!(
            checker::check(bytes).owners.at(header.l1_table.0),
            Some(Owner::L1(checker::Table::Active))
        );
        header.l1_table
    };
    assert_eq!(l1(&whole), l1(&after));
}

/// Guards against metadata that is given back: a broken compressed entry said that its data lies where the metadata does, and
/// whoever wrote over that guest cluster freed the header, or a refcount block, which then took a guest's data.
#[test]
fn metadata_under_a_compressed_entry_is_not_given_back() {
    let whole = image(4);
    let report = checker::check(&whole);
    let header = Header::parse(&whole, whole.len() as u64).expect("valid");
    let geometry = header.geometry();
    let word = |at: u64| {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(whole[at..at + 8].try_into().expect("eight bytes"))
    };
    let metadata: Vec<u64> = (0..whole.len() as u64 >> 9)
        .map(|cluster| cluster << 9)
        .filter(|at| report.owners.at(*at).is_some_and(Owner::is_metadata))
        .collect();
    assert!(metadata.len() >= 4, "the image has metadata: {metadata:?}");
    for target in metadata {
        let mut damaged = whole.clone();
        // The first entry of the first table that there is.
        let table =
            usize::try_from(word(header.l1_table.0) & 0x00ff_ffff_ffff_fe00).expect("small");
        let extent = CompressedExtent {
            offset: HostOffset(target),
            bytes: 512,
        };
        let entry = L2Entry::Compressed(extent).encode(&geometry).entry;
        damaged[table..table + 8].copy_from_slice(&entry.to_be_bytes());
        let mut machine = open(&damaged);
        for round in 0..4u8 {
            for at in (0..DISK).step_by(8192) {
                let kind = RequestKind::Write {
                    offset: at,
                    memory: SimMemory::from_vec(vec![0xd0 + round; 8192]),
                    fua: true,
                };
                machine.submit_kind(kind).expect("there is room");
                machine.drain().expect("no hang");
            }
        }
        let _ = machine.close();
        let after = machine.world.contents(IMAGE).bytes().to_vec();
        let now = checker::check(&after);
        let counted =
            |violation: &&Violation| !matches!(violation, Violation::RefcountTooLow { .. });
        assert_eq!(
            now.violations.iter().find(|violation| !counted(violation)),
            None,
            "metadata at {target:#x} was given back"
        );
        assert_eq!(
            now.owners.at(target),
            report.owners.at(target),
            "{target:#x}"
        );
    }
}

/// Guards against a search without end: the L1 table of a much larger disk needs more adjacent clusters than a refcount
/// block covers, and each new block took a cluster out of the run.
#[test]
fn growing_further_than_l1_can_lie_is_refused() {
    for order in [4, 6] {
        let mut machine = open(&image(order));
        let refused = machine.control(|reply| Control::Resize(8 << 30, reply));
        let text = refused.expect_err("it cannot grow so far");
        assert!(text.contains("cannot grow so far"), "{text}");
        machine
            .control(|reply| Control::Resize(2 << 20, reply))
            .expect("a little is possible");
        machine.close().expect("it closes");
        let report = checker::check(machine.world.contents(IMAGE).bytes());
        assert!(
            report.is_clean(),
            "{:?} {:?}",
            report.violations,
            report.leaks
        );
    }
}

/// What another program left in the tables beyond the disk's end never shows when the disk grows (O20).
#[test]
fn growing_shows_zeroes_where_the_tables_hold_data() {
    let mut shrunk = image(4);
    let shown = |bytes: &[u8]| bytes[usize::try_from(DISK / 2).expect("small")..].to_vec();
    let read = |machine: &mut Machine, len: u64| {
        let memory = SimMemory::zeroed(usize::try_from(len).expect("small"));
        machine.submit_kind(RequestKind::Read { offset: 0, memory });
        machine.drain().expect("no hang");
        let (_, result, memory) = machine.replies.pop().expect("one reply");
        result.expect("it reads");
        memory.expect("a read gives its memory back").to_vec()
    };
    let mut whole = open(&shrunk);
    let before = read(&mut whole, DISK);
    assert!(
        shown(&before).iter().any(|byte| *byte != 0),
        "there is data"
    );
    drop(whole);
    shrunk[24..32].copy_from_slice(&(DISK / 2).to_be_bytes());
    let mut machine = open(&shrunk);
    machine
        .control(|reply| Control::Resize(DISK, reply))
        .expect("it grows");
    let after = read(&mut machine, DISK);
    assert!(
        shown(&after).iter().all(|byte| *byte == 0),
        "old data shows"
    );
    let half = usize::try_from(DISK / 2).expect("small");
    assert_eq!(after[..half], before[..half]);
    machine.close().expect("it closes");
}
