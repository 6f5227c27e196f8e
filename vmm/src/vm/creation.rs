//! How a configuration comes to the driver, and how it goes.
//!
//! Files are opened late here: `vm.create` opens the place of the serial port, on the main thread. The
//! kernel and all the rest are opened by the thread `boot`, at each boot.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::driver::{Driver, Error, error_chain, failed};
use super::requests::Failure;
use super::state::{Action, VmState, accept};
use crate::config::VmConfig;
use crate::config::validate::{self, validate};
use crate::devices::serial::host::SerialHost;

impl From<validate::Error> for Failure {
    fn from(error: validate::Error) -> Self {
        let text = error.to_string();
        match error {
            validate::Error::IdTwice { .. } | validate::Error::SocketTwice { .. } => {
                Self::Conflict(text)
            }
            _ => Self::Invalid(text),
        }
    }
}

impl Driver {
    /// Takes a configuration, which was validated, and opens the place of its serial port.
    pub fn create(&mut self, config: VmConfig) -> Result<(), Error> {
        let host = SerialHost::open(&config.serial)?;
        self.take(config, host)
    }

    /// The same for a client, who is told what is wrong with it.
    pub(super) fn create_for_client(
        &mut self,
        config: VmConfig,
    ) -> Result<Result<(), Failure>, Error> {
        if let Err(refusal) = accept(self.state, Action::Create) {
            return Ok(Err(refusal.into()));
        }
        if let Err(error) = self.validate(&config) {
            return Ok(Err(error.into()));
        }
        match SerialHost::open(&config.serial) {
            Ok(host) => self.take(config, host).map(Ok),
            Err(error) => Ok(Err(Failure::Failed(error_chain(&error)))),
        }
    }

    pub(super) fn validate(&self, config: &VmConfig) -> Result<(), validate::Error> {
        validate(config, self.limits.api_socket.as_deref(), self.limits.host)
    }

    fn take(&mut self, config: VmConfig, host: SerialHost) -> Result<(), Error> {
        if let Some(path) = host.pty_path() {
            tracing::info!(path = %path.display(), "the serial port is a pseudo-terminal");
        }
        host.watch(&self.events)
            .map_err(failed("cannot watch the serial port"))?;
        self.host = Some(host);
        self.config = Some(Arc::new(config));
        self.state = VmState::Created;
        Ok(())
    }

    /// Forgets the guest; its machine, if there is one, goes at once.
    pub(super) fn delete(&mut self) -> Result<(), Error> {
        drop(self.stop_machine()?);
        if let Some(host) = self.host.take() {
            host.flush();
            host.unwatch(&self.events);
        }
        self.config = None;
        Ok(())
    }
}
