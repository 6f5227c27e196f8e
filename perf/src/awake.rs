//! Keeps cores awake.
//!
//! A virtual core that sleeps takes 100 µs and more to wake, which would drown everything measured
//! here. Two ways:
//!
//! - **poll**: a latency of 0 asked of the kernel (/dev/cpu_dma_latency, PM QoS). Its idle loop then
//!   polls instead of halting, for as long as the file is open. Needs root and a cpuidle driver with
//!   a state POLL (in a KVM guest: haltpoll).
//! - **spin**: a thread of the class SCHED_IDLE on each core, which runs only where the core would
//!   sleep. It is in the way of the scheduler of Linux 6.6 and later, though: a thread that wakes
//!   while it has had a little more than its share is not eligible for some microseconds, the
//!   spinner runs on, and the next look is the next tick, up to 4 ms later. Seen with the kernel's
//!   workers that complete direct writes: at worst every batch took 4 ms.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};

use crate::sys;

/// How cores are kept awake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// poll where the kernel can, otherwise spin
    Auto,
    /// The kernel's idle loop polls (PM QoS)
    Poll,
    /// A SCHED_IDLE thread spins on each core
    Spin,
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            How::Auto => "auto",
            How::Poll => "poll",
            How::Spin => "spin",
        })
    }
}

/// Cores are awake until this is dropped.
pub struct Awake {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// The wish holds while it is open.
    latency: Option<File>,
}

impl Awake {
    /// Keeps `cpus` awake from now on.
    pub fn keep(cpus: &[usize], how: How) -> Result<Awake> {
        let mut awake = Awake {
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
            latency: None,
        };
        match (how, ask_for_polling(cpus)) {
            (How::Auto | How::Poll, Ok(file)) => awake.latency = Some(file),
            (How::Poll, Err(error)) => return Err(error),
            (How::Auto | How::Spin, _) => awake.spin(cpus)?,
        }
        Ok(awake)
    }

    /// For a reader of the results.
    pub fn describe(&self) -> &'static str {
        match self.latency {
            Some(_) => "the kernel's idle loop polls (PM QoS)",
            None => "a SCHED_IDLE spinner on each core",
        }
    }

    fn spin(&mut self, cpus: &[usize]) -> Result<()> {
        for &cpu in cpus {
            let stop = Arc::clone(&self.stop);
            let (ready, is_ready) = channel();
            let thread = std::thread::Builder::new().name(format!("awake{cpu}"));
            let spin = move || {
                let prepared = sys::pin_thread(cpu).and_then(|()| sys::set_sched_idle());
                let good = prepared.is_ok();
                let _ = ready.send(prepared);
                // Without a pause instruction: some hypervisors trap loops of those.
                while good && !stop.load(Ordering::Relaxed) {}
            };
            self.threads.push(thread.spawn(spin)?);
            is_ready
                .recv()?
                .with_context(|| format!("cannot keep CPU {cpu} awake"))?;
        }
        Ok(())
    }
}

/// Asks the kernel for a latency of 0; an error where that would not keep `cpus` awake.
fn ask_for_polling(cpus: &[usize]) -> Result<File> {
    for cpu in cpus {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/cpuidle/state0/name");
        let name = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        if name.trim() != "POLL" {
            bail!(
                "CPU {cpu} has no idle state that polls, only {}",
                name.trim()
            );
        }
    }
    let path = "/dev/cpu_dma_latency";
    let file = File::options().write(true).open(path);
    let mut file = file.with_context(|| format!("cannot open {path}"))?;
    let written = file.write_all(&0i32.to_ne_bytes());
    written.with_context(|| format!("cannot write {path}"))?;
    Ok(file)
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
