//! seccomp: from the table of calls to a filter over all threads.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use crate::Error;
use crate::calls::{Call, Only, calls};

/// Restricts all threads of the process to the [calls](crate::calls) that serving takes, for good; any other fails with EPERM.
///
/// On machines for which there is no filter (others than x86-64, aarch64 and riscv64) this is said in the log as a warning, and is no error.
///
/// # Errors
/// A kernel that refuses the filter. Some threads of a process that goes on may be restricted then.
pub fn restrict_calls() -> Result<(), Error> {
    let machine = std::env::consts::ARCH;
    let Ok(target) = TargetArch::try_from(machine) else {
        tracing::warn!(
            machine,
            "system calls are not restricted: there is no filter for this kind of machine"
        );
        return Ok(());
    };
    // The other way round, the second could not be installed. Of two answers, the stricter holds.
    apply_filter_all_threads(&clone3_is_unknown(target)?)?;
    apply_filter_all_threads(&allowed(target)?)?;
    tracing::debug!("system calls are restricted");
    Ok(())
}

/// The flags of clone3 lie in memory, where no filter can look: where it seems to be missing, the C library uses clone.
fn clone3_is_unknown(target: TargetArch) -> Result<BpfProgram, Error> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(errno(libc::ENOSYS));
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, unknown, target)?.try_into()?)
}

fn allowed(target: TargetArch) -> Result<BpfProgram, Error> {
    let mut rules = BTreeMap::new();
    for call in calls() {
        if let Some(number) = call.number {
            rules.insert(number, conditions(call)?);
        }
    }
    let refused = SeccompAction::Errno(errno(libc::EPERM));
    Ok(SeccompFilter::new(rules, refused, SeccompAction::Allow, target)?.try_into()?)
}

/// Any of which lets the call pass; none at all is any argument.
fn conditions(call: &Call) -> Result<Vec<SeccompRule>, Error> {
    let equal = |argument, value: u64| {
        // All of these are ints, of which the kernel looks at no more than 32 bits.
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let alternatives = match call.only {
        Only::Any => return Ok(Vec::new()),
        Only::OneOf { argument, values } => values
            .iter()
            .map(|&value| equal(argument, value))
            .collect::<Result<Vec<_>, _>>()?,
        Only::Masked {
            argument,
            mask,
            value,
        } => vec![SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Qword,
            SeccompCmpOp::MaskedEq(mask),
            value,
        )?],
        Only::ThisProcess { argument } => vec![equal(argument, std::process::id().into())?],
    };
    alternatives
        .into_iter()
        .map(|condition| Ok(SeccompRule::new(vec![condition])?))
        .collect()
}

fn errno(number: libc::c_int) -> u32 {
    number.unsigned_abs()
}
