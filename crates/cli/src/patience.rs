//! How long a server that ends waits for requests that cover much: a discard of terabytes must not keep it for minutes.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use urus::Device;

/// How long discards and write-zeroes under way may go on after the signal.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// While it lives, long requests are given their time; afterwards they are cut short. Dropped once the servers have ended.
pub(crate) struct Patience {
    over: Option<Sender<()>>,
    timer: Option<JoinHandle<()>>,
}

impl Patience {
    /// Starts the time. Without a thread to measure it, requests are waited for as long as they take.
    pub(crate) fn start(devices: Vec<Device>) -> Self {
        let (over, ended) = mpsc::channel();
        let timer = std::thread::Builder::new()
            .name("urus-patience".into())
            .spawn(move || {
                if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    tracing::warn!("discards and write-zeroes under way are cut short");
                    for device in devices {
                        device.cut_clearing_short();
                    }
                }
            })
            .inspect_err(|error| tracing::warn!(%error, "long requests are waited for"))
            .ok();
        Self {
            over: Some(over),
            timer,
        }
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        self.over = None;
        if let Some(timer) = self.timer.take() {
            let _ = timer.join();
        }
    }
}
