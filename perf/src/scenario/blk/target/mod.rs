//! What requests are sent to, and the loop that sends them.
//!
//! [`drive`] keeps a number of requests in flight on a [`Target`] and measures each. Everything
//! runs on the calling thread, which the caller has pinned. Targets: a vhost-user daemon
//! ([`virtio`]), and, as the limit with no virtio between, the file itself ([`uring`], [`aio`],
//! [`sync`]).

pub mod aio;
pub mod sync;
pub mod uring;
pub mod virtio;

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::clock::Window;
use crate::histogram::Histogram;
use crate::interrupt;
use crate::sys::{Noise, SharedMemory};

/// Reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// How the client learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It sleeps in the kernel.
    Sleep,
    /// It looks again and again.
    Poll,
}

/// One pattern of requests.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Reads or writes.
    pub direction: Direction,
    /// At random offsets; else one after the other.
    pub random: bool,
    /// Bytes per request.
    pub block: usize,
    /// Requests in flight.
    pub depth: usize,
    /// How completions are learnt of.
    pub wait: Wait,
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Which of the requests in flight; its buffer is `slot * block` in the target's memory.
    pub slot: usize,
    /// Byte on the disk.
    pub offset: u64,
}

/// Something that serves requests. `queue` as often as there are slots, then `kick`, then `reap`.
pub trait Target {
    /// Takes a request; it need not start before `kick`.
    fn queue(&mut self, request: Request) -> io::Result<()>;

    /// Starts what was queued.
    fn kick(&mut self) -> io::Result<()>;

    /// Puts the slots of completed requests into `done`; returns with at least one. A request that
    /// failed is an error.
    fn reap(&mut self, done: &mut Vec<usize>) -> io::Result<()>;
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Latencies of the requests in the window.
    pub latency: Histogram,
    /// Length of the window.
    pub elapsed: Duration,
    /// All requests, those of the warm-up too.
    pub all_requests: u64,
}

/// What a wait that was cut short means.
fn unanswered(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::Interrupted {
        return io::Error::other("a request was not answered in time");
    }
    error
}

/// Counts looks at a ring without a completion; an error when it has been looked at in vain for some
/// ten seconds.
fn look_again(looks: u32) -> io::Result<u32> {
    looks
        .checked_add(1)
        .ok_or_else(|| io::Error::other("a request was not answered in 2^32 looks"))
}

/// Buffers for `load`, filled with what does not compress.
pub fn buffers(load: &Load) -> io::Result<SharedMemory> {
    SharedMemory::new((load.depth * load.block).next_multiple_of(4096))
}

/// Drives `target` on a disk of `span` bytes. `edge` is called when the window begins and when it ends.
pub fn drive<T: Target>(
    target: &mut T,
    load: &Load,
    span: u64,
    window: Window,
    mut edge: impl FnMut() -> io::Result<()>,
) -> Result<Outcome> {
    let mut offsets = Offsets::new(load, span)?;
    let mut outcome = Outcome::default();
    let mut done = Vec::with_capacity(load.depth);
    let mut started = vec![Instant::now(); load.depth];
    for slot in 0..load.depth {
        let offset = offsets.next();
        target.queue(Request { slot, offset })?;
    }
    target.kick()?;
    let begin = Instant::now() + window.warmup;
    let mut counting: Option<Instant> = None;
    loop {
        target.reap(&mut done)?;
        if interrupt::requested() {
            break;
        }
        let now = Instant::now();
        outcome.all_requests += done.len() as u64;
        if let Some(since) = counting {
            for &slot in &done {
                outcome.latency.record(now - started[slot]);
            }
            if now - since >= window.measured {
                outcome.elapsed = now - since;
                edge()?;
                break;
            }
        } else if now >= begin {
            edge()?;
            counting = Some(now);
        }
        for slot in done.drain(..) {
            started[slot] = now;
            let offset = offsets.next();
            target.queue(Request { slot, offset })?;
        }
        target.kick()?;
    }
    // Nothing stays in flight: the buffers go away with us.
    let mut left = load.depth - done.len();
    while left > 0 {
        done.clear();
        target.reap(&mut done)?;
        left -= done.len();
    }
    interrupt::check()?;
    Ok(outcome)
}

/// Where the requests go.
struct Offsets {
    blocks: u64,
    block: u64,
    random: Option<Noise>,
    at: u64,
}

impl Offsets {
    fn new(load: &Load, span: u64) -> Result<Offsets> {
        let block = load.block as u64;
        let blocks = span / block;
        if blocks < load.depth as u64 {
            bail!("a disk of {span} bytes is too small for this cell");
        }
        let seed = load.depth as u64 + 7;
        Ok(Offsets {
            blocks,
            block,
            random: load.random.then(|| Noise::new(seed)),
            at: 0,
        })
    }

    fn next(&mut self) -> u64 {
        let block = match &mut self.random {
            Some(noise) => noise.number() % self.blocks,
            None => {
                self.at = (self.at + 1) % self.blocks;
                self.at
            }
        };
        block * self.block
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Completes the oldest request at each reap; checks that a slot is in flight once.
    struct Fifo {
        in_flight: VecDeque<usize>,
        queued: u64,
        span: u64,
    }

    impl Target for Fifo {
        fn queue(&mut self, request: Request) -> io::Result<()> {
            assert!(!self.in_flight.contains(&request.slot));
            assert!(request.offset + 4096 <= self.span && request.offset.is_multiple_of(4096));
            self.in_flight.push_back(request.slot);
            self.queued += 1;
            Ok(())
        }

        fn kick(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn reap(&mut self, done: &mut Vec<usize>) -> io::Result<()> {
            done.extend(self.in_flight.pop_front());
            Ok(())
        }
    }

    fn load(random: bool, depth: usize) -> Load {
        Load {
            direction: Direction::Read,
            random,
            block: 4096,
            depth,
            wait: Wait::Poll,
        }
    }

    #[test]
    fn every_request_is_taken_back_and_the_window_is_counted() {
        for random in [true, false] {
            let span = 40 * 4096;
            let mut fifo = Fifo {
                in_flight: VecDeque::new(),
                queued: 0,
                span,
            };
            let window = Window {
                warmup: Duration::from_millis(2),
                measured: Duration::from_millis(5),
            };
            let mut edges = 0;
            let edge = || {
                edges += 1;
                Ok(())
            };
            let outcome = drive(&mut fifo, &load(random, 8), span, window, edge).unwrap();
            assert_eq!(edges, 2);
            assert!(fifo.in_flight.is_empty());
            assert!(outcome.elapsed >= window.measured);
            assert_eq!(outcome.all_requests + 7, fifo.queued);
            assert!(outcome.latency.count() > 0);
            assert!(outcome.latency.count() < outcome.all_requests);
        }
    }

    #[test]
    fn a_disk_smaller_than_the_depth_is_refused() {
        assert!(Offsets::new(&load(true, 8), 7 * 4096).is_err());
        assert!(Offsets::new(&load(true, 8), 8 * 4096).is_ok());
    }
}
