//! A disk of the vhost-user frontend's, a transport for it, and guest memory for drivers to have rings in.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_vmm::config::{DiskConfig, Dma, Link, VhostUserConfig};
use berth_vmm::devices::virtio::device::{
    Activation, ResetProgress, TransportNotify, VirtioDevice,
};
use berth_vmm::memory::GuestRam;
use berth_vmm::vhost_user::{Frontends, Kind, SessionState};
use vmm_sys_util::tempdir::TempDir;

use crate::stock::Driver;

/// Longer than any wait of these tests takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A disk with two queues whose backend is not there yet.
pub(crate) struct Bench {
    _dir: TempDir,
    pub(crate) path: PathBuf,
    pub(crate) ram: GuestRam,
    pub(crate) frontends: Frontends,
    pub(crate) device: Box<dyn VirtioDevice>,
}

/// The disk whose backend is to listen at `path`.
pub(crate) fn disk(path: &Path) -> Kind {
    Kind::Blk(DiskConfig {
        id: "_disk0".to_owned(),
        backend: VhostUserConfig {
            link: Link::Connect(path.to_owned()),
            num_queues: 2,
            queue_size: 128,
            dma: Dma::Auto,
        },
        readonly: false,
    })
}

impl Bench {
    pub(crate) fn new(
        ram: GuestRam,
        mut frontends: Frontends,
        transport: Arc<dyn TransportNotify>,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("disk.sock");
        let mut device = frontends.connect(disk(&path)).unwrap();
        device.attach(transport);
        Self {
            _dir: dir,
            path,
            ram,
            frontends,
            device,
        }
    }

    pub(crate) fn activate(&mut self, drivers: &[&Driver]) {
        let features = self.device.features();
        assert!(self.device.accepts(features));
        let queues = drivers.iter().zip(0..).map(|(driver, i)| driver.setup(i));
        self.device
            .activate(Activation {
                features,
                queues: queues.collect(),
                memory: self.ram.memory().clone(),
            })
            .unwrap();
    }

    pub(crate) fn driver(&self, base: u64) -> Driver {
        Driver::new(self.ram.memory(), base, 128)
    }

    pub(crate) fn reset(&mut self) {
        self.device.reset();
        let begin = Instant::now();
        while self.device.reset_progress() == ResetProgress::Pending {
            assert!(begin.elapsed() < PATIENCE, "the reset never ends");
            std::thread::yield_now();
        }
    }

    pub(crate) fn wait_for(&self, state: SessionState) {
        let begin = Instant::now();
        while self.frontends.sessions()[0].state != state {
            assert!(begin.elapsed() < PATIENCE, "never {state:?}");
            std::thread::yield_now();
        }
    }
}
