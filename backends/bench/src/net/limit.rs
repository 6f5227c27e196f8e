//! Plain reads and writes on a tap: one system call a frame, no virtio.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::cells::{Cell, Way};
use super::tap::{self, Sender};
use crate::sys;

/// Frames that go round where they come from the tap: less than its queue takes.
pub(super) const CIRCULATING: u64 = 256;

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
    let (stop, moved) = (&stop, &moved);
    let running = || !stop.load(Ordering::Relaxed);
    let (tell, told) = channel();
    thread::scope(|scope| {
        let frame = &frame;
        let mut tap = &tap;
        let worker = scope.spawn(move || {
            tell.send(sys::thread_number())
                .map_err(std::io::Error::other)?;
            sys::pin_thread(daemon_cpu)?;
            let mut buffer = vec![0; 2048];
            while running() {
                let done = match cell.way {
                    Way::ToTap => tap.write(frame),
                    Way::FromTap => tap.read(&mut buffer),
                };
                match done {
                    Ok(_) => moved.store(moved.load(Ordering::Relaxed) + 1, Ordering::Relaxed),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        let sender = (cell.way == Way::FromTap).then(|| {
            scope.spawn(|| {
                sys::pin_thread(client_cpu)?;
                let sender = Sender::new()?;
                let mut sent: u64 = 0;
                let mut last = (0, Instant::now());
                while running() {
                    let read = moved.load(Ordering::Relaxed);
                    if read != last.0 {
                        last = (read, Instant::now());
                    } else if last.1.elapsed() > LOST {
                        // What the kernel has dropped will not come: begin anew.
                        sent = read;
                    }
                    // Some that were given up for lost may come after all.
                    sent = sent.max(read);
                    let room = CIRCULATING - (sent - read).min(CIRCULATING);
                    if room > 0 {
                        sent += match sender.send(frame, room as usize) {
                            Ok(more) => more as u64,
                            // A reader that had to wait for its core has not lost them after all.
                            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => 0,
                            Err(error) => return Err(error),
                        };
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
