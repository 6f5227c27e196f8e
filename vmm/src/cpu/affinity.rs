//! Which CPUs of the host a thread may run on.
#![expect(
    unsafe_code,
    reason = "sched_getaffinity, sched_setaffinity and pthread_setaffinity_np have no safe wrapper"
)]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

use crate::config::affinity::{HostCpus, MAX_HOST_CPUS};

/// CPUs in `set`, at most as many as a configuration can name.
fn listed(set: &libc::cpu_set_t) -> impl Iterator<Item = usize> {
    // SAFETY: CPU_ISSET reads one bit of the set, which has CPU_SETSIZE, no fewer than these.
    (0..MAX_HOST_CPUS.min(libc::CPU_SETSIZE as usize))
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, set) })
}

/// Lets the calling thread run on these CPUs, whatever the thread that started it is kept to.
pub fn keep_this_thread_to(cpus: &HostCpus) -> io::Result<()> {
    let of_cpus = (0..MAX_HOST_CPUS).filter(|cpu| cpus.contains(*cpu));
    let set = set_of(of_cpus);
    // SAFETY: the call reads the set, whose size it is told.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_of(cpus: impl Iterator<Item = usize>) -> libc::cpu_set_t {
    // SAFETY: a cpu_set_t is plain integers, for which all zeroes is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus.filter(|cpu| *cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: CPU_SET writes one bit of the set, which the number is within.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    set
}

/// The CPUs that this process was given, or the calling thread is kept to.
pub fn of_this_process() -> io::Result<HostCpus> {
    // SAFETY: a cpu_set_t is plain integers, for which all zeroes is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes at most the size it is told, that of the set.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(HostCpus::new(listed(&set)))
}

/// Keeps a thread to these CPUs from now on.
pub(super) fn keep_to<T>(thread: &JoinHandle<T>, cpus: &[usize]) -> io::Result<()> {
    let set = set_of(cpus.iter().copied());
    let id = thread.as_pthread_t() as libc::pthread_t;
    // SAFETY: the thread has not been joined, so its id is valid; the call reads the set.
    let error = unsafe { libc::pthread_setaffinity_np(id, size_of_val(&set), &raw const set) };
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
