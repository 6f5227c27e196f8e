//! What the transport's threads, the VM's driver and the thread `balloon` share.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PAGE;
use super::state::{State, Stats};
use crate::devices::virtio::device::TransportNotify;

/// When the guest is asked for its statistics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Polling {
    /// No sooner than this after the last time.
    pub(super) interval: Duration,
    /// For so long after somebody wanted to know.
    pub(super) window: Duration,
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(1),
            window: Duration::from_secs(10),
        }
    }
}

/// What the thread has done.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) inflated_pages: AtomicU64,
    pub(super) deflated_pages: AtomicU64,
    pub(super) reported_bytes: AtomicU64,
    pub(super) discards: AtomicU64,
    pub(super) discarded_bytes: AtomicU64,
    pub(super) discards_failed: AtomicU64,
    pub(super) refused_bytes: AtomicU64,
    pub(super) stats_updates: AtomicU64,
}

/// Adds to a counter.
pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// Wakes the thread while it serves.
    pub(super) wake: EventFd,
    pub(super) counters: Counters,
    pub(super) polling: Polling,
}

/// Guards configuration space, and what else is small.
pub(super) struct Inner {
    pub(super) state: State,
    pub(super) notify: Option<Arc<dyn TransportNotify>>,
    /// Whether the thread has rings, or is about to.
    pub(super) running: bool,
    /// Where each queue's interrupts go; the driver may change it.
    pub(super) calls: BTreeMap<u16, EventFd>,
    asked: Option<Instant>,
    updated: Option<Instant>,
}

impl Shared {
    pub(super) fn new(target_bytes: u64, polling: Polling) -> io::Result<Self> {
        Ok(Self {
            inner: Mutex::new(Inner {
                state: State {
                    target_pages: pages(target_bytes),
                    ..State::default()
                },
                notify: None,
                running: false,
                calls: BTreeMap::new(),
                asked: None,
                updated: None,
            }),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            counters: Counters::default(),
            polling,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        // Full is as good as written.
        let _ = self.wake.write(1);
    }
}

impl Inner {
    /// How long until the guest is to be asked; none, nobody wants to know.
    pub(super) fn ask_in(&self, polling: Polling) -> Option<Duration> {
        if self.asked?.elapsed() > polling.window {
            return None;
        }
        let age = self.updated.map(|updated| updated.elapsed());
        Some(age.map_or(Duration::ZERO, |age| polling.interval.saturating_sub(age)))
    }

    pub(super) fn interrupt(&self, queue: u16) {
        if let Some(call) = self.calls.get(&queue) {
            // Full is as good as written.
            let _ = call.write(1);
        }
    }

    pub(super) fn set_stats(&mut self, stats: Stats) {
        self.state.stats = Some(stats);
        self.updated = Some(Instant::now());
    }

    pub(super) fn reset(&mut self) {
        self.state.reset();
        self.updated = None;
    }
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

/// What a balloon has come to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Info {
    /// Bytes that the host wants.
    pub target_bytes: u64,
    /// Bytes that the guest says it gave.
    pub actual_bytes: u64,
    /// What the guest last said of its memory, and how long ago.
    pub stats: Option<(Stats, Duration)>,
}

/// The VM's side of a balloon. No call blocks.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

impl Handle {
    /// Asks the guest for so many bytes, rounded down to pages.
    pub fn set_target(&self, bytes: u64) {
        let mut inner = self.0.lock();
        inner.state.target_pages = pages(bytes);
        if let Some(notify) = &inner.notify {
            notify.config_changed();
        }
    }

    /// What is known now. The guest is asked for newer statistics for some time from here on.
    pub fn info(&self) -> Info {
        let mut inner = self.0.lock();
        inner.asked = Some(Instant::now());
        let info = Info {
            target_bytes: inner.state.target_bytes(),
            actual_bytes: inner.state.actual_bytes(),
            stats: inner
                .state
                .stats
                .clone()
                .zip(inner.updated.map(|updated| updated.elapsed())),
        };
        drop(inner);
        self.0.wake();
        info
    }

    /// A copy of all that a snapshot needs.
    pub fn state(&self) -> State {
        self.0.lock().state.clone()
    }

    /// What was done, by name.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let Counters {
            inflated_pages,
            deflated_pages,
            reported_bytes,
            discards,
            discarded_bytes,
            discards_failed,
            refused_bytes,
            stats_updates,
        } = &self.0.counters;
        let named = [
            ("inflated_pages", inflated_pages),
            ("deflated_pages", deflated_pages),
            ("reported_bytes", reported_bytes),
            ("discards", discards),
            ("discarded_bytes", discarded_bytes),
            ("discards_failed", discards_failed),
            ("refused_bytes", refused_bytes),
            ("stats_updates", stats_updates),
        ];
        let values = named.map(|(name, value)| (name.to_owned(), value.load(Ordering::Relaxed)));
        values.into()
    }
}
