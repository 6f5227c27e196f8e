//! The last words of a process that made a system call which its sandbox forbids.
//!
//! The filter raises SIGSYS instead of making the call. The handler names thread and call on stderr, sets the terminal
//! back, and raises SIGSYS again, whose action is by then the default one: the process dies of it, and its parent can
//! see that. Only async-signal-safe calls, no allocation.
//!
//! An attacker who replaces the handler wins nothing: the call is still not made.
//!
//! Much like `backends/queue-worker/src/sandbox/violation.rs`, on purpose apart from it (docs/adr/0004-two-sandboxes.md).
#![expect(unsafe_code, reason = "a signal handler")]

use std::io;

use super::names;
use crate::devices::serial::tty;

/// Installs the handler.
pub(super) fn install() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigsys;
    // SAFETY: sigaction is plain data; the handler is async-signal-safe (see the module's header).
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        // Once, and not blocked within: the second one is the end.
        action.sa_flags =
            libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The start of a siginfo of SIGSYS (sigaction(2): si_call_addr, si_syscall, si_arch).
#[repr(C)]
struct SigsysInfo {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    _pad: libc::c_int,
    call_addr: *const libc::c_void,
    syscall: libc::c_int,
    arch: libc::c_uint,
}

extern "C" fn on_sigsys(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO, in this layout for
    // SIGSYS on 64-bit machines.
    let number = unsafe { (*info.cast::<SigsysInfo>()).syscall };
    let mut name = [0u8; 16];
    let mut line = Line::default();
    // SAFETY: PR_GET_NAME writes at most 16 bytes, NUL included.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    line.add(b"sandbox: thread ");
    line.add(name.split(|byte| *byte == 0).next().unwrap_or_default());
    line.add(b" made system call ");
    line.add(names::name(number.into()).as_bytes());
    line.add(b" (");
    line.add_number(number.unsigned_abs());
    line.add(b")");
    if libc::c_long::from(number) == libc::SYS_ioctl {
        // SAFETY: the kernel passes a valid ucontext; the second argument of a call is in rsi.
        let request = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        line.add(b" with request ");
        line.add_hex(request[libc::REG_RSI as usize] as u32);
    }
    line.add(b", which is not allowed: the process ends (--sandbox=log shows all such calls)\n");
    // SAFETY: the line is initialised memory of that length.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.len);
    }
    tty::restore();
    // SAFETY: integers only; async-signal-safe, and allowed to every thread.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            libc::getpid(),
            libc::gettid(),
            libc::SIGSYS,
        );
        // Not reached: SIGSYS has its default action, and is not blocked.
        libc::_exit(1);
    }
}

/// A line put together without allocation; what does not fit is cut.
struct Line {
    bytes: [u8; 224],
    len: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line {
            bytes: [0; 224],
            len: 0,
        }
    }
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn add_number(&mut self, number: u32) {
        self.add_digits(number, 10);
    }

    fn add_hex(&mut self, number: u32) {
        self.add(b"0x");
        self.add_digits(number, 16);
    }

    fn add_digits(&mut self, mut number: u32, base: u32) {
        let mut digits = [0; 10];
        let mut start = digits.len();
        loop {
            start -= 1;
            digits[start] = b"0123456789abcdef"[(number % base) as usize];
            number /= base;
            if number == 0 {
                break;
            }
        }
        self.add(&digits[start..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_put_together_and_cut_at_its_end() {
        let mut line = Line::default();
        line.add(b"call ");
        line.add_number(0);
        line.add(b", ");
        line.add_number(u32::MAX);
        line.add(b", ");
        line.add_hex(0xae80);
        assert_eq!(&line.bytes[..line.len], b"call 0, 4294967295, 0xae80");
        line.add(&[b'x'; 500]);
        assert_eq!(line.len, line.bytes.len());
    }
}
