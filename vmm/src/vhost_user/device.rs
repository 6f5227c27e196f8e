//! The device side of the transport's calls: each writes a wish down and returns.

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::EventFd;

use super::kind::bits;
use super::shadow::Workers;
use super::shared::Shared;
use crate::devices::virtio::device::{
    ActivateError, Activation, ResetProgress, TransportNotify, VirtioDevice,
};

/// A virtio device that another process serves.
pub(super) struct Device {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    /// Who copies for it, if somebody has to.
    workers: Option<Workers>,
}

impl Device {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            queue_sizes: shared.kind.queue_sizes(),
            workers: None,
            shared,
        }
    }
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        self.shared.kind.device_type()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// The last known offer; nothing but VERSION_1 as long as no backend ever answered.
    fn features(&self) -> u64 {
        let state = self.shared.state();
        let offer = state.offer.as_ref();
        let theirs = offer.map_or(bits(&[VIRTIO_F_VERSION_1]), |offer| offer.features);
        theirs | self.shared.reach.features()
    }

    /// A driver that comes while the backend is away for a moment is served when it is back; one whose
    /// backend never answered would wait for ever.
    fn accepts(&self, features: u64) -> bool {
        self.shared.reach.accepts(self.shared.id(), features) && self.shared.state().offer.is_some()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state();
        let config = state.offer.as_ref().map_or(&[][..], |offer| &offer.config);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).map_or(usize::MAX, |o| o.saturating_add(i));
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let mut state = self.shared.state();
        let Some(offer) = &mut state.offer else {
            return;
        };
        let kind = &self.shared.kind;
        if kind.config_writable(offset, data.len(), offer) {
            offer.config[offset..offset + data.len()].copy_from_slice(data);
            state.config_writes.push(offset, data.to_vec());
            drop(state);
            self.shared.wake();
        }
    }

    fn attach(&mut self, notify: Arc<dyn TransportNotify>) {
        self.shared.state().notify = Some(notify);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |reason| ActivateError {
            device: self.shared.id().to_owned(),
            reason,
        };
        let served = self.shared.state().offer.as_ref().map(|o| o.queues);
        let served = served.unwrap_or(0);
        if let Some(queue) = activation.queues.iter().find(|queue| queue.index >= served) {
            let index = queue.index;
            return Err(failed(format!(
                "queue {index}: the backend serves {served}"
            )));
        }
        let reach = &self.shared.reach;
        let started = reach.start(&self.shared, activation).map_err(failed)?;
        let (rings, workers) = started;
        self.workers = workers;
        self.shared.state().wanted = Some(Arc::new(rings));
        self.shared.wake();
        Ok(())
    }

    fn set_call(&mut self, queue: u16, call: EventFd) {
        if let Some(workers) = &self.workers {
            workers.set_call(queue, call);
            return;
        }
        let mut state = self.shared.state();
        let rings = state.wanted.as_ref().map(|rings| &rings.rings);
        if let Some(ring) = rings.and_then(|rings| rings.iter().find(|ring| ring.index == queue)) {
            *ring.call() = call;
            state.new_calls.insert(queue);
            drop(state);
            self.shared.wake();
        }
    }

    fn reset(&mut self) {
        if let Some(workers) = &self.workers {
            workers.stop();
        }
        let mut state = self.shared.state();
        if state.wanted.take().is_some() {
            drop(state);
            self.shared.wake();
        }
    }

    fn reset_progress(&mut self) -> ResetProgress {
        self.workers.take_if(|workers| workers.have_ended());
        match self.workers.is_some() || self.shared.state().held {
            true => ResetProgress::Pending,
            false => ResetProgress::Done,
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shared.state().quit = true;
        self.shared.wake();
    }
}
