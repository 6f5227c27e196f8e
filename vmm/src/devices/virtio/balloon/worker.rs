//! The thread that takes what the guest gives.
//!
//! It waits for a command without rings, and for a command, a kick or the time to ask for statistics with them
//! ([`super::rings`] is what it does then). A ring that makes no sense is let go, and the driver is told to reset; then the
//! thread waits for that.
#![forbid(unsafe_code)]

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::rings::{Lent, Rings, WAKE};
use super::shared::Shared;
use crate::devices::virtio::device::Activation;
use crate::telemetry::LogLimit;

/// What a driver can cause to be logged.
static FAILURES: LogLimit = LogLimit::new(Duration::from_secs(10));

/// What the transport's threads want.
pub(super) enum Command {
    Start(Box<Start>),
    /// Let go of the rings.
    Stop,
}

/// An activation on its way to the thread.
pub(super) struct Start(pub(super) Activation);

pub(super) struct Worker {
    pub(super) name: String,
    pub(super) lent: Lent,
    pub(super) shared: Arc<Shared>,
    pub(super) commands: Receiver<Command>,
}

/// Why the rings are let go.
enum End {
    Stopped,
    Gone,
    Broken(String),
}

impl From<String> for End {
    fn from(reason: String) -> Self {
        Self::Broken(reason)
    }
}

impl Worker {
    /// Serves until the device is gone.
    pub(super) fn run(self) {
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Start(start) => match self.serve(start.0) {
                    End::Gone => return,
                    End::Stopped => self.shared.lock().running = false,
                    End::Broken(reason) => self.fail(&reason),
                },
                Command::Stop => self.shared.lock().running = false,
            }
        }
    }

    fn fail(&self, reason: &str) {
        if let Some(suppressed) = FAILURES.pass() {
            let device = self.name.as_str();
            tracing::warn!(device, suppressed, reason, "the device needs a reset");
        }
        let notify = self.shared.lock().notify.clone();
        if let Some(notify) = notify {
            notify.needs_reset();
        }
    }

    fn serve(&self, activation: Activation) -> End {
        let rings = Rings::new(activation, Arc::clone(&self.shared), self.lent.clone());
        let result = rings.and_then(|mut rings| {
            let epoll = rings.watch()?;
            // The first kick may have come before anybody listened.
            for place in 0..rings.len() {
                rings.process(place)?;
            }
            Ok((rings, epoll))
        });
        match result {
            Ok((rings, epoll)) => match self.wait(rings, &epoll) {
                Ok(end) | Err(end) => end,
            },
            Err(reason) => End::Broken(reason),
        }
    }

    fn wait(&self, mut rings: Rings, epoll: &Epoll) -> Result<End, End> {
        let mut events = [EpollEvent::default(); 5];
        loop {
            let ready = match epoll.wait(rings.timeout_ms(), &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(format!("cannot wait for events: {error}").into()),
            };
            for event in &events[..ready] {
                if event.data() == WAKE {
                    // Before the commands are taken, so that one that comes meanwhile wakes anew.
                    let _ = self.shared.wake.read();
                    if let Some(end) = self.obey() {
                        return Ok(end);
                    }
                }
            }
            let places = events[..ready].iter().map(EpollEvent::data);
            for place in places.filter(|place| *place != WAKE) {
                rings.process(place as usize)?;
            }
            rings.ask_for_stats()?;
        }
    }

    fn obey(&self) -> Option<End> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Stop) => return Some(End::Stopped),
                // The transport resets before it starts again.
                Ok(Command::Start(_)) => {}
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(End::Gone),
            }
        }
    }
}
