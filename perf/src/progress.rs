//! One line on stderr that says how far we are.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Counts steps of about equal length.
pub struct Progress {
    done: usize,
    total: usize,
    began: Instant,
    terminal: bool,
}

impl Progress {
    /// For `total` steps from now.
    pub fn new(total: usize) -> Progress {
        Progress {
            done: 0,
            total,
            began: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// A step is done, and `what` came of it.
    pub fn step(&mut self, what: &str) {
        self.done += 1;
        let each = self.began.elapsed() / u32::try_from(self.done).unwrap_or(u32::MAX);
        let left = each * u32::try_from(self.total.saturating_sub(self.done)).unwrap_or(u32::MAX);
        let line = format!(
            "[{:>3}/{}] {} left · {what}",
            self.done,
            self.total,
            short(left)
        );
        let mut out = std::io::stderr();
        // Progress that cannot be shown is no reason to stop.
        let _ = if self.terminal {
            write!(out, "\r\x1b[K{line}")
        } else {
            writeln!(out, "{line}")
        };
    }

    /// A step will not happen.
    pub fn skip(&mut self) {
        self.total = self.total.saturating_sub(1);
    }

    /// Takes the line away.
    pub fn finish(self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn short(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}
