//! Why the kernel gives no ring, in words that name what can be changed.

use std::fs;
use std::io;
use std::sync::OnceLock;

/// What decides about rings besides the kernel's version.
#[derive(Clone, Copy, Debug, Default)]
struct Surroundings {
    /// `kernel.io_uring_disabled`: 0 for nobody, 1 but for a group and the superuser, 2 for all.
    disabled: Option<u32>,
    /// Whether the process began under a seccomp filter, such as a container's.
    filtered: Option<bool>,
    /// Bytes; None where there is no limit.
    memlock: Option<u64>,
    nofile: Option<u64>,
}

impl Surroundings {
    /// Looked at once, when the first image is opened: a process that confines itself cannot read these files later.
    fn seen() -> Self {
        static SEEN: OnceLock<Surroundings> = OnceLock::new();
        *SEEN.get_or_init(|| {
            let text = |path: &str| fs::read_to_string(path).ok();
            let status = text("/proc/self/status");
            let limits = text("/proc/self/limits").unwrap_or_default();
            Self {
                disabled: text("/proc/sys/kernel/io_uring_disabled")
                    .and_then(|value| value.trim().parse().ok()),
                filtered: status.and_then(|status| {
                    let mode = status
                        .lines()
                        .find_map(|line| line.strip_prefix("Seccomp:"))?;
                    Some(mode.trim() != "0")
                }),
                memlock: soft_limit(&limits, "Max locked memory"),
                nofile: soft_limit(&limits, "Max open files"),
            }
        })
    }
}

/// The soft limit of that name in `/proc/PID/limits`; None where there is none.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Looks at what [`explain`] will need.
pub(crate) fn look() {
    Surroundings::seen();
}

/// The likely cause of an error of setting up a ring, and what to do.
#[must_use]
pub fn explain_refusal(error: &io::Error) -> String {
    explain(error, Surroundings::seen())
}

fn explain(error: &io::Error, around: Surroundings) -> String {
    let limit =
        |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    match error.raw_os_error() {
        Some(libc::EMFILE) => format!(
            "the limit of open files is reached (RLIMIT_NOFILE, {} here): raise it (ulimit -n, LimitNOFILE=)",
            limit(around.nofile)
        ),
        Some(libc::ENFILE) => {
            "the system's limit of open files is reached: raise it (sysctl fs.file-max)".to_owned()
        }
        Some(libc::ENOMEM) => match around.memlock {
            Some(bytes) => format!(
                "the limit of locked memory is too low for the rings (RLIMIT_MEMLOCK, {bytes} bytes here), or memory is short: \
                 raise it (ulimit -l, LimitMEMLOCK=)"
            ),
            None => "memory is short".to_owned(),
        },
        Some(libc::EPERM | libc::EACCES) => match around {
            Surroundings {
                disabled: Some(2), ..
            } => "it is disabled for all processes (sysctl kernel.io_uring_disabled is 2): set it to 0".to_owned(),
            Surroundings {
                disabled: Some(1), ..
            } => "it is disabled for this user (sysctl kernel.io_uring_disabled is 1): set it to 0, or add the user's \
                  group as kernel.io_uring_group"
                .to_owned(),
            Surroundings {
                filtered: Some(true),
                ..
            } => "a seccomp filter forbids it, such as a container's or a service manager's: allow io_uring_setup, \
                  io_uring_enter and io_uring_register there"
                .to_owned(),
            _ => "a seccomp filter or a security module forbids it".to_owned(),
        },
        Some(libc::ENOSYS) if around.filtered == Some(true) => {
            "the kernel has no io_uring, or a seccomp filter hides it".to_owned()
        }
        Some(libc::ENOSYS) => "the kernel has no io_uring (CONFIG_IO_URING)".to_owned(),
        _ => "see the error".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    //! Guards the cause that a user is told: the limit or setting that stands in the way, and no other.
    use super::*;

    #[test]
    fn the_cause_is_named() {
        let around = |disabled, filtered| Surroundings {
            disabled: Some(disabled),
            filtered: Some(filtered),
            memlock: Some(65_536),
            nofile: Some(64),
        };
        for (errno, around, words) in [
            (libc::EMFILE, around(0, false), "RLIMIT_NOFILE, 64 here"),
            (libc::ENFILE, around(0, false), "fs.file-max"),
            (
                libc::ENOMEM,
                around(0, false),
                "RLIMIT_MEMLOCK, 65536 bytes",
            ),
            (libc::ENOMEM, Surroundings::default(), "memory is short"),
            (
                libc::EPERM,
                around(2, true),
                "kernel.io_uring_disabled is 2",
            ),
            (libc::EPERM, around(1, false), "kernel.io_uring_group"),
            (libc::EPERM, around(0, true), "seccomp"),
            (libc::EPERM, around(0, false), "security module"),
            (libc::ENOSYS, around(0, true), "seccomp"),
            (libc::ENOSYS, around(0, false), "CONFIG_IO_URING"),
        ] {
            let text = explain(&io::Error::from_raw_os_error(errno), around);
            assert!(text.contains(words), "{errno}: {text}");
        }
    }

    #[test]
    fn limits_are_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max locked memory         8388608              8388608              bytes     \n\
                    Max open files            unlimited            20000                files     \n";
        assert_eq!(soft_limit(text, "Max locked memory"), Some(8_388_608));
        assert_eq!(soft_limit(text, "Max open files"), None);
        let seen = Surroundings::seen();
        assert!(seen.filtered.is_some(), "{seen:?}");
    }
}
