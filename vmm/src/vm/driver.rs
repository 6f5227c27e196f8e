//! The one writer of VM state: the main thread's loop.
//!
//! ```text
//!  API, vCPUs, boot thread ─▶ Requests ─┐
//!  SIGTERM … ─▶ Signals ────────────────┼─▶ Driver ─▶ state, Machine, exit
//!  terminal, pty, socket ─▶ SerialHost ─┘
//! ```
//!
//! A machine is built by the thread `boot` and taken apart by the thread `teardown`: both may wait for
//! a backend, and the driver waits for neither. What they bring back carries the number of its boot, so
//! that an answer to a question nobody asks any more is dropped.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::booting::take_apart;
use super::builder;
use super::events::GuestEvent;
use super::hotplug::Plugging;
use super::machine::Machine;
use super::requests::{
    Command, CounterGroups, Failure, Info, Reply, ReplyTo, Request, RequestSender, Requests,
};
use super::signals::Signals;
use super::state::{Action, Refusal, VmState, accept};
use crate::config::VmConfig;
use crate::config::validate::Host;
use crate::devices::serial::host::{self, SerialHost};
use crate::event_loop::{EventLoop, Token};
use crate::launcher::Launcher;
use crate::sandbox::{self, ThreadKind};
use crate::telemetry::events::event;
use crate::tuning;

/// How long the end of the process waits for the machine to be taken apart.
const TEARDOWN_PATIENCE: Duration = Duration::from_secs(2);

/// Resets that follow a boot closer than this are not logged.
pub(super) const RESET_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Why the process ends other than by intent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest died.
    #[error("the guest died: {0}")]
    Guest(String),
    /// The machine cannot be made.
    #[error(transparent)]
    Build(#[from] builder::Error),
    /// The place where the serial port goes.
    #[error(transparent)]
    Serial(#[from] host::Error),
    /// The main thread's own files.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// What configurations that come by the API are held against, and what there is to carry them out.
#[derive(Debug)]
pub struct Limits {
    /// Of the host.
    pub host: Host,
    /// The API's own socket.
    pub api_socket: Option<PathBuf>,
    /// Starts daemons for disks and network cards.
    pub launcher: Option<Launcher>,
}

pub(super) fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// Owner of the VM.
pub struct Driver {
    pub(super) limits: Limits,
    /// What the guest is made of, and its serial port's other end; none in `NotCreated`.
    pub(super) config: Option<Arc<VmConfig>>,
    pub(super) host: Option<SerialHost>,
    pub(super) events: EventLoop,
    signals: Signals,
    pub(super) sender: RequestSender,
    requests: Requests,
    pub(super) state: VmState,
    pub(super) machine: Option<Box<Machine>>,
    /// Number of this boot.
    pub(super) boot: u64,
    /// When it began to run.
    pub(super) booted: Instant,
    /// There was a machine before this boot.
    pub(super) again: bool,
    /// A client of the API asked for this boot: where it fails, the process stays for the next try.
    pub(super) stays_if_unbuilt: bool,
    /// The client that asked for this boot, until it is done.
    pub(super) booting_for: Option<ReplyTo>,
    /// Devices whose backends are waited for.
    pub(super) plugging: Vec<Plugging>,
    /// Devices that the guest was asked to let go of, and where they are.
    pub(super) leaving: BTreeMap<String, String>,
    /// What the guest did in the moment in which it was paused: it is seen when it runs again.
    pub(super) held_back: Option<GuestEvent>,
    /// Tells the boot thread that nobody waits for its machine any more.
    pub(super) cancel: Arc<AtomicBool>,
    /// Set once the process is to end.
    pub(super) exit: Option<Result<u8, Error>>,
}

impl Driver {
    /// A driver without a guest.
    pub fn new(
        limits: Limits,
        signals: Signals,
        (sender, requests): (RequestSender, Requests),
    ) -> Result<Self, Error> {
        let setup = failed("cannot set up the event loop");
        let events = EventLoop::new().map_err(&setup)?;
        events.add(&signals, Token::Signal).map_err(&setup)?;
        events
            .add(requests.event(), Token::Requests)
            .map_err(&setup)?;
        Ok(Self {
            limits,
            config: None,
            host: None,
            events,
            signals,
            sender,
            requests,
            state: VmState::NotCreated,
            machine: None,
            boot: 0,
            booted: Instant::now(),
            again: false,
            stays_if_unbuilt: false,
            booting_for: None,
            plugging: Vec::new(),
            leaving: BTreeMap::new(),
            held_back: None,
            cancel: Arc::default(),
            exit: None,
        })
    }

    /// Serves until the process is to end. A guest that was [created](Self::create) is booted first.
    /// Returns the process's exit code.
    pub fn run(mut self) -> Result<u8, Error> {
        if self.state == VmState::Created {
            self.start_boot(None)?;
        }
        let result = loop {
            if let Some(result) = self.exit.take() {
                break result;
            }
            for token in self
                .events
                .wait()
                .map_err(failed("cannot wait for events"))?
            {
                self.process(token)?;
            }
        };
        if self.machine.is_some() {
            report("shutdown");
        }
        if let Some(gone) = self.stop_machine()?
            && gone.recv_timeout(TEARDOWN_PATIENCE).is_err()
        {
            tracing::warn!("a device did not stop in time");
        }
        if let Some(host) = &self.host {
            host.flush();
        }
        if self.config.is_some() {
            report("deleted");
        }
        event("vmm", "shutdown", &[]);
        result
    }

    fn process(&mut self, token: Token) -> Result<(), Error> {
        match token {
            Token::Signal => self.process_signals(),
            Token::Requests => {
                for request in self.requests.take() {
                    self.process_request(request)?;
                }
            }
            Token::SerialInput | Token::SerialListener | Token::SerialRoom => {
                self.process_serial(token).map_err(failed("serial port"))?;
            }
            Token::SciResample => {
                if let Some(machine) = &self.machine {
                    machine.process_sci_resample();
                }
            }
        }
        Ok(())
    }

    fn process_serial(&mut self, token: Token) -> io::Result<()> {
        let Some(host) = &mut self.host else {
            return Ok(());
        };
        match token {
            Token::SerialListener => host.process_listener(&self.events),
            Token::SerialRoom => host.process_room(&self.events),
            _ => {
                host.process_input(&self.events)?;
                if let Some(machine) = &self.machine {
                    machine.serial_input();
                }
                Ok(())
            }
        }
    }

    fn process_signals(&mut self) {
        while let Some(signal) = self.signals.take() {
            tracing::info!(signal, "told to end by a signal");
            self.exit = Some(Ok(0));
        }
    }

    fn process_request(&mut self, request: Request) -> Result<(), Error> {
        match request {
            Request::Command(command, reply) => self.command(command, reply)?,
            Request::Guest(boot, event) if boot == self.boot => self.guest_event(event)?,
            Request::Built(boot, built) if boot == self.boot => self.built(built)?,
            Request::Built(_, Ok(machine)) => drop(take_apart(machine)?),
            Request::Settled(boot, id, served) if boot == self.boot => self.settled(&id, served),
            Request::Guest(..) | Request::Built(..) | Request::Settled(..) => {}
        }
        Ok(())
    }

    /// Does what a client asks and answers, or keeps the way to it until there is an answer.
    fn command(&mut self, command: Command, reply: ReplyTo) -> Result<(), Error> {
        let done = |result: Result<(), Failure>| result.map(|()| Reply::Done);
        match command {
            Command::Act(action) => match accept(self.state, action) {
                Ok(next) => return self.act(action, next, reply),
                Err(refusal) => reply.send(Err(refusal.into())),
            },
            Command::Create(config) => reply.send(done(self.create_for_client(*config)?)),
            Command::Add(kind) => self.add_device(*kind, reply),
            Command::Remove(id) => reply.send(done(self.remove_device(&id))),
            Command::Resize(resize) => reply.send(done(self.resize(resize))),
            Command::Tune(request) => self.tune(request, reply),
            Command::Info => reply.send(self.info()),
            Command::Counters => reply.send(Ok(Reply::Counters(self.counters()))),
            Command::VmmShutdown => {
                tracing::info!("told to end by the API");
                self.exit = Some(Ok(0));
                reply.send(Ok(Reply::Done));
            }
        }
        Ok(())
    }

    /// It may take long, so it has a thread of its own, which answers by itself.
    fn tune(&self, request: tuning::Request, reply: ReplyTo) {
        let Some(machine) = &self.machine else {
            let why = "there is no guest memory: the guest is not booted";
            return reply.send(Err(Failure::Failed(why.to_owned())));
        };
        let tuning = match machine.tuning.one_more() {
            Ok(tuning) => tuning,
            Err(busy) => return reply.send(Err(busy.into())),
        };
        let serve = move || {
            let outcome = tuning.serve(&request);
            reply.send(outcome.map(Reply::Tuned).map_err(Failure::from));
        };
        // Where there is no thread, the reply is dropped with the closure, which answers too.
        if let Err(error) = sandbox::spawn(ThreadKind::Advice, "advice", serve) {
            tracing::error!(%error, "cannot start the advice thread");
        }
    }

    /// Does what was accepted. An error ends the process; what is only the client's goes to `reply`.
    fn act(&mut self, action: Action, next: VmState, reply: ReplyTo) -> Result<(), Error> {
        let machine = self.machine.as_deref();
        let (begins, done) = names(action);
        report_some(begins);
        match (action, machine) {
            (Action::PowerButton, Some(machine)) => machine.press_power_button(),
            (Action::Pause, Some(machine)) => {
                if let Err(error) = machine.pause() {
                    reply.send(Err(Failure::Failed(error.to_string())));
                    return Ok(());
                }
            }
            (Action::Resume, Some(machine)) if self.held_back.is_none() => machine.resume(),
            (Action::Shutdown, _) => drop(self.stop_machine()?),
            (Action::Delete, _) => self.delete()?,
            // Sets the state itself, and is answered when it has come to something.
            (Action::Boot | Action::Reboot, _) => return self.start_boot(Some(reply)),
            // Have commands of their own, or need a machine that is not there.
            _ => {}
        }
        tracing::info!(?action, state = ?next, "the guest's state was changed by the API");
        self.state = next;
        report_some(done);
        reply.send(Ok(Reply::Done));
        match self.held_back.take_if(|_| next == VmState::Running) {
            Some(event) => self.guest_event(event),
            None => Ok(()),
        }
    }

    fn guest_event(&mut self, event: GuestEvent) -> Result<(), Error> {
        if self.exit.is_some() {
            return Ok(());
        }
        if self.state == VmState::Paused && !event.goes_on() {
            self.held_back = Some(event);
            return Ok(());
        }
        match event {
            GuestEvent::PowerOff => {
                tracing::info!("the guest powered off");
                self.exit = Some(Ok(0));
            }
            GuestEvent::Exit(code) => {
                tracing::info!(code, "the guest ended this process by the test device");
                self.exit = Some(Ok(code));
            }
            GuestEvent::Reset => {
                // A guest may do nothing else: it must not fill the log.
                if self.booted.elapsed() > RESET_LOG_INTERVAL {
                    tracing::info!("the guest reset its machine");
                }
                self.start_boot(None)?;
            }
            GuestEvent::Ejected(id) => self.ejected(&id),
            GuestEvent::Fatal(what) => self.exit = Some(Err(Error::Guest(what))),
        }
        Ok(())
    }

    fn info(&self) -> Result<Reply, Failure> {
        let config = self.config.as_deref().ok_or(Refusal::NotCreated)?;
        let pty = self.host.as_ref().and_then(SerialHost::pty_path);
        let machine = self.machine.as_deref();
        Ok(Reply::Info(Box::new(Info {
            state: self.state,
            config: config.clone(),
            pty: pty.map(Into::into),
            devices: machine.map(Machine::devices).unwrap_or_default(),
            balloon: machine.and_then(Machine::balloon),
        })))
    }

    fn counters(&self) -> CounterGroups {
        let machine = self.machine.as_deref();
        let mut groups = machine.map(Machine::counters).unwrap_or_default();
        let dropped = self.host.as_ref().map_or(0, |host| host.output().dropped());
        let own = [("boots", self.boot), ("serial_dropped_bytes", dropped)];
        let own = own.map(|(name, value)| (name.to_owned(), value));
        groups.insert("vmm".to_owned(), own.into());
        groups
    }
}

/// Reports an event of the guest.
pub(super) fn report(name: &'static str) {
    event("vm", name, &[]);
}

fn report_some(name: Option<&'static str>) {
    if let Some(name) = name {
        report(name);
    }
}

/// The events of an action, when it begins and when it is done.
fn names(action: Action) -> (Option<&'static str>, Option<&'static str>) {
    match action {
        Action::Pause => (Some("pausing"), Some("paused")),
        Action::Resume => (Some("resuming"), Some("resumed")),
        Action::Shutdown => (None, Some("shutdown")),
        Action::Delete => (None, Some("deleted")),
        _ => (None, None),
    }
}

/// The error and its sources in one line.
pub(super) fn error_chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    let text = sources.fold(error.to_string(), |text, source| {
        format!("{text}: {source}")
    });
    text.replace('\n', " ")
}
