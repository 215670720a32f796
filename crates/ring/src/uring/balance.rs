//! Who makes the buffered writes of a busy queue: this thread, or the kernel's workers.
//!
//! Which of the two makes more depends on the kernel, the file system and whether another processor is idle, and changes while a
//! machine runs. So it is measured: now and then, and ever less often while the answer stays the same, the other way is tried for a moment.
//! A queue with little in flight never asks: a worker on another processor gains nothing where nobody has anything else to do.

use std::time::{Duration, Instant};

/// A queue with fewer operations in flight is not busy.
const BUSY: usize = 8;
/// How often the clock is looked at, in writes.
const SAMPLE_WRITES: u32 = 64;
/// How long a way is watched at least.
const PERIOD: Duration = Duration::from_millis(10);
/// A period that lasts longer says nothing: the queue has rested meanwhile.
const PERIOD_MAX: Duration = Duration::from_millis(100);
/// Periods before the other way is tried (again), at first and at most.
const STAY_MIN: u32 = 4;
const STAY_MAX: u32 = 1024;
/// How much more the other way has to make, in percent: less may be chance.
const GAIN_PERCENT: f64 = 10.0;

/// Who makes a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The queue's thread, as it comes to it.
    Here,
    /// The ring.
    Ring,
}

impl Way {
    fn other(self) -> Self {
        match self {
            Self::Here => Self::Ring,
            Self::Ring => Self::Here,
        }
    }
}

/// The choice, and what it rests on.
pub(super) struct Balance {
    way: Way,
    /// While `way` is only tried: writes a second of the other.
    beside: Option<f64>,
    /// Periods until the other way is tried, and how many that were the last time.
    left: u32,
    stay: u32,
    began: Option<Instant>,
    writes: u32,
}

impl Balance {
    pub(super) fn new() -> Self {
        Self {
            way: Way::Here,
            beside: None,
            left: STAY_MIN,
            stay: STAY_MIN,
            began: None,
            writes: 0,
        }
    }

    /// Who makes the next write, with so many operations in flight.
    #[inline]
    pub(super) fn next(&mut self, in_flight: usize, now: impl FnOnce() -> Instant) -> Way {
        if in_flight < BUSY {
            return Way::Here;
        }
        self.writes += 1;
        if self.writes.is_multiple_of(SAMPLE_WRITES) {
            self.sample(now());
        }
        self.way
    }

    fn sample(&mut self, now: Instant) {
        let elapsed = self.began.map(|began| now.duration_since(began));
        match elapsed {
            Some(elapsed) if elapsed < PERIOD => return,
            Some(elapsed) if elapsed <= PERIOD_MAX => {
                self.period_over(f64::from(self.writes) / elapsed.as_secs_f64());
            }
            _ => {}
        }
        self.began = Some(now);
        self.writes = 0;
    }

    fn period_over(&mut self, rate: f64) {
        let Some(beside) = self.beside.take() else {
            self.left -= 1;
            if self.left == 0 {
                self.beside = Some(rate);
                self.way = self.way.other();
            }
            return;
        };
        self.stay = if rate > beside * (1.0 + GAIN_PERCENT / 100.0) {
            STAY_MIN
        } else {
            self.way = self.way.other();
            (self.stay * 2).min(STAY_MAX)
        };
        self.left = self.stay;
    }
}

#[cfg(test)]
mod tests {
    //! Guards against a queue that stays with the slower way, or wavers.
    use super::*;

    /// Writes for so long, where each way takes so many microseconds for one; how many went which way.
    fn run(balance: &mut Balance, now: &mut Instant, micros: [u64; 2], time: Duration) -> [u64; 2] {
        let (end, mut writes) = (*now + time, [0, 0]);
        while *now < end {
            let way = balance.next(BUSY, || *now);
            let index = usize::from(way == Way::Ring);
            writes[index] += 1;
            *now += Duration::from_micros(micros[index]);
        }
        writes
    }

    #[test]
    fn the_faster_way_is_found_and_kept() {
        let (mut balance, mut now) = (Balance::new(), Instant::now());
        let here = run(&mut balance, &mut now, [2, 6], Duration::from_secs(10));
        assert!(here[1] > 0, "the ring was tried");
        assert!(here[0] > here[1] * 100, "{here:?}");
        // Now another processor has become idle.
        run(&mut balance, &mut now, [3, 2], Duration::from_secs(11));
        let ring = run(&mut balance, &mut now, [3, 2], Duration::from_secs(10));
        assert!(ring[1] > ring[0] * 50, "{ring:?}");
    }

    #[test]
    fn a_small_gain_changes_nothing() {
        let (mut balance, mut now) = (Balance::new(), Instant::now());
        let writes = run(&mut balance, &mut now, [105, 100], Duration::from_secs(100));
        assert!(writes[0] > writes[1] * 50, "{writes:?}");
    }

    #[test]
    fn a_queue_that_is_not_busy_writes_here_and_asks_no_clock() {
        let mut balance = Balance::new();
        balance.way = Way::Ring;
        for _ in 0..10_000 {
            let way = balance.next(BUSY - 1, || panic!("nobody asked for the time"));
            assert_eq!(way, Way::Here);
        }
    }

    /// What was measured across a rest is thrown away: it would make either way look slow.
    #[test]
    fn a_rest_does_not_count() {
        let (mut balance, mut now) = (Balance::new(), Instant::now());
        for _ in 0..1000 {
            run(&mut balance, &mut now, [2, 1], PERIOD / 2);
            now += PERIOD_MAX;
        }
        assert_eq!((balance.way, balance.left), (Way::Here, STAY_MIN));
    }
}
