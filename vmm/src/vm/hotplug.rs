//! Devices that come and go while the guest is there.
//!
//! ```text
//!  vm.add-*        validate ─▶ configuration ─▶ dial the backend ─▶ (thread plug) wait ─▶ root port ─▶ answer
//!                                   ▲                                   │ it does not serve
//!                                   └───────── taken back ◀─────────────┘
//!  vm.remove-device   configuration ─▶ attention button ─▶ answer … the guest lets go ─▶ the session ends
//! ```
//!
//! A guest looks at a device as soon as it is there, so a backend must serve before that. Without a machine
//! only the configuration changes. A device that the guest does not let go of stays until the next boot,
//! which the configuration alone decides.
//!
//! Files are opened late here: a session's socket, by the session's thread.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use super::devices;
use super::driver::{Driver, error_chain};
use super::machine::Machine;
use super::requests::{Failure, Reply, ReplyTo, Request};
use super::state::{Action, Refusal, accept};
use crate::devices::virtio::device::VirtioDevice;
use crate::pci::DeviceInfo;
use crate::sandbox::{self, ThreadKind};
use crate::telemetry::events::event;
use crate::vhost_user::{Kind, Watch};

/// How long a backend may take to serve a device that is added; libvirt and Kata start it first.
const BACKEND_PATIENCE: Duration = Duration::from_secs(5);

/// A device whose backend is waited for.
pub(super) struct Plugging {
    id: String,
    device: Box<dyn VirtioDevice>,
    client: ReplyTo,
}

/// A device whose session dials, and its id.
type Dialling = (String, Box<dyn VirtioDevice>);

fn failed(error: &dyn std::error::Error) -> Failure {
    Failure::Failed(error_chain(error))
}

impl Driver {
    /// Adds a device for a client, who is answered when the guest can find it.
    pub(super) fn add_device(&mut self, kind: Kind, client: ReplyTo) {
        match self.begin_add(kind) {
            Ok(None) => client.send(Ok(Reply::Done)),
            Ok(Some((id, device))) => self.plugging.push(Plugging { id, device, client }),
            Err(failure) => client.send(Err(failure)),
        }
    }

    /// All of it that takes no time. Returns the device if there is a machine for it.
    fn begin_add(&mut self, kind: Kind) -> Result<Option<Dialling>, Failure> {
        accept(self.state, Action::AddDevice)?;
        let mut config = (**self.config.as_ref().ok_or(Refusal::NotCreated)?).clone();
        let machine = self.machine.as_deref();
        let in_machine = |id: &str| {
            let devices = machine.map(Machine::devices).unwrap_or_default();
            // The session outlives the device, until the news of its end has come here.
            let has_session = || machine.is_some_and(|machine| machine.frontends.0.has(id));
            devices.iter().any(|device| device.id == id) || has_session()
        };
        let kind = devices::add(&mut config, kind, in_machine);
        let id = kind.id().to_owned();
        self.validate(&config)?;
        if in_machine(&id) {
            let text = format!("id='{id}' is used by a device that the guest has not let go of");
            return Err(Failure::Conflict(text));
        }
        let mut device = None;
        if let Some(machine) = &mut self.machine {
            if machine.pci.free_ports() <= self.plugging.len() {
                let text = format!("no root port is free for {id} (--platform hotplug_ports=)");
                return Err(Failure::Failed(text));
            }
            let frontends = &mut machine.frontends.0;
            let connected = frontends
                .connect_at_once(kind)
                .map_err(|error| failed(&error))?;
            let watch = frontends.watch(&id).ok_or(Refusal::NotCreated)?;
            self.wait_for(watch, &id)
                .inspect_err(|_| self.forget(&id))?;
            device = Some((id, connected));
        }
        self.config = Some(Arc::new(config));
        Ok(device)
    }

    fn wait_for(&self, watch: Watch, id: &str) -> Result<(), Failure> {
        let (sender, boot, id) = (self.sender.clone(), self.boot, id.to_owned());
        let waits = move || {
            let served = watch.wait(BACKEND_PATIENCE);
            sender.send(Request::Settled(boot, id, served));
        };
        let spawned = sandbox::spawn(ThreadKind::Plug, "plug", waits);
        spawned.map(drop).map_err(|error| failed(&error))
    }

    /// The backend of a device that is being added serves it, or does not.
    pub(super) fn settled(&mut self, id: &str, served: Result<(), String>) {
        let Some(index) = self.plugging.iter().position(|plugging| plugging.id == id) else {
            return;
        };
        let Plugging { device, client, .. } = self.plugging.swap_remove(index);
        let plugged = self.finish_add(id, device, served);
        if plugged.is_err() {
            self.take_back(id);
        }
        client.send(plugged.map(Reply::Added));
    }

    fn finish_add(
        &self,
        id: &str,
        device: Box<dyn VirtioDevice>,
        served: Result<(), String>,
    ) -> Result<DeviceInfo, Failure> {
        if let Err(reason) = served {
            let text = format!("the backend of {id} does not serve it: {reason}");
            return Err(Failure::Failed(text));
        }
        let machine = self.machine.as_deref().ok_or(Refusal::NotCreated)?;
        let plugged = machine.pci.plug(id, device);
        let info = plugged.map_err(|error| failed(&error))?;
        tracing::info!(device = id, bdf = info.bdf, "a device was added");
        event("vm", "device-added", &[("id", id), ("bdf", &info.bdf)]);
        Ok(info)
    }

    /// The machine goes while devices are being added to it.
    pub(super) fn give_up_plugging(&mut self) {
        self.leaving.clear();
        for Plugging { id, client, .. } in std::mem::take(&mut self.plugging) {
            self.take_back(&id);
            let text = format!("the machine went while {id} was added to it");
            client.send(Err(Failure::Failed(text)));
        }
    }

    /// Undoes what was begun.
    fn take_back(&mut self, id: &str) {
        if let Some(config) = &mut self.config {
            devices::remove(Arc::make_mut(config), id);
        }
        self.forget(id);
    }

    /// Removes a device. With a machine this asks the guest, and does not wait for it.
    pub(super) fn remove_device(&mut self, id: &str) -> Result<(), Failure> {
        accept(self.state, Action::RemoveDevice)?;
        if self.plugging.iter().any(|plugging| plugging.id == id) {
            return Err(Failure::Failed(format!("{id} is being added")));
        }
        let config = self.config.as_mut().ok_or(Refusal::NotCreated)?;
        let was_configured = devices::remove(Arc::make_mut(config), id);
        let mut was_asked = false;
        if let Some(machine) = self.machine.as_deref() {
            let mut devices = machine.devices().into_iter();
            let device = devices.find(|device| device.id == id);
            was_asked = machine.pci.request_removal(id);
            if let Some(device) = device.filter(|_| was_asked) {
                self.leaving.insert(device.id, device.bdf);
            }
        }
        if !was_configured && !was_asked {
            return Err(Failure::NotFound(format!("there is no device {id}")));
        }
        tracing::info!(device = id, "a device is to be removed");
        Ok(())
    }

    /// The guest let go of a device.
    pub(super) fn ejected(&mut self, id: &str) {
        tracing::info!(device = id, "a device was removed");
        let bdf = self.leaving.remove(id).unwrap_or_default();
        event("vm", "device-removed", &[("id", id), ("bdf", &bdf)]);
        self.forget(id);
    }

    fn forget(&mut self, id: &str) {
        if let Some(machine) = &mut self.machine {
            machine.frontends.0.forget(id);
        }
    }
}
