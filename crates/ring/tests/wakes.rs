//! What wakes a thread that waits for its driver, for both drivers.
//!
//! Guards against lost wake-ups: a wait that nothing ends is a disk that hangs.

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Bench, DEPTH, LONG, for_both_drivers, pattern, submit};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use urus_engine::storage::{FileId, Memory, OpKind, Slot, Storage};
use urus_ring::{Driver, DriverKind};

for_both_drivers![
    notify_wakes_a_wait,
    a_notification_before_the_wait_is_not_missed,
    wait_ends_when_the_time_is_over,
    no_notification_is_lost,
    event_fd_announces,
    event_fd_loses_nothing,
];

fn notify_wakes_a_wait(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let notifier = bench.driver.notifier();
    let rung = Arc::new(AtomicBool::new(false));
    let ringer = thread::spawn({
        let rung = Arc::clone(&rung);
        move || {
            thread::sleep(Duration::from_millis(50));
            rung.store(true, Ordering::Relaxed);
            notifier.notify();
        }
    });
    let start = Instant::now();
    while !rung.load(Ordering::Relaxed) {
        bench.driver.wait(None);
        assert!(start.elapsed() < LONG);
    }
    ringer.join().unwrap();
    assert!(bench.driver.complete().is_none());
}

fn a_notification_before_the_wait_is_not_missed(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let notifier = bench.driver.notifier();
    for round in 0..100 {
        notifier.notify();
        notifier.notify();
        if round % 2 == 0 {
            // Looking for completions must not swallow it.
            assert!(bench.driver.complete().is_none());
            bench.driver.kick();
        }
        let start = Instant::now();
        bench.driver.wait(Some(LONG));
        assert!(start.elapsed() < LONG / 2);
    }
}

fn wait_ends_when_the_time_is_over(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let start = Instant::now();
    bench.driver.wait(Some(Duration::ZERO));
    bench.driver.wait(Some(Duration::from_millis(30)));
    assert!(start.elapsed() >= Duration::from_millis(30) && start.elapsed() < LONG);
}

/// A ping-pong with no time limit: one lost wake-up and it hangs.
fn no_notification_is_lost(kind: DriverKind) {
    let mut bench = Bench::new(kind);
    let notifier = bench.driver.notifier();
    let (to_ringer, ringer_inbox) = std::sync::mpsc::channel::<u32>();
    let (to_driver, inbox) = std::sync::mpsc::channel::<u32>();
    let ringer = thread::spawn(move || {
        for round in ringer_inbox {
            if round % 3 == 0 {
                thread::yield_now();
            }
            to_driver.send(round).unwrap();
            notifier.notify();
        }
    });
    for round in 0..20_000 {
        to_ringer.send(round).unwrap();
        loop {
            if let Ok(answer) = inbox.try_recv() {
                assert_eq!(answer, round);
                break;
            }
            bench.driver.wait(None);
            if round % 5 == 0 {
                assert!(bench.driver.complete().is_none());
            }
        }
    }
    drop(to_ringer);
    ringer.join().unwrap();
}

fn is_readable(driver: &mut Driver, wait: bool) -> bool {
    let event = driver.event_fd().unwrap();
    let timeout = if wait {
        Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        }
    } else {
        Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }
    };
    poll(
        &mut [PollFd::new(&event.as_fd(), PollFlags::IN)],
        Some(&timeout),
    )
    .unwrap()
        == 1
}

fn event_fd_announces(kind: DriverKind) {
    let mut bench = Bench::with(kind, DEPTH, true, &pattern(1 << 20, 11));
    let driver = &mut bench.driver;
    assert!(is_readable(driver, false), "once after the first call");
    driver.consume_event();
    assert!(driver.complete().is_none());
    assert!(!is_readable(driver, false));

    // A read, in one system call or later.
    let memory = driver.allocate(512).unwrap();
    submit(driver, FileId(0), OpKind::Read { offset: 0, memory }, 0);
    driver.kick();
    assert!(is_readable(driver, true));
    driver.consume_event();
    assert!(driver.complete().is_some() && driver.complete().is_none());
    assert!(!is_readable(driver, false));

    // A job.
    submit(
        driver,
        FileId(0),
        OpKind::Job(Box::new(|| thread::sleep(Duration::from_millis(20)))),
        0,
    );
    driver.kick();
    assert!(is_readable(driver, true));
    driver.consume_event();
    assert!(driver.complete().is_some() && driver.complete().is_none());

    // A notification.
    let notifier = driver.notifier();
    for _ in 0..10 {
        while is_readable(driver, false) {
            driver.consume_event();
            assert!(driver.complete().is_none());
        }
        let notifier = Arc::clone(&notifier);
        let ringer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(5));
            notifier.notify();
        });
        assert!(is_readable(driver, true));
        ringer.join().unwrap();
    }
    driver.consume_event();
    assert!(driver.complete().is_none());
}

/// The event loop of an embedding program, with reads, jobs and notifications at once.
fn event_fd_loses_nothing(kind: DriverKind) {
    let mut bench = Bench::with(kind, 8, true, &pattern(1 << 20, 12));
    let driver = &mut bench.driver;
    let notifier = driver.notifier();
    let (sender, inbox) = std::sync::mpsc::channel::<u32>();
    let ringer = thread::spawn(move || {
        for message in 0..2000 {
            if message % 7 == 0 {
                thread::sleep(Duration::from_micros(200));
            }
            sender.send(message).unwrap();
            notifier.notify();
        }
    });
    let mut free = (0..8).collect::<Vec<Slot>>();
    let (mut started, mut ended, mut received) = (0_u64, 0, 0);
    let target = driver.allocate(4096 * 8).unwrap();
    while ended < 2000 || received < 2000 {
        while started < 2000
            && let Some(slot) = free.pop()
        {
            let kind = match started % 8 {
                0 => OpKind::Job(Box::new(|| ())),
                _ => OpKind::Read {
                    offset: started % 256 * 4096,
                    memory: target.slice(slot * 4096, 4096),
                },
            };
            submit(driver, FileId(0), kind, slot);
            started += 1;
        }
        driver.kick();
        assert!(
            is_readable(driver, true),
            "{started} started, {ended} ended, {received} received: nothing more comes"
        );
        driver.consume_event();
        received += inbox.try_iter().count();
        while let Some(completion) = driver.complete() {
            completion.result.unwrap();
            free.push(completion.slot);
            ended += 1;
        }
    }
    ringer.join().unwrap();
}
