//! Which system calls a thread of each kind may make.
//!
//! The lists are tried with glibc (2.34 and newer, whose allocator opens no file to count processors)
//! and with musl. What a call is for is said where it is not obvious; a device adds what its workers
//! do ([`Device::syscalls`](crate::Device::syscalls)). Never on a list: anything that opens a file by
//! path, makes a socket, runs a program, makes a process, or reaches into another one.
#![forbid(unsafe_code)]

use libc::c_long;

/// A system call that is allowed, perhaps with some arguments only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syscall {
    pub(super) number: c_long,
    pub(super) check: Check,
}

/// What arguments must look like; the first number is the argument's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Any,
    /// One of these, compared as 32 bits.
    OneOf(u8, &'static [u32]),
    /// None of these bits.
    Without(u8, u64),
    /// All of these bits.
    With(u8, u64),
    /// Our process id.
    OwnProcess(u8),
}

impl Syscall {
    /// With any arguments.
    pub const fn any(number: c_long) -> Syscall {
        let check = Check::Any;
        Syscall { number, check }
    }

    /// ioctl with one of these requests.
    pub const fn ioctl(requests: &'static [u32]) -> Syscall {
        Syscall {
            number: libc::SYS_ioctl,
            check: Check::OneOf(1, requests),
        }
    }

    /// fcntl with one of these commands.
    pub const fn fcntl(commands: &'static [u32]) -> Syscall {
        Syscall::one_of(libc::SYS_fcntl, 1, commands)
    }

    const fn one_of(number: c_long, arg: u8, values: &'static [u32]) -> Syscall {
        let check = Check::OneOf(arg, values);
        Syscall { number, check }
    }

    const fn not_executable(number: c_long) -> Syscall {
        let check = Check::Without(2, libc::PROT_EXEC as u64);
        Syscall { number, check }
    }
}

/// For devices whose workers use an io_uring. What the ring may do is its own restriction.
pub const IO_URING: [Syscall; 3] = [
    Syscall::any(libc::SYS_io_uring_setup),
    Syscall::any(libc::SYS_io_uring_enter),
    Syscall::any(libc::SYS_io_uring_register),
];

/// What is tried and can be done without, so it is answered with an error and not with
/// death: glibc's allocator reads a file of /proc when it gives memory back, and the printing of a
/// backtrace looks for debug information.
pub(super) const WITHOUT: &[Syscall] = &[
    Syscall::one_of(
        libc::SYS_openat,
        2,
        &[
            READ_ONLY,
            READ_ONLY | LARGE_FILE,
            READ_DIRECTORY,
            READ_DIRECTORY | LARGE_FILE,
        ],
    ),
    #[cfg(all(target_env = "musl", target_arch = "x86_64"))]
    Syscall::one_of(
        libc::SYS_open,
        1,
        &[READ_ONLY, READ_ONLY | LARGE_FILE, MUSL_DIRECTORY],
    ),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_readlink),
    #[cfg(not(target_arch = "x86_64"))]
    Syscall::any(libc::SYS_readlinkat),
];
const READ_ONLY: u32 = (libc::O_RDONLY | libc::O_CLOEXEC) as u32;
/// Who holds a lock is found out where /proc can be read, and not said where it cannot.
const READ_DIRECTORY: u32 = READ_ONLY | (libc::O_DIRECTORY | libc::O_NONBLOCK) as u32;
#[cfg(all(target_env = "musl", target_arch = "x86_64"))]
const MUSL_DIRECTORY: u32 = READ_ONLY | LARGE_FILE | libc::O_DIRECTORY as u32;
/// What musl adds; glibc's constant is 0 on 64-bit machines.
const LARGE_FILE: u32 = 0o100_000;

/// clone3 passes its flags in memory, where no filter can see whether it makes a thread or a
/// process. The C library takes clone where the kernel says that it has no clone3.
pub(super) const CLONE3: Syscall = Syscall::any(libc::SYS_clone3);

/// Every thread: memory, waiting, time, the log, signals of its own, and its end.
const COMMON: &[Syscall] = &[
    Syscall::any(libc::SYS_read),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_close),
    // Before a close, in debug builds.
    Syscall::fcntl(&[libc::F_GETFD as u32]),
    Syscall::any(libc::SYS_ppoll),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_futex),
    // Of open files: which one it is, how large it is now.
    Syscall::any(libc::SYS_fstat),
    Syscall::any(libc::SYS_statx),
    Syscall::any(libc::SYS_newfstatat),
    Syscall::not_executable(libc::SYS_mmap),
    Syscall::not_executable(libc::SYS_mprotect),
    Syscall::any(libc::SYS_munmap),
    Syscall::any(libc::SYS_mremap),
    Syscall::any(libc::SYS_madvise),
    Syscall::any(libc::SYS_brk),
    Syscall::any(libc::SYS_getrandom),
    Syscall::any(libc::SYS_clock_gettime),
    Syscall::any(libc::SYS_clock_nanosleep),
    Syscall::any(libc::SYS_nanosleep),
    Syscall::any(libc::SYS_restart_syscall),
    Syscall::any(libc::SYS_sched_yield),
    Syscall::any(libc::SYS_rt_sigaction),
    Syscall::any(libc::SYS_rt_sigprocmask),
    Syscall::any(libc::SYS_rt_sigreturn),
    Syscall::any(libc::SYS_sigaltstack),
    Syscall::any(libc::SYS_getpid),
    Syscall::any(libc::SYS_gettid),
    // For a backtrace.
    Syscall::any(libc::SYS_getcwd),
    // abort, and the interruption of a worker.
    Syscall {
        number: libc::SYS_tgkill,
        check: Check::OwnProcess(0),
    },
    Syscall::one_of(
        libc::SYS_prctl,
        0,
        &[libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32],
    ),
    Syscall::any(libc::SYS_rseq),
    Syscall::any(libc::SYS_exit),
    Syscall::any(libc::SYS_exit_group),
];

/// A worker besides: kick fds are read with preadv2, an io_uring comes with an eventfd, a rate limit
/// with a timer.
const WORKER: &[Syscall] = &[
    Syscall::any(libc::SYS_preadv2),
    Syscall::any(libc::SYS_eventfd2),
    Syscall::any(libc::SYS_timerfd_create),
    Syscall::any(libc::SYS_timerfd_settime),
    Syscall::any(libc::SYS_timerfd_gettime),
];

/// A helper besides: one socket, and the size of an image that has grown.
const HELPER: &[Syscall] = &[
    Syscall::any(libc::SYS_lseek),
    Syscall::any(libc::SYS_accept4),
    Syscall::any(libc::SYS_recvfrom),
    Syscall::any(libc::SYS_sendto),
    Syscall::any(libc::SYS_setsockopt),
    Syscall::any(libc::SYS_fcntl),
    Syscall::ioctl(&[libc::FIONBIO as u32]),
];

/// The control thread besides: the session, and threads to start.
const CONTROL: &[Syscall] = &[
    Syscall::any(libc::SYS_recvmsg),
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_shutdown),
    Syscall::any(libc::SYS_getsockopt),
    // The page size of files that the frontend gives.
    Syscall::any(libc::SYS_fstatfs),
    // Our sockets go at the end.
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_lstat),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_unlink),
    Syscall::any(libc::SYS_unlinkat),
    // Memory to share with the frontend.
    Syscall::any(libc::SYS_memfd_create),
    Syscall::any(libc::SYS_ftruncate),
    // A thread, never a process; clone3 answers that it does not exist.
    Syscall {
        number: libc::SYS_clone,
        check: Check::With(0, libc::CLONE_THREAD as u64),
    },
    CLONE3,
    Syscall::any(libc::SYS_set_robust_list),
    Syscall::any(libc::SYS_sched_getaffinity),
    // The filter of a thread that starts.
    Syscall::one_of(libc::SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER]),
    Syscall::one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NO_NEW_PRIVS as u32]),
];

/// What a worker may do.
pub(super) fn worker(device: &[Syscall]) -> Vec<Syscall> {
    [COMMON, WITHOUT, WORKER, device].concat()
}

/// What a helper may do. Of the device's calls it gets the ioctls: the state of a link is one.
pub(super) fn helper(device: &[Syscall]) -> Vec<Syscall> {
    let ioctl = |syscall: &&Syscall| syscall.number == libc::SYS_ioctl;
    let ioctls: Vec<_> = device.iter().filter(ioctl).copied().collect();
    [COMMON, WITHOUT, HELPER, &ioctls].concat()
}

/// What the control thread may do: its own, and all that threads it starts may do.
pub(super) fn control(device: &[Syscall]) -> Vec<Syscall> {
    [COMMON, WITHOUT, WORKER, HELPER, CONTROL, device].concat()
}
