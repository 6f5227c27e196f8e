//! The driver's side of a split ring (virtio 1.3, 2.7), for tests that drive a device without a guest.
//!
//! One chain is in the ring at a time, always at the first descriptors.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use berth_vmm::devices::virtio::device::QueueSetup;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A piece of a chain.
#[derive(Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) gpa: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// An empty ring takes 32 KiB from its base.
pub(crate) struct Ring {
    pub(crate) memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    avail: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    const AVAIL: u64 = 0x4000;
    const USED: u64 = 0x6000;
    /// Bytes of the ring.
    pub(crate) const LEN: u64 = 0x8000;

    pub(crate) fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        let zeros = vec![0; Self::LEN as usize];
        memory.write_slice(&zeros, GuestAddress(base)).unwrap();
        Self {
            memory: memory.clone(),
            base,
            size,
            avail: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// What the transport would hand over for it.
    pub(crate) fn setup(&self, index: u16) -> QueueSetup {
        QueueSetup {
            index,
            size: self.size,
            desc: self.base,
            avail: self.base + Self::AVAIL,
            used: self.base + Self::USED,
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
        }
    }

    /// Makes a chain available and rings the doorbell.
    pub(crate) fn submit(&mut self, chain: &[Buffer]) {
        let at = |offset: u64| GuestAddress(self.base + offset);
        for (i, buffer) in chain.iter().enumerate() {
            let next = i + 1 < chain.len();
            let flags = u16::from(next) | u16::from(buffer.writable) << 1;
            let mut desc = [0; 16];
            desc[..8].copy_from_slice(&buffer.gpa.to_le_bytes());
            desc[8..12].copy_from_slice(&buffer.len.to_le_bytes());
            desc[12..14].copy_from_slice(&flags.to_le_bytes());
            desc[14..].copy_from_slice(&(i as u16 + 1).to_le_bytes());
            let slot = at(16 * i as u64);
            self.memory.write_slice(&desc, slot).unwrap();
        }
        let slot = u64::from(self.avail % self.size);
        let entry = at(Self::AVAIL + 4 + 2 * slot);
        self.memory.write_obj(0_u16, entry).unwrap();
        self.avail = self.avail.wrapping_add(1);
        // Release: the device that sees the index sees the descriptors too.
        let index = at(Self::AVAIL + 2);
        self.memory
            .store(self.avail, index, Ordering::Release)
            .unwrap();
        self.kick.write(1).unwrap();
    }

    /// Waits until the chain came back; returns how much was written.
    pub(crate) fn complete(&mut self) -> u32 {
        let index = GuestAddress(self.base + Self::USED + 2);
        loop {
            let used: u16 = self.memory.load(index, Ordering::Acquire).unwrap();
            if used != self.used {
                break;
            }
            wait(&self.call, "an interrupt");
        }
        let slot = u64::from(self.used % self.size);
        let entry = GuestAddress(self.base + Self::USED + 4 + 8 * slot);
        let [id, len]: [u32; 2] = self.memory.read_obj(entry).unwrap();
        assert_eq!(id, 0);
        self.used = self.used.wrapping_add(1);
        assert_eq!(self.used, self.avail);
        len
    }
}

/// Waits for an event; a test that waits long has failed.
pub(crate) fn wait(event: &EventFd, what: &str) {
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
        .unwrap();
    let ready = epoll.wait(20_000, &mut [EpollEvent::default()]).unwrap();
    assert_eq!(ready, 1, "no {what} in 20 s");
    event.read().unwrap();
}
