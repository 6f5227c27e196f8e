//! Threads that turn what the kernel has to say into events: `signals` and `psi`.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::mpsc::Sender;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Event;
use crate::sample::Roots;

/// Wakes us when some task has waited a tenth of two seconds for memory (accounting/psi.rst): whoever has no
/// CAP_SYS_RESOURCE must ask for whole multiples of two seconds. The kernel takes the last byte for the end of the text.
const TRIGGER: &str = "some 200000 2000000\0";

/// SIGTERM and SIGINT end the daemon, SIGHUP has it read its configuration.
pub(super) fn signals(to: Sender<Event>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let work = move || {
        for signal in signals.forever() {
            let event = match signal {
                SIGHUP => Event::Reload,
                _ => Event::End,
            };
            if to.send(event).is_err() {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(work)
        .map(drop)
}

/// Reports pressure as it comes. A kernel without PSI, or one that allows no triggers, is looked at once an interval.
pub(super) fn pressure(roots: &Roots, to: Sender<Event>) {
    let path = roots.proc.join("pressure/memory");
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(TRIGGER.as_bytes()).map(|()| file));
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            tracing::info!(%error, "the kernel does not report memory pressure: it is looked at every interval");
            return;
        }
    };
    let work = move || {
        loop {
            let mut fds = [PollFd::new(&file, PollFlags::PRI)];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            }
            let events = fds[0].revents();
            if events.contains(PollFlags::ERR) || to.send(Event::Pressure).is_err() {
                return;
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("psi".to_owned()).spawn(work) {
        tracing::warn!(%error, "memory pressure is looked at every interval only");
    }
}
