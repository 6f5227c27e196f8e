//! Lists of allowed system calls as seccomp programs.
//!
//! Much like `backends/queue-worker/src/sandbox/filter.rs`, on purpose apart from it (docs/adr/0004-two-sandboxes.md):
//! what is mended here is to be looked for there.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::syscalls::{self, Check, Syscall};
use super::{Mode, ThreadKind};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A list that makes no program.
    #[error("no filter for this machine")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused.
    #[error("the kernel takes no filter")]
    Apply(#[from] seccompiler::Error),
}

/// The filters of a process; each is made when the first thread of its kind starts.
pub(super) struct Filters {
    mode: Mode,
    doorbells: bool,
    made: [OnceLock<Programs>; ThreadKind::ALL.len()],
}

/// What a thread applies, one after the other.
type Programs = Vec<BpfProgram>;

impl Filters {
    /// `doorbells`: whether KVM's tracepoints may be counted here.
    pub(super) fn new(mode: Mode, doorbells: bool) -> Self {
        Self {
            mode,
            doorbells,
            made: Default::default(),
        }
    }

    /// Puts the filter of that kind in force for the calling thread, on top of those it has.
    pub(super) fn apply(&self, kind: ThreadKind) -> Result<(), FilterError> {
        if self.mode == Mode::Off {
            return Ok(());
        }
        let slot = &self.made[kind as usize];
        let programs = match slot.get() {
            Some(programs) => programs,
            None => {
                let programs = programs(self.mode, kind, self.doorbells)?;
                slot.get_or_init(|| programs)
            }
        };
        for program in programs {
            seccompiler::apply_filter(program)?;
        }
        Ok(())
    }
}

fn programs(mode: Mode, kind: ThreadKind, doorbells: bool) -> Result<Programs, FilterError> {
    let otherwise = match mode {
        Mode::Log => SeccompAction::Log,
        Mode::On | Mode::Off => SeccompAction::Trap,
    };
    let allowed = syscalls::allowed(kind, doorbells);
    let mut programs = Vec::new();
    if mode == Mode::On {
        if kind == ThreadKind::Main {
            programs.push(refuse(&[syscalls::CLONE3], libc::ENOSYS)?);
        }
        if !syscalls::opens_files(kind) {
            programs.push(refuse(&syscalls::WITHOUT, libc::EACCES)?);
        }
    }
    programs.push(program(
        rules_of(&allowed)?,
        otherwise,
        SeccompAction::Allow,
    )?);
    Ok(programs)
}

/// These calls fail with `errno`, if other filters let them pass: for calls of the C and Rust libraries that can do
/// without.
fn refuse(calls: &[Syscall], errno: libc::c_int) -> Result<BpfProgram, FilterError> {
    let refused = SeccompAction::Errno(errno.unsigned_abs());
    program(rules_of(calls)?, SeccompAction::Allow, refused)
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
    let masked = |arg, len, mask, value| {
        let op = SeccompCmpOp::MaskedEq(mask);
        SeccompCondition::new(arg, len, op, value).map(|condition| vec![condition])
    };
    let equals = |arg, value| SeccompCondition::new(arg, Dword, SeccompCmpOp::Eq, value);
    Ok(match check {
        Check::Any => Vec::new(),
        Check::OneOf(arg, values) => {
            let each = values
                .iter()
                .map(|(_, value)| equals(arg, u64::from(*value)));
            each.collect::<Result<_, _>>()?
        }
        Check::Without(arg, _, bits) => masked(arg, Qword, bits, 0)?,
        Check::With(arg, _, bits) => masked(arg, Qword, bits, bits)?,
        Check::Kvm => masked(1, Dword, syscalls::IOCTL_TYPE, syscalls::KVM_TYPE)?,
        Check::OwnProcess(arg) => vec![equals(arg, u64::from(std::process::id()))?],
    })
}
