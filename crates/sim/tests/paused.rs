//! What becomes of a device while another process has its image: each as a test by its name.

use urus_engine::request::RequestKind;
use urus_engine::{Control, Options};
use urus_format::Header;
use urus_sim::config::layers;
use urus_sim::fault::{Action, Fault, Trigger};
use urus_sim::image::{self, Built};
use urus_sim::machine::{Driving, Machine};
use urus_sim::memory::SimMemory;
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

fn built(sectors: u64, seed: u64) -> Built {
    let mut plan = image::plan(sectors * 512, 9, 3, 4);
    plan.fill = 128;
    plan.first_version = seed << 32;
    image::build(&plan, &mut Rng::new(seed))
}

fn open(bytes: &[u8], read_only: bool) -> Machine {
    let files = vec![FileSpec::new(bytes.to_vec())];
    let world = SimWorld::new(1, SimConfig::default(), files);
    let driving = Driving {
        errors: true,
        ..Driving::plain(2)
    };
    let layers = layers(&[bytes], &[false]).expect("its header parses");
    let mut options = Options::default();
    options.read_only = read_only;
    let model = Model::new(Vec::new(), 1);
    Machine::open(&world, layers, options, model, driving, Rng::new(1)).expect("it opens")
}

fn read(machine: &mut Machine, sectors: u64) -> Vec<u8> {
    let len = usize::try_from(sectors * 512).expect("small");
    let memory = SimMemory::zeroed(len);
    machine.submit_kind(RequestKind::Read { offset: 0, memory });
    machine.drain().expect("no hang");
    let (_, result, memory) = machine.replies.pop().expect("one reply");
    result.expect("it reads");
    memory.expect("a read gives its memory back").to_vec()
}

fn header(bytes: &[u8]) -> Header {
    Header::parse(bytes, bytes.len() as u64).expect("valid")
}

/// Guards against a panic: the directory of a device that only reads was as long as the L1 table at opening, and another process may have made
/// that longer.
#[test]
fn a_disk_that_is_only_read_follows_a_longer_table() {
    for read_only in [true, false] {
        let (old, new) = (built(256, 1), built(64 * 200, 2));
        let mut machine = open(&old.bytes, read_only);
        assert!(read(&mut machine, 256) == image::bytes_of(&old.active));
        machine.control(Control::Pause).expect("it pauses");
        machine.world.replace(IMAGE, new.bytes.clone());
        assert!(
            machine
                .resume(Some(header(&new.bytes)))
                .expect("it goes on")
        );
        assert!(read(&mut machine, 64 * 200) == image::bytes_of(&new.active));
        // And back to the shorter one.
        machine.control(Control::Pause).expect("it pauses");
        machine.world.replace(IMAGE, old.bytes.clone());
        assert!(
            machine
                .resume(Some(header(&old.bytes)))
                .expect("it goes on")
        );
        assert!(read(&mut machine, 256) == image::bytes_of(&old.active));
        if !read_only {
            // Nothing of the longer one shows where the shorter one grows.
            machine
                .control(|reply| Control::Resize(64 * 200 * 512, reply))
                .expect("it grows");
            let now = read(&mut machine, 64 * 200);
            assert!(now[..256 * 512] == image::bytes_of(&old.active));
            assert!(now[256 * 512..].iter().all(|byte| *byte == 0));
        }
        machine.close().expect("it closes");
    }
}

/// Guards against zeroes shown for data: where the metadata could not be read again after a pause, what the device has of it is a part, so it
/// does not go on without reading it.
#[test]
fn a_device_does_not_go_on_with_half_of_its_metadata() {
    let mut failed = 0;
    for operation in 0..12 {
        let (old, new) = (built(256, 1), built(256, 2));
        let mut machine = open(&old.bytes, false);
        machine.control(Control::Pause).expect("it pauses");
        machine.world.replace(IMAGE, new.bytes.clone());
        machine.world.plan_faults(vec![Fault {
            trigger: Trigger::Op(machine.world.op_count() + operation),
            action: Action::Eio,
        }]);
        let resumed = machine
            .resume(Some(header(&new.bytes)))
            .expect("no surprise");
        machine.world.plan_faults(Vec::new());
        if !resumed {
            failed += 1;
            let refused = machine.control(|reply| Control::Resume(None, reply));
            let told = refused.expect_err("it cannot go on");
            assert!(told.contains("read it again"), "{told}");
            assert!(
                machine
                    .resume(Some(header(&new.bytes)))
                    .expect("it goes on")
            );
        }
        assert!(read(&mut machine, 256) == image::bytes_of(&new.active));
        // O29: the first operation is a barrier, which nobody tries again (O11).
        assert_eq!(machine.is_poisoned(), operation == 0);
        assert_eq!(machine.close().is_err(), operation == 0);
    }
    assert!(failed > 1, "only {failed} failed");
}

/// Guards against clusters that are decoded as what they are not: another image is taken only where it is compressed as the one before.
#[test]
fn an_image_that_is_compressed_otherwise_is_not_taken() {
    let old = built(256, 1);
    let mut plan = image::plan(256 * 512, 9, 3, 4);
    plan.fill = 128;
    plan.options.compression = urus_format::Compression::Zstd;
    let new = image::build(&plan, &mut Rng::new(2));
    let mut machine = open(&old.bytes, false);
    machine.control(Control::Pause).expect("it pauses");
    machine.world.replace(IMAGE, new.bytes.clone());
    let header = Box::new(header(&new.bytes));
    let told = machine
        .control(|reply| Control::Resume(Some(header), reply))
        .expect_err("it is another image");
    assert!(told.contains("became another image"), "{told}");
}
