//! `berth-perf` measures vhost-user daemons against each other and against the limit.
//!
//! ```text
//!  CPU 0: client thread ─ target/virtio ─▶ socket, rings, eventfds ─▶ CPU 1: daemon ─▶ disk
//!                                                                     CPU 1: target/uring … ─▶ disk   (limit)
//!  both: kept awake                     janitor: removes the disks when we are gone
//! ```
//!
//! args → cells × subjects → rounds (interleaved) of measure → report. One thing runs at a time; the main
//! thread waits for it. README.md says how to read what comes out.

pub mod args;
pub mod awake;
pub mod backing;
pub mod blk;
pub mod cells;
pub mod client;
pub mod counts;
pub mod daemon;
pub mod fio;
pub mod histogram;
pub mod idle;
pub mod janitor;
pub mod measure;
pub mod net;
pub mod proc;
pub mod progress;
pub mod report;
pub mod rounds;
pub mod subject;
pub mod sys;
pub mod target;
