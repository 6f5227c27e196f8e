//! One line on stderr that says how far we are and how long it will take.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Counts steps of about equal length, scenario by scenario.
pub struct Progress {
    scenario: String,
    done: usize,
    total: usize,
    began: Instant,
    /// What the scenarios after this one will take.
    later: Duration,
    terminal: bool,
    /// A line on the terminal waits to be overwritten.
    dirty: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            scenario: String::new(),
            done: 0,
            total: 0,
            began: Instant::now(),
            later: Duration::ZERO,
            terminal: std::io::stderr().is_terminal(),
            dirty: false,
        }
    }
}

impl Progress {
    /// A scenario begins: so many steps, and after them others that take `later`.
    pub fn begin(&mut self, scenario: &str, total: usize, later: Duration) {
        scenario.clone_into(&mut self.scenario);
        (self.done, self.total, self.later) = (0, total, later);
        self.began = Instant::now();
    }

    /// It has so many steps, as is known now; they begin.
    pub fn total(&mut self, total: usize) {
        self.total = total;
        self.began = Instant::now();
    }

    /// Something takes a while before the first step.
    pub fn say(&mut self, what: &str) {
        let line = format!("{}: {what}", self.scenario);
        self.show(&line);
    }

    /// A step is done, and `what` came of it.
    pub fn step(&mut self, what: &str) {
        self.done += 1;
        let line = format!(
            "[{} {:>3}/{}] {} left · {what}",
            self.scenario,
            self.done,
            self.total,
            short(self.left())
        );
        self.show(&line);
    }

    /// Shows a line of somebody else's.
    pub fn relay(&mut self, line: &str) {
        self.show(line);
    }

    /// A step will not happen.
    pub fn skip(&mut self) {
        self.total = self.total.saturating_sub(1);
    }

    /// Takes the line away, so that something else can be written.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.dirty) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }

    fn left(&self) -> Duration {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let each = self.began.elapsed() / count(self.done.max(1));
        each.saturating_mul(count(self.total.saturating_sub(self.done))) + self.later
    }

    fn show(&mut self, line: &str) {
        let mut out = std::io::stderr();
        // Progress that cannot be shown is no reason to stop.
        let _ = if self.terminal {
            self.dirty = true;
            write!(out, "\r\x1b[K{line}")
        } else {
            writeln!(out, "{line}")
        };
    }
}

fn short(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_has_the_scenarios_that_come_later() {
        let mut progress = Progress::default();
        progress.begin("blk", 1, Duration::from_secs(90));
        progress.step("done");
        assert_eq!(progress.left(), Duration::from_secs(90));
        assert_eq!(short(progress.left()), "1:30");
    }
}
