//! REST API of the guest, on a unix socket.
use std::path::Path;

use crate::socket::{Error, Listener};
use crate::vm::requests::RequestSender;

/// Serves the API at `path` until the returned value is dropped.
pub fn start(path: &Path, _requests: RequestSender) -> Result<Listener, Error> {
    Listener::bind(path)
}
