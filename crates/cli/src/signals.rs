//! Signals that end the program, and a closed terminal.

use std::fs;
use std::io;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// SIGTERM and SIGINT, and SIGHUP unless it is ignored (nohup). From now on they are kept for [`Stop::wait`], and never kill the process
/// in the middle of something.
pub(crate) struct Stop {
    signals: Signals,
}

impl Stop {
    pub(crate) fn watch() -> io::Result<Self> {
        let mut wanted = vec![SIGTERM, SIGINT];
        if !is_ignored(SIGHUP) {
            wanted.push(SIGHUP);
        }
        Ok(Self {
            signals: Signals::new(wanted)?,
        })
    }

    /// Waits for one of them; returns its name.
    pub(crate) fn wait(&mut self) -> &'static str {
        self.signals.forever().next().map_or("no signal", name)
    }

    /// What ends [`wait`](Self::wait) without a signal.
    pub(crate) fn ender(&self) -> impl FnOnce() + Send + 'static {
        let handle = self.signals.handle();
        move || handle.close()
    }

    /// Whether one has come since.
    pub(crate) fn has_come(&mut self) -> bool {
        self.signals.pending().next().is_some()
    }
}

fn name(signal: i32) -> &'static str {
    match signal {
        SIGTERM => "SIGTERM",
        SIGINT => "SIGINT",
        SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

/// Whether the process was started with the signal ignored. Where `/proc` does not say, it was not.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}
