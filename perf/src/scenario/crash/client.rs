//! A driver with one queue that keeps requests in flight, and goes on with the next daemon on the same rings.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use berth_tests_framework::driver::{
    Inflight, Link, Memory, Piece, Protocol, Ring, Wanted, features,
};

use crate::interrupt;

const BLOCK: u32 = 4096;
/// Three descriptors for each request of 32.
const RING: u16 = 128;
/// VIRTIO_BLK_T_IN and _OUT.
const READ: u32 = 0;
const WRITE: u32 = 1;
const NO_STATUS: u8 = 0xff;
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Memory of one request.
#[derive(Clone, Copy, Debug)]
struct Slot {
    header: u64,
    data: u64,
    status: u64,
}

/// The driver.
pub(in crate::scenario) struct Client {
    memory: Arc<Memory>,
    rings: [Ring; 1],
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Slot of each head in flight.
    heads: Vec<Option<usize>>,
    inflight: Option<Inflight>,
    link: Option<Link>,
    writes: bool,
    blocks: u64,
    next: u64,
}

impl Client {
    /// One that keeps `depth` requests in flight on a disk of `blocks` blocks.
    pub(in crate::scenario) fn new(depth: usize, writes: bool, blocks: u64) -> Result<Client> {
        let memory = Memory::new(4 << 20)?;
        let slots = (0..depth).map(|_| {
            Ok(Slot {
                data: memory.allocate(u64::from(BLOCK), 4096)?,
                header: memory.allocate(16, 16)?,
                status: memory.allocate(1, 1)?,
            })
        });
        Ok(Client {
            slots: slots.collect::<Result<_>>()?,
            rings: [Ring::new(&memory, 0, RING)?],
            free: (0..depth).collect(),
            heads: vec![None; usize::from(RING)],
            inflight: None,
            link: None,
            memory,
            writes,
            blocks,
            next: 0,
        })
    }

    /// Connects to a daemon that listens, and gives it the rings where the last one left them. What is in flight is
    /// tracked by all who offer that; the others are asked again for all that was not answered.
    pub(in crate::scenario) fn connect(&mut self, socket: &Path) -> Result<()> {
        self.link = None;
        let wanted = Wanted {
            features: features::VERSION_1 | features::PROTOCOL_FEATURES | features::EVENT_IDX,
            protocol: Protocol::REPLY_ACK
                | Protocol::MQ
                | Protocol::CONFIG
                | Protocol::INFLIGHT_SHMFD,
        };
        let mut link = Link::dial(socket, wanted)?;
        if link.protocol().contains(Protocol::INFLIGHT_SHMFD) && self.inflight.is_none() {
            self.inflight = Some(link.new_inflight(1, RING)?);
        }
        link.start(
            &self.memory,
            &mut self.rings,
            self.inflight.as_ref(),
            Ring::used_idx,
        )?;
        self.link = Some(link);
        if self.is_tracked() {
            return Ok(());
        }
        // What its predecessor wished is no wish of its own.
        self.rings[0].kick()
    }

    /// Whether the daemon says what it had in flight.
    pub(in crate::scenario) fn is_tracked(&self) -> bool {
        self.inflight.is_some()
    }

    /// Keeps all slots busy until `count` more requests have come back.
    pub(in crate::scenario) fn work(&mut self, count: u64) -> Result<()> {
        let mut done = 0;
        while done < count {
            self.fill()?;
            self.wait_used()?;
            done += self.collect()?;
        }
        self.fill()
    }

    /// Makes requests in all free slots, whether or not a daemon is there.
    pub(in crate::scenario) fn fill(&mut self) -> Result<()> {
        while let Some(n) = self.free.pop() {
            let slot = self.slots[n];
            // A stride that meets every block of a power of two once.
            self.next = (self.next + 7) % self.blocks;
            let mut header = [0; 16];
            let kind = if self.writes { WRITE } else { READ };
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&(self.next * u64::from(BLOCK) / 512).to_le_bytes());
            self.memory.write(slot.header, &header);
            self.memory.write(slot.status, &[NO_STATUS]);
            let piece = |gpa, length, writable| Piece {
                gpa,
                length,
                writable,
            };
            let pieces = [
                piece(slot.header, 16, false),
                piece(slot.data, BLOCK, !self.writes),
                piece(slot.status, 1, true),
            ];
            let head = self.rings[0].add(&pieces).context("the ring is full")?;
            self.heads[usize::from(head)] = Some(n);
        }
        self.rings[0].kick_if_wanted()
    }

    /// Waits until there is a used entry, and no longer than it is worth.
    pub(in crate::scenario) fn wait_used(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let link = self.link.as_ref().context("not connected")?;
        loop {
            interrupt::check()?;
            if self.rings[0].arm() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("a request was not answered in {PATIENCE:?}");
            }
            link.wait_signal(&self.rings, PATIENCE)?;
        }
    }

    /// Takes what has come back; how many.
    pub(in crate::scenario) fn collect(&mut self) -> Result<u64> {
        let mut done = 0;
        loop {
            match self.rings[0].take_used() {
                Ok(None) => return Ok(done),
                Ok(Some(used)) => {
                    let slot = self.heads[usize::from(used.head)].take();
                    let slot = slot.context("a request came back that was not made")?;
                    let mut status = [NO_STATUS];
                    self.memory.read(self.slots[slot].status, &mut status);
                    ensure!(
                        status == [0],
                        "a request came back with status {}",
                        status[0]
                    );
                    self.free.push(slot);
                    done += 1;
                }
                // A second answer by one who cannot know that its predecessor has answered.
                Err(_) if !self.is_tracked() => {}
                Err(fault) => return Err(fault.into()),
            }
        }
    }

    /// Waits for all that is in flight, where none of it can have been lost.
    pub(in crate::scenario) fn drain(&mut self) -> Result<()> {
        while self.is_tracked() && self.rings[0].in_flight() > 0 {
            self.wait_used()?;
            self.collect()?;
        }
        Ok(())
    }
}
