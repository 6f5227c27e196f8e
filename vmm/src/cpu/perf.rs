//! Doorbells that KVM took without an exit to user space, counted by perf on two of KVM's tracepoints.
//!
//! KVM's statistics do not have them. `kvm_fast_mmio` is hit where KVM knows the doorbell by its address
//! alone (Intel's EPT); elsewhere it decodes the instruction, and `kvm_mmio` is hit, as it is by writes
//! that nobody in the kernel takes. Those exit and are counted by us, so the rest is doorbells. Only
//! addresses that BARs can have are looked at: no local APIC, no IOAPIC, no configuration space.
//!
//! Where perf or tracefs are not permitted there is no count. That is so inside the sandbox where
//! /proc/sys/kernel/perf_event_paranoid is 3, as with Debian's kernels: they want more than CAP_PERFMON then.
//! Reference: perf_event_open(2), PERF_TYPE_TRACEPOINT, PERF_EVENT_IOC_SET_FILTER.
#![expect(unsafe_code, reason = "the system calls have no wrapper")]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Error, ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

use crate::memory::layout::{HIGH_RAM_START, MMIO32_LEN, MMIO32_START};

/// Where KVM's tracepoints are described, for who may read it.
const TRACEPOINT_FOLDERS: [&str; 2] = [
    "/sys/kernel/tracing/events/kvm",
    "/sys/kernel/debug/tracing/events/kvm",
];
/// `_IOW('$', 6, char *)`.
const PERF_EVENT_IOC_SET_FILTER: libc::Ioctl = 0x4008_2406;
/// Writes in `kvm_mmio`'s field `type`.
const KVM_TRACE_MMIO_WRITE: u32 = 2;
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

/// Counters of one thread.
#[derive(Debug)]
pub(super) struct DoorbellCounter {
    fast: File,
    /// All writes to where BARs can be.
    slow: File,
}

impl DoorbellCounter {
    /// Counts the calling thread's doorbells from now on.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        let unreadable = || Error::new(ErrorKind::NotFound, "no tracepoints to be read");
        let ids = ids().ok_or_else(unreadable)?;
        Ok(Self {
            fast: count_tracepoint(ids.fast, None)?,
            slow: count_tracepoint(ids.slow, Some(&slow_filter()))?,
        })
    }

    /// Doorbells so far; `exits` is how many writes to where BARs can be have exited.
    pub(super) fn read(&self, exits: u64) -> io::Result<u64> {
        Ok(read(&self.fast)? + read(&self.slow)?.saturating_sub(exits))
    }
}

/// Whether this user may read the tracepoints of this host, so that doorbells can be counted. The first
/// call is to be made before the sandbox closes: their numbers are read once, and nothing opens the files later.
pub fn counts_doorbells() -> bool {
    ids().is_some()
}

/// Numbers of the tracepoints, as perf has them.
#[derive(Debug, Clone, Copy)]
struct Ids {
    fast: u64,
    slow: u64,
}

fn ids() -> Option<Ids> {
    static IDS: OnceLock<Option<Ids>> = OnceLock::new();
    *IDS.get_or_init(|| {
        Some(Ids {
            fast: tracepoint_id("kvm_fast_mmio")?,
            slow: tracepoint_id("kvm_mmio")?,
        })
    })
}

fn tracepoint_id(name: &str) -> Option<u64> {
    let files = TRACEPOINT_FOLDERS.map(|folder| format!("{folder}/{name}/id"));
    let text = files
        .iter()
        .find_map(|file| std::fs::read_to_string(file).ok())?;
    text.trim().parse().ok()
}

/// The same addresses as [`super::exits::may_be_bar`].
fn slow_filter() -> String {
    let (low, low_end) = (MMIO32_START, MMIO32_START + MMIO32_LEN);
    format!(
        "type == {KVM_TRACE_MMIO_WRITE} && \
         (gpa >= {HIGH_RAM_START} || (gpa >= {low} && gpa < {low_end}))"
    )
}

fn count_tracepoint(id: u64, filter: Option<&str>) -> io::Result<File> {
    let attr = Attr {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<Attr>() as u32,
        config: id,
        ..Attr::default()
    };
    let (this_thread, any_cpu, no_group) = (0, -1, -1);
    // SAFETY: the attributes live through the call, which reads `size` bytes of them and makes a new fd.
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
    let counter = unsafe { File::from_raw_fd(fd) };
    if let Some(filter) = filter {
        let filter = CString::new(filter)?;
        // SAFETY: the filter is a NUL-terminated string that lives through the call.
        let set = unsafe {
            libc::ioctl(
                counter.as_raw_fd(),
                PERF_EVENT_IOC_SET_FILTER,
                filter.as_ptr(),
            )
        };
        if set < 0 {
            return Err(Error::last_os_error());
        }
    }
    Ok(counter)
}

fn read(mut counter: &File) -> io::Result<u64> {
    let mut value = [0; 8];
    counter.read_exact(&mut value)?;
    Ok(u64::from_ne_bytes(value))
}
