//! Survives a frontend that truncates the file behind guest memory.
//!
//! A memfd that is not sealed can be cut short while we map it; touching the missing pages raises
//! SIGBUS. The handler looks the address up in a table of guest mappings: if it is one, anonymous
//! zero pages take the mapping's place and the access is repeated; if not, the signal does what it
//! always did. The queue thread sees that its memory was lost ([`losses`], [`Guarded::is_lost`]),
//! and the session ends.
//!
//! ```text
//!   touch ─▶ SIGBUS ─▶ handler: in TABLE? ─yes─▶ mmap zeros there, lost = true ─▶ touch again
//!                                          └─no──▶ default action
//! ```
//!
//! Invariants: a slot of the table holds a range only while it is mapped. The handler uses atomics
//! and two system calls, nothing else. I/O that the kernel does on such memory fails with EFAULT
//! and needs no handler.
#![expect(unsafe_code, reason = "a signal handler, and mmap within it")]

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Twice the regions of a session: while the table is replaced, both are mapped.
const SLOTS: usize = 2048;

struct Slot {
    claimed: AtomicBool,
    /// 0 while there is no range.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        claimed: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

static LOSSES: AtomicU64 = AtomicU64::new(0);

/// How often a guest mapping was lost in this process: when it changes, look at your own.
pub(crate) fn losses() -> u64 {
    LOSSES.load(Ordering::Relaxed)
}

/// A mapping's entry in the table; dropped before the mapping goes.
#[derive(Debug)]
pub(crate) struct Guarded(usize);

impl Guarded {
    /// Enters the mapping `start`, `len`. An error where the table is full.
    pub(crate) fn new(start: usize, len: usize) -> io::Result<Guarded> {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(install_handler);
        let free = |slot: &Slot| {
            let claim =
                slot.claimed
                    .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
            claim.is_ok()
        };
        let index = TABLE.iter().position(free);
        let index = index.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let slot = &TABLE[index];
        slot.lost.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        // Release: the handler that sees the start sees the length.
        slot.start.store(start, Ordering::Release);
        Ok(Guarded(index))
    }

    /// Whether the mapping was replaced by zeros.
    pub(crate) fn is_lost(&self) -> bool {
        TABLE[self.0].lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let slot = &TABLE[self.0];
        slot.start.store(0, Ordering::Release);
        slot.claimed.store(false, Ordering::Release);
    }
}

fn install_handler() {
    // SAFETY: sigaction is plain data. The handler is async-signal-safe (see the module's header).
    // Failure leaves the default action, which is what was there before.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            on_sigbus;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    let addr = unsafe { (*info).si_addr() } as usize;
    let hit = TABLE.iter().find(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        start != 0 && addr >= start && addr - start < slot.len.load(Ordering::Relaxed)
    });
    if let Some(slot) = hit {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Relaxed);
        // SAFETY: the range is a guest mapping: the faulting thread is inside an access to it, so
        // it is still mapped, and it is only ever accessed as bytes that may change at any time.
        let map = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if map != libc::MAP_FAILED {
            slot.lost.store(true, Ordering::Relaxed);
            LOSSES.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // Not ours: the access is repeated on return, and then the default action ends the process.
    // SAFETY: signal(2) is async-signal-safe.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
