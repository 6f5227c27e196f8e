//! Where vCPU threads wait: whether they may run, and who of them has stopped.
//!
//! ```text
//!            pause, stop                 all parked
//!   Run ───────────────▶ Pause ... parked ──────────▶ the controller goes on
//!    ▲                      │
//!    └────── resume ────────┘      Stop: threads return, for good
//! ```
//!
//! A thread passes the gate before it enters the guest. The controller closes the gate first and kicks
//! the threads out of KVM_RUN second ([`super::vcpu`] says why no kick is lost). Nobody holds the lock
//! while waiting.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    Stop,
}

/// What a thread that came to the gate is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// Enter the guest.
    Run,
    /// Enter the guest; it was paused meanwhile.
    Resumed,
    /// Return.
    Stop,
}

struct State {
    target: Target,
    /// Per vCPU: stopped at the gate.
    parked: Vec<bool>,
}

/// The gate of all vCPUs of a machine; closed when made.
pub(super) struct Gate {
    state: Mutex<State>,
    /// The target changed.
    opened: Condvar,
    /// A thread parked.
    arrived: Condvar,
}

impl Gate {
    /// A closed gate for so many vCPUs.
    pub(super) fn new(vcpus: usize) -> Self {
        Self {
            state: Mutex::new(State {
                target: Target::Pause,
                parked: vec![false; vcpus],
            }),
            opened: Condvar::new(),
            arrived: Condvar::new(),
        }
    }

    /// Called by vCPU `index` before it enters the guest; waits while the gate is closed.
    pub(super) fn pass(&self, index: usize) -> Pass {
        let mut state = self.lock();
        if state.target == Target::Run {
            return Pass::Run;
        }
        self.park(&mut state, index);
        while state.target == Target::Pause {
            state = wait(&self.opened, state);
        }
        if state.target == Target::Stop {
            return Pass::Stop;
        }
        state.parked[index] = false;
        Pass::Resumed
    }

    /// Called by a vCPU that can run no further: counts as parked until it is told to return.
    pub(super) fn wait_for_stop(&self, index: usize) {
        let mut state = self.lock();
        self.park(&mut state, index);
        while state.target != Target::Stop {
            state = wait(&self.opened, state);
        }
    }

    /// Opens the gate.
    pub(super) fn open(&self) {
        self.set(Target::Run);
    }

    /// Closes the gate; threads in the guest do not notice before they are kicked.
    pub(super) fn close(&self) {
        self.set(Target::Pause);
    }

    /// Tells all threads to return.
    pub(super) fn stop(&self) {
        self.set(Target::Stop);
    }

    /// Waits until every thread is parked, or returns those that are not at `deadline`.
    pub(super) fn wait_parked(&self, deadline: Instant) -> Result<(), Vec<usize>> {
        let mut state = self.lock();
        loop {
            let running: Vec<usize> = (0..state.parked.len())
                .filter(|&index| !state.parked[index])
                .collect();
            if running.is_empty() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(running);
            }
            let waited = self.arrived.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn park(&self, state: &mut State, index: usize) {
        state.parked[index] = true;
        self.arrived.notify_all();
    }

    fn set(&self, target: Target) {
        let mut state = self.lock();
        if state.target != Target::Stop {
            state.target = target;
        }
        self.opened.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait<'a>(condvar: &Condvar, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn threads_park_and_go_on() {
        let gate = Arc::new(Gate::new(2));
        let threads: Vec<_> = (0..2)
            .map(|index| {
                let gate = Arc::clone(&gate);
                thread::spawn(move || {
                    let mut passes = 0;
                    while gate.pass(index) != Pass::Stop {
                        passes += 1;
                        thread::yield_now();
                    }
                    passes
                })
            })
            .collect();
        for _ in 0..100 {
            gate.wait_parked(soon()).unwrap();
            gate.open();
            gate.close();
        }
        gate.wait_parked(soon()).unwrap();
        gate.stop();
        gate.open();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn who_does_not_come_is_named() {
        let gate = Gate::new(3);
        assert_eq!(gate.wait_parked(Instant::now()), Err(vec![0, 1, 2]));
    }

    #[test]
    fn a_dead_vcpu_does_not_hold_up_a_pause() {
        let gate = Arc::new(Gate::new(1));
        gate.open();
        let other = Arc::clone(&gate);
        let dead = thread::spawn(move || other.wait_for_stop(0));
        gate.close();
        gate.wait_parked(soon()).unwrap();
        gate.stop();
        dead.join().unwrap();
    }
}
