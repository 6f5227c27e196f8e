//! A virtio device that only remembers what it was asked, for tests of what is around it.

use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActivateError, Activation, ResetProgress, TransportNotify, VirtioDevice};

/// Queue sizes of the device.
pub(crate) const QUEUES: [u16; 2] = [256, 64];
/// A device feature that it offers.
pub(crate) const FEATURE: u64 = 1 << 6;

/// What a test sees and sets.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) activation: Option<Activation>,
    pub(crate) notify: Option<Arc<dyn TransportNotify>>,
    pub(crate) resets: usize,
    pub(crate) busy: bool,
    pub(crate) refuses: bool,
    pub(crate) calls: Vec<u16>,
    pub(crate) config: Vec<u8>,
}

#[derive(Clone, Default)]
pub(crate) struct FakeDevice(Arc<Mutex<State>>);

impl FakeDevice {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl VirtioDevice for FakeDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | FEATURE
    }

    fn accepts(&self, _features: u64) -> bool {
        !self.state().refuses
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let config = &self.state().config;
            *byte = config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let end = offset as usize + data.len();
        let len = state.config.len().max(end);
        state.config.resize(len, 0);
        state.config[offset as usize..end].copy_from_slice(data);
    }

    fn attach(&mut self, notify: Arc<dyn TransportNotify>) {
        self.state().notify = Some(notify);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.state().activation = Some(activation);
        Ok(())
    }

    fn set_call(&mut self, queue: u16, _call: EventFd) {
        self.state().calls.push(queue);
    }

    fn reset(&mut self) {
        let mut state = self.state();
        state.activation = None;
        state.resets += 1;
    }

    fn reset_progress(&mut self) -> ResetProgress {
        match self.state().busy {
            true => ResetProgress::Pending,
            false => ResetProgress::Done,
        }
    }
}
