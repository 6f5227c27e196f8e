//! Starts VMMs, daemons and guests for tests, and cleans up after them.
//!
//! A *story* ([`story::Story`]) is one machine and what is asked of it; each question is a *check*, the unit
//! that is reported. A story runs on a thread of its own, in a network namespace of its own and in a
//! directory of its own, so that stories can run side by side.
//!
//! ```text
//!   story thread ── spawns ──▶ berth-vmm | QEMU, berth-blk, berth-net, …   (process)
//!        │                        ▲ serial line (console, agent protocol of tests/lab)
//!        │                        ▲ API and metrics sockets (http)
//!        └─ console reader, page servers, frame counters: helper threads that end by EOF
//! ```
//!
//! Nothing outlives the run, however it ends. Processes are killed when their handle is dropped and, by
//! the kernel, when the story's thread dies (PR_SET_PDEATHSIG). Taps live in the story's network namespace,
//! which ends with its last process. File systems are made and read with e2fsprogs and never mounted on
//! the host. Scratch files are removed with the story; logs stay.
//!
//! Waiting is for events with deadlines: EOF, pidfd, inotify, a line on the console. [`wait::until`] asks
//! again and again where the kernel has no event to offer.
//!
//! Read [`story`], then [`vmm`] and [`console`].

pub mod console;
pub mod daemons;
pub mod driver;
pub mod http;
pub mod image;
pub mod kernel_counts;
pub mod net;
pub mod peer;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod relay;
pub mod story;
mod sys;
#[cfg(test)]
mod testing;
pub mod vmm;
pub mod wait;
