//! The back end as a front end drives it, message by message, and as a guest sees it that means harm.
//!
//! Guards what a well-meaning client never shows: rings that lie, requests that reach out of the memory, front ends
//! that break off, changes of size and of cache mode, the dirty log, resets.

#![allow(
    clippy::cast_possible_truncation,
    reason = "random numbers below small limits"
)]

mod machine;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use machine::{
    FEATURES, FLUSH, GET_ID, LOG_ALL, Machine, NEXT, READ, ROOM, SLOTS, WRITABLE, WRITE,
};
use urus::{CreateOptions, Device, OpenOptions};
use urus_vhost_user::{Listener, Server};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{Bytes, GuestAddress};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const DISK: u64 = 16 << 20;

struct Setting {
    server: Server,
    device: Device,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

fn serve() -> Setting {
    serve_with(false)
}

fn serve_with(volatile_cache: bool) -> Setting {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    urus::create(&image, CreateOptions::new().size(DISK)).unwrap();
    let device = OpenOptions::new().open(&image).unwrap();
    let socket = dir.path().join("sock");
    let listener = Listener::bind(&socket).unwrap();
    let server = Server::builder(device.clone(), listener)
        .queues(2)
        .serial("a serial number")
        .volatile_cache(volatile_cache)
        .start()
        .unwrap();
    Setting {
        server,
        device,
        socket,
        _dir: dir,
    }
}

fn attach(socket: &Path, machine: &mut Machine) -> Frontend {
    let mut front_end = machine.connect(socket);
    machine.start(&mut front_end, FEATURES, 0);
    front_end
}

#[test]
fn a_machine_reads_what_it_has_written() {
    let Setting {
        server,
        device,
        socket,
        _dir,
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = attach(&socket, &mut machine);
    assert_eq!(front_end.get_queue_num().unwrap(), 2);
    assert_eq!(front_end.get_max_mem_slots().unwrap(), 509);
    assert_eq!(machine.capacity(&mut front_end), DISK);
    machine.fill(0, &[0x5a; 4096]);
    assert_eq!(machine.request(WRITE, 8, 4096), OK);
    machine.fill(0, &[0; 4096]);
    assert_eq!(machine.request(READ, 8, 4096), OK);
    assert_eq!(machine.data(0, 4096), [0x5a; 4096]);
    let barriers = device.counters().barriers;
    assert_eq!(machine.request(FLUSH, 0, 0), OK);
    assert!(device.counters().barriers > barriers, "a flush syncs");
    assert_eq!(machine.request(GET_ID, 0, 20), OK);
    assert_eq!(machine.data(0, 20), *b"a serial number\0\0\0\0\0");
    assert_eq!(
        machine.request(READ, DISK / 512, 512),
        IO_ERROR,
        "beyond the end"
    );
    assert_eq!(machine.request(77, 0, 512), 2, "unsupported");
    let stats = server.stats();
    assert_eq!(
        (stats.reads, stats.writes, stats.flushes, stats.failed),
        (2, 1, 1, 2)
    );
    drop(front_end);
    server.shutdown().unwrap();
}

/// A predecessor may have been killed after it had published an answer, and before it told the driver.
#[test]
fn a_queue_that_starts_tells_the_driver_to_look() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = attach(&socket, &mut machine);
    assert!(machine.is_called());
    let base = machine.stop(&front_end);
    machine.start_queue(&mut front_end, base);
    assert!(machine.is_called());
    drop(front_end);
    server.shutdown().unwrap();
}

/// The guest may outlive this process, and counts on what has completed.
#[test]
fn with_notes_for_a_successor_every_write_is_durable() {
    let Setting {
        server,
        device,
        socket,
        _dir,
    } = serve();
    let mut machine = Machine::new();
    let front_end = attach(&socket, &mut machine);
    assert_eq!(machine.request(WRITE, 0, 4096), OK);
    let before = device.counters().barriers;
    assert_eq!(machine.request(WRITE, 4096, 4096), OK);
    assert!(device.counters().barriers > before);
    drop(front_end);
    server.shutdown().unwrap();
}

#[test]
fn with_the_cache_off_every_write_is_durable() {
    let Setting {
        server,
        device,
        socket,
        _dir,
    } = serve_with(true);
    let mut machine = Machine::new();
    let mut front_end = attach(&socket, &mut machine);
    assert_eq!(machine.request(WRITE, 0, 4096), OK);
    let before = device.counters().barriers;
    assert_eq!(machine.request(WRITE, 0, 4096), OK);
    assert_eq!(
        device.counters().barriers,
        before,
        "write-back does not sync"
    );

    assert_eq!(machine.config(&mut front_end, 32, 1), [1]);
    front_end
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[0])
        .unwrap();
    let switched = device.counters().barriers;
    assert!(switched > before, "what was written before is made durable");
    assert_eq!(machine.config(&mut front_end, 32, 1), [0]);
    let writes = server.stats().writes;
    assert_eq!(machine.request(WRITE, 1024, 4096), OK);
    assert_eq!(server.stats().writes, writes + 1);
    assert!(device.counters().barriers > switched, "write-through syncs");

    assert!(
        front_end
            .set_config(0, VhostUserConfigFlags::WRITABLE, &[9])
            .is_err()
    );
    assert_eq!(machine.request(READ, 0, 512), OK, "the connection goes on");
    // A driver that takes neither of the features has no way to flush.
    let base = machine.stop(&front_end);
    front_end
        .set_features(FEATURES & !(1 << 9 | 1 << 11))
        .unwrap();
    machine.start_queue(&mut front_end, base);
    let before = device.counters().barriers;
    assert_eq!(machine.request(WRITE, 2048, 4096), OK);
    assert!(device.counters().barriers > before);
    drop(front_end);
    server.shutdown().unwrap();
}

#[test]
fn a_guest_is_told_that_its_disk_has_grown() {
    let Setting {
        server,
        device,
        socket,
        _dir,
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = attach(&socket, &mut machine);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    front_end.set_backend_request_fd(&ours).unwrap();
    drop(ours);
    device.resize(2 * DISK).unwrap();
    let mut message = [0; 12];
    theirs
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    theirs.read_exact(&mut message).unwrap();
    let words: Vec<u32> = message
        .chunks(4)
        .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(
        words,
        [2, 1, 0],
        "CONFIG_CHANGE_MSG, version 1, nothing more"
    );
    assert_eq!(machine.capacity(&mut front_end), 2 * DISK);
    machine.fill(0, &[7; 512]);
    assert_eq!(
        machine.request(WRITE, DISK / 512 + 9, 512),
        OK,
        "the new space works"
    );
    drop(front_end);
    server.shutdown().unwrap();
}

#[test]
fn a_request_cannot_reach_out_of_the_memory() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let front_end = attach(&socket, &mut machine);
    machine.fill(0, &[0xee; 4096]);
    for (address, len) in [
        (machine::MEMORY, 512),
        (machine::MEMORY - 256, 512),
        (u64::MAX - 511, 512),
        (0xdead_beef_0000, 4096),
    ] {
        for kind in [READ, WRITE] {
            machine.prepare(0, kind, 0, 512);
            let direction = if kind == WRITE { 0 } else { WRITABLE };
            machine.descriptor(1, address, len, NEXT | direction, 2);
            machine.offer(0);
            machine.kick();
            machine.settle();
            assert_eq!(machine.status(0), IO_ERROR, "{kind} at {address:#x}");
        }
    }
    assert_eq!(machine.data(0, 4096), [0xee; 4096]);
    // A read into its own header, descriptors and status: all of it the guest's own.
    machine.prepare(0, READ, 0, 512);
    machine.descriptor(1, machine.status_at(0).0 - 32, 512, NEXT | WRITABLE, 2);
    machine.offer(0);
    machine.kick();
    machine.settle();
    assert_eq!(machine.status(0), OK);
    drop(front_end);
    server.shutdown().unwrap();
}

/// What a driver does to its ring that it must not.
type Lie = fn(&mut Machine);

#[test]
fn a_ring_that_lies_is_stopped_and_can_be_set_up_again() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = machine.connect(&socket);
    let lies: [(&str, Lie); 7] = [
        ("a loop", |machine| {
            machine.descriptor(0, 0x4000, 16, NEXT, 0);
            machine.offer_head(0);
        }),
        ("a head beyond the queue", |machine| machine.offer_head(64)),
        ("more than there are", |machine| {
            machine
                .memory
                .write_obj(65_u16, GuestAddress(0x1002))
                .unwrap();
        }),
        ("no status", |machine| {
            machine.prepare(0, WRITE, 0, 512);
            machine.descriptor(1, machine.data_at(0).0, 512, 0, 0);
            machine.offer_head(0);
        }),
        ("a status outside", |machine| {
            machine.prepare(0, WRITE, 0, 512);
            machine.descriptor(2, machine::MEMORY, 1, WRITABLE, 0);
            machine.offer_head(0);
        }),
        ("to read after to write", |machine| {
            machine.prepare(0, READ, 0, 512);
            machine.descriptor(2, machine.status_at(0).0, 1, 0, 0);
            machine.offer_head(0);
        }),
        ("nothing", |machine| {
            machine.descriptor(0, 0, 0, 0, 0);
            machine.offer_head(0);
        }),
    ];
    machine.start(&mut front_end, FEATURES, 0);
    for (what, lie) in lies {
        lie(&mut machine);
        machine.kick();
        assert!(machine.is_broken(), "{what}");
        machine.stop(&front_end);
        machine.reset_queue();
        machine.start(&mut front_end, FEATURES, 0);
        machine.fill(0, &[1; 512]);
        assert_eq!(machine.request(WRITE, 0, 512), OK, "after {what}");
    }
    // The same descriptors twice, while the first request is in flight: in one batch, so that it surely is.
    machine.prepare(0, WRITE, 0, 512);
    machine.offer_head(0);
    machine.offer_head(0);
    machine.kick();
    assert!(machine.is_broken());
    drop(front_end);
    server.shutdown().unwrap();
}

#[test]
fn a_queue_stops_when_all_is_answered_and_goes_on_there() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = attach(&socket, &mut machine);
    let mut taken = 0_u16;
    for round in 0..50_u8 {
        for slot in 0..SLOTS {
            machine.fill(slot, &[round ^ slot.to_le_bytes()[0]; 4096]);
            machine.prepare(slot, WRITE, u64::from(slot) * 128, 4096);
            machine.offer(slot);
        }
        machine.kick();
        let base = machine.stop(&front_end);
        let answered = machine.answered().len();
        taken = taken.wrapping_add(u16::try_from(answered).unwrap());
        assert_eq!(base, taken, "what was taken was answered, and nothing else");
        machine.start_queue(&mut front_end, base);
        let rest = machine.settle().len();
        taken = taken.wrapping_add(u16::try_from(rest).unwrap());
        assert_eq!(answered + rest, usize::from(SLOTS));
    }
    for slot in 0..SLOTS {
        machine.prepare(slot, READ, u64::from(slot) * 128, 4096);
        machine.offer(slot);
    }
    machine.kick();
    machine.settle();
    for slot in 0..SLOTS {
        assert_eq!(machine.status(slot), OK);
        assert_eq!(machine.data(slot, 4096), [49 ^ slot.to_le_bytes()[0]; 4096]);
    }
    // Disabled, nothing is taken; enabled again, it is.
    front_end.set_vring_enable(0, false).unwrap();
    machine.prepare(0, FLUSH, 0, 0);
    machine.offer(0);
    machine.kick();
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(machine.answered().is_empty());
    front_end.set_vring_enable(0, true).unwrap();
    machine.settle();
    drop(front_end);
    server.shutdown().unwrap();
}

#[test]
fn the_log_has_what_was_written_to_the_guest() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let front_end = attach(&socket, &mut machine);
    assert_eq!(machine.request(READ, 0, ROOM), OK);
    let log = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let bytes = machine::MEMORY / 4096 / 8;
    rustix::fs::ftruncate(&log, bytes).unwrap();
    let region = VhostUserDirtyLogRegion {
        mmap_size: bytes,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&log),
    };
    front_end.set_log_base(0, Some(region)).unwrap();
    let log = std::fs::File::from(log);
    let dirty = || {
        let mut bits = vec![0; usize::try_from(bytes).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(&log, &mut bits, 0).unwrap();
        let pages = 0..bits.len() * 8;
        pages
            .filter(|page| bits[page / 8] & (1 << (page % 8)) != 0)
            .collect::<Vec<_>>()
    };
    assert_eq!(machine.request(READ, 0, ROOM), OK);
    assert!(dirty().is_empty(), "not before it is asked for");
    front_end.set_features(FEATURES | LOG_ALL).unwrap();
    front_end
        .set_vring_addr(0, &machine.addresses(true))
        .unwrap();
    // Status at 0x4020, used ring at 0x2000, data from 0x100000: 16 pages.
    assert_eq!(machine.request(WRITE, 0, ROOM), OK);
    assert_eq!(dirty(), [2, 4], "a write changes status and used ring only");
    assert_eq!(machine.request(READ, 0, ROOM), OK);
    let expected: Vec<_> = [2, 4].into_iter().chain(0x100..0x110).collect();
    assert_eq!(dirty(), expected);
    drop(front_end);
    server.shutdown().unwrap();
}

#[test]
fn memory_can_be_replaced_under_load() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = attach(&socket, &mut machine);
    for round in 0..50_u8 {
        for slot in 0..SLOTS {
            machine.fill(slot, &[round.wrapping_add(slot.to_le_bytes()[0]); 8192]);
            machine.prepare(slot, WRITE, u64::from(slot) * 128, 8192);
            machine.offer(slot);
        }
        machine.kick();
        front_end.set_mem_table(&[machine.region()]).unwrap();
        machine.settle();
    }
    for slot in 0..SLOTS {
        assert_eq!(machine.status(slot), OK);
    }
    machine.fill(3, &[0; 8192]);
    machine.prepare(3, READ, 3 * 128, 8192);
    machine.offer(3);
    machine.kick();
    machine.settle();
    assert_eq!(machine.data(3, 8192), [52; 8192]);
    // Regions one by one.
    let mut other = machine.region();
    other.guest_phys_addr = machine::MEMORY;
    other.userspace_addr = 0x6000_0000_0000;
    front_end.add_mem_region(&other).unwrap();
    assert!(front_end.add_mem_region(&other).is_err(), "it overlaps");
    front_end.remove_mem_region(&other).unwrap();
    assert!(front_end.remove_mem_region(&other).is_err());
    assert_eq!(machine.request(READ, 0, 512), OK);
    drop(front_end);
    server.shutdown().unwrap();
}

/// A memfd as a front end of ill will makes it: it can be shortened at any time.
fn unsealed(bytes: u64) -> std::fs::File {
    let file = rustix::fs::memfd_create("unsealed", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    file.into()
}

/// Touching a mapping beyond the end of its file is a SIGBUS, which used to end the process, and with it every other disk. Whatever a front end
/// shortens, and wherever the back end is just then: its own virtqueue stops, and that is all.
#[test]
fn a_front_end_that_shortens_its_files_loses_its_own_disk_alone() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve_with(true);
    let other_image = _dir.path().join("other.qcow2");
    urus::create(&other_image, CreateOptions::new().size(DISK)).unwrap();
    let other = OpenOptions::new().open(&other_image).unwrap();
    let mut other_disk = other.blocking().unwrap();
    let neighbour = serve();
    let mut neighbouring = Machine::new();
    let _neighbours = attach(&neighbour.socket, &mut neighbouring);

    for round in 0..24_u8 {
        let mut machine = Machine::new();
        let notes = unsealed(1 << 20);
        machine.keep_notes_in(notes.try_clone().unwrap(), 1 << 20);
        let front_end = attach(&socket, &mut machine);
        let log = unsealed(4096);
        let region = VhostUserDirtyLogRegion {
            mmap_size: 4096,
            mmap_offset: 0,
            mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&log),
        };
        front_end.set_log_base(0, Some(region)).unwrap();
        front_end.set_features(FEATURES | LOG_ALL).unwrap();
        for slot in 0..SLOTS {
            let kind = if slot % 2 == 0 { WRITE } else { READ };
            machine.fill(slot, &[round; 8192]);
            machine.prepare(slot, kind, u64::from(slot) * 128, 8192);
            machine.offer(slot);
        }
        match round % 4 {
            // Before the back end has seen them, or amid its work.
            0 | 1 => {
                if round % 4 == 1 {
                    machine.kick();
                }
                machine.shorten(0);
            }
            2 => notes.set_len(0).unwrap(),
            _ => log.set_len(0).unwrap(),
        }
        machine.kick();
        assert!(machine.is_broken(), "round {round}");
        // It stays so: the virtqueue cannot be started on what is lost.
        drop(front_end);
        // The others go on.
        other_disk.write_at(&[round; 4096], 4096).unwrap();
        assert_eq!(neighbouring.request(WRITE, 0, 4096), OK);
        assert_eq!(neighbouring.request(READ, 0, 4096), OK);
    }
    let mut bytes = [0; 4096];
    other_disk.read_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [23; 4096]);
    // And so does this one, for a machine that has memory.
    let mut machine = Machine::new();
    let front_end = attach(&socket, &mut machine);
    machine.fill(0, &[9; 512]);
    assert_eq!(machine.request(WRITE, 8, 512), OK);
    assert_eq!(machine.request(FLUSH, 0, 0), OK);
    drop(front_end);
    server.shutdown().unwrap();
}

/// Data alone is gone: the kernel says so (EFAULT), or the back end finds out. The requests fail or the virtqueue stops; nothing is said to be done.
#[test]
fn a_request_whose_data_is_gone_is_not_said_to_be_done() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve_with(true);
    for kind in [WRITE, READ] {
        let mut machine = Machine::new();
        let front_end = attach(&socket, &mut machine);
        machine.prepare(0, kind, 0, 4096);
        machine.shorten(0x10_0000);
        machine.offer(0);
        machine.kick();
        let begin = std::time::Instant::now();
        while machine.status(0) == 0xff && begin.elapsed() < std::time::Duration::from_secs(1) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let answered = !machine.answered().is_empty();
        assert!(!answered || machine.status(0) == IO_ERROR, "kind {kind}");
        drop(front_end);
    }
    server.shutdown().unwrap();
}

/// One front end is served at a time. Connections that say nothing, half a message, or nothing in earnest used to keep the machine's own out for ever.
#[test]
fn a_connection_that_does_not_begin_keeps_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    urus::create(&image, CreateOptions::new().size(DISK)).unwrap();
    let device = OpenOptions::new().open(&image).unwrap();
    let socket = dir.path().join("sock");
    let listener = Listener::bind(&socket).unwrap();
    let server = Server::builder(device, listener)
        .introduction_time(std::time::Duration::from_millis(500))
        .start()
        .unwrap();
    let connect = || UnixStream::connect(&socket).unwrap();
    // More than are kept waiting.
    let silent: Vec<UnixStream> = (0..40).map(|_| connect()).collect();
    let mut machine = Machine::new();
    let front_end = attach(&socket, &mut machine);
    assert_eq!(machine.request(FLUSH, 0, 0), OK);
    drop(front_end);
    for half in [
        // Half a head; a head without its body; a question, and nothing after its answer.
        &[1, 0, 0][..],
        &[8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0],
        &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let mut stream = connect();
        stream.write_all(half).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let mut machine = Machine::new();
        let front_end = attach(&socket, &mut machine);
        assert_eq!(machine.request(FLUSH, 0, 0), OK, "{half:?}");
        // One that has begun may be silent for as long as it likes.
        std::thread::sleep(std::time::Duration::from_millis(1200));
        assert_eq!(machine.request(FLUSH, 0, 0), OK, "{half:?}");
        drop(front_end);
    }
    // The silent ones were closed meanwhile.
    for mut stream in silent {
        stream
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    server.shutdown().unwrap();
}

#[test]
fn a_reset_device_begins_anew() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = attach(&socket, &mut machine);
    front_end
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[0])
        .unwrap();
    assert_eq!(machine.request(FLUSH, 0, 0), OK);
    front_end.reset_device().unwrap();
    assert_eq!(
        machine.config(&mut front_end, 32, 1),
        [1],
        "the cache is on again"
    );
    machine.reset_queue();
    machine.start(&mut front_end, FEATURES, 0);
    assert_eq!(machine.request(FLUSH, 0, 0), OK);
    drop(front_end);
    server.shutdown().unwrap();
}

#[test]
fn nonsense_on_the_socket_costs_only_the_connection() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    for garbage in [
        &[][..],
        &[0xff; 12],
        &[1, 0, 0, 0, 1, 0],
        // GET_FEATURES with a payload that does not come.
        &[1, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0],
        // SET_MEM_TABLE of nothing, SET_VRING_NUM of a queue that is not there.
        &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 99, 0, 0, 0, 64, 0, 0, 0],
        // GET_INFLIGHT_FD and SET_LOG_BASE before anything else.
        &[31, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[6, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(garbage).unwrap();
        drop(stream);
    }
    let mut machine = Machine::new();
    let front_end = attach(&socket, &mut machine);
    assert_eq!(machine.request(FLUSH, 0, 0), OK);
    drop(front_end);
    // One that says half a message and waits holds nobody up when the server ends.
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(&[1, 0, 0]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    server.shutdown().unwrap();
}

/// xorshift64*, seeded.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit
    }

    /// One of the first flags' combinations, as an address, a length, flags and the next descriptor.
    fn descriptor(&mut self) -> (u64, u32, u16, u16) {
        let writable = self.below(2) == 0;
        let len = [
            1,
            16,
            16,
            17,
            512,
            513,
            4096,
            70_000,
            0,
            u64::from(u32::MAX),
        ][self.below(10) as usize];
        let address = match self.below(8) {
            // Outside.
            0 => [machine::MEMORY, machine::MEMORY + 1, u64::MAX, 1 << 40][self.below(4) as usize],
            // Headers, which are only read.
            1..5 if !writable => 0x4000 + self.below(16) * 64,
            // The part of the memory that is offered to the device. What reaches out of it comes back through the end.
            _ => OFFERED + self.below(0x8_0000),
        };
        // Nothing offered reaches into what is guarded.
        let len = if (OFFERED..GUARDED).contains(&address) {
            len.min(GUARDED - address)
        } else {
            len
        };
        let flags = u16::from(writable) * WRITABLE + u16::from(self.below(3) != 0) * NEXT;
        (address, len as u32, flags, self.below(66) as u16)
    }
}

impl Random {
    /// The part of a well-formed request that a descriptor is: four make one.
    fn part(&mut self, machine: &Machine, index: u16) {
        let request = u64::from(index / 4);
        let header = 0x4000 + request * 64;
        let kind: u32 = machine.memory.read_obj(GuestAddress(header)).unwrap();
        let direction = if kind == READ || kind == GET_ID {
            WRITABLE
        } else {
            0
        };
        let data = OFFERED + request * 0x8000 + u64::from(index % 4) * 0x2000;
        let len = if kind > 8 {
            16
        } else {
            512 * (1 + self.below(16) as u32)
        };
        match index % 4 {
            0 => machine.descriptor(index, header, 16, NEXT, index + 1),
            3 => machine.descriptor(index, data, 1, WRITABLE, 0),
            _ => machine.descriptor(index, data, len, NEXT | direction, index + 1),
        }
    }
}

const OFFERED: u64 = 0x10_0000;
const GUARDED: u64 = 0x20_0000;

/// Descriptors and rings of all sorts: the device lives on, a stop ends, and nothing is written but where the guest
/// has offered it.
#[test]
fn random_rings_do_no_harm() {
    let Setting {
        server,
        socket,
        _dir,
        ..
    } = serve();
    let mut machine = Machine::new();
    let mut front_end = machine.connect(&socket);
    let guard = vec![0xa5; (machine::MEMORY - GUARDED) as usize];
    machine
        .memory
        .write_slice(&guard, GuestAddress(GUARDED))
        .unwrap();
    let seed = 0x7668_6f73_7421;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    machine.introduce(&mut front_end, FEATURES);
    for _ in 0..1500 {
        machine.reset_queue();
        for index in 0..16 {
            let at = GuestAddress(0x4000 + index * 64);
            let kind = [READ, READ, WRITE, FLUSH, GET_ID, 11, 13, 99][random.below(8) as usize];
            machine.memory.write_obj([kind, 0], at).unwrap();
            let sector = [0, 8, 1000, DISK / 512 - 1, u64::MAX][random.below(5) as usize];
            machine
                .memory
                .write_obj(sector, GuestAddress(at.0 + 8))
                .unwrap();
        }
        for index in 0..machine::SIZE {
            match random.below(20) {
                0 => {
                    let (address, len, flags, next) = random.descriptor();
                    machine.descriptor(index, address, len, flags, next);
                }
                1 => {
                    // An indirect table, which lies where the data does not.
                    let len = [16, 64, 1024, 24][random.below(4) as usize];
                    machine.descriptor(index, 0x8000, len, 4, 0);
                }
                // Else a part of a request as it should be: header, two pieces of data, status.
                _ => random.part(&machine, index),
            }
        }
        for index in 0..64 {
            let (address, len, flags, next) = random.descriptor();
            machine
                .memory
                .write_obj(address, GuestAddress(0x8000 + index * 16))
                .unwrap();
            machine
                .memory
                .write_obj(len, GuestAddress(0x8008 + index * 16))
                .unwrap();
            machine
                .memory
                .write_obj([flags, next], GuestAddress(0x800c + index * 16))
                .unwrap();
        }
        for _ in 0..1 + random.below(12) {
            let head = 4 * random.below(16) as u16;
            let odd = random.below(40) == 0;
            machine.offer_head(if odd { random.below(65) as u16 } else { head });
        }
        machine.start_queue(&mut front_end, 0);
        machine.kick();
        machine.stop(&front_end);
    }
    let mut after = vec![0; guard.len()];
    machine
        .memory
        .read_slice(&mut after, GuestAddress(GUARDED))
        .unwrap();
    assert!(after == guard, "something was written that was not offered");
    let stats = server.stats();
    println!("{stats:?}");
    assert!(
        stats.failed > 500 && stats.reads > 300 && stats.writes > 100,
        "{stats:?}"
    );
    assert!(
        stats.read_bytes > 0 && stats.written_bytes > 0,
        "some of them were well-formed: {stats:?}"
    );
    machine.reset_queue();
    machine.start(&mut front_end, FEATURES, 0);
    assert_eq!(machine.request(READ, 0, 512), OK);
    drop(front_end);
    server.shutdown().unwrap();
}
