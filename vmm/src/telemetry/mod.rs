//! What the VMM says about itself.

pub mod events;
mod inherited;
mod log;
pub mod metrics;
pub mod startup;

pub use self::log::LogLimit;
