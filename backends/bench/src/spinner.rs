//! Keeps cores awake.
//!
//! A virtual core that sleeps takes 100 µs and more to wake, which would drown everything measured
//! here. A thread of the class SCHED_IDLE on each core costs the others nothing: it runs only where
//! the core would sleep.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use anyhow::{Context, Result};

use crate::sys;

/// Spins until dropped.
pub struct Spinners {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Spinners {
    /// One on each of `cpus`, all running when this returns.
    pub fn start(cpus: &[usize]) -> Result<Spinners> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut spinners = Spinners {
            stop: Arc::clone(&stop),
            threads: Vec::new(),
        };
        for &cpu in cpus {
            let stop = Arc::clone(&stop);
            let (ready, is_ready) = channel();
            let thread = std::thread::Builder::new().name(format!("awake{cpu}"));
            let spin = move || {
                let prepared = sys::pin_thread(cpu).and_then(|()| sys::set_sched_idle());
                let good = prepared.is_ok();
                let _ = ready.send(prepared);
                // Without a pause instruction: some hypervisors trap loops of those.
                while good && !stop.load(Ordering::Relaxed) {}
            };
            spinners.threads.push(thread.spawn(spin)?);
            is_ready
                .recv()?
                .with_context(|| format!("cannot keep CPU {cpu} awake"))?;
        }
        Ok(spinners)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
