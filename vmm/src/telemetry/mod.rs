//! What the VMM says about itself.

mod balloon_metrics;
pub mod events;
mod inherited;
mod log;
pub mod metrics;
pub mod startup;

pub use self::log::LogLimit;
