//! A disk behind a vhost-user daemon, driven by the `virtio-driver` crate (libblkio's driver).
#![allow(unsafe_code, reason = "the crate takes buffers by address")]

use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;

use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use super::{Direction, Load, Request, Target, Wait};
use crate::sys::{self, SharedMemory};

/// The driver's descriptors per request: header, data, status.
const DESCRIPTORS: usize = 3;
/// QEMU's default for a disk.
const SMALLEST_RING: usize = 128;

/// A connection with one queue in use.
pub struct VirtioTarget {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    load: Load,
    capacity: u64,
    /// Keeps the rings and the session; dropped after the queue.
    _transport: Box<VirtioBlkTransport>,
    memory: SharedMemory,
}

impl VirtioTarget {
    /// Connects and starts a ring with room for `load`.
    pub fn connect(socket: &Path, load: &Load, memory: SharedMemory) -> Result<VirtioTarget> {
        let mut session = Session::connect(socket, 1, ring_size(load.depth)?)?;
        session.map(&memory)?;
        let mut queue = session
            .queues
            .pop()
            .ok_or_else(|| Error::other("the driver made no queue"))?;
        queue.set_used_notif_enabled(load.wait == Wait::Sleep);
        let completed = session.transport.get_completion_fd(0);
        // Some daemons make it non-blocking, for us too.
        sys::set_blocking(completed.as_fd())?;
        Ok(VirtioTarget {
            queue,
            notifier: session.transport.get_submission_notifier(0),
            completed,
            load: *load,
            capacity: u64::from(session.transport.get_config()?.capacity) * 512,
            _transport: session.transport,
            memory,
        })
    }

    /// Size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }
}

fn ring_size(depth: usize) -> Result<u16> {
    let size = (depth * DESCRIPTORS).next_power_of_two().max(SMALLEST_RING);
    u16::try_from(size).map_err(Error::other)
}

/// A connection with its queues set up.
pub struct Session {
    /// Its queues.
    pub queues: Vec<VirtioBlkQueue<'static, usize>>,
    /// What keeps them.
    pub transport: Box<VirtioBlkTransport>,
}

impl Session {
    /// Connects and starts `queues` rings of `size` entries.
    pub fn connect(socket: &Path, queues: usize, size: u16) -> Result<Session> {
        let path = socket
            .to_str()
            .ok_or_else(|| Error::other("a socket path that is not UTF-8"))?;
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::MQ.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits();
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, features)?);
        let queues = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, size)?;
        Ok(Session { queues, transport })
    }

    /// Gives the daemon `memory`.
    pub fn map(&mut self, memory: &SharedMemory) -> Result<()> {
        let start = memory.at(0) as usize;
        self.transport
            .map_mem_region(start, memory.size(), memory.fd().as_raw_fd(), 0)
            .map(drop)
    }
}

impl Target for VirtioTarget {
    fn queue(&mut self, request: Request) -> Result<()> {
        let Request { slot, offset } = request;
        let len = self.load.block;
        let buffer = self.memory.at(slot * len);
        // SAFETY: the buffer is this slot's own, mapped until `memory` is dropped, and nothing but
        // the daemon touches it until the slot is reaped.
        unsafe {
            match self.load.direction {
                Direction::Read => self.queue.read_raw(offset, buffer, len, slot),
                Direction::Write => self.queue.write_raw(offset, buffer, len, slot),
            }
        }
    }

    fn kick(&mut self) -> Result<()> {
        if self.queue.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> Result<()> {
        let mut looks = 0u32;
        loop {
            for completion in self.queue.completions() {
                if completion.ret != 0 {
                    return Err(Error::from_raw_os_error(-completion.ret));
                }
                done.push(completion.context);
            }
            if !done.is_empty() {
                return Ok(());
            }
            match self.load.wait {
                Wait::Sleep => drop(self.completed.read().map_err(super::unanswered)?),
                Wait::Poll => looks = super::look_again(looks)?,
            }
        }
    }
}

/// A read on each queue, one after the other.
pub fn touch(session: &mut Session, memory: &SharedMemory) -> Result<()> {
    for (index, queue) in session.queues.iter_mut().enumerate() {
        let completed = session.transport.get_completion_fd(index);
        sys::set_blocking(completed.as_fd())?;
        queue.set_used_notif_enabled(true);
        // SAFETY: the buffer is mapped while `memory` lives, and only the daemon touches it.
        unsafe { queue.read_raw(0, memory.at(0), 4096, index)? };
        session.transport.get_submission_notifier(index).notify()?;
        let completion = loop {
            if let Some(completion) = queue.completions().next() {
                break completion;
            }
            completed.read()?;
        };
        if completion.ret != 0 {
            return Err(Error::from_raw_os_error(-completion.ret));
        }
    }
    Ok(())
}
