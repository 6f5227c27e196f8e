//! What the daemon gives up once its files are open, so that whoever takes it over has little.
//!
//! ```text
//!   open image, tap, sockets ─▶ enter: no new privileges ─▶ no capabilities ─▶ Landlock ─▶ filter
//!                                                                                  (control) │
//!        worker, helper threads start with the control thread's filter ◀─────────────────────┘
//!        and enter_thread adds the narrower one of their kind
//! ```
//!
//! Privileges and Landlock's domain belong to a thread and are inherited, so [`enter`] comes before
//! the first thread is started. A filter can only be narrowed: what a worker may do, the control
//! thread may do too. A system call that is not allowed ends the process with SIGSYS after one line
//! on stderr ([`violation`]); with [`Mode::Log`] the kernel logs it and nothing is refused.
//!
//! The list of calls, and why each is there, is in [`syscalls`]; docs/sandbox.md is the operator's
//! view. Kernel: Documentation/userspace-api/seccomp_filter.rst, landlock.rst; capabilities(7).
#![expect(unsafe_code, reason = "prctl, setrlimit and capset")]

mod files;
mod filter;
pub mod syscalls;
mod violation;

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

use tracing::{info, warn};

pub use files::{FilesConfined, confine_files};
pub use filter::FilterError;
pub use syscalls::Syscall;

use filter::Filter;

/// Whether the process confines itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// A system call that is not needed ends the process
    #[default]
    On,
    /// Nothing is given up
    Off,
    /// The kernel logs what would not be allowed, and allows it
    Log,
}

/// What a thread does, and so what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs one queue: the device's I/O.
    Worker,
    /// Answers or listens on one socket: metrics, the state of a link.
    Helper,
}

/// What this process will need.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// What workers need besides the common list: the device's I/O.
    pub device: Vec<Syscall>,
    /// Sockets that are removed at the end.
    pub sockets: Vec<PathBuf>,
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A privilege could not be given up.
    #[error("cannot {what}")]
    Privileges {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Landlock.
    #[error("cannot confine file access")]
    Files(#[source] landlock::RulesetError),
    /// The directory of a socket that is to be removed at the end.
    #[error("cannot open the directory of socket {path}")]
    Directory {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: landlock::PathFdError,
    },
    /// Seccomp.
    #[error("cannot set a system call filter (a kernel without seccomp needs --sandbox=off)")]
    Filter(#[from] FilterError),
}

/// The filters of threads to come.
struct Entered {
    worker: Filter,
    helper: Filter,
}

static ENTERED: OnceLock<Entered> = OnceLock::new();

/// Confines the calling thread, which becomes the control thread, and all that it starts later.
/// Call once, before any other thread is started and after everything is open.
///
/// # Errors
/// The kernel refuses; parts may be in force already, so the process is not to go on.
pub fn enter(mode: Mode, plan: &Plan) -> Result<(), SandboxError> {
    match mode {
        Mode::Off => {
            info!("sandbox is off");
            return Ok(());
        }
        Mode::Log => warn!(
            "sandbox only logs: calls that it would forbid are allowed and go to the kernel's log; \
             files and capabilities are as without it"
        ),
        Mode::On => violation::install().map_err(privileges("handle SIGSYS"))?,
    }
    forbid_new_privileges().map_err(privileges("set no_new_privs"))?;
    if mode == Mode::On {
        raise_memory_lock_limit();
        drop_capabilities().map_err(privileges("drop capabilities"))?;
        report_files(confine_files(&plan.sockets)?);
    }
    // Built before the first filter is in force; applied by each thread when it starts.
    let entered = Entered {
        worker: Filter::new(mode, &syscalls::worker(&plan.device))?,
        helper: Filter::new(mode, &syscalls::helper(&plan.device))?,
    };
    let control = Filter::new(mode, &syscalls::control(&plan.device))?;
    let entered = ENTERED.get_or_init(|| entered);
    if mode == Mode::On {
        filter::refuse(syscalls::WITHOUT, libc::EACCES)?;
        filter::refuse(&[syscalls::CLONE3], libc::ENOSYS)?;
    }
    control.apply()?;
    info!(?mode, filters = entered.worker.len(), "sandbox entered");
    Ok(())
}

/// Narrows the calling thread to what its kind needs. Nothing to do where [`enter`] was not called
/// or the sandbox is off.
///
/// # Errors
/// The kernel refuses (no memory): the thread must not go on.
pub fn enter_thread(kind: ThreadKind) -> Result<(), FilterError> {
    let Some(entered) = ENTERED.get() else {
        return Ok(());
    };
    match kind {
        ThreadKind::Worker => entered.worker.apply(),
        ThreadKind::Helper => entered.helper.apply(),
    }
}

fn report_files(confined: FilesConfined) {
    match confined {
        FilesConfined::Fully => {}
        FilesConfined::Partly => info!("this kernel's Landlock is an old one: part of it is used"),
        FilesConfined::Not => {
            info!("no Landlock in this kernel: only the system call filter keeps files closed");
        }
    }
}

fn privileges(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::Privileges { what, source }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn forbid_new_privileges() -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

/// An io_uring's memory and registered buffers count against RLIMIT_MEMLOCK where CAP_IPC_LOCK is
/// missing, which it will be. As much as we may; what is refused is refused to the ring later.
fn raise_memory_lock_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: each call reads or writes one rlimit, which `limit` is.
    unsafe {
        if libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) == 0
            || libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) != 0
        {
            return;
        }
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit);
    }
}

/// Gives up all capabilities of this thread. The user stays: root without a capability is an owner
/// of files, and those are what Landlock and the filter keep closed.
fn drop_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    /// _LINUX_CAPABILITY_VERSION_3
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // Effective, permitted, inheritable; low and high words.
    let none = [[0u32; 3]; 2];
    // SAFETY: version 3 reads a header and two data structs of three words each.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) })
}
