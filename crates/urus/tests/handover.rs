//! One image, several users: queues on threads, QEMU during a pause, a backing file under a growing overlay.
//! Guards against metadata that two users see differently (Cloud Hypervisor #7660, #8358, #8607).

mod common;

use std::thread;

use common::{QemuIo, Scratch, make, open, qemu_img, text};
use urus::{Buffer, Error, IoDriver, OpenOptions, PauseOptions, Request};

const CLUSTER: u64 = 64 << 10;
const DRIVERS: [IoDriver; 2] = [IoDriver::IoUring, IoDriver::Blocking];

fn with(io: IoDriver) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.io(io);
    options
}

#[test]
fn queues_allocate_side_by_side() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        make(&path, "64M", &["-o", "cluster_size=4k"]);
        let device = open(&with(io), &path);
        let mut model = vec![0; 64 << 20];
        // Each thread writes every fourth half cluster, so that clusters and tables have several writers.
        for (at, half) in model
            .chunks_exact_mut(2048)
            .enumerate()
            .filter(|(at, _)| at % 3 != 0)
        {
            half.fill(u8::try_from(at % 4 + 1).unwrap());
        }
        thread::scope(|scope| {
            for number in 0..4_usize {
                let seat = device.queue().unwrap();
                let model = &model;
                scope.spawn(move || {
                    let mut queue = seat.activate().unwrap();
                    let mut halves = (number..model.len() / 2048)
                        .step_by(4)
                        .filter(|at| at % 3 != 0)
                        .peekable();
                    loop {
                        while queue.in_flight() < queue.depth()
                            && let Some(at) = halves.next()
                        {
                            let mut buffer = Buffer::new(2048);
                            buffer
                                .as_mut_slice()
                                .copy_from_slice(&model[at * 2048..][..2048]);
                            queue
                                .submit(Request::write(0, at as u64 * 2048, buffer))
                                .unwrap();
                        }
                        queue.kick();
                        while let Some(completion) = queue.completion() {
                            completion.result.unwrap();
                        }
                        if queue.in_flight() == 0 && halves.peek().is_none() {
                            return;
                        }
                        if queue.in_flight() > 0 {
                            queue.wait(None);
                        }
                    }
                });
            }
            // Flushes and discards of what nobody writes, meanwhile.
            for round in 0..20 {
                device.flush().unwrap();
                device
                    .blocking()
                    .unwrap()
                    .discard(round * 12288, 2048)
                    .unwrap();
            }
        });
        let mut bytes = vec![1; model.len()];
        device.blocking().unwrap().read_at(&mut bytes, 0).unwrap();
        let wrong: Vec<_> = (0..model.len() / 2048)
            .filter(|at| bytes[at * 2048..][..2048] != model[at * 2048..][..2048])
            .collect();
        assert!(wrong.is_empty(), "{io:?}: half clusters {wrong:?}");
        device.close().unwrap();
        qemu_img(&["check", "-q", text(&path)]);
        let raw = scratch.path("raw");
        qemu_img(&["convert", "-O", "raw", text(&path), text(&raw)]);
        assert!(std::fs::read(raw).unwrap() == model);
    }
}

#[test]
fn qemu_writes_while_we_pause() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        make(&path, "16M", &[]);
        let device = open(&with(io), &path);
        let mut blocking = device.blocking().unwrap();
        blocking.write_at(&[1; 3 * 65536], 0).unwrap();
        for round in 0..4_u8 {
            device
                .pause(PauseOptions::new().release_locks(true))
                .unwrap();
            let mut qemu = QemuIo::open(&path, &[]);
            let at = u64::from(round) * 2 * CLUSTER;
            // Over a cluster of ours, into a new one, and one of ours given back.
            let pattern = round + 10;
            qemu.command(&format!("write -P {pattern} {at} 64k"), |line| {
                line.contains("ops;")
            });
            qemu.command(
                &format!("write -P {pattern} {} 64k", at + (8 << 20)),
                |line| line.contains("ops;"),
            );
            qemu.command(&format!("discard {} 64k", at + CLUSTER), |line| {
                line.contains("ops;")
            });
            drop(qemu);
            device.resume().unwrap();
            let mut bytes = [0; 65536];
            for (offset, byte) in [(at, pattern), (at + (8 << 20), pattern), (at + CLUSTER, 0)] {
                blocking.read_at(&mut bytes, offset).unwrap();
                assert_eq!(bytes, [byte; 65536], "round {round}, offset {offset}");
            }
            blocking
                .write_at(&[pattern + 100; 65536], at + CLUSTER + 5000)
                .unwrap();
        }
        let mut bytes = [0; 65536];
        blocking.read_at(&mut bytes, 7 * CLUSTER + 5000).unwrap();
        assert_eq!(bytes, [113; 65536]);
        drop(blocking);
        device.close().unwrap();
        qemu_img(&["check", "-q", text(&path)]);
    }
}

#[test]
fn what_was_paused_is_complete_on_disk() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        make(&path, "16M", &[]);
        let device = open(&with(io), &path);
        let mut blocking = device.blocking().unwrap();
        blocking.write_at(&[1; 3 * 65536], 100).unwrap();
        blocking.discard(CLUSTER, CLUSTER).unwrap();
        device.pause(PauseOptions::new()).unwrap();
        // The migration's other side: a copy of the file is the disk, and whole.
        let copy = scratch.path("copy.qcow2");
        std::fs::copy(&path, &copy).unwrap();
        device.resume().unwrap();
        qemu_img(&["check", "-q", text(&copy)]);
        let mut ours = vec![0; 16 << 20];
        blocking.read_at(&mut ours, 0).unwrap();
        let mut theirs = vec![0; 16 << 20];
        open(&with(io), &copy)
            .blocking()
            .unwrap()
            .read_at(&mut theirs, 0)
            .unwrap();
        assert!(ours == theirs);
    }
}

#[test]
fn an_overlay_grows_past_its_backing_file() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        std::fs::write(scratch.path("base.raw"), vec![5; 4 << 20]).unwrap();
        let path = scratch.path("overlay.qcow2");
        make(
            &path,
            "1000k",
            &["-b", text(&scratch.path("base.raw")), "-F", "raw"],
        );
        let device = open(&with(io), &path);
        assert_eq!(device.size(), 1000 << 10);
        device.resize(6 << 20).unwrap();
        let error = device.resize(1 << 20).unwrap_err();
        assert!(matches!(error, Error::Engine(_)), "{error:?}");
        let mut bytes = vec![1; 6 << 20];
        device.blocking().unwrap().read_at(&mut bytes, 0).unwrap();
        assert!(bytes[..1000 << 10].iter().all(|&byte| byte == 5));
        assert!(
            bytes[1000 << 10..].iter().all(|&byte| byte == 0),
            "what was cut off before must not come back"
        );
        device.close().unwrap();
        qemu_img(&["check", "-q", text(&path)]);
        let raw = scratch.path("raw");
        qemu_img(&["convert", "-O", "raw", text(&path), text(&raw)]);
        assert!(std::fs::read(raw).unwrap() == bytes);
    }
}

#[test]
fn devices_come_and_go() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        make(&path, "16M", &["-o", "lazy_refcounts=on"]);
        for round in 0..20_u64 {
            let device = open(&with(io), &path);
            let mut blocking = device.blocking().unwrap();
            let mut bytes = [0; 512];
            for earlier in 0..round {
                blocking
                    .read_at(&mut bytes, earlier * CLUSTER + 512)
                    .unwrap();
                assert_eq!(bytes, [earlier.to_le_bytes()[0] + 1; 512]);
            }
            blocking
                .write_at(&[round.to_le_bytes()[0] + 1; 512], round * CLUSTER + 512)
                .unwrap();
            // Closed by the last handle, which is the queue in half of the rounds.
            if round % 2 == 0 {
                drop(blocking);
                drop(device);
            } else {
                drop(device);
                drop(blocking);
            }
        }
        qemu_img(&["check", "-q", text(&path)]);
    }
}
