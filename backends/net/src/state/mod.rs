//! What the driver has set, shared by the control queue, the control thread and the data path.
//!
//! ```text
//!   control queue ──▶ filter, own address, offloads, active pairs ──▶ receive queues, tap
//!   control thread ─▶ features, configuration space
//! ```
//!
//! Receive queues look at an atomic generation number once a batch and take the lock of the
//! filter only when it has moved; nothing else here is on the data path.
//!
//! Which pairs are attached to the port: those whose receive queue runs and that the driver uses.
//! A driver that negotiated MQ and the control queue uses one pair until it says otherwise;
//! without the control queue (QEMU keeps it to itself) running is enough. A receive queue that
//! continues an earlier one (its ring does not start at 0) was in use, even if this process
//! never saw the command: it may have taken over from one that died.
//!
//! Locks, never held together: `driver`, `pairs`, `filter`.

#![forbid(unsafe_code)]

mod saved;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use berth_queue_worker::{RateLimit, RateLimiter, SessionHandle};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};

use crate::ctrl::Command;
use crate::device::{
    CONFIG_LEN, ConfigSpace, GUEST_OFFLOADS, Identity, MIN_MTU, config_space, has,
};
use crate::filter::RxFilter;
use crate::header::{HDR_LEN, header_len};
use crate::mac::Mac;
use crate::port::NetPort;
use crate::port::batch::Batcher;
use crate::port::frame::FrameBuffer;
use crate::rarp;
use crate::settings::{EngineChoice, Settings};

/// State of the device. Every method may be called on any thread.
pub struct DeviceState {
    settings: Settings,
    limits: Limits,
    port: Arc<dyn NetPort>,
    driver: Mutex<Driver>,
    pairs: Mutex<Pairs>,
    filter: Mutex<Arc<RxFilter>>,
    filter_generation: AtomicU64,
    /// GUEST_OFFLOADS bits in force.
    offloads: AtomicU64,
    link_up: AtomicBool,
}

/// Rate limits in force.
pub struct Limits {
    /// Of all receive queues together.
    pub receive: Option<Arc<RateLimiter>>,
    /// Of all transmit queues together.
    pub transmit: Option<Arc<RateLimiter>>,
}

/// What is told by, or shown to, the control thread.
struct Driver {
    features: u64,
    /// The device's address before the driver changes it: `--mac`, or what the frontend chose.
    initial_mac: Option<Mac>,
    mac: Option<Mac>,
    /// The MTU that the frontend wants the guest to be told.
    mtu: Option<u16>,
    /// The guest is asked to announce itself, and has not yet said that it did.
    announce: bool,
    /// The guest goes on from an earlier session; it was asked once.
    resumed: bool,
    session: Option<SessionHandle>,
}

struct Pairs {
    /// The driver uses this many.
    active: u16,
    /// Receive queue of each pair runs.
    running: Vec<bool>,
}

impl DeviceState {
    /// State of a device whose driver has set nothing.
    #[must_use]
    pub fn new(settings: impl Into<Settings>, port: Arc<dyn NetPort>) -> Self {
        let settings = settings.into();
        let identity = settings.identity;
        let pairs = identity.pairs;
        let limiter = |limit: Option<RateLimit>| limit.as_ref().map(RateLimiter::new).map(Arc::new);
        Self {
            settings,
            limits: Limits {
                receive: limiter(settings.rate_limit_rx),
                transmit: limiter(settings.rate_limit_tx),
            },
            port,
            driver: Mutex::new(Driver {
                features: 0,
                initial_mac: identity.mac,
                mac: identity.mac,
                mtu: None,
                announce: false,
                resumed: false,
                session: None,
            }),
            pairs: Mutex::new(Pairs {
                active: pairs,
                running: vec![false; usize::from(pairs)],
            }),
            filter: Mutex::new(Arc::new(RxFilter::new(0, identity.mac))),
            filter_generation: AtomicU64::new(0),
            offloads: AtomicU64::new(0),
            link_up: AtomicBool::new(true),
        }
    }

    /// What the operator fixed.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.settings.identity
    }

    /// The rate limits.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What moves frames of the queues of `pair` many at a time, as `make` makes it, on the thread
    /// that will use it; none where that was not asked for, or does not work here: said once.
    #[must_use]
    pub fn batcher(
        &self,
        pair: u16,
        make: impl FnOnce(RawFd) -> io::Result<Batcher>,
    ) -> Option<Batcher> {
        static TOLD: Once = Once::new();
        if self.settings.engine == EngineChoice::Sync {
            return None;
        }
        let made = make(self.port.fd(pair));
        made.inspect_err(|error| {
            TOLD.call_once(|| {
                tracing::warn!(%error, "no io_uring for the tap here: one system call a frame");
            });
        })
        .ok()
    }

    /// Where frames come from and go to.
    #[must_use]
    pub fn port(&self) -> &Arc<dyn NetPort> {
        &self.port
    }

    /// The configuration space now. A frontend that cannot be told of changes is not shown a link
    /// that is down: its guest would never hear that it came up.
    #[must_use]
    pub fn config(&self) -> [u8; CONFIG_LEN] {
        let driver = lock(&self.driver);
        let hears = driver
            .session
            .as_ref()
            .is_some_and(SessionHandle::has_channel);
        let link_up = !hears || self.link_up.load(Ordering::Relaxed);
        let mut status = 0;
        if link_up {
            status |= VIRTIO_NET_S_LINK_UP as u16;
        }
        if driver.announce {
            status |= VIRTIO_NET_S_ANNOUNCE as u16;
        }
        let identity = self.identity();
        config_space(&ConfigSpace {
            mac: driver.mac,
            status,
            pairs: identity.pairs,
            mtu: driver.mtu.or(identity.mtu),
        })
    }

    /// A frontend connected.
    pub fn begin_session(&self, session: SessionHandle) {
        lock(&self.driver).session = Some(session);
    }

    /// The frontend went, and with it all that it and the driver set.
    pub fn end_session(&self) {
        {
            let mut driver = lock(&self.driver);
            driver.session = None;
            driver.initial_mac = self.settings.identity.mac;
            driver.mtu = None;
            driver.resumed = false;
        }
        self.set_features(0);
    }

    /// The link came up or went down; tells the frontend if that is news.
    pub fn set_link(&self, up: bool) {
        if self.link_up.swap(up, Ordering::Relaxed) != up {
            tracing::info!(up, "link changed");
            self.notify_config_changed();
        }
    }

    fn notify_config_changed(&self) {
        let session = lock(&self.driver).session.clone();
        if let Some(session) = session {
            session.config_changed();
        }
    }

    /// The driver accepted `features`. The same set again changes nothing: a frontend repeats it
    /// when it resumes a guest.
    pub fn set_features(&self, features: u64) {
        let known = std::mem::replace(&mut lock(&self.driver).features, features);
        if known != features {
            self.forget_driver();
        }
    }

    /// A new driver, or the same one after a reset: only features hold.
    pub fn forget_driver(&self) {
        let (features, mac) = {
            let mut driver = lock(&self.driver);
            driver.mac = driver.initial_mac;
            driver.announce = false;
            (driver.features, driver.mac)
        };
        self.update_filter(|filter| *filter = RxFilter::new(features, mac));
        if let Err(error) = self.port.set_header_len(header_len(features)) {
            tracing::warn!(%error, "cannot set the port's header length");
        }
        if let Err(error) = self.set_offloads(features & GUEST_OFFLOADS) {
            tracing::warn!(%error, "cannot set the port's offloads");
        }
        let by_control = has(features, VIRTIO_NET_F_CTRL_VQ) && has(features, VIRTIO_NET_F_MQ);
        self.change_pairs(|pairs, max| pairs.active = if by_control { 1 } else { max });
    }

    /// Applies a command of the control queue. Synchronous: what it changes is in force when it
    /// returns.
    ///
    /// # Errors
    /// The port refuses.
    pub fn apply(&self, command: Command) -> io::Result<()> {
        match command {
            Command::Promisc(on) => self.update_filter(|f| f.set_promisc(on)),
            Command::AllMulticast(on) => self.update_filter(|f| f.set_all_multicast(on)),
            Command::SetMacTable(table) => self.update_filter(|f| f.set_table(table)),
            Command::AddVlan(vid) => self.update_filter(|f| f.set_vlan(vid, true)),
            Command::DelVlan(vid) => self.update_filter(|f| f.set_vlan(vid, false)),
            Command::SetMac(mac) => {
                lock(&self.driver).mac = Some(mac);
                self.update_filter(|filter| filter.set_own(mac));
            }
            Command::SetPairs(active) => self.change_pairs(|pairs, _| pairs.active = active),
            Command::SetGuestOffloads(offloads) => self.set_offloads(offloads)?,
            Command::AnnounceAck => lock(&self.driver).announce = false,
        }
        Ok(())
    }

    /// The frontend shows the guest this address, for as long as its session lasts.
    pub fn set_initial_mac(&self, mac: Mac) {
        {
            let mut driver = lock(&self.driver);
            driver.initial_mac = Some(mac);
            driver.mac = Some(mac);
        }
        self.update_filter(|filter| filter.set_own(mac));
    }

    /// The frontend wants the guest to be told this MTU.
    ///
    /// # Errors
    /// The port cannot carry so much, or it is less than IP needs.
    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let most = self.identity().mtu.unwrap_or(u16::MAX);
        if !(MIN_MTU..=most).contains(&mtu) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        lock(&self.driver).mtu = Some(mtu);
        Ok(())
    }

    /// Asks the guest to announce itself, if it knows how.
    fn ask_for_announcement(&self) {
        let asked = {
            let mut driver = lock(&self.driver);
            driver.announce = has(driver.features, VIRTIO_NET_F_GUEST_ANNOUNCE);
            driver.announce
        };
        if asked {
            self.notify_config_changed();
        }
    }

    /// A guest goes on where an earlier process, or another host, left it: the network may have
    /// forgotten where it is, or never have known. Once a session.
    fn resume(&self) {
        if !std::mem::replace(&mut lock(&self.driver).resumed, true) {
            self.ask_for_announcement();
        }
    }

    /// Announces `mac` on the network in the guest's stead, and asks the guest to do it better.
    ///
    /// # Errors
    /// The port does not take it.
    pub fn announce(&self, mac: Mac) -> io::Result<()> {
        self.ask_for_announcement();
        let header_len = header_len(lock(&self.driver).features);
        let mut header = [0; HDR_LEN];
        let mut announcement = rarp::announcement(mac);
        let mut list = FrameBuffer::default();
        let mut frame = list.frame();
        frame.push_own(&mut header[..header_len]);
        frame.push_own(&mut announcement);
        self.port.send(0, &frame).map(drop)
    }

    fn set_offloads(&self, offloads: u64) -> io::Result<()> {
        self.port.set_offloads(offloads)?;
        self.offloads.store(offloads, Ordering::Relaxed);
        Ok(())
    }

    /// GUEST_OFFLOADS bits in force.
    #[must_use]
    pub fn offloads(&self) -> u64 {
        self.offloads.load(Ordering::Relaxed)
    }

    fn update_filter(&self, change: impl FnOnce(&mut RxFilter)) {
        let mut filter = lock(&self.filter);
        change(Arc::make_mut(&mut filter));
        // Release: whoever sees the new number finds the new filter behind the lock.
        self.filter_generation.fetch_add(1, Ordering::Release);
    }

    /// The receive queue of `pair` runs, `resumed` from an earlier start or afresh.
    pub fn start_pair(&self, pair: u16, resumed: bool) {
        self.change_pairs(|pairs, _| {
            pairs.set_running(pair, true);
            if resumed {
                pairs.active = pairs.active.max(pair + 1);
            }
        });
        if resumed {
            self.resume();
        }
    }

    /// The receive queue of `pair` does not run any more.
    pub fn stop_pair(&self, pair: u16) {
        self.change_pairs(|pairs, _| pairs.set_running(pair, false));
    }

    /// Changes the pairs and brings the port's attachment along, all under the lock, so that two
    /// changes cannot reach the port in the wrong order.
    fn change_pairs(&self, change: impl FnOnce(&mut Pairs, u16)) {
        let max = self.settings.identity.pairs;
        let mut pairs = lock(&self.pairs);
        let before: Vec<bool> = (0..max).map(|pair| pairs.is_attached(pair)).collect();
        change(&mut pairs, max);
        for pair in 0..max {
            let attached = pairs.is_attached(pair);
            if before[usize::from(pair)] == attached {
                continue;
            }
            if let Err(error) = self.port.set_attached(pair, attached) {
                tracing::warn!(pair, attached, %error, "cannot change a queue of the port");
            }
        }
    }
}

impl Pairs {
    fn is_attached(&self, pair: u16) -> bool {
        pair < self.active
            && self
                .running
                .get(usize::from(pair))
                .copied()
                .unwrap_or(false)
    }

    fn set_running(&mut self, pair: u16, running: bool) {
        if let Some(slot) = self.running.get_mut(usize::from(pair)) {
            *slot = running;
        }
    }
}

/// A receive queue's view of the filter.
#[derive(Debug)]
pub struct FilterView {
    generation: u64,
    filter: Arc<RxFilter>,
}

impl FilterView {
    /// The filter as it is now.
    #[must_use]
    pub fn new(state: &DeviceState) -> Self {
        // The number first: a filter newer than its number is looked up once more, never missed.
        let generation = state.filter_generation.load(Ordering::Acquire);
        Self {
            generation,
            filter: Arc::clone(&lock(&state.filter)),
        }
    }

    /// Takes over a change, if there was one.
    pub fn refresh(&mut self, state: &DeviceState) {
        if state.filter_generation.load(Ordering::Acquire) != self.generation {
            *self = Self::new(state);
        }
    }

    /// The filter as of the last refresh.
    #[must_use]
    pub fn filter(&self) -> &RxFilter {
        &self.filter
    }
}

/// A panic on another thread has left whole values behind: every change here is a plain store.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
