//! REST API of the guest, on a unix socket: Cloud Hypervisor's paths and JSON.
//!
//! ```text
//!  client ─▶ server (thread api) ─▶ connection ─▶ http ─▶ handlers ─▶ vm::requests ─▶ driver
//!                                       ◀───────────── answer ◀────── reply ◀────────────┘
//! ```
//!
//! Whoever may open the socket may do all of it: its file permissions are the access control.

#![forbid(unsafe_code)]

mod connection;
mod convert;
mod handlers;
pub mod http;
mod request;
mod server;
#[cfg(test)]
mod tests;

use std::io;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use self::server::Server;
use crate::sandbox::{self, ThreadKind};
use crate::socket::{self, ApiSocket, Listener};
use crate::vm::requests::RequestSender;

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its socket.
    #[error("API socket")]
    Socket(#[from] socket::Error),
    /// Its thread or event.
    #[error("cannot start the API")]
    Start(#[from] io::Error),
}

/// The API's thread. Dropped, the thread ends and the socket is removed.
pub struct Api {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Listens; clients wait until the API is started.
pub fn bind(socket: &ApiSocket) -> Result<Listener, Error> {
    Ok(match socket {
        ApiSocket::Path(path) => Listener::bind(path)?,
        ApiSocket::Fd(fd) => Listener::inherit(*fd)?,
    })
}

/// Serves the API on that socket until the returned value is dropped.
pub fn start(listener: Listener, requests: RequestSender) -> Result<Api, Error> {
    let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let server = Server::new(listener, stop.try_clone()?, requests)?;
    let thread = sandbox::spawn(ThreadKind::Api, "api", move || server.run())?;
    Ok(Api {
        stop,
        thread: Some(thread),
    })
}

/// Reads the requests in `bytes` as a client's are read, and finds out what they want; for the fuzz targets.
pub(crate) fn fuzz_requests(mut bytes: &[u8]) {
    while let http::Parsed::Complete(mut request, len) = http::parse(bytes) {
        assert!(len > 0 && len <= bytes.len());
        if let handlers::Route::Answer(response) = handlers::route(&mut request) {
            assert!(!response.to_bytes(request.keep_alive).is_empty());
        }
        bytes = &bytes[len..];
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API thread panicked");
        }
    }
}
