//! The system calls that std does not offer, each behind a safe function.
#![allow(
    unsafe_code,
    reason = "affinity, scheduling classes, CPU clocks, memfds and mappings have no std API"
)]

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::NonNull;
use std::time::Duration;

/// A system call's result; errno where it is below 0.
pub fn check(result: libc::c_int) -> Result<libc::c_int> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn cpu_set(cpus: &[usize]) -> libc::cpu_set_t {
    // SAFETY: a cpu_set_t is a bit array; all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        // SAFETY: CPU_SET checks the index against the array's length.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    set
}

/// Whether the calling thread may be pinned to this CPU.
pub fn may_run_on(cpu: usize) -> bool {
    let mut set = cpu_set(&[]);
    // SAFETY: `set` is a complete cpu_set_t that lives through the call.
    let known = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) } == 0;
    // SAFETY: the index is checked against the array's length first.
    known && cpu < libc::CPU_SETSIZE as usize && unsafe { libc::CPU_ISSET(cpu, &set) }
}

/// Keeps the calling thread on one CPU.
pub fn pin_thread(cpu: usize) -> Result<()> {
    let set = cpu_set(&[cpu]);
    // SAFETY: `set` is a complete cpu_set_t that lives through the call.
    check(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }).map(drop)
}

/// Makes the calling thread run only where nothing else wants to.
pub fn set_sched_idle() -> Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` lives through the call.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param) }).map(drop)
}

/// Makes the child of `command` run on `cpus` (anywhere without one) and die with the thread that spawns
/// it.
pub fn tie_child(command: &mut Command, cpus: &[usize]) {
    let set = (!cpus.is_empty()).then(|| cpu_set(cpus));
    let parent = std::process::id();
    let hook = move || {
        // SAFETY: three async-signal-safe system calls; `set` lives in the closure.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if libc::getppid().cast_unsigned() != parent {
                return Err(Error::from_raw_os_error(libc::ESRCH));
            }
            if let Some(set) = &set {
                check(libc::sched_setaffinity(0, size_of_val(set), set))?;
            }
        }
        Ok(())
    };
    // SAFETY: the hook makes async-signal-safe calls only and allocates nothing.
    unsafe { command.pre_exec(hook) };
}

/// Takes the child of `command` out of our session, so that a closed terminal or ^C passes it by.
pub fn own_session(command: &mut Command) {
    // SAFETY: setsid is async-signal-safe and takes nothing.
    unsafe { command.pre_exec(|| check(libc::setsid()).map(drop)) };
}

/// Sends a signal to a child of ours that has not been waited for.
pub fn signal(pid: u32, signal: libc::c_int) {
    // SAFETY: no pointers; an unreaped child's pid cannot have been given to anything else.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// Undoes a mount.
pub fn unmount(path: &std::path::Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(Error::other)?;
    // SAFETY: `path` is a C string that lives through the call.
    match check(unsafe { libc::umount2(path.as_ptr(), 0) }) {
        // Not mounted (any more).
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result.map(drop),
    }
}

/// Whether we have the rights of the superuser.
pub fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Moves the calling thread, and all it starts from now on, to a network namespace of its own,
/// without IPv6, whose announcements would be frames among ours.
pub fn own_network() -> Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    for file in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{file}/disable_ipv6");
        match std::fs::write(path, "1") {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            // A kernel without IPv6 has nothing to turn off.
            _ => {}
        }
    }
    Ok(())
}

/// Makes reads of `fd` wait, whoever has made them not to.
pub fn set_blocking(fd: BorrowedFd) -> Result<()> {
    // SAFETY: no pointers.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) })
        .map(drop)
}

/// A thread of ours whose system calls can be cut short.
#[derive(Clone, Copy, Debug)]
pub struct Interruptible(libc::pthread_t);

// SAFETY: a pthread_t is an opaque number to us.
unsafe impl Send for Interruptible {}

impl Interruptible {
    /// The calling thread.
    pub fn this_thread() -> Result<Interruptible> {
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: a sigaction is plain data; all zeroes is an empty mask and no flags (so system
        // calls are not restarted), and the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            check(libc::sigaction(
                libc::SIGUSR1,
                &raw const action,
                std::ptr::null_mut(),
            ))?;
            Ok(Interruptible(libc::pthread_self()))
        }
    }

    /// Ends the system call that it waits in.
    ///
    /// # Safety
    ///
    /// The thread has not been joined.
    pub unsafe fn interrupt(self) {
        // SAFETY: by the caller's word the thread's id is still its own.
        unsafe { libc::pthread_kill(self.0, libc::SIGUSR1) };
    }
}

/// CPU time of a process, ended threads and io_uring's kernel workers included.
pub fn process_cpu(pid: u32) -> Result<Duration> {
    // Bits of a CPU clock's id as clock_getcpuclockid makes them: ~pid, process, CPUCLOCK_SCHED.
    clock((!pid.cast_signed() << 3) | 2)
}

/// The calling thread's number in /proc.
pub fn thread_number() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::gettid() }.cast_unsigned()
}

/// CPU time of a thread of ours.
pub fn thread_cpu_of(number: u32) -> Result<Duration> {
    // As for processes, with the bit for a single thread.
    clock((!number.cast_signed() << 3) | 2 | 4)
}

/// CPU time of the calling thread.
pub fn thread_cpu() -> Result<Duration> {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> Result<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable through the call.
    check(unsafe { libc::clock_gettime(id, &raw mut time) })?;
    Ok(Duration::new(
        time.tv_sec.cast_unsigned(),
        time.tv_nsec as u32,
    ))
}

/// Memory that can be given to a daemon and to direct I/O: a memfd, mapped and populated.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the value alone and may be used from any thread.
unsafe impl Send for SharedMemory {}
// SAFETY: a shared reference gives out addresses only.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// `len` bytes (a multiple of 4096) that do not compress.
    pub fn new(len: usize) -> Result<SharedMemory> {
        // SAFETY: a constant C string.
        let fd = check(unsafe { libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC) })?;
        // SAFETY: just returned to us alone.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(len).map_err(Error::other)?;
        // SAFETY: no pointers.
        check(unsafe { libc::ftruncate(fd, size) })?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| Error::other("mmap gave 0"))?;
        let memory = SharedMemory { file, start, len };
        let mut noise = Noise::new(len as u64);
        for at in (0..len).step_by(8) {
            // SAFETY: in bounds and aligned, as `len` is a multiple of 4096; nobody else has it yet.
            unsafe { start.add(at).cast::<u64>().write(noise.number()) };
        }
        Ok(memory)
    }

    /// The memfd.
    pub fn fd(&self) -> &OwnedFd {
        &self.file
    }

    /// Length in bytes.
    pub fn size(&self) -> usize {
        self.len
    }

    /// All of it, while no daemon has it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: our mapping, initialised, and borrowed for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Where byte `offset` is mapped.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len, "outside the buffer");
        // SAFETY: in bounds of the mapping.
        unsafe { self.start.add(offset).as_ptr() }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: our mapping; pointers from `at` are used only while the value lives.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Numbers without a pattern (xorshift64*).
#[derive(Clone, Debug)]
pub struct Noise(u64);

impl Noise {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
