//! Building a machine and taking one apart, each by a thread of its own: both may wait for a backend.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use super::builder;
use super::driver::{Driver, Error, RESET_LOG_INTERVAL, error_chain, failed, report};
use super::events::GuestEvents;
use super::machine::Machine;
use super::requests::{Failure, Reply, ReplyTo, Request};
use super::state::VmState;
use crate::config::SerialConfig;
use crate::event_loop::Token;
use crate::sandbox::{self, ThreadKind};
use crate::telemetry::startup;

impl Driver {
    /// Takes the machine apart, if there is one, and has a new one built from scratch, perhaps for a client,
    /// who is answered when that has come to something.
    pub(super) fn start_boot(&mut self, client: Option<ReplyTo>) -> Result<(), Error> {
        self.again = self.machine.is_some();
        report(if self.again { "rebooting" } else { "booting" });
        let gone = self.stop_machine()?;
        let (Some(config), Some(host)) = (&self.config, &self.host) else {
            return Ok(());
        };
        self.state = VmState::Booting;
        self.stays_if_unbuilt = client.is_some();
        self.booting_for = client;
        let new_vm = match builder::NewVm::create(&config.platform) {
            Ok(new_vm) => new_vm,
            Err(error) => return self.built(Err(error)),
        };
        let boot = self.boot;
        let sender = self.sender.clone();
        let events = {
            let sender = sender.clone();
            GuestEvents::new(move |event| sender.send(Request::Guest(boot, event)))
        };
        let parts = builder::Parts {
            new_vm,
            config: Arc::clone(config),
            serial: (config.serial != SerialConfig::Off).then(|| (host.output(), host.input())),
            events,
            launcher: self.limits.launcher.clone(),
            cancel: Arc::clone(&self.cancel),
        };
        startup::mark("KVM's VM");
        let spawned = sandbox::spawn(ThreadKind::Boot, "boot", move || {
            // The backends serve one connection at a time: the old ones must have ended.
            if let Some(gone) = gone {
                let _ = gone.recv();
            }
            let built = builder::build(&parts).map(Box::new);
            sender.send(Request::Built(boot, built));
        });
        match spawned {
            Ok(_) => Ok(()),
            Err(error) => self.built(Err(builder::Error::Thread(error))),
        }
    }

    pub(super) fn built(
        &mut self,
        built: Result<Box<Machine>, builder::Error>,
    ) -> Result<(), Error> {
        match built {
            Ok(machine) => {
                if let Some(resample) = machine.sci_resample() {
                    self.events
                        .add(resample, Token::SciResample)
                        .map_err(failed("cannot watch the ACPI interrupt"))?;
                }
                machine.serial_input();
                machine.resume();
                self.machine = Some(machine);
                self.state = VmState::Running;
                report(if self.again { "rebooted" } else { "booted" });
                if self.boot == 1 || self.booted.elapsed() > RESET_LOG_INTERVAL {
                    tracing::info!(boot = self.boot, "the guest runs");
                }
                self.booted = Instant::now();
                if let Some(client) = self.booting_for.take() {
                    client.send(Ok(Reply::Done));
                }
            }
            Err(error) if self.stays_if_unbuilt => {
                self.state = VmState::Shutdown;
                let error = error_chain(&error);
                tracing::error!(error, "the guest cannot be booted");
                if let Some(client) = self.booting_for.take() {
                    client.send(Err(Failure::Failed(error)));
                }
            }
            Err(error) => self.exit = Some(Err(error.into())),
        }
        Ok(())
    }

    /// Stops the guest of this boot at once, and leaves the rest to a thread whose end is reported
    /// through what is returned.
    pub(super) fn stop_machine(&mut self) -> Result<Option<Receiver<()>>, Error> {
        self.cancel.store(true, Ordering::Release);
        self.cancel = Arc::default();
        self.boot += 1;
        if let Some(client) = self.booting_for.take() {
            client.send(Err(Failure::Failed("the boot was given up".to_owned())));
        }
        self.give_up_plugging();
        self.held_back = None;
        let Some(machine) = self.machine.take() else {
            return Ok(None);
        };
        if let Some(resample) = machine.sci_resample() {
            self.events.remove(resample);
        }
        if let Err(error) = machine.pause() {
            tracing::warn!(%error, "while stopping the guest");
        }
        take_apart(machine).map(Some)
    }
}

pub(super) fn take_apart(machine: Box<Machine>) -> Result<Receiver<()>, Error> {
    let (done, gone): (SyncSender<()>, _) = sync_channel(1);
    sandbox::spawn(ThreadKind::Teardown, "teardown", move || {
        drop(machine);
        // The driver may have stopped listening.
        let _ = done.try_send(());
    })
    .map_err(failed("cannot start the teardown thread"))?;
    Ok(gone)
}
