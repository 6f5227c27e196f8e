//! A relay between two Unix sockets that holds back what one side says until it is let go.
//!
//! Threads: one a direction; they end when either side closes.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result};

/// A relay that waits for one client. Dropping it without [`Relay::release`] closes the held direction.
#[derive(Debug)]
pub struct Relay(Sender<()>);

impl Relay {
    /// Listens on `path`, and passes its first client's bytes on to the listener at `to`. What comes back is
    /// held.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(path: &Path, to: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
        let to = to.to_owned();
        let (release, released) = channel();
        std::thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || relay(&listener, &to, released))?;
        Ok(Self(release))
    }

    /// Lets what was held, and what follows, pass.
    pub fn release(&self) {
        // Fails only when both sides are gone.
        let _ = self.0.send(());
    }
}

/// A side that closes, at its own or at the story's end, ends its direction: the other side sees EOF.
fn relay(listener: &UnixListener, to: &Path, released: Receiver<()>) -> Result<()> {
    let (client, _) = listener.accept()?;
    let server = UnixStream::connect(to)?;
    let (from_server, to_client) = (server.try_clone()?, client.try_clone()?);
    std::thread::Builder::new()
        .name("relay-back".to_owned())
        .spawn(move || {
            if released.recv().is_ok() {
                pass(from_server, to_client);
            }
        })?;
    pass(client, server);
    Ok(())
}

fn pass(mut from: UnixStream, mut to: UnixStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}
