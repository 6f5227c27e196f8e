//! Which system calls a thread of each kind may make.
//!
//! Tried with glibc 2.34 and newer. What a call is for is said where it is not obvious. On no list: running a program,
//! making a process, tracing or signalling another one, any socket but a unix socket, executable memory, mounts, BPF,
//! changes of identity. docs/threat-model.md shows the lists; `cargo test -p berth-vmm --test threat_model` holds it
//! against this file.
#![forbid(unsafe_code)]

use std::fmt;

use libc::c_long;

use super::ThreadKind;

/// A system call that is allowed, perhaps with some arguments only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syscall {
    name: &'static str,
    pub(super) number: c_long,
    pub(super) check: Check,
}

/// A value and its name.
type Named = (&'static str, u32);

/// What arguments must look like; the first number is the argument's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Any,
    /// One of these, compared as 32 bits.
    OneOf(u8, &'static [Named]),
    /// None of these bits.
    Without(u8, &'static str, u64),
    /// All of these bits.
    With(u8, &'static str, u64),
    /// A request of KVM's.
    Kvm,
    /// Our process id.
    OwnProcess(u8),
}

impl fmt::Display for Syscall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name.strip_prefix("SYS_").unwrap_or(self.name))?;
        match self.check {
            Check::Any => Ok(()),
            Check::OneOf(_, values) => {
                let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
                write!(f, " ({})", names.join(", "))
            }
            Check::Without(_, bit, _) => write!(f, " (not {bit})"),
            Check::With(_, bit, _) => write!(f, " (only {bit})"),
            Check::Kvm => f.write_str(" (KVM's)"),
            Check::OwnProcess(_) => f.write_str(" (this process)"),
        }
    }
}

macro_rules! any {
    ($($call:ident),* $(,)?) => {
        &[$(Syscall { name: stringify!($call), number: libc::$call, check: Check::Any }),*]
    };
}

macro_rules! checked {
    ($call:ident, $check:expr) => {
        Syscall {
            name: stringify!($call),
            number: libc::$call,
            check: $check,
        }
    };
}

macro_rules! named {
    ($($value:ident),* $(,)?) => { &[$((stringify!($value), libc::$value as u32)),*] };
}

/// Where an ioctl's request says whose it is, and KVM's mark there (KVMIO).
pub(super) const IOCTL_TYPE: u64 = 0xff00;
pub(super) const KVM_TYPE: u64 = 0xae00;

const fn io(nr: u32) -> u32 {
    0xae << 8 | nr
}

const fn iow(nr: u32, size: u32) -> u32 {
    1 << 30 | size << 16 | io(nr)
}

const fn ior(nr: u32, size: u32) -> u32 {
    2 << 30 | size << 16 | io(nr)
}

/// What a vCPU asks KVM for. KVM_RUN first: it is compared first.
const VCPU_KVM: Syscall = checked!(
    SYS_ioctl,
    Check::OneOf(
        1,
        &[
            ("KVM_RUN", io(0x80)),
            ("KVM_KVMCLOCK_CTRL", io(0xad)),
            ("KVM_GET_REGS", ior(0x81, 144)),
            ("KVM_GET_SREGS", ior(0x83, 312)),
            ("KVM_GET_VCPU_EVENTS", ior(0x9f, 64)),
            // What the guest's writes to configuration space and MSI-X tables come to.
            ("KVM_IRQFD", iow(0x76, 32)),
            ("KVM_IOEVENTFD", iow(0x79, 64)),
            ("KVM_SET_GSI_ROUTING", iow(0x6a, 8)),
            ("KVM_SIGNAL_MSI", iow(0xa5, 32)),
            ("KVM_IRQ_LINE", iow(0x61, 8)),
        ]
    )
);

/// What is tried and can be done without, so it is answered with an error and not with death: glibc's allocator reads
/// a file of /proc when it gives memory back, and the printing of a backtrace looks for debug information.
pub(super) const WITHOUT: [Syscall; 2] = [
    checked!(
        SYS_openat,
        Check::OneOf(
            2,
            &[
                ("O_RDONLY with O_CLOEXEC", READ_ONLY),
                ("O_RDONLY", libc::O_RDONLY as u32)
            ]
        )
    ),
    checked!(SYS_readlink, Check::Any),
];
const READ_ONLY: u32 = (libc::O_RDONLY | libc::O_CLOEXEC) as u32;

/// clone3 passes its flags in memory, where no filter can see whether it makes a thread or a process. The C library
/// takes clone where the kernel says that it has no clone3.
pub(super) const CLONE3: Syscall = checked!(SYS_clone3, Check::Any);

/// Every thread: open files, memory, waiting, time, the log, signals of its own, and its end.
const COMMON: &[&[Syscall]] = &[
    any![
        SYS_read,
        SYS_readv,
        SYS_write,
        SYS_writev,
        SYS_close,
        SYS_fstat,
        SYS_poll,
        SYS_ppoll,
        SYS_epoll_wait,
        SYS_epoll_pwait,
        SYS_epoll_create1,
        SYS_epoll_ctl,
        SYS_futex,
        SYS_munmap,
        SYS_mremap,
        SYS_madvise,
        SYS_brk,
        SYS_getrandom,
        SYS_clock_gettime,
        SYS_clock_nanosleep,
        SYS_nanosleep,
        SYS_restart_syscall,
        SYS_sched_yield,
        SYS_sched_getaffinity,
        SYS_rt_sigaction,
        SYS_rt_sigprocmask,
        SYS_rt_sigreturn,
        SYS_sigaltstack,
        SYS_getpid,
        SYS_gettid,
        SYS_getcwd,
        SYS_rseq,
        SYS_set_robust_list,
        SYS_exit,
        SYS_exit_group,
        // An answer with an error: see WITHOUT.
        SYS_readlink,
    ],
    &[
        checked!(
            SYS_fcntl,
            Check::OneOf(1, named![F_GETFD, F_DUPFD_CLOEXEC, F_GETFL])
        ),
        // Of open files, not of paths.
        checked!(
            SYS_statx,
            Check::With(2, "AT_EMPTY_PATH", libc::AT_EMPTY_PATH as u64)
        ),
        checked!(
            SYS_mmap,
            Check::Without(2, "PROT_EXEC", libc::PROT_EXEC as u64)
        ),
        checked!(
            SYS_mprotect,
            Check::Without(2, "PROT_EXEC", libc::PROT_EXEC as u64)
        ),
        // Names of threads and of memory.
        checked!(
            SYS_prctl,
            Check::OneOf(0, named![PR_SET_NAME, PR_GET_NAME, PR_SET_VMA])
        ),
        // Kicking a vCPU, aborting.
        checked!(SYS_tgkill, Check::OwnProcess(0)),
        // Setting the terminal back before a crash ends the process.
        checked!(SYS_ioctl, Check::OneOf(1, named![TCGETS, TCSETS])),
    ],
    &WITHOUT,
];

/// Starting a thread: never a process; clone3 answers that it does not exist. The new thread narrows itself.
const THREADS: &[&[Syscall]] = &[
    any![SYS_clone3],
    &[
        checked!(
            SYS_clone,
            Check::With(0, "CLONE_THREAD", libc::CLONE_THREAD as u64)
        ),
        checked!(
            SYS_seccomp,
            Check::OneOf(0, named![SECCOMP_SET_MODE_FILTER])
        ),
        checked!(SYS_prctl, Check::OneOf(0, named![PR_SET_NO_NEW_PRIVS])),
    ],
];

/// A vCPU: the guest's accesses start devices and move doorbells.
const VCPU: &[&[Syscall]] = &[any![SYS_eventfd2], &[VCPU_KVM]];

/// A thread that a vCPU starts leaves the CPUs that the vCPU is kept to.
const OWN_CPUS: &[&[Syscall]] = &[&[checked!(
    SYS_sched_setaffinity,
    Check::OneOf(0, &[("this thread", 0)])
)]];

/// Clients of a socket that listens already.
const SERVER: &[&[Syscall]] = &[
    any![
        SYS_accept4,
        SYS_recvfrom,
        SYS_recvmsg,
        SYS_sendto,
        SYS_shutdown,
        SYS_setsockopt,
        SYS_getsockopt,
        // Our own memory, of an open file of /proc.
        SYS_pread64,
        // The socket is removed at the end.
        SYS_unlink,
    ],
    &[checked!(SYS_ioctl, Check::OneOf(1, named![FIONBIO]))],
];

/// A session with a backend: dial it again, messages with descriptors.
const VHOST_USER: &[&[Syscall]] = &[
    any![
        SYS_connect,
        SYS_sendmsg,
        SYS_recvmsg,
        SYS_recvfrom,
        SYS_sendto,
        SYS_shutdown,
        SYS_setsockopt,
        SYS_getsockopt,
        SYS_eventfd2,
        SYS_lseek,
        // A backend that connects to us; the socket is removed at the end.
        SYS_accept4,
        SYS_unlink,
    ],
    &[
        checked!(SYS_socket, UNIX_ONLY),
        checked!(SYS_socketpair, UNIX_ONLY),
        checked!(SYS_ioctl, Check::OneOf(1, named![FIONBIO])),
    ],
];
const UNIX_ONLY: Check = Check::OneOf(0, named![AF_UNIX]);

/// Files by path, as Landlock allows them, and memory for a guest.
const BOOT: &[&[Syscall]] = &[
    any![
        SYS_bind,
        SYS_listen,
        SYS_openat,
        SYS_stat,
        SYS_lstat,
        SYS_statx,
        SYS_newfstatat,
        SYS_access,
        SYS_pread64,
        SYS_lseek,
        SYS_memfd_create,
        SYS_ftruncate,
        SYS_fallocate,
        SYS_timerfd_create,
        SYS_timerfd_settime,
        SYS_landlock_create_ruleset,
        SYS_landlock_add_rule,
        SYS_landlock_restrict_self,
        SYS_sched_setaffinity,
    ],
    &[
        checked!(SYS_ioctl, Check::Kvm),
        // Seals of guest memory.
        checked!(
            SYS_fcntl,
            Check::OneOf(1, named![F_ADD_SEALS, F_GET_SEALS, F_SETFD, F_SETFL])
        ),
    ],
];

/// The main thread besides: sockets to listen on and pseudo-terminals, when the API makes a new guest; the
/// launcher's end; what its thread `advice` looks for.
const MAIN: &[&[Syscall]] = &[
    any![SYS_getsockname, SYS_unlinkat, SYS_waitid, SYS_mincore],
    &[checked!(
        SYS_ioctl,
        Check::OneOf(1, named![TIOCGPTN, TIOCSPTLCK, TIOCGPTPEER, TCSETSF])
    )],
];

/// Counting doorbells, where this user may.
const DOORBELLS: &[&[Syscall]] = &[
    any![SYS_perf_event_open],
    &[checked!(
        SYS_ioctl,
        Check::OneOf(1, &[("PERF_EVENT_IOC_SET_FILTER", 0x4008_2406)])
    )],
];

/// What every thread may do.
pub fn common() -> Vec<Syscall> {
    COMMON.iter().copied().flatten().copied().collect()
}

/// Whether a thread of that kind opens files by path.
pub(super) fn opens_files(kind: ThreadKind) -> bool {
    matches!(kind, ThreadKind::Main | ThreadKind::Boot)
}

/// What a thread of that kind may do; `doorbells`: whether KVM's tracepoints may be counted on this host.
pub fn allowed(kind: ThreadKind, doorbells: bool) -> Vec<Syscall> {
    let doorbells = if doorbells { DOORBELLS } else { &[] };
    let groups: &[&[&[Syscall]]] = match kind {
        ThreadKind::Main => &[
            VCPU, COMMON, THREADS, VHOST_USER, SERVER, BOOT, MAIN, doorbells,
        ],
        ThreadKind::Boot => &[VCPU, COMMON, THREADS, VHOST_USER, BOOT, doorbells],
        ThreadKind::Teardown => &[COMMON, VHOST_USER, &[&[checked!(SYS_ioctl, Check::Kvm)]]],
        ThreadKind::Vcpu => &[VCPU, COMMON, THREADS, OWN_CPUS],
        ThreadKind::Shadow => &[COMMON, OWN_CPUS],
        ThreadKind::VhostUser => &[COMMON, VHOST_USER],
        ThreadKind::Deadline => &[COMMON, &[any![SYS_shutdown]]],
        ThreadKind::Api | ThreadKind::Metrics => &[COMMON, SERVER],
        ThreadKind::SerialOut => &[COMMON, &[any![SYS_sendto, SYS_sendmsg]]],
        // Holes in guest memory.
        ThreadKind::Balloon => &[COMMON, &[any![SYS_fallocate]]],
        ThreadKind::Rng | ThreadKind::Plug => &[COMMON],
        // Which pages of guest memory are there.
        ThreadKind::Advice => &[COMMON, &[any![SYS_mincore]]],
    };
    groups
        .iter()
        .copied()
        .flatten()
        .copied()
        .flatten()
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether whatever `call` allows, one of `list` allows.
    fn covers(list: &[Syscall], call: &Syscall) -> bool {
        let same = || list.iter().filter(|other| other.number == call.number);
        let includes = |other: &Syscall| {
            let is_kvm = |value: &Named| u64::from(value.1) & IOCTL_TYPE == KVM_TYPE;
            match (other.check, call.check) {
                (Check::Any, _) => true,
                (Check::Kvm, Check::OneOf(1, values)) => values.iter().all(is_kvm),
                (theirs, ours) => theirs == ours,
            }
        };
        let each = |arg: u8, value: &Named| {
            same().any(|other| {
                matches!(other.check, Check::OneOf(of, values)
                    if of == arg && values.iter().any(|(_, other)| *other == value.1))
            })
        };
        same().any(includes)
            || matches!(call.check, Check::OneOf(arg, values) if values.iter().all(|v| each(arg, v)))
    }

    #[test]
    fn a_thread_may_do_no_more_than_the_one_that_starts_it() {
        let hot_plug = (ThreadKind::VhostUser, ThreadKind::Main);
        let started = ThreadKind::ALL.map(|kind| (kind, kind.parent()));
        for (kind, parent) in started.into_iter().chain([hot_plug]) {
            let theirs = allowed(parent, true);
            for call in allowed(kind, true) {
                assert!(
                    covers(&theirs, &call),
                    "{kind:?} may {call}, {parent:?} may not"
                );
            }
        }
    }

    #[test]
    fn no_thread_may_reach_out_of_the_process() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_setuid,
            libc::SYS_capset,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
        ];
        for kind in ThreadKind::ALL {
            let allowed = allowed(kind, true);
            assert!(
                allowed.iter().all(|call| !never.contains(&call.number)),
                "{kind:?}"
            );
        }
    }
}
