//! An io_uring of one worker thread, which can do what its owner needs and nothing else.
//!
//! ```text
//!   push × n ─▶ submit (one system call a batch) ─▶ kernel ─▶ is_ready, take_completions
//!                                         arm, sleep on completion_fd ┘
//! ```
//!
//! Made and used on the worker's thread (IORING_SETUP_SINGLE_ISSUER). Completions are collected
//! when we ask for them (DEFER_TASKRUN): nothing interrupts the thread, and [`IoRing::is_ready`]
//! tells by memory alone whether there is something to take. The eventfd for sleepers is written
//! only between [`IoRing::arm`] and the next completions taken. (The ring's own fd cannot be slept
//! on: with DEFER_TASKRUN nobody wakes its pollers.)
//!
//! seccomp does not see what a ring is told to do. So the ring is created disabled and restricted
//! (IORING_REGISTER_RESTRICTIONS): the opcodes of [`Setup`], on registered files, and no other.
//! What was not allowed completes with EACCES, whoever wrote it into the queue.
//!
//! The kernel keeps writing to the buffers of requests in flight whatever becomes of this value,
//! so dropping it waits for them: whoever owns the buffers drops the ring first. Spec:
//! io_uring(7), io_uring_setup(2), io_uring_register(2).
#![expect(
    unsafe_code,
    reason = "submission of requests whose buffers the kernel accesses"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use io_uring::register::Restriction;
use io_uring::{Builder, EnterFlags, IoUring, Submitter, cqueue, squeue};

use crate::sys;

/// IORING_UNREGISTER_BUFFERS and IORING_UNREGISTER_FILES: letting go is always allowed.
const ALWAYS_ALLOWED: [u8; 2] = [1, 3];
/// IOSQE_FIXED_FILE.
const FIXED_FILE: u8 = 1 << 0;
/// IOSQE_BUFFER_SELECT.
const BUFFER_SELECT: u8 = 1 << 5;

/// What a ring is made for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup<'a> {
    /// Most submissions queued at a time.
    pub entries: u32,
    /// Most completions not yet taken; 0: twice as many as submissions.
    pub completions: u32,
    /// Files for `types::Fixed(n)`.
    pub files: &'a [RawFd],
    /// The opcodes (`opcode::Read::CODE`) that the ring may do.
    pub opcodes: &'a [u8],
    /// IORING_REGISTER_* that may be done after the start.
    pub register_ops: &'a [u8],
    /// The device is asked for completions, instead of interrupting (IORING_SETUP_IOPOLL).
    pub iopoll: bool,
    /// A kernel thread takes submissions, and sleeps after so many milliseconds without any.
    pub sqpoll_idle_ms: Option<u32>,
}

/// One io_uring.
pub struct IoRing {
    ring: IoUring,
    event: OwnedFd,
    armed: bool,
    iopoll: bool,
    /// Pushed, not yet submitted.
    queued: usize,
    /// Submitted, last completion not yet taken.
    in_flight: usize,
}

/// Something has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// `user_data` of the submission.
    pub user_data: u64,
    /// Bytes or whatever the opcode returns, or -errno.
    pub result: i32,
    /// IORING_CQE_F_*.
    pub flags: u32,
}

impl IoRing {
    /// A ring, on the thread that will use it. An error where the kernel or a container's policy
    /// has no io_uring, or one that cannot be restricted (before 5.10).
    pub fn new(setup: &Setup) -> io::Result<IoRing> {
        IoRing::prepared(setup, |_| Ok(()))
    }

    /// The same; `prepare` registers what must be there before the ring is restricted (buffers).
    pub fn prepared(
        setup: &Setup,
        prepare: impl FnOnce(&Submitter) -> io::Result<()>,
    ) -> io::Result<IoRing> {
        let ring = build(setup)?;
        let submitter = ring.submitter();
        if !setup.files.is_empty() {
            submitter.register_files(setup.files)?;
        }
        prepare(&submitter)?;
        let event = sys::event()?;
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_restrictions(&mut restrictions(setup))?;
        submitter.register_enable_rings()?;
        let mut ring = IoRing {
            ring,
            event,
            armed: true,
            iopoll: setup.iopoll,
            queued: 0,
            in_flight: 0,
        };
        ring.disarm();
        Ok(ring)
    }

    /// Readable when something has completed after [`arm`](IoRing::arm); to be polled. Not for a
    /// ring with `iopoll`, where nothing completes unless asked for.
    pub fn completion_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// From now on the completion fd becomes readable when something completes. True where
    /// something has completed already: then do not sleep.
    pub fn arm(&mut self) -> bool {
        if !self.armed {
            self.armed = true;
            self.ring.completion().enable_eventfd();
        }
        // The wish is visible before completions are looked for; the kernel does it the other way
        // round.
        fence(Ordering::SeqCst);
        self.is_ready()
    }

    /// No eventfd is written any more.
    fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            self.ring.completion().disable_eventfd();
        }
    }

    /// Clears the completion fd: after it was found readable, before taking completions.
    pub fn clear_event(&self) {
        // Non-blocking; nothing to read is fine.
        let _ = sys::read_event(self.event.as_fd());
    }

    /// Requests pushed whose last completion has not been taken.
    pub fn in_flight(&self) -> usize {
        self.queued + self.in_flight
    }

    /// Pushed, not yet submitted.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// What the kernel works on: submitted, and not known to have completed.
    pub fn under_way(&mut self) -> usize {
        self.in_flight.saturating_sub(self.ring.completion().len())
    }

    /// Registration after the start: buffers, where [`Setup::register_ops`] allows it.
    pub fn submitter(&self) -> Submitter<'_> {
        self.ring.submitter()
    }

    /// Queues a request; false where the submission queue is full (submit and try again).
    ///
    /// # Safety
    ///
    /// Memory that the entry points to (buffers, iovecs) stays valid, and is not accessed in ways
    /// that conflict with the kernel's access, until its completion has been taken or this ring
    /// has been dropped.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.queued += usize::from(pushed);
        pushed
    }

    /// Hands everything queued to the kernel, and lets it do what it has deferred until we ask.
    /// At most one system call unless the kernel wants to be asked again; none where there is
    /// nothing to do.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.queued > 0 {
            self.enter(0)?;
        }
        Ok(())
    }

    /// Submits, and blocks until at least one completion can be taken.
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        while self.in_flight > 0 && self.ring.completion().is_empty() {
            self.enter(1)?;
        }
        Ok(())
    }

    /// Whether a completion can be taken: a look at shared memory, no system call. With `iopoll`
    /// nobody knows without asking, so it is true while something is in flight.
    pub fn is_ready(&mut self) -> bool {
        !self.ring.completion().is_empty()
            || self.ring.submission().taskrun()
            || (self.iopoll && self.in_flight > 0)
    }

    /// Takes what has completed; asks the kernel first where it has deferred completions.
    pub fn take_completions(&mut self, each: impl FnMut(Completion)) -> io::Result<()> {
        self.take_up_to(usize::MAX, each)
    }

    /// The same, but no more than `limit`; for the rest [`is_ready`](IoRing::is_ready) stays true.
    pub fn take_up_to(&mut self, limit: usize, mut each: impl FnMut(Completion)) -> io::Result<()> {
        self.disarm();
        if self.ring.completion().is_empty() && self.is_ready() {
            self.enter(0)?;
        }
        for entry in self.ring.completion().take(limit) {
            let flags = entry.flags();
            if !cqueue::more(flags) {
                self.in_flight = self.in_flight.saturating_sub(1);
            }
            each(Completion {
                user_data: entry.user_data(),
                result: entry.result(),
                flags,
            });
        }
        Ok(())
    }

    /// One io_uring_enter: submits what is queued, runs what is deferred, waits for `want`
    /// completions. A signal or a shortage is no error: the caller looks again.
    fn enter(&mut self, want: u32) -> io::Result<()> {
        let result = if self.ring.params().is_setup_sqpoll() {
            // A push is seen by the kernel's thread at once, and may have been taken: what is pushed
            // is submitted, whatever is left in the submission queue.
            let pushed = self.queued;
            self.ring.submit_and_wait(want as usize).map(|_| pushed)
        } else {
            let flags = EnterFlags::GETEVENTS.bits();
            // `queued` is what is in the submission queue: pushes sync it.
            let queued = self.queued as u32;
            let submitter = self.ring.submitter();
            // SAFETY: no argument struct; the entries were vouched for when pushed.
            unsafe { submitter.enter::<libc::sigset_t>(queued, want, flags, None) }
        };
        match result {
            Ok(submitted) => {
                let submitted = submitted.min(self.queued);
                self.queued -= submitted;
                self.in_flight += submitted;
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A ring that has not begun, with the best that the kernel has.
fn build(setup: &Setup) -> io::Result<IoUring> {
    let prefer: [fn(&mut Builder); 3] = [
        |b| {
            b.setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag();
        },
        // Before 6.1, or with a kernel thread that submits.
        |b| {
            b.setup_coop_taskrun().setup_taskrun_flag();
        },
        // Before 5.19.
        |_| {},
    ];
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for tune in &prefer[usize::from(setup.sqpoll_idle_ms.is_some())..] {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled();
        if setup.completions > 0 {
            builder.setup_cqsize(setup.completions);
        }
        if setup.iopoll {
            builder.setup_iopoll();
        }
        if let Some(idle_ms) = setup.sqpoll_idle_ms {
            builder.setup_sqpoll(idle_ms);
        }
        tune(&mut builder);
        match builder.build(setup.entries) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn restrictions(setup: &Setup) -> Vec<Restriction> {
    let mut list = vec![
        Restriction::sqe_flags_allowed(FIXED_FILE | BUFFER_SELECT),
        Restriction::sqe_flags_required(FIXED_FILE),
    ];
    list.extend(setup.opcodes.iter().copied().map(Restriction::sqe_op));
    let register_ops = ALWAYS_ALLOWED.iter().chain(setup.register_ops);
    list.extend(register_ops.copied().map(Restriction::register_op));
    list
}

/// The kernel wants to be asked again: a signal, or no room for completions at the moment.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

impl Drop for IoRing {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            match self.wait().and_then(|()| self.take_completions(|_| {})) {
                Ok(()) => {}
                // Never submitted, so the kernel does not know of them.
                Err(_) if self.in_flight == 0 => break,
                // The kernel still writes to memory that is about to be freed.
                Err(error) => {
                    tracing::error!(%error, "cannot wait for I/O in flight");
                    std::process::abort();
                }
            }
        }
        // The kernel tears a closed ring down later, on a thread of its own. Registered files, and
        // the locks on them, must not outlast this value. No file registered is fine.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl std::fmt::Debug for IoRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoRing")
            .field("queued", &self.queued)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use io_uring::{opcode, types};

    use super::*;

    fn file() -> File {
        File::open("/proc/self/exe").unwrap()
    }

    fn read_only_ring(file: &File) -> IoRing {
        IoRing::new(&Setup {
            entries: 4,
            files: &[file.as_raw_fd()],
            opcodes: &[opcode::Read::CODE],
            ..Setup::default()
        })
        .unwrap()
    }

    /// Submits one entry; its result.
    fn run(ring: &mut IoRing, entry: squeue::Entry) -> i32 {
        // SAFETY: every entry of these tests names memory that outlives the call, or none.
        assert!(unsafe { ring.push(&entry.user_data(7)) });
        ring.wait().unwrap();
        let mut results = Vec::new();
        ring.take_completions(|done| results.push((done.user_data, done.result)))
            .unwrap();
        assert_eq!(results.len(), 1);
        assert_eq!(results[0].0, 7);
        results[0].1
    }

    #[test]
    fn ring_does_its_opcodes_on_its_files() {
        let file = file();
        let mut ring = read_only_ring(&file);
        let mut magic = [0u8; 4];
        let read = opcode::Read::new(types::Fixed(0), magic.as_mut_ptr(), 4).build();
        assert_eq!(run(&mut ring, read), 4);
        assert_eq!(&magic, b"\x7fELF");
        assert_eq!(ring.in_flight(), 0);
        assert!(!ring.is_ready());
    }

    #[test]
    fn completions_are_taken_a_few_at_a_time() {
        let file = file();
        let mut ring = read_only_ring(&file);
        let mut magic = [0u8; 4];
        let read = opcode::Read::new(types::Fixed(0), magic.as_mut_ptr(), 4).build();
        for _ in 0..3 {
            // SAFETY: `magic` outlives the ring's use of it: all three are waited for.
            assert!(unsafe { ring.push(&read) });
        }
        assert_eq!((ring.queued(), ring.under_way()), (3, 0));
        let mut taken = Vec::new();
        while taken.iter().sum::<usize>() < 3 {
            ring.wait().unwrap();
            let mut count = 0;
            ring.take_up_to(2, |_| count += 1).unwrap();
            taken.push(count);
        }
        assert!(taken.iter().all(|&count| count <= 2), "{taken:?}");
        assert_eq!((ring.in_flight(), ring.under_way()), (0, 0));
    }

    #[test]
    fn other_opcodes_and_files_are_refused() {
        let file = file();
        let mut ring = read_only_ring(&file);
        let mut bytes = [0u8; 4];
        let at = types::Fixed(0);
        let path = c"/etc/hostname".as_ptr();
        let address = libc::sockaddr {
            sa_family: libc::AF_UNIX as u16,
            sa_data: [0; 14],
        };
        let foreign = types::Fd(file.as_raw_fd());
        let refused = [
            ("write", opcode::Write::new(at, bytes.as_ptr(), 4).build()),
            (
                "openat",
                opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path).build(),
            ),
            ("openat on a file", {
                let dir = types::Fd(file.as_raw_fd());
                opcode::OpenAt::new(dir, path).build()
            }),
            ("connect", opcode::Connect::new(at, &address, 16).build()),
            (
                "socket",
                opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            ),
            (
                "read of a foreign fd",
                opcode::Read::new(foreign, bytes.as_mut_ptr(), 4).build(),
            ),
            ("nop", opcode::Nop::new().build()),
        ];
        for (what, entry) in refused {
            assert_eq!(run(&mut ring, entry), -libc::EACCES, "{what}");
        }
        assert_eq!(bytes, [0; 4]);
        // No file can be added, and what may be done cannot be changed.
        let files = [file.as_raw_fd()];
        let submitter = ring.submitter();
        for result in [
            submitter.register_files_update(0, &files).map(drop),
            submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Write::CODE)]),
            submitter.register_eventfd(file.as_raw_fd()),
        ] {
            let errno = result.unwrap_err().raw_os_error().unwrap();
            assert!(matches!(errno, libc::EACCES | libc::EBADFD), "{errno}");
        }
    }

    #[test]
    fn kernel_thread_that_submits_is_restricted_too() {
        let file = file();
        let ring = IoRing::new(&Setup {
            entries: 4,
            files: &[file.as_raw_fd()],
            opcodes: &[opcode::Read::CODE],
            sqpoll_idle_ms: Some(1),
            ..Setup::default()
        });
        let mut ring = ring.unwrap();
        let mut magic = [0u8; 4];
        let read = opcode::Read::new(types::Fixed(0), magic.as_mut_ptr(), 4).build();
        assert_eq!(run(&mut ring, read), 4);
        assert_eq!(&magic, b"\x7fELF");
        assert_eq!(
            run(&mut ring, opcode::Nop::new().build()),
            -libc::EACCES,
            "nop"
        );
    }

    #[test]
    fn request_that_the_kernel_thread_took_before_it_was_submitted_is_submitted() {
        let (done, finished) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let file = file();
            let mut ring = IoRing::new(&Setup {
                entries: 4,
                files: &[file.as_raw_fd()],
                opcodes: &[opcode::Read::CODE],
                // Longer than the test: once it is awake it takes what it sees.
                sqpoll_idle_ms: Some(60_000),
                ..Setup::default()
            })
            .unwrap();
            let mut magic = [0u8; 4];
            let read = opcode::Read::new(types::Fixed(0), magic.as_mut_ptr(), 4).build();
            assert_eq!(run(&mut ring, read.clone()), 4);
            // SAFETY: `magic` outlives the ring's use of it, which ends below.
            assert!(unsafe { ring.push(&read) });
            while !ring.is_ready() {
                std::thread::yield_now();
            }
            ring.submit().unwrap();
            let mut results = Vec::new();
            ring.take_completions(|done| results.push(done.result))
                .unwrap();
            assert_eq!(ring.in_flight(), 0);
            done.send(results).unwrap();
        });
        let results = finished.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(results.expect("submitted"), [4]);
    }
}
