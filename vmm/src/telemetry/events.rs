//! `--event-monitor`: what happens to the guest, as JSON for a program that follows it.
//!
//! Cloud Hypervisor's shape: objects `{timestamp: {secs, nanos}, source, event, properties}`, the time since the start,
//! an empty line after each. Any thread reports; a line is written at once and never waited for: what does not fit
//! into a reader's FIFO or socket is dropped whole and counted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Where events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventMonitor {
    /// A FIFO, or a file that is made or truncated.
    Path(PathBuf),
    /// Inherited.
    Fd(i32),
}

/// Why there is no event monitor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path.
    #[error("--event-monitor: cannot open {}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The descriptor.
    #[error("--event-monitor: fd={fd} is not open for writing")]
    Fd {
        /// Its number.
        fd: i32,
        /// The system's answer.
        source: io::Error,
    },
}

#[derive(Serialize)]
struct Event<'a> {
    timestamp: Duration,
    source: &'a str,
    event: &'a str,
    properties: Option<BTreeMap<&'a str, &'a str>>,
}

struct Monitor {
    /// Held for one write that does not block.
    out: Mutex<Out>,
    start: Instant,
    dropped: AtomicU64,
}

/// A file, and the end of an event of which it has taken the beginning.
struct Out {
    file: File,
    rest: Vec<u8>,
}

static MONITOR: OnceLock<Monitor> = OnceLock::new();

/// Opens the place; events from here on go there.
pub fn start(place: &EventMonitor) -> Result<(), Error> {
    let file = match place {
        EventMonitor::Path(path) => open(path).map_err(|source| Error::Open {
            path: path.clone(),
            source,
        })?,
        EventMonitor::Fd(fd) => {
            super::inherited::writable(*fd).map_err(|source| Error::Fd { fd: *fd, source })?
        }
    };
    MONITOR.get_or_init(|| Monitor {
        out: Mutex::new(Out {
            file,
            rest: Vec::new(),
        }),
        start: Instant::now(),
        dropped: AtomicU64::new(0),
    });
    Ok(())
}

/// A FIFO is opened for both, so that neither this waits for a reader nor a reader that comes and goes ends it.
fn open(path: &Path) -> io::Result<File> {
    let is_fifo = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    let mut options = File::options();
    options.write(true).custom_flags(libc::O_NONBLOCK);
    match is_fifo {
        true => options.read(true).open(path),
        false => options.create(true).truncate(true).open(path),
    }
}

/// Reports an event; `properties` are names and values.
pub fn event(source: &str, event: &str, properties: &[(&str, &str)]) {
    let Some(monitor) = MONITOR.get() else {
        return;
    };
    let line = render(monitor.start.elapsed(), source, event, properties);
    let mut out = monitor.out.lock().unwrap_or_else(PoisonError::into_inner);
    if !out.take(&line) {
        monitor.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// Events that nobody could take.
pub fn dropped() -> u64 {
    MONITOR
        .get()
        .map_or(0, |monitor| monitor.dropped.load(Ordering::Relaxed))
}

fn render(timestamp: Duration, source: &str, event: &str, properties: &[(&str, &str)]) -> Vec<u8> {
    let event = Event {
        timestamp,
        source,
        event,
        properties: (!properties.is_empty()).then(|| properties.iter().copied().collect()),
    };
    // Only maps with keys that are no strings, and writers that fail, make errors: neither is here.
    let mut line = serde_json::to_vec_pretty(&event).unwrap_or_default();
    line.extend(b"\n\n");
    line
}

impl Out {
    /// Writes the line, or at least its beginning; the rest is kept for the next time. False: dropped.
    fn take(&mut self, line: &[u8]) -> bool {
        let rest = std::mem::take(&mut self.rest);
        let left = self.write(&rest);
        self.rest = rest[rest.len() - left..].to_vec();
        if !self.rest.is_empty() {
            return false;
        }
        let left = self.write(line);
        if left == line.len() {
            return false;
        }
        self.rest = line[line.len() - left..].to_vec();
        true
    }

    /// How many bytes were not taken.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            match self.file.write(&bytes[done..]) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        bytes.len() - done
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_shape_is_cloud_hypervisors() {
        let line = render(Duration::new(1, 5), "vm", "booted", &[]);
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let expected = serde_json::json!({
            "timestamp": {"secs": 1, "nanos": 5},
            "source": "vm", "event": "booted", "properties": null,
        });
        assert_eq!(value, expected);
        assert!(line.ends_with(b"}\n\n"));
        let line = render(Duration::ZERO, "vhost-user", "lost", &[("id", "_disk0")]);
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(value["properties"], serde_json::json!({"id": "_disk0"}));
    }

    #[test]
    fn a_reader_that_is_stuck_loses_whole_events_and_gets_whole_ones_later() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut out = Out {
            file: OwnedFd::from(ours).into(),
            rest: Vec::new(),
        };
        let line = [b"x".repeat(9999), b"\n".to_vec()].concat();
        let taken = (0..200).filter(|_| out.take(&line)).count();
        assert!(taken < 200);
        let mut read = vec![0; taken * line.len() - out.rest.len()];
        theirs.read_exact(&mut read).unwrap();
        assert!(out.take(&line), "there is room again");
        let mut more = vec![0; (taken + 1) * line.len() - read.len()];
        theirs.read_exact(&mut more).unwrap();
        read.append(&mut more);
        assert!(read.chunks(line.len()).all(|chunk| chunk == line));
    }
}
