//! The control thread's side of one frontend connection.
#![forbid(unsafe_code)]

/// Lets a device reach the frontend of the running session. Cheap to clone, any thread.
#[derive(Clone, Debug)]
pub struct SessionHandle {}

impl SessionHandle {
    /// The configuration space has changed: CONFIG_CHANGE_MSG goes out on the backend channel, if
    /// the frontend gave one. Does not block.
    pub fn config_changed(&self) {}
}
