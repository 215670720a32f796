//! Making a ring with the best the kernel has.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode};

/// A ring of `entries` submissions, by a ladder of flags from new kernels to old. It does nothing until [`enable`].
///
/// # Errors
/// As io_uring_setup(2): `PermissionDenied` or `Unsupported` where it is forbidden or missing; `Unsupported` for
/// kernels before 5.13.
pub(crate) fn build(entries: u32) -> io::Result<IoUring> {
    let mut step = 0;
    let ring = loop {
        match build_step(step, entries) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && step < LAST_STEP => {
                step += 1
            }
            result => break result?,
        }
    };
    let params = ring.params();
    let complete = params.is_feature_nodrop() // 5.5: completions are never lost
        && params.is_feature_submit_stable() // 5.5: iovecs may go after submission
        && params.is_feature_ext_arg() // 5.11: waiting with a time limit
        && params.is_feature_native_workers() // 5.12
        && params.is_feature_resource_tagging(); // 5.13, as is multishot poll, which has no flag of its own
    if !complete {
        return Err(unsupported(
            "this kernel's io_uring is too old: Linux 5.13 or later is needed",
        ));
    }
    tracing::debug!(step, entries, ?params, "ring made");
    Ok(ring)
}

/// The last step of the ladder: flags that every kernel has.
const LAST_STEP: u32 = 3;

/// A ring with the flags of one step.
pub(crate) fn build_step(step: u32, entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // Until it is restricted.
    builder.setup_clamp().setup_r_disabled();
    match step {
        0 | 1 => {
            // 6.1: completions are worked off when this thread asks for them, not in its way.
            builder
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_coop_taskrun()
                .setup_taskrun_flag();
            builder.setup_submit_all();
            if step == 0 {
                builder.setup_no_sqarray(); // 6.6
            }
        }
        2 => {
            builder
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all(); // 5.19
        }
        _ => {}
    }
    builder.build(entries)
}

/// The operations of a ring, besides ftruncate.
const NEEDED: [u8; 10] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// The operations of a ring that serves sockets too.
const SOCKETS: [u8; 5] = [
    opcode::Recv::CODE,
    opcode::Send::CODE,
    opcode::RecvMsg::CODE,
    opcode::SendMsg::CODE,
    opcode::AsyncCancel::CODE,
];

/// Restricts the ring to what it is used for, and lets it begin. seccomp does not see what a ring does: an intruder in a process that may
/// not open files must not find a ring that can.
///
/// # Errors
/// As io_uring_register(2).
pub(super) fn enable(ring: &IoUring, ftruncate: bool, sockets: bool) -> io::Result<()> {
    /// `IORING_REGISTER_BUFFERS`, `IORING_UNREGISTER_BUFFERS`, `IORING_UNREGISTER_FILES` and `IORING_REGISTER_EVENTFD`, which
    /// `io_uring` does not export.
    const REGISTER_OPS: [u8; 4] = [0, 1, 3, 4];
    /// `IOSQE_FIXED_FILE`.
    const FLAGS: u8 = 1;
    let ftruncate = ftruncate.then_some(opcode::Ftruncate::CODE);
    let mut restrictions: Vec<_> = NEEDED
        .into_iter()
        .chain(ftruncate)
        .chain(SOCKETS.into_iter().filter(|_| sockets))
        .map(Restriction::sqe_op)
        .chain(REGISTER_OPS.map(Restriction::register_op))
        .collect();
    restrictions.push(Restriction::sqe_flags_allowed(FLAGS));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

/// Checks that what every kernel since 5.13 has is there (others than Linux imitate io_uring in part), and returns
/// whether ftruncate is (6.9).
///
/// # Errors
/// `Unsupported`.
pub(super) fn probe(ring: &IoUring, sockets: bool) -> io::Result<bool> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let mut needed = NEEDED
        .into_iter()
        .chain(SOCKETS.into_iter().filter(|_| sockets));
    if needed.all(|code| probe.is_supported(code)) {
        Ok(probe.is_supported(opcode::Ftruncate::CODE))
    } else {
        Err(unsupported(
            "this system's io_uring lacks operations that urus needs",
        ))
    }
}

fn unsupported(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, message)
}

#[cfg(test)]
mod tests {
    //! Guards the restrictions of a ring: what urus does not use is refused, on every step of the ladder.
    use super::*;
    use io_uring::types::Fd;

    #[test]
    fn a_ring_refuses_what_it_is_not_for() {
        for step in 0..=LAST_STEP {
            let mut ring = build_step(step, 8).unwrap();
            let ftruncate = probe(&ring, false).unwrap();
            enable(&ring, ftruncate, false).unwrap();
            let path = c"/dev/null";
            let entries = [
                opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build(),
                opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
                opcode::Nop::new().build(),
                opcode::Send::new(Fd(0), path.as_ptr().cast(), 1).build(),
                opcode::Recv::new(Fd(0), std::ptr::null_mut(), 0).build(),
                opcode::AsyncCancel::new(0).build(),
                // Allowed, but not without waiting for others.
                opcode::Fsync::new(Fd(0))
                    .build()
                    .flags(io_uring::squeue::Flags::IO_DRAIN),
            ];
            for entry in entries {
                // SAFETY: the path lives until the completion is here, and the others point to nothing.
                unsafe { ring.submission().push(&entry) }.unwrap();
                ring.submit_and_wait(1).unwrap();
                let completion = ring.completion().next().unwrap();
                assert_eq!(completion.result(), -libc::EACCES, "step {step}: {entry:?}");
            }
            let registered = ring.submitter().register_files(&[0]).unwrap_err();
            assert_eq!(registered.raw_os_error(), Some(libc::EACCES), "step {step}");
        }
    }

    #[test]
    fn a_ring_for_sockets_makes_and_takes_no_connections() {
        for step in 0..=LAST_STEP {
            let mut ring = build_step(step, 8).unwrap();
            let ftruncate = probe(&ring, true).unwrap();
            enable(&ring, ftruncate, true).unwrap();
            let entries = [
                opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
                opcode::Connect::new(Fd(0), std::ptr::null(), 0).build(),
                opcode::Accept::new(Fd(0), std::ptr::null_mut(), std::ptr::null_mut()).build(),
                opcode::Shutdown::new(Fd(0), 0).build(),
                opcode::Close::new(Fd(0)).build(),
            ];
            for entry in entries {
                // SAFETY: they point to nothing.
                unsafe { ring.submission().push(&entry) }.unwrap();
                ring.submit_and_wait(1).unwrap();
                let completion = ring.completion().next().unwrap();
                assert_eq!(completion.result(), -libc::EACCES, "step {step}: {entry:?}");
            }
        }
    }

    /// What docs/SANDBOX.md counts on: io_uring is no way around Landlock, even with a ring that may do everything.
    #[test]
    fn landlock_holds_for_what_a_ring_does() {
        let open = || {
            let mut ring = IoUring::new(2).unwrap();
            let path = c"/etc/passwd";
            let entry = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
            // SAFETY: the path lives until the completion is here.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        assert!(open() > 0);
        let confined = std::thread::spawn(move || {
            use landlock::{ABI, Access, AccessFs, Ruleset, RulesetAttr};
            let ruleset = Ruleset::default().handle_access(AccessFs::from_all(ABI::V1));
            let created = ruleset.and_then(Ruleset::create).unwrap();
            created.restrict_self().unwrap();
            open()
        });
        assert_eq!(confined.join().unwrap(), -libc::EACCES);
    }
}
