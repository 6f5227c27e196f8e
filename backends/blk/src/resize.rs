//! The disk's size follows its image while a guest uses it.
//!
//! ```text
//!   SIGHUP ─────────────▶ on_signal ─┐                          ┌─▶ frontend: CONFIG_CHANGE_MSG
//!   control socket ──────▶ resize ───┴─▶ Disk::update_size ─────┴─▶ log line / answer
//! ```
//!
//! The image is made larger by whoever it belongs to (truncate, lvextend, …), then this is asked
//! for. A smaller image is reported and not followed. Spec: virtio 1.3, 5.2.5 ("capacity").
#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use berth_queue_worker::SessionHandle;
use berth_queue_worker::control_socket::Command;
use tracing::{info, warn};

use crate::image::{Change, Disk};

/// What the control socket takes.
pub(crate) const COMMANDS: [Command; 1] = [(
    "resize",
    "take the image's new size and tell the guest; answers the size",
)];

/// The frontend of the session, if there is one. Written on the control thread.
#[derive(Debug, Default)]
pub(crate) struct Frontend(Mutex<Option<SessionHandle>>);

impl Frontend {
    pub(crate) fn set(&self, handle: Option<SessionHandle>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = handle;
    }

    /// Tells it that the configuration space has changed; why not, where that is not possible.
    fn tell(&self) -> Result<(), &'static str> {
        let handle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*handle {
            Some(handle) if handle.has_channel() => {
                handle.config_changed();
                Ok(())
            }
            Some(_) => Err("the frontend gave no channel to tell it on"),
            None => Err("no frontend is connected"),
        }
    }
}

/// Takes the image's size as it is now, and tells the guest of a larger one. The answer to the
/// operator: one line.
pub(crate) fn resize(disk: &Disk, frontend: &Frontend) -> Result<String, String> {
    let path = disk.path();
    let change = disk
        .update_size()
        .map_err(|error| format!("cannot find the size of {path:?}: {error}"))?;
    match change {
        Change::None => Ok(format!("{} sectors, as before", disk.capacity_sectors())),
        Change::Grown { to, .. } => Ok(match frontend.tell() {
            Ok(()) => format!("{to} sectors"),
            Err(why) => format!("{to} sectors, the guest was not told: {why}"),
        }),
        Change::Shrunk { from, to } => Err(format!(
            "the image has shrunk to {to} sectors: the disk keeps its {from}, \
             requests beyond the end of the image fail"
        )),
        Change::Odd { bytes } => Err(format!(
            "the image has {bytes} bytes, which is not a multiple of 512: the disk keeps its {} \
             sectors",
            disk.capacity_sectors()
        )),
    }
}

/// [`resize`], with its answer in the log.
pub(crate) fn on_signal(disk: &Disk, frontend: &Frontend) {
    match resize(disk, frontend) {
        Ok(answer) => info!("SIGHUP: {answer}"),
        Err(error) => warn!("SIGHUP: {error}"),
    }
}
