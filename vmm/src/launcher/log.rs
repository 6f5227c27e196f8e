//! What a daemon writes to its standard error, line by line into our log.
//!
//! A daemon that a guest took over can write what it likes: lines are cut, control characters replaced, and
//! no more than so many pass in a time.

#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longest line; the rest of it is the next one.
const MAX_LINE: usize = 1024;
/// Lines that pass in a period.
const MAX_LINES: u32 = 100;
const PERIOD: Duration = Duration::from_secs(10);
/// Lines that are kept while it is not known whether the last of them is an error.
const MAX_HELD: usize = 50;

/// The log of one daemon.
#[derive(Debug)]
pub(super) struct Log {
    id: String,
    stream: UnixStream,
    /// The line that is not complete yet.
    part: Vec<u8>,
    /// Lines that are not passed on yet, until the daemon serves.
    held: Option<Vec<String>>,
    passed: u32,
    since: Instant,
    suppressed: u64,
}

impl Log {
    pub(super) fn new(id: &str, stream: UnixStream) -> Self {
        Self {
            id: id.to_owned(),
            stream,
            part: Vec::new(),
            held: Some(Vec::new()),
            passed: 0,
            since: Instant::now(),
            suppressed: 0,
        }
    }

    /// Takes what there is; returns false when there will be no more.
    pub(super) fn read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        // A daemon that writes without end must not keep this thread for itself.
        for _ in 0..16 {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.line_end();
                    return false;
                }
                Ok(len) => self.take(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Passes on what was held and what comes from now on.
    pub(super) fn release(&mut self) {
        for line in self.held.take().unwrap_or_default() {
            self.pass(&line);
        }
    }

    /// The last line of a daemon that never served; the others are passed on.
    pub(super) fn last_words(&mut self) -> Option<String> {
        let last = self.held.as_mut().and_then(Vec::pop);
        self.release();
        last
    }

    fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.line_end(),
                byte => self.part.push(byte),
            }
            if self.part.len() >= MAX_LINE {
                self.line_end();
            }
        }
    }

    fn line_end(&mut self) {
        let part = std::mem::take(&mut self.part);
        let text = String::from_utf8_lossy(&part);
        let line = text.trim_end().replace(char::is_control, "?");
        if line.is_empty() {
            return;
        }
        match &mut self.held {
            Some(held) if held.len() < MAX_HELD => held.push(line),
            _ => self.pass(&line),
        }
    }

    fn pass(&mut self, line: &str) {
        if self.since.elapsed() > PERIOD {
            self.since = Instant::now();
            self.passed = 0;
        }
        if self.passed >= MAX_LINES {
            self.suppressed += 1;
            return;
        }
        self.passed += 1;
        let device = self.id.as_str();
        match std::mem::take(&mut self.suppressed) {
            0 => {}
            suppressed => tracing::warn!(device, suppressed, "the daemon writes too many lines"),
        }
        let (level, text) = parts(line);
        match level {
            "ERROR" => tracing::error!(device, "{text}"),
            "WARN" => tracing::warn!(device, "{text}"),
            "DEBUG" | "TRACE" => tracing::debug!(device, "{text}"),
            _ => tracing::info!(device, "{text}"),
        }
    }
}

impl AsRawFd for Log {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// The level that a line says it has, and the rest without it and without the time.
fn parts(line: &str) -> (&str, &str) {
    let line = line.trim_start();
    let rest = match line.split_once(' ') {
        Some((time, rest)) if time.len() >= 20 && time.ends_with('Z') && time.contains('T') => rest,
        _ => line,
    };
    let rest = rest.trim_start();
    match rest.split_once(' ') {
        Some((level @ ("ERROR" | "WARN" | "INFO" | "DEBUG" | "TRACE"), text)) => (level, text),
        _ => ("", rest),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn log() -> (UnixStream, Log) {
        let (daemon, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (daemon, Log::new("_disk0", ours))
    }

    #[test]
    fn time_and_level_are_not_said_twice() {
        let line = "2026-11-24T12:00:00.000000Z  WARN the disk is slow queue=1";
        assert_eq!(parts(line), ("WARN", "the disk is slow queue=1"));
        assert_eq!(parts(" INFO opened"), ("INFO", "opened"));
        assert_eq!(parts("berth-blk: no"), ("", "berth-blk: no"));
    }

    #[test]
    fn the_last_words_of_one_that_never_served_are_its_error() {
        let (mut daemon, mut log) = log();
        daemon.write_all(b"first\n\nsecond\x1b[31m, with").unwrap();
        assert!(log.read());
        daemon.write_all(b" more").unwrap();
        drop(daemon);
        while log.read() {}
        assert_eq!(log.last_words().as_deref(), Some("second?[31m, with more"));
        assert_eq!(log.passed, 1);
        assert_eq!(log.last_words(), None);
    }

    #[test]
    fn a_flood_of_lines_is_counted_and_not_passed_on() {
        let (mut daemon, mut log) = log();
        log.release();
        for _ in 0..20 {
            daemon.write_all(&b"x\n".repeat(500)).unwrap();
            assert!(log.read());
        }
        assert_eq!((log.passed, log.suppressed), (MAX_LINES, 9_900));
        daemon.write_all(&[b'y'; 3 * MAX_LINE]).unwrap();
        assert!(log.read());
        assert!(log.part.len() < MAX_LINE);
    }
}
