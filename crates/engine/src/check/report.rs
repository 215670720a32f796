//! What a check finds.

use std::fmt;

use crate::error::Error;

/// Most findings kept of one severity; all are counted.
pub(super) const MAX_FINDINGS: usize = 500;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Severity {
    /// Data is lost or may be overwritten.
    Corruption,
    /// Clusters are kept that nothing uses: no harm to data.
    Leak,
    /// Something could not be checked.
    Error,
    /// Worth knowing, and not counted.
    Note,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Corruption => "corruption",
            Self::Leak => "leak",
            Self::Error => "error",
            Self::Note => "note",
        })
    }
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, and where.
    pub text: String,
    /// It was found, and is gone after the repair.
    pub repaired: bool,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let repaired = if self.repaired { " (repaired)" } else { "" };
        write!(f, "{}: {}{repaired}", self.severity, self.text)
    }
}

/// What a check found, in the terms of `qemu-img check`. After a repair the counts are those of a second
/// check, and the `_fixed` ones say what the repair has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Things wrong that may cost data.
    pub corruptions: u64,
    /// Clusters inside the file whose refcount is higher than the number of references to them.
    pub leaks: u64,
    /// Things that could not be checked. Nothing is repaired then.
    pub check_errors: u64,
    /// Corruptions repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends, in bytes from the start of the file.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Of those, how many have a host cluster or compressed data.
    pub allocated_clusters: u64,
    /// Of the allocated ones, how many do not follow their neighbour in the file.
    pub fragmented_clusters: u64,
    /// Of the allocated ones, how many are compressed.
    pub compressed_clusters: u64,
    /// Active entries whose COPIED flag is clear though the refcount is 1. Allowed (O10), and counted in
    /// [`corruptions`](Self::corruptions) because `qemu-img check` does.
    pub copied_clear_at_one: u64,
    /// Refcounts of clusters past the end of the file. Harmless, repaired with the leaks, and not counted in
    /// [`leaks`](Self::leaks): `qemu-img check` does not look there.
    pub leaks_past_end: u64,
    /// The findings: the first 500 of each severity.
    pub messages: Vec<Finding>,
    /// The first read that failed, of those counted in `check_errors`.
    pub(super) unread: Option<Error>,
    /// How many of each severity are kept.
    kept: [usize; 4],
}

impl CheckReport {
    /// Nothing is wrong that may cost data, and everything could be checked. (There may be leaks.)
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }

    /// As [`is_sound`](Self::is_sound), and nothing is leaked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.is_sound() && self.leaks == 0 && self.leaks_past_end == 0
    }

    pub(super) fn corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.add(Severity::Corruption, text);
    }

    pub(super) fn leak(&mut self, past_end: bool, text: impl FnOnce() -> String) {
        *(if past_end {
            &mut self.leaks_past_end
        } else {
            &mut self.leaks
        }) += 1;
        self.add(Severity::Leak, text);
    }

    pub(super) fn error(&mut self, text: impl FnOnce() -> String) {
        self.check_errors += 1;
        self.add(Severity::Error, text);
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        self.add(Severity::Note, text);
    }

    fn add(&mut self, severity: Severity, text: impl FnOnce() -> String) {
        let kept = &mut self.kept[severity as usize];
        if *kept < MAX_FINDINGS {
            *kept += 1;
            self.messages.push(Finding {
                severity,
                text: text(),
                repaired: false,
            });
        }
    }

    /// This report, of the check after a repair, with what the check `before` it had found, and what the repair could not read: it
    /// then ended early.
    pub(super) fn after(mut self, before: Self) -> Self {
        let complete = self.kept.iter().all(|kept| *kept < MAX_FINDINGS);
        let mut messages = before.messages;
        // What is still there is told by this report's own finding.
        messages.retain(|old| !self.messages.iter().any(|new| new.text == old.text));
        for finding in &mut messages {
            // Where findings were left out, nobody can say so.
            finding.repaired =
                complete && !matches!(finding.severity, Severity::Note | Severity::Error);
        }
        self.check_errors += before.check_errors;
        self.unread = before.unread.or(self.unread);
        messages.append(&mut self.messages);
        self.messages = messages;
        self
    }
}
