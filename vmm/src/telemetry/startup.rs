//! `--startup-trace`: what the way to the guest's first instruction is spent on.
//!
//! Steps follow each other from thread to thread (main, boot, main, vcpu0); each is the time since the one before. The
//! table goes to standard error when vCPU 0 enters the guest for the first time. Off, a mark costs one load.

#![expect(unsafe_code, reason = "clock_gettime of another clock than std's")]

use std::fmt::Write;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

struct Trace {
    steps: Mutex<Steps>,
}

struct Steps {
    last: Instant,
    taken: Vec<(&'static str, Duration)>,
    done: bool,
}

static TRACE: OnceLock<Trace> = OnceLock::new();

/// When main began.
pub struct Begin {
    at: Instant,
    /// CPU time that the process had used by then.
    loaded: Duration,
}

impl Begin {
    /// To be called first of all.
    pub fn now() -> Self {
        let mut used = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes one timespec, which `used` is.
        unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut used) };
        Self {
            at: Instant::now(),
            loaded: Duration::new(used.tv_sec as u64, used.tv_nsec as u32),
        }
    }
}

/// Starts the trace.
pub fn start(begin: &Begin) {
    TRACE.get_or_init(|| Trace {
        steps: Mutex::new(Steps {
            last: begin.at,
            taken: vec![("program loaded (its CPU time)", begin.loaded)],
            done: false,
        }),
    });
}

/// A step is done.
pub fn mark(step: &'static str) {
    if let Some(trace) = TRACE.get() {
        trace.lock().take(step, Instant::now());
    }
}

/// The last step: vCPU 0 is about to enter the guest. The first time it prints the table.
pub fn entered() {
    let Some(trace) = TRACE.get() else {
        return;
    };
    let mut steps = trace.lock();
    if !steps.done {
        steps.take("vcpu0 at KVM_RUN", Instant::now());
        steps.done = true;
        eprint!("{}", steps.table());
    }
}

impl Trace {
    fn lock(&self) -> std::sync::MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Steps {
    fn take(&mut self, step: &'static str, now: Instant) {
        if !self.done {
            self.taken
                .push((step, now.saturating_duration_since(self.last)));
            self.last = now;
        }
    }

    fn table(&self) -> String {
        let mut text =
            String::from("startup-trace: step                                 µs    since start\n");
        let mut sum = Duration::ZERO;
        for (step, took) in &self.taken {
            sum += *took;
            let (took, sum) = (took.as_micros(), sum.as_micros());
            // Writing to a string cannot fail.
            let _ = writeln!(text, "startup-trace: {step:32} {took:8} {sum:12}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_add_up_and_end_with_the_guest() {
        let start = Instant::now();
        let mut steps = Steps {
            last: start,
            taken: Vec::new(),
            done: false,
        };
        steps.take("one", start + Duration::from_micros(30));
        steps.take("two", start + Duration::from_micros(100));
        steps.done = true;
        steps.take("late", start + Duration::from_secs(1));
        let table = steps.table();
        let words: Vec<Vec<_>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(words[1][1..], ["one", "30", "30"]);
        assert_eq!(words[2][1..], ["two", "70", "100"]);
        assert_eq!(words.len(), 3);
    }
}
