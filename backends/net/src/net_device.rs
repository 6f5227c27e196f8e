//! The network device as queue-worker sees it: ties state, features and queues together.

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Once};

use berth_queue_worker::device::protocol;
use berth_queue_worker::sandbox::syscalls::IO_URING;
use berth_queue_worker::{
    Device, Interest, QueueError, QueueStart, QueueWorker, Ready, Ring, SessionHandle, Source,
    Syscall,
};

use crate::ctrl_queue::CtrlQueue;
use crate::device::Role;
use crate::mac::Mac;
use crate::port::NetPort;
use crate::rx::RxQueue;
use crate::settings::Settings;
use crate::state::DeviceState;
use crate::tx::TxQueue;

/// A vhost-user network device on a port.
pub struct NetDevice {
    state: Arc<DeviceState>,
    max_queue_size: u16,
    link_watched: Once,
}

impl NetDevice {
    /// The device with these settings on `port`.
    #[must_use]
    pub fn new(settings: Settings, port: Arc<dyn NetPort>) -> Self {
        Self {
            state: Arc::new(DeviceState::new(settings, port)),
            max_queue_size: settings.max_queue_size,
            link_watched: Once::new(),
        }
    }

    fn watch_link(&self) {
        let state = Arc::downgrade(&self.state);
        let on_change = move |up| {
            if let Some(state) = state.upgrade() {
                state.set_link(up);
            }
        };
        if let Err(error) = self.state.port().watch_link(Box::new(on_change)) {
            tracing::warn!(%error, "cannot follow the tap's link; the guest is told that it is up");
        }
    }
}

impl Device for NetDevice {
    const NAME: &'static str = "net";

    type Worker = NetQueue;

    fn features(&self) -> u64 {
        self.state.identity().features(self.state.port().has_uso())
    }

    fn protocol_features(&self) -> u64 {
        protocol::RARP | protocol::NET_MTU
    }

    fn syscalls(&self) -> Vec<Syscall> {
        [&IO_URING[..], &self.state.port().syscalls()].concat()
    }

    fn metrics(&self) -> String {
        let Some(drops) = self.state.port().host_drops() else {
            return String::new();
        };
        format!(
            "# HELP berth_host_dropped_total Frames for the guest that found the tap's queue full.\n\
             # TYPE berth_host_dropped_total counter\n\
             berth_host_dropped_total{{device=\"net\"}} {drops}\n"
        )
    }

    fn num_queues(&self) -> u16 {
        self.state.identity().num_queues()
    }

    fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    fn config(&self) -> Vec<u8> {
        self.state.config().to_vec()
    }

    /// The one writable field is the address, whole: a frontend that shows the guest another one
    /// than ours tells us so.
    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        match <[u8; 6]>::try_from(data) {
            Ok(mac) if offset == 0 && !Mac(mac).is_multicast() => {
                self.state.set_initial_mac(Mac(mac));
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn features_acked(&self, features: u64) {
        self.state.set_features(features);
    }

    fn new_worker(&self, start: &QueueStart) -> io::Result<NetQueue> {
        let state = Arc::clone(&self.state);
        let pairs = state.identity().pairs;
        match Role::of(start.queue, start.features, pairs) {
            Some(Role::Receive(pair)) => {
                RxQueue::new(state, pair, start).map(|queue| NetQueue::Rx(Box::new(queue)))
            }
            Some(Role::Transmit(pair)) => {
                TxQueue::new(state, pair, start).map(|queue| NetQueue::Tx(Box::new(queue)))
            }
            Some(Role::Control) => Ok(NetQueue::Ctrl(Box::new(CtrlQueue::new(state, start)))),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "there is no such queue with the negotiated features",
            )),
        }
    }

    fn session_started(&self, handle: SessionHandle) {
        self.state.begin_session(handle);
        // Not before: the run loop wants to be the first to start a thread.
        self.link_watched.call_once(|| self.watch_link());
    }

    fn session_ended(&self) {
        self.state.end_session();
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.state.set_mtu(mtu)
    }

    fn send_rarp(&self, mac: [u8; 6]) -> io::Result<()> {
        self.state.announce(Mac(mac))
    }

    fn reset(&self) {
        self.state.set_features(0);
    }
}

/// One queue of the device.
pub enum NetQueue {
    /// Frames to the guest.
    Rx(Box<RxQueue>),
    /// Frames from the guest.
    Tx(Box<TxQueue>),
    /// Commands.
    Ctrl(Box<CtrlQueue>),
}

impl QueueWorker for NetQueue {
    fn sources(&self) -> Vec<Source> {
        match self {
            Self::Rx(queue) => queue.sources(),
            Self::Tx(queue) => queue.sources(),
            Self::Ctrl(queue) => queue.sources(),
        }
    }

    fn process(&mut self, ring: &mut Ring, ready: Ready) -> Result<Interest, QueueError> {
        match self {
            Self::Rx(queue) => queue.process(ring, ready),
            Self::Tx(queue) => queue.process(ring, ready),
            Self::Ctrl(queue) => queue.process(ring, ready),
        }
    }

    fn discards(&self) -> bool {
        matches!(self, Self::Tx(_))
    }

    fn discard(&mut self, ring: &mut Ring) -> Result<Interest, QueueError> {
        match self {
            Self::Tx(queue) => queue.discard(ring),
            Self::Rx(_) | Self::Ctrl(_) => Ok(Interest::sources(0)),
        }
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        match self {
            Self::Rx(queue) => queue.drain(ring),
            Self::Tx(queue) => queue.drain(ring),
            Self::Ctrl(queue) => queue.drain(ring),
        }
    }
}
