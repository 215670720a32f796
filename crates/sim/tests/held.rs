//! Queues side by side, each polled when the test says so: what one holds back, and what one leaves behind.

use urus_engine::request::{Request, RequestKind};
use urus_engine::storage::FileId;
use urus_engine::{Maintenance, Options, Queue};
use urus_sim::config::layers;
use urus_sim::fault::{Action, Fault, Trigger};
use urus_sim::image;
use urus_sim::memory::SimMemory;
use urus_sim::rng::Rng;
use urus_sim::stamp::{content, stamped};
use urus_sim::storage::SimStorage;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

/// Sectors.
const DISK: u64 = 256;

struct Device {
    world: SimWorld,
    maintenance: Maintenance<SimStorage>,
}

impl Device {
    fn new(bytes: Vec<u8>, seed: u64) -> Self {
        let config = SimConfig {
            slow: 128,
            stuck: 64,
            ..SimConfig::random(&mut Rng::new(seed))
        };
        let layers = layers(&[&bytes], &[false]).expect("its header parses");
        let world = SimWorld::new(seed, config, vec![FileSpec::new(bytes)]);
        let mut options = Options::default();
        options.sizes.run_clusters = 4;
        let maintenance = Maintenance::open(world.handle(), layers, options).expect("it opens");
        Self { world, maintenance }
    }

    fn queue(&self) -> Queue<SimStorage> {
        Queue::new(self.maintenance.shared(), self.world.handle(), 16)
    }

    /// Lets one thing happen, or another.
    fn step(&mut self) {
        self.world.step();
        self.maintenance.poll();
    }

    /// Requests of a queue, one after the other, while the others are not polled.
    fn ask(&mut self, queue: &mut Queue<SimStorage>, kind: RequestKind<SimMemory>) {
        assert!(
            queue.submit(Request { token: 1, kind }).is_ok(),
            "there is room"
        );
        queue.kick();
        for _ in 0..100_000 {
            if let Some(reply) = queue.complete() {
                assert!(reply.result.is_ok());
                return;
            }
            self.step();
        }
        panic!("a hang");
    }
}

/// O7: a read that was submitted holds what its look-up found until its memory is filled: while it waits to be started, alone in its queue, and where
/// storage reads a part of it at first.
#[test]
fn a_read_keeps_its_clusters_until_it_is_over() {
    for seed in 0..300u64 {
        let mut plan = image::plan(DISK * 512, 12, 3, 4);
        plan.fill = 256;
        let built = image::build(&plan, &mut Rng::new(seed));
        let mut device = Device::new(built.bytes.clone(), seed);
        let (mut reader, mut writer) = (device.queue(), device.queue());
        // What is cached is looked up when a request is submitted.
        let memory = SimMemory::zeroed(usize::try_from(DISK * 512).expect("small"));
        device.ask(&mut reader, RequestKind::Read { offset: 0, memory });
        // Of one cluster: it goes to storage as it is.
        let (lba, count) = (seed % 32 * 8, 2 + seed % 7);
        let memory = SimMemory::from_vec(vec![0xa5; usize::try_from(count * 512).expect("small")]);
        let kind = RequestKind::Read {
            offset: lba * 512,
            memory,
        };
        assert!(reader.submit(Request { token: 7, kind }).is_ok());
        let starts_late = seed % 2 == 0;
        let operation = device.world.op_count();
        if !starts_late {
            device.world.plan_faults(vec![Fault {
                trigger: Trigger::Op(operation),
                action: Action::ShortBySector,
            }]);
            reader.kick();
        }
        let (offset, len) = (0, DISK * 512);
        device.ask(&mut writer, RequestKind::Discard { offset, len });
        device.ask(&mut writer, RequestKind::Flush);
        if starts_late {
            reader.kick();
        }
        let mut reply = None;
        for cluster in (0..DISK / 8).rev() {
            let lba = cluster * 8;
            let memory = SimMemory::from_vec(stamped(lba, 8, 1 << 40));
            let (offset, fua) = (lba * 512, false);
            device.ask(
                &mut writer,
                RequestKind::Write {
                    offset,
                    memory,
                    fua,
                },
            );
            reply = reply.or_else(|| reader.complete());
        }
        for _ in 0..100_000 {
            if reply.is_some() {
                break;
            }
            device.step();
            reply = reader.complete();
        }
        let reply = reply.expect("no hang");
        let bytes = reply.memory.expect("a read gives its memory back").to_vec();
        for (lba, sector) in (lba..).zip(bytes.chunks(512)) {
            // It began before all of that, and its clusters are neither punched nor anybody else's.
            let was = built.active[usize::try_from(lba).expect("small")];
            assert_eq!(content(sector, lba), was, "seed {seed}, sector {lba}");
        }
        assert_eq!(device.world.complaints(), Vec::<String>::new());
    }
}

/// Guards against a file that grows with every queue there ever was: what a queue had reserved is free again when it goes.
#[test]
fn a_queue_that_goes_gives_back_what_it_had_reserved() {
    let built = image::build(&image::plan(512 * 512, 9, 3, 4), &mut Rng::new(1));
    let mut device = Device::new(built.bytes, 1);
    let before = device.world.contents(FileId(0)).len();
    for lba in 0..100 {
        let mut queue = device.queue();
        let memory = SimMemory::from_vec(stamped(lba, 1, 7));
        let (offset, fua) = (lba * 512, true);
        device.ask(
            &mut queue,
            RequestKind::Write {
                offset,
                memory,
                fua,
            },
        );
        drop(queue);
    }
    device.maintenance.poll();
    // What is added ahead is no more than 64 KiB.
    let grown = device.world.contents(IMAGE).len() - before;
    assert!(
        grown <= (100 + 16) * 512 + (64 << 10),
        "it has grown by {grown} bytes"
    );
}
