//! The driver's side of a device, as far as the tests of our own devices need it: rings written by hand, so that they may
//! also make no sense.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{QueueSetup, ResetProgress, TransportNotify, VirtioDevice};

/// Descriptors of a queue.
pub(crate) const SIZE: u16 = 8;
/// Bytes of a queue's rings.
const RINGS: u64 = 0x4000;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// How long a device may take for anything, on a machine that has other work.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// Waits for an event, and takes it.
pub(crate) fn wait(event: &EventFd) {
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
        .unwrap();
    let limit = LIMIT.as_millis() as i32;
    let events = epoll.wait(limit, &mut [EpollEvent::default()]);
    assert_eq!(events.unwrap(), 1);
    event.read().unwrap();
}

/// Resets a device, and waits until that is over.
pub(crate) fn stop(device: &mut dyn VirtioDevice) {
    device.reset();
    let begin = Instant::now();
    while device.reset_progress() == ResetProgress::Pending {
        assert!(begin.elapsed() < LIMIT);
        std::thread::yield_now();
    }
}

/// What a device tells its transport, as events.
pub(crate) struct FakeTransport {
    pub(crate) config_changed: EventFd,
    pub(crate) needs_reset: EventFd,
}

impl FakeTransport {
    pub(crate) fn new() -> Self {
        Self {
            config_changed: eventfd(),
            needs_reset: eventfd(),
        }
    }
}

impl TransportNotify for FakeTransport {
    fn config_changed(&self) {
        self.config_changed.write(1).unwrap();
    }

    fn needs_reset(&self) {
        self.needs_reset.write(1).unwrap();
    }
}

/// A queue with `SIZE` descriptors in guest memory.
pub(crate) struct FakeQueue {
    index: u16,
    base: u64,
    memory: GuestMemoryMmap,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// Heads that were made available.
    pub(crate) avail: u16,
}

impl FakeQueue {
    /// The queue of this number, its rings at `base`.
    pub(crate) fn new(index: u16, memory: &GuestMemoryMmap, base: u64) -> Self {
        Self {
            index,
            base,
            memory: memory.clone(),
            kick: eventfd(),
            call: eventfd(),
            avail: 0,
        }
    }

    /// What the transport would say of it.
    pub(crate) fn setup(&self) -> QueueSetup {
        QueueSetup {
            index: self.index,
            size: SIZE,
            desc: self.base + DESC,
            avail: self.base + AVAIL,
            used: self.base + USED,
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
        }
    }

    fn put<T: ByteValued>(&self, offset: u64, value: T) {
        let at = GuestAddress(self.base + offset);
        self.memory.write_obj(value, at).unwrap();
    }

    /// Writes a descriptor.
    pub(crate) fn desc(&self, index: u16, (address, len): (u64, u32), flags: u32, next: u16) {
        let at = DESC + 16 * u64::from(index);
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags as u16);
        self.put(at + 14, next);
    }

    /// Makes a chain available, and kicks.
    pub(crate) fn submit(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), head);
        self.avail += 1;
        self.announce(self.avail);
    }

    /// Says that so many heads were made available, true or not, and kicks.
    pub(crate) fn announce(&self, avail: u16) {
        self.put(AVAIL + 2, avail);
        self.kick.write(1).unwrap();
    }

    /// How many chains came back.
    pub(crate) fn used(&self) -> u16 {
        let at = GuestAddress(self.base + USED + 2);
        self.memory.read_obj(at).unwrap()
    }

    /// Id and length of the last one, where all came back.
    pub(crate) fn last_used(&self) -> (u32, u32) {
        let slot = u64::from((self.avail - 1) % SIZE);
        let at = GuestAddress(self.base + USED + 4 + 8 * slot);
        let [id, len]: [u32; 2] = self.memory.read_obj(at).unwrap();
        (id, len)
    }

    /// Rings of a driver that begins anew.
    pub(crate) fn clear(&mut self) {
        let zeros = [0; RINGS as usize];
        let at = GuestAddress(self.base);
        self.memory.write_slice(&zeros, at).unwrap();
        self.avail = 0;
    }
}
