//! The way to the driver: everything that wants something of the VM puts it here.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::EventFd;

use super::builder::{self, Machine};
use super::events::GuestEvent;
use super::state::{Action, Refusal, VmState};
use crate::config::VmConfig;
use crate::devices::virtio::balloon;
use crate::pci::DeviceInfo;
use crate::tuning;
use crate::vhost_user::Kind;

/// One thing asked of the driver.
pub enum Request {
    /// From a client of the API.
    Command(Command, ReplyTo),
    /// From the guest of that boot; of an earlier one it is void.
    Guest(u64, GuestEvent),
    /// The machine of that boot is ready, or cannot be made.
    Built(u64, Result<Box<Machine>, builder::Error>),
    /// The backend of a device that is being added to the machine of that boot has come to this.
    Settled(u64, String, Result<(), String>),
}

/// What a client may ask for.
#[derive(Debug, Clone)]
pub enum Command {
    /// Something that changes the guest and needs no more words.
    Act(Action),
    /// A guest made of this.
    Create(Box<VmConfig>),
    /// One more device; one whose id is empty gets one.
    Add(Box<Kind>),
    /// The device with this id is to go.
    Remove(String),
    /// The guest is to have more or less of something.
    Resize(Resize),
    /// Something of guest memory, by a tuner.
    Tune(tuning::Request),
    /// State and configuration.
    Info,
    /// Counters.
    Counters,
    /// The end of this process.
    VmmShutdown,
}

/// What the guest is to have from now on; what is none stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    /// vCPUs.
    pub vcpus: Option<u32>,
    /// RAM.
    pub ram_bytes: Option<u64>,
    /// What the balloon takes of it.
    pub balloon_bytes: Option<u64>,
}

/// Where the answer to one command goes. Exactly one answer is given: if it is dropped, that the VMM ends.
#[derive(Debug)]
pub struct ReplyTo {
    client: u64,
    answers: Option<Sender<Answer>>,
    event: Arc<EventFd>,
}

/// An answer, and the number of the client that it is for.
pub type Answer = (u64, Result<Reply, Failure>);

impl ReplyTo {
    /// The way to client number `client`: `event` is signalled when `answers` has something.
    pub fn new(client: u64, answers: Sender<Answer>, event: Arc<EventFd>) -> Self {
        Self {
            client,
            answers: Some(answers),
            event,
        }
    }

    /// Gives the answer. Never blocks.
    pub fn send(mut self, answer: Result<Reply, Failure>) {
        self.give(answer);
    }

    fn give(&mut self, answer: Result<Reply, Failure>) {
        // Where the API is gone, so are its clients; an event that is full is as good as signalled.
        if let Some(answers) = self.answers.take() {
            let _ = answers.send((self.client, answer));
            let _ = self.event.write(1);
        }
    }
}

impl Drop for ReplyTo {
    fn drop(&mut self) {
        self.give(Err(Failure::Failed("the VMM is ending".to_owned())));
    }
}

/// Groups of counters by name.
pub type CounterGroups = BTreeMap<String, BTreeMap<String, u64>>;

/// What a client gets.
#[derive(Debug)]
pub enum Reply {
    /// It is done.
    Done,
    /// The device was added, and is here in the machine.
    Added(DeviceInfo),
    /// What came of a tuner's request.
    Tuned(tuning::Outcome),
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
    /// The balloon, while there is a machine with one.
    pub balloon: Option<balloon::Info>,
}

/// Why a client gets nothing.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Not in this state.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// What was asked for is there already.
    #[error("{0}")]
    Conflict(String),
    /// What was named is not there.
    #[error("{0}")]
    NotFound(String),
    /// It is understood and not done here.
    #[error("{0}")]
    Unsupported(String),
    /// Who asks may not have it.
    #[error("{0}")]
    Forbidden(String),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

impl From<tuning::Refusal> for Failure {
    fn from(refusal: tuning::Refusal) -> Self {
        use tuning::Refusal;
        let text = refusal.to_string();
        match refusal {
            Refusal::NoDomain | Refusal::OtherDomain(_) => Self::Forbidden(text),
            Refusal::NotMergeable => Self::Conflict(text),
            Refusal::Range { .. } | Refusal::TooMuch { .. } | Refusal::Key | Refusal::OneOf(_) => {
                Self::Invalid(text)
            }
            Refusal::Busy | Refusal::Failed(_) => Self::Failed(text),
        }
    }
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
