//! The contract of queues and devices. Guards against requests that are lost, completed twice, or left without
//! their buffer, and against devices that go away under their queues.

mod common;

use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Scratch, open, qemu_img, refuse, text};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use urus::{
    Buffer, CacheMode, Device, DiscardPolicy, Error, Format, IoDriver, OpenOptions, PauseOptions,
    Queue, Request,
};

const SIZE: u64 = 4 << 20;
const DRIVERS: [IoDriver; 2] = [IoDriver::IoUring, IoDriver::Blocking];

fn raw(io: IoDriver) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.io(io).format(Format::Raw);
    options
}

fn disk(scratch: &Scratch, options: &OpenOptions) -> Device {
    let path = scratch.path("disk.raw");
    std::fs::write(&path, vec![3; usize::try_from(SIZE).unwrap()]).unwrap();
    open(options, &path)
}

fn queue(device: &Device) -> Queue {
    device.queue().unwrap().activate().unwrap()
}

fn next(queue: &mut Queue) -> urus::Completion {
    loop {
        if let Some(completion) = queue.completion() {
            return completion;
        }
        queue.wait(Some(Duration::from_secs(10)));
    }
}

fn is_readable(fd: impl AsFd, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

#[test]
fn a_full_queue_hands_the_request_back() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, raw(io).queue_depth(2));
        let mut queue = queue(&device);
        assert_eq!((queue.depth(), queue.driver()), (2, device.driver()));
        for token in 0..2 {
            queue
                .submit(Request::read(token, 0, Buffer::new(512)))
                .unwrap();
        }
        let mut buffer = Buffer::new(1024);
        buffer.as_mut_slice().fill(9);
        let rejected = queue.submit(Request::write(7, 0, buffer)).unwrap_err();
        assert_eq!(rejected.request.token(), 7);
        assert_eq!(
            rejected.request.into_buffer().unwrap().as_slice(),
            [9; 1024]
        );
        queue.kick();
        let first = next(&mut queue);
        assert_eq!(first.buffer.unwrap().as_slice(), [3; 512]);
        queue.submit(Request::flush(8)).unwrap();
        queue.kick();
        let mut rest = [next(&mut queue).token, next(&mut queue).token];
        rest.sort_unstable();
        assert_eq!(rest, [1 - first.token, 8]);
    }
}

#[test]
fn errors_come_with_the_buffer() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, raw(io).read_only(true));
        assert!(device.read_only());
        let mut queue = queue(&device);
        queue
            .submit(Request::read(0, SIZE - 511, Buffer::new(512)))
            .unwrap();
        queue
            .submit(Request::read(1, u64::MAX, Buffer::new(512)))
            .unwrap();
        queue
            .submit(Request::write(2, 0, Buffer::new(512)))
            .unwrap();
        queue.submit(Request::discard(3, 0, 512)).unwrap();
        queue.submit(Request::write_zeroes(4, 0, 512)).unwrap();
        queue
            .submit(Request::read(5, SIZE - 512, Buffer::new(512)))
            .unwrap();
        queue.kick();
        for _ in 0..6 {
            let completion = next(&mut queue);
            let expected = [Some(22), Some(22), Some(1), Some(1), Some(1), None]
                [usize::try_from(completion.token).unwrap()];
            assert_eq!(
                completion.result.err().map(|error| error.errno()),
                expected,
                "{}",
                completion.token
            );
            assert_eq!(
                completion.buffer.is_some(),
                ![3, 4].contains(&completion.token)
            );
        }
    }
}

#[test]
fn the_eventfd_announces_completions() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        let mut queue = queue(&device);
        let event = queue.event_fd().unwrap().try_clone_to_owned().unwrap();
        for token in 0..100 {
            queue.consume_event();
            while queue.completion().is_some() {}
            queue
                .submit(Request::read(token, 0, Buffer::new(4096)))
                .unwrap();
            queue.kick();
            let started = Instant::now();
            let completion = loop {
                assert!(
                    is_readable(&event, Duration::from_secs(10)),
                    "request {token} was never announced"
                );
                queue.consume_event();
                if let Some(completion) = queue.completion() {
                    break completion;
                }
                assert!(started.elapsed() < Duration::from_secs(10));
            };
            assert_eq!(completion.token, token);
        }
        queue.consume_event();
        assert!(queue.completion().is_none());
        assert!(!is_readable(&event, Duration::ZERO));
    }
}

#[test]
fn waiting_ends_with_the_time() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        let mut queue = queue(&device);
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(20) {
            queue.wait(Some(Duration::from_millis(20)));
        }
        assert!(queue.completion().is_none());
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}

/// Sequential reads of a compressed image ask for each cluster many times over.
#[test]
fn requests_share_the_decoding_of_a_cluster() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let (source, path) = (scratch.path("source.raw"), scratch.path("disk.qcow2"));
        let content: Vec<u8> = (0..1_u32 << 15)
            .flat_map(|n| (n / 3).to_le_bytes())
            .collect();
        std::fs::write(&source, &content).unwrap();
        qemu_img(&["convert", "-c", "-O", "qcow2", text(&source), text(&path)]);
        let device = open(OpenOptions::new().io(io).read_only(true), &path);
        let mut queue = queue(&device);
        for token in 0..32 {
            queue
                .submit(Request::read(token, token * 4096, Buffer::new(4096)))
                .unwrap();
        }
        for _ in 0..32 {
            let completion = next(&mut queue);
            completion.result.unwrap();
            let at = usize::try_from(completion.token).unwrap() * 4096;
            assert_eq!(
                completion.buffer.unwrap().as_slice(),
                &content[at..at + 4096]
            );
        }
        assert_eq!(
            device.counters().decoded_clusters,
            2,
            "two clusters of 64 KiB"
        );
    }
}

/// What a vhost-user back end promises its guest must not cost a sync for each overwrite.
#[test]
fn outliving_the_process_costs_a_commit_only_where_the_mapping_changes() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
        let device = open(OpenOptions::new().io(io), &path);
        let mut queue = queue(&device);
        queue.outlive_process(true);
        let mut write = |device: &Device, offset| {
            let before = device.counters().barriers;
            let mut buffer = Buffer::new(4096);
            buffer.as_mut_slice().fill(9);
            queue.submit(Request::write(0, offset, buffer)).unwrap();
            next(&mut queue).result.unwrap();
            device.counters().barriers - before
        };
        assert!(write(&device, 0) >= 2, "a new cluster waits for its commit");
        assert_eq!(write(&device, 8192), 0, "an overwrite waits for nothing");
        assert!(write(&device, 1 << 20) >= 2);
        // As it is after a kill: nothing was flushed or closed.
        let seen = scratch.path("seen.qcow2");
        std::fs::copy(&path, &seen).unwrap();
        let seen = open(OpenOptions::new().io(io), &seen);
        for offset in [0, 8192, 1 << 20] {
            let mut bytes = [0; 4096];
            seen.blocking()
                .unwrap()
                .read_at(&mut bytes, offset)
                .unwrap();
            assert!(bytes.iter().all(|byte| *byte == 9), "{offset}");
        }
    }
}

/// The file grows ahead while it is written, and is no longer than it need be afterwards.
#[test]
fn slack_is_given_back() {
    for (io, cache) in DRIVERS
        .into_iter()
        .zip([CacheMode::None, CacheMode::Writeback])
    {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "64M"]);
        let device = open(OpenOptions::new().io(io).cache(cache), &path);
        let mut queue = queue(&device);
        for token in 0..300 {
            let mut buffer = Buffer::new(4096);
            buffer.as_mut_slice().fill(7);
            queue
                .submit(Request::write(token, token * 65536, buffer))
                .unwrap();
            next(&mut queue).result.unwrap();
        }
        drop(queue);
        let bytes = || std::fs::metadata(&path).unwrap().len();
        let busy = bytes();
        device.pause(PauseOptions::default()).unwrap();
        let paused = bytes();
        assert!(paused < busy, "{paused} bytes, {busy} before");
        device.resume().unwrap();
        device.close().unwrap();
        let check = qemu_img(&["check", "--output=json", text(&path)]);
        let end = format!("\"image-end-offset\": {}", bytes());
        assert!(check.contains(&end), "{} bytes, and {check}", bytes());
    }
}

#[test]
fn dropping_drains() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        let mut queue = queue(&device);
        for index in 0..32 {
            let mut buffer = Buffer::new(65536);
            buffer.as_mut_slice().fill(u8::try_from(index).unwrap());
            queue
                .submit(Request::write(index, index * 65536, buffer))
                .unwrap();
        }
        // The queue is the last handle: it drains, then closes the device.
        drop(device);
        drop(queue);
        let bytes = std::fs::read(scratch.path("disk.raw")).unwrap();
        assert!((0..32).all(|index| {
            bytes[index * 65536..][..65536]
                .iter()
                .all(|&byte| usize::from(byte) == index)
        }));
        drop(open(&raw(io), &scratch.path("disk.raw")));
    }
}

#[test]
fn queues_on_threads() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        let threads: Vec<_> = (0..4_u8)
            .map(|number| {
                let seat = device.queue().unwrap();
                thread::spawn(move || {
                    let mut queue = seat.activate().unwrap();
                    let base = u64::from(number) << 20;
                    for round in 0..16_u64 {
                        let mut buffer = Buffer::new(65536);
                        buffer.as_mut_slice().fill(number + 100);
                        queue
                            .submit(Request::write(0, base + round * 65536, buffer))
                            .unwrap();
                        queue.kick();
                        let buffer = next(&mut queue).buffer.unwrap();
                        queue
                            .submit(Request::read(1, base + round * 65536, buffer))
                            .unwrap();
                        queue.kick();
                        let completion = next(&mut queue);
                        completion.result.unwrap();
                        assert_eq!(completion.buffer.unwrap().as_slice(), [number + 100; 65536]);
                    }
                })
            })
            .collect();
        device.flush().unwrap();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        device.close().unwrap();
        let bytes = std::fs::read(scratch.path("disk.raw")).unwrap();
        assert!((0..4).all(|number| {
            bytes[number << 20..][..1 << 20]
                .iter()
                .all(|&byte| usize::from(byte) == number + 100)
        }));
    }
}

#[test]
fn after_close_requests_fail_and_come_back() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        let mut queue = queue(&device);
        device.close().unwrap();
        device.close().unwrap();
        queue
            .submit(Request::write(5, 0, Buffer::new(512)))
            .unwrap();
        queue.kick();
        let completion = next(&mut queue);
        assert!(
            matches!(completion.result, Err(Error::Closed)),
            "{:?}",
            completion.result
        );
        assert!(completion.buffer.is_some());
        assert!(matches!(device.resize(SIZE * 2), Err(Error::Closed)));
        assert!(matches!(
            device.pause(PauseOptions::new()),
            Err(Error::Closed)
        ));
        assert!(matches!(device.resume(), Err(Error::Closed)));
    }
}

#[test]
fn resizing_shows_zeroes() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        let mut blocking = device.blocking().unwrap();
        let mut bytes = [1; 512];
        assert!(blocking.read_at(&mut bytes, SIZE).is_err());
        device.resize(SIZE + 4096).unwrap();
        assert_eq!(device.size(), SIZE + 4096);
        blocking.read_at(&mut bytes, SIZE).unwrap();
        assert_eq!(bytes, [0; 512]);
        blocking.write_at(&[5; 512], SIZE + 4096 - 512).unwrap();
        device.pause(PauseOptions::new()).unwrap();
        assert!(matches!(device.resize(SIZE), Err(Error::Invalid { .. })));
        device.resume().unwrap();
    }
}

#[test]
fn requests_wait_while_paused() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        device.pause(PauseOptions::new()).unwrap();
        let (ended, end) = mpsc::channel();
        let seat = device.queue().unwrap();
        let user = thread::spawn(move || {
            let mut queue = seat.activate().unwrap();
            queue
                .submit(Request::write(0, 0, Buffer::new(512)))
                .unwrap();
            queue.kick();
            next(&mut queue).result.unwrap();
            ended.send(()).unwrap();
        });
        assert!(
            end.recv_timeout(Duration::from_millis(100)).is_err(),
            "a request went through while paused"
        );
        device.resume().unwrap();
        end.recv_timeout(Duration::from_secs(10)).unwrap();
        user.join().unwrap();
    }
}

/// A read that has come alone is no operation, yet it is in flight: whoever waits for requests to end waits for it (O7), whatever starts
/// requests makes it, and its buffer comes back.
#[test]
fn a_read_that_came_alone_is_in_flight() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, &raw(io));
        let mut alone = queue(&device);
        let submit = |queue: &mut Queue, token| {
            let read = Request::read(token, 4096, Buffer::new(4096));
            queue.submit(read).unwrap();
        };
        let is_read = |completion: urus::Completion, token| {
            completion.result.unwrap();
            assert_eq!(completion.token, token);
            let buffer = completion.buffer.unwrap();
            assert!(buffer.len() == 4096 && buffer.as_slice().iter().all(|&byte| byte == 3));
        };
        submit(&mut alone, 1);
        assert_eq!(alone.in_flight(), 1);
        is_read(next(&mut alone), 1);
        submit(&mut alone, 2);
        alone.kick();
        is_read(next(&mut alone), 2);
        assert!(alone.in_flight() == 0 && alone.completion().is_none());

        submit(&mut alone, 3);
        let (ended, end) = mpsc::channel();
        let pausing = {
            let device = device.clone();
            thread::spawn(move || {
                device.pause(PauseOptions::new()).unwrap();
                ended.send(()).unwrap();
            })
        };
        assert!(
            end.recv_timeout(Duration::from_millis(100)).is_err(),
            "a pause did not wait for it"
        );
        is_read(next(&mut alone), 3);
        end.recv_timeout(Duration::from_secs(10)).unwrap();
        pausing.join().unwrap();

        // Let go by the end of a pause, it is started by nobody else.
        alone.event_fd().unwrap();
        submit(&mut alone, 4);
        alone.kick();
        assert!(alone.completion().is_none());
        device.resume().unwrap();
        let completion = loop {
            if let Some(completion) = alone.completion() {
                break completion;
            }
            assert!(is_readable(
                alone.event_fd().unwrap(),
                Duration::from_secs(10)
            ));
            alone.consume_event();
        };
        is_read(completion, 4);
        submit(&mut alone, 5);
        drop(alone);
        device.close().unwrap();
    }
}

/// A server that is told to stop while it is paused closes its image all the same, and nobody waits for an answer for ever.
#[test]
fn a_paused_device_closes() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let path = scratch.path("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
        let mut options = OpenOptions::new();
        options.io(io);
        let device = open(&options, &path);
        device
            .blocking()
            .unwrap()
            .write_at(&[7; 70_000], 100)
            .unwrap();
        device.pause(PauseOptions::new()).unwrap();
        let (ended, end) = mpsc::channel();
        let (submitted, held) = mpsc::channel();
        let seat = device.queue().unwrap();
        let user = thread::spawn(move || {
            let mut queue = seat.activate().unwrap();
            queue
                .submit(Request::write(0, 1 << 20, Buffer::new(512)))
                .unwrap();
            queue.kick();
            submitted.send(()).unwrap();
            ended.send(next(&mut queue).result).unwrap();
        });
        held.recv().unwrap();
        let (closed, close) = mpsc::channel();
        let closing = device.clone();
        let closer = thread::spawn(move || closed.send(closing.close()).unwrap());
        close
            .recv_timeout(Duration::from_secs(10))
            .expect("closing ends")
            .unwrap();
        // Whether it was done or refused, it is answered.
        match end.recv_timeout(Duration::from_secs(10)) {
            Ok(Ok(_) | Err(Error::Closed)) => {}
            other => panic!("{other:?}"),
        }
        user.join().unwrap();
        closer.join().unwrap();
        drop(device);
        qemu_img(&["check", "-q", text(&path)]);
        let mut bytes = [0; 70_000];
        open(&options, &path)
            .blocking()
            .unwrap()
            .read_at(&mut bytes, 100)
            .unwrap();
        assert!(bytes.iter().all(|&byte| byte == 7));
    }
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let scratch = Scratch::new();
    drop(disk(&scratch, &raw(IoDriver::Auto)));
    let path = scratch.path("disk.raw");
    for depth in [0, urus::MAX_QUEUE_DEPTH + 1] {
        let error = refuse(raw(IoDriver::Auto).queue_depth(depth), &path);
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    }
    assert_eq!(
        open(
            raw(IoDriver::Auto).queue_depth(urus::MAX_QUEUE_DEPTH),
            &path
        )
        .size(),
        SIZE
    );
    let device = open(
        raw(IoDriver::Auto)
            .name("boot disk")
            .discard(DiscardPolicy::Ignore),
        &path,
    );
    assert_eq!(device.name(), "boot disk");
    assert!(format!("{device:?}").contains("boot disk"));
}

#[test]
fn direct_io_takes_any_alignment() {
    for io in DRIVERS {
        let scratch = Scratch::new();
        let device = disk(&scratch, raw(io).cache(CacheMode::None));
        let alignment = device.alignment();
        assert!(
            alignment >= 512 && device.block_size() >= 512,
            "{alignment}"
        );
        let mut blocking = device.blocking().unwrap();
        blocking.write_at(&[8; 700], 1001).unwrap();
        let mut bytes = [0; 702];
        blocking.read_at(&mut bytes, 1000).unwrap();
        assert_eq!((bytes[0], bytes[1], bytes[700], bytes[701]), (3, 8, 8, 3));
    }
}

/// The smallest clusters, on a file system whose blocks are larger, cannot be had past the page cache.
#[test]
fn direct_io_falls_back_where_clusters_are_smaller_than_blocks() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    common::make(&path, "1M", &["-o", "cluster_size=512"]);
    let device = open(OpenOptions::new().cache(CacheMode::None), &path);
    assert!(device.alignment() <= 512, "{}", device.alignment());
}

#[test]
fn handles_cross_threads() {
    fn is_send_and_sync<T: Send + Sync>() {}
    fn is_send<T: Send>() {}
    is_send_and_sync::<Device>();
    is_send_and_sync::<OpenOptions>();
    is_send_and_sync::<Error>();
    is_send::<urus::QueueSeat>();
    is_send::<Request>();
    is_send::<urus::Completion>();
}
