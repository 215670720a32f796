//! Making a ring with the best the kernel has.

use std::io;

use io_uring::{IoUring, Probe, opcode};

/// A ring of `entries` submissions, by a ladder of flags from new kernels to old.
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
    builder.setup_clamp();
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

/// Checks that what every kernel since 5.13 has is there (others than Linux imitate io_uring in part), and returns
/// whether ftruncate is (6.9).
///
/// # Errors
/// `Unsupported`.
pub(super) fn probe(ring: &IoUring) -> io::Result<bool> {
    const NEEDED: [u8; 8] = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::PollRemove::CODE,
    ];
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if NEEDED.iter().all(|&code| probe.is_supported(code)) {
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
