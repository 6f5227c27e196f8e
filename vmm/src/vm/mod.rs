//! Life of one guest: how its machine is put together, run, and taken apart.
//!
//! [`builder`] assembles a [`Machine`], [`Driver`] owns it and is the only one to change its state,
//! [`state`] says what is accepted when, [`requests`] is the way to the driver.

mod booting;
pub mod builder;
mod creation;
pub mod devices;
mod driver;
mod events;
mod hotplug;
mod machine;
pub mod requests;
mod resize;
mod signals;
pub mod state;

pub use driver::{Driver, Error, Limits};
pub use events::{GuestEvent, GuestEvents};
pub use machine::Machine;
pub use signals::Signals;
