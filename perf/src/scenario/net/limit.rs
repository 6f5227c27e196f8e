//! Plain reads and writes on a tap: one system call a frame, no virtio.
//!
//! What is read goes round as with a daemon (see [`super::circle`]): so many frames, by the same way
//! into the tap, and out of it into memory that the sender's core looks at.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::cells::{Cell, Way};
use super::circle::{Buffers, TxRing};
use super::tap;
use crate::sys;

/// Frames that go round where they come from the tap: less than its queue takes.
pub(super) const CIRCULATING: u64 = 256;

/// Frames sent at a time, as testpmd does.
const BURST: u64 = 32;

/// A reader that gets nothing for so long has read all there is.
const LOST: Duration = Duration::from_millis(100);

/// Moves frames until `watch` returns, which is told the number of the thread that reads or writes.
pub(super) fn run<T>(
    cell: &Cell,
    daemon_cpu: usize,
    client_cpu: usize,
    watch: impl FnOnce(u32) -> Result<T>,
) -> Result<T> {
    let tap = tap::create().context("cannot make a tap")?;
    let stop = AtomicBool::new(false);
    let moved = AtomicU64::new(0);
    let frame = tap::frame(cell.frame);
    let buffers = Buffers::full_of(&frame).context("no memory for frames")?;
    let (stop, moved, buffers) = (&stop, &moved, &buffers);
    let running = || !stop.load(Ordering::Relaxed);
    let (tell, told) = channel();
    thread::scope(|scope| {
        let frame = &frame;
        let mut tap = &tap;
        let worker = scope.spawn(move || {
            tell.send(sys::thread_number())
                .map_err(std::io::Error::other)?;
            sys::pin_thread(daemon_cpu)?;
            let mut number = 0;
            while running() {
                let done = match cell.way {
                    Way::ToTap => tap.write(frame),
                    Way::FromTap => buffers.read(tap, number),
                };
                match done {
                    Ok(_) => {
                        number += 1;
                        // The frame is in its buffer before it is sent on.
                        moved.store(number, Ordering::Release);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        let sender = (cell.way == Way::FromTap).then(|| {
            scope.spawn(|| {
                sys::pin_thread(client_cpu)?;
                let mut ring = TxRing::new()?;
                let mut sent: u64 = 0;
                let mut last = (0, Instant::now());
                while running() {
                    let read = moved.load(Ordering::Acquire);
                    if read != last.0 {
                        last = (read, Instant::now());
                    } else if last.1.elapsed() > LOST {
                        // What the kernel has dropped will not come: begin anew.
                        sent = read;
                    }
                    // Some that were given up for lost may come after all.
                    sent = sent.max(read);
                    let room = CIRCULATING.saturating_sub(sent - read).min(BURST);
                    if room > 0 {
                        // As many frames are under way: what is sent has just been read.
                        let first = sent.wrapping_sub(CIRCULATING);
                        sent += ring.send(buffers, first, room, cell.frame)?;
                    }
                }
                Ok::<(), std::io::Error>(())
            })
        });
        let result = told.recv().map_err(anyhow::Error::from).and_then(watch);
        stop.store(true, Ordering::Relaxed);
        for thread in [Some(worker), sender].into_iter().flatten() {
            thread
                .join()
                .map_err(|_| anyhow!("a thread on the tap panicked"))?
                .context("on the tap")?;
        }
        result
    })
}
