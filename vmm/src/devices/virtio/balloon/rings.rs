//! The rings of one activation, and what becomes of what the guest puts into them.
//!
//! ```text
//!  inflateq  pfns ──▶ ranges of RAM ─▶ whole pages of the host ─▶ discard
//!  deflateq  pfns ──▶ ranges of RAM ─▶ no longer given
//!  statsq    numbers; the buffer is kept, and given back when new ones are wanted
//!  reporting buffers ▶ ranges of RAM ─▶ whole pages of the host ─▶ discard, unless the guest fills its free pages
//! ```
//!
//! What is in a ring is only ever read through virtio-queue, which checks it; an error here means that the rings make no
//! sense, and that they are let go. A buffer goes back to the guest only after what it names was given to the host.
#![forbid(unsafe_code)]

use std::io::Read;
use std::num::Wrapping;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::shared::{Counters, Shared, count};
use super::{F_PAGE_POISON, F_REPORTING, F_STATS_VQ, PAGE, pages, request};
use crate::devices::virtio::device::{Activation, QueueSetup};
use crate::memory::GuestRam;
use crate::telemetry::LogLimit;

/// Page frame numbers of one buffer, at most; Linux gives 256.
const MAX_PFNS: usize = 64 << 10;
/// Statistics of one buffer that are looked at; Linux gives 16.
const MAX_STATS: usize = 64;
/// Token of the wake event; a queue's is its place.
pub(super) const WAKE: u64 = u64::MAX;

/// What a driver can cause to be logged.
static REFUSED: LogLimit = LogLimit::new(Duration::from_secs(10));
static DISCARDS: LogLimit = LogLimit::new(Duration::from_secs(10));

/// What the guest lends of.
#[derive(Clone)]
pub(super) struct Lent {
    pub(super) ram: GuestRam,
    /// Bytes of the pages that go back.
    pub(super) granule: u64,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// Who is who: queues in the order of the specification. A driver gives them its numbers (the one of reporting is 4), or,
/// as Linux does, leaves out the numbers of queues that are not there.
fn uses(features: u64, setups: Vec<QueueSetup>) -> Vec<(Use, QueueSetup)> {
    let all = [
        (0, Use::Inflate, true),
        (1, Use::Deflate, true),
        (2, Use::Stats, features & F_STATS_VQ != 0),
        (4, Use::Reporting, features & F_REPORTING != 0),
    ];
    let present = || all.iter().filter(|(.., present)| *present);
    if setups.len() == present().count() {
        let uses = present().map(|(_, what, _)| *what);
        return uses.zip(setups).collect();
    }
    let by_number = setups.into_iter().filter_map(|setup| {
        let (_, what, _) = present().find(|(number, ..)| *number == setup.index)?;
        Some((*what, setup))
    });
    by_number.collect()
}

struct Ring {
    what: Use,
    index: u16,
    queue: Queue,
    kick: EventFd,
}

type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

impl Ring {
    fn new(what: Use, setup: QueueSetup) -> Result<Self, virtio_queue::Error> {
        let mut queue = Queue::new(setup.size)?;
        queue.try_set_size(setup.size)?;
        queue.try_set_desc_table_address(GuestAddress(setup.desc))?;
        queue.try_set_avail_ring_address(GuestAddress(setup.avail))?;
        queue.try_set_used_ring_address(GuestAddress(setup.used))?;
        queue.set_ready(true);
        Ok(Self {
            what,
            index: setup.index,
            queue,
            kick: setup.kick,
        })
    }

    /// All chains that are available now; those that come later have a kick of their own.
    fn take<'a>(&mut self, memory: &'a GuestMemoryMmap) -> Result<Vec<Chain<'a>>, String> {
        let index = self.index;
        let error = |error: virtio_queue::Error| format!("queue {index}: {error}");
        let end = self
            .queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(error)?;
        let count = (end - Wrapping(self.queue.next_avail())).0;
        let mut chains = Vec::new();
        for _ in 0..count {
            let chain = self.queue.iter(memory).map_err(error)?.next();
            chains.push(chain.ok_or_else(|| format!("queue {index}: cannot read the avail ring"))?);
        }
        Ok(chains)
    }

    /// Gives chains back, of which nothing was written. Returns whether the driver wants to know.
    fn give_back(&mut self, memory: &GuestMemoryMmap, heads: &[u16]) -> Result<bool, String> {
        let index = self.index;
        let error = |error: virtio_queue::Error| format!("queue {index}: {error}");
        for head in heads {
            self.queue.add_used(memory, *head, 0).map_err(error)?;
        }
        Ok(!heads.is_empty() && self.queue.needs_notification(memory).map_err(error)?)
    }
}

/// The rings of one activation.
pub(super) struct Rings {
    shared: Arc<Shared>,
    lent: Lent,
    memory: GuestMemoryMmap,
    features: u64,
    queues: Vec<Ring>,
    /// The buffer that statistics came in: given back, it asks for new ones.
    stats_head: Option<u16>,
}

impl Rings {
    pub(super) fn new(
        activation: Activation,
        shared: Arc<Shared>,
        lent: Lent,
    ) -> Result<Self, String> {
        let queues = uses(activation.features, activation.queues).into_iter();
        let queues = queues.map(|(what, setup)| Ring::new(what, setup));
        Ok(Self {
            shared,
            lent,
            memory: activation.memory,
            features: activation.features,
            queues: queues
                .collect::<Result<_, _>>()
                .map_err(|error| error.to_string())?,
            stats_head: None,
        })
    }

    /// Waits on all kicks, and on `WAKE`.
    pub(super) fn watch(&self) -> Result<Epoll, String> {
        let epoll = Epoll::new().map_err(|error| format!("cannot make an epoll: {error}"))?;
        let kicks = (0..).zip(self.queues.iter().map(|ring| &ring.kick));
        for (token, event) in kicks.chain([(WAKE, &self.shared.wake)]) {
            let interest = EpollEvent::new(EventSet::IN, token);
            epoll
                .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
                .map_err(|error| format!("cannot watch an eventfd: {error}"))?;
        }
        Ok(epoll)
    }

    /// How many queues there are.
    pub(super) fn len(&self) -> usize {
        self.queues.len()
    }

    /// Looks at a queue.
    pub(super) fn process(&mut self, place: usize) -> Result<(), String> {
        let memory = self.memory.clone();
        let Some(ring) = self.queues.get_mut(place) else {
            return Ok(());
        };
        // Read or not, the ring is looked at.
        let _ = ring.kick.read();
        let chains = ring.take(&memory)?;
        let heads: Vec<_> = chains.iter().map(DescriptorChain::head_index).collect();
        match ring.what {
            Use::Inflate => self.inflate(&memory, chains)?,
            Use::Deflate => self.deflate(&memory, chains)?,
            Use::Reporting => self.report(chains)?,
            Use::Stats => return self.take_stats(&memory, place, chains),
        }
        self.give_back(place, &heads)
    }

    fn give_back(&mut self, place: usize, heads: &[u16]) -> Result<(), String> {
        let ring = &mut self.queues[place];
        if ring.give_back(&self.memory, heads)? {
            self.shared.lock().interrupt(ring.index);
        }
        Ok(())
    }

    fn inflate(&mut self, memory: &GuestMemoryMmap, chains: Vec<Chain<'_>>) -> Result<(), String> {
        let ranges = self.ranges(memory, chains, |counters| &counters.inflated_pages)?;
        let mut given = Vec::new();
        if self.lent.granule == PAGE {
            given = ranges;
        } else {
            let mut inner = self.shared.lock();
            for range in &ranges {
                let blocks = &mut inner.state.blocks;
                blocks.fill(range, self.lent.granule, &mut given);
            }
        }
        for range in given {
            self.discard(&range);
        }
        Ok(())
    }

    fn deflate(&mut self, memory: &GuestMemoryMmap, chains: Vec<Chain<'_>>) -> Result<(), String> {
        // A page comes back when it is touched.
        let ranges = self.ranges(memory, chains, |counters| &counters.deflated_pages)?;
        if self.lent.granule != PAGE {
            let mut inner = self.shared.lock();
            for range in &ranges {
                inner.state.blocks.clear(range, self.lent.granule);
            }
        }
        Ok(())
    }

    /// RAM that page frame numbers name; its pages are counted.
    fn ranges(
        &self,
        memory: &GuestMemoryMmap,
        chains: Vec<Chain<'_>>,
        counter: fn(&Counters) -> &AtomicU64,
    ) -> Result<Vec<Range<u64>>, String> {
        let mut pfns = Vec::new();
        for chain in chains {
            let bytes = read(memory, chain, MAX_PFNS * size_of::<u32>())?;
            pfns.extend(request::pfns(&bytes));
        }
        let mut ram = Vec::new();
        for range in request::ranges(&mut pfns) {
            let parts = pages::in_ram(memory, &range);
            self.refuse(&range, &parts);
            ram.extend(parts);
        }
        let len: u64 = ram.iter().map(|range| range.end - range.start).sum();
        count(counter(&self.shared.counters), len / PAGE);
        Ok(ram)
    }

    /// Counts what of a range is not RAM.
    fn refuse(&self, range: &Range<u64>, ram: &[Range<u64>]) {
        let len: u64 = ram.iter().map(|part| part.end - part.start).sum();
        let outside = range.end - range.start - len;
        if outside == 0 {
            return;
        }
        count(&self.shared.counters.refused_bytes, outside);
        if let Some(suppressed) = REFUSED.pass() {
            let first = format_args!("{:#x}", range.start);
            tracing::warn!(
                suppressed,
                first,
                bytes = outside,
                "the guest gave what is not RAM"
            );
        }
    }

    /// Free pages of the guest: it may use them again as soon as the buffer is given back.
    fn report(&mut self, chains: Vec<Chain<'_>>) -> Result<(), String> {
        let memory = self.memory.clone();
        let poisoned =
            self.features & F_PAGE_POISON != 0 && self.shared.lock().state.poison_val != 0;
        for desc in chains.into_iter().flatten() {
            if !desc.is_write_only() {
                return Err("reporting_vq: a buffer that cannot be written".to_owned());
            }
            let start = desc.addr().0;
            let range = start..start.saturating_add(desc.len().into());
            let parts = pages::in_ram(&memory, &range);
            self.refuse(&range, &parts);
            for part in parts {
                count(&self.shared.counters.reported_bytes, part.end - part.start);
                // A page that comes back is all zeros, and this guest expects others: it keeps its pages.
                if let (false, Some(whole)) = (poisoned, pages::whole(&part, self.lent.granule)) {
                    self.discard(&whole);
                }
            }
        }
        Ok(())
    }

    /// Gives RAM back to the host. Where the host does not take it, the guest does without it all the same.
    fn discard(&self, range: &Range<u64>) {
        let len = range.end - range.start;
        let counters = &self.shared.counters;
        match self.lent.ram.discard(range.start, len) {
            Ok(given) => {
                count(&counters.discards, 1);
                count(&counters.discarded_bytes, given);
            }
            Err(error) => {
                count(&counters.discards_failed, 1);
                if let Some(suppressed) = DISCARDS.pass() {
                    let first = format_args!("{:#x}", range.start);
                    tracing::warn!(suppressed, first, len, %error, "cannot give memory back");
                }
            }
        }
    }

    fn take_stats(
        &mut self,
        memory: &GuestMemoryMmap,
        place: usize,
        chains: Vec<Chain<'_>>,
    ) -> Result<(), String> {
        for chain in chains {
            let head = chain.head_index();
            let bytes = read(memory, chain, MAX_STATS * request::STAT_LEN)?;
            self.shared.lock().set_stats(request::stats(&bytes));
            count(&self.shared.counters.stats_updates, 1);
            // A driver has one such buffer; of more, the last is kept.
            if let Some(older) = self.stats_head.replace(head) {
                self.give_back(place, &[older])?;
            }
        }
        Ok(())
    }

    /// For how long there is nothing to do unless something happens.
    pub(super) fn timeout_ms(&self) -> i32 {
        let due = self
            .stats_head
            .and_then(|_| self.shared.lock().ask_in(self.shared.polling));
        // Rounded up, so that it is time when the wait is over.
        due.map_or(-1, |due| due.as_millis().saturating_add(1) as i32)
    }

    /// Asks the guest for new statistics if somebody wants to know and it is time.
    pub(super) fn ask_for_stats(&mut self) -> Result<(), String> {
        let due = self.shared.lock().ask_in(self.shared.polling);
        if due != Some(Duration::ZERO) {
            return Ok(());
        }
        let mut queues = self.queues.iter();
        if let Some(place) = queues.position(|ring| ring.what == Use::Stats)
            && let Some(head) = self.stats_head.take()
        {
            self.give_back(place, &[head])?;
        }
        Ok(())
    }
}

/// What the driver wrote into a buffer.
fn read(memory: &GuestMemoryMmap, chain: Chain<'_>, most: usize) -> Result<Vec<u8>, String> {
    let mut reader: Reader<'_> = chain
        .reader(memory)
        .map_err(|error| format!("cannot read a buffer: {error}"))?;
    let len = reader.available_bytes();
    if len > most {
        return Err(format!("a buffer of {len} bytes, at most {most} are taken"));
    }
    let mut bytes = vec![0; len];
    reader
        .read_exact(&mut bytes)
        .map_err(|error| format!("cannot read a buffer: {error}"))?;
    Ok(bytes)
}
