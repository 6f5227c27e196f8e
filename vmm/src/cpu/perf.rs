//! Doorbells that KVM took without an exit, counted by perf on the tracepoint `kvm:kvm_fast_mmio`.
//!
//! KVM's statistics do not have them. Where perf or tracefs are not permitted there is no count.
//! Reference: perf_event_open(2), PERF_TYPE_TRACEPOINT.
#![expect(unsafe_code, reason = "the system call has no wrapper")]

use std::fs::File;
use std::io::{self, Error, ErrorKind, Read};
use std::os::fd::FromRawFd;

const ID_PATHS: [&str; 2] = [
    "/sys/kernel/tracing/events/kvm/kvm_fast_mmio/id",
    "/sys/kernel/debug/tracing/events/kvm/kvm_fast_mmio/id",
];
const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;

/// `struct perf_event_attr` in its first version, PERF_ATTR_SIZE_VER0.
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
}

/// Counts the calling thread's doorbells from now on.
pub(super) fn fast_mmio_of_this_thread() -> io::Result<File> {
    let attr = Attr {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<Attr>() as u32,
        config: tracepoint_id()?,
        ..Attr::default()
    };
    let (this_thread, any_cpu, no_group) = (0, -1, -1);
    // SAFETY: the attributes live through the call, which reads `size` bytes of them, and make a new fd.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attr,
            this_thread,
            any_cpu,
            no_group,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    let fd = i32::try_from(fd).map_err(|_| Error::from(ErrorKind::InvalidData))?;
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the kernel just made the fd for us.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// The count of such a counter.
pub(super) fn read(mut counter: &File) -> Option<u64> {
    let mut value = [0; 8];
    counter.read_exact(&mut value).ok()?;
    Some(u64::from_ne_bytes(value))
}

fn tracepoint_id() -> io::Result<u64> {
    let mut last = Error::from(ErrorKind::NotFound);
    for path in ID_PATHS {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let id = text.trim().parse();
                return id.map_err(|_| Error::from(ErrorKind::InvalidData));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
