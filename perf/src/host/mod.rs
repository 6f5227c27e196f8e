//! Where it was measured: facts of the host, and what else it did meanwhile.
#![forbid(unsafe_code)]

mod facts;
mod noise;

pub use facts::Facts;
pub use noise::{Noise, TOO_NOISY};
