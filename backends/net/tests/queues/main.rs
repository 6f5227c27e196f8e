//! The device's queues, driven by the fake driver over a port made of sockets: no privilege, no
//! network. What needs a real tap is in `daemon.rs`.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod control;
mod dirty;
mod guest;
mod limits;
mod receive;
mod transmit;
