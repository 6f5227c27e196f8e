//! Privileges that the process gives up before it starts a thread.
#![expect(unsafe_code, reason = "prctl and capset have no safe wrapper")]

use std::io;

/// What stays of root's capabilities: files of other users named on the command line (Landlock says which), and KVM's
/// tracepoints, which `vm.counters` reads doorbells from.
const KEPT: [u32; 3] = [CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_PERFMON];
const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_DAC_READ_SEARCH: u32 = 2;
const CAP_PERFMON: u32 = 38;

/// _LINUX_CAPABILITY_VERSION_3
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// Effective, permitted and inheritable set of 32 capabilities.
type Sets = [u32; 3];

/// Programs that are started from here on get no privileges from their files.
pub(super) fn forbid_new() -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

/// Gives up all capabilities of this thread but those of [`KEPT`] that it has.
pub(super) fn drop_capabilities() -> io::Result<()> {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut sets: [Sets; 2] = [[0; 3]; 2];
    // SAFETY: version 3 reads a header and writes two data structs of three words each.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) })?;
    keep(&mut sets);
    // SAFETY: version 3 reads a header and two data structs of three words each.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) })
}

fn keep(sets: &mut [Sets; 2]) {
    for (word, [effective, permitted, inheritable]) in (0..).zip(sets) {
        let of_word = KEPT.iter().filter(|cap| *cap / 32 == word);
        let mask = of_word.fold(0, |mask, cap| mask | 1 << (cap % 32));
        *permitted &= mask;
        *effective = *permitted;
        *inheritable = 0;
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_gained_and_little_is_kept() {
        let mut root = [[u32::MAX; 3]; 2];
        keep(&mut root);
        assert_eq!(root, [[0b110, 0b110, 0], [0b100_0000, 0b100_0000, 0]]);
        let mut user = [[0; 3]; 2];
        keep(&mut user);
        assert_eq!(user, [[0; 3]; 2]);
    }
}
