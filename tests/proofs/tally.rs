//! One line of the table for each part, as the simulator prints its own.

use std::fmt;
use std::time::{Duration, Instant};

/// How long a part goes on: until its first figure has reached a number, or for a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) rounds: u64,
    pub(crate) time: Duration,
}

/// So many violations are enough.
const MAX_VIOLATIONS: usize = 5;

/// What a part gave.
#[derive(Debug)]
pub(crate) struct Tally {
    part: &'static str,
    seed: u64,
    figures: Vec<(&'static str, u64)>,
    /// Of the first figure, by kind of image.
    kinds: Vec<(&'static str, u64)>,
    pub(crate) violations: Vec<String>,
    begin: Instant,
    budget: Budget,
}

impl Tally {
    /// The first of the figures is the one that the budget and the rate are about.
    pub(crate) fn new(
        part: &'static str,
        seed: u64,
        budget: Budget,
        figures: &[&'static str],
    ) -> Self {
        Self {
            part,
            seed,
            figures: figures.iter().map(|name| (*name, 0)).collect(),
            kinds: Vec::new(),
            violations: Vec::new(),
            begin: Instant::now(),
            budget,
        }
    }

    pub(crate) fn add(&mut self, name: &str, count: u64) {
        self.figure(name).1 += count;
    }

    /// Keeps the largest.
    pub(crate) fn most(&mut self, name: &str, count: u64) {
        let figure = self.figure(name);
        figure.1 = figure.1.max(count);
    }

    fn figure(&mut self, name: &str) -> &mut (&'static str, u64) {
        let found = self.figures.iter_mut().find(|(known, _)| *known == name);
        found.expect("a part names its figures first")
    }

    /// The first figure.
    pub(crate) fn done(&self) -> u64 {
        self.figures[0].1
    }

    /// Adds to what a kind of image has of the first figure.
    pub(crate) fn add_kind(&mut self, kind: &'static str, count: u64) {
        match self.kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, sum)) => *sum += count,
            None => self.kinds.push((kind, count)),
        }
    }

    /// What a kind of image has of it.
    pub(crate) fn of_kind(&self, kind: &str) -> u64 {
        let found = self.kinds.iter().find(|(known, _)| *known == kind);
        found.map_or(0, |(_, count)| *count)
    }

    /// Whether the budget has something left.
    pub(crate) fn goes_on(&self) -> bool {
        self.figures[0].1 < self.budget.rounds
            && self.begin.elapsed() < self.budget.time
            && self.violations.len() < MAX_VIOLATIONS
    }

    /// Rounds that are left.
    pub(crate) fn left(&self) -> u64 {
        self.budget.rounds.saturating_sub(self.figures[0].1)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.begin.elapsed().max(Duration::from_millis(1));
        write!(f, "{:<8}", self.part)?;
        for (name, count) in &self.figures {
            write!(f, " {count} {name},")?;
        }
        let hundredths = u128::from(self.figures[0].1) * 100_000 / time.as_millis();
        write!(
            f,
            " {} violations, {}.{:02} {} a second, seed {}",
            self.violations.len(),
            hundredths / 100,
            hundredths % 100,
            self.figures[0].0,
            self.seed
        )?;
        if !self.kinds.is_empty() {
            write!(f, "\n         {} of each:", self.figures[0].0)?;
            for (number, (name, count)) in self.kinds.iter().enumerate() {
                let separator = if number == 0 { "" } else { ";" };
                write!(f, "{separator} {name} {count}")?;
            }
        }
        Ok(())
    }
}
