//! What those who take clients need when there is no descriptor left: some kept back, and few words.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

/// Descriptors kept back: whoever must be heard when the process has none left lets them go, and has them again later.
#[derive(Debug)]
pub struct Spare {
    held: Vec<OwnedFd>,
    count: usize,
}

impl Spare {
    /// Keeps up to `count` descriptors back.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let mut spare = Self {
            held: Vec::with_capacity(count),
            count,
        };
        spare.refill();
        spare
    }

    /// Lets all of them go. False when there were none.
    pub fn release(&mut self) -> bool {
        let any = !self.held.is_empty();
        self.held.clear();
        any
    }

    /// Whether it keeps none back.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether all of them are held.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.held.len() == self.count
    }

    /// Tries to have all of them again.
    pub fn refill(&mut self) {
        while self.held.len() < self.count {
            match eventfd(0, EventfdFlags::CLOEXEC) {
                Ok(descriptor) => self.held.push(descriptor),
                Err(_) => return,
            }
        }
    }
}

/// Says the same thing at most once in a while.
#[derive(Debug, Default)]
pub struct Seldom {
    last: Option<Instant>,
    silent: u64,
}

/// How long the same thing is not said again.
const SILENCE: Duration = Duration::from_secs(10);

impl Seldom {
    /// Whether it is to be said now: how often it was not, since it last was.
    pub fn due(&mut self) -> Option<u64> {
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < SILENCE)
        {
            self.silent += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.silent))
    }
}

#[cfg(test)]
mod tests {
    //! Guards the log against floods.
    use super::*;

    #[test]
    fn the_same_is_said_once_in_a_while() {
        let mut seldom = Seldom::default();
        assert_eq!(seldom.due(), Some(0));
        assert_eq!((seldom.due(), seldom.due()), (None, None));
        seldom.last = seldom.last.and_then(|last| last.checked_sub(SILENCE));
        assert_eq!(seldom.due(), Some(2));
    }

    #[test]
    fn what_is_kept_back_is_let_go_and_had_again() {
        let mut spare = Spare::new(3);
        assert!(spare.release() && !spare.release());
        spare.refill();
        assert_eq!(spare.held.len(), 3);
    }
}
