//! Guards the work on sockets of a ring: each operation ends exactly once and gives its memory back, whatever becomes of the peer, and none
//! is in the way of the work on files.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use urus_engine::storage::{FileId, Op, OpKind, Storage};
use urus_ring::{
    Buffer, Driver, DriverKind, FileSet, OpenFile, Parts, RingMemory, SocketCompletion,
};

const LONG: Duration = Duration::from_secs(20);

fn driver(depth: u32) -> Driver {
    let path = std::env::current_exe().unwrap();
    let file = OpenFile::open_image(&path, true, true).unwrap();
    Driver::open_with_sockets(FileSet::new(vec![file]), DriverKind::IoUring, depth).unwrap()
}

/// Ours, which does not block, and the peer's.
fn pair() -> (Arc<OwnedFd>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Arc::new(ours.into()), theirs)
}

fn parts(bytes: usize, fill: u8) -> Parts {
    let mut buffer = Buffer::new(bytes);
    buffer.as_mut_slice().fill(fill);
    let mut parts = Parts::new();
    let index = parts.own(buffer);
    parts.push(index, 0..bytes);
    parts
}

/// Waits for one completion of an operation on a socket.
fn next(driver: &mut Driver) -> SocketCompletion {
    let start = Instant::now();
    loop {
        if let Some(completion) = driver.sockets().unwrap().completion() {
            return completion;
        }
        assert!(start.elapsed() < LONG, "no completion");
        driver.wait(Some(Duration::from_secs(1)));
    }
}

fn errno(completion: &SocketCompletion) -> Option<i32> {
    completion.result.as_ref().err()?.raw_os_error()
}

#[test]
fn only_a_ring_that_was_asked_serves_sockets() {
    let files = || FileSet::new(Vec::new());
    let mut plain = Driver::open(files(), DriverKind::IoUring, 8).unwrap();
    assert!(plain.sockets().is_none());
    let mut blocking = Driver::open_with_sockets(files(), DriverKind::Blocking, 8).unwrap();
    assert!(blocking.sockets().is_none());
    assert!(driver(8).sockets().is_some());
}

#[test]
fn bytes_arrive_in_the_order_of_their_parts() {
    let mut driver = driver(8);
    let (ours, mut theirs) = pair();
    let mut sent = Parts::new();
    let head = sent.own(Buffer::from_vec(b"..head..".to_vec()));
    let body = sent.own(Buffer::from_vec(b"body".to_vec()));
    for (buffer, range) in [(head, 2..4), (body, 0..4), (head, 4..6)] {
        sent.push(buffer, range);
    }
    driver.sockets().unwrap().send(7, Arc::clone(&ours), sent);
    let mut done = next(&mut driver);
    assert_eq!((done.token, done.result.as_ref().unwrap()), (7, &8));
    let mut found = [0; 8];
    theirs.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"hebodyad");
    let parts = done.parts.as_mut().unwrap();
    parts.advance(8);
    assert_eq!(parts.take(body).unwrap().as_slice(), b"body");

    let mut room = Parts::new();
    let first = room.own(Buffer::new(3));
    let second = room.own(Buffer::new(10));
    room.push(first, 0..3);
    room.push(second, 5..10);
    driver.sockets().unwrap().receive(8, ours, room);
    driver.kick();
    theirs.write_all(b"abcdef").unwrap();
    let mut done = next(&mut driver);
    assert_eq!((done.token, done.result.as_ref().unwrap()), (8, &6));
    let parts = done.parts.as_mut().unwrap();
    parts.forget_bytes();
    assert_eq!(parts.take(first).unwrap().as_slice(), b"abc");
    assert_eq!(parts.take(second).unwrap().as_slice()[5..8], *b"def");
}

#[test]
fn a_peer_that_goes_ends_what_waits_for_it() {
    let mut driver = driver(8);
    let (ours, theirs) = pair();
    driver
        .sockets()
        .unwrap()
        .receive(1, Arc::clone(&ours), parts(100, 0));
    driver.kick();
    drop(theirs);
    let done = next(&mut driver);
    assert_eq!((done.token, done.result.unwrap()), (1, 0));
    driver.sockets().unwrap().send(2, ours, parts(100, 0));
    let done = next(&mut driver);
    assert_eq!(
        (done.token, errno(&done)),
        (2, Some(rustix::io::Errno::PIPE.raw_os_error()))
    );
}

#[test]
fn cancelled_operations_end_once_and_give_their_memory_back() {
    let mut driver = driver(8);
    let canceled = Some(rustix::io::Errno::CANCELED.raw_os_error());
    // In the kernel, and not yet there.
    for kicked in [true, false] {
        let (ours, _theirs) = pair();
        driver
            .sockets()
            .unwrap()
            .receive(1, Arc::clone(&ours), parts(100, 0));
        driver
            .sockets()
            .unwrap()
            .receive(2, Arc::clone(&ours), parts(200, 0));
        if kicked {
            driver.wait(Some(Duration::ZERO));
        }
        driver.sockets().unwrap().cancel(1);
        let done = next(&mut driver);
        assert_eq!((done.token, errno(&done)), (1, canceled));
        let mut parts = done.parts.unwrap();
        parts.forget_bytes();
        assert_eq!(parts.take(0).unwrap().len(), 100);
        driver.kick();
        assert!(driver.sockets().unwrap().completion().is_none());
        // A cancellation of what is over hits nobody that came after it.
        driver.sockets().unwrap().cancel(1);
        driver.sockets().unwrap().cancel(2);
        let done = next(&mut driver);
        assert_eq!((done.token, errno(&done)), (2, canceled));
        assert_eq!(Arc::strong_count(&ours), 1);
    }
}

#[test]
fn dropping_the_driver_lets_go_of_everything() {
    let mut driver = driver(4);
    let (ours, mut theirs) = pair();
    // What does not fit a socket's buffer, what never comes, and what never gets so far.
    driver
        .sockets()
        .unwrap()
        .send(1, Arc::clone(&ours), parts(16 << 20, 1));
    driver
        .sockets()
        .unwrap()
        .send(2, Arc::clone(&ours), parts(16 << 20, 2));
    driver
        .sockets()
        .unwrap()
        .receive(3, Arc::clone(&ours), parts(100, 0));
    driver.sockets().unwrap().poll(4, Arc::clone(&ours));
    driver.kick();
    driver
        .sockets()
        .unwrap()
        .receive(5, Arc::clone(&ours), parts(100, 0));
    let start = Instant::now();
    drop(driver);
    assert!(start.elapsed() < LONG);
    assert_eq!(Arc::strong_count(&ours), 1);
    drop(ours);
    // The kernel has let go of the socket as well.
    let mut rest = Vec::new();
    theirs.read_to_end(&mut rest).unwrap();
    assert!(!rest.is_empty() && rest.iter().all(|&byte| byte == 1));
}

/// Far more operations than the submission queue has entries, beside a full load of reads of the file.
#[test]
fn many_sockets_leave_room_for_files() {
    const SOCKETS: u64 = 400;
    let mut driver = driver(62);
    let pairs: Vec<_> = (0..SOCKETS).map(|_| pair()).collect();
    for round in 0..5u8 {
        let memory = RingMemory::new(62 * 512);
        for (token, (ours, _)) in (0..).zip(&pairs) {
            let mut sockets = driver.sockets().unwrap();
            sockets.receive(token, Arc::clone(ours), parts(64, 0));
        }
        for slot in 0..62 {
            use urus_engine::storage::Memory;
            let memory = memory.slice(slot * 512, 512);
            let kind = OpKind::Read { offset: 0, memory };
            let file = FileId(0);
            assert!(driver.submit(Op { file, kind }, slot).is_ok());
        }
        driver.kick();
        for (_, theirs) in &pairs {
            let mut theirs = theirs;
            theirs.write_all(&[round; 10]).unwrap();
        }
        let mut seen = vec![false; usize::try_from(SOCKETS).unwrap()];
        let (mut reads, mut receives) = (0, 0);
        let start = Instant::now();
        while reads < 62 || receives < SOCKETS {
            assert!(start.elapsed() < LONG, "{reads} {receives}");
            while let Some(completion) = driver.complete() {
                assert_eq!(completion.result.unwrap(), 512);
                reads += 1;
            }
            while let Some(done) = driver.sockets().unwrap().completion() {
                assert_eq!(done.result.unwrap(), 10);
                let mut parts = done.parts.unwrap();
                parts.forget_bytes();
                assert_eq!(parts.take(0).unwrap().as_slice()[..10], [round; 10]);
                let at = usize::try_from(done.token).unwrap();
                assert!(!std::mem::replace(&mut seen[at], true));
                receives += 1;
            }
            driver.kick();
            if reads < 62 || receives < SOCKETS {
                driver.wait(Some(Duration::from_millis(100)));
            }
        }
    }
}

#[test]
fn a_poll_and_a_notification_end_a_wait() {
    let mut driver = driver(8);
    let (ours, mut theirs) = pair();
    driver.sockets().unwrap().poll(9, ours);
    driver.kick();
    let notifier = driver.notifier();
    let start = Instant::now();
    std::thread::spawn(move || notifier.notify())
        .join()
        .unwrap();
    driver.wait(Some(LONG));
    assert!(driver.sockets().unwrap().completion().is_none());
    theirs.write_all(b"x").unwrap();
    driver.wait(Some(LONG));
    assert_eq!(next(&mut driver).token, 9);
    assert!(start.elapsed() < LONG);
}

/// For an event loop of the caller's: also what was cancelled before it started, of which the kernel knows nothing.
#[test]
fn the_event_fd_announces_sockets() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut driver = driver(8);
    let (ours, mut theirs) = pair();
    let event = driver.event_fd().unwrap().try_clone_to_owned().unwrap();
    for early in [false, true] {
        driver.consume_event();
        let socket = Arc::clone(&ours);
        driver.sockets().unwrap().receive(1, socket, parts(100, 0));
        if early {
            driver.sockets().unwrap().cancel(1);
            driver.kick();
        } else {
            driver.kick();
            theirs.write_all(b"x").unwrap();
        }
        let timeout = Timespec::try_from(LONG).unwrap();
        let polled = &mut [PollFd::new(&event, PollFlags::IN)];
        assert_eq!(poll(polled, Some(&timeout)).unwrap(), 1);
        driver.consume_event();
        assert!(driver.complete().is_none());
        let done = driver.sockets().unwrap().completion().unwrap();
        assert_eq!((done.token, done.result.is_err()), (1, early));
    }
}
