//! Waiting with a deadline, and the errors that end a story.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

/// Something that a story cannot go on after: the machine under test does not answer any more.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// An event did not come in time.
    #[error("{what}: not within {seconds} s")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// A process ended that should have lived.
    #[error("{0}")]
    Gone(String),
}

impl Broken {
    /// The error of a wait for `what` that took too long.
    #[must_use]
    pub fn deadline(what: &str, limit: Duration) -> anyhow::Error {
        Self::Deadline {
            what: what.to_owned(),
            seconds: patient(limit).as_secs(),
        }
        .into()
    }
}

/// Whether `error` is or comes from a [`Broken`].
#[must_use]
pub fn is_broken(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Broken>().is_some()
        || error
            .chain()
            .any(|cause| cause.downcast_ref::<Broken>().is_some())
}

/// Factor on every deadline: see [`set_patience`].
static PATIENCE: AtomicU32 = AtomicU32::new(1);

/// Multiplies every deadline, for a host that has other work to do.
pub fn set_patience(factor: u32) {
    PATIENCE.store(factor.max(1), Ordering::Relaxed);
}

/// What a wait of `limit` may really take.
pub(crate) fn patient(limit: Duration) -> Duration {
    limit * PATIENCE.load(Ordering::Relaxed)
}

/// Asks `probe` every 20 ms until it has a value: for what the kernel tells only to those who ask.
///
/// # Errors
/// The probe's own, or [`Broken::Deadline`].
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + patient(limit);
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if Instant::now() >= end {
            return Err(Broken::deadline(what, limit));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Shorthand for seconds.
#[must_use]
pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_missed_deadline_is_recognised_below_context() {
        let error = until::<()>("never", Duration::ZERO, || Ok(None))
            .context("asking")
            .expect_err("it cannot come true");
        assert!(is_broken(&error));
        assert!(!is_broken(&anyhow::anyhow!("other")));
    }
}
