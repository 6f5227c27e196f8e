//! A vhost-user block backend that stops answering at a request of one's choice.
//!
//! It speaks just enough of the protocol (vhost-user, "Message specification") to bring a frontend to that
//! request. File descriptors that come along are dropped by the plain reads.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait::Broken;

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_MAX_MEM_SLOTS: u32 = 36;
const GET_CONFIG: u32 = 24;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_CONFIG: u64 = 1 << 9;

const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// From which moment on nothing is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SilentFrom {
    /// The connection is accepted, and that is all.
    Accept,
    /// Everything before the first GET_CONFIG is answered.
    GetConfig,
}

impl SilentFrom {
    fn request(self) -> Option<u32> {
        match self {
            Self::Accept => None,
            Self::GetConfig => Some(GET_CONFIG),
        }
    }
}

/// Protects whether the peer has gone silent, and the connection that keeps it so.
#[derive(Debug, Default)]
struct State {
    silent: Mutex<bool>,
    changed: Condvar,
    stream: Mutex<Option<UnixStream>>,
}

/// The backend, listening until it is dropped.
#[derive(Debug)]
pub struct SilentPeer {
    state: Arc<State>,
}

impl SilentPeer {
    /// Listens on `socket` and serves one connection.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(socket: &Path, from: SilentFrom) -> Result<Self> {
        let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::Builder::new()
            .name("silent-peer".to_owned())
            .spawn(move || {
                let Ok((stream, _)) = listener.accept() else {
                    return;
                };
                if let Ok(clone) = stream.try_clone() {
                    *shared.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(clone);
                }
                // An error is the frontend's end of the conversation.
                let _ = serve(stream, from, &shared);
            })?;
        Ok(Self { state })
    }

    /// Waits until the frontend has sent what is not answered any more.
    ///
    /// # Errors
    /// It did not come that far in time.
    pub fn wait_silent(&self, limit: Duration) -> Result<()> {
        let silent = self
            .state
            .silent
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (silent, _) = self
            .state
            .changed
            .wait_timeout_while(silent, crate::wait::patient(limit), |silent| !*silent)
            .unwrap_or_else(PoisonError::into_inner);
        if *silent {
            Ok(())
        } else {
            Err(Broken::deadline("the request left unanswered", limit))
        }
    }
}

impl Drop for SilentPeer {
    fn drop(&mut self) {
        if let Some(stream) = self
            .state
            .stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serve(mut stream: UnixStream, from: SilentFrom, state: &State) -> std::io::Result<()> {
    loop {
        let mut head = [0u8; 12];
        stream.read_exact(&mut head)?;
        let [request, flags, size] = words(&head);
        let mut body = vec![0u8; size as usize];
        stream.read_exact(&mut body)?;
        let silent = from.request().is_none_or(|last| last == request);
        if silent {
            *state.silent.lock().unwrap_or_else(PoisonError::into_inner) = true;
            state.changed.notify_all();
            // Swallows the rest until the frontend gives up.
            while stream.read(&mut [0u8; 4096])? > 0 {}
            return Ok(());
        }
        if let Some(reply) = reply(request, flags, &body) {
            let mut message = Vec::with_capacity(12 + reply.len());
            for word in [request, 1 | REPLY, u32::try_from(reply.len()).unwrap_or(0)] {
                message.extend_from_slice(&word.to_le_bytes());
            }
            message.extend_from_slice(&reply);
            stream.write_all(&message)?;
        }
    }
}

fn words(head: &[u8; 12]) -> [u32; 3] {
    [0, 4, 8].map(|at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]))
}

/// The answer to a request, if it has one.
fn reply(request: u32, flags: u32, body: &[u8]) -> Option<Vec<u8>> {
    let number = |value: u64| Some(value.to_le_bytes().to_vec());
    match request {
        GET_FEATURES => number(VERSION_1 | PROTOCOL_FEATURES),
        GET_PROTOCOL_FEATURES => number(PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG),
        GET_QUEUE_NUM | GET_MAX_MEM_SLOTS => number(1),
        GET_CONFIG => {
            let mut answer = body.to_vec();
            // A disk of 2048 sectors; the rest of the configuration is zero.
            if let Some(capacity) = answer.get_mut(12..20) {
                capacity.copy_from_slice(&2048u64.to_le_bytes());
            }
            Some(answer)
        }
        _ if flags & NEED_REPLY != 0 => number(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(stream: &mut UnixStream, request: u32) -> std::io::Result<Vec<u8>> {
        let mut message = Vec::new();
        for word in [request, 1, 0] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        stream.write_all(&message)?;
        let mut head = [0u8; 12];
        stream.read_exact(&mut head)?;
        let mut body = vec![0u8; words(&head)[2] as usize];
        stream.read_exact(&mut body)?;
        Ok(body)
    }

    #[test]
    fn it_answers_until_the_chosen_request() {
        let socket = crate::testing::TempPath::new("peer");
        let peer = SilentPeer::start(&socket, SilentFrom::GetConfig).expect("a peer");
        let mut stream = UnixStream::connect(&*socket).expect("connected");
        stream
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a timeout");
        let features = ask(&mut stream, GET_FEATURES).expect("features");
        assert_eq!(features, (VERSION_1 | PROTOCOL_FEATURES).to_le_bytes());
        assert!(ask(&mut stream, GET_CONFIG).is_err());
        peer.wait_silent(Duration::from_secs(20)).expect("silent");
    }
}
