//! The device's way to the frontend of the running session.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Lets a device reach the frontend of the running session. Cheap to clone, any thread.
#[derive(Clone, Debug)]
pub struct SessionHandle {
    pub(super) config_changed: Arc<EventFd>,
    pub(super) has_channel: Arc<AtomicBool>,
}

impl SessionHandle {
    /// The configuration space has changed: CONFIG_CHANGE_MSG goes out on the backend channel, if
    /// the frontend gave one. Does not block.
    pub fn config_changed(&self) {
        // A full counter is readable, which is all that is needed.
        let _ = self.config_changed.write(1);
    }

    /// Whether the frontend gave a backend channel, and so can hear of a change.
    pub fn has_channel(&self) -> bool {
        self.has_channel.load(Ordering::Relaxed)
    }
}
