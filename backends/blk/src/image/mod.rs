//! Disk images: what a disk's bytes are kept in. Raw files and block devices ([`raw`]), their size
//! while they are in use ([`size`]), and the locks that keep other writers away ([`lock`]) for as
//! long as [`holder`] says, and until the last I/O of a dead process has ended ([`marker`]).

pub mod blocks;
pub mod holder;
pub mod lock;
pub mod marker;
pub mod raw;
pub mod size;

pub use holder::LockTime;
pub use raw::{Cache, Direct, Disk, ImageError, OpenOptions};
pub use size::Change;
