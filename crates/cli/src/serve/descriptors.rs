//! Descriptors: how many the process may have, how many it needs, and what of that does not fit.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What no connection is given: for control, metrics, the memory and eventfds of a virtual machine, files that the system opens on the way.
const KEPT: u64 = 48;

/// A queue's: its ring, its bell, its thread's inbox and epoll.
const PER_QUEUE: u64 = 4;

/// Of a virtual machine: regions of memory, and eventfds of each virtqueue (kept by two threads).
const PER_MACHINE: u64 = 40;
const PER_VIRTQUEUE: u64 = 6;

/// What a server is to do.
pub(super) struct Plan {
    /// Descriptors that are open.
    pub(super) open: u64,
    pub(super) images: u64,
    pub(super) queues: u64,
    pub(super) nbd: bool,
    pub(super) vhost_user: bool,
    pub(super) connections: u64,
}

impl Plan {
    /// What it needs besides connections.
    fn base(&self) -> u64 {
        // Each image has a thread of its own besides its queues.
        let mut base = self.open + KEPT + self.images * PER_QUEUE;
        if self.nbd {
            base += self.queues * (PER_QUEUE + self.images * 2);
        }
        if self.vhost_user {
            base += PER_MACHINE + self.queues * (PER_QUEUE + PER_VIRTQUEUE);
        }
        base
    }

    /// How many connections fit the limit, at least one.
    fn fit(&self, limit: u64) -> u64 {
        self.connections
            .min(limit.saturating_sub(self.base()).max(1))
    }
}

/// Raises the soft limit as far as the hard one allows it: who uses poll(2) and no select(2) has no use for a lower one.
pub(super) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// How many connections there can be at once. What does not fit is said, with what to do.
pub(super) fn connections_that_fit(plan: &Plan) -> usize {
    let wanted = plan.connections;
    let fit = match getrlimit(Resource::Nofile).current {
        Some(limit) => {
            let fit = plan.fit(limit);
            if fit < wanted {
                let needed = plan.base() + wanted;
                tracing::warn!(
                    "--max-connections {wanted} needs {needed} open files, and the limit is {limit}: {fit} connections are taken at once; raise the \
                     limit (ulimit -n {needed}, LimitNOFILE={needed})"
                );
            }
            fit
        }
        None => wanted,
    };
    usize::try_from(fit).unwrap_or(usize::MAX)
}

/// Descriptors that the process has now. (0 where /proc is missing: then the kept ones have to do.)
pub(super) fn open_now() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64)
}

#[cfg(test)]
mod tests {
    //! Guards the room for everything that is no connection.
    use super::*;

    #[test]
    fn connections_leave_room_for_the_rest() {
        let plan = Plan {
            open: 10,
            images: 1,
            queues: 4,
            nbd: true,
            vhost_user: false,
            connections: 2000,
        };
        assert_eq!(plan.fit(1 << 20), 2000);
        let fit = plan.fit(256);
        assert_eq!(fit + plan.base(), 256);
        assert!(fit > 100, "{fit}");
        assert_eq!(plan.fit(10), 1, "one is always tried");
        let more = Plan {
            vhost_user: true,
            images: 3,
            ..plan
        };
        assert!(more.fit(256) < fit);
    }
}
