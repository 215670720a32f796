//! Schedules in which now and then a thread is put aside for long, in the middle of anything, while the others go on. What goes
//! wrong only when all of a pause or a commit fits between two steps of another thread is rare where each step is drawn alone.

use std::collections::BTreeMap;

use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};
use urus_sim::rng::Rng;

/// The longest time that a thread is put aside, in steps of the others.
const LONGEST: u64 = 800;

/// See above.
pub(crate) struct Stalling {
    left: usize,
    seeds: Rng,
    seed: u64,
    rng: Rng,
    data: Rng,
    step: u64,
    /// Threads put aside, and the step that ends it.
    aside: BTreeMap<usize, u64>,
    /// Of 65,536 steps, so many put a thread aside.
    rate: u64,
}

impl Stalling {
    pub(crate) fn new(seed: u64, runs: usize) -> Self {
        Self {
            left: runs,
            seeds: Rng::new(seed),
            seed,
            rng: Rng::new(seed),
            data: Rng::new(seed),
            step: 0,
            aside: BTreeMap::new(),
            rate: 0,
        }
    }
}

impl Scheduler for Stalling {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.left = self.left.checked_sub(1)?;
        self.seed = match std::env::var("URUS_EXACT") {
            Ok(seed) => {
                self.left = 0;
                seed.parse().expect("a number")
            }
            Err(_) => self.seeds.next_u64(),
        };
        self.rng = Rng::new(self.seed);
        self.data = self.rng.fork(1);
        self.step = 0;
        self.aside.clear();
        self.rate = [200, 1000, 4000][self.rng.index(3)];
        Some(Schedule::new(self.seed))
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        yielding: bool,
    ) -> Option<TaskId> {
        self.step += 1;
        if let Some(current) = current
            && self.rng.below(65_536) < self.rate
        {
            let until = self.step + 1 + self.rng.below(LONGEST);
            self.aside.insert(usize::from(current), until);
        }
        let ids = || runnable.iter().map(|task| task.id());
        let ready: Vec<TaskId> = ids()
            .filter(|id| {
                let until = self.aside.get(&usize::from(*id)).copied().unwrap_or(0);
                until <= self.step && !(yielding && Some(*id) == current)
            })
            .collect();
        let goes_on = current.filter(|current| ready.contains(current));
        if let Some(current) = goes_on
            && self.rng.chance(176)
        {
            return Some(current);
        }
        if ready.is_empty() {
            let all: Vec<TaskId> = ids().collect();
            return Some(all[self.rng.index(all.len())]);
        }
        Some(ready[self.rng.index(ready.len())])
    }

    fn next_u64(&mut self) -> u64 {
        self.data.next_u64()
    }
}

impl Drop for Stalling {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this schedule again: URUS_EXACT={}", self.seed);
        }
    }
}
