//! Disk images: what a disk's bytes are kept in. Raw files and block devices ([`raw`]), and the
//! locks that keep other writers away ([`lock`]).

pub mod lock;
pub mod raw;

pub use raw::{Cache, Direct, Disk, ImageError, OpenOptions};
