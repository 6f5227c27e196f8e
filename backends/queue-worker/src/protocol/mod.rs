//! The vhost-user control channel: bytes to requests and back.
//!
//! ```text
//!   socket ──▶ Connection (recvmsg, SCM_RIGHTS) ──▶ Header, payload, fds ──▶ Request ──▶ session
//!          ◀── Connection::send                 ◀── reply_* (bytes)      ◀──────────────┘
//! ```
//!
//! [`message`] is pure: bytes in, values out, fuzzed. [`connection`] owns the socket.
//! docs/adr/0001 says why this is our own and not the request handler of the `vhost` crate.

pub mod connection;
pub mod message;
