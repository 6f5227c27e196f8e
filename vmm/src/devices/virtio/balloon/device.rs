//! The device side of the transport's calls: commands for the thread.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vmm_sys_util::eventfd::EventFd;

use super::rings::Lent;
use super::shared::{Handle, Polling, Shared};
use super::worker::{self, Command, Start};
use super::{F_DEFLATE_ON_OOM, F_PAGE_POISON, F_REPORTING, F_STATS_VQ};
use crate::config::BalloonConfig;
use crate::devices::virtio::device::{
    ActivateError, Activation, ResetProgress, TransportNotify, VirtioDevice,
};
use crate::memory::GuestRam;
use crate::sandbox::{self, ThreadKind};

/// Descriptors of each queue: inflateq, deflateq, statsq, the one of hints, which nobody uses, and reporting_vq.
const QUEUE_SIZES: [u16; 5] = [128; 5];
/// Queues without free page reporting.
const PLAIN_QUEUES: usize = 3;

/// Why there is no balloon.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the balloon's thread")]
pub struct Error(#[from] io::Error);

/// A virtio balloon.
pub struct Balloon {
    name: String,
    features: u64,
    shared: Arc<Shared>,
    /// Taken when the device goes, which ends the thread.
    commands: Option<Sender<Command>>,
    thread: JoinHandle<()>,
}

impl Balloon {
    /// A balloon for memory of this guest, and its thread.
    pub fn new(name: &str, config: &BalloonConfig, ram: &GuestRam) -> Result<Self, Error> {
        let lent = Lent {
            granule: ram.page_bytes(),
            ram: ram.clone(),
        };
        Self::polling(name, config, lent, Polling::default())
    }

    pub(super) fn polling(
        name: &str,
        config: &BalloonConfig,
        lent: Lent,
        polling: Polling,
    ) -> Result<Self, Error> {
        let shared = Arc::new(Shared::new(config.size_bytes, polling)?);
        let (sender, commands) = channel();
        let serves = worker::Worker {
            name: name.to_owned(),
            lent,
            shared: Arc::clone(&shared),
            commands,
        };
        let thread = sandbox::spawn(ThreadKind::Balloon, "balloon", move || serves.run())?;
        let features = [
            (true, 1 << VIRTIO_F_VERSION_1 | F_STATS_VQ | F_PAGE_POISON),
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (config.free_page_reporting, F_REPORTING),
        ];
        let features = features.into_iter().filter(|(has, _)| *has);
        Ok(Self {
            name: name.to_owned(),
            features: features.fold(0, |all, (_, bits)| all | bits),
            shared,
            commands: Some(sender),
            thread,
        })
    }

    /// The VM's side of it.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    fn start(&self, activation: Activation) -> Result<(), String> {
        let calls = activation.queues.iter().map(|queue| {
            let call = queue.call.try_clone();
            let call = call.map_err(|error| format!("cannot duplicate an eventfd: {error}"))?;
            Ok((queue.index, call))
        });
        let calls = calls.collect::<Result<_, String>>()?;
        {
            let mut inner = self.shared.lock();
            inner.calls = calls;
            inner.running = true;
        }
        if self.send(Command::Start(Box::new(Start(activation)))) {
            return Ok(());
        }
        self.shared.lock().running = false;
        Err("its thread has ended".to_owned())
    }

    /// Whether the thread is there to take the command.
    fn send(&self, command: Command) -> bool {
        let sent = self.commands.as_ref().map(|to| to.send(command));
        self.shared.wake();
        matches!(sent, Some(Ok(())))
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        match self.features & F_REPORTING {
            0 => &QUEUE_SIZES[..PLAIN_QUEUES],
            _ => &QUEUE_SIZES,
        }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.shared.lock().state.config();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).map_or(usize::MAX, |at| at.saturating_add(i));
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.shared.lock().state.set_config(offset, data);
    }

    fn attach(&mut self, notify: Arc<dyn TransportNotify>) {
        self.shared.lock().notify = Some(notify);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(activation).map_err(|reason| ActivateError {
            device: self.name.clone(),
            reason,
        })
    }

    fn set_call(&mut self, queue: u16, call: EventFd) {
        self.shared.lock().calls.insert(queue, call);
    }

    fn reset(&mut self) {
        let running = self.shared.lock().running;
        if running {
            self.send(Command::Stop);
        }
    }

    fn reset_progress(&mut self) -> ResetProgress {
        let mut inner = self.shared.lock();
        if inner.running && !self.thread.is_finished() {
            return ResetProgress::Pending;
        }
        inner.running = false;
        inner.reset();
        ResetProgress::Done
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        drop(self.commands.take());
        self.shared.wake();
    }
}
