//! The device as the crate wants it: features, configuration space, and what to do at a kick.

use std::fs::File;
use std::io;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::request;

/// VHOST_USER_F_PROTOCOL_FEATURES.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// What the configuration space has, up to `capacity`; the rest reads as zeroes.
const CONFIG_LEN: usize = 60;

/// A disk of one queue.
pub(crate) struct Disk {
    image: File,
    sectors: u64,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
}

impl Disk {
    /// As large as its image.
    pub(crate) fn new(image: File) -> io::Result<Self> {
        Ok(Self {
            sectors: image.metadata()?.len() / request::SECTOR,
            image,
            memory: None,
        })
    }
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH | F_PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; CONFIG_LEN];
        config[..8].copy_from_slice(&self.sectors.to_le_bytes());
        let wanted = config.iter().skip(offset as usize).copied();
        wanted
            .chain(std::iter::repeat(0))
            .take(size as usize)
            .collect()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(
        &mut self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread_id: usize,
    ) -> io::Result<()> {
        let (Some(memory), Some(vring)) = (&self.memory, vrings.get(usize::from(device_event)))
        else {
            return Err(io::Error::other("a kick before memory and rings"));
        };
        let memory = memory.memory();
        loop {
            // Not held while the request is served.
            let next = vring
                .get_mut()
                .get_queue_mut()
                .pop_descriptor_chain(memory.clone());
            let Some(chain) = next else { return Ok(()) };
            let head = chain.head_index();
            let written = request::serve(&self.image, self.sectors, &memory, chain)?;
            vring.add_used(head, written).map_err(io::Error::other)?;
            vring.signal_used_queue()?;
        }
    }
}
