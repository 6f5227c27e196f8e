//! Ctrl-C. The first one is a wish: what is under way ends, what was measured is kept. The second one ends the
//! program; the janitor clears up in either case.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

static WISH: OnceLock<Arc<AtomicBool>> = OnceLock::new();
/// Between two looks at the wish.
const GLANCE: Duration = Duration::from_millis(20);

/// From now on the first signal is a wish, and the second one ends us.
pub fn install() -> Result<()> {
    let wish = Arc::clone(WISH.get_or_init(Arc::default));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // Before the one that sets it: the first signal finds it not set.
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&wish))
            .and_then(|_| flag::register(signal, Arc::clone(&wish)))
            .context("cannot handle signals")?;
    }
    Ok(())
}

/// Whether somebody wants us to stop.
pub fn requested() -> bool {
    WISH.get().is_some_and(|wish| wish.load(Ordering::Relaxed))
}

/// An error where somebody wants us to stop.
pub fn check() -> Result<()> {
    if requested() {
        bail!("stopped");
    }
    Ok(())
}

/// Waits, and is cut short by the wish to stop.
pub fn sleep(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(GLANCE));
    }
}
