//! What /proc tells about a process.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{Error, Result};
use std::time::Duration;

use crate::sys;

/// CPU time of io_uring's kernel workers, which are threads of the process that submits. Those that
/// have ended (after five idle seconds) are no longer counted.
pub fn workers_cpu(process: &str) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let task = entry?.path();
        // A thread may end while we look.
        let Ok(name) = fs::read_to_string(task.join("comm")) else {
            continue;
        };
        if !name.starts_with("iou-wrk") {
            continue;
        }
        if let Ok(times) = fs::read_to_string(task.join("schedstat")) {
            sum += on_cpu(&times)?;
        }
    }
    Ok(sum)
}

/// First field of schedstat: nanoseconds on a CPU.
fn on_cpu(schedstat: &str) -> Result<Duration> {
    let field = schedstat.split_whitespace().next().unwrap_or_default();
    field
        .parse()
        .map(Duration::from_nanos)
        .map_err(|_| Error::other(format!("not a schedstat: {schedstat}")))
}

/// CPU time of the calling thread and of all kernel workers of this process.
pub fn thread_and_workers_cpu() -> Result<Duration> {
    Ok(sys::thread_cpu()? + workers_cpu("self")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedstat_is_read_and_nonsense_refused() {
        assert_eq!(on_cpu("1500 3 4\n").unwrap(), Duration::from_nanos(1500));
        assert!(on_cpu("").is_err() && on_cpu("x 1").is_err());
    }

    #[test]
    fn this_process_has_no_kernel_workers_and_some_cpu_time() {
        assert_eq!(workers_cpu("self").unwrap(), Duration::ZERO);
        assert!(thread_and_workers_cpu().unwrap() > Duration::ZERO);
    }
}
