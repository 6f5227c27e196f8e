//! The thread that the client's side of a run has to itself.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::sys::{self, Interruptible};

/// Runs `work` on a thread of its own that stays on `cpu`. A request that is never answered ends it:
/// after `patience` every wait is cut short.
#[expect(unsafe_code, reason = "signals a thread")]
pub fn on_cpu<T: Send>(
    cpu: usize,
    patience: Duration,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let (tell, told) = channel();
    let (end, ended) = channel::<()>();
    let client = move || {
        tell.send(Interruptible::this_thread()?)?;
        sys::pin_thread(cpu).with_context(|| format!("cannot run on CPU {cpu}"))?;
        let result = work();
        drop(end);
        result
    };
    thread::scope(|scope| {
        let thread = scope.spawn(client);
        let mut wait = patience;
        if let Ok(waiting) = told.recv() {
            while ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                // SAFETY: it is joined below.
                unsafe { waiting.interrupt() };
                wait = Duration::from_millis(100);
            }
        }
        thread
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the client panicked")))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_client_that_waits_in_vain_is_cut_short() {
        let (mut silent, _other) = UnixStream::pair().unwrap();
        let began = Instant::now();
        let read = || Ok(silent.read(&mut [0])?);
        let error = on_cpu(0, Duration::from_millis(20), read).unwrap_err();
        assert!(format!("{error:#}").contains("nterrupted"), "{error:#}");
        assert!(began.elapsed() >= Duration::from_millis(20));
        assert_eq!(on_cpu(0, Duration::from_secs(9), || Ok(7)).unwrap(), 7);
    }
}
