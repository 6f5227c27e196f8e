//! The way to the driver: everything that wants something of the VM puts it here.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use vmm_sys_util::eventfd::EventFd;

use super::builder::{self, Machine};
use super::events::GuestEvent;
use super::state::{Action, Refusal, VmState};
use crate::config::VmConfig;
use crate::pci::DeviceInfo;

/// One thing asked of the driver.
pub enum Request {
    /// From a client of the API.
    Command(Command, SyncSender<Result<Reply, Failure>>),
    /// From the guest of that boot; of an earlier one it is void.
    Guest(u64, GuestEvent),
    /// The machine of that boot is ready, or cannot be made.
    Built(u64, Result<Box<Machine>, builder::Error>),
}

/// What a client may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Something that changes the guest.
    Act(Action),
    /// State and configuration.
    Info,
    /// Counters.
    Counters,
    /// The end of this process.
    VmmShutdown,
}

/// Groups of counters by name.
pub type CounterGroups = BTreeMap<String, BTreeMap<String, u64>>;

/// What a client gets.
#[derive(Debug)]
pub enum Reply {
    /// It is done.
    Done,
    /// State and configuration.
    Info(Box<Info>),
    /// Counters.
    Counters(CounterGroups),
}

/// State and configuration of the guest.
#[derive(Debug)]
pub struct Info {
    /// Its state.
    pub state: VmState,
    /// What it is made of.
    pub config: VmConfig,
    /// The pseudo-terminal of its serial port, if it has one.
    pub pty: Option<std::path::PathBuf>,
    /// PCI devices, while there is a machine.
    pub devices: Vec<DeviceInfo>,
}

/// Why a client gets nothing.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Not in this state.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

/// Where requests are put; clones are the same place.
#[derive(Clone)]
pub struct RequestSender {
    requests: Sender<Request>,
    event: Arc<EventFd>,
}

impl RequestSender {
    /// Hands a request over; never blocks. Without a driver it is lost, as the process is ending.
    pub fn send(&self, request: Request) {
        if self.requests.send(request).is_ok()
            && let Err(error) = self.event.write(1)
        {
            tracing::error!(%error, "cannot wake the main thread");
        }
    }
}

/// Where the driver takes them.
pub struct Requests {
    requests: Receiver<Request>,
    event: Arc<EventFd>,
}

impl Requests {
    /// Both ends.
    pub fn new() -> io::Result<(RequestSender, Self)> {
        let (sender, receiver) = channel();
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let sender = RequestSender {
            requests: sender,
            event: Arc::clone(&event),
        };
        let requests = Self {
            requests: receiver,
            event,
        };
        Ok((sender, requests))
    }

    /// Signalled when there are requests.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Everything that is there.
    pub fn take(&self) -> Vec<Request> {
        // Before the requests are taken, so that one that comes meanwhile signals anew. EAGAIN: none.
        let _ = self.event.read();
        self.requests.try_iter().collect()
    }
}
