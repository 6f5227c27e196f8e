//! The network storm's client: frames with sequence numbers and checksums both ways through a tap, while the
//! daemon is killed and comes back.
//!
//! ```text
//!   transmit ring ──▶ berth-net ──▶ tap ──▶ packet socket      each frame once, and seen once it is used
//!   receive ring  ◀── berth-net ◀── tap ◀── packet socket      each frame once
//! ```
//!
//! Only frames that are in flight when the daemon dies may be lost or repeated. virtio 1.3, 5.1.6.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::driver::{
    Inflight, Link, Memory, Piece, Protocol, Ring, Wanted, features,
};
use berth_tests_framework::net::{self, FrameSocket};
use berth_tests_framework::process::Signal;
use berth_tests_framework::wait::seconds;

use super::disk::STANDING;
use crate::blocks::{self, Content, Random};

const RX: usize = 0;
const TX: usize = 1;
/// Frames in flight each way.
const WINDOW: usize = 32;
const RING: u16 = 256;
/// Bytes of each buffer: the header of virtio 1.x and a whole frame.
const BUFFER: u32 = 2048;
const HEADER: u32 = 12;
/// Ethernet's header of all our frames: to everybody, of a type for experiments.
const ETHERNET: [u8; 14] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5,
];

/// What went wrong, and how much went right.
#[derive(Debug, Default)]
pub(super) struct CardTally {
    pub(super) transmitted: u64,
    pub(super) received: u64,
    pub(super) kills: u32,
    /// Frames that were in flight when the daemon died, and never came.
    pub(super) lost: u64,
    /// Frames that were in flight when the daemon died, and came twice.
    pub(super) repeated: u64,
    pub(super) faults: Vec<String>,
    pub(super) missing: u64,
    pub(super) longest_pause_ms: u128,
}

impl CardTally {
    /// Nothing went wrong.
    ///
    /// # Errors
    /// Something did.
    pub(super) fn all_well(&self) -> Result<()> {
        ensure!(
            self.faults.is_empty() && self.missing == 0,
            "after {} kills, {} frames out and {} in: {} missing, {} faults: {}",
            self.kills,
            self.transmitted,
            self.received,
            self.missing,
            self.faults.len(),
            self.faults.first().map_or("", |first| first)
        );
        Ok(())
    }
}

/// One direction's frames by their numbers.
#[derive(Debug, Default)]
struct Frames {
    next: u64,
    /// On their way.
    under_way: BTreeSet<u64>,
    /// Arrived, the latest of them.
    arrived: BTreeSet<u64>,
    /// Were on their way when the daemon died.
    excused: BTreeSet<u64>,
}

impl Frames {
    fn begin(&mut self) -> u64 {
        self.next += 1;
        self.under_way.insert(self.next);
        self.next
    }

    /// A frame arrived; whether it is a second time that is allowed.
    fn arrive(&mut self, number: u64) -> Result<bool, String> {
        if number == 0 || number > self.next {
            return Err(format!("frame {number} was never sent"));
        }
        self.under_way.remove(&number);
        if self.arrived.insert(number) {
            return Ok(false);
        }
        if self.excused.contains(&number) {
            return Ok(true);
        }
        Err(format!("frame {number} came twice"))
    }

    /// The daemon died: what is on its way may be lost, or come late or again; and so may `unused`, which the
    /// daemon had not answered for, whether they have arrived or not.
    fn excuse(&mut self, unused: impl Iterator<Item = u64>) {
        self.excused.append(&mut self.under_way);
        self.excused.extend(unused);
    }

    /// Frames that never came.
    fn lost(&self) -> u64 {
        self.excused.difference(&self.arrived).count() as u64
    }
}

/// The client.
#[derive(Debug)]
pub(super) struct Card {
    tap: String,
    tracked: bool,
    memory: Arc<Memory>,
    rings: Vec<Ring>,
    link: Option<Link>,
    inflight: Option<Inflight>,
    socket: FrameSocket,
    random: Random,
    /// Buffers of the transmit ring that no frame has.
    free: Vec<u64>,
    /// By ring and head: a buffer, and the frame in it.
    buffers: [Vec<Option<(u64, u64)>>; 2],
    /// To the tap, and from it.
    out: Frames,
    back: Frames,
    /// Frames whose buffer came back before they were seen.
    owed: BTreeSet<u64>,
    pub(super) tally: CardTally,
}

impl Card {
    pub(super) fn new(tap: &str, tracked: bool) -> Result<Self> {
        let memory = Memory::new(4 << 20)?;
        let rings = (0..2)
            .map(|index| Ring::new(&memory, index, RING))
            .collect::<Result<Vec<_>>>()?;
        let buffer = || memory.allocate(u64::from(BUFFER), 64);
        let free = (0..WINDOW).map(|_| buffer()).collect::<Result<Vec<_>>>()?;
        let received = (0..2 * WINDOW)
            .map(|_| buffer())
            .collect::<Result<Vec<_>>>()?;
        let mut card = Self {
            tap: tap.to_owned(),
            tracked,
            rings,
            link: None,
            inflight: None,
            socket: FrameSocket::open(tap)?,
            random: Random::new(7),
            free,
            buffers: [vec![None; RING.into()], vec![None; RING.into()]],
            out: Frames::default(),
            back: Frames::default(),
            owed: BTreeSet::new(),
            tally: CardTally::default(),
            memory,
        };
        for gpa in received {
            card.offer(gpa)?;
        }
        Ok(card)
    }

    /// Gives the device a buffer to receive into.
    fn offer(&mut self, gpa: u64) -> Result<()> {
        self.memory.write(gpa, &[0xa5; BUFFER as usize]);
        let piece = Piece {
            gpa,
            length: BUFFER,
            writable: true,
        };
        let head = self.rings[RX].add(&[piece]).context("a full ring")?;
        self.buffers[RX][usize::from(head)] = Some((gpa, 0));
        Ok(())
    }

    /// Dials the daemon, anew or again, and goes on where the used rings end.
    pub(super) fn dial(&mut self, socket: &Path) -> Result<()> {
        self.dial_from(socket, Ring::used_idx)
    }

    /// The same with another base for the rings.
    pub(super) fn dial_from(&mut self, socket: &Path, base: impl Fn(&Ring) -> u16) -> Result<()> {
        self.link = None;
        let mut wanted = Wanted {
            features: features::VERSION_1 | features::PROTOCOL_FEATURES | features::EVENT_IDX,
            protocol: Protocol::REPLY_ACK | Protocol::MQ,
        };
        if self.tracked {
            wanted.protocol |= Protocol::INFLIGHT_SHMFD;
        }
        let mut link = Link::dial(socket, wanted)?;
        if self.tracked && self.inflight.is_none() {
            self.inflight = Some(link.new_inflight(2, RING)?);
        }
        link.start(&self.memory, &mut self.rings, self.inflight.as_ref(), base)?;
        self.link = Some(link);
        net::wait_up(&self.tap, seconds(30))
    }

    /// Kills the daemon `kills` times while frames fly, and brings it back each time.
    pub(super) fn storm(&mut self, daemon: &mut Daemon, kills: u32) -> Result<()> {
        self.dial(daemon.socket())?;
        for kill in 0..kills {
            let calm = 20 + self.random.below(300);
            self.work(calm)
                .with_context(|| format!("before kill {kill}"))?;
            if kill % 5 == STANDING {
                daemon.signal(Signal::Stop)?;
            }
            self.fill()?;
            if kill % 5 != STANDING {
                let more = self.random.below(WINDOW as u64);
                self.watch_used(more)?;
            }
            let pause = Instant::now();
            daemon.kill();
            self.tally.kills += 1;
            self.collect()?;
            let unused = self.buffers[TX].iter().flatten();
            self.out.excuse(unused.map(|(_, number)| *number));
            self.back.excuse(std::iter::empty());
            daemon.start_again()?;
            self.dial(daemon.socket())
                .with_context(|| format!("after kill {kill}"))?;
            self.work(1).with_context(|| format!("after kill {kill}"))?;
            let pause = pause.elapsed().as_millis();
            self.tally.longest_pause_ms = self.tally.longest_pause_ms.max(pause);
        }
        self.work(300)?;
        self.settle()
    }

    /// Keeps frames flying both ways until `count` more have arrived each way.
    pub(super) fn work(&mut self, count: u64) -> Result<()> {
        let goals = (self.tally.transmitted + count, self.tally.received + count);
        loop {
            self.fill()?;
            let came = self.collect()?;
            if self.tally.transmitted >= goals.0 && self.tally.received >= goals.1 {
                return Ok(());
            }
            if !came {
                self.sleep()?;
            }
        }
    }

    /// Waits until all is quiet: every transmitted frame used, every frame for the guest there.
    pub(super) fn settle(&mut self) -> Result<()> {
        while self.rings[TX].in_flight() > 0 || !self.back.under_way.is_empty() {
            if !self.collect()? {
                self.sleep().inspect_err(|_| {
                    self.tally.missing = u64::from(self.rings[TX].in_flight());
                })?;
            }
        }
        while let Some(number) = self.owed.first().copied() {
            ensure!(
                self.take_frame(seconds(30))?,
                "frame {number} was used and never seen at the tap"
            );
        }
        self.tally.lost = self.out.lost() + self.back.lost();
        Ok(())
    }

    /// Stops both rings; how many frames the daemon never answered.
    pub(super) fn stop(&mut self) -> Result<u64> {
        let link = self.link.as_mut().context("no daemon")?;
        for ring in &self.rings {
            link.stop_ring(ring)?;
        }
        self.collect()?;
        self.tally.missing = u64::from(self.rings[TX].in_flight());
        Ok(self.tally.missing)
    }

    fn sleep(&self) -> Result<()> {
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

    /// Watches the transmit ring without a break until `count` frames were used, or all.
    fn watch_used(&self, count: u64) -> Result<()> {
        let end = Instant::now() + seconds(60);
        let left = || {
            u64::from(
                self.rings[TX]
                    .avail_idx()
                    .wrapping_sub(self.rings[TX].used_idx()),
            )
        };
        let until = left().saturating_sub(count);
        while left() > until {
            ensure!(Instant::now() < end, "no frame was used within 60 s");
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Fills both windows; how many frames went into the transmit ring.
    pub(super) fn fill(&mut self) -> Result<u64> {
        let mut given = 0;
        while let Some(gpa) = self.free.pop() {
            let number = self.out.begin();
            let frame = self.frame(TX, number);
            self.memory.write(gpa, &[0; HEADER as usize]);
            self.memory.write(gpa + u64::from(HEADER), &frame);
            let piece = Piece {
                gpa,
                length: HEADER + u32::try_from(frame.len())?,
                writable: false,
            };
            let head = self.rings[TX].add(&[piece]).context("a full ring")?;
            self.buffers[TX][usize::from(head)] = Some((gpa, number));
            given += 1;
        }
        self.rings[TX].kick_if_wanted()?;
        while self.back.under_way.len() < WINDOW {
            let number = self.back.begin();
            let frame = self.frame(RX, number);
            self.socket.send(&frame)?;
        }
        Ok(given)
    }

    /// Frame `number` of a direction, of a length of its own.
    fn frame(&mut self, direction: usize, number: u64) -> Vec<u8> {
        let length = 48 + 8 * usize::try_from(self.random.below(180)).unwrap_or(0);
        let mut frame = ETHERNET.to_vec();
        frame.resize(ETHERNET.len() + length, 0);
        blocks::fill(&mut frame[ETHERNET.len()..], direction as u64, number);
        frame
    }

    /// The number of a frame of ours; none for what others send.
    fn number(direction: usize, frame: &[u8]) -> Result<Option<u64>, String> {
        let Some(payload) = frame.strip_prefix(&ETHERNET) else {
            return Ok(None);
        };
        match blocks::content(payload, direction as u64) {
            Ok(Content::Write(number)) => Ok(Some(number)),
            Ok(Content::Zero) => Err("a frame of zeroes".to_owned()),
            Err(damage) => Err(format!("a damaged frame: {damage}")),
        }
    }

    /// Takes everything that has come, and checks it; whether anything came.
    fn collect(&mut self) -> Result<bool> {
        let mut came = false;
        for which in [RX, TX] {
            loop {
                match self.rings[which].take_used() {
                    Ok(None) => break,
                    Err(fault) => self.tally.faults.push(fault.to_string()),
                    Ok(Some(used)) => {
                        let buffer = self.buffers[which][usize::from(used.head)].take();
                        let (gpa, number) = buffer.context("a head without a buffer")?;
                        if which == RX {
                            self.received(gpa, used.length)?;
                        } else {
                            self.free.push(gpa);
                            self.tally.transmitted += 1;
                            if !self.out.arrived.contains(&number) {
                                self.owed.insert(number);
                            }
                        }
                    }
                }
                came = true;
            }
        }
        self.rings[RX].kick_if_wanted()?;
        while self.take_frame(Duration::ZERO)? {}
        Ok(came)
    }

    /// A frame for the guest.
    fn received(&mut self, gpa: u64, length: u32) -> Result<()> {
        let mut bytes = vec![0; length.min(BUFFER) as usize];
        self.memory.read(gpa, &mut bytes);
        let frame = bytes.get(HEADER as usize..).unwrap_or_default();
        match Self::number(RX, frame).and_then(|number| {
            number.map_or(Ok(false), |number| {
                self.tally.received += 1;
                self.back.arrive(number)
            })
        }) {
            Ok(again) => self.tally.repeated += u64::from(again),
            Err(why) => self.tally.faults.push(format!("to the guest: {why}")),
        }
        self.offer(gpa)
    }

    /// A frame at the tap; whether there was one within `limit`.
    fn take_frame(&mut self, limit: Duration) -> Result<bool> {
        let mut buffer = [0; BUFFER as usize];
        let Some(frame) = self.socket.receive(&mut buffer, limit)? else {
            return Ok(false);
        };
        match Self::number(TX, frame).and_then(|number| {
            number.map_or(Ok(false), |number| {
                self.owed.remove(&number);
                self.out.arrive(number)
            })
        }) {
            Ok(again) => self.tally.repeated += u64::from(again),
            Err(why) => self.tally.faults.push(format!("from the guest: {why}")),
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_may_come_twice_only_if_the_daemon_died_meanwhile() {
        let mut frames = Frames::default();
        let (one, two) = (frames.begin(), frames.begin());
        assert_eq!(frames.arrive(one), Ok(false));
        assert!(frames.arrive(one).is_err(), "nobody died");
        assert!(frames.arrive(3).is_err(), "never sent");
        let three = frames.begin();
        assert_eq!(frames.arrive(three), Ok(false));
        frames.excuse([three].into_iter());
        assert_eq!(frames.lost(), 1);
        assert_eq!(frames.arrive(two), Ok(false));
        assert_eq!(frames.arrive(two), Ok(true));
        assert_eq!(frames.arrive(three), Ok(true), "it had no used entry");
        assert!(frames.arrive(one).is_err(), "it was over and done with");
        assert_eq!(frames.lost(), 0);
    }

    #[test]
    fn a_frame_of_ours_is_known_by_its_checksum() {
        let mut frame = ETHERNET.to_vec();
        frame.resize(ETHERNET.len() + 96, 0);
        blocks::fill(&mut frame[ETHERNET.len()..], TX as u64, 9);
        assert_eq!(Card::number(TX, &frame), Ok(Some(9)));
        assert!(Card::number(RX, &frame).is_err(), "the other direction");
        frame[70] ^= 1;
        assert!(Card::number(TX, &frame).is_err(), "damaged");
        frame[12] = 8;
        assert_eq!(Card::number(TX, &frame), Ok(None), "not ours");
    }
}
