//! What the VMM says about itself.

mod log;

pub use self::log::LogLimit;
