//! What the operator chose about the device, apart from where its frames go.

#![forbid(unsafe_code)]

use berth_queue_worker::RateLimit;

use crate::device::Identity;

/// How frames get to the port and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum EngineChoice {
    /// Many a system call, through io_uring, where that works; else one by one
    #[default]
    Auto,
    /// One a system call
    Sync,
}

/// Settings of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// What the guest is told.
    pub identity: Identity,
    /// Largest ring that a frontend may set up.
    pub max_queue_size: u16,
    /// What all receive queues together are held to.
    pub rate_limit_rx: Option<RateLimit>,
    /// What all transmit queues together are held to.
    pub rate_limit_tx: Option<RateLimit>,
    /// How frames get to the port.
    pub engine: EngineChoice,
}

impl From<Identity> for Settings {
    /// No limits, and the best of everything.
    fn from(identity: Identity) -> Self {
        Self {
            identity,
            max_queue_size: 1024,
            rate_limit_rx: None,
            rate_limit_tx: None,
            engine: EngineChoice::Auto,
        }
    }
}
