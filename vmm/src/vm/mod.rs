//! Life of one guest.

mod events;

pub use events::{GuestEvent, GuestEvents};
