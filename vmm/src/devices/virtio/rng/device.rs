//! The device side of the transport's calls: it starts and stops the worker.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::worker::{Shared, Worker};
use crate::devices::virtio::device::{
    ActivateError, Activation, ResetProgress, TransportNotify, VirtioDevice,
};
use crate::sandbox::{self, ThreadKind};

/// Descriptors of the queue.
const QUEUE_SIZES: [u16; 1] = [256];

/// Why there is no entropy device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source cannot be opened.
    #[error("cannot open {path} as a source of entropy")]
    Open {
        /// The source.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The source is a directory.
    #[error("{path} is a directory, not a source of entropy")]
    Directory {
        /// The source.
        path: PathBuf,
    },
}

/// A virtio entropy device.
pub struct Rng {
    name: String,
    source: File,
    notify: Option<Arc<dyn TransportNotify>>,
    running: Option<Running>,
}

struct Running {
    thread: JoinHandle<()>,
    shared: Arc<Shared>,
}

impl Rng {
    /// An entropy device over a file, a character device or a FIFO.
    pub fn new(name: &str, path: &Path) -> Result<Self, Error> {
        let open = |source| Error::Open {
            path: path.to_owned(),
            source,
        };
        let source = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(open)?;
        if source.metadata().map_err(open)?.is_dir() {
            return Err(Error::Directory {
                path: path.to_owned(),
            });
        }
        Ok(Self {
            name: name.to_owned(),
            source,
            notify: None,
            running: None,
        })
    }

    fn start(&mut self, activation: Activation) -> Result<(), String> {
        let notify = self.notify.clone().ok_or("not attached to a transport")?;
        let mut queues = activation.queues;
        let Some(queue) = queues.pop() else {
            return Ok(());
        };
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|error| format!("cannot make an eventfd: {error}"))?;
        let source = self
            .source
            .try_clone()
            .map_err(|error| format!("cannot duplicate the source: {error}"))?;
        let (queue, shared) = Shared::split(queue, stop);
        let shared = Arc::new(shared);
        let worker = Worker::new(
            &self.name,
            &queue,
            activation.memory,
            source,
            Arc::clone(&shared),
        )?;
        let thread = sandbox::spawn(ThreadKind::Rng, "rng", move || worker.run(&*notify))
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        self.running = Some(Running { thread, shared });
        Ok(())
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn attach(&mut self, notify: Arc<dyn TransportNotify>) {
        self.notify = Some(notify);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(activation).map_err(|reason| ActivateError {
            device: self.name.clone(),
            reason,
        })
    }

    fn set_call(&mut self, _queue: u16, call: EventFd) {
        if let Some(running) = &self.running {
            running.shared.set_call(call);
        }
    }

    fn reset(&mut self) {
        if let Some(running) = &self.running {
            running.shared.stop();
        }
    }

    fn reset_progress(&mut self) -> ResetProgress {
        match self.running.take_if(|running| running.thread.is_finished()) {
            Some(running) => {
                if running.thread.join().is_err() {
                    tracing::error!(device = %self.name, "the worker panicked");
                }
                ResetProgress::Done
            }
            None if self.running.is_some() => ResetProgress::Pending,
            None => ResetProgress::Done,
        }
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}
