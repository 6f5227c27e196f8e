//! A list of allowed system calls as a seccomp program.
//!
//! Much like `vmm/src/sandbox/filter.rs`, on purpose apart from it (docs/adr/0004-two-sandboxes.md):
//! what is mended here is to be looked for there.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Mode;
use super::syscalls::{Check, Syscall};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A list that makes no program: a processor without support, too long a list.
    #[error("no filter for this machine")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused.
    #[error("the kernel takes no filter")]
    Apply(#[from] seccompiler::Error),
}

/// A program, ready for threads to apply to themselves.
pub(super) struct Filter(BpfProgram);

impl Filter {
    /// Allows `allowed`. Anything else is trapped, or logged in [`Mode::Log`].
    pub(super) fn new(mode: Mode, allowed: &[Syscall]) -> Result<Filter, FilterError> {
        let otherwise = match mode {
            Mode::Log => SeccompAction::Log,
            Mode::On | Mode::Off => SeccompAction::Trap,
        };
        program(rules_of(allowed)?, otherwise, SeccompAction::Allow).map(Filter)
    }

    /// Puts the filter in force for the calling thread, on top of those it has.
    pub(super) fn apply(&self) -> Result<(), FilterError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }

    /// Instructions.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// From now on these calls fail with `errno`, if other filters let them pass: for calls of the C and
/// Rust libraries that can do without.
pub(super) fn refuse(calls: &[Syscall], errno: libc::c_int) -> Result<(), FilterError> {
    let refused = SeccompAction::Errno(errno.unsigned_abs());
    let program = program(rules_of(calls)?, SeccompAction::Allow, refused)?;
    Ok(seccompiler::apply_filter(&program)?)
}

fn rules_of(calls: &[Syscall]) -> Result<BTreeMap<i64, Vec<SeccompRule>>, FilterError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls {
        let of_number = rules.entry(call.number).or_default();
        for condition in conditions(call.check)? {
            of_number.push(SeccompRule::new(vec![condition])?);
        }
    }
    // A call that some entry names with any arguments: no rule at all.
    for call in calls.iter().filter(|call| call.check == Check::Any) {
        rules.insert(call.number, Vec::new());
    }
    Ok(rules)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, FilterError> {
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, otherwise, matched, arch)?.try_into()?)
}

/// The conditions of a check, one of which must hold.
fn conditions(check: Check) -> Result<Vec<SeccompCondition>, FilterError> {
    use SeccompCmpArgLen::{Dword, Qword};
    let masked = |arg, mask, value| {
        let op = SeccompCmpOp::MaskedEq(mask);
        SeccompCondition::new(arg, Qword, op, value).map(|condition| vec![condition])
    };
    let equals = |arg, value| SeccompCondition::new(arg, Dword, SeccompCmpOp::Eq, value);
    Ok(match check {
        Check::Any => Vec::new(),
        Check::OneOf(arg, values) => {
            let each = values.iter().map(|value| equals(arg, u64::from(*value)));
            each.collect::<Result<_, _>>()?
        }
        Check::Without(arg, bits) => masked(arg, bits, 0)?,
        Check::With(arg, bits) => masked(arg, bits, bits)?,
        Check::OwnProcess(arg) => vec![equals(arg, u64::from(std::process::id()))?],
    })
}
