//! The table of system calls that serving images takes, from which both the filter and docs/SANDBOX.md are made.

/// A system call that is allowed once everything runs.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its name in the manual.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// With which arguments, in words; empty for any.
    pub condition: &'static str,
    /// Its number on this kind of machine; None where this kind has no such call.
    pub number: Option<i64>,
    pub(crate) only: Only,
}

/// With which arguments a call is allowed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Only {
    Any,
    /// An int that is one of these.
    OneOf {
        argument: u8,
        values: &'static [u64],
    },
    /// These bits of it are so.
    Masked {
        argument: u8,
        mask: u64,
        value: u64,
    },
    /// The id of the process.
    ThisProcess {
        argument: u8,
    },
}

impl Call {
    const fn new(name: &'static str, number: Option<i64>, purpose: &'static str) -> Self {
        Self {
            name,
            purpose,
            condition: "",
            number,
            only: Only::Any,
        }
    }

    const fn only(mut self, condition: &'static str, only: Only) -> Self {
        self.condition = condition;
        self.only = only;
        self
    }
}

/// A call that every kind of machine has for which there is a filter.
macro_rules! call {
    ($name:ident, $number:ident, $purpose:literal) => {
        Call::new(
            stringify!($name),
            {
                #[cfg(any(
                    target_arch = "x86_64",
                    target_arch = "aarch64",
                    target_arch = "riscv64"
                ))]
                let number = Some(libc::$number as i64);
                #[cfg(not(any(
                    target_arch = "x86_64",
                    target_arch = "aarch64",
                    target_arch = "riscv64"
                )))]
                let number = None;
                number
            },
            $purpose,
        )
    };
}

/// A call of x86-64 alone, which the C library there still uses.
macro_rules! old_call {
    ($name:ident, $number:ident, $purpose:literal) => {
        Call::new(
            stringify!($name),
            {
                #[cfg(target_arch = "x86_64")]
                let number = Some(libc::$number as i64);
                #[cfg(not(target_arch = "x86_64"))]
                let number = None;
                number
            },
            $purpose,
        )
    };
}

/// Constants of the kernel's, as 32 bits of a register hold them.
macro_rules! bits {
    ($($value:expr),+) => {
        &[$(($value as u64) & 0xFFFF_FFFF),+]
    };
}

#[allow(clippy::cast_sign_loss, reason = "a single bit")]
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;
#[allow(clippy::cast_sign_loss, reason = "a single bit")]
const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// Memory that is not to be run.
const NO_CODE: Only = Only::Masked {
    argument: 2,
    mask: PROT_EXEC,
    value: 0,
};

/// The calls, by what they are for.
#[must_use]
pub fn calls() -> &'static [Call] {
    CALLS
}

#[allow(
    clippy::cast_sign_loss,
    clippy::unnecessary_cast,
    reason = "constants of the kernel, as registers hold them"
)]
static CALLS: &[Call] = &[
    // Rings.
    call!(
        io_uring_enter,
        SYS_io_uring_enter,
        "I/O through a ring; which operations, the ring itself restricts"
    ),
    call!(
        io_uring_register,
        SYS_io_uring_register,
        "an eventfd for completions; a guest's memory, where it is pinned; letting go of files at the end"
    ),
    // The image, by the blocking driver and where the ring lacks an operation.
    call!(read, SYS_read, "eventfds, connections"),
    call!(write, SYS_write, "eventfds, connections, the log"),
    call!(readv, SYS_readv, "connections"),
    call!(writev, SYS_writev, "connections, the log"),
    call!(
        pread64,
        SYS_pread64,
        "the header, read again when a device is resumed"
    ),
    call!(preadv, SYS_preadv, "reads of the blocking driver"),
    call!(preadv2, SYS_preadv2, "reads of the blocking driver"),
    call!(
        pwrite64,
        SYS_pwrite64,
        "writes into the page cache, and of the blocking driver"
    ),
    call!(
        pwritev,
        SYS_pwritev,
        "writes into the page cache, and of the blocking driver"
    ),
    call!(
        pwritev2,
        SYS_pwritev2,
        "writes into the page cache, and of the blocking driver, with FUA"
    ),
    call!(fdatasync, SYS_fdatasync, "flushes of the blocking driver"),
    call!(fsync, SYS_fsync, "flushes of the blocking driver"),
    call!(
        fallocate,
        SYS_fallocate,
        "discard and zeroes of the blocking driver"
    ),
    call!(
        ftruncate,
        SYS_ftruncate,
        "growth of the image; memory for requests in flight"
    ),
    call!(
        lseek,
        SYS_lseek,
        "the size of a block device; holes of raw files"
    ),
    call!(
        fstat,
        SYS_fstat,
        "the length of the image; descriptors that a front end passes"
    ),
    call!(
        newfstatat,
        SYS_newfstatat,
        "the same, with newer C libraries; whose a socket file is before it is removed"
    ),
    call!(
        statx,
        SYS_statx,
        "whose a socket file is before it is removed"
    ),
    call!(
        fcntl,
        SYS_fcntl,
        "image locks, which pausing lets go of and resuming takes again; flags of descriptors"
    )
    .only(
        "flags, close-on-exec duplicates, seals, locks of open files",
        Only::OneOf {
            argument: 1,
            values: bits![
                libc::F_GETFD,
                libc::F_SETFD,
                libc::F_GETFL,
                libc::F_SETFL,
                libc::F_DUPFD_CLOEXEC,
                libc::F_OFD_GETLK,
                libc::F_OFD_SETLK,
                libc::F_ADD_SEALS,
                libc::F_GET_SEALS
            ],
        },
    ),
    call!(
        ioctl,
        SYS_ioctl,
        "sockets and eventfds that do not block; how much of a front end's message is there"
    )
    .only(
        "FIONBIO, FIONREAD",
        Only::OneOf {
            argument: 1,
            values: bits![libc::FIONBIO, libc::FIONREAD],
        },
    ),
    call!(close, SYS_close, "descriptors"),
    // What comes in.
    call!(accept4, SYS_accept4, "clients and front ends that connect"),
    call!(recvfrom, SYS_recvfrom, "connections"),
    call!(
        recvmsg,
        SYS_recvmsg,
        "a front end's messages, with descriptors of its memory"
    ),
    call!(sendto, SYS_sendto, "connections"),
    call!(
        sendmsg,
        SYS_sendmsg,
        "answers to a front end; replies of several pieces"
    ),
    call!(shutdown, SYS_shutdown, "the end of a connection"),
    call!(getsockname, SYS_getsockname, "who listens, for the log"),
    call!(
        getpeername,
        SYS_getpeername,
        "who has connected, for the log"
    ),
    call!(getsockopt, SYS_getsockopt, "who has connected, for the log"),
    call!(
        setsockopt,
        SYS_setsockopt,
        "buffers and keep-alive of connections"
    ),
    call!(
        memfd_create,
        SYS_memfd_create,
        "memory for requests in flight, which a front end keeps"
    ),
    call!(eventfd2, SYS_eventfd2, "waking threads"),
    // Waiting.
    call!(
        epoll_create1,
        SYS_epoll_create1,
        "waiting of a queue's thread"
    ),
    call!(epoll_ctl, SYS_epoll_ctl, "waiting of a queue's thread"),
    call!(epoll_pwait, SYS_epoll_pwait, "waiting of a queue's thread"),
    old_call!(epoll_wait, SYS_epoll_wait, "waiting of a queue's thread"),
    call!(
        ppoll,
        SYS_ppoll,
        "waiting for clients, front ends and completions"
    ),
    old_call!(
        poll,
        SYS_poll,
        "waiting for clients, front ends and completions"
    ),
    call!(
        clock_gettime,
        SYS_clock_gettime,
        "time, where the kernel does not tell it without a call"
    ),
    call!(clock_nanosleep, SYS_clock_nanosleep, "rests after an error"),
    call!(nanosleep, SYS_nanosleep, "rests after an error"),
    call!(
        restart_syscall,
        SYS_restart_syscall,
        "waiting that a signal has interrupted"
    ),
    call!(
        gettimeofday,
        SYS_gettimeofday,
        "time, where the kernel does not tell it without a call"
    ),
    // Threads and their locks.
    call!(clone, SYS_clone, "threads for decompression and other work").only(
        "threads, no processes",
        Only::Masked {
            argument: 0,
            mask: CLONE_THREAD,
            value: CLONE_THREAD,
        },
    ),
    call!(
        clone3,
        SYS_clone3,
        "answered as if the kernel did not have it, so that the C library uses clone"
    ),
    call!(futex, SYS_futex, "locks"),
    call!(
        set_robust_list,
        SYS_set_robust_list,
        "the start of a thread"
    ),
    call!(rseq, SYS_rseq, "the start of a thread"),
    call!(
        sched_getaffinity,
        SYS_sched_getaffinity,
        "how many threads make sense; the start of a thread"
    ),
    call!(sched_yield, SYS_sched_yield, "polling and locks"),
    call!(gettid, SYS_gettid, "the start of a thread"),
    call!(getpid, SYS_getpid, "the end after a panic"),
    call!(prctl, SYS_prctl, "the name of a thread").only(
        "PR_SET_NAME",
        Only::OneOf {
            argument: 0,
            values: bits![libc::PR_SET_NAME],
        },
    ),
    call!(membarrier, SYS_membarrier, "locks"),
    call!(exit, SYS_exit, "the end of a thread"),
    call!(exit_group, SYS_exit_group, "the end"),
    // Memory.
    call!(mmap, SYS_mmap, "memory, of guests too").only("nothing that can be run", NO_CODE),
    call!(mprotect, SYS_mprotect, "memory").only("nothing that can be run", NO_CODE),
    call!(munmap, SYS_munmap, "memory, of guests too"),
    call!(mremap, SYS_mremap, "memory"),
    call!(madvise, SYS_madvise, "memory"),
    call!(brk, SYS_brk, "memory"),
    call!(getrandom, SYS_getrandom, "TLS, hash tables"),
    // Signals.
    call!(
        rt_sigaction,
        SYS_rt_sigaction,
        "signals that end the server"
    ),
    call!(
        rt_sigprocmask,
        SYS_rt_sigprocmask,
        "signals; the start of a thread"
    ),
    call!(rt_sigreturn, SYS_rt_sigreturn, "signals"),
    call!(
        sigaltstack,
        SYS_sigaltstack,
        "the start and the end of a thread"
    ),
    call!(
        tgkill,
        SYS_tgkill,
        "the end after a panic that cannot be caught"
    )
    .only("to this process", Only::ThisProcess { argument: 0 }),
    // Paths.
    call!(
        getcwd,
        SYS_getcwd,
        "absolute names of sockets, to be told to clients"
    ),
    call!(unlinkat, SYS_unlinkat, "own sockets; Landlock says where"),
    old_call!(unlink, SYS_unlink, "own sockets; Landlock says where"),
];
