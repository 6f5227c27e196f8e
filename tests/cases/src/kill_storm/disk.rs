//! The disk storm's client: a driver that writes, reads and zeroes checksummed blocks at depth, and goes on
//! when the daemon is killed and comes back.
//!
//! Everything happens on the story's thread. A kill's moment is counted in completions, never in time: the
//! queues are full, some of what is in flight has come back, and the next thing is SIGKILL.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::driver::{Inflight, Link, Memory, Protocol, Ring, Wanted, features};
use berth_tests_framework::process::Signal;
use berth_tests_framework::wait::seconds;

use super::request::{Kind, MOST, Request, Slot};
use super::tally::Tally;
use crate::blocks::{BLOCK, Model, Random};

const MIB: u64 = 1 << 20;
/// Of five kills the one before which the daemon stands still, so that all queues are full when it dies.
pub(super) const STANDING: u32 = 2;

/// VIRTIO_BLK_F_FLUSH, MQ and WRITE_ZEROES.
const BLK_FEATURES: u64 = 1 << 9 | 1 << 12 | 1 << 14;

/// How a storm goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) queues: u16,
    /// Requests in flight in each queue.
    pub(super) depth: usize,
    pub(super) size_bytes: u64,
    /// Whether EVENT_IDX and INDIRECT_DESC are negotiated.
    pub(super) ring_features: bool,
    /// Whether what is in flight is tracked.
    pub(super) tracked: bool,
    pub(super) seed: u64,
}

/// The client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) plan: Plan,
    pub(super) memory: Arc<Memory>,
    pub(super) rings: Vec<Ring>,
    pub(super) slots: Vec<Slot>,
    /// Slots of each queue that no request has.
    pub(super) free: Vec<Vec<usize>>,
    /// By queue and head.
    pub(super) requests: Vec<Vec<Option<Request>>>,
    link: Option<Link>,
    inflight: Option<Inflight>,
    pub(super) random: Random,
    pub(super) model: Model,
    pub(super) tally: Tally,
}

impl Client {
    pub(super) fn new(plan: Plan) -> Result<Self> {
        let queues = usize::from(plan.queues);
        let memory =
            Memory::new(MIB + queues as u64 * (MIB + (plan.depth * (MOST + 1) * BLOCK) as u64))?;
        // Three descriptors and more a request; and the heads' turn comes late, which shows doubled ones.
        let size = u16::try_from((plan.depth * 8).next_power_of_two())?;
        let rings = (0..plan.queues)
            .map(|index| Ring::new(&memory, index, size))
            .collect::<Result<Vec<_>>>()?;
        let slots = (0..queues * plan.depth)
            .map(|_| {
                Ok(Slot {
                    data: memory.allocate((MOST * BLOCK) as u64, BLOCK as u64)?,
                    header: memory.allocate(16, 16)?,
                    status: memory.allocate(1, 1)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            free: (0..queues)
                .map(|queue| (queue * plan.depth..(queue + 1) * plan.depth).collect())
                .collect(),
            requests: vec![vec![None; usize::from(size)]; queues],
            model: Model::new(0, usize::try_from(plan.size_bytes)? / BLOCK),
            random: Random::new(plan.seed),
            link: None,
            inflight: None,
            tally: Tally::default(),
            memory,
            rings,
            slots,
            plan,
        })
    }

    /// Dials the daemon, anew or again, and goes on where the used rings end.
    pub(super) fn dial(&mut self, socket: &Path) -> Result<()> {
        self.dial_from(socket, Ring::used_idx)
    }

    /// The same with another base for the rings, which only a daemon without tracking believes.
    pub(super) fn dial_from(&mut self, socket: &Path, base: impl Fn(&Ring) -> u16) -> Result<()> {
        self.link = None;
        let mut wanted = Wanted {
            features: features::VERSION_1 | features::PROTOCOL_FEATURES | BLK_FEATURES,
            protocol: Protocol::REPLY_ACK | Protocol::MQ | Protocol::CONFIG,
        };
        if self.plan.ring_features {
            wanted.features |= features::EVENT_IDX | features::INDIRECT_DESC;
        }
        if self.plan.tracked {
            wanted.protocol |= Protocol::INFLIGHT_SHMFD;
        }
        let mut link = Link::dial(socket, wanted)?;
        ensure!(
            link.features() == wanted.features && link.protocol() == wanted.protocol,
            "the daemon offers {:#x} of {:#x}, {:?} of {:?}",
            link.features(),
            wanted.features,
            link.protocol(),
            wanted.protocol
        );
        if self.plan.tracked && self.inflight.is_none() {
            self.inflight = Some(link.new_inflight(self.plan.queues, self.rings[0].size())?);
        }
        link.start(&self.memory, &mut self.rings, self.inflight.as_ref(), base)?;
        self.link = Some(link);
        Ok(())
    }

    /// Kills the daemon `kills` times while the queues are full, and brings it back each time.
    pub(super) fn storm(&mut self, daemon: &mut Daemon, kills: u32) -> Result<()> {
        self.dial(daemon.socket())?;
        for kill in 0..kills {
            // Now and then at once: the successor dies while it takes up its predecessor's work.
            let calm = if kill % 5 == 4 {
                0
            } else {
                20 + self.random.below(400)
            };
            self.work(calm)
                .with_context(|| format!("before kill {kill}"))?;
            if kill % 5 == STANDING {
                daemon.signal(Signal::Stop)?;
            }
            self.fill()?;
            if kill % 5 != STANDING {
                let more = self.random.below(self.plan.depth as u64);
                self.watch_used(more)?;
            }
            let pause = Instant::now();
            daemon.kill();
            self.tally.kills += 1;
            self.tally.in_flight_at_kills += self.unanswered();
            if kill % 2 == 0 {
                self.collect();
            }
            daemon.start_again()?;
            self.dial(daemon.socket())
                .with_context(|| format!("after kill {kill}"))?;
            if kill % 5 != 3 {
                self.work(1).with_context(|| format!("after kill {kill}"))?;
                let pause = pause.elapsed().as_millis();
                self.tally.longest_pause_ms = self.tally.longest_pause_ms.max(pause);
            }
        }
        self.work(500)?;
        self.drain()
    }

    /// Requests without a used entry, whether we have looked at it or not.
    fn unanswered(&self) -> u64 {
        self.rings
            .iter()
            .map(|ring| u64::from(ring.avail_idx().wrapping_sub(ring.used_idx())))
            .sum()
    }

    /// Keeps the queues full until `count` more requests have come back.
    pub(super) fn work(&mut self, count: u64) -> Result<()> {
        let goal = self.tally.completed + count;
        loop {
            self.fill()?;
            if self.collect() == 0 && self.tally.completed < goal {
                self.sleep()?;
            }
            if self.tally.completed >= goal {
                return Ok(());
            }
        }
    }

    /// Makes no more requests; waits for those in flight.
    pub(super) fn drain(&mut self) -> Result<()> {
        while self.rings.iter().any(|ring| ring.in_flight() > 0) {
            if self.collect() == 0
                && let Err(error) = self.sleep()
            {
                self.tally.missing = self.rings.iter().map(|r| u64::from(r.in_flight())).sum();
                return Err(
                    error.context(format!("{} used entries are missing", self.tally.missing))
                );
            }
        }
        Ok(())
    }

    /// Sleeps until the daemon signals, unless there is something to do.
    fn sleep(&mut self) -> Result<()> {
        let link = self.link.as_ref().context("no daemon")?;
        let ready = self
            .rings
            .iter()
            .fold(false, |ready, ring| ring.arm() | ready);
        if ready {
            return Ok(());
        }
        link.wait_signal(&self.rings, seconds(60))
    }

    /// Watches the used rings without a break until they have grown by `count`, or all is answered.
    fn watch_used(&self, count: u64) -> Result<()> {
        let end = Instant::now() + seconds(60);
        let until = self.unanswered().saturating_sub(count);
        while self.unanswered() > until {
            ensure!(Instant::now() < end, "no used entry within 60 s");
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Stops all rings; what the daemon has not answered then, it never will.
    pub(super) fn stop(&mut self) -> Result<()> {
        let link = self.link.as_mut().context("no daemon")?;
        for ring in &self.rings {
            link.stop_ring(ring)?;
        }
        self.collect();
        self.tally.missing = self.rings.iter().map(|r| u64::from(r.in_flight())).sum();
        Ok(())
    }

    /// Fills every queue to its depth, and kicks.
    pub(super) fn fill(&mut self) -> Result<()> {
        for queue in 0..self.rings.len() {
            while !self.free[queue].is_empty() {
                let Some((kind, blocks)) = self.choose() else {
                    break;
                };
                if !self.submit(queue, kind, blocks)? {
                    break;
                }
            }
            self.rings[queue].kick_if_wanted()?;
        }
        Ok(())
    }

    /// Takes everything that has come back, and checks it; how much it was.
    pub(super) fn collect(&mut self) -> u64 {
        let before = self.tally.completed;
        for queue in 0..self.rings.len() {
            loop {
                match self.rings[queue].take_used() {
                    Ok(None) => break,
                    Err(fault) => self.tally.faults.push(fault.to_string()),
                    Ok(Some(used)) => {
                        self.tally.completed += 1;
                        match self.requests[queue][usize::from(used.head)].take() {
                            Some(request) => self.check(queue, &request, used.length),
                            None => self
                                .tally
                                .faults
                                .push(format!("queue {queue}: head {} has no request", used.head)),
                        }
                    }
                }
            }
        }
        self.tally.completed - before
    }

    /// Reads every block through the daemon.
    pub(super) fn read_back(&mut self) -> Result<()> {
        let mut next = 0;
        while next < self.model.len() {
            for queue in 0..self.rings.len() {
                while next < self.model.len() {
                    let blocks = next..(next + MOST).min(self.model.len());
                    if !self.submit(queue, Kind::Read, blocks.clone())? {
                        break;
                    }
                    next = blocks.end;
                }
                self.rings[queue].kick_if_wanted()?;
            }
            if self.collect() == 0 {
                self.sleep()?;
            }
        }
        self.drain()
    }

    /// Reads every block of the image from outside.
    pub(super) fn compare(&mut self, image: &Path) -> Result<()> {
        let bytes = std::fs::read(image).with_context(|| image.display().to_string())?;
        ensure!(
            bytes.len() == self.model.len() * BLOCK,
            "the image changed its size"
        );
        for (block, part) in bytes.chunks_exact(BLOCK).enumerate() {
            if let Err(why) = self.model.check(block, part) {
                self.tally.mismatches.push(format!("in the image: {why}"));
            }
        }
        Ok(())
    }
}
