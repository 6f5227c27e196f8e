//! What else the host does: measured before each scenario and after the last, on the CPUs that are used.
//!
//! A thread on each CPU does the same small piece of work over and over for a while. How much longer than the
//! middle one the slowest of twenty takes is the *jitter*. The time between two of its readings of the clock that
//! its own CPU clock does not know is what *others* had. `steal` is what the hypervisor took, as the kernel counts.
#![forbid(unsafe_code)]

use std::fs;
use std::hint::black_box;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::sys;

/// How long it is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Turns of one piece of work: some 20 µs.
const TURNS: u32 = 20_000;
/// A share of a CPU that others may have before nothing can be said.
pub const TOO_NOISY: f64 = 0.10;

/// Of one look.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// Before which scenario.
    pub when: String,
    /// How much slower the slowest twentieth of the pieces is than the middle one; 0.1 is 10 %.
    pub jitter: f64,
    /// Share of the CPUs that others had, steal included.
    pub others: f64,
    /// Share of the machine's CPU time that the hypervisor took during the look.
    pub steal: f64,
}

impl Noise {
    /// Looks for half a second at `cpus`.
    pub fn look(when: &str, cpus: &[usize]) -> Result<Noise> {
        let before = stolen();
        let looks = std::thread::scope(|scope| {
            let threads = cpus.iter().map(|&cpu| scope.spawn(move || look(cpu)));
            let threads: Vec<_> = threads.collect();
            let looks = threads.into_iter().map(ScopedJoinHandle::join);
            looks
                .map(|look| look.unwrap_or_else(|_| Err(anyhow!("a look at a CPU panicked"))))
                .collect::<Result<Vec<_>>>()
        })?;
        let after = stolen();
        let count = looks.len().max(1) as f64;
        let total = after.1.saturating_sub(before.1).max(1);
        Ok(Noise {
            when: when.to_owned(),
            jitter: looks.iter().map(|look| look.0).fold(0.0, f64::max),
            others: looks.iter().map(|look| look.1).sum::<f64>() / count,
            steal: after.0.saturating_sub(before.0) as f64 / total as f64,
        })
    }

    /// Whether no verdict can be trusted.
    pub fn too_noisy(&self) -> bool {
        self.others > TOO_NOISY || self.steal > TOO_NOISY
    }

    /// In one line.
    pub fn line(&self) -> String {
        let percent = |share: f64| share * 100.0;
        format!(
            "others had {:.1} % of the CPUs, steal {:.1} %, jitter {:.1} %{}",
            percent(self.others),
            percent(self.steal),
            percent(self.jitter),
            if self.too_noisy() { ": too noisy" } else { "" }
        )
    }
}

/// Jitter, and share that others had.
fn look(cpu: usize) -> Result<(f64, f64)> {
    sys::pin_thread(cpu)?;
    let (began, used) = (Instant::now(), sys::thread_cpu()?);
    let mut pieces = Vec::new();
    while began.elapsed() < LOOK {
        let piece = Instant::now();
        let mut number = 1u64;
        for turn in 0..TURNS {
            number = black_box(number.wrapping_mul(0x9e37_79b9).wrapping_add(turn.into()));
        }
        pieces.push(piece.elapsed().as_secs_f64());
    }
    let there = began.elapsed().as_secs_f64();
    let used = sys::thread_cpu()?.saturating_sub(used).as_secs_f64();
    pieces.sort_by(f64::total_cmp);
    let at = |share: f64| pieces[((pieces.len() - 1) as f64 * share) as usize];
    Ok((at(0.95) / at(0.5) - 1.0, (1.0 - used / there).max(0.0)))
}

/// Ticks that were stolen, and all ticks, of the whole machine.
fn stolen() -> (u64, u64) {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let first = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = first
        .split_whitespace()
        .skip(1)
        .flat_map(str::parse)
        .collect();
    // user nice system idle iowait irq softirq steal; guest times are in user's already.
    let all = ticks.iter().take(8).sum();
    (ticks.get(7).copied().unwrap_or(0), all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_has_shares() {
        let noise = Noise::look("test", &[0]).unwrap();
        assert!((0.0..=1.0).contains(&noise.others), "{noise:?}");
        assert!((0.0..=1.0).contains(&noise.steal) && noise.jitter >= 0.0);
        assert!(noise.line().contains("others had"));
    }

    #[test]
    fn a_host_with_others_on_it_is_too_noisy() {
        let noise = |others, steal| Noise {
            others,
            steal,
            ..Noise::default()
        };
        assert!(!noise(0.05, 0.05).too_noisy());
        assert!(noise(0.2, 0.0).too_noisy() && noise(0.0, 0.2).too_noisy());
        assert!(noise(0.2, 0.0).line().ends_with("too noisy"));
    }
}
