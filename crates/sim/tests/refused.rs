//! Images whose tables contradict one another. Guards against writing into them on a guess: each is refused, or the request that
//! meets the contradiction is, with the place told; and nothing that was there changes.

use urus_engine::Options;
use urus_engine::request::RequestKind;
use urus_format::Header;
use urus_sim::config::layers;
use urus_sim::image;
use urus_sim::machine::{Driving, Machine};
use urus_sim::memory::SimMemory;
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

const DISK: u64 = 128 << 10;
const COPIED: u64 = 1 << 63;

/// Four L2 tables, a snapshot that shares some of them with the active L1 table, one refcount block.
struct Image {
    bytes: Vec<u8>,
    header: Header,
}

fn place(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

impl Image {
    fn new(snapshot: bool) -> Self {
        let mut plan = image::plan(DISK, 9, 3, 4);
        plan.fill = 200;
        plan.snapshot = snapshot;
        let bytes = image::build(&plan, &mut Rng::new(1)).bytes;
        let header = Header::parse(&bytes, bytes.len() as u64).expect("valid");
        Self { bytes, header }
    }

    fn get(&self, at: u64) -> u64 {
        u64::from_be_bytes(
            self.bytes[place(at)..][..8]
                .try_into()
                .expect("eight bytes"),
        )
    }

    fn put(&mut self, at: u64, value: u64) {
        self.bytes[place(at)..][..8].copy_from_slice(&value.to_be_bytes());
    }

    fn l1(&self, index: u64) -> u64 {
        self.header.l1_table.0 + index * 8
    }

    /// Where the entry of a guest cluster lies.
    fn l2(&self, cluster: u64) -> u64 {
        (self.get(self.l1(cluster / 64)) & !COPIED) + cluster % 64 * 8
    }

    fn world(&self) -> SimWorld {
        let files = vec![FileSpec::new(self.bytes.clone())];
        SimWorld::new(1, SimConfig::default(), files)
    }

    fn open(&self, world: &SimWorld) -> Result<Machine, String> {
        self.open_with(world, Options::default())
    }

    fn open_with(&self, world: &SimWorld, options: Options) -> Result<Machine, String> {
        let driving = Driving {
            errors: true,
            ..Driving::plain(1)
        };
        let layers = layers(&[&self.bytes], &[false])?;
        let model = Model::new(Vec::new(), 1);
        Machine::open(world, layers, options, model, driving, Rng::new(1))
    }
}

type Damage = fn(&mut Image);

#[test]
fn tables_that_contradict_one_another_are_not_opened() {
    let cases: [(&str, &str, Damage); 12] = [
        ("is invalid", "refcount table entry 0", |image| {
            let at = image.header.refcount_table.0;
            image.put(at, image.get(at) | 1);
        }),
        ("and a refcount block", "refcount table entry 1", |image| {
            let at = image.header.refcount_table.0;
            image.put(at + 8, image.get(at));
        }),
        ("holds", "refcount table entry 0", |image| {
            image.put(image.header.refcount_table.0, image.header.l1_table.0);
        }),
        (
            "past the end of the file",
            "refcount table entry 0",
            |image| {
                image.put(image.header.refcount_table.0, 1 << 40);
            },
        ),
        ("holds", "the header's refcount table", |image| {
            image.put(48, image.header.l1_table.0);
        }),
        ("reserved bits", "L1 table, entry 0", |image| {
            image.put(image.l1(0), image.get(image.l1(0)) | 2);
        }),
        ("holds", "L1 table entry 0", |image| {
            image.put(image.l1(0), COPIED | image.header.refcount_table.0);
        }),
        ("holds", "L1 table entry 2", |image| {
            image.put(image.l1(2), image.get(image.l1(1)));
        }),
        ("past the end of the file", "L1 table entry 3", |image| {
            image.put(image.l1(3), COPIED | 1 << 40);
        }),
        ("the snapshot table is cut off", "", |image| {
            let at = place(image.header.snapshot_table.0);
            image.bytes[at + 12..at + 16].fill(0xff);
        }),
        ("l1_table_offset of a snapshot", "", |image| {
            let at = image.header.snapshot_table.0;
            image.put(at, image.get(at) + 8);
        }),
        ("holds", "L1 table of snapshot 0", |image| {
            image.put(image.header.snapshot_table.0, image.header.l1_table.0);
        }),
    ];
    let whole = Image::new(true);
    assert!(whole.open(&whole.world()).is_ok());
    for (what, at, damage) in cases {
        let mut image = Image::new(true);
        damage(&mut image);
        let world = image.world();
        match image.open(&world) {
            Err(told) => assert!(told.contains(what) && told.contains(at), "{what}: {told}"),
            Ok(_) => panic!("{what}, {at}: it opens"),
        }
        assert!(
            world.contents(IMAGE).bytes() == image.bytes,
            "{what}, {at}: something was written"
        );
    }
}

/// A write of one guest cluster: what it says.
fn write(machine: &mut Machine, cluster: u64) -> Result<(), String> {
    machine.submit_kind(RequestKind::Write {
        offset: cluster * 512,
        memory: SimMemory::from_vec(vec![0xd1; 512]),
        fua: true,
    });
    machine.drain().expect("no hang");
    let (_, result, _) = machine.replies.pop().expect("one reply");
    result.map_err(|error| error.to_string())
}

#[test]
fn entries_that_contradict_the_tables_are_not_followed() {
    let cases: [(&str, Damage); 5] = [
        ("reserved bits set", |image| {
            image.put(image.l2(70), image.get(image.l2(70)) | 2);
        }),
        ("which holds an L1 table", |image| {
            image.put(image.l2(70), COPIED | image.header.l1_table.0);
        }),
        // Zeroes, whose cluster a write would take.
        ("which holds an L1 table", |image| {
            image.put(image.l2(70), COPIED | image.header.l1_table.0 | 1);
        }),
        ("which holds a refcount block", |image| {
            let block = image.get(image.header.refcount_table.0);
            image.put(image.l2(70), COPIED | block);
        }),
        ("which holds the refcount table", |image| {
            image.put(image.l2(70), COPIED | image.header.refcount_table.0);
        }),
    ];
    for (what, damage) in cases {
        let mut image = Image::new(false);
        damage(&mut image);
        let world = image.world();
        let mut machine = image.open(&world).expect("the tables are sound");
        let told = write(&mut machine, 70).expect_err(what);
        assert!(told.contains(what), "{what}: {told}");
        // Another table's clusters are as good as before.
        assert_eq!(write(&mut machine, 0), Ok(()));
        machine.close().expect("it closes");
        let after = world.contents(IMAGE).bytes().to_vec();
        let table = place(image.l2(64));
        assert!(
            after[table..table + 512] == image.bytes[table..table + 512],
            "{what}: the table was written"
        );
        let named = place(image.get(image.l2(70)) & !COPIED & !511);
        let metadata = !what.contains("reserved");
        assert!(
            !metadata || after[named..named + 512].iter().any(|byte| *byte != 0xd1),
            "{what}: the guest wrote there"
        );
    }
}

/// Guards against a range whose end passes the largest number, and which is taken for one inside the disk.
#[test]
fn ranges_that_end_nowhere_are_refused() {
    let image = Image::new(false);
    let world = image.world();
    let mut machine = image.open(&world).expect("it is sound");
    for (offset, len) in [
        (u64::MAX - 511, 1024),
        (u64::MAX - 511, 512),
        (DISK - 512, 1024),
        (DISK, 512),
        (512, u64::MAX - 511),
        (512, u64::MAX),
    ] {
        let memory = || SimMemory::from_vec(vec![0xd1; place(len.min(1024))]);
        let mut kinds = vec![
            RequestKind::Discard { offset, len },
            RequestKind::WriteZeroes {
                offset,
                len,
                unmap: true,
                fua: false,
            },
            RequestKind::BlockStatus { offset, len },
        ];
        if len <= 1024 {
            let fua = false;
            let read = memory();
            let memory = memory();
            kinds.push(RequestKind::Read {
                offset,
                memory: read,
            });
            kinds.push(RequestKind::Write {
                offset,
                memory,
                fua,
            });
        }
        for kind in kinds {
            machine.submit_kind(kind);
            machine.drain().expect("no hang");
            let (_, result, _) = machine.replies.pop().expect("one reply");
            assert!(result.is_err(), "{offset}, {len}");
        }
    }
    machine.close().expect("it closes");
    assert!(
        world.contents(IMAGE).bytes() == image.bytes,
        "something changed"
    );
}

/// An autoclear bit that is not known says that something beside the disk agrees with it: whoever writes the disk takes it away first.
#[test]
fn autoclear_bits_that_are_not_known_go_before_the_first_write() {
    let mut image = Image::new(false);
    image.put(88, 1 << 40 | 1 << 9);
    let world = image.world();
    let machine = image.open(&world).expect("it opens");
    let header = world.contents(IMAGE).bytes()[..512].to_vec();
    assert_eq!(header[88..96], [0; 8]);
    assert!(world.sync_count() > 0, "durably so");
    let untouched = (0..512).filter(|at| !(88..96).contains(at));
    assert!(
        untouched
            .into_iter()
            .all(|at| header[at] == image.bytes[at])
    );
    drop(machine);
}

/// Guards against space that a device without discard gives away: what is allocated stays so, whatever is asked of it.
#[test]
fn without_discard_what_is_allocated_stays_so() {
    let image = Image::new(false);
    let world = image.world();
    let mut options = Options::default();
    options.discard = false;
    let mut machine = image.open_with(&world, options).expect("it opens");
    for unmap in [true, false] {
        machine.submit_kind(RequestKind::WriteZeroes {
            offset: 0,
            len: DISK,
            unmap,
            fua: true,
        });
        let len = DISK;
        machine.submit_kind(RequestKind::Discard { offset: 0, len });
        machine.drain().expect("no hang");
    }
    machine.close().expect("it closes");
    let after = Image {
        bytes: world.contents(IMAGE).bytes().to_vec(),
        header: image.header.clone(),
    };
    let entries = (0..DISK / 512).map(|cluster| (cluster, image.get(image.l2(cluster))));
    let allocated = entries.filter(|(_, entry)| entry & !COPIED & !511 != 0);
    let mut kept = 0;
    for (cluster, entry) in allocated {
        assert_eq!(after.get(image.l2(cluster)), entry | 1, "cluster {cluster}");
        kept += 1;
    }
    assert!(kept > 50, "only {kept}");
}
