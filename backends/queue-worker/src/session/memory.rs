//! What the frontend shares with us: guest memory, the dirty log, the in-flight region.
//!
//! Each comes as a file to be mapped. Running rings hear of new memory and of the log at once and
//! the request is answered when they have taken it; the in-flight region is for rings that start
//! later. Spec: vhost-user, "Memory access", "Migration", "Inflight I/O tracking".

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Answer, Handled, Refusal, Session, number};
use crate::device::Device;
use crate::guest_memory::{GuestMemory, Region, RegionInfo};
use crate::inflight::{self, InflightError, InflightRegion};
use crate::log::{DirtyLog, LogError};
use crate::protocol::message::{self, FrontendReq, InflightInfo, LogArea, Request};
use crate::vring::Vring;

/// Most memory regions of a session.
pub(super) const MAX_MEM_SLOTS: u64 = 509;

impl<D: Device> Session<D> {
    /// Has all running rings log as the frontend wants it now; returns when they do.
    pub(super) fn update_logs(&self) -> Answer {
        let asked: Vec<_> = self
            .vrings
            .iter()
            .map(|vring| (vring, vring.update_log(&self.log)))
            .collect();
        for (vring, done) in asked {
            if let Some(done) = done {
                vring.wait_for(&done);
            }
        }
        Answer::Done
    }

    pub(super) fn set_log_base(&mut self, area: LogArea, fds: &[OwnedFd]) -> Handled {
        // The codec has checked that the fd is there.
        let fd = fds.first().ok_or(Refusal::Unsupported)?;
        let log = DirtyLog::map(area, fd)?;
        let end = self.memory.end();
        if end > log.end() {
            return Err(Refusal::Log(LogError::Beyond {
                gpa: 0,
                len: end,
                end: log.end(),
            }));
        }
        self.log.log = Some(Arc::new(log));
        self.update_logs();
        Ok(number(FrontendReq::SET_LOG_BASE, 0))
    }

    /// A new region, for the frontend to keep. Each queue gets room for the largest ring that the
    /// device takes: a driver may choose one larger than the frontend expects.
    pub(super) fn get_inflight(&self, asked: InflightInfo) -> Handled {
        let most = self.device.num_queues();
        if !(1..=most).contains(&asked.num_queues) || asked.queue_size == 0 {
            return Err(InflightError::BadShape {
                queues: asked.num_queues,
                size: asked.queue_size,
                bytes: asked.map_size,
            }
            .into());
        }
        let entries = asked.queue_size.max(self.device.max_queue_size());
        let (file, mut info) = inflight::allocate(asked.num_queues, entries)?;
        info.queue_size = asked.queue_size;
        Ok(Answer::ReplyWithFd(message::reply_inflight(&info), file))
    }

    /// The region that rings use which start from now on.
    pub(super) fn set_inflight(&mut self, info: InflightInfo, fds: &[OwnedFd]) -> Handled {
        let running = self.vrings.iter().position(Vring::is_running);
        if let Some(index) = running {
            return Err(Refusal::Running(index as u32));
        }
        // The codec has checked that the fd is there.
        let fd = fds.first().ok_or(Refusal::Unsupported)?;
        self.inflight = Some(Arc::new(InflightRegion::map(info, fd)?));
        Ok(Answer::Done)
    }

    pub(super) fn change_memory(&mut self, request: &Request, fds: &[OwnedFd]) -> Handled {
        let (memory, removed) = match request {
            Request::SetMemTable(regions) => (map_table(regions, fds)?, true),
            Request::AddMemReg(info) => {
                if self.memory.len() as u64 >= MAX_MEM_SLOTS {
                    return Err(Refusal::TooManyRegions);
                }
                (map_more(&self.memory, *info, fds)?, false)
            }
            Request::RemMemReg(info) => (self.memory.without(*info)?, true),
            _ => return Err(Refusal::Unsupported),
        };
        self.memory = Arc::new(memory);
        // Ask all, then wait for all: the queues drain side by side.
        let asked: Vec<_> = self
            .vrings
            .iter()
            .map(|vring| (vring, vring.update_memory(&self.memory, removed)))
            .collect();
        for (vring, done) in asked {
            if let Some(done) = done {
                vring.wait_for(&done);
            }
        }
        self.start_all_ready()?;
        Ok(Answer::Done)
    }
}

fn map_more(
    memory: &GuestMemory,
    info: RegionInfo,
    fds: &[OwnedFd],
) -> Result<GuestMemory, Refusal> {
    // The codec has checked that the fd is there.
    let fd = fds.first().ok_or(Refusal::Unsupported)?;
    Ok(memory.with(Region::map(info, fd)?)?)
}

fn map_table(regions: &[RegionInfo], fds: &[OwnedFd]) -> Result<GuestMemory, Refusal> {
    let mut memory = GuestMemory::default();
    for (info, fd) in regions.iter().zip(fds) {
        memory = memory.with(Region::map(*info, fd)?)?;
    }
    Ok(memory)
}
