//! A machine that is put together: what runs the guest, in the order in which it is taken apart.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use berth_irqchip::{Chip, Line};
use vmm_sys_util::eventfd::EventFd;

use super::requests::CounterGroups;
use crate::cpu::{self, Buses, Vcpus};
use crate::devices::power::PowerBlock;
use crate::devices::serial::port::SerialPort;
use crate::devices::virtio::balloon;
use crate::memory::{GuestRam, RamSlots};
use crate::pci::{DeviceInfo, Pci};
use crate::tuning::Tuning;
use crate::vhost_user::{Frontends, SessionState};

/// One boot of the guest. Fields are dropped in order: no vCPU runs when its devices go, and nothing
/// uses guest memory when its slots go.
pub struct Machine {
    pub(super) vcpus: Vcpus,
    pub(super) frontends: Backends,
    pub(super) _buses: ClearedBuses,
    pub(super) serial: Option<Arc<SerialPort>>,
    pub(super) power: Arc<PowerBlock>,
    pub(super) sci: Arc<Line>,
    pub(super) pci: Pci,
    pub(super) balloon: Option<balloon::Handle>,
    pub(super) chip: Arc<Chip>,
    pub(super) _slots: RamSlots,
    pub(super) ram: GuestRam,
    pub(super) tuning: Arc<Tuning>,
}

/// How long backends may take to give their rings back when the machine goes.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Sessions with backends, which end when the machine goes.
pub(super) struct Backends(pub(super) Frontends);

impl Drop for Backends {
    fn drop(&mut self) {
        for device in self.0.stop(STOP_PATIENCE) {
            tracing::warn!(device, "the backend did not give its rings back in time");
        }
    }
}

/// Buses that forget their devices when the machine goes: some devices hold the buses in turn.
pub(super) struct ClearedBuses(pub(super) Buses);

impl Drop for ClearedBuses {
    fn drop(&mut self) {
        self.0.pio.clear();
        self.0.mmio.clear();
    }
}

impl Machine {
    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.vcpus.resume();
    }

    /// Stops the vCPUs; returns when none is in the guest.
    pub fn pause(&self) -> Result<(), cpu::Error> {
        self.vcpus.pause()
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// Input for the serial port waits in its queue.
    pub fn serial_input(&self) {
        if let Some(serial) = &self.serial {
            serial.receive();
        }
    }

    /// Signalled when the guest ends an ACPI interrupt.
    pub fn sci_resample(&self) -> Option<&EventFd> {
        self.sci.resample()
    }

    /// The guest ended an ACPI interrupt.
    pub fn process_sci_resample(&self) {
        if let Some(resample) = self.sci.resample() {
            // Reset before the condition is looked at; EAGAIN is as good.
            let _: io::Result<u64> = resample.read();
        }
        self.power.resample();
    }

    /// PCI devices where the guest put them.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        self.pci.devices()
    }

    /// What its balloon has come to, if it has one.
    pub fn balloon(&self) -> Option<balloon::Info> {
        self.balloon.as_ref().map(balloon::Handle::info)
    }

    /// All counters. What cannot be counted here is absent.
    pub fn counters(&self) -> CounterGroups {
        let mut groups = CounterGroups::new();
        for (index, counters) in self.vcpus.counters().into_iter().enumerate() {
            groups.insert(format!("vcpu{index}"), counters.into_iter().collect());
        }
        for session in self.frontends.0.sessions() {
            let live = u64::from(session.state == SessionState::Live);
            let group = groups.entry(session.id).or_default();
            group.insert("backend_connected".to_owned(), live);
            for (name, value) in session.shadow.into_iter().flatten() {
                group.insert(name.to_owned(), value);
            }
        }
        if let Some(balloon) = &self.balloon {
            groups.insert(balloon::NAME.to_owned(), balloon.counters());
        }
        let chip = self.chip.counters();
        let irqchip = [
            ("routing_updates", chip.routing_updates),
            ("lines", chip.lines),
            ("line_raises", chip.line_raises),
            ("ends_of_interrupt", chip.ends_of_interrupt),
            ("msis", chip.msis),
            ("msis_attached", chip.msis_attached),
            ("doorbells", chip.doorbells),
            ("doorbells_placed", chip.doorbells_placed),
        ];
        let named = irqchip.map(|(name, value)| (name.to_owned(), value));
        groups.insert("irqchip".to_owned(), named.into());
        let memory = self.ram.counters().into_iter();
        let named = memory.map(|(name, value)| (name.to_owned(), value));
        groups.insert("memory".to_owned(), named.collect());
        groups
    }
}
