//! Targets that break each rule, so that tests can see that whoever runs targets notices.

use std::hint::black_box;

use rustix::time::{ClockId, clock_gettime};

use crate::{Target, Verdict, target};

/// All of them. None is run unless it is asked for by name.
pub const TARGETS: [Target; 6] = [
    target("selftest-violation", violation, 64, 1),
    target("selftest-panic", panics, 64, 1),
    target("selftest-thread", panics_elsewhere, 64, 1),
    target("selftest-memory", memory, 64, 1),
    target("selftest-time", time, 64, 1),
    target("selftest-hang", hang, 64, 1),
];

/// Not every input fails: the run has to look for one that does.
fn is_chosen(data: &[u8]) -> bool {
    data.first().is_some_and(|byte| byte % 4 == 1)
}

fn violation(data: &[u8]) -> Verdict {
    if is_chosen(data) {
        return Err("a violation".to_owned());
    }
    Ok(())
}

fn panics(data: &[u8]) -> Verdict {
    assert!(!is_chosen(data), "a panic");
    Ok(())
}

fn panics_elsewhere(data: &[u8]) -> Verdict {
    let chosen = is_chosen(data);
    let thread = std::thread::spawn(move || assert!(!chosen, "a panic elsewhere"));
    let _ = thread.join();
    Ok(())
}

fn memory(data: &[u8]) -> Verdict {
    if is_chosen(data) {
        let pieces: Vec<Vec<u8>> = (0..260)
            .map(|piece| Vec::with_capacity(black_box(1 << 20) + piece))
            .collect();
        black_box(pieces);
    }
    Ok(())
}

fn time(data: &[u8]) -> Verdict {
    // Processor time, as it is judged: on a busy machine much more passes.
    let now = || clock_gettime(ClockId::ProcessCPUTime).tv_sec;
    let start = now();
    while is_chosen(data) && now() < start + 3 {
        black_box(0);
    }
    Ok(())
}

#[allow(clippy::empty_loop, reason = "it is what the watchdog is there for")]
fn hang(data: &[u8]) -> Verdict {
    while is_chosen(data) {
        black_box(0);
    }
    Ok(())
}
