//! How many files this process may have open.
//!
//! A guest with many queues has more than the 1024 that most shells and service managers allow at first: each
//! queue takes five (doorbell and interrupt, what the backend gets of both, its errors). What they allow at
//! first is for programs that use select(2); this one may have what they allow at most.
#![expect(unsafe_code, reason = "the limit has no safe wrapper")]

/// Allows as many as the process can allow itself. To be called after the launcher was forked: the programs
/// that it starts have the limit that this one was started with.
pub fn raise_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the calls write and read one rlimit, which outlives them.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
            return;
        }
        limit.rlim_cur = limit.rlim_max;
        // It cannot be refused; if it is, whoever lacks a descriptor says so.
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}
