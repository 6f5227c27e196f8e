//! One frontend's session: the control thread's state, and what each request does to it.
//!
//! ```text
//!   Connection ──Message──▶ Session::handle ──▶ features, memory, vrings ──Command──▶ workers
//!              ◀── reply, or acknowledgement where the frontend asked for one ──┘
//!
//!   vring:  set up (num, addr, base, kick) ──first enable──▶ running ⇄ disabled
//!              ▲──────────── GET_VRING_BASE, RESET_* ───────────┘
//! ```
//!
//! The order of requests is the frontend's choice as far as the specification lets it: a ring
//! starts at the first request after which it has everything it needs and is enabled. Without
//! VHOST_USER_F_PROTOCOL_FEATURES rings are enabled from the start.
//!
//! A request that makes no sense is refused: with a non-zero acknowledgement where the frontend
//! asked for one, otherwise by ending the session with one line. Threads: control thread only.
//! Spec: vhost-user, "Communication", "Ring states", "Front-end message types".
#![forbid(unsafe_code)]

mod error;
mod handle;
mod memory;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::debug;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Device, protocol};
use crate::features;
use crate::guest_memory::GuestMemory;
use crate::inflight::InflightRegion;
use crate::log::SessionLog;
use crate::metrics::Metrics;
use crate::protocol::connection::{Connection, Message, send_with_fds};
use crate::protocol::message::{self, BackendReq, FrontendReq, Request};
use crate::vring::{Surroundings, Vring};

pub use error::{Refusal, SessionError};
pub use handle::SessionHandle;
use memory::MAX_MEM_SLOTS;

/// VHOST_USER_PROTOCOL_F_* bits that every device offers.
mod offered {
    pub(super) const MQ: u64 = 1 << 0;
    pub(super) const LOG_SHMFD: u64 = 1 << 1;
    pub(super) const REPLY_ACK: u64 = 1 << 3;
    pub(super) const BACKEND_REQ: u64 = 1 << 5;
    pub(super) const CONFIG: u64 = 1 << 9;
    pub(super) const BACKEND_SEND_FD: u64 = 1 << 10;
    pub(super) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(super) const RESET_DEVICE: u64 = 1 << 13;
    pub(super) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(super) const ALL: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | BACKEND_SEND_FD
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS;
}

/// Longest time that a queue looks for work before it sleeps, where nobody said otherwise: what
/// covers a medium or a driver that answers within some 50 µs. Longer gained nothing more.
pub const DEFAULT_POLL_LIMIT: Duration = Duration::from_micros(50);

/// What goes back to the frontend.
enum Answer {
    /// Success; said only where the frontend asked.
    Done,
    /// A reply that the request always has.
    Reply(Vec<u8>),
    /// The same, with a file.
    ReplyWithFd(Vec<u8>, OwnedFd),
}

type Handled = Result<Answer, Refusal>;

/// How a session is run.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Longest time that a queue looks for work before it sleeps; 0: not at all.
    pub poll_limit: Duration,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions {
            poll_limit: DEFAULT_POLL_LIMIT,
        }
    }
}

/// One frontend's session.
pub struct Session<D: Device> {
    device: Arc<D>,
    connection: Connection,
    acked_features: u64,
    acked_protocol: u64,
    memory: Arc<GuestMemory>,
    /// What SET_INFLIGHT_FD gave us, for the rings that start from now on.
    inflight: Option<Arc<InflightRegion>>,
    log: SessionLog,
    vrings: Vec<Vring>,
    backend_channel: Option<OwnedFd>,
    config_changed: Arc<EventFd>,
    has_channel: Arc<AtomicBool>,
    memory_lost: Arc<EventFd>,
}

impl<D: Device> Session<D> {
    /// Begins a session on a connected socket; `metrics` has counters for every queue.
    pub fn new(
        device: Arc<D>,
        metrics: &Metrics,
        stream: UnixStream,
        options: SessionOptions,
    ) -> io::Result<Session<D>> {
        let connection = Connection::new(stream)?;
        let config_changed = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let has_channel = Arc::new(AtomicBool::new(false));
        device.session_started(SessionHandle {
            config_changed: Arc::clone(&config_changed),
            has_channel: Arc::clone(&has_channel),
        });
        let memory_lost = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let vring = |index| {
            let counters = metrics.queue(index).cloned().unwrap_or_default();
            Vring::new(
                index,
                counters,
                Arc::clone(&memory_lost),
                options.poll_limit,
            )
        };
        let vrings = (0..device.num_queues()).map(vring).collect();
        Ok(Session {
            device,
            connection,
            acked_features: 0,
            acked_protocol: 0,
            memory: Arc::default(),
            inflight: None,
            log: SessionLog::default(),
            vrings,
            backend_channel: None,
            config_changed,
            has_channel,
            memory_lost,
        })
    }

    /// The device that is served.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// To be polled for input: then call [`receive`](Session::receive).
    pub fn connection_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// To be polled for input: then call [`notify_frontend`](Session::notify_frontend).
    pub fn notify_fd(&self) -> &EventFd {
        &self.config_changed
    }

    /// To be polled for input, which is the end: [`SessionError::MemoryLost`].
    pub fn memory_lost_fd(&self) -> &EventFd {
        &self.memory_lost
    }

    /// Handles every request that has come completely. An error ends the session.
    pub fn receive(&mut self) -> Result<(), SessionError> {
        while let Some(message) = self.connection.receive()? {
            self.handle(message)?;
        }
        Ok(())
    }

    /// Sends CONFIG_CHANGE_MSG if a device asked for it and the frontend gave a channel.
    pub fn notify_frontend(&mut self) {
        let _ = self.config_changed.read();
        let Some(channel) = &self.backend_channel else {
            return;
        };
        let bytes = message::backend_request(BackendReq::CONFIG_CHANGE_MSG);
        if let Err(error) = send_with_fds(channel.as_fd(), &bytes, &[]) {
            debug!(%error, "cannot tell the frontend that the configuration changed");
            self.set_backend_channel(None);
        }
    }

    fn set_backend_channel(&mut self, channel: Option<OwnedFd>) {
        // The flags of this end of the channel are ours: a frontend that does not read must not
        // block us.
        let channel = channel.filter(|fd| set_nonblocking(fd).is_ok());
        self.has_channel.store(channel.is_some(), Ordering::Relaxed);
        self.backend_channel = channel;
    }

    fn handle(&mut self, message: Message) -> Result<(), SessionError> {
        let Message {
            header,
            request,
            fds,
        } = message;
        debug!(?request, need_reply = header.need_reply(), "request");
        let for_error = request.clone();
        match self.dispatch(request, fds) {
            Ok(Answer::Reply(bytes)) => self.connection.send(&bytes)?,
            Ok(Answer::ReplyWithFd(bytes, fd)) => {
                self.connection.send_with(&bytes, &[fd.as_fd()])?;
            }
            Ok(Answer::Done) if header.need_reply() => {
                self.connection
                    .send(&message::reply_u64(header.request, 0))?;
            }
            Ok(Answer::Done) => {}
            Err(refusal) => {
                let request = Box::new(for_error);
                self.refuse(&header, request, refusal)?;
            }
        }
        Ok(())
    }

    fn refuse(
        &mut self,
        header: &message::Header,
        request: Box<Request>,
        source: Refusal,
    ) -> Result<(), SessionError> {
        if let Request::GetConfig { offset, flags, .. } = *request {
            // The specification's way to say that a read failed.
            let bytes = message::reply_config(offset, flags, &[]);
            return Ok(self.connection.send(&bytes)?);
        }
        if header.need_reply() {
            debug!(error = %source, ?request, "request refused");
            let bytes = message::reply_u64(header.request, 1);
            return Ok(self.connection.send(&bytes)?);
        }
        Err(SessionError::Refused { request, source })
    }

    fn dispatch(&mut self, request: Request, fds: Vec<OwnedFd>) -> Handled {
        use Request as R;
        match request {
            R::GetFeatures => Ok(number(FrontendReq::GET_FEATURES, self.features())),
            R::SetFeatures(bits) => self.set_features(bits),
            R::SetOwner => Ok(Answer::Done),
            R::ResetOwner => self.stop_all(),
            R::ResetDevice => self.reset_device(),
            R::GetProtocolFeatures => {
                let bits = self.protocol_features();
                Ok(number(FrontendReq::GET_PROTOCOL_FEATURES, bits))
            }
            R::SetProtocolFeatures(bits) => self.set_protocol_features(bits),
            R::GetQueueNum => {
                let queues = u64::from(self.device.reported_queues());
                Ok(number(FrontendReq::GET_QUEUE_NUM, queues))
            }
            R::GetMaxMemSlots => Ok(number(FrontendReq::GET_MAX_MEM_SLOTS, MAX_MEM_SLOTS)),
            R::SetMemTable(_) | R::AddMemReg(_) | R::RemMemReg(_) => {
                self.change_memory(&request, &fds)
            }
            R::SetLogBase(area) => self.set_log_base(area, &fds),
            R::SetLogFd => {
                self.log.notify = fds.into_iter().next().map(Arc::new);
                Ok(self.update_logs())
            }
            R::GetConfig {
                offset,
                size,
                flags,
            } => Ok(self.get_config(offset, size, flags)),
            R::SetConfig { offset, data, .. } => {
                self.device.write_config(offset, &data)?;
                Ok(Answer::Done)
            }
            R::SetBackendReqFd => {
                self.set_backend_channel(fds.into_iter().next());
                Ok(Answer::Done)
            }
            R::SendRarp(mac) => {
                self.device.send_rarp(mac)?;
                Ok(Answer::Done)
            }
            R::NetSetMtu(mtu) => self.set_mtu(mtu),
            R::GetInflightFd(info) => self.get_inflight(info),
            R::SetInflightFd(info) => self.set_inflight(info, &fds),
            R::Unsupported(_) => Err(Refusal::Unsupported),
            other => self.dispatch_vring(other, fds),
        }
    }

    fn dispatch_vring(&mut self, request: Request, fds: Vec<OwnedFd>) -> Handled {
        use Request as R;
        let fd = fds.into_iter().next().map(Arc::new);
        let index = match request {
            R::SetVringNum { index, num } => {
                let max = self.device.max_queue_size();
                self.vring(index)?.set_num(num, max)?;
                index
            }
            R::SetVringAddr {
                index,
                addr,
                log_used,
            } => {
                let log = self.log.clone();
                self.vring(index)?.set_addr(addr, log_used, &log);
                index
            }
            R::SetVringBase { index, base } => {
                self.vring(index)?.set_base(base)?;
                index
            }
            R::GetVringBase { index } => {
                let base = self.vring(index)?.stop();
                return Ok(Answer::Reply(message::reply_vring_base(index, base)));
            }
            R::SetVringKick { index, .. } => {
                self.vring(index)?.set_kick(fd)?;
                index
            }
            R::SetVringCall { index, .. } => {
                self.vring(index)?.set_call(fd);
                index
            }
            R::SetVringErr { index, .. } => {
                self.vring(index)?.set_err(fd);
                index
            }
            R::SetVringEnable { index, enable } => {
                self.vring(index)?.set_enabled(enable);
                index
            }
            _ => return Err(Refusal::Unsupported),
        };
        self.start_if_ready(index)?;
        Ok(Answer::Done)
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, Refusal> {
        usize::try_from(index)
            .ok()
            .and_then(|at| self.vrings.get_mut(at))
            .ok_or(Refusal::NoQueue(index))
    }

    fn start_if_ready(&mut self, index: u32) -> Result<(), Refusal> {
        let device = Arc::clone(&self.device);
        let surroundings = Surroundings {
            memory: Arc::clone(&self.memory),
            inflight: self.inflight.clone(),
            log: self.log.clone(),
            features: self.acked_features,
        };
        self.vring(index)?.start_if_ready(&device, &surroundings)
    }

    fn start_all_ready(&mut self) -> Result<(), Refusal> {
        (0..self.vrings.len() as u32).try_for_each(|index| self.start_if_ready(index))
    }

    fn features(&self) -> u64 {
        self.device.features() | features::COMMON
    }

    fn set_features(&mut self, bits: u64) -> Handled {
        let unknown = bits & !self.features();
        if unknown != 0 {
            return Err(Refusal::NotOffered(unknown));
        }
        // The switch of the log is between the frontend and us: rings run on, and the device hears
        // of no change.
        let log_all = 1 << features::LOG_ALL;
        self.acked_features = bits & !log_all;
        self.device.features_acked(self.acked_features);
        self.log.data = bits & log_all != 0;
        Ok(self.update_logs())
    }

    fn protocol_features(&self) -> u64 {
        let own = protocol::RARP | protocol::NET_MTU | protocol::PINS_MEMORY;
        offered::ALL | self.device.protocol_features() & own
    }

    fn set_protocol_features(&mut self, bits: u64) -> Handled {
        let unknown = bits & !self.protocol_features();
        if unknown != 0 {
            return Err(Refusal::NotOffered(unknown));
        }
        self.acked_protocol = bits;
        Ok(Answer::Done)
    }

    fn set_mtu(&self, mtu: u64) -> Handled {
        let mtu = u16::try_from(mtu).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.device.set_mtu(mtu)?;
        Ok(Answer::Done)
    }

    /// Any offset and size: frontends ask for more, or less, than the device type has.
    fn get_config(&self, offset: u32, size: u32, flags: u32) -> Answer {
        let config = self.device.config();
        let mut data = vec![0; size as usize];
        if let Some(there) = config.get(offset as usize..) {
            let len = there.len().min(data.len());
            data[..len].copy_from_slice(&there[..len]);
        }
        Answer::Reply(message::reply_config(offset, flags, &data))
    }

    /// Stops and disables all rings.
    fn stop_all(&mut self) -> Handled {
        for vring in &mut self.vrings {
            vring.stop();
            vring.reset_enabled();
        }
        Ok(Answer::Done)
    }

    fn reset_device(&mut self) -> Handled {
        self.stop_all()?;
        self.acked_features = 0;
        // What the driver had in flight it has given up.
        self.inflight = None;
        self.log = SessionLog::default();
        for vring in &mut self.vrings {
            vring.reset();
        }
        self.device.reset();
        Ok(Answer::Done)
    }
}

impl<D: Device> Drop for Session<D> {
    fn drop(&mut self) {
        // Ends the workers, each after what it has in flight.
        self.vrings.clear();
        self.device.session_ended();
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    UnixStream::from(fd.try_clone()?).set_nonblocking(true)
}

fn number(request: FrontendReq, value: u64) -> Answer {
    Answer::Reply(message::reply_u64(request.into(), value))
}
